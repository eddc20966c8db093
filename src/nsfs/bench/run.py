"""`nsfs bench`: takes the samples that a plan wants, in its order, and sums them up.

A sample is a start from a cold machine: the kernel's caches are dropped before it, and one whose pages are in memory
all the same is refused, as is one that had to fetch and fetched nothing. Samples are kept as they are taken and stay
where a run is interrupted. Blocks; one at a time on a host, or they measure each other.
"""

from __future__ import annotations

import os
import platform
import random
import time
from typing import TYPE_CHECKING

from nsfs.bench.command import check_tools, rehearse, run_command
from nsfs.bench.journal import Journal, open_journal
from nsfs.bench.line import FREE
from nsfs.bench.model import (
    FETCHING,
    PHASES,
    ImageFacts,
    Plan,
    Report,
    Sample,
    Touched,
    Turn,
    Way,
    estimate_rest,
    local_run,
    plan_limit,
    plan_rest,
    plan_turns,
    summarize,
)
from nsfs.bench.pages import count_cached, measure_touched
from nsfs.bench.roots import NAMESPACE
from nsfs.bench.stage import Stage, Wish, open_stage
from nsfs.errors import NsfsError, UnsupportedError, UsageError
from nsfs.remote.reference import Reference, parse_reference
from nsfs.serve.build import identify
from nsfs.serve.mounts import load_mounts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nsfs.bench.roots import Root
    from nsfs.model.report import ImageReport
    from nsfs.serve.config import Config

_WARM = 1 << 20
"""Bytes in memory from which on a start is not a cold one."""
_ATTEMPTS = 5
"""At dropping caches; a page that is being written stays."""


def measure(wish: Wish, config: Config, say: Callable[[str], None]) -> Report:
    """Take what samples are missing in `wish.output`; the report over all that are there then.

    Raises UsageError and UnsupportedError where it cannot begin, NsfsError where a start fails or proves nothing.
    """
    _check(wish)
    with open_stage(wish, config, say) as stage:
        journal = open_journal(wish.output, _plan(stage), _seed(wish))
        say(f"eager is {journal.plan.baseline}; order by seed {journal.seed}; samples go to {journal.path}")
        _complete(stage, journal, say)
        return _report(journal, stage.image)


def _check(wish: Wish) -> None:
    if os.geteuid() != 0:
        raise UnsupportedError("a bench mounts and drops caches, which takes root")
    if not isinstance(parse_reference(wish.reference), Reference):
        raise UsageError(f"not an image of a registry: {wish.reference}", hint="push it to one, also on loopback")
    check_tools()


def _seed(wish: Wish) -> int:
    return random.randrange(1 << 32) if wish.seed is None else wish.seed  # noqa: S311  an order, not a secret


def _plan(stage: Stage) -> Plan:
    theirs = stage.containerd
    return Plan(
        reference=stage.wish.reference,
        digest=stage.image.digest,
        command=list(stage.command.words),
        wait_for=stage.command.wait_for,
        rate=stage.wish.shape.rate,
        round_trip=stage.wish.shape.round_trip,
        ways=list(stage.wish.ways),
        baseline=f"containerd {theirs.version}, overlayfs" if theirs else "nsfs, all of it copied into a directory",
        version=identify(),
    )


def _complete(stage: Stage, journal: Journal, say: Callable[[str], None]) -> None:
    """Have every sample that is asked for, and what a start touches."""
    turns = plan_turns(journal.plan.ways, stage.wish.samples, journal.seed, stage.wish.once)
    rest = plan_rest(turns, journal.samples)
    if not rest and journal.touched is not None:
        return
    say("fetching all of the image once, unmeasured")
    stage.make_ready()
    took: dict[str, float] = {}
    for number, turn in enumerate(rest, 1):
        began = time.monotonic()
        sample = _take(stage, turn)
        journal.add(sample)
        took[turn.way] = time.monotonic() - began
        say(f"{_render(sample)}; {_render_rest(rest[number:], took)}")
    if journal.touched is None and (touched := _touch(stage, say)) is not None:
        journal.add_touched(touched)


def _render(sample: Sample) -> str:
    return f"{sample.way} {sample.number + 1}: {sample.seconds:.2f} s, {sample.received / 1e6:.1f} MB over the line"


def _render_rest(rest: Sequence[Turn], took: Mapping[str, float]) -> str:
    """How many samples are to come, and for how long."""
    seconds = estimate_rest(rest, took)
    return f"{len(rest)} to come" + (f", about {seconds:.0f} s" if seconds else "")


def _take(stage: Stage, turn: Turn) -> Sample:
    """One start, from a cold machine to the first output."""
    line = stage.line
    with stage.open_root(turn.way) as root:
        line.shape = FREE
        root.prepare()
        cached = _cool(stage, root)
        line.shape = stage.wish.shape
        before, points, began = line.received, len(line.trace), time.monotonic()
        phases = _start(stage, root)
        received = line.received - before
        line.wait_until_quiet()
        _check_proof(stage, turn, received)
        return Sample(
            way=turn.way,
            number=turn.number,
            phases=phases,
            received=received,
            settled=line.received - before,
            cached=cached,
            trace=[(round(at - began, 4), size - before) for at, size in line.trace[points:]],
        )


def _cool(stage: Stage, root: Root) -> int:
    """Forget what is in memory, but for the tools; returns the bytes that are there all the same."""
    for _ in range(_ATTEMPTS):
        stage.forget(root)
        if (cached := count_cached(root.stored())) <= _WARM:
            break
    else:
        raise NsfsError(f"the machine's caches are not to be had cold: {cached} bytes of the image are in memory")
    rehearse()
    if stage.containerd is not None:
        stage.containerd.rehearse()
    return cached


def _start(stage: Stage, root: Root) -> dict[str, float]:
    """Seconds of each phase."""
    began = time.monotonic()
    try:
        before = root.mount(stage.target)
        mounted = time.monotonic()
        up = run_command(stage.target, stage.command, timeout=stage.wish.timeout)
    finally:
        root.umount(stage.target)
    return dict(zip(PHASES, (*before, mounted - began - sum(before), up - mounted), strict=True))


def _check_proof(stage: Stage, turn: Turn, received: int) -> None:
    """A start that had to fetch and fetched nothing over the line was no such start."""
    if turn.way in FETCHING and not received:
        raise NsfsError(
            f"nothing came over the line: {turn.way}",
            hint="a mirror without TLS is not reached over it; containerd may have the image in another namespace",
        )
    if turn.way == Way.PACK and received >= stage.image.size:
        raise NsfsError(f"no artifact was of use: {stage.wish.reference}", hint="nsfs index push puts one beside it")


def _touch(stage: Stage, say: Callable[[str], None]) -> Touched | None:
    """What a start reads: pages in memory after one without read-ahead, where all is local; None where none can be."""
    stage.line.shape = FREE
    try:
        stage.local.mount(stage.named, stage.target, NAMESPACE, driver="erofs-loop", profile="off")
    except (UnsupportedError, UsageError) as error:
        say(f"no limit, as what a start touches cannot be seen here: {error.message}")
        return None
    try:
        _stop_reading_ahead(stage.local.lowers())
        run_command(stage.target, stage.command, timeout=stage.wish.timeout)
        return measure_touched(stage.target)
    finally:
        stage.local.umount(stage.target)


def _stop_reading_ahead(lowers: str) -> None:
    """On the block devices of what is mounted below `lowers`."""
    for device in {mount.device for mount in load_mounts() if mount.target.startswith(lowers)}:
        with open(f"/sys/class/bdi/{device}/read_ahead_kb", "w", encoding="ascii") as file:
            file.write("0")


def _report(journal: Journal, image: ImageReport) -> Report:
    run = local_run(journal.samples)
    limit = plan_limit(journal.plan, run, journal.touched) if run is not None and journal.touched else None
    return Report(
        plan=journal.plan,
        image=ImageFacts(size=image.size, layers=len(image.layers)),
        seed=journal.seed,
        machine={"kernel": platform.release(), "cores": str(os.cpu_count()), "python": platform.python_version()},
        ways=summarize(journal.plan, journal.samples, limit),
        limit=limit,
        samples=journal.samples,
    )

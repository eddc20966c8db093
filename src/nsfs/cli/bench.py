"""`nsfs bench`: how soon an image says something, by each way there is."""

from __future__ import annotations

import os
import shlex
import signal
from typing import TYPE_CHECKING

import click

from nsfs.bench.model import WAYS, Way
from nsfs.cli.options import json_option
from nsfs.cli.render import render_columns, render_json
from nsfs.cli.session import Session, pass_session
from nsfs.errors import UnsupportedError, UsageError
from nsfs.serve.config import load_system_config

if TYPE_CHECKING:
    from nsfs.bench.model import Report, WayReport

_HEAD = (
    "WAY",
    "N",
    "SECONDS",
    "RESOLVE",
    "INDEX",
    "MOUNT",
    "RUN",
    "MB",
    "SETTLED",
    "OF LIMIT",
    "EAGER/IT",
    "MB/TOUCHED",
)


@click.command()
@click.argument("reference", metavar="REF")
@click.option("--cmd", default="", metavar="COMMAND", help="What to run in it, as a shell splits it. [the image's own]")
@click.option("--wait-for", default="", metavar="TEXT", help="Up when its output has this. [the first output]")
@click.option("--bandwidth", default="100mbit", show_default=True, metavar="RATE", help="Of the line; 0 for no limit.")
@click.option("--rtt", default="30ms", show_default=True, metavar="TIME", help="Round trip of the line.")
@click.option(
    "--way",
    "ways",
    multiple=True,
    type=click.Choice([str(way) for way in Way]),
    help="Measure this alone; more than once.",
)
@click.option("--samples", default=3, show_default=True, type=click.IntRange(min=1), help="Of each way.")
@click.option("--seed", type=click.IntRange(0, (1 << 32) - 1), help="Of the order of samples. [random, and said]")
@click.option(
    "--output", default="nsfs-bench", show_default=True, metavar="DIR", help="Samples, report.json, pictures."
)
@click.option("--directory", default="/var/tmp", show_default=True, help="Scratch space, on the filesystem to compare.")  # noqa: S108
@click.option("--containerd", metavar="SOCKET", help="Whose pull is eager. [containerd.address of the configuration]")
@click.option("--timeout", default=120.0, show_default=True, metavar="SECONDS", help="For the command to be up.")
@click.option(
    "--forget",
    default="machine",
    show_default=True,
    type=click.Choice(["machine", "image"]),
    help="Whose caches go before each start: all there are, or the image's pages alone.",
)
@json_option
@pass_session
def bench(  # noqa: PLR0913  an argument for each option
    session: Session,
    reference: str,
    *,
    cmd: str,
    wait_for: str,
    bandwidth: str,
    rtt: str,
    ways: tuple[str, ...],
    samples: int,
    seed: int | None,
    output: str,
    directory: str,
    containerd: str | None,
    timeout: float,
    forget: str,
    as_json: bool,
) -> None:
    """Measure the start of the image REF: eager, never seen, with its index alone or a profile, local, and overlayfs's.

    With --way pack also by an artifact of `nsfs index push`, which must lie beside it.

    From nothing to the first output of a command, over a line of a chosen bandwidth and round trip to REF's registry,
    with cold caches, in shuffled order. Beside it stands the limit: a local run, the pages that it touches, compressed,
    at the line's rate, and four round trips. Whoever interrupts it and asks again goes on where it was.
    """
    from nsfs.bench.line import Shape  # noqa: PLC0415  what they import takes long
    from nsfs.bench.run import measure  # noqa: PLC0415
    from nsfs.bench.stage import Wish  # noqa: PLC0415
    from nsfs.bench.units import parse_delay, parse_rate  # noqa: PLC0415

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    config = load_system_config()
    wish = Wish(
        reference=reference,
        words=_split(cmd),
        wait_for=wait_for,
        shape=Shape(parse_rate(bandwidth), parse_delay(rtt)),
        ways=tuple(dict.fromkeys(ways)) or WAYS,
        samples=samples,
        seed=seed,
        directory=directory,
        output=os.path.abspath(output),
        containerd=(containerd or config.containerd.address).removeprefix("unix://"),
        timeout=timeout,
        forget_all=forget == "machine",
    )
    report = measure(wish, config, session.talk.note)
    _keep(session, report, wish.output)
    click.echo(render_json(report) if as_json else "\n".join(_render(report)))


def _split(command: str) -> tuple[str, ...]:
    """Its words; raises UsageError."""
    try:
        return tuple(shlex.split(command))
    except ValueError as error:
        raise UsageError(f"not a command: {command[:200]!r}: {str(error).lower()}", hint="close its quotes") from None


def _keep(session: Session, report: Report, output: str) -> None:
    """Write the report and, where they can be drawn, its pictures."""
    from nsfs.bench.picture import draw  # noqa: PLC0415  matplotlib, too, takes long

    with open(f"{output}/report.json", "w", encoding="utf-8") as file:
        file.write(render_json(report) + "\n")
    try:
        pictures = draw(report, output)
    except UnsupportedError as error:
        session.talk.note(f"{error.message}: {error.hint}")
    else:
        session.talk.note(f"pictures: {' '.join(pictures)}")


def _render(report: Report) -> list[str]:
    """The table, and the limit below it."""
    from nsfs.bench.units import render_rate  # noqa: PLC0415

    plan, limit = report.plan, report.limit
    rate = render_rate(plan.rate) if plan.rate else "a line without limit"
    lines = [
        f"{plan.reference}, {report.image.size / 1e6:.1f} MB in {report.image.layers} layers",
        f"over {rate} and {plan.round_trip * 1000:g} ms; eager is {plan.baseline}; seed {report.seed}",
        "",
        *render_columns([_HEAD, *map(_row, report.ways)], frozenset(range(1, len(_HEAD)))),
    ]
    if limit is not None:
        lines += [
            "",
            f"limit {limit.seconds:.2f} s: a local run of {limit.run:.2f} s, four round trips, and what is touched",
            f"touched {limit.touched / 1e6:.1f} MB in {limit.files} files, {limit.compressed / 1e6:.2f} MB compressed",
        ]
    return lines


def _row(way: WayReport) -> tuple[str, ...]:
    times = (way.seconds, *(way.phases[phase] for phase in ("resolve", "index", "mount", "run")))
    sizes = (f"{size / 1e6:.1f}" for size in (way.received, way.settled))
    ratios = ("" if ratio is None else f"{ratio:.2f}" for ratio in (way.of_limit, way.sooner, way.overhead))
    return way.way, str(way.samples), *(f"{seconds:.2f}" for seconds in times), *sizes, *ratios

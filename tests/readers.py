"""Processes that read files of mounts without end, compare every byte, and say how long each read took.

`reading(files)` starts some; what they saw is there when the block has ended. They hold nothing of a mount open while
they do not read, and drop the pages of what they read, so that every read asks the worker again.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SLOW = 0.002
"""Seconds; shorter waits are only counted, so that hours of reading fit."""
_PIECE = 1 << 16
_END = 60.0
"""Seconds for a reader to end its last read."""


@dataclass(slots=True)
class Seen:
    """What readers saw: `errors` in words, how many read(2), and of the slow ones when they began and what they took.

    Seconds of time.monotonic(), which all processes of a machine share.
    """

    errors: list[str] = field(default_factory=list)
    reads: int = 0
    slow: list[tuple[float, float]] = field(default_factory=list)

    def note(self, begun: float, ended: float) -> None:
        """One read."""
        self.reads += 1
        if ended - begun > SLOW:
            self.slow.append((begun, ended - begun))

    def add(self, other: Seen) -> None:
        """What another reader saw, too."""
        self.errors += other.errors
        self.reads += other.reads
        self.slow += other.slow

    def slowest(self, share: float) -> float:
        """The wait that `share` of all reads did not exceed; 1 for the longest; SLOW where it is less."""
        ordered = sorted(took for _, took in self.slow)
        behind = self.reads - min(self.reads - 1, int(self.reads * share))
        return ordered[-behind] if behind <= len(ordered) else SLOW

    def longest_since(self, moments: Sequence[float], window: float) -> list[float]:
        """For each moment the longest wait of reads that it met, or that began within `window` behind it."""
        ordered = sorted(self.slow)
        return [_longest(ordered, moment, window) for moment in moments]

    def check(self, least: int = 1) -> None:
        """No error, and no fewer reads."""
        assert self.errors == []
        assert self.reads >= least, self.reads


def _longest(ordered: Sequence[tuple[float, float]], moment: float, window: float) -> float:
    """No read takes longer than a reader has to end."""
    first = bisect.bisect_left(ordered, (moment - _END, 0.0))
    last = bisect.bisect_right(ordered, (moment + window, _END))
    return max((took for begun, took in ordered[first:last] if begun + took > moment), default=SLOW)


@contextlib.contextmanager
def reading(files: Mapping[str, bytes], processes: int = 2) -> Iterator[Seen]:
    """Read `files`, contents by path, all the while."""
    digests = json.dumps({path: hashlib.sha256(data).hexdigest() for path, data in files.items()})
    readers = [_start(digests, seed) for seed in range(processes)]
    seen = Seen()
    try:
        yield seen
    finally:
        for reader in readers:
            _end(reader, seen)


def _start(digests: str, seed: int) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    reader = subprocess.Popen([sys.executable, __file__, str(seed)], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert reader.stdin is not None
    reader.stdin.write(digests + "\n")
    reader.stdin.flush()
    return reader


def _end(reader: subprocess.Popen[str], seen: Seen) -> None:
    try:
        output, said = reader.communicate("\n", timeout=_END)
    except subprocess.TimeoutExpired:
        reader.kill()
        reader.communicate()
        seen.errors.append(f"a read hangs for {_END:g} s")
        return
    if reader.returncode != 0:
        seen.errors.append(said)
        return
    report = json.loads(output)
    seen.add(Seen(report["errors"], report["reads"], [(begun, took) for begun, took in report["slow"]]))


def main() -> None:
    """Digests by path on stdin, as JSON in one line; a second line ends it."""
    digests = json.loads(sys.stdin.readline())
    chance = random.Random(sys.argv[1])
    seen = Seen()
    os.set_blocking(0, False)
    while not seen.errors and sys.stdin.readline() == "":
        path = chance.choice(list(digests))
        try:
            if _digest(path, seen) != digests[path]:
                seen.errors.append(f"wrong bytes: {path}")
        except OSError as error:
            seen.errors.append(str(error))
    print(json.dumps(asdict(seen)))


def _digest(path: str, seen: Seen) -> str:
    found = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        while True:
            begun = time.monotonic()
            data = os.read(fd, _PIECE)
            seen.note(begun, time.monotonic())
            if not data:
                return found.hexdigest()
            found.update(data)
    finally:
        os.close(fd)


if __name__ == "__main__":
    main()

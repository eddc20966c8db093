"""The samples of a bench on disk, so that a run that was interrupted goes on where it was.

Owns `samples.jsonl` of the output directory: a line that says what is compared and in which order, then a line per
sample, each synced before the next is taken. A last line that was cut off is taken away. One process at a time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import msgspec
from msgspec import Struct

from nsfs.bench.model import Plan, Sample, Touched  # noqa: TC001  fields are decoded by them
from nsfs.errors import BusyError, CorruptError

NAME = "samples.jsonl"


class Entry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line: one of what follows, `seed` together with `plan`."""

    plan: Plan | None = None
    seed: int = 0
    sample: Sample | None = None
    touched: Touched | None = None


@dataclass(slots=True)
class Journal:
    """What is there, and what is added."""

    path: str
    plan: Plan
    seed: int
    samples: list[Sample] = field(default_factory=list)
    touched: Touched | None = None

    def add(self, sample: Sample) -> None:
        """Keep a sample."""
        _append(self.path, Entry(sample=sample))
        self.samples.append(sample)

    def add_touched(self, touched: Touched) -> None:
        """Keep what a start touches."""
        _append(self.path, Entry(touched=touched))
        self.touched = touched


def open_journal(directory: str, plan: Plan, seed: int) -> Journal:
    """Begin one in `directory`, or go on with the one there, whose seed holds then.

    Raises BusyError where it is of another plan, CorruptError where a line is no such thing.
    """
    os.makedirs(directory, exist_ok=True)
    path = f"{directory}/{NAME}"
    entries = _read(path)
    if not entries:
        _append(path, Entry(plan=plan, seed=seed))
        return Journal(path, plan, seed)
    begun = entries[0].plan
    if begun is None or not begun.is_continued_by(plan):
        raise BusyError(
            f"there are samples of something else: {path}", hint="give another --output, or remove that file"
        )
    journal = Journal(path, plan, entries[0].seed)
    for entry in entries[1:]:
        journal.samples += [entry.sample] if entry.sample else []
        journal.touched = entry.touched or journal.touched
    return journal


def _read(path: str) -> list[Entry]:
    """The whole lines; what is behind the last of them is cut off."""
    try:
        with open(path, "rb+") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            file.truncate(whole)
    except FileNotFoundError:
        return []
    try:
        return [msgspec.json.decode(line, type=Entry) for line in data[:whole].splitlines()]
    except msgspec.DecodeError as error:
        raise CorruptError(f"not samples of a bench: {path}: {error}", hint="give another --output") from None


def _append(path: str, entry: Entry) -> None:
    with open(path, "ab") as file:
        file.write(msgspec.json.encode(entry) + b"\n")
        file.flush()
        os.fsync(file.fileno())

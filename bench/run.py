"""The figures of `make bench`: runs groups, writes bench/results/<time>.json and a plot beside it.

Each group is a module with `measure(bench)`. A goal that was missed makes the exit status 1; a group that failed is
reported with its reason, makes it 1 too, and does not keep the others from running.
"""

from __future__ import annotations

import datetime as dt
import importlib
import json
import os
import platform
import subprocess
import tempfile
import traceback

import click

from bench import REPOSITORY, plot
from bench.apart import run_apart
from bench.harness import IS_FULL, Bench, open_bench, say

STARTS = ("starts", "crowd")
"""What users see, within half an hour."""
GROUPS = (
    "metadata",
    "reading",
    "pulling",
    "containers",
    "memory",
    "maps",
    "namespaces",
    "fairness",
    "hotpath",
    "spacing",
    *STARTS,
)
_SAMPLES = 5 if IS_FULL else 3


@click.command()
@click.option("--only", multiple=True, type=click.Choice(GROUPS), help="Run this group alone; may be repeated.")
@click.option("--samples", default=_SAMPLES, show_default=True, type=click.IntRange(min=1), help="Of each figure.")
@click.option("--directory", default="/var/tmp", show_default=True, help="Scratch space, on the filesystem to compare.")
@click.option("--output", default=f"{REPOSITORY}/bench/results", help="Where results go. [bench/results]")
def main(only: tuple[str, ...], samples: int, directory: str, output: str) -> None:
    """Measure nsfs against what the same machine does without it, in the same run."""
    if os.geteuid() != 0:
        raise click.UsageError("figures need mounts: run as root")
    run_apart(lambda: measure(only or (GROUPS if IS_FULL else STARTS), samples, directory, output))


def measure(names: tuple[str, ...], samples: int, directory: str, output: str) -> int:
    """Run the groups and store what they found; returns the exit status."""
    results: dict[str, object] = {"machine": describe_machine(directory), "samples": samples}
    groups: dict[str, object] = {}
    failed = False
    for name in names:
        say(f"{name}:")
        group, good = run_group(name, directory, samples)
        groups[name] = group
        failed = failed or not good
    results["groups"] = groups
    print(store(results, output))
    return 1 if failed else 0


def run_group(name: str, directory: str, samples: int) -> tuple[dict[str, object], bool]:
    """One group's report, and whether all went well."""
    with (
        tempfile.TemporaryDirectory(prefix=f"nsfs-{name[:3]}-", dir=directory) as scratch,
        open_bench(scratch, samples) as bench,
    ):
        error = _attempt(name, bench)
        report: dict[str, object] = {"figures": [figure.report() for figure in bench.figures], "error": error}
        return report, not error and all(figure.reached is not False for figure in bench.figures)


def _attempt(name: str, bench: Bench) -> str:
    try:
        importlib.import_module(f"bench.{name}").measure(bench)
    except Exception as error:  # noqa: BLE001  a broken group is reported, and the others still run
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return ""


def describe_machine(directory: str) -> dict[str, object]:
    """What the figures depend on."""
    command = ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", directory]
    kind = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "python": platform.python_version(),
        "filesystem": kind.strip(),
        "time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def store(results: dict[str, object], output: str) -> str:
    """Write results and plot; returns the path of the results."""
    os.makedirs(output, exist_ok=True)
    stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%d-%H%M%S")
    path = f"{output}/{stamp}.json"
    with open(path, "w") as file:
        json.dump(results, file, indent=1)
    plot.draw(results, f"{output}/{stamp}.png")
    return path


if __name__ == "__main__":
    main()

"""Pictures of a report, each as PNG and as SVG: seconds by phase and way, and bytes over time.

Needs matplotlib, the extra `nsfs[bench]`; imported when it is used. Writes files and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nsfs.bench.model import PHASES
from nsfs.errors import UnsupportedError

if TYPE_CHECKING:
    from nsfs.bench.model import Report, Sample

_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}
_COLOURS = {"resolve": "#8d99ae", "index": "#e9c46a", "mount": "#d1495b", "run": "#2a9d8f"}


def draw(report: Report, directory: str) -> list[str]:
    """Write phases.* and bytes.* into `directory`; returns their paths. Raises UnsupportedError without matplotlib."""
    try:
        import matplotlib as mpl  # noqa: PLC0415  an extra

        mpl.use("Agg")
        from matplotlib import pyplot as plt  # noqa: PLC0415
    except ImportError:
        raise UnsupportedError("no pictures: matplotlib is missing", hint="pip install 'nsfs[bench]'") from None
    written = []
    for name, drawn in (("phases", _draw_phases), ("bytes", _draw_bytes)):
        figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
        drawn(axes, report)
        axes.set_title(f"{report.plan.reference}: eager is {report.plan.baseline}", fontsize=9)
        for kind in ("png", "svg"):
            written.append(f"{directory}/{name}.{kind}")
            figure.savefig(written[-1], dpi=110)
        plt.close(figure)
    return written


def _draw_phases(axes: Any, report: Report) -> None:  # noqa: ANN401  matplotlib's own
    names = [way.way for way in report.ways]
    left = [0.0] * len(names)
    for phase in PHASES:
        widths = [way.phases[phase] for way in report.ways]
        axes.barh(names, widths, left=left, color=_COLOURS[phase], label=phase, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for name, end in zip(names, left, strict=True):
        axes.annotate(
            f"{end:.2f} s", (end, name), (5, 0), textcoords="offset points", va="center", fontsize=8, bbox=_ON_WHITE
        )
    if report.limit is not None:
        axes.axvline(report.limit.seconds, color="black", linestyle="--", label=f"limit, {report.limit.seconds:.2f} s")
    axes.set_xlim(0, 1.08 * max(left))
    axes.invert_yaxis()
    axes.set_xlabel("seconds from nothing to the first output, medians")
    axes.legend()


def _draw_bytes(axes: Any, report: Report) -> None:  # noqa: ANN401  matplotlib's own
    for number, way in enumerate(report.ways):
        sample = _middle([sample for sample in report.samples if sample.way == way.way])
        times = [0.0, *(at for at, _ in sample.trace), max(sample.seconds, *(at for at, _ in sample.trace), 0.0)]
        sizes = [0.0, *(size / 1e6 for _, size in sample.trace), sample.settled / 1e6]
        axes.step(times, sizes, where="post", color=f"C{number}", label=way.way)
        axes.plot([sample.seconds], [sample.received / 1e6], "o", color=f"C{number}")
    axes.set_xlabel("seconds of the middle sample (dot: first output)")
    axes.set_ylabel("MB over the line")
    axes.legend()


def _middle(samples: list[Sample]) -> Sample:
    return sorted(samples, key=lambda sample: sample.seconds)[len(samples) // 2]

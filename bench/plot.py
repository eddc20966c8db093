"""A picture of the results: ratios against their goals, each figure a bar. Pure but for the file that it writes."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

_GOOD, _BAD, _PLAIN = "#2a9d8f", "#d1495b", "#8d99ae"


def draw(results: dict[str, Any], path: str) -> None:
    """Draw every figure as how good it is: over its baseline, or over its goal where it has no baseline."""
    bars = [bar for group in results["groups"].values() for figure in group["figures"] if (bar := _bar(figure))]
    if not bars:
        return
    figure, axes = plt.subplots(figsize=(13, 1.4 + 0.3 * len(bars)), layout="constrained")
    places = range(len(bars), 0, -1)
    axes.barh(places, [bar[1] for bar in bars], color=[bar[3] for bar in bars], height=0.62)
    for place, (_name, _good, goal, _colour, text) in zip(places, bars, strict=True):
        axes.text(1.01, place, text, va="center", fontsize=8, transform=axes.get_yaxis_transform())
        if goal is not None:
            axes.plot([goal, goal], [place - 0.4, place + 0.4], color="black", linewidth=1.5)
    axes.set_yticks(places, [bar[0] for bar in bars], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.25, *(0.7 * bar[1] for bar in bars)), max(8.0, *(1.5 * bar[1] for bar in bars)))
    axes.set_ylim(0.3, len(bars) + 0.7)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="#cccccc", zorder=0)
    machine = results["machine"]
    axes.set_xlabel(
        "times as good as the baseline, or as the goal where there is none (black: the goal; right is better)"
    )
    axes.set_title(
        f"Linux {machine['kernel']}, {machine['cores']} cores, {machine['filesystem']}, {machine['time']}", fontsize=9
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bar(figure: dict[str, Any]) -> tuple[str, float, float | None, str, str] | None:
    """(name, how good, its goal, colour, text)."""
    colour = {None: _PLAIN, True: _GOOD, False: _BAD}[figure["reached"]]
    text = f"{figure['value']:,.4g} {figure['unit']}"
    if figure["ratio"] is not None:
        text += f", {figure['baseline']['name']} {figure['baseline']['value']:,.4g}"
        return figure["name"], figure["ratio"], figure["goal"], colour, text
    if figure["goal"] is None or not figure["value"]:
        return None
    good = figure["value"] / figure["goal"]
    return figure["name"], good if figure["higher_is_better"] else 1 / good, 1.0, colour, text

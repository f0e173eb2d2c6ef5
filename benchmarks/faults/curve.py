"""Detection against false alarms, for every detector at all its levels: the figures of docs/results/alarms.md.

python benchmarks/faults/curve.py [--of results/alarms.json] [--png FOLDER]      writes docs/_static/alarms-*.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dyntune.plots.style import BLUE, GREEN, MUTED, ORANGE, label, new_axes, tidy
from dyntune.plots.svg import to_svg

RESULT = Path(__file__).resolve().parent / "results" / "alarms.json"
STATIC = Path(__file__).resolve().parents[2] / "docs" / "_static"
LEVELS = ("severe", "medium")
OURS, PLACEBO, FIXED_RULE = "dyntune", "random", "loss > mean + 6 sd of 128"
COLORS = {OURS: BLUE, PLACEBO: ORANGE, FIXED_RULE: GREEN}
LEFT = 3  # a rate of none is drawn where a third of an alarm would be
NEAR = 0.045  # names closer than this share of the height move apart ...
WIDE = 10.0  # ... where a name is about as wide as this factor on the false alarms
Record = dict[str, Any]


def curve(result: Record, detector: str, level: str) -> list[tuple[float, float, bool]]:
    """False alarms per 100,000 healthy steps, share of faults detected, and whether by default; fewest alarms first."""
    rows = [row for row in result["points"] if row["detector"] == detector and row["detection"][level] is not None]
    found = [(row["healthy"]["rate"], row["detection"][level]["rate"], row["default"]) for row in rows]
    return sorted(set(found))


def detectors(result: Record) -> list[str]:
    return list(dict.fromkeys(row["detector"] for row in result["points"]))


def plot(result: Record, level: str) -> Axes:
    """One severity of faults."""
    steps = next(row["healthy"]["steps"] for row in result["points"])
    floor = 100_000 / steps / LEFT
    ax = new_axes(height=4.2)
    labels = []
    for name in detectors(result):
        points = [(max(x, floor), y, default) for x, y, default in curve(result, name, level)]
        color = COLORS.get(name, MUTED)
        dashes = {"linestyle": (0, (4, 3))} if name == PLACEBO else {}
        ax.plot([x for x, *_ in points], [y for _, y, _ in points], color=color, linewidth=1.2, alpha=0.7, **dashes)
        shown = [(x, y) for x, y, default in points if default]
        for x, y in shown:
            ax.plot(x, y, "o", color=color, markersize=6 if name == OURS else 4)
        names = [f"{name}, {severity}" for severity in ("critical", "all")] if len(shown) > 1 else [name]
        places = shown or [points[len(points) // 2][:2]]
        labels += [(x, y, said, color) for (x, y), said in zip(places, names, strict=True)]
    _write(ax, labels)
    ax.set_xscale("log")
    ax.set_ylim(-0.02, 1.02)
    x_axis = "false alarms in 100,000 healthy steps (left edge: none)"
    tidy(ax, title=f"{level} faults; dots: as published", xlabel=x_axis, ylabel="share of faults detected", grid="y")
    return ax


def _write(ax: Axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Names beside their dots, moved up where they would meet."""
    placed: list[tuple[float, float]] = []
    for x, y, name, color in sorted(labels, key=lambda item: item[1]):
        near = [other for at, other in placed if 1 / WIDE < x / at < WIDE]
        height = max([y, *(other + NEAR for other in near)])
        placed.append((x, height))
        label(ax, x, height, name, color=color, offset=(6.0, -3.0), fontsize=7.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--of", type=Path, default=RESULT)
    parser.add_argument("--out", type=Path, default=STATIC)
    parser.add_argument("--png", type=Path, help="also draw PNGs into this folder, to look at")
    options = parser.parse_args()
    result = json.loads(options.of.read_text())
    for level in LEVELS:
        figure = plot(result, level).get_figure(root=True)
        assert figure is not None
        said = f"Share of {level} faults that each detector finds, against its false alarms on healthy training."
        svg = to_svg(figure, name=f"alarms-{level}", description=said, standalone=True)
        (options.out / f"alarms-{level}.svg").write_text(f"{svg}\n", encoding="utf-8")
        if options.png:  # after the other, whose layout a second drawing would shift
            figure.savefig(options.png / f"alarms-{level}.png", dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())

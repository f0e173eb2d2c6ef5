"""The figures of docs/results/learning-rate.md, from benchmarks/lr/results.

python benchmarks/lr/figures.py [--png FOLDER]      writes docs/_static/lr-*.svg
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.lr.scenarios import SCENARIOS
from benchmarks.lr.verdict import load_sweeps, sweep_of
from dyntune.plots.style import BLUE, INK, MUTED, ORANGE, new_axes, tidy
from dyntune.plots.svg import to_svg

RESULTS = Path(__file__).resolve().parent / "results"
STATIC = Path(__file__).resolve().parents[2] / "docs" / "_static"
Record = dict[str, Any]
# Where the suggestion of each rule lies: those with a rate to show.
SHOWN = ("suggest_lr", "naive-sweep-0.3x", "fastai-valley", "naive-sweep", "torch-lr-finder", "lightning")
FARTHEST = 10  # octaves; farther ones are drawn at the edge


def _load(name: str) -> Record:
    found: Record = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def plot_regret() -> Axes:
    """Mean training regret by rule, with its interval."""
    summaries = _load("ours")["summary"] | _load("baselines")["summary"]["test"]
    rows = sorted(summaries.items(), key=lambda item: item[1]["regret"]["mean"])
    ax = new_axes(height=0.22 * len(rows) + 0.8)
    for place, (name, row) in enumerate(rows):
        mean = row["regret"]
        color = BLUE if name.startswith("suggest_lr") else MUTED
        ax.plot([mean["low"], mean["high"]], [place, place], color=color, linewidth=2, alpha=0.5)
        ax.plot(mean["mean"], place, "o", color=color, markersize=5)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.invert_yaxis()
    tidy(ax, title="mean regret and its 95% interval", columns=40, xlabel="training regret", ylabel="")
    ax.set_xlim(0, 1)
    return ax


def plot_octaves() -> Axes:
    """How far from the grid's best each suggestion lies, and whether training at it failed."""
    verdicts = {"suggest_lr": _load("ours")["verdicts"]["suggest_lr"]}
    for name, row in _load("baselines")["verdicts"].items():
        if name in verdicts["suggest_lr"]:
            for rule in SHOWN[1:]:
                verdicts.setdefault(rule, {})[name] = row[rule]
    sweeps = load_sweeps()
    ax = new_axes(height=0.42 * len(SHOWN) + 0.8)
    random = np.random.default_rng(0)
    for place, rule in enumerate(SHOWN):
        for name, row in verdicts[rule].items():
            if row["lr"] is None:
                continue
            off = math.log2(row["lr"] / sweep_of(SCENARIOS[name], sweeps).best)
            failed = row["failed"] >= 0.5
            ax.plot(
                max(-FARTHEST, min(FARTHEST, off)),
                place + random.uniform(-0.28, 0.28),
                "x" if failed else "o",
                color=ORANGE if failed else BLUE,
                markersize=4.5 if failed else 3,
                alpha=0.8,
                markeredgewidth=1.2 if failed else 0,
            )
    ax.axvline(0, color=INK, linewidth=1, zorder=0)
    ax.set_yticks(range(len(SHOWN)), SHOWN)
    ax.invert_yaxis()
    tidy(ax, title="where suggestions lie (crosses: training fails)", xlabel="octaves from the grid's best", ylabel="")
    ax.set_xlim(-FARTHEST - 0.5, FARTHEST + 0.5)
    return ax


def plot_stable() -> Axes:
    """max_stable against the measured onset of failure."""
    sweeps = load_sweeps()
    ax = new_axes(height=3.2)
    onsets = []
    for name, found in _load("evidence-test")["scenarios"].items():
        row, onset = found["seeds"]["0"], sweep_of(SCENARIOS[name], sweeps).onset
        if row.get("value") and onset is not None:
            onsets.append(onset)
            good = 0.5 <= row["max_stable"] / onset <= 2
            ax.plot(onset, row["max_stable"], "o", color=BLUE if good else ORANGE, markersize=3.5, alpha=0.8)
    ends = np.array([min(onsets) / 2, max(onsets) * 2])
    ax.plot(ends, ends, color=INK, linewidth=1, zorder=0)
    for factor in (0.5, 2):
        ax.plot(ends, factor * ends, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    tidy(ax, title="max_stable (dashed: a factor 2)", xlabel="measured onset of failure", ylabel="max_stable")
    return ax


FIGURES: dict[str, tuple[Callable[[], Axes], str]] = {
    "regret": (plot_regret, "Mean training regret of every rule on the test half, with 95% intervals."),
    "octaves": (plot_octaves, "Octaves between suggestion and best learning rate, per workload, for six rules."),
    "stable": (plot_stable, "Predicted largest stable rate against the measured onset of failure, per workload."),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--png", type=Path, help="also draw PNGs into this folder, to look at")
    options = parser.parse_args()
    for name, (plot, description) in FIGURES.items():
        figure = plot().get_figure(root=True)
        assert figure is not None
        if options.png:
            figure.savefig(options.png / f"{name}.png", dpi=110)
        svg = to_svg(figure, name=f"lr-{name}", description=description, standalone=True)
        (STATIC / f"lr-{name}.svg").write_text(f"{svg}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Figures and tables of docs/results/physics.md, from benchmarks/physics/results.

    python benchmarks/physics/figures.py            write docs/_static/physics-*.svg and the tables
    python benchmarks/physics/figures.py --check    fail if the tables differ from what the results say

A table stands between `<!-- table:NAME:begin -->` and `<!-- table:NAME:end -->`; no number in one is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dyntune.plots.style import BLUE, GREEN, INK, MUTED, ORANGE, label, new_axes, tidy
from dyntune.plots.svg import to_svg

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "results" / "physics.md"
STATIC = ROOT / "docs" / "_static"

Record = dict[str, Any]
QUANTITY = {"lambda": "η·λ_max", "batch": "η·batch sharpness"}


def load(effect: str) -> Record | None:
    path = RESULTS / f"{effect}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _runs(result: Record, setting: str) -> list[Record]:
    return [run for run in result["runs"] if run["setting"] == setting]


def _columns(run: Record, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, where there are any."""
    values = np.array([np.nan if v is None else v for v in run["series"].get(key, [])], dtype=float)
    steps = np.array(run["series"]["step"], dtype=float)[: len(values)]
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def _seeds(ax: Axes, runs: list[Record], key: str, color: str, **options: Any) -> None:
    """The first seed boldly, the others faintly."""
    for rank, run in reversed(list(enumerate(runs))):
        ax.plot(*_columns(run, key), color=color, linewidth=0.8 if rank else 1.4, alpha=0.4 if rank else 1.0, **options)


def _theory(ax: Axes, value: float, text: str, *, at: float = 1.0, above: bool = True) -> None:
    """A dashed line with its name, at the share `at` of the width."""
    ax.axhline(value, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    side, inward = ("right", -4) if at > 0.5 else ("left", 4)
    down = {"va": "bottom", "offset": (inward, 3)} if above else {"va": "top", "offset": (inward, -3)}
    label(ax, at, value, text, xycoords=ax.get_yaxis_transform(), ha=side, **down)


# ---------------------------------------------------------------------------------------------------------- figures


def plot_gd_edge(result: Record) -> Axes:
    ax = new_axes(height=2.7)
    _seeds(ax, result["runs"], "lambda", BLUE)
    _theory(ax, 2.0, "2: stable below", at=0.0)
    ax.set_ylim(0.8, 2.4)
    tidy(
        ax, title="Gradient descent sharpens up to 2/η and stays there", xlabel="step (full batch, η = 0.4)",
        ylabel="η·λ_max", grid="y",
    )  # fmt: skip
    return ax


def plot_adam_edge(result: Record) -> Axes:
    ax = new_axes(height=2.7)
    _seeds(ax, result["runs"], "lambda", BLUE)
    _theory(ax, 38.0, "38: stable below (frozen P, β1 = 0.9)")
    ax.set_yscale("log")
    ax.set_yticks([2, 5, 10, 20, 38, 80], ["2", "5", "10", "20", "38", "80"])
    ax.minorticks_off()
    ax.set_ylim(1.5, 120)
    tidy(
        ax, title="Full-batch Adam: preconditioned sharpness falls at once, then climbs to 38/η",
        xlabel="step (full batch, η = 0.001)", ylabel="η·λ_P", grid="y",
    )  # fmt: skip
    return ax


def plot_batch_sharpness(result: Record) -> Axes:
    ax = new_axes(height=2.9)
    runs = _runs(result, "B=8, lr 4, weights halved")
    _seeds(ax, runs, "batch", BLUE)
    _seeds(ax, runs, "lambda", ORANGE)
    _theory(ax, 2.0, "2", at=0.0)
    last = {key: float(np.mean([run["plateau"][key]["mean"] for run in runs if run["plateau"][key]]))
            for key in ("batch", "lambda")}  # fmt: skip
    end = runs[0]["series"]["step"][-1]
    label(ax, end, last["batch"], "batch sharpness", color=BLUE, offset=(4, 0), va="center", columns=10)
    label(ax, end, last["lambda"], "λ_max of all data", color=ORANGE, offset=(4, 0), va="center", columns=11)
    ax.set_ylim(0.0, 2.8)
    tidy(
        ax, title="Small-batch SGD: batch sharpness at 2/η, λ_max below",
        xlabel="step (8 rows of 1,024, η = 4); one of three seeds diverged", ylabel="times η", grid="y",
    )  # fmt: skip
    return ax


def plot_momentum(result: Record) -> Axes:
    ax = new_axes(height=3.3)
    settings = {s["name"]: s for s in result["settings"] if s["note"] != "the small batch's rate"}
    for key, color, shift in (("batch", BLUE, 0.95), ("lambda", ORANGE, 1.05)):
        rows = [r for r in result["summary"] if r["setting"] in settings and r["quantity"] == key and "mean" in r]
        x = np.array([settings[r["setting"]]["size"] for r in rows]) * shift
        y = np.array([r["mean"] for r in rows])
        ax.plot(x, y, color=color, marker="o", markersize=5, linewidth=1.2)
        for at, r in zip(x, rows, strict=True):
            ax.plot([at, at], [max(r["q10"], 0.05), r["q90"]], color=color, linewidth=1.0, alpha=0.6)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_ylim(0.1, 6.0)
    sizes = [s["size"] for s in settings.values()]
    ax.set_xticks(sizes, [f"{s['size']}\nη = {s['lr']:g}" for s in settings.values()])
    ax.set_yticks([0.2, 0.5, 1.0, 2.0, 3.8], ["0.2", "0.5", "1", "2", "3.8"])
    ax.minorticks_off()
    _theory(ax, 3.8, "2 (1 + β) = 3.8, large batches", at=0.0)
    _theory(ax, 0.2, "2 (1 - β) = 0.2, small batches", at=0.9, above=False)
    label(ax, sizes[2], 0.42, "batch sharpness", color=BLUE, offset=(6, -4), va="top")
    label(ax, sizes[2], 1.25, "λ_max of all data", color=ORANGE, offset=(-4, 0), ha="right")
    label(ax, sizes[-1], 0.6, "comes in bursts", color=BLUE, offset=(-8, 0), ha="right", va="center", columns=8)
    tidy(
        ax, title="Momentum 0.9: the plateau rises with the batch size", xlabel="rows in a batch, and learning rate",
        ylabel="plateau, times η", grid="y",
    )  # fmt: skip
    return ax


CATAPULT = {1.0: MUTED, 3.0: BLUE, 4.0: GREEN, 6.0: ORANGE}


def _plot_catapult(result: Record, key: str, title: str, ylabel: str) -> Axes:
    ax = new_axes(height=2.7)
    ends = []
    for multiple, color in CATAPULT.items():
        runs = _runs(result, f"lr {multiple:g} / lambda_0")
        for rank, run in enumerate(runs):
            steps, values = _columns(run, key)
            scale = values[0] if key == "loss" else 1.0
            style = {"linewidth": 0.8 if rank else 1.6, "alpha": 0.35 if rank else 1.0}
            ax.plot(steps, values / scale, color=color, **style)
            if not rank:
                ends.append((f"{multiple:g}/λ₀", color))
    for rank, (text, color) in enumerate(reversed(ends)):
        label(
            ax, 1.0, 1.0, f"η = {text}", color=color, offset=(-4, -4 - 12 * rank), xycoords="axes fraction",
            ha="right", va="top",
        )  # fmt: skip
    ax.set_yscale("log")
    tidy(ax, title=title, xlabel="step (full batch)", ylabel=ylabel, grid="y")
    return ax


def plot_catapult_loss(result: Record) -> Axes:
    ax = _plot_catapult(result, "loss", "Catapult: above 2/λ₀ the loss rises first, then falls", "loss / first loss")
    ax.set_ylim(0.06, 20)
    ax.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    ax.axhline(1.0, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    return ax


def plot_catapult_sharpness(result: Record) -> Axes:
    ax = _plot_catapult(result, "lambda", "Catapult: sharpness drops until the rate is stable", "η·λ_max")
    ax.set_ylim(0.8, 9)
    ax.set_yticks([1, 2, 3, 4, 6], ["1", "2", "3", "4", "6"])
    ax.minorticks_off()
    _theory(ax, 2.0, "2: stable below")
    return ax


FIGURES: dict[str, tuple[str, Callable[[Record], Axes], str]] = {
    "gd-edge": ("gd_edge", plot_gd_edge, "Learning rate times sharpness over steps of gradient descent, three seeds."),
    "adam-edge": ("adam_edge", plot_adam_edge, "Learning rate times preconditioned sharpness over steps of Adam."),
    "batch-sharpness": ("batch_sharpness", plot_batch_sharpness, "Batch sharpness and lambda_max of small-batch SGD."),
    "momentum": ("momentum_plateau", plot_momentum, "Plateaus under momentum 0.9 for batches of 8 to 1,024 rows."),
    "catapult-loss": ("catapult", plot_catapult_loss, "Loss over the first 60 steps for four learning rates."),
    "catapult-sharpness": ("catapult", plot_catapult_sharpness, "Sharpness over the first 60 steps for four rates."),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- tables


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _plateaus(result: Record) -> str:
    adam = result["effect"] == "adam_edge"
    rows = []
    for r in result["summary"]:
        expected = "none" if r["expected"] is None else "{:g}–{:g}".format(*r["expected"])
        quantity = "η·λ_P" if adam else QUANTITY[r["quantity"]]
        measured = ["none", "none"]
        if "mean" in r:
            interval = "one seed" if r["low"] is None else f"{r['low']:.3g}–{r['high']:.3g}"
            measured = [f"{r['mean']:.3g} ({interval})", f"{r['q10']:.3g}–{r['q90']:.3g}"]
        judged = r["verdict"] or r["note"] or "not judged"
        lost = f"; {r['diverged']} of {r['seeds']} diverged" if r["diverged"] else ""
        rows.append([r["setting"], quantity, *measured, expected, judged + lost])
    header = ["setting", "quantity", "plateau (95 % over seeds)", "10–90 % over time", "expected", "verdict"]
    return _table(header, rows)


def _catapult(result: Record) -> str:
    rows = []
    for setting in result["settings"]:
        runs = _runs(result, setting["name"])
        losses = [_columns(run, "loss")[1] for run in runs]
        kept = [run for run in runs if not run["diverged"]]
        cells = [f"{setting['lr']:g}/λ₀", _range([max(v) / v[0] for v in losses]) if kept else "over 100"]
        cells.append(_range([_columns(run, "loss")[1][-1] / _columns(run, "loss")[1][0] for run in kept]))
        cells.append(_range([_columns(run, "lambda")[1][-1] for run in kept]))
        rows.append([*cells, f"{len(runs) - len(kept)} of {len(runs)}"])
    header = ["η", "highest loss / first", "loss / first after 60 steps", "η·λ_max after 60 steps", "diverged"]
    return _table(header, rows)


def _range(values: list[float]) -> str:
    return f"{min(values):.3g}–{max(values):.3g}" if values else "none"


def _sharpening(result: Record) -> str:
    rows = []
    for run in result["runs"]:
        steps, values = _columns(run, "lambda")
        losses = dict(zip(*_columns(run, "loss"), strict=True))
        reached = [step for step, value in zip(steps, values, strict=True) if value >= 2]
        first = reached[0] if reached else None
        crossing = ["never", "none"] if first is None else [f"{first:.0f}", f"{losses[first]:.3f}"]
        last = f"{losses[steps[-1]]:.4f}"
        rows.append([str(run["seed"]), f"{values[0]:.2f}", *crossing, f"{values.max():.2f}", last])
    header = ["seed", "η·λ_max at the start", "first step at 2", "loss there", "highest η·λ_max", "last loss"]
    return _table(header, rows)


def _adam_start(result: Record) -> str:
    columns = [dict(zip(*_columns(run, "lambda"), strict=True)) for run in result["runs"]]
    steps = (1, 2, 10, 100, 200, 400, 600, 1000, 2000)
    rows = [[str(run["seed"]), *(f"{c[s]:.3g}" for s in steps)] for run, c in zip(result["runs"], columns, strict=True)]
    return _table(["η·λ_P, seed", *(f"step {s}" for s in steps)], rows)


def _origin(result: Record) -> str:
    source = result["provenance"]
    versions = ", ".join(f"{k} {source['versions'][k]}" for k in ("python", "torch", "numpy", "dyntune"))
    commit = (source["commit"] or "no commit")[:12] + (" with changes" if source["uncommitted_changes"] else "")
    unfinished = "" if result["complete"] else " **Unfinished: some runs are missing.**"
    where = f"{source['cpu']}, {source['threads']} thread, {commit}; {versions}"
    return f"`{source['command']}`, {source['date'][:10]}, {where}.{unfinished}"


TABLES: dict[str, tuple[str, Callable[[Record], str]]] = {
    "gd_edge": ("gd_edge", _plateaus),
    "sharpening": ("gd_edge", _sharpening),
    "adam_edge": ("adam_edge", _plateaus),
    "adam_start": ("adam_edge", _adam_start),
    "batch_sharpness": ("batch_sharpness", _plateaus),
    "momentum_plateau": ("momentum_plateau", _plateaus),
    "catapult": ("catapult", _catapult),
} | {f"{effect}_origin": (effect, _origin) for effect in
     ("gd_edge", "adam_edge", "batch_sharpness", "momentum_plateau", "catapult")}  # fmt: skip


def with_tables(page: str) -> str:
    """The page with every table that has a place in it and a result."""
    for name, (effect, make) in TABLES.items():
        begin, end = f"<!-- table:{name}:begin -->", f"<!-- table:{name}:end -->"
        result = load(effect)
        if result is not None and begin in page:
            head, _, rest = page.partition(begin)
            page = f"{head}{begin}\n{make(result)}\n{end}{rest.partition(end)[2]}"
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the tables, write nothing")
    parser.add_argument("--png", type=Path, help="also draw PNGs into this folder, to look at")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    if options.check:
        return int(with_tables(page) != page)
    PAGE.write_text(with_tables(page), encoding="utf-8")
    for name, (effect, plot, description) in FIGURES.items():
        result = load(effect)
        if result is None:
            continue
        figure = plot(result).get_figure(root=True)
        assert figure is not None
        if options.png:
            figure.savefig(options.png / f"{name}.png", dpi=110)
        svg = to_svg(figure, name=f"physics-{name}", description=description, standalone=True)
        (STATIC / f"physics-{name}.svg").write_text(f"{svg}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

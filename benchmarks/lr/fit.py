"""Fit the numbers of `dyntune.suggest.blend` to the tune half, and say what cross-validation over families expects.

    python benchmarks/lr/fit.py            # the comparison of features
    python benchmarks/lr/fit.py --print    # the numbers, to be written into dyntune/suggest/blend.py

Reads results/sweeps.json and results/evidence-tune.json; nothing of the test half is looked at. Regret is interpolated
between the learning rates of the sweep (one or two seeds each), so it is for comparing rules: the judgement is
`verdict.py`, by real training.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.lr.metrics import clipped
from benchmarks.lr.scenario import ADAPTIVE, OPTIMIZERS
from dyntune.suggest.blend import Blend

RESULTS = Path(__file__).resolve().parent / "results"
# A rate that is half an octave off is what the fit has to live with; the target is the rate that does best then. Tried
# by cross-validation with an earlier pilot: 0 (the grid's best), 0.5, 0.75, 1 and 1.25.
OFF = 0.5
RIDGE = 1.0  # tried: 1, 3
# Base and features by target.
CHOSEN = {"value": ("usual", ("vertex", "critical")), "onset": ("critical", ("blow_up",))}
COMPARED = {
    "value": (
        ("usual", ()),
        ("critical", ()),
        ("critical", ("vertex",)),
        ("usual", ("critical",)),
        ("usual", ("vertex",)),
        CHOSEN["value"],
        ("usual", ("vertex", "critical", "blow_up")),
    ),
    "onset": (
        ("vertex", ()),
        ("critical", ()),
        CHOSEN["onset"],
        ("vertex", ("blow_up",)),
        ("critical", ("blow_up", "vertex")),
        ("usual", ("critical", "blow_up", "vertex")),
    ),
}
LEVEL = 0.9  # nominal; what the intervals cover on the test half is for ours.py to say


@dataclass(frozen=True)
class Curve:
    """Regret by log2 of the learning rate; 1 beyond the sweep."""

    octaves: Any
    regrets: Any
    best: float

    def at(self, octave: Any) -> Any:
        return np.interp(octave, self.octaves, self.regrets, left=1.0, right=1.0)

    def target(self, off: float) -> float:
        """The rate of least expected regret where log2 of the rate is off by a normal error of this size."""
        grid = np.arange(self.octaves[0] - 1, self.octaves[-1] + 1, 0.125)
        errors = np.linspace(-2, 2, 17)
        weights = np.exp(-0.5 * errors**2)
        expected = self.at(grid[:, None] + off * errors) @ (weights / weights.sum())
        return float(grid[int(np.argmin(expected))])


def curve(found: dict[str, Any]) -> Curve:
    """From a scenario of sweeps.json; seeds from 100 are reruns of the winners and left out."""
    octaves, losses, counts, starts = [], [], [], []
    for k in sorted(found["runs"], key=int):
        runs = [run for seed, run in found["runs"][k].items() if int(seed) < 100]
        if runs:
            octaves.append(int(k) / 4)
            losses.append(np.mean([clipped(math.inf if r[1] is None else r[1], r[0]) for r in runs]))
            counts.append(len(runs))
            starts += [r[0] for r in runs]
    loss, start = np.array(losses), float(np.mean(starts))
    best = float(loss[np.array(counts) > 1].min())
    return Curve(np.array(octaves), np.clip((loss - best) / (start - best), 0.0, 1.0), found["best"] / 4)


@dataclass(frozen=True)
class Row:
    """One suggestion's evidence with what would have been right.

    Args:
        scenario: Its name.
        family: Of the scenario.
        adaptive: Whether its optimizer divides by the size of the gradient.
        momentum: Of SGD.
        rates: What was measured, by name; with the highest rate tried where none blew up.
        targets: log2 of what would have been right, by target.
    """

    scenario: str
    family: str
    adaptive: bool
    momentum: float
    rates: dict[str, float]
    targets: dict[str, float]


def measured_rates(measured: dict[str, Any]) -> dict[str, float]:
    """Rates by name out of a row of evidence-HALF.json."""
    rates = {name: measured[name] for name in ("vertex", "critical", "usual", "blow_up")}
    return rates if measured["blow_up"] is not None else rates | {"blow_up": measured["tried"]}


def momentum_of(settings: dict[str, Any]) -> float:
    """Heavy-ball momentum of a scenario."""
    return float(settings.get("betas", [OPTIMIZERS[settings["optimizer"]][1].get("momentum", 0.0)])[0])


def load(path: Path = RESULTS / "evidence-tune.json") -> tuple[dict[str, Curve], list[Row]]:
    """Curves and rows of the tune half."""
    sweeps = json.loads((RESULTS / "sweeps.json").read_text())["scenarios"]
    evidence = json.loads(path.read_text())["scenarios"]
    curves, rows = {}, []
    for name, found in evidence.items():
        settings = sweeps[name]["scenario"]
        assert settings["half"] == "tune", name
        curves[name] = curve(sweeps[name])
        targets = {"value": curves[name].target(OFF), "onset": sweeps[name]["onset"] / 4}
        for measured in found["seeds"].values():
            if measured.get("value") is not None:
                adaptive = settings["optimizer"] in ADAPTIVE
                rates = measured_rates(measured)
                momentum = 0.0 if adaptive else momentum_of(settings)
                rows.append(Row(name, settings["family"], adaptive, momentum, rates, targets))
    return curves, rows


def halves() -> dict[str, str]:
    """The half of every scenario."""
    sweeps = json.loads((RESULTS / "sweeps.json").read_text())["scenarios"]
    return {name: found["scenario"]["half"] for name, found in sweeps.items()}


def fit(rows: Sequence[Row], target: str, base: str, features: Sequence[str]) -> Blend:
    """Ridge regression in which every scenario weighs the same; the constant is not penalised."""
    columns = [[1.0] * len(rows), [float(row.adaptive) for row in rows]]
    columns.append([0.0 if row.adaptive else math.log2(1 - row.momentum) for row in rows])
    columns += [[math.log2(row.rates[name] / row.rates[base]) for row in rows] for name in features]
    design = np.array(columns).T
    wanted = np.array([row.targets[target] - math.log2(row.rates[base]) for row in rows])
    names = [row.scenario for row in rows]
    weights = np.array([1.0 / names.count(name) for name in names])
    penalty = RIDGE * np.eye(design.shape[1])
    penalty[0, 0] = 0.0
    found = np.linalg.solve(design.T @ (weights[:, None] * design) + penalty, design.T @ (weights * wanted)).tolist()
    return Blend(found[0], found[1], found[2], base, dict(zip(features, found[3:], strict=True)))


def suggestion(blend: Blend, row: Row) -> float:
    """log2 of the blend's rate."""
    return math.log2(blend.value(row.rates, adaptive=row.adaptive, momentum=row.momentum))


def cross_validated(rows: Sequence[Row], target: str, base: str, features: Sequence[str]) -> list[tuple[Row, float]]:
    """Every row with what a blend gives that was fitted without its family."""
    found = []
    for family in sorted({row.family for row in rows}):
        blend = fit([row for row in rows if row.family != family], target, base, features)
        found += [(row, suggestion(blend, row)) for row in rows if row.family == family]
    return found


def per_scenario(found: Sequence[tuple[Row, float]], what: Callable[[Row, float], float]) -> Any:
    """Mean over the pilots of every scenario."""
    by_name: dict[str, list[float]] = {}
    for row, octave in found:
        by_name.setdefault(row.scenario, []).append(what(row, octave))
    return np.array([np.mean(values) for values in by_name.values()])


def residual_interval(found: Sequence[tuple[Row, float]], truth: Callable[[Row], float]) -> tuple[float, float]:
    """Quantiles of log2(truth / value), with the finite-sample correction of split conformal prediction."""
    residuals = np.array([truth(row) - octave for row, octave in found])
    scenarios = len({row.scenario for row, _ in found})
    tail = (1 - LEVEL) / 2
    corrected = max(0.0, tail - (1 - tail) / scenarios)  # scenarios are independent, seeds of one are not
    return float(np.quantile(residuals, corrected)), float(np.quantile(residuals, 1 - corrected))


def truths(curves: dict[str, Curve]) -> dict[str, Callable[[Row], float]]:
    """What the intervals are for: the grid's best rate, and the onset."""
    return {"value": lambda row: curves[row.scenario].best, "onset": lambda row: row.targets["onset"]}


def numbers() -> dict[str, tuple[Blend, tuple[float, float]]]:
    """What dyntune/suggest/blend.py holds."""
    curves, rows = load()
    return {
        target: (
            fit(rows, target, base, features),
            residual_interval(cross_validated(rows, target, base, features), truths(curves)[target]),
        )
        for target, (base, features) in CHOSEN.items()
    }


def _print_numbers() -> None:
    for target, (blend, interval) in numbers().items():
        print(f"{target.upper()} = Blend(")
        print(f"    constant={blend.constant:.4f},\n    adaptive={blend.adaptive:.4f},")
        print(f"    momentum={blend.momentum:.4f},\n    base={blend.base!r},")
        print(f"    weights={ {name: round(weight, 4) for name, weight in blend.weights.items()} },\n)")
        print(f"{target.upper()}_INTERVAL = ({interval[0]:.3f}, {interval[1]:.3f})")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--print", action="store_true", help="the numbers only")
    if parser.parse_args().print:
        _print_numbers()
        return 0
    curves, rows = load()
    print(f"{len(curves)} scenarios, {len(rows)} suggestions; cross-validated over families")
    for base, features in COMPARED["value"]:
        found = cross_validated(rows, "value", base, features)
        regret = per_scenario(found, lambda row, octave: float(curves[row.scenario].at(octave)))
        off = per_scenario(found, lambda row, octave: abs(octave - curves[row.scenario].best))
        print(
            f"value: {' + '.join((base, *features)):32s} regret mean {regret.mean():.3f}, median "
            f"{np.median(regret):.3f}, 95% {np.quantile(regret, 0.95):.3f}, worst {regret.max():.2f}; octaves off "
            f"{off.mean():.2f}"
        )
    for base, features in COMPARED["onset"]:
        found = cross_validated(rows, "onset", base, features)
        within = per_scenario(found, lambda row, octave: float(abs(octave - row.targets["onset"]) <= 1))
        off = per_scenario(found, lambda row, octave: abs(octave - row.targets["onset"]))
        print(
            f"onset: {' + '.join((base, *features)):32s} within a factor 2: {within.mean():.2f}; off {off.mean():.2f}"
        )
    for target, (_, interval) in numbers().items():
        print(f"{LEVEL:.0%} of log2(truth / {target}): {interval[0]:+.2f} to {interval[1]:+.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""suggest_lr on the test half, judged by real training, beside placebos and at other budgets.

    python benchmarks/lr/evidence.py --half test --seeds 8
    python benchmarks/lr/evidence.py --half test --max-gradients 100     # and 400
    python benchmarks/lr/ours.py --jobs 2

Rules of one budget get the same pilot (its first seed). The placebos are fitted to the tune half exactly as the blend
is: *no curvature* leaves the critical rate out, the one curvature of the recipe; *another's curvature* takes its
distance from the usual rate from the next scenario of the list; *usual rate* has no measurement at all. Curvature helps
where the paired interval of the difference excludes zero.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import dataclasses
import json
import math
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peer_suite.provenance import provenance

from benchmarks.lr import fit
from benchmarks.lr.evidence import BUDGET, path_of
from benchmarks.lr.metrics import mean_interval
from benchmarks.lr.scenario import ADAPTIVE
from benchmarks.lr.scenarios import SCENARIOS
from benchmarks.lr.search import lr_of
from benchmarks.lr.verdict import Judge, Verdict, load_sweeps, sweep_of

RESULTS = Path(__file__).resolve().parent / "results"
SEED = "0"
OTHER_BUDGETS = (100, 400)
NOTHING = Verdict(None, 1.0, 1.0, None, 1.0)


def bounded(octave: float, measured: dict[str, Any]) -> float:
    """The bounds of dyntune.suggest.lr_rule: what short runs survived, and half of what blew up."""
    octave = min(octave, math.log2(measured["survived"]))
    return octave if measured["blow_up"] is None else min(octave, math.log2(measured["blow_up"]) - 1)


def first_pilots(max_gradients: int = BUDGET) -> dict[str, dict[str, Any]]:
    """The evidence of each scenario's first pilot."""
    found = json.loads(path_of("test", max_gradients).read_text())["scenarios"]
    return {name: row["seeds"][SEED] for name, row in found.items()}


def suggestions() -> dict[str, dict[str, float | None]]:
    """Learning rates by rule and scenario; None where the pilot refuses."""
    pilots = first_pilots()
    _, rows = fit.load()
    blends = {
        "no curvature": fit.fit(rows, "value", "usual", ("vertex",)),
        "another's curvature": fit.fit(rows, "value", *fit.CHOSEN["value"]),
        "usual rate": fit.fit(rows, "value", "usual", ()),
    }
    found: dict[str, dict[str, float | None]] = {"suggest_lr": {}, "short runs alone": {}} | {b: {} for b in blends}
    names = list(pilots)
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        measured, other = pilots[name], pilots[following]
        if measured.get("value") is None:
            for rule in found.values():
                rule[name] = None
            continue
        found["suggest_lr"][name] = measured["value"]
        found["short runs alone"][name] = measured["pick"]
        row, foreign = _row(name, measured), _row(following, other)
        distance = foreign.rates["critical"] / foreign.rates["usual"]
        swapped = dataclasses.replace(row, rates=row.rates | {"critical": row.rates["usual"] * distance})
        for rule, inputs in (("no curvature", row), ("another's curvature", swapped), ("usual rate", row)):
            octave = fit.suggestion(blends[rule], inputs)
            found[rule][name] = 2.0 ** (octave if rule == "usual rate" else bounded(octave, measured))
    for budget in OTHER_BUDGETS:
        if path_of("test", budget).exists():
            pilots = first_pilots(budget)
            found[f"suggest_lr, {budget} gradients"] = {name: row.get("value") for name, row in pilots.items()}
    return found


def _row(name: str, measured: dict[str, Any]) -> fit.Row:
    scenario = SCENARIOS[name]
    adaptive = scenario.optimizer in ADAPTIVE
    momentum = 0.0 if adaptive else fit.momentum_of(scenario.settings())
    return fit.Row(name, "", adaptive, momentum, fit.measured_rates(measured), {})


_judges: list[Judge] = []


def _verdict(task: tuple[str, str, float | None]) -> tuple[str, str, dict[str, Any]]:
    rule, name, lr = task
    torch.set_num_threads(1)
    if not _judges:
        _judges.append(Judge())
    verdict = NOTHING if lr is None else _judges[0].verdict(SCENARIOS[name], lr)
    return rule, name, dataclasses.asdict(verdict)


def difference(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Mean of ours - theirs over scenarios with its paired bootstrap interval."""
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])


def ranges() -> dict[str, Any]:
    """What the intervals held, how close max_stable came to the onset, and how far pilots differ."""
    evidence, sweeps = json.loads(path_of("test").read_text())["scenarios"], load_sweeps()
    constant = stable_constant()
    table: dict[str, list[list[float]]] = {}
    spread = []
    for name, found in evidence.items():
        sweep = sweep_of(SCENARIOS[name], sweeps)
        rows = [row for row in found["seeds"].values() if row.get("value")]
        held = [[float(row["low"] <= sweep.best <= row["high"]) for row in rows]]
        onset = math.inf if sweep.onset is None else sweep.onset
        held.append([float(row["max_stable_low"] <= onset <= (row["max_stable_high"] or math.inf)) for row in rows])
        held.append([float(0.5 <= row["max_stable"] / onset <= 2) for row in rows])
        held.append([float(0.5 <= constant * row["value"] / onset <= 2) for row in rows])
        held.append([float(row["value"] < onset) for row in rows])
        for key, values in zip(HELD, held, strict=True):
            table.setdefault(key, []).append(values)
        if len(rows) > 1:
            spread.append(float(np.std([math.log2(row["value"]) for row in rows], ddof=1)))
    result: dict[str, Any] = {"best_constant_multiple": constant, "seed_spread_octaves_mean": float(np.mean(spread))}
    result["seed_spread_octaves"] = mean_interval(spread)
    result["pilots"] = max(len(found["seeds"]) for found in evidence.values())
    for key, scenarios in table.items():
        firsts = [values[0] for values in scenarios if values]
        result[key] = {"held": int(sum(firsts)), "of": len(firsts), "share": mean_interval([*map(np.mean, scenarios)])}
    within, theirs = ([float(np.mean(v)) for v in table[key]] for key in ("max_stable_within_2", "constant_within_2"))
    result["max_stable_minus_constant"] = difference(within, theirs)
    return result


HELD = ("range", "max_stable_range", "max_stable_within_2", "constant_within_2", "value_below_onset")


def stable_constant() -> float:
    """The multiple of the suggestion that lies within 2x of the onset most often on the tune half."""
    evidence = json.loads(path_of("tune").read_text())["scenarios"]
    sweeps = load_sweeps()
    ratios = np.array(
        [
            math.log2(lr_of(sweeps[name]["onset"]) / row["value"])
            for name, found in evidence.items()
            for row in found["seeds"].values()
            if row.get("value")
        ]
    )
    grid = np.arange(0, 8, 0.125)
    return float(2.0 ** grid[np.argmax((np.abs(ratios[:, None] - grid) <= 1).mean(0))])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--rules", nargs="+", help="default: all; suggest_lr has to be among them")
    options = parser.parse_args()
    rules = {name: rates for name, rates in suggestions().items() if options.rules is None or name in options.rules}
    tasks = [(rule, name, lr) for rule, rates in rules.items() for name, lr in rates.items()]
    verdicts: dict[str, dict[str, dict[str, Any]]] = {}
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for done, (rule, name, verdict) in enumerate(pool.imap(_verdict, tasks), start=1):
            verdicts.setdefault(rule, {})[name] = verdict
            print(f"[{done}/{len(tasks)}] {rule}, {name}: {verdict['regret']:.3f}", flush=True)
    regrets = {rule: [row["regret"] for row in rows.values()] for rule, rows in verdicts.items()}
    summary = {
        rule: {
            "regret": mean_interval(values),
            "regret_val": mean_interval([row["regret_val"] for row in verdicts[rule].values()]),
            "p95": float(np.quantile(values, 0.95)),
            "worst": max(values),
            "failed": sum(row["failed"] >= 0.5 for row in verdicts[rule].values()),
            "refused": sum(row["lr"] is None for row in verdicts[rule].values()),
            "octaves": float(
                np.mean([row["octaves"] for row in verdicts[rule].values() if row["octaves"] is not None])
            ),
        }
        for rule, values in regrets.items()
    }
    paired = {
        rule: difference(regrets["suggest_lr"], values) for rule, values in regrets.items() if rule != "suggest_lr"
    }
    baselines = RESULTS / "baselines.json"
    if baselines.exists():
        table = json.loads(baselines.read_text())["verdicts"]
        names = [name for name in verdicts["suggest_lr"] if name in table]
        for rule in next(iter(table.values())):
            theirs = [table[name][rule]["regret"] for name in names]
            paired[rule] = difference([verdicts["suggest_lr"][name]["regret"] for name in names], theirs)
    result = {
        "provenance": provenance(),
        "summary": summary,
        "suggest_lr_minus": paired,
        "ranges": ranges(),
        "verdicts": verdicts,
    }
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.5g}"))
    (RESULTS / "ours.json").write_text(json.dumps(rounded, indent=1) + "\n")
    for rule, row in rounded["summary"].items():
        print(rule, row)
    print(json.dumps(rounded["suggest_lr_minus"], indent=1), json.dumps(rounded["ranges"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`suggest_heads` against the brute force: failing rates, verdicts, recommended pairs, flags.

    python benchmarks/heads/judge.py [--half tune|test] [--print]

Reads the brute force (sweep.py), what was said before (evidence.py) and the trainings with fresh seeds (fresh.py);
writes results/judged-HALF.json with how complete it is. Intervals draw whole groups again. Seeds of the brute force
that are not finished in all counts of a group do not count; what needs two seeds says how many groups have them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.heads import evidence, fresh
from benchmarks.heads.sweep import FINEST, RUNS, runs_of, unpack
from benchmarks.heads.training import Run
from benchmarks.heads.workloads import FRESH_SEEDS, HEADS, SEEDS, Cell, Group, groups
from benchmarks.lr.search import Store
from benchmarks.peer_suite.provenance import provenance

HERE = Path(__file__).resolve().parent
SCHEMA = 1
DRAWS = 10_000
ALPHA = 0.05  # at which the brute force's own seeds say that head counts differ
QUARTER = 0.25  # octaves in a step of k


@dataclass(frozen=True)
class Judged:
    """One group.

    Args:
        group: Which.
        observed: log2 of the lowest failing rate. Shape (counts, seeds); NaN where none fails on the grid.
        predicted: log2 of the rate at which training was expected to fail; NaN where none was said. Shape (counts,).
        told: All that `suggest_heads` said.
    """

    group: Group
    observed: np.ndarray
    predicted: np.ndarray
    told: dict[str, Any]

    @property
    def mean(self) -> np.ndarray:
        """log2 of the observed rate: a mean over seeds; NaN where a seed has none. Shape (counts,)."""
        return np.asarray(self.observed.mean(axis=1))

    @property
    def effect(self) -> bool | None:
        """Whether the brute force's seeds say that head counts differ; None with fewer than two seeds."""
        known = self.observed[np.isfinite(self.mean)]
        if known.shape[1] < 2 or len(known) < 2:
            return None
        within = known - known.mean(axis=1, keepdims=True) - (known.mean(axis=0) - known.mean())
        count, seeds = known.shape
        # Seeds that fall on the same steps agree no better than the bisection resolves.
        floor = (FINEST * QUARTER) ** 2 / 12
        noise = max(float((within**2).sum()) / ((count - 1) * (seeds - 1)), floor)
        between = seeds * float(((known.mean(axis=1) - known.mean()) ** 2).sum()) / (count - 1)
        return bool(stats.f.sf(between / noise, count - 1, (count - 1) * (seeds - 1)) < ALPHA)

    @property
    def equal(self) -> bool:
        """Whether all observed rates lie within the margin of their mean, up to what the bisection resolves."""
        apart = np.abs(self.mean - np.nanmean(self.mean))
        return bool(np.nanmax(apart) <= math.log2(self.told["margin"]) + FINEST * QUARTER / 2)


def judged_groups(half: str, store: Store) -> list[Judged]:
    """Groups with an answer and at least one finished seed."""
    asked, found = evidence.known(), []
    for group in groups(half=half):
        runs = [runs_of(Cell(group, heads), store).found for heads in HEADS]
        seeds = [s for s in SEEDS if all(f"failing {s}" in f for f in runs)]
        if not seeds or group.name not in asked:
            continue
        rates = [[f[f"failing {s}"] for s in seeds] for f in runs]
        told = asked[group.name]
        rows = {row["heads"]: row["critical_lr"]["value"] for row in told["table"]}
        found.append(
            Judged(
                group,
                np.array([[math.nan if k is None else k * QUARTER for k in ks] for ks in rates]),
                np.array([math.nan if rows[h] is None else math.log2(rows[h]) for h in HEADS]),
                told,
            )
        )
    return found


def interval(values: Sequence[float], seed: int = 0) -> list[float] | None:
    """95% bootstrap interval of the mean of one number for each group."""
    if len(values) < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn = rng.choice(np.array(values), (DRAWS, len(values))).mean(axis=1)
    return [float(x) for x in np.percentile(drawn, [2.5, 97.5])]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean over groups, its interval, the largest."""
    if not values:
        return {"groups": 0}
    return {
        "groups": len(values),
        "mean": float(np.mean(values)),
        "interval": interval(values),
        "worst": float(np.max(values)),
    }


def concordance(predicted: np.ndarray, observed: np.ndarray) -> tuple[float, int]:
    """Concordant pairs, ties of the prediction as halves, and the number of pairs; NaN observed: above all others."""
    right, pairs = 0.0, 0
    for i, j in itertools.combinations(range(len(observed)), 2):
        a, b = observed[i], observed[j]
        if math.isnan(a) and math.isnan(b):
            continue
        order = 1.0 if math.isnan(a) else -1.0 if math.isnan(b) else float(np.sign(a - b))
        if order == 0.0 or math.isnan(predicted[i]) or math.isnan(predicted[j]):
            continue
        said = float(np.sign(predicted[i] - predicted[j]))
        right, pairs = right + (0.5 if said == 0 else float(said == order)), pairs + 1
    return right, pairs


def rates(found: Sequence[Judged]) -> dict[str, Any]:
    """Predicted against observed failing rates."""
    errors = [np.abs(j.predicted - j.mean) for j in found]
    cells = np.concatenate(errors) if errors else np.array([])
    known = cells[np.isfinite(cells)]
    censored = sum(int(np.isnan(j.mean).sum()) for j in found)
    within = int((known <= 1).sum())
    exact = stats.binomtest(within, len(known)).proportion_ci() if len(known) else None
    right, pairs = (
        (sum(x) for x in zip(*(concordance(j.predicted, j.mean) for j in found), strict=True)) if found else (0, 0)
    )
    # The mean of the observed rates of a group says nothing about heads, and knows the level: all that a constant can.
    against = {}
    for name, chosen in (("all", found), ("with an effect", [j for j in found if j.effect])):
        gaps = []
        own = []
        for j in chosen:
            ours = np.abs(j.predicted - j.mean)
            constant = np.abs(np.nanmean(j.mean) - j.mean)
            centred = np.abs((j.predicted - np.nanmean(j.predicted)) - (j.mean - np.nanmean(j.mean)))
            gaps.append(float(np.nanmean(ours - constant)))
            own.append(float(np.nanmean(centred - constant)))
        against[name] = {"error": summary(gaps), "of the heads' part alone": summary(own)}
    return {
        "cells": len(known),
        "censored": censored,
        "within a factor 2": within,
        "share": None if exact is None else within / len(known),
        "interval": None if exact is None else [exact.low, exact.high],
        "log2 error": float(known.mean()) if len(known) else None,
        "bias": float(np.nanmean([np.nanmean(j.predicted - j.mean) for j in found])) if found else None,
        "concordance": right / pairs if pairs else None,
        "pairs": pairs,
        "against the group mean": against,
    }


def verdicts(found: Sequence[Judged]) -> dict[str, Any]:
    """What was said about equality, and whether the brute force agrees."""
    said = {v: [j for j in found if j.told["verdict"] == v] for v in ("equivalent", "different", "undecided")}
    right = {
        "equivalent": sum(j.equal for j in said["equivalent"]),
        "different": sum(j.effect is True for j in said["different"]),
    }
    return {
        "groups": len(found),
        "said": {v: len(js) for v, js in said.items()},
        "right": right,
        "observed equal": sum(j.equal for j in found),
        "observed an effect": sum(j.effect is True for j in found),
        "with two seeds": sum(j.effect is not None for j in found),
    }


def regrets(found: Sequence[Judged], store: Store) -> dict[str, Any]:
    """Loss above the best of all that was rerun, as a share of what it gains; means of fresh seeds."""
    there = fresh.trained()
    losses: dict[str, dict[str, float]] = {}
    starts: dict[str, float] = {}
    best_of: dict[str, float] = {}
    for j in found:
        pairs = fresh.compared(j.group, j.told, store)
        runs = {
            name: [there.get((j.group.name, heads, lr, s)) for s in FRESH_SEEDS] for name, (heads, lr) in pairs.items()
        }
        if not runs or any(run is None for each in runs.values() for run in each):
            continue
        name = j.group.name
        initial = float(np.mean([run[0] for run in runs["grid"]]))
        # A run that failed counts as one that gained nothing.
        losses[name] = {
            n: float(np.mean([min(initial, math.inf if r[1] is None else r[1]) for r in each]))
            for n, each in runs.items()
        }
        starts[name], best_of[name] = initial, losses[name]["grid"]
    names = list(dict.fromkeys(n for each in losses.values() for n in each))
    share = {
        n: {g: (each[n] - best_of[g]) / (starts[g] - best_of[g]) for g, each in losses.items() if n in each}
        for n in names
    }
    placebo = {
        g: float(np.mean([v for n, v in each.items() if n.endswith("suggest_lr")])) for g, each in losses.items()
    }
    ours, default = share.get("suggest_heads", {}), share.get(f"{fresh.DEFAULT} heads, suggest_lr", {})
    both = [g for g in ours if g in default]
    effect = {j.group.name: j.effect for j in found}
    paired = {
        name: summary([ours[g] - default[g] for g in both if keep(effect[g])])
        for name, keep in (
            ("all", lambda _: True),
            ("with an effect", lambda e: e is True),
            ("without", lambda e: e is False),
        )
    }
    return {
        "groups": len(losses),
        "regret": {n: summary(list(values.values())) for n, values in share.items()},
        "any number of heads, suggest_lr": summary(
            [(placebo[g] - best_of[g]) / (starts[g] - best_of[g]) for g in placebo]
        ),
        "suggest_heads minus the default": paired,
    }


def flags(found: Sequence[Judged]) -> dict[str, Any]:
    """Hot cells that were flagged before any training, and others that were."""
    hot = [row for j in found if j.group.scaling == "hot" for row in j.told["table"]]
    other = [row for j in found if j.group.scaling != "hot" for row in j.told["table"]]

    def before(row: dict[str, Any]) -> bool:
        return any("before training" in flag for flag in row["flags"])

    return {
        "hot": len(hot),
        "hot flagged": sum(bool(row["flags"]) for row in hot),
        "hot flagged before training": sum(map(before, hot)),
        "others": len(other),
        "others flagged": sum(bool(row["flags"]) for row in other),
    }


def judge(half: str) -> dict[str, Any]:
    """All of it."""
    unpack()
    store = Store(RUNS, Run)  # type: ignore[type-var]
    found = judged_groups(half, store)
    every = groups(half=half)
    return {
        "schema": SCHEMA,
        "half": half,
        "groups": len(found),
        "of": len(every),
        "seeds": sum(j.observed.shape[1] for j in found),
        "of_seeds": len(every) * len(SEEDS),
        "rates": rates(found),
        "verdicts": verdicts(found),
        "regrets": regrets(found, store),
        "flags": flags(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("tune", "test"), default="tune")
    parser.add_argument("--print", action="store_true", dest="only_print")
    options = parser.parse_args()
    result = judge(options.half)
    print(json.dumps(result, indent=1))
    if not options.only_print:
        result["provenance"] = provenance() | {"command": f"python benchmarks/heads/judge.py --half {options.half}"}
        (HERE / "results" / f"judged-{options.half}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

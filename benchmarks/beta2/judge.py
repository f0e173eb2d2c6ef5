"""Rules for beta2 judged by the sweep: mean and worst regret, spikes, diverged runs, beside every fixed value.

    python benchmarks/beta2/judge.py [--half tune|test]

Reads results/sweeps.json and what evidence.py recorded; writes results/judged-HALF.json. Regrets are shares of what
there is to be learnt, of the training loss; intervals draw whole families again. The worst case is over cells where
its standard error is at most 0.3%.
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
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.beta2.evidence import load, tokens
from benchmarks.beta2.regret import Cell, cells, interval
from benchmarks.beta2.sweep import RESULT
from benchmarks.beta2.workloads import BETA1, BETAS, WORKLOADS, select
from benchmarks.peer_suite.provenance import provenance
from dyntune.suggest.beta2_rule import half_life_beta2, refresh_beta2

SCHEMA = 1
OURS = "suggest_beta2"
CERTAIN = 0.003  # standard error of a regret that counts for the worst case
Choice = Callable[[Cell], float | None]


def half_life_alone(cell: Cell) -> float:
    """Of ten million tokens; a row of what is no text counts as one, as the rule's authors count rows of text."""
    workload = WORKLOADS[cell.workload]
    return half_life_beta2(tokens(workload) or workload.batch)


def refreshes(cell: Cell) -> float:
    """1 - 1000 / T, and at least the lowest value there is."""
    return refresh_beta2(WORKLOADS[cell.workload].steps) or BETAS[0]


def naive(known: dict[tuple[str, str], dict[str, Any]]) -> Choice:
    """1 - 1 / tau, with the memory that the bank measures; 0.999 where it measures none."""

    def choose(cell: Cell) -> float:
        tau = known.get((cell.workload, cell.lr), {}).get("evidence", {}).get("memory of the scale")
        value = tau["value"] if isinstance(tau, dict) else None
        return 0.999 if value is None else 1 - 1 / max(value, 1.0 + 1e-9)

    return choose


def rules(known: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Choice]:
    """All that are compared; ours gives None where it was not recorded or refuses."""

    def ours(cell: Cell) -> float | None:
        found = known.get((cell.workload, cell.lr))
        return None if found is None else found["value"]

    fixed: dict[str, Choice] = {f"{beta:g}": (lambda _, beta=beta: beta) for beta in BETAS}
    return (
        {OURS: ours}
        | fixed
        | {
            "half-life of 10 million tokens": half_life_alone,
            "1 - 1000 / T": refreshes,
            "beta1 = beta2": lambda _: BETA1,
            "naive 1 - 1 / tau": naive(known),
        }
    )


def regrets(found: list[Cell], choose: Choice) -> np.ndarray:
    """Of a rule in every cell; NaN where it says nothing. Shape (cells,)."""
    chosen = [choose(cell) for cell in found]
    return np.array(
        [math.nan if b is None else cell.regret()[cell.nearest(b)] for cell, b in zip(found, chosen, strict=True)]
    )


def judged(found: list[Cell], choose: Choice) -> dict[str, Any]:
    """One rule."""
    values, groups = regrets(found, choose), [cell.family for cell in found]
    at = [None if (b := choose(cell)) is None else cell.nearest(b) for cell in found]
    said = [(cell, i) for cell, i in zip(found, at, strict=True) if i is not None]
    if len(said) < len(found):
        return {"cells": len(said), "of": len(found)}
    mean, low, high = interval(values, groups)
    certain = [value for (cell, i), value in zip(said, values, strict=True) if cell.error()[i] <= CERTAIN]
    return {
        "cells": len(said),
        "mean": mean,
        "interval": [low, high],
        "worst": max(certain, default=None),
        "worst_of_all": float(values.max()),
        "certain": len(certain),
        "diverged": int(sum(cell.failed[i].sum() for cell, i in said)),
        "spikes": int(sum(cell.spikes[i].sum() for cell, i in said)),
        "runs": int(sum(cell.failed.shape[1] for cell, _ in said)),
    }


def paired(found: list[Cell], first: Choice, second: Choice) -> dict[str, Any]:
    """Mean difference of regrets, and its interval."""
    mean, low, high = interval(regrets(found, first) - regrets(found, second), [cell.family for cell in found])
    return {"mean": mean, "interval": [low, high]}


def random_choice(found: list[Cell]) -> dict[str, Any]:
    """The mean over all values, each as likely."""
    values = np.array([np.mean([cell.regret()[cell.nearest(b)] for b in BETAS]) for cell in found])
    mean, low, high = interval(values, [cell.family for cell in found])
    return {"cells": len(found), "mean": mean, "interval": [low, high]}


def rank_correlation(found: list[Cell], known: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """Spearman's, of the bank's predictive score with the final loss over the values of a cell."""
    rhos = []
    for cell in found:
        series = known.get((cell.workload, cell.lr), {}).get("series", {})
        if series.get("score_beta2"):
            scores = np.interp(np.log1p(-cell.betas)[::-1], np.log1p(-np.array(series["score_beta2"]))[::-1],
                               np.array(series["score_excess"])[::-1])[::-1]  # fmt: skip
            rhos.append(float(stats.spearmanr(scores, cell.losses.mean(axis=1)).statistic))
    return {"cells": len(rhos), "mean": float(np.mean(rhos)) if rhos else None}


def without_bandits(found: list[Cell], choices: dict[str, Choice]) -> dict[str, Any]:
    """The same where no policy can collapse: a few collapsed runs make up most of the means. Chosen after the look."""
    rest = [cell for cell in found if not WORKLOADS[cell.workload].bandit]
    return {
        "cells": len(rest),
        "rules": {name: judged(rest, choose) for name, choose in choices.items()},
        "against": {name: paired(rest, choices[OURS], choices[name]) for name in choices if name != OURS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("tune", "test"), default="tune")
    parser.add_argument("--seeds", type=int, default=4, help="at least so many in a cell")
    parser.add_argument("--print", action="store_true", dest="only_print")
    options = parser.parse_args()
    if options.half == "test":
        print("THE TEST HALF IS BEING LOOKED AT: what is changed from here on because of it was fitted to it.")
    sweep = json.loads(RESULT.read_text())
    names = {workload.name for workload in select(half=options.half)}
    found = cells({k: v for k, v in sweep["workloads"].items() if k in names}, seeds=options.seeds)
    known = load()
    choices = rules(known)
    table = {name: judged(found, choose) for name, choose in choices.items()} | {"random": random_choice(found)}
    fixed = {name: table[name]["mean"] for name in (f"{b:g}" for b in BETAS)}
    best = min(fixed, key=lambda name: fixed[name])
    complete = table[OURS]["cells"] == len(found) and "mean" in table[OURS]
    result = {
        "schema": SCHEMA,
        "provenance": provenance(),
        "half": options.half,
        "seeds": sorted({cell.losses.shape[1] for cell in found}),
        "cells": len(found),
        "families": len({cell.family for cell in found}),
        "noise_floor": float(np.mean([cell.floor() for cell in found])),
        "rules": table,
        "best_fixed": best,
        "against": {n: paired(found, choices[OURS], choices[n]) for n in choices if n != OURS} if complete else {},
        "without_bandits": without_bandits(found, choices) if complete else {},
        "score_and_loss": rank_correlation(found, known),
    }
    if not options.only_print:
        path = RESULT.with_name(f"judged-{options.half}.json")
        path.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in sorted(table.items(), key=lambda item: item[1].get("mean", math.inf)):
        if "mean" in row:
            low, high = row["interval"]
            worst = "" if row.get("worst") is None else f" worst {100 * row['worst']:.1f}% of {row['certain']}"
            more = f" diverged {row['diverged']} spikes {row['spikes']}" if "spikes" in row else ""
            print(f"{name:32s} {100 * row['mean']:6.2f}% ({100 * low:.2f} .. {100 * high:.2f}){worst}{more}")
        else:
            print(f"{name:32s} said in {row['cells']} of {row['of']} cells")
    print(f"noise floor {100 * result['noise_floor']:.2f}%, best fixed {best}, {len(found)} cells")
    for name, row in result["against"].items():
        print(f"  against {name}: {100 * row['mean']:.2f}% ({100 * row['interval'][0]:.2f} .. "
              f"{100 * row['interval'][1]:.2f})")  # fmt: skip


if __name__ == "__main__":
    main()

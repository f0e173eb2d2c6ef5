"""suggest_lr on the test half, judged by real training, beside placebos that lack its curvature.

    python benchmarks/lr/evidence.py --half test
    python benchmarks/lr/ours.py --jobs 2

Every rule gets the same pilot (its first seed). The placebos are fitted to the tune half exactly as the blend is:
*no curvature* leaves the stochastic threshold out, *another's curvature* takes its distance from the critical rate from
the next scenario of the list. Curvature helps where the paired interval of the difference excludes zero.
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
from benchmarks.lr.metrics import mean_interval
from benchmarks.lr.scenario import ADAPTIVE
from benchmarks.lr.scenarios import SCENARIOS
from benchmarks.lr.verdict import Judge, Verdict, load_sweeps, sweep_of

RESULTS = Path(__file__).resolve().parent / "results"
SEED = "0"
NOTHING = Verdict(None, 1.0, 1.0, None, 1.0)


def bounded(octave: float, measured: dict[str, Any]) -> float:
    """The bounds of dyntune.suggest.lr_rule: half of what blew up, and the deterministic threshold."""
    if measured["blow_up"] is not None:
        octave = min(octave, math.log2(measured["blow_up"]) - 1)
    if measured["deterministic"] is not None:
        octave = min(octave, math.log2(measured["deterministic"]))
    return octave


def suggestions() -> dict[str, dict[str, float | None]]:
    """Learning rates by rule and scenario; None where the pilot refuses."""
    evidence = json.loads((RESULTS / "evidence-test.json").read_text())["scenarios"]
    _, rows = fit.load()
    blends = {"no curvature": fit.fit(rows, ("pick", "blow_up")), "another's curvature": fit.fit(rows)}
    found: dict[str, dict[str, float | None]] = {
        "suggest_lr": {},
        "no curvature": {},
        "another's curvature": {},
        "short runs alone": {},
    }
    names = list(evidence)
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        measured, other = evidence[name]["seeds"][SEED], evidence[following]["seeds"][SEED]
        if measured.get("pick") is None:
            for rule in found.values():
                rule[name] = None
            continue
        found["suggest_lr"][name] = measured["value"]
        found["short runs alone"][name] = measured["pick"]
        foreign = other.get("stochastic")
        if foreign is not None:
            foreign *= measured["critical"] / other["critical"]
        adaptive = SCENARIOS[name].optimizer in ADAPTIVE
        for rule, inputs in (("no curvature", measured), ("another's curvature", measured | {"stochastic": foreign})):
            row = fit.Row(name, "", adaptive, inputs, 0.0)
            found[rule][name] = 2.0 ** bounded(fit.suggestion(blends[rule], row), measured)
    return found


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


def coverage() -> dict[str, float]:
    """How often the range held the grid's best: all pilots, and the first of each scenario."""
    evidence, sweeps = json.loads((RESULTS / "evidence-test.json").read_text())["scenarios"], load_sweeps()
    held = {
        name: [
            row["low"] <= sweep_of(SCENARIOS[name], sweeps).best <= row["high"]
            for row in found["seeds"].values()
            if row.get("value")
        ]
        for name, found in evidence.items()
    }
    spread = [
        float(np.std([math.log2(row["value"]) for row in found["seeds"].values() if row.get("value")], ddof=1))
        for found in evidence.values()
        if sum(bool(row.get("value")) for row in found["seeds"].values()) > 1
    ]
    firsts = [rows[0] for rows in held.values() if rows]
    return {
        "first_held": sum(firsts),
        "first_of": len(firsts),
        "all_held": sum(map(sum, held.values())),
        "all_of": sum(map(len, held.values())),
        "seed_spread_octaves_mean": float(np.mean(spread)),
    }


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
        "range": coverage(),
        "verdicts": verdicts,
    }
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.5g}"))
    (RESULTS / "ours.json").write_text(json.dumps(rounded, indent=1) + "\n")
    for rule, row in rounded["summary"].items():
        print(rule, row)
    print(json.dumps(rounded["suggest_lr_minus"], indent=1), rounded["range"])
    return 0


if __name__ == "__main__":
    sys.exit(main())

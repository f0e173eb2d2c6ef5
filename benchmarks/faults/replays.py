"""What replay adds: the cause that it finds in faulty trainings, and what it says of healthy ones.

    python benchmarks/faults/replays.py --kind faults|healthy --half tune|test [--jobs 2]     resumable
    python benchmarks/faults/replays.py --half test --pack                                    results/replays.json

Faults, medium and severe, are trained again with ``Monitor(replay=512)``; their alarms and answers are kept. The cause
with replay is that of the first answer that names one, else that of the alarm. Healthy runs are given an alarm of no
meaning at fixed steps, and shall be told that nothing averts it: any cause would be an invention.

One seed of each; what is trained and what the alarms are is that of `record.py` and `judge.py`.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import json
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peer_suite.provenance import provenance
from scipy.stats import binomtest

import dyntune
from benchmarks.faults.cases import Case, cases
from benchmarks.faults.record import OVERHEAD
from benchmarks.faults.workloads import HALVES
from dyntune.detect import default_detectors
from dyntune.monitor.alerts import Alert
from dyntune.monitor.rows import Rows

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache" / "replays"
LENGTH = 512
SEED = 0
PROBES = (300, 700, 1100)  # steps of the alarms that mean nothing
PROBED = 1200  # steps of a healthy run
NAMES_ONE = ("averted", "batches")


class Probe:
    """Raises a critical alarm at fixed steps, whatever happens."""

    def __init__(self) -> None:
        self._left = list(PROBES)

    def update(self, rows: Rows) -> Iterable[Alert]:
        last = int(rows.steps.max()) if len(rows) else -1
        while self._left and self._left[0] <= last:
            step = self._left.pop(0)
            yield Alert(kind="probe", severity="critical", step=step, text="nothing.", advice="nothing.")


def replay(case: Case) -> dict[str, Any]:
    """Train once, and tell what was answered."""
    healthy = case.kind == "healthy"
    training = case.training(steps=PROBED if healthy else None)
    with (
        warnings.catch_warnings(),
        dyntune.Monitor(
            training.model,
            training.optimizer,
            criterion=training.criterion,
            overhead=OVERHEAD,
            clipped=training.clip is not None,
            clip_norm=training.clip,
            detectors=[Probe()] if healthy else default_detectors(),
            replay=LENGTH,
            seed=case.seed,
        ) as monitor,
    ):
        warnings.simplefilter("ignore")
        training.loop(monitor)
    truth = case.truth(training)
    alarms = [
        [alert.step, alert.kind, [str(cause) for cause in alert.causes]]
        for alert in monitor.alerts
        if alert.severity == "critical"
    ]
    answers = [
        [event.step, event.detail.get("verdict"), event.detail.get("cause")]
        for event in monitor.run.events
        if event.name == "explained"
    ]
    told = {"case": case.name, "severity": case.severity, "cause": truth["cause"], "onset": truth["onset"]}
    return told | {"alarms": alarms, "answers": answers}


def place_of(case: Case) -> Path:
    return CACHE / case.kind / case.half / f"{case.name.replace('/', '--')}.json"


def wanted(kind: str, half: str) -> list[Case]:
    found = [case for case in cases(kind, half=half) if case.seed == SEED]
    return [case for case in found if case.severity in (None, "medium", "severe")]


def _work(case: Case) -> str:
    torch.set_num_threads(1)
    told = replay(case)
    place = place_of(case)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(told))
    return f"{case.name}: {told['answers']}"


# -- what comes of it -------------------------------------------------------------------------------------------------


def _rate(count: int, of: int) -> dict[str, Any]:
    """A share with its exact interval; with one seed a run is a cell."""
    low, high = binomtest(count, of).proportion_ci(method="exact") if of else (0.0, 1.0)
    ends = {"cell_low": round(float(low), 4), "cell_high": round(float(high), 4)}
    return {"count": count, "of": of, "rate": round(count / max(of, 1), 4)} | ends


def causes(told: dict[str, Any]) -> tuple[str | None, str | None, str | None]:
    """The first cause without and with replay, and the verdict of the answer that names one, else of the first."""
    onset = told["onset"]
    named = [cause for step, _, found in told["alarms"] if step >= onset for cause in found]
    answers = [answer for answer in told["answers"] if answer[0] is None or answer[0] >= onset]
    chosen = next((answer for answer in answers if answer[1] in NAMES_ONE and answer[2]), None)
    verdict = chosen[1] if chosen else answers[0][1] if answers else None
    alone = named[0] if named else None
    return alone, chosen[2] if chosen else alone, verdict


def figures(half: str) -> dict[str, Any]:
    """Of everything that is stored for a half."""
    faulty = [json.loads(place_of(c).read_text()) for c in wanted("faults", half) if place_of(c).exists()]
    healthy = [json.loads(place_of(c).read_text()) for c in wanted("healthy", half) if place_of(c).exists()]
    found: dict[str, Any] = {"complete": {"faults": len(faulty), "of": len(wanted("faults", half))}}
    for severity in ("medium", "severe"):
        runs = [told for told in faulty if told["severity"] == severity]
        judged = [(told["cause"], *causes(told)) for told in runs]
        detected = [item for item in judged if item[1] is not None]
        averted = [item for item in detected if item[3] in NAMES_ONE]
        found[severity] = {
            "runs": len(runs),
            "detected": len(detected),
            "top_1_alone": _rate(sum(truth == alone for truth, alone, *_ in detected), len(detected)),
            "top_1_with_replay": _rate(sum(truth == best for truth, _, best, _ in detected), len(detected)),
            "named_by_replay": _rate(sum(truth == best for truth, _, best, _ in averted), len(averted)),
            "alone_where_named_by_replay": _rate(sum(truth == alone for truth, alone, *_ in averted), len(averted)),
            "verdicts": dict(Counter(str(verdict) for *_, verdict in detected)),
        }
    answers = [verdict for told in healthy for _, verdict, _ in told["answers"]]
    answered = [verdict for verdict in answers if verdict not in ("not_reproduced", "too_short")]
    found["healthy"] = {
        "runs": len(healthy),
        "windows": _rate(sum(verdict not in NAMES_ONE for verdict in answered), len(answered)),
        "verdicts": dict(Counter(answers)),
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("faults", "healthy"), default="faults")
    parser.add_argument("--half", choices=HALVES, default="tune")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--pack", action="store_true")
    args = parser.parse_args()
    if args.pack:
        told = {"schema": 1, "provenance": provenance(), "half": args.half, "length": LENGTH} | figures(args.half)
        name = "replays.json" if args.half == "test" else "replays-tune.json"
        (HERE / "results" / name).write_text(json.dumps(told, indent=1) + "\n")
        print(json.dumps({k: v for k, v in told.items() if k != "provenance"}, indent=1))
        return
    missing = [case for case in wanted(args.kind, args.half) if not place_of(case).exists()]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for done, line in enumerate(pool.imap_unordered(_work, missing), start=1):
            print(f"[{done}/{len(missing)}] {line}", flush=True)


if __name__ == "__main__":
    main()

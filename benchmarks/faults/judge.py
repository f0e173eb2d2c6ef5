"""Every detector on every recorded run, and what comes of it.

    python benchmarks/faults/judge.py [--half tune] [--jobs 2]        what is new; resumable
    python benchmarks/faults/judge.py --half tune --pack              results/alarms-tune.json
    python benchmarks/faults/judge.py --half test --pack              results/alarms.json, which the pages are made of

A run is given to a detector in the blocks in which its monitor wrote it (`alarm.py`). Rules that look at every step
raise alarms at that step, detectors of a monitor at the end of a block. Answers are kept under .cache/judged/ until the
run or the detectors change.

The test half is read only if it is asked for by name, and whoever asks is told.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import hashlib
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peer_suite.provenance import provenance

from benchmarks.faults import alarm as alarms_module
from benchmarks.faults import baselines as baselines_module
from benchmarks.faults.alarm import SEVERITIES, Alarm, Looker, Monitored, at_level, look, read_blocks, read_truth
from benchmarks.faults.baselines import BASELINES, FIXED_RULE, PLACEBO
from benchmarks.faults.cases import KINDS, Case, cases
from benchmarks.faults.record import RUNS, folder_of, is_stored
from benchmarks.faults.score import Judged, Point, advantage, at_severity, budget, by_family, figures, merged
from benchmarks.faults.workloads import HALVES
from dyntune.monitor.alerts import Cause, default_detectors

HERE = Path(__file__).resolve().parent
JUDGED = HERE / ".cache" / "judged"
OURS = "dyntune"
SCHEMA = 1
ROUNDED = 6  # significant digits: more than any figure has that is counted in runs
RULE: Point = (FIXED_RULE, 6.0)
Record = dict[str, Any]


def detectors() -> dict[str, Callable[[str], Iterable[Looker]]]:
    """How each is made afresh for the run of a name."""
    return {OURS: lambda _: [Monitored(default_detectors())]} | {name: b.make for name, b in BASELINES.items()}


def _hash(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def codes() -> dict[str, str]:
    """What the answers depend on, by detector: its source."""
    import dyntune.detect
    import dyntune.monitor.alerts

    shared = Path(str(alarms_module.__file__))
    package = Path(str(dyntune.detect.__file__)).parent
    ours = _hash([shared, Path(str(dyntune.monitor.alerts.__file__)), *package.rglob("*.py")])
    theirs = _hash([shared, Path(str(baselines_module.__file__))])
    return {OURS: ours} | dict.fromkeys(BASELINES, theirs)


# -- one run ----------------------------------------------------------------------------------------------------------


def judge(
    folder: Path, wanted: Iterable[str], make: dict[str, Callable[[str], Iterable[Looker]]], name: str
) -> dict[str, dict[str, list[list[Any]]]]:
    """Alarms of the wanted detectors by level, repetitions left out.

    Args:
        folder: Of the stored run.
        wanted: Names of detectors.
        make: See :func:`detectors`.
        name: Of the run, for those that are random.
    """
    blocks, onset = read_blocks(folder), read_truth(folder)["onset"]
    found: dict[str, dict[str, list[list[Any]]]] = {}
    for detector in wanted:
        levels = found.setdefault(detector, {})
        for looker in make[detector](name):
            raised = look(looker, blocks)
            for level in looker.levels:
                kept = merged(at_level(raised, level, at_least=looker.at_least), onset)
                levels[repr(level)] = [_packed(alarm) for alarm in kept]
    return found


def _packed(alarm: Alarm) -> list[Any]:
    return [int(alarm.time), alarm.kind, alarm.severity, list(alarm.causes)]


def _unpacked(row: Sequence[Any]) -> Alarm:
    step, kind, severity, causes = row
    return Alarm(step, kind, severity, tuple(causes))


def fingerprint(folder: Path) -> str:
    return _hash(folder / name for name in ("run.jsonl.gz", "steps.npz", "truth.json"))


def place_of(case: Case, root: Path = JUDGED) -> Path:
    return root / case.kind / case.half / f"{case.name.replace('/', '--')}.json"


def update(folder: Path, place: Path, name: str, code: dict[str, str]) -> list[str]:
    """Judge what is new of one run; returns the detectors that were."""
    made = detectors()
    run = fingerprint(folder)
    old: Record = json.loads(place.read_text()) if place.exists() else {}
    answers: Record = old["detectors"] if old.get("run") == run else {}
    new = [detector for detector in made if answers.get(detector, {}).get("code") != code[detector]]
    if new:
        for detector, levels in judge(folder, new, made, name).items():
            answers[detector] = {"code": code[detector], "levels": levels}
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"run": run, "detectors": answers}, separators=(",", ":")))
        part.replace(place)
    return new


# -- all runs ---------------------------------------------------------------------------------------------------------


def _start_worker(nice: int) -> None:
    os.nice(nice)


def _work(task: tuple[Path, Path, str, dict[str, str]]) -> str:
    begin = time.perf_counter()
    new = update(*task)
    return f"{task[2]}: {len(new)} detectors in {time.perf_counter() - begin:.1f} s" if new else ""


def stored(half: str, runs: Path, only: str = "*") -> list[Case]:
    """Runs of a half that are there, as they are defined now."""
    every = [case for kind in KINDS for case in cases(kind, half=half)]
    return [case for case in every if fnmatch(case.name, only) and is_stored(case, runs)]


def judged_run(case: Case, folder: Path, place: Path, code: dict[str, str]) -> Judged | None:
    """A run with all its answers; None where some are missing or stale, or a healthy run was none."""
    truth = read_truth(folder)
    if not place.exists() or not truth.get("healthy", True):
        return None
    record: Record = json.loads(place.read_text())
    answers = record["detectors"]
    if any(answers.get(name, {}).get("code") != code[name] for name in code) or record["run"] != fingerprint(folder):
        return None
    alarms = {
        (name, float(level)): tuple(map(_unpacked, rows))
        for name, answer in answers.items()
        if name in code
        for level, rows in answer["levels"].items()
    }
    cell = case.cell.name if case.cell is not None else case.name.rpartition("/")[0]
    about = (truth["cause"], truth["severity"], truth["onset"])
    return Judged(case.name, case.kind, cell, truth["steps"], *about, alarms)


def summary(runs: Sequence[Judged]) -> Record:
    """All figures of all detectors at all their levels."""
    known = list(dict.fromkeys(point for run in runs for point in run.alarms))
    rows: list[Record] = []
    for name, level in known:
        baseline = BASELINES.get(name)
        for severity in SEVERITIES if baseline is None else SEVERITIES[:1]:
            default = baseline is None or level == baseline.default
            about = {"detector": name, "level": level, "severity": severity, "default": default}
            rows.append(about | figures(runs, (name, level), severity, RULE if default else None))
    for severity in SEVERITIES:
        _pair_placebo(rows, runs, severity)
    ours = {
        severity: {
            "budget": budget(runs, (OURS, 0.0), severity),
            "families": by_family(runs, (OURS, 0.0), severity),
            "ahead": _ahead(rows, runs, severity),
            "false": [_told(run, alarm) for run in runs if run.kind != "faults" for alarm in _ours(run, severity)],
        }
        for severity in SEVERITIES
    }
    vocabulary = {str(cause) for cause in Cause}
    said = {cause for run in runs for found in run.alarms.values() for alarm in found for cause in alarm.causes}
    return {"points": rows, "ours": ours, "unknown_causes": sorted(said - vocabulary)}


def _ours(run: Judged, severity: str) -> list[Alarm]:
    return at_severity(run.alarms[OURS, 0.0], severity)


def _told(run: Judged, alarm: Alarm) -> list[Any]:
    return [run.kind, run.name, alarm.time, alarm.kind, alarm.severity]


def _pair_placebo(rows: list[Record], runs: Sequence[Judged], severity: str) -> None:
    """Marks the placebo that raises as many alarms as we do, or a few more: the rarest such."""
    wanted = budget(runs, (OURS, 0.0), severity)
    enough = [row for row in rows if row["detector"] == PLACEBO and _count(row, runs) >= wanted]
    if enough:
        max(enough, key=lambda row: row["level"])[f"budget_of_{severity}"] = True


def _count(row: Record, runs: Sequence[Judged]) -> int:
    return budget(runs, (row["detector"], row["level"]), "critical")


def _ahead(rows: Sequence[Record], runs: Sequence[Judged], severity: str) -> Record:
    """Against each rule at its best level with no more false alarms than we raise: what we detect more of."""
    mine = next(row for row in rows if row["detector"] == OURS and row["severity"] == severity)
    if mine["healthy"] is None:
        return {}
    found: Record = {}
    for name in BASELINES:
        level_of = [r for r in rows if r["detector"] == name and r["healthy"]["count"] <= mine["healthy"]["count"]]
        for kind in ("severe", "medium"):
            able = [row for row in level_of if row["detection"][kind] is not None]
            if not able:
                continue
            best = max(able, key=lambda row: (row["detection"][kind]["rate"], row["level"]))
            gain = advantage(runs, (OURS, 0.0), severity, (name, best["level"]), level=kind)
            rate = best["detection"][kind]["rate"]
            found.setdefault(name, {})[kind] = {"level": best["level"], "detection": rate} | gain
    return found


def packed(half: str, runs: Path, judged: Path) -> Record:
    """The summary of a half with how complete it is."""
    code = codes()
    here = stored(half, runs)
    found = [(case, judged_run(case, folder_of(case, runs), place_of(case, judged), code)) for case in here]
    if all(run is None for _, run in found):
        sys.exit(f"nothing is judged of {len(here)} recorded runs: run judge.py without --pack first")
    complete = {}
    for kind in KINDS:
        of_kind = [run for case, run in found if case.kind == kind]
        whole = cases(kind, half=half)
        complete[kind] = {
            "defined": len(whole),
            "recorded": len(of_kind),
            "judged": sum(run is not None for run in of_kind),
            "steps": sum(run.steps for run in of_kind if run is not None),
        }
    left_out = [c.name for c in here if not read_truth(folder_of(c, runs)).get("healthy", True)]
    about = {"schema": SCHEMA, "provenance": provenance(), "half": half, "complete": complete}
    about |= {"not_healthy": left_out, "sources": {n: [b.source, b.missing] for n, b in BASELINES.items()}}
    return _plain(about | summary([run for _, run in found if run is not None]))


def _plain(item: Any) -> Any:
    """JSON: numbers short, NaN null."""
    if isinstance(item, dict):
        return {key: _plain(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_plain(value) for value in item]
    if isinstance(item, float):
        return float(f"{item:.{ROUNDED}g}") if math.isfinite(item) else None
    return item


def written(result: Record) -> str:
    """One point a line, so that a change shows as one."""
    head = {key: value for key, value in result.items() if key != "points"}
    lines = ",\n".join(json.dumps(row) for row in result["points"])
    return f'{{"points": [\n{lines}\n],\n' + json.dumps(head, indent=1)[2:] + "\n"


def result_of(half: str) -> Path:
    return HERE / "results" / ("alarms.json" if half == "test" else f"alarms-{half}.json")


def status(half: str, runs: Path, judged: Path) -> None:
    code = codes()
    for kind in KINDS:
        here = [case for case in stored(half, runs) if case.kind == kind]
        done = sum(judged_run(c, folder_of(c, runs), place_of(c, judged), code) is not None for c in here)
        print(f"{kind:8} {half:5} {done:4} judged of {len(here):4} recorded of {len(cases(kind, half=half)):4}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=HALVES, default="tune")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where record.py stored them")
    parser.add_argument("--judged", type=Path, default=JUDGED, help="where answers are kept")
    parser.add_argument("--only", default="*", help="names that match this pattern")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--status", action="store_true")
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--out", type=Path, help="of --pack, elsewhere than results/")
    args = parser.parse_args()
    if args.half == "test":
        print("THE TEST HALF IS BEING LOOKED AT: what is changed from here on because of it was fitted to it.")
    if args.status:
        status(args.half, args.runs, args.judged)
        return
    if args.pack:
        place = args.out or result_of(args.half)
        place.write_text(written(packed(args.half, args.runs, args.judged)))
        print(f"{place.name}: written")
        return
    code = codes()
    here = stored(args.half, args.runs, args.only)
    tasks = [(folder_of(case, args.runs), place_of(case, args.judged), case.name, code) for case in here]
    with multiprocessing.get_context("spawn").Pool(args.jobs, initializer=_start_worker, initargs=(args.nice,)) as pool:
        for done, line in enumerate(pool.imap_unordered(_work, tasks), start=1):
            if line:
                print(f"[{done}/{len(tasks)}] {line}", flush=True)


if __name__ == "__main__":
    main()

"""Known effects of training dynamics on a small network, measured with dyntune.

    python benchmarks/physics/run.py [EFFECT ...] [--fresh]

Effects: gd_edge, adam_edge, batch_sharpness, momentum_plateau, catapult; all of them without arguments. Each writes
benchmarks/physics/results/EFFECT.json after every run and goes on where it stopped; `--fresh` begins anew. All five
take about fifteen minutes on one core. Then `python benchmarks/physics/figures.py` draws them.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peer_suite.provenance import provenance

from dyntune.stability.thresholds import batch_threshold, threshold
from physics.training import ROWS, LargestEigenvalue, Point, batch_sharpness, digits, network, plateau, train

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = (0, 1, 2)
STUDENT = {2: 12.706, 3: 4.303}  # two-sided 95%, by number of seeds


@dataclass(frozen=True)
class Setting:
    """One way of training; every seed is a run of it.

    Args:
        name: Unique within its effect.
        lr: Learning rate, or its multiple of 1 / lambda_0 where `relative`.
        steps: Steps.
        every: Steps between measurements.
        since: First step of the plateau.
        expected: Range per quantity, set before the runs, in which each seed's mean over the plateau should lie.
        note: What a setting without an expectation is there for.
        optimizer: ``"sgd"`` or ``"adam"``.
        momentum: SGD's.
        size: Rows of a batch.
        inputs: See ``digits``.
        gain: See ``network``.
        relative: See `lr`.
        measured: ``"lambda"`` and ``"batch"``; both are recorded times the learning rate.
    """

    name: str
    lr: float
    steps: int
    every: int
    since: int
    expected: dict[str, tuple[float, float]] = field(default_factory=dict)
    note: str = ""
    optimizer: str = "sgd"
    momentum: float = 0.0
    size: int = ROWS
    inputs: str = "signed"
    gain: float = 1.0
    relative: bool = False
    measured: tuple[str, ...] = ("lambda", "batch")


def _small(name: str, lr: float, size: int = 8, **options: Any) -> Setting:
    return Setting(name, lr, 8000, 100, 4000, size=size, **({"inputs": "standardised"} | options))


def _heavy(size: int, lr: float, steps: int, **options: Any) -> Setting:
    return Setting(
        f"B={size}, lr {lr:g}", lr, steps, steps // 80, steps // 2, momentum=0.9, size=size, inputs="standardised",
        **options,
    )  # fmt: skip


EDGE = {"batch": (1.8, 2.2), "lambda": (0.0, 2.0)}
EFFECTS: dict[str, list[Setting]] = {
    "gd_edge": [Setting("lr 0.4", 0.4, 2400, 20, 1200, {"lambda": (2.0, 2.2)})],
    "adam_edge": [
        Setting("lr 0.001", 1e-3, 2000, 20, 1000, {"lambda": (34, 38)}, optimizer="adam", measured=("lambda",))
    ],
    "batch_sharpness": [
        _small("B=8, lr 4", 4.0, expected=EDGE),
        _small("B=16, lr 4", 4.0, 16, expected=EDGE),
        _small("B=8, lr 4, weights halved", 4.0, expected=EDGE, gain=0.5),
        _small("B=8, lr 3, weights halved", 3.0, expected=EDGE, gain=0.5),  # added once lr 4 was seen to diverge
        _small("B=8, lr 2", 2.0, note="half the rate"),
        _small("B=8, lr 0.4", 0.4, note="a tenth of the rate"),
        _small("B=8, lr 1, pixels in [-1, 1]", 1.0, inputs="signed", note="inputs with a common mean"),
    ],
    "momentum_plateau": [
        _heavy(8, 0.4, 4000, expected={"batch": (0.16, 0.24)}),
        _heavy(16, 0.4, 4000, note="between the limits"),
        _heavy(64, 1.0, 3200, note="between the limits"),
        _heavy(256, 2.0, 2400, note="between the limits"),
        _heavy(1024, 2.0, 2400, expected={"lambda": (3.4, 4.0), "batch": (3.4, 4.0)}),
        _heavy(1024, 0.4, 2400, note="the small batch's rate"),
    ],
    "catapult": [
        Setting(f"lr {c:g} / lambda_0", c, 60, 1, 40, gain=2.0, relative=True, measured=("lambda",), note="")
        for c in (1.0, 3.0, 4.0, 6.0, 8.0, 12.0)
    ],
}


def one_run(setting: Setting, seed: int) -> dict[str, Any]:
    """Train once."""
    data, model = digits(setting.inputs), network(seed, setting.gain)
    lr = setting.lr / (LargestEigenvalue(model, data)() if setting.relative else 1.0)
    optimizer: torch.optim.Optimizer
    if setting.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=setting.momentum)
    adaptive = setting.optimizer == "adam"
    largest = LargestEigenvalue(model, data, optimizer if adaptive else None)

    def measure(step: int) -> Point:
        point = {}
        if not (adaptive and step == 0):  # no P before the first step
            point["lambda"] = lr * largest()
        if "batch" in setting.measured:
            found = batch_sharpness(model, data, setting.size, seed=step)
            point |= {"batch" if name == "value" else f"batch_{name}": lr * value for name, value in found.items()}
        return point

    series = train(
        model, optimizer, data, measure, steps=setting.steps, every=setting.every, size=setting.size, seed=seed,
        at=(1, 2, 5, 10) if adaptive else (),
    )  # fmt: skip
    return {
        "setting": setting.name,
        "seed": seed,
        "lr": lr,
        "thresholds": {"lambda": float(threshold(optimizer)), "batch": float(batch_threshold(optimizer))},
        "diverged": "lambda" not in series[-1],
        "plateau": {key: plateau(series, key, setting.since) for key in setting.measured},
        "series": {key: [_short(p[key]) if key in p else None for p in series] for key in _keys(series)},
    }


def _keys(series: list[Point]) -> list[str]:
    return list(dict.fromkeys(key for point in series for key in point))


def _short(value: float) -> float | int | None:
    """Five digits are more than the measurements have; None for what JSON lacks."""
    if not np.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.5g}")


def summary(setting: Setting, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per quantity: plateau over the seeds, and whether it is where theory puts it."""
    rows = []
    for key in setting.measured:
        found = [run["plateau"][key] for run in runs if run["plateau"][key] is not None]
        row: dict[str, Any] = {"setting": setting.name, "quantity": key, "note": setting.note}
        row |= {"theory": runs[0]["thresholds"][key], "seeds": len(runs), "diverged": len(runs) - len(found)}
        row["expected"] = setting.expected.get(key)
        if found:
            means = np.array([item["mean"] for item in found])
            half = STUDENT[len(found)] * means.std(ddof=1) / np.sqrt(len(found)) if len(found) > 1 else float("inf")
            row |= {
                "mean": float(means.mean()),
                "seed_means": [float(m) for m in means],
                "low": _short(means.mean() - half),
                "high": _short(means.mean() + half),
                "median": float(np.mean([item["median"] for item in found])),
                "q10": float(np.mean([item["q10"] for item in found])),
                "q90": float(np.mean([item["q90"] for item in found])),
            }
        row["verdict"] = _verdict(row)
        rows.append(row)
    return rows


def _verdict(row: dict[str, Any]) -> str | None:
    """None where nothing was expected."""
    if row["expected"] is None:
        return None
    low, high = row["expected"]
    inside = sum(low <= mean <= high for mean in row.get("seed_means", []))
    if inside == row["seeds"]:
        return "reproduced"
    return f"{inside} of {row['seeds']} seeds" if inside else "not reproduced"


def reproduce(effect: str, *, fresh: bool) -> None:
    """Do what is not yet in the effect's file."""
    path = RESULTS / f"{effect}.json"
    runs = [] if fresh or not path.exists() else json.loads(path.read_text())["runs"]
    done = {(run["setting"], run["seed"]) for run in runs}
    wanted = [(setting, seed) for setting in EFFECTS[effect] for seed in SEEDS]
    missing = [(setting, seed) for setting, seed in wanted if (setting.name, seed) not in done]
    origin = provenance() | {"command": f"python benchmarks/physics/run.py {effect}"}
    origin.pop("clock")
    for count, (setting, seed) in enumerate(missing, start=1):
        runs.append(one_run(setting, seed))
        print(effect, setting.name, seed, runs[-1]["plateau"], flush=True)
        by_setting = [(s, [run for run in runs if run["setting"] == s.name]) for s in EFFECTS[effect]]
        result = {
            "schema": 1,
            "effect": effect,
            "complete": count == len(missing),
            "summary": [row for s, own in by_setting if own for row in summary(s, own)],
            "settings": [asdict(s) for s, own in by_setting if own],
            "provenance": origin,
            "runs": runs,
        }
        path.write_text(_json(result), encoding="utf-8")


def _json(result: dict[str, Any]) -> str:
    """Indented, but each list of numbers on one line."""
    runs = [run | {"series": f"@{i}@"} for i, run in enumerate(result["runs"])]
    text = json.dumps(result | {"runs": runs}, indent=1)
    for i, run in enumerate(result["runs"]):
        lines = ",\n".join(f'    "{key}": {json.dumps(values)}' for key, values in run["series"].items())
        text = text.replace(f'"@{i}@"', f"{{\n{lines}\n   }}")
    return f"{text}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("effects", nargs="*", metavar="EFFECT", default=list(EFFECTS), help=", ".join(EFFECTS))
    parser.add_argument("--fresh", action="store_true", help="discard earlier results")
    options = parser.parse_args()
    unknown = set(options.effects) - set(EFFECTS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(EFFECTS)}")
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    for effect in options.effects:
        reproduce(effect, fresh=options.fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())

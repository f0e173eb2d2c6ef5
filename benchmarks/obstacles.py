"""The obstacle matrix through dyntune and its peers: right, silently wrong, or an error.

    python benchmarks/obstacles.py

in the environment that requirements-peers.txt describes (`make bench` runs it, too). The rows are those of
tests/obstacles: each is built anew for each tool, and asked for two products with one unit vector.

right       within the larger of 1 % and the row's tolerance of float64 double backward on a copy of the model
wrong       further off, or not a number, or (where the loss draws random numbers) another product the second time,
            and neither an exception nor a warning
warned      the same with a warning
error       an exception of any kind
refused     the typed error that names the fix, where the row asks for one (dyntune's); an interrupt that passes through

What moved of the user's state is recorded beside it. Exit status 1 if dyntune is wrong, or fails where it should not.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import contextlib
import json
import re
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the rows are in tests/

from peer_suite.products_by_name import TOOLS, Named  # noqa: E402
from peer_suite.provenance import provenance  # noqa: E402

from tests.obstacles.measure import moved, state  # noqa: E402
from tests.obstacles.problem import Problem, Row  # noqa: E402
from tests.obstacles.rows import ROWS  # noqa: E402
from tests.obstacles.truth import Truth, probe_vector, relative_error  # noqa: E402

RESULT = Path(__file__).resolve().parent / "results" / "obstacles.json"
SCHEMA = 1
PERMITTED = 1e-2
"""What is right is within 1 %, or the row's tolerance where that is more: tools are not compared by their rounding."""

# Says nothing about the numbers: PyHessian gives it on every call; packages that speak of their own deprecated names.
ROUTINE = re.compile(r"create_graph=True|deprecated|torch\.jit")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Warnings that are not routine, and nothing printed."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("always")
        yield found
    found.extend(str(w.message).splitlines()[0] for w in caught if not ROUTINE.search(str(w.message)))


def _kinds(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What moved, in a word each."""
    kinds = set()
    for name in moved(before, after):
        if not name.startswith("module "):
            kinds.add("optimizer or generator" if name.startswith("held") else name)
            continue
        old, new = before[name], after[name]
        for key in old:
            if old[key] == new[key]:
                continue
            if key == "parameters":
                kinds.update(_parameter_kinds(old[key], new[key]))
            else:
                kinds.add({"training": "mode"}.get(key, key))
    kinds -= {"attributes"} if kinds & {"mode"} else set()  # the mode is an attribute, too
    return sorted(kinds)


def _parameter_kinds(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    kinds = set()
    for name in old:
        (value, _, gradient), (value_now, _, gradient_now) = old[name], new[name]
        if gradient != gradient_now:
            kinds.add("gradients")
        if value != value_now:
            kinds.add("parameters" if value[-1] != value_now[-1] else "parameters written to")
    return kinds


def _unit(problem: Problem) -> dict[str, torch.Tensor]:
    """The vector of the tests, at unit length: steps of finite differences are meant for that."""
    vector = probe_vector(problem.model)
    length = sum(float(t.square().sum()) for t in vector.values()) ** 0.5
    return {n: t / length for n, t in vector.items()}


def _judge(row: Row, truth: Named | None, one: Named, two: Named) -> tuple[str, str]:
    """Verdict and its reason."""
    if not all(bool(torch.isfinite(t).all()) for t in one.values()):
        return "wrong", "not a number"
    size = sum(float(t.double().square().sum()) for t in one.values())
    if size > 0 and relative_error(two, {n: t.double() for n, t in one.items()}) > PERMITTED:
        return "wrong", "another product the second time"
    if truth is None:
        return "right", "the same product twice"
    error = relative_error(one, truth)
    verdict = "right" if error <= max(PERMITTED, row.tolerance) else "wrong"
    return verdict, f"{error:.1e}" if error < PERMITTED else f"{100 * error:.3g} % off"


def run(row: Row, tool: str) -> dict[str, Any]:
    """One row through one tool."""
    problem = row.build()
    vector = _unit(problem)
    truth = None
    if row.answer and not (row.random and tool != "dyntune"):
        truth = Truth(problem).product(vector)
    elif row.random:
        truth = _other_mode(problem, vector)
    before = state(problem)
    result: dict[str, Any]
    with _quiet() as warned:
        try:
            with problem.caller():
                product = TOOLS[tool](problem)
                one, two = ({n: t.detach().clone() for n, t in product(vector).items()} for _ in range(2))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and row.error is not KeyboardInterrupt:
                raise
            text = (str(error).strip() or "no message").splitlines()[0][:200]
            result = {"verdict": "error", "error": type(error).__name__, "detail": text}
            asked = row.error is not None and isinstance(error, row.error) and re.search(row.fix, str(error))
            if asked and (tool == "dyntune" or row.error is KeyboardInterrupt):
                result["verdict"] = "refused"
        else:
            if row.random and tool != "dyntune":
                verdict, detail = _judge_random(row, truth, one, two)
            else:
                verdict, detail = _judge(row, truth, one, two)
            result = {"verdict": verdict, "error": None, "detail": detail}
    if warned and result["verdict"] == "wrong":
        result |= {"verdict": "warned", "detail": f"{result['detail']}; {warned[0][:200]}"}
    return result | {"moved": _kinds(before, state(problem))}


def _other_mode(problem: Problem, vector: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The truth in evaluation mode, where that is another one: a tool may have switched the model."""
    flags = {m: m.training for m in problem.model.modules()}
    try:
        problem.model.eval()
        return Truth(problem).product(vector)
    finally:
        for module, flag in flags.items():
            module.training = flag


def _judge_random(row: Row, evaluation: Named | None, one: Named, two: Named) -> tuple[str, str]:
    """Any draw is right, as long as it is one: there is no telling which a tool takes."""
    verdict, detail = _judge(row, None, one, two)
    held = any(word in row.name for word in ("dropout", "Dropout"))
    if verdict == "right" and held and evaluation is not None and relative_error(one, evaluation) <= PERMITTED:
        return "wrong", "that of evaluation mode, without dropout"
    return verdict, detail


def main() -> int:
    """Run, count, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="", help="a pattern: only rows whose names it matches; nothing is saved")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = provenance()
    source["versions"] |= {name: metadata.version(name) for name in ("transformers", "peft")}
    found = []
    for row in ROWS.values():
        if not re.search(arguments.rows, row.name):
            continue
        results = {tool: run(row, tool) for tool in TOOLS}
        _say(f"{row.name}: " + ", ".join(f"{tool} {r['verdict']} ({r['detail'][:60]})" for tool, r in results.items()))
        found.append(
            {
                "name": row.name,
                "group": row.group,
                "method": row.engine if row.error is None else row.error.__name__,
                "note": row.note,
                "tolerance": row.tolerance,
                "reason": row.reason,
                "results": results,
            }
        )
    if not arguments.rows:
        document = {"schema": SCHEMA, "provenance": source, "permitted": PERMITTED, "rows": found}
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
        _say(f"saved {arguments.output.name}")
    ours = {r["name"]: r["results"]["dyntune"] for r in found}
    bad = [name for name, r in ours.items() if r["verdict"] not in ("right", "refused") or r["moved"]]
    if bad:
        _say(f"NOT MET: {', '.join(bad)}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

"""What watching a training costs beside its peers: W&B, TensorBoard, neuraldbg, gradtracer, Cockpit, and by hand.

    make bench-monitor

or `python benchmarks/monitor_peers.py` in the environment that requirements-peers.txt and
requirements-monitor-peers.txt describe. The same three models as in `monitor_overhead.py`, each tool attached as its
documentation does it and with its defaults (peer_suite/watchers.py says where that is written).

Every tool and model has a process of its own, in which two copies of one training take turns, a block of steps each,
one of them watched. The bare copy is charged with the CPU seconds of its thread; the watched one with everything else:
its steps, other threads, and processes that the tool started (W&B writes in one), by psutil. The ratio of sums less 1
comes with a bootstrap over blocks. Tools that measure once in 100 or 1,000 steps do so in every second block here, and
the ratio for the period that they have is put together from quiet steps and the event, both measured. What is spent
once, until everything was measured for the first time, is given in seconds, imports left out.

A tool that raises, records nothing or does not end in time is a failure, with its message. Results are saved after each
pair of tool and model; those of the same code and as many pairs are not measured again.

Takes about twelve minutes on one core. Exit status 0, whatever it finds; 1 if not even the bare loop ran.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peer_suite.paired import MODELS, Training, paired, periodic, summary
from peer_suite.provenance import provenance
from peer_suite.watchers import WATCHERS, Watched, Watcher, children_seconds

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "monitor_peers.json"
SCHEMA = 1
PAIRS = 30
# No watched block is meant to take longer, or nothing would fit between two of a slow tool;
BLOCK_SECONDS = 1.0
# no pair is begun after so long (on the clock), and four are measured in any case;
PAIRED_SECONDS = 30.0
# and nothing at all takes longer than this.
TIMEOUT = 240.0
MOST_MESSAGE = 200  # characters
MOST_WARM = 100  # blocks before the first pair


def one(name: str, model: str, pairs: int) -> dict[str, Any]:
    """One tool on one model, in this process."""
    torch.set_num_threads(1)
    watcher = WATCHERS[name]
    make, block, _ = MODELS[model]
    with tempfile.TemporaryDirectory() as folder:
        importlib.import_module(watcher.module)
        Training(make).steps(block)  # what torch does once is nobody's
        began = time.process_time()
        bare = Training(make)
        made = time.process_time() - began
        children = children_seconds()
        began = time.process_time()
        watched = watcher.make(make, Path(folder), 2 * block)
        try:
            size, alone = _settle(watcher, bare, watched, block)
            first = time.process_time() - began - made - 2 * alone  # once as bare steps, once as those of the watched
            first += children_seconds() - children
            gc.collect()
            times = paired(
                bare.steps,
                watched.steps,
                block=size,
                pairs=pairs,
                bare_block=max(size, block // 10),
                children=children_seconds,
                seconds=PAIRED_SECONDS,
            )
            if not (kept := watched.kept):
                raise RuntimeError("it recorded nothing")
        finally:
            watched.close()
    cost = periodic(times, watcher.periods) if watcher.periods else {"at": {"1": summary(times)}}
    return {
        "parameters": sum(p.numel() for p in bare.model.parameters()),
        "version": metadata.version(watcher.package),
        "block": size,
        "pairs": len(times.bare),
        "step_seconds": times.step_seconds,
        "first_seconds": first,
        "kept": kept,
        **cost,
    }


def _settle(watcher: Watcher, bare: Training, watched: Watched, block: int) -> tuple[int, float]:
    """Everything that is done once; the steps of a block, and the CPU seconds of as many bare steps as were made."""
    if watcher.periods:  # an event every two blocks then falls into the middle of one, and of the first pair's
        watched.steps(block + block // 2)
        return block, bare.steps(block + block // 2)
    watched.steps(1)
    size = max(1, min(block, int(BLOCK_SECONDS / watched.steps(1))))
    watched.steps(size)
    count = 2 + size
    while not watched.ready and count < MOST_WARM * size:
        watched.steps(size)
        count += size
    return size, bare.steps(count)


def measured(name: str, model: str, pairs: int) -> dict[str, Any]:
    """The same in a process of its own, in a folder of its own; a failure is a result."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", name, model, "--pairs", str(pairs)]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that what the tool has started ends with it
        )
        try:
            output, errors = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return {"failure": f"did not end within {TIMEOUT:.0f} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return read(output, errors, process.returncode)


def read(output: str, errors: str, status: int) -> dict[str, Any]:
    """The last line of JSON that a process has written, or how it failed."""
    for line in reversed(output.splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            found = json.loads(line)
            if isinstance(found, dict):
                return found
    last = errors.strip().splitlines()[-1:] or ["no message"]
    return {"failure": f"ended with status {status}: {last[0][:MOST_MESSAGE]}"}


def digest() -> str:
    """Of everything of ours that a result depends on."""
    root = HERE.parent
    files = [
        *sorted((root / "dyntune").rglob("*.py")),
        Path(__file__).resolve(),
        *(HERE / "peer_suite" / f"{name}.py" for name in ("paired", "watchers")),
        HERE / "requirements-peers.txt",
        HERE / "requirements-monitor-peers.txt",
    ]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


def finished(path: Path, stamp: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Results by tool and model that have this stamp; failures by time-out or crash are tried again."""
    if not path.exists():
        return {}
    runs = json.loads(path.read_text()).get("runs", {})
    return {
        name: kept
        for name, models in runs.items()
        if (kept := {model: found for model, found in models.items() if found.get("stamp") == stamp})
    }


def described() -> dict[str, Any]:
    """The rows in words."""
    return {name: {"records": w.records, "source": w.source, "periods": w.periods} for name, w in WATCHERS.items()}


def reason(error: BaseException) -> str:
    """The first error in the chain, which is why; a tool that stumbles over it on its way out says less."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:MOST_MESSAGE]}"


def _child(name: str, model: str, pairs: int) -> int:
    """JSON on the last line of stdout, whatever happens."""
    warnings.simplefilter("ignore")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = one(name, model, pairs)
    except Exception as error:
        found = {"failure": reason(error)}
    print(json.dumps(found), flush=True)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _told(found: dict[str, Any]) -> str:
    if "failure" in found:
        return found["failure"]
    parts = []
    for period, cost in found["at"].items():
        low, high = (100 * end for end in cost["interval"])
        parts.append(f"every {period}: {100 * cost['overhead']:.2f}% ({low:.2f} .. {high:.2f})")
    return f"{'; '.join(parts)}; once {found['first_seconds']:.2f} s; {found['pairs']} pairs of {found['block']}"


def main() -> int:
    """Measure, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of blocks, an even number")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--watchers", nargs="+", choices=list(WATCHERS), default=list(WATCHERS))
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--one", nargs=2, metavar=("WATCHER", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.pairs < 2 or arguments.pairs % 2:
        parser.error(f"--pairs {arguments.pairs}: events fall into every second pair, so give an even number.")
    if arguments.one:
        return _child(*arguments.one, arguments.pairs)
    torch.set_num_threads(1)
    stamp = {"digest": digest(), "pairs": arguments.pairs}
    result: dict[str, Any] = {"schema": SCHEMA, "provenance": provenance(), "watchers": described()}
    known = finished(arguments.output, stamp)
    runs: dict[str, dict[str, Any]] = {name: dict(known.get(name, {})) for name in WATCHERS}
    for model in arguments.models:
        for name in arguments.watchers:
            if model not in runs[name]:
                runs[name][model] = {**measured(name, model, arguments.pairs), "stamp": stamp}
                result["runs"] = {name: models for name, models in runs.items() if models}
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")
            _say(f"{model}, {name}: {_told(runs[name][model])}")
    placebo = runs[next(iter(WATCHERS))]
    return int(bool(placebo) and all("failure" in found for found in placebo.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Nothing survives a measurement: no model, batch, tensor or hook, and no memory."""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import nn

import dyntune
from tests.neutrality.faults import ERRORS, SITES, Fuse, spread
from tests.neutrality.measurements import MEASUREMENTS, Subject
from tests.neutrality.workloads import WORKLOADS
from tests.objective.zoo import made, rows

# Resident memory may grow by one page per measurement. The smallest thing of ours that one could leave behind, the
# gradient of one bias of `wide`, has two. Measured over 1,000 measurements, torch 2.13: 280 bytes each on `wide`; 54
# and less than one, twice in a row, for all measuring functions in turn on a small CNN.
FLAT = 4096


def living() -> tuple[int, int]:
    """Tensors and modules that Python knows of."""
    gc.collect()
    objects = gc.get_objects()
    return sum(issubclass(type(o), torch.Tensor) for o in objects), sum(issubclass(type(o), nn.Module) for o in objects)


def hooks(model: nn.Module) -> int:
    names = [n for n in vars(model) if n.endswith("_hooks")]
    return sum(len(getattr(m, n)) for m in model.modules() for n in names)


def test_everything_dies_with_its_last_user():
    """Even while the results are kept."""
    results, watched = [], {}
    for name, measure in MEASUREMENTS.items():
        subject = WORKLOADS["mlp"]().subject
        stepped(subject)
        results.append(measure(subject))
        inputs = enumerate(t for batch in subject.batches for t in batch)
        watched |= {f"{name}: input {i}": weakref.ref(t) for i, t in inputs}
        watched |= {f"{name}: {n}": weakref.ref(p) for n, p in subject.model.named_parameters()}
        watched |= {f"{name}: model": weakref.ref(subject.model), f"{name}: optimizer": weakref.ref(subject.optimizer)}
    del inputs, subject
    gc.collect()
    assert [n for n, ref in watched.items() if ref() is not None] == []
    assert None not in results


def stepped(subject: Subject) -> None:
    x, y = subject.batches[0]
    nn.functional.cross_entropy(subject.model(x), y).backward()
    subject.optimizer.step()


def test_an_operator_holds_its_model_and_nothing_holds_the_operator():
    subject = WORKLOADS["mlp"]().subject
    operator = dyntune.hessian(*subject.common, **subject.loss)
    dyntune.eigenvalues(operator, max_products=3)
    refs = [weakref.ref(operator), weakref.ref(operator.objective), weakref.ref(subject.model)]
    del subject
    gc.collect()
    assert refs[2]() is not None
    del operator
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def test_no_tensor_module_or_hook_is_left():
    training = WORKLOADS["cnn"]()
    stepped(training.subject)
    for measure in MEASUREMENTS.values():  # what is cached at the first call
        measure(training.subject)
    before, held = living(), hooks(training.model)
    for measure in MEASUREMENTS.values():
        measure(training.subject)
    assert living() == before
    assert hooks(training.model) == held


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_nothing_is_left_of_an_interrupted_one_either(site):
    training = WORKLOADS["cnn"]()
    stepped(training.subject)

    def interrupted(fuse: Fuse) -> None:
        try:
            with SITES[site](fuse):
                MEASUREMENTS["hessian_eigenvalues"](training.subject)
        except (RuntimeError, KeyboardInterrupt, dyntune.errors.DyntuneError):
            pass

    sound = Fuse()
    interrupted(sound)
    before, held = living(), hooks(training.model)
    for at, kind in zip(spread(sound.calls, 12), itertools.cycle(ERRORS)):
        interrupted(Fuse(at, ERRORS[kind]))
    assert living() == before
    assert hooks(training.model) == held


def test_a_compiled_model_is_compiled_once():
    training = WORKLOADS["compiled"]()
    for _ in training.steps(2):
        pass
    torch._dynamo.utils.counters.clear()
    for measure in MEASUREMENTS.values():
        measure(training.subject)
    for _ in training.steps(2):
        pass
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"].get("unique_graphs", 0) == 0, "measuring made the compiler start again"


def wide() -> Subject:
    """A vector shaped like the parameters has 2.6 MB."""
    model = made(lambda: nn.Sequential(nn.Linear(256, 2048), nn.Tanh(), nn.Linear(2048, 64)))
    batches = [(rows(2, 256, seed=s), torch.tensor([s, 1])) for s in range(2)]
    subject = Subject(
        model, batches, torch.optim.Adam(model.parameters(), lr=1e-3), {"criterion": nn.CrossEntropyLoss()}
    )
    stepped(subject)
    return subject


def resident() -> int:
    """Bytes of this process that are in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(subject: Subject, measure: Callable[[Subject], Any], count: int) -> float:
    """Bytes per measurement: the least-squares slope of resident memory over `count` measurements after a tenth."""
    for _ in range(count // 10):
        measure(subject)
    gc.collect()
    sizes = []
    for _ in range(count):
        measure(subject)
        sizes.append(resident())
    return float(np.polyfit(range(count), sizes, 1)[0])


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")


@pytest.mark.slow
@needs_proc
def test_resident_memory_is_flat():
    """Over 1,000 probes of a model of which one vector left behind each time would add 2.6 GB."""
    slope = growth(wide(), lambda s: dyntune.hessian_eigenvalues(*s.common, **s.loss, max_products=2), 1000)
    assert abs(slope) < FLAT


@pytest.mark.slow
@needs_proc
def test_resident_memory_is_flat_over_all_measurements():
    subject, turns = WORKLOADS["cnn"]().subject, itertools.cycle(MEASUREMENTS.values())
    stepped(subject)
    assert abs(growth(subject, lambda s: next(turns)(s), 1000)) < FLAT


@needs_proc
def test_the_slope_sees_what_is_kept():
    """The bound can be missed: 256 kB kept each time, mapped anew so that no idle heap of other tests can serve it."""
    kept: list[torch.Tensor] = []

    def leak(_: Subject) -> None:
        kept.append(torch.frombuffer(mmap.mmap(-1, 1 << 18), dtype=torch.float32).fill_(1))

    assert growth(wide(), leak, 200) > FLAT

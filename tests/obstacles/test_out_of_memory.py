"""Where memory runs out: the next lighter engine with its reason, else a typed error; the failed attempt is let go."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dyntune
from dyntune.errors import InsufficientMemoryError
from dyntune.objective.memory import is_out_of_memory
from tests.objective.snapshot import changes, snapshot
from tests.objective.zoo import made, rows
from tests.obstacles.models import StopAt

BATCHES = [(rows(6, 4, seed=s), torch.arange(6) % 3) for s in range(3)]
CRITERION = {"criterion": nn.CrossEntropyLoss()}
ERRORS = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "allocator": RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
}


class Budget:
    """Fails in the passes of the engines named in `refused`: told apart by what each of them does."""

    def __init__(self, error: BaseException, refused: tuple[str, ...]) -> None:
        self.error, self.refused, self.armed = error, refused, False

    def __call__(self, stop: StopAt, backward: bool) -> BaseException | None:
        if not self.armed:
            return None
        making_a_graph = backward and torch.is_grad_enabled()
        engine = "exact, with graphs" if making_a_graph else "others" if backward else ""
        return copy.copy(self.error) if engine in self.refused else None


def subject(error: BaseException, *refused: str, **options: str) -> tuple[nn.Module, dyntune.hessian, Budget]:
    budget = Budget(error, refused)
    model = made(lambda: nn.Sequential(nn.Linear(4, 5), StopAt(budget), nn.Tanh(), nn.Linear(5, 3)))
    operator = dyntune.hessian(model, BATCHES, **CRITERION, **options)
    budget.armed = True
    return model, operator, budget


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_each_kind_of_exception_leads_to_the_lighter_engine(error):
    model, operator, budget = subject(error, "exact, with graphs")
    before = snapshot(model)
    found = operator @ torch.ones(operator.numel)
    assert changes(before, snapshot(model)) == []
    assert operator.engine == "forward-over-reverse"
    assert operator.reason.startswith(f"out of memory with re-forward: {type(error).__name__}")
    budget.armed = False
    truth = dyntune.hessian(model, BATCHES, **CRITERION) @ torch.ones(operator.numel)
    # Other orders of the same sums.
    assert torch.linalg.norm(found - truth) < 100 * torch.finfo(torch.float32).eps * torch.linalg.norm(truth)


@pytest.mark.parametrize("method", ["auto", "exact", "finite-difference"])
def test_with_nothing_lighter_left_the_error_is_typed(method):
    model, operator, _ = subject(ERRORS["torch"], "exact, with graphs", "others", method=method)
    before = snapshot(model)
    with pytest.raises(InsufficientMemoryError, match=r"Tried to allocate 2\.00 GiB.*Give batches of fewer rows"):
        operator @ torch.ones(operator.numel)
    assert operator.engine == ("forward-over-reverse" if method == "exact" else "finite-difference")
    assert changes(before, snapshot(model)) == []


def test_in_the_first_forward_pass():
    model = made(
        lambda: nn.Sequential(nn.Linear(4, 5), StopAt(lambda stop, backward: ERRORS["torch"]), nn.Linear(5, 3))
    )
    before = snapshot(model)
    with pytest.raises(InsufficientMemoryError, match="in the first forward pass"):
        dyntune.hessian(model, BATCHES, **CRITERION)
    assert changes(before, snapshot(model)) == []


def test_the_graph_of_the_failed_attempt_is_gone_before_the_next_one_is_made():
    seen = []

    def condition(stop: StopAt, backward: bool) -> BaseException | None:
        seen.append(stop.live)
        return torch.OutOfMemoryError("simulated") if stop.live > 1 else None

    model = made(lambda: nn.Sequential(nn.Linear(4, 5), StopAt(condition), nn.Tanh(), nn.Linear(5, 3)))
    operator = dyntune.hessian(model, BATCHES, **CRITERION)
    operator @ torch.ones(operator.numel)
    assert operator.engine == "re-forward"
    assert seen.count(2) == 1  # the attempt to keep all graphs; every other pass found at most its own


class Stack(nn.Module):
    """Encoder layers, each checkpointed if so asked."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        kind = functools.partial(nn.TransformerEncoderLayer, 8, 2, 16, dropout=0.0, batch_first=True)
        self.layers, self.out, self.checkpointed = (
            nn.ModuleList(kind() for _ in range(3)),
            nn.Linear(8, 3),
            checkpointed,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return self.out(x.mean(1))


def graph_bytes(length: int, *, checkpointed: bool) -> int:
    model = made(lambda: Stack(checkpointed))
    batch = (rows(4, length, 8), torch.arange(4) % 3)
    return dyntune.hessian(model, batch, **CRITERION).objective.forward_bytes


def test_a_checkpointed_model_is_not_taken_for_a_light_one():
    """What its blocks compute again is in the gradient's graph, up to twice."""
    plain, hidden = (graph_bytes(32, checkpointed=c) for c in (False, True))
    assert plain < hidden < 3 * plain


def test_attention_is_counted_as_it_is_measured():
    """The math kernel keeps the matrix of attention, which grows with the square of the length."""
    short, long = (graph_bytes(length, checkpointed=False) for length in (64, 256))
    assert long > 2 * 4 * short


def test_other_errors_are_not_taken_for_it():
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(InsufficientMemoryError("said already"))

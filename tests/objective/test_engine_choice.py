"""Which engine is used, and that the record says why."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import dyntune
from dyntune.errors import InvalidArgumentError
from tests.objective.oracle import relative_error
from tests.objective.zoo import ZOO, mlp, rows

BATCHES = [(rows(8, 4, seed=s), torch.arange(8) % 3) for s in range(4)]


def operator(**options):
    return dyntune.hessian(mlp(), BATCHES, criterion=nn.CrossEntropyLoss(), **options)


def one_graph() -> int:
    """Bytes that the rule allots to one batch's graph."""
    free = operator()
    return 3 * free.objective.forward_bytes


@pytest.mark.parametrize(
    ("graphs", "engine"),
    [(4, "retained-graph"), (3.9, "re-forward"), (1, "re-forward"), (0.9, "forward-over-reverse")],
)
def test_the_memory_limit_decides(graphs, engine):
    limit = int(graphs * one_graph()) + (graphs in (1, 4))
    found = operator(memory_limit=limit)
    assert found.engine == engine
    assert re.search(r"4 graph\(s\) of about \d+ MiB, \d+ MiB allowed", found.reason)
    assert found.method == f"exact, {engine}"
    assert found.reason in repr(found)


def test_all_choices_give_the_same_product():
    free = operator()
    vector = torch.ones(free.numel)
    truth = (free @ vector).double()
    for limit in (0, one_graph() + 1):
        # Other orders of the same sums.
        assert relative_error(operator(memory_limit=limit) @ vector, truth) < 10 * torch.finfo(torch.float32).eps


def test_by_default_a_small_model_keeps_its_graph():
    assert operator().engine == "retained-graph"


def test_finite_differences_when_asked_for():
    found = operator(method="finite-difference")
    assert (found.engine, found.reason) == ("finite-difference", "asked for")


def test_the_graphs_size_is_that_of_the_largest_batch():
    small, large = (rows(2, 4), torch.arange(2)), (rows(200, 4), torch.arange(200) % 3)
    sizes = [
        dyntune.hessian(mlp(), b, criterion=nn.CrossEntropyLoss()).objective.forward_bytes
        for b in ([small, large], [large], [small])
    ]
    assert sizes[0] == sizes[1] > 10 * sizes[2]


def test_parameters_do_not_count_towards_the_graph():
    wide = nn.Linear(4, 3000)
    found = dyntune.hessian(wide, rows(1, 4), lambda m, x: m(x).sum(1).square().mean())
    assert found.objective.forward_bytes < wide.weight.numel() * 4 / 2


def test_an_unknown_method_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"method='exakt'; choose one of auto, exact, finite-difference"):
        operator(method="exakt")


def test_the_result_of_a_measurement_records_the_method():
    case = ZOO["mlp"]()
    found = dyntune.hessian_eigenvalues(case.model, case.batch, criterion=case.criterion, memory_limit=0)
    assert found.method == "exact, forward-over-reverse"
    record = dyntune.sharpness(case.model, case.batch, criterion=case.criterion).record
    assert record["products"] == "exact, retained-graph"
    assert "graph(s)" in record["reason"]

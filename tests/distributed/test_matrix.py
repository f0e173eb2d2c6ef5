"""Every layout gives what one process gives on all rows together, at the same number of products."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dyntune
from tests.distributed.problem import LAYOUTS, laid_out, model, shards

CRITERION = nn.CrossEntropyLoss()
PRODUCTS = 8
# Exact products in float32 differ by the order of summation, 1e-7 each; finite differences by 1e-5 (see hvp.py).
TOLERANCE = {"exact": 1e-6, "finite-difference": 1e-4}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def relative(found: Any, truth: Any) -> float:
    difference = sum(float((whole(a).double() - b.double()).square().sum()) for a, b in zip(found, truth, strict=True))
    return (difference / sum(float(b.double().square().sum()) for b in truth)) ** 0.5


def compared(
    name: str,
    layout: str,
    equal: bool,
    method: str,
    batches: int,
    params: str | None = None,
    bf16: bool = False,
    reduction: str = "mean",
) -> dict[str, Any]:
    """Runs on every process: the same measurement over the job, and alone on all rows."""
    rank, size = dist.get_rank(), dist.get_world_size()
    parts = shards(name, size, equal=equal, batches=batches)
    everything: Any = [batch for part in parts for batch in part]
    mine: Any = everything if layout == "TP" else parts[rank]
    dtype = torch.bfloat16 if bf16 else torch.float32
    net = laid_out(name, layout, dtype)
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    options: dict[str, Any] = {"criterion": criterion, "params": params, "num_batches": "all"}
    group = {"process_group": dist.group.WORLD} if layout == "plain" else {}
    job = dyntune.hessian(net, mine, method=method, **options, **group)
    alone = dyntune.hessian(model(name).to(dtype), everything, **options)
    found, truth = (dyntune.eigenvalues(h, rtol=1e-12, max_products=PRODUCTS) for h in (job, alone))
    gradient, expected = job.objective.gradient(), alone.objective.gradient()
    return {
        "products": (found.num_products, truth.num_products),
        "values": found.values.tolist(),
        "gap": abs(float(found) / float(truth) - 1),
        "start": relative(job.space.present(job.space.normal(3)), alone.space.normal(3)),
        "vector": relative(found.vectors[0], truth.vectors[0]),
        "gradient": relative(job.space.present(gradient), expected),
        "loss": abs(job.objective.loss() / alone.objective.loss() - 1),
        "method": found.method,
        "rows": (job.objective.num_rows, alone.objective.num_rows),
        "numel": (job.numel, alone.numel),
        "collectives": job.objective.layout.team.num_collectives,
    }


def check(results: list[dict[str, Any]], method: str, size: int) -> None:
    for result in results:
        assert result["products"] == (PRODUCTS, PRODUCTS)
        assert result["gap"] < TOLERANCE[method]
        # An eigenvector turns by the product's error over the gap to the next eigenvalue, at least a twentieth here.
        assert result["vector"] < 20 * TOLERANCE[method]
        assert result["start"] == 0.0
        assert result["gradient"] < 1e-6
        assert result["loss"] < 1e-6
        assert f"on {size} processes" in result["method"]
        assert result["method"].startswith(method)
        assert result["values"] == results[0]["values"]  # the same bits on every process
        assert result["rows"][0] == result["rows"][1]
        assert result["numel"][0] == result["numel"][1]


# One of each kind in `make test`; all of them in `make test-full`.
QUICK = {
    (2, "plain", "unequal", "exact"),
    (2, "DDP", "equal", "exact"),
    (2, "FSDP2", "unequal", "exact"),
    (2, "FSDP2 left whole", "unequal", "finite-difference"),
    (2, "TP", "equal", "exact"),
}
MATRIX = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id=", ".join(map(str, case)))
    for case in itertools.product((1, 2, 4), LAYOUTS, ("equal", "unequal"), ("exact", "finite-difference"))
]


@pytest.mark.parametrize(("size", "layout", "parts", "method"), MATRIX)
def test_the_same_as_one_process(jobs, size, layout, parts, method):
    equal = parts == "equal"
    # A tensor-parallel model sees the same rows everywhere: there the parameters are cut unequally.
    name = "ragged" if layout == "TP" and not equal else "mlp"
    native = layout.startswith("FSDP2") and method == "finite-difference"  # as many passes on every process
    check(jobs[size].run(compared, name, layout, equal, method, 1 if equal or native else 3), method, size)


OTHERS = list(
    itertools.product(("encoder", "tied", "batchnorm", "frozen"), ("DDP", "FSDP2"), ("exact", "finite-difference"))
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout", "method"), OTHERS)
def test_other_models(jobs, name, layout, method):
    """Attention, tied weights with targets that do not count, BatchNorm in evaluation mode, a frozen layer."""
    check(jobs[2].run(compared, name, layout, False, method, 1), method, 2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["DDP", "FSDP2", "TP"])
def test_some_of_the_parameters(jobs, layout):
    check(jobs[2].run(compared, "mlp", layout, False, "exact", 1, "[02].*"), "exact", 2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("layout", ["DDP", "FSDP2"])
def test_stored_in_bfloat16(jobs, layout, size):
    results = jobs[size].run(compared, "mlp", layout, False, "exact", 1, None, True)
    check(results, "exact", size)
    assert "float32 copy of bfloat16 parameters" in results[0]["method"]


@pytest.mark.slow
def test_tensor_parallel_in_bfloat16(jobs):
    check(jobs[2].run(compared, "mlp", "TP", False, "exact", 1, None, True), "exact", 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "finite-difference"])
@pytest.mark.parametrize("layout", ["DDP", "FSDP2", "TP"])
def test_losses_that_add_up(jobs, layout, method):
    check(jobs[2].run(compared, "mlp", layout, False, method, 1, None, False, "sum"), method, 2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "DDP", "FSDP2"])
def test_dropout_masks_are_those_of_one_process_that_sees_the_batches_in_order_of_rank(jobs, layout):
    check(jobs[2].run(compared, "dropout", layout, False, "exact", 3), "exact", 2)


def smaller_than_the_job() -> list[int]:
    model = laid_out("mlp", "FSDP2")
    h = dyntune.hessian(model, shards("mlp", 4, equal=True)[dist.get_rank()][0], criterion=CRITERION)
    return [t.numel() for t in h.space.normal(0)]


@pytest.mark.slow
def test_the_matrix_has_a_process_without_any_rows_of_a_layer(jobs):
    *_, last = jobs[4].run(smaller_than_the_job)
    assert last[-1] == 0
    assert sum(last) > 0


def means_of_means() -> tuple[float, float]:
    """DDP's own gradient on unequal shards, and ours, against that of all rows together."""
    model_, parts = laid_out("mlp", "DDP"), shards("mlp", 2, equal=False)
    batch, everything = parts[dist.get_rank()][0], [b for part in parts for b in part]
    truth = dyntune.hessian(model("mlp"), everything, criterion=CRITERION).objective.gradient()
    ours = dyntune.hessian(model_, batch, criterion=CRITERION).objective.gradient()
    CRITERION(model_(batch[0]), batch[1]).backward()
    return relative([p.grad for p in model_.parameters()], truth), relative(ours, truth)


def test_counts_are_what_ddp_ignores(jobs):
    for theirs, ours in jobs[2].run(means_of_means):
        assert theirs > 0.1
        assert ours < 1e-6

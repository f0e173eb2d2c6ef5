"""What cannot be measured together is refused, on all processes and before anything waits."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

import dyntune
from dyntune.errors import InvalidArgumentError
from tests.distributed.problem import laid_out, model, shards

CRITERION = nn.CrossEntropyLoss()


def made(net: nn.Module, batch: Any = None, **options: Any) -> dyntune.HessianOperator:
    batch = shards("mlp", dist.get_world_size(), equal=True)[dist.get_rank()][0] if batch is None else batch
    return dyntune.hessian(net, batch, criterion=CRITERION, **options)


def fsdp1() -> None:
    made(FullyShardedDataParallel(model("mlp"), device_id=torch.device("cpu")))


def hybrid() -> None:
    made(fully_shard(model("mlp"), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))))


def alone_with_shards() -> None:
    made(laid_out("mlp", "FSDP2"), process_group=None)


def flat_vector() -> None:
    h = made(laid_out("mlp", "FSDP2"))
    h @ torch.ones(h.numel)


def low_precision_differences() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    made(fully_shard(model("mlp"), mp_policy=policy), method="finite-difference")


def low_precision_shards() -> None:
    made(laid_out("mlp", "FSDP2", torch.bfloat16), method="finite-difference")


def unequal_batches() -> None:
    batch = shards("mlp", 2, equal=True, batches=3)[dist.get_rank()]
    made(laid_out("mlp", "FSDP2"), batch, method="finite-difference")


def drifted_copies() -> None:
    net = model("mlp")
    with torch.no_grad():
        net[0].weight.add_(0.01 * dist.get_rank())
    made(net, process_group=dist.group.WORLD)


def other_seeds() -> None:
    made(laid_out("mlp", "DDP"), seed=dist.get_rank())


def other_modes() -> None:
    made(laid_out("mlp", "DDP").train(dist.get_rank() == 0))


def other_parameters() -> None:
    made(laid_out("mlp", "DDP"), params=["0.*", "*"][dist.get_rank()])


def not_a_member() -> None:
    group = dist.new_group([0])
    try:
        if dist.get_rank() == 1:
            dyntune.Team(group)
        raise InvalidArgumentError("this process is not in the process group: raised by the test on rank 0")
    finally:
        if dist.get_rank() == 0:
            dist.destroy_process_group(group)


def no_time() -> None:
    dyntune.Team(timeout=0)


REFUSALS: list[tuple[int, Callable[[], None], str, str]] = [
    (2, fsdp1, "HVPUnsupportedError", "FSDP1"),
    (4, hybrid, "HVPUnsupportedError", "not supported yet"),
    (2, alone_with_shards, "InvalidArgumentError", "leave it out and make the same call on every rank"),
    (2, flat_vector, "HVPUnsupportedError", "lists of DTensors"),
    (2, low_precision_differences, "HVPUnsupportedError", "MixedPrecisionPolicy"),
    (2, low_precision_shards, "HVPUnsupportedError", "stored in torch.bfloat16"),
    (2, unequal_batches, "InvalidArgumentError", r"hold \[1, 3\] batches"),
    (2, drifted_copies, "InvalidArgumentError", "Broadcast the parameters first"),
    (2, other_seeds, "InvalidArgumentError", "measure different things"),
    (2, other_modes, "InvalidArgumentError", "measure different things"),
    (2, other_parameters, "InvalidArgumentError", "measure different things"),
    (2, not_a_member, "InvalidArgumentError", "not in the process group"),
    (2, no_time, "InvalidArgumentError", "timeout=0"),
]
QUICK = (alone_with_shards, unequal_batches, drifted_copies)


def refused(case: Callable[[], None]) -> tuple[str, str]:
    try:
        case()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize(
    ("size", "case", "kind", "words"),
    [pytest.param(*r, marks=() if r[1] in QUICK else pytest.mark.slow, id=r[1].__name__) for r in REFUSALS],
)
def test_refused_on_every_process(jobs, size, case, kind, words):
    for found, text in jobs[size].run(refused, case):
        assert (found, text and bool(re.search(words, text))) == (kind, True), text


def test_a_team_needs_a_job():
    assert not dist.is_initialized()
    with pytest.raises(InvalidArgumentError, match="init_process_group"):
        dyntune.Team()

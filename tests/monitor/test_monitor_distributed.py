"""Two processes, replicas and shards: each with its own record, the same bits as without a monitor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import dyntune
from tests.distributed.harness import Job
from tests.distributed.problem import model as problem_model
from tests.monitor.training import Unlimited

pytestmark = pytest.mark.slow
STEPS = 60


@pytest.fixture(scope="module")
def job() -> Iterator[Job]:
    with Job(2) as found:
        yield found


def _laid_out(layout: str) -> nn.Module:
    model = problem_model("mlp")
    if layout == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model


def _bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    tensors = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
    return [getattr(t, "_local_tensor", t).detach().tolist() for t in tensors]


def _train(layout: str, log: str | None) -> tuple[list[Any], list[Any], str]:
    torch.manual_seed(0)
    model = _laid_out(layout)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(dist.get_rank())
    data = [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(STEPS)]
    criterion = nn.CrossEntropyLoss()
    monitor = None
    if log is not None:
        monitor = dyntune.Monitor(model, optimizer, criterion=criterion, log=log, on_error="raise", overhead=0.9)
        monitor._budget = Unlimited(0.9)
    losses = []
    for x, y in data if monitor is None else monitor.watch(data):
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if monitor is not None:
            monitor.observe(loss)
    if monitor is not None:
        monitor.close()
    return _bits(model, optimizer), losses, "" if monitor is None else monitor.run.id or ""


@pytest.mark.parametrize("layout", ["DDP", "FSDP2"])
def test_the_same_bits_and_a_record_for_each_process(job, layout, tmp_path):
    bare = job.run(_train, layout, None)
    log = str(tmp_path / "run.jsonl")
    watched = job.run(_train, layout, log)
    for (bits, losses, _), (ours, seen, _) in zip(bare, watched, strict=True):
        assert bits == ours
        assert losses == seen
    assert watched[0][2] == watched[1][2]  # one run
    run = dyntune.load_run(Path(log))
    assert sorted(run.ranks) == [0, 1]
    for rank, part in run.ranks.items():
        assert part["train/loss"][~torch.tensor(part["train/loss"]).isnan().numpy()].tolist() == watched[rank][1]
    blind = [{e.detail["signal"] for e in run.ranks[r].events if e.name == "blind"} for r in (0, 1)]
    if layout == "DDP":
        assert "curvature/lambda_max_preconditioned" in run.ranks[0]
        assert {"curvature", "bursts"} <= blind[1]
    else:
        assert all("curvature" in signals for signals in blind)
        assert all("grad/autocorr_raw_lag1" in part for part in run.ranks.values())
        assert "shards of rank 1" in run.ranks[1].assumed["scope"]


def _half(monitored: int) -> bool:
    """A monitor on one of the processes holds up neither."""
    model = _laid_out("DDP")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = dyntune.Monitor(model, optimizer) if dist.get_rank() == monitored else None
    for _ in range(20):
        model(torch.ones(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
        return len(monitor.run) >= 20
    return True


def test_one_process_alone_may_be_watched(job):
    assert job.run(_half, 1) == [True, True]

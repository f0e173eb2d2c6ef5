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


def _laid_out(layout: str, name: str = "mlp") -> nn.Module:
    model = problem_model(name)
    if layout == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model


def _bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers(), *(v for s in optimizer.state.values() for v in s.values())]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    tensors.append(torch.get_rng_state())
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
        monitor._session.budget = Unlimited(0.9)
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


# Beside the plain loop: buffers, dropout and a frozen parameter; a scaler; batches that are accumulated.
FORMS: dict[str, dict[str, Any]] = {
    "everything": {},
    "scaled": {"scaled": True},
    "accumulated": {"accumulate": 2},
    "broken on one of them": {"broken": True},
}


class _BrokenSink:
    def write(self, *_: Any) -> None:
        raise OSError("no space left")

    def close(self) -> None:
        raise OSError("no space left")


def _broken(*_: Any) -> torch.Tensor:
    raise RuntimeError("no such loss")


def _formed(
    layout: str, log: str | None, scaled: bool = False, accumulate: int = 1, broken: bool = False
) -> tuple[list[list[Any]], set[str]]:
    """The state after every step, and what the monitor has recorded."""
    rank = dist.get_rank()
    torch.manual_seed(10 + rank)  # of dropout
    model = _laid_out(layout, "everything")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, growth_interval=10)
    generator = torch.Generator().manual_seed(rank)
    data = [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(40)]
    data[25] = (data[25][0] * (torch.inf if scaled else 1), data[25][1])  # a step that is skipped
    criterion = nn.CrossEntropyLoss()
    monitor = None
    if log is not None:
        ours = {"criterion": _broken, "sinks": [_BrokenSink()]} if broken and rank == 0 else {"criterion": criterion}
        on_error = "warn" if broken else "raise"
        monitor = dyntune.Monitor(
            model, optimizer, log=log, on_error=on_error, overhead=0.9, scaler=scaler, accumulate=accumulate, **ours
        )
        monitor._session.budget = Unlimited(0.9)
    states = []
    for i, (x, y) in enumerate(data if monitor is None else monitor.watch(data)):
        loss = criterion(model(x), y) / accumulate
        scaler.scale(loss).backward()
        if monitor is not None:
            monitor.observe(loss)
        if (i + 1) % accumulate == 0:
            scaler.step(optimizer)
            scaler.update()
            states.append(_bits(model, optimizer))
            optimizer.zero_grad()
    if monitor is None:
        return states, set()
    monitor.close()
    events = {f"{e.name} {e.detail.get('part', '')}".strip() for e in monitor.run.events}
    return states, {*monitor.run.names, *events}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["DDP", "FSDP2"])
def test_the_same_bits_after_every_step(job, layout, form, tmp_path):
    options = tuple({"scaled": False, "accumulate": 1, "broken": False, **FORMS[form]}.values())
    bare = job.run(_formed, layout, None, *options)
    watched = job.run(_formed, layout, str(tmp_path / "run.jsonl"), *options)
    assert [repr(states) for states, _ in bare] == [repr(states) for states, _ in watched]  # where NaN is NaN
    assert {len(states) for states, _ in bare} == {40 // FORMS[form].get("accumulate", 1)}
    ours = watched[0][1]
    assert "grad/autocorr_raw_lag1" in ours
    if layout == "DDP":
        assert ("curvature/batch_sharpness" in ours) == (form != "broken on one of them")
    if (layout, form) == ("DDP", "broken on one of them"):
        assert "disabled curvature" in ours
        assert not any(name.startswith("disabled") for name in watched[1][1])


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

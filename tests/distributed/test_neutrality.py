"""Training over several processes goes on with the same bits, wherever in a step it is measured."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import dyntune
from dyntune.objective.fsdp import fsdp_modules
from tests.distributed.problem import Batch, laid_out, shards

CRITERION = nn.CrossEntropyLoss()
STEPS, MEASURED = 4, 1
SETTINGS = {
    "plain": ("plain", "exact"),
    "DDP": ("DDP", "exact"),
    "gathered": ("FSDP2", "exact"),
    "sharded": ("FSDP2", "finite-difference"),
    "sharded, whole after forward": ("FSDP2 left whole", "finite-difference"),
    "parallel": ("TP", "exact"),
}
PLACES = ("between steps", "with gradients", "in mid-accumulation", "between forward and backward")


def bits(item: Any) -> str:
    """A digest of this process's part."""
    tensor = getattr(item, "_local_tensor", item)
    if not isinstance(tensor, torch.Tensor):
        return repr(item)
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that a step reads or writes."""
    found: dict[str, Any] = {}
    for name, p in model.named_parameters():
        hooks = len(getattr(p, "_post_accumulate_grad_hooks", None) or ())
        found[name] = (bits(p), p._version, None if p.grad is None else bits(p.grad), p.requires_grad, hooks)
        found |= {f"{name} {key}": bits(value) for key, value in optimizer.state[p].items()}
    for name, m in model.named_modules():
        found[f"module {name}"] = (m.training, [len(getattr(m, kind)) for kind in HOOKS])
    found |= {f"buffer {name}": (bits(b), b._version) for name, b in model.named_buffers()}
    found["random"] = (bits(torch.get_rng_state()), random.getstate()[1][:3], np.random.get_state()[1][:3].tolist())
    for index, module in enumerate(fsdp_modules(model)):
        held = module._get_fsdp_state()._fsdp_param_group
        if held is not None:
            ranks = dist.get_process_group_ranks(held.mesh_info.shard_process_group)
            found[f"FSDP {index}"] = (held.reduce_grads, held.reshard_after_backward, held.all_reduce_grads, ranks)
            found[f"FSDP {index} by the user's group"] = held.mesh_info.shard_process_group is dist.group.WORLD
    return found


def pausing(model: nn.Module, on: bool) -> contextlib.AbstractContextManager[Any]:
    """Backward passes that do not synchronise, in every layout's own way."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync() if on else contextlib.nullcontext()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(not on)
    return contextlib.nullcontext()


def measured(model: nn.Module, batch: Batch, method: str, group: dict[str, Any], *, fail: bool) -> float | None:
    """The largest eigenvalue as three products see it; None where it failed."""

    def loss(net: nn.Module, batch: Batch) -> torch.Tensor:
        outputs = net(batch[0])
        if fail and dist.get_rank() == 1 and next(calls) == 2:
            raise ArithmeticError
        return CRITERION(outputs, batch[1])

    calls = itertools.count()
    with contextlib.suppress(ArithmeticError, dyntune.errors.DistributedError) if fail else contextlib.nullcontext():
        h = dyntune.hessian(model, batch, loss, method=method, **group)
        h.objective.loss()
        h.objective.gradient()
        return float(dyntune.eigenvalues(h, max_products=3, rtol=1e-12))
    return None


def step_at_once(p: torch.Tensor) -> None:
    p.data.add_(p.grad, alpha=-0.01)


def trajectory(
    setting: str, place: str | None, fail: bool = False, in_backward: bool = False
) -> tuple[list[dict[str, Any]], list[Any]]:
    """States, and what was measured in the second step at `place`, along a training with two batches a step."""
    layout, method = SETTINGS[setting]
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    model = laid_out("everything", layout)
    # Without anything that keeps copies equal, only equal rows do.
    alike = layout in ("plain", "TP")
    part = shards("everything", 1 if alike else 2, equal=False)[0 if alike else dist.get_rank()][0]
    halves = list(zip(part[0].tensor_split(2), part[1].tensor_split(2), strict=True))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    group = {"process_group": dist.group.WORLD} if layout == "plain" else {}
    if in_backward:
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(step_at_once)
    states, values = [], []
    for step in range(STEPS):

        def here(now: str, step: int = step) -> None:
            if step == MEASURED and now == place:
                values.append(measured(model, part, method, group, fail=fail))

        here("between steps")
        with pausing(model, on=True):
            CRITERION(model(halves[0][0]), halves[0][1]).backward()
        here("in mid-accumulation")
        with pausing(model, on=False):
            loss = CRITERION(model(halves[1][0]), halves[1][1])
            here("between forward and backward")
            loss.backward()
        here("with gradients")
        optimizer.step()
        optimizer.zero_grad()
        states.append(state(model, optimizer))
    return states, values


@pytest.fixture(scope="module")
def undisturbed(job):
    """Trajectories without any measurement, each run once."""
    known: dict[Any, Any] = {}

    def of(*key: Any) -> Any:
        if key not in known:
            setting, in_backward = key
            known[key] = job.run(trajectory, setting, None, False, in_backward)
        return known[key]

    return of


def differences(found: tuple[Any, Any], truth: tuple[Any, Any]) -> list[str]:
    return [
        f"step {step}: {name}"
        for step, (a, b) in enumerate(zip(found[0], truth[0], strict=True))
        for name in a.keys() | b.keys()
        if a.get(name) != b.get(name)
    ]


QUICK = {("DDP", "in mid-accumulation"), ("sharded", "in mid-accumulation"), ("gathered", "with gradients")}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id=", ".join(case))
    for case in itertools.product(SETTINGS, PLACES)
]


@pytest.mark.parametrize(("setting", "place"), CASES)
def test_training_takes_the_same_way(job, undisturbed, setting, place):
    for found, truth in zip(job.run(trajectory, setting, place), undisturbed(setting, False), strict=True):
        assert differences(found, truth) == []


WHERE = [pytest.param(setting, marks=() if setting == "sharded" else pytest.mark.slow) for setting in SETTINGS]


@pytest.mark.parametrize("setting", WHERE)
def test_where_in_the_step_does_not_matter_to_the_measurement(job, setting):
    """Gradient accumulation switches off what the measurement needs, and has gradients where it puts its own."""
    before, within = (job.run(trajectory, setting, place) for place in ("between steps", "in mid-accumulation"))
    for (_, values), (_, expected) in zip(within, before, strict=True):
        assert values == expected
        assert values[0] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES[:3])
@pytest.mark.parametrize("setting", [s for s in SETTINGS if s not in ("plain",)])
def test_also_when_one_process_fails_in_measuring(job, undisturbed, setting, place):
    for found, truth in zip(job.run(trajectory, setting, place, True), undisturbed(setting, False), strict=True):
        assert differences(found, truth) == []


@pytest.mark.slow
@pytest.mark.parametrize("setting", [s for s in SETTINGS if s != "DDP"])  # there hooks come before the reduction
def test_also_where_the_optimizer_runs_in_the_backward_pass(job, undisturbed, setting):
    """Gradient accumulation is not for these: what moves is moved in every backward pass."""
    for place in ("between steps", "in mid-accumulation"):
        pairs = zip(job.run(trajectory, setting, place, False, True), undisturbed(setting, True), strict=True)
        for found, truth in pairs:
            assert differences(found, truth) == []


def test_the_trajectories_would_show_a_difference(job, undisturbed):
    """The state that is compared moves in every step, and other weights are other bits."""
    (first, *_, last), _ = undisturbed("sharded", False)[0]
    moved = set(differences(([first], []), ([last], [])))
    assert "step 0: 0.weight" in moved
    assert "step 0: 3.0.weight exp_avg" in moved
    assert "step 0: buffer 3.0.running_mean" in moved
    assert "step 0: random" in moved

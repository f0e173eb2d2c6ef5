"""The callbacks on two processes: the same training to the bit, and a record for each."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import Job

pytestmark = pytest.mark.slow
STEPS = 20


@pytest.fixture(scope="module")
def job() -> Iterator[Job]:
    with Job(2) as found:
        yield found


def _environment() -> None:
    """What torchrun sets; the process group is there already, and the frameworks take that."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, GROUP_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", TORCHELASTIC_RUN_ID="none")


def _plain(state: Any) -> Any:
    """Numbers, which can be sent and compared."""
    if isinstance(state, torch.Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state


def _transformers(folder: str, log: str | None) -> tuple[Any, dict[str, Any]]:
    _environment()
    from tests.integrations import test_monitor_transformers as ours

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the framework's own
        trainer = ours.made(Path(folder), max_steps=STEPS, ddp_backend="gloo")
        callback = None
        if log is not None:
            callback = ours.MonitorCallback(trainer, overhead=0.99, log=log, on_error="raise")
        state = ours.trained(trainer)
    return _plain(state), _closed(callback)


def _lightning(folder: str, log: str | None) -> tuple[Any, dict[str, Any]]:
    _environment()
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy

    from tests.integrations import test_monitor_lightning as ours

    callback = None
    if log is not None:
        callback = ours.MonitorCallback(criterion=ours.CE, overhead=0.99, log=log, on_error="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the framework's own
        torch.manual_seed(3)
        module = ours.Plain()
        trainer = Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo"),
            callbacks=[] if callback is None else [callback],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        trainer.fit(module, ours.loader())
        state = {
            "model": {name: t.clone() for name, t in module.state_dict().items()},
            "optimizer": trainer.optimizers[0].state_dict()["state"],
            "rng": torch.get_rng_state(),
            "losses": module.losses,
        }
    return _plain(state), _closed(callback)


def _closed(callback: Any) -> dict[str, Any]:
    if callback is None:
        return {}
    run = callback.monitor.run
    found = next(event for event in run.events if event.name == "closed").detail
    return {"rank": run.rank, "recorded": run.series("train/loss")[0].tolist(), **found}


@pytest.mark.parametrize("framework", [_lightning, _transformers])
def test_training_is_the_same_to_the_bit(job: Job, framework: Any, tmp_path: Path) -> None:
    bare = job.run(framework, str(tmp_path), None)
    job.stop()  # frameworks leave marks on a process
    watched = job.run(framework, str(tmp_path), str(tmp_path / "run.jsonl"))
    assert [state for state, _ in bare] == [state for state, _ in watched]
    assert [about["rank"] for _, about in watched] == [0, 1]
    assert all(about["recorded"] == list(range(STEPS)) for _, about in watched)
    assert [about["errors"] for _, about in watched] == [0, 0]
    assert watched[0][1]["bursts"] > 0  # something was there that could have disturbed the training

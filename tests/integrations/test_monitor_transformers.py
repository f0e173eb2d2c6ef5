"""The Transformers callback on real trainings: the same to the bit, the right numbers, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from dyntune.errors import InvalidArgumentError
from dyntune.integrations.csv_file import CSVSink
from dyntune.integrations.transformers import MonitorCallback
from dyntune.monitor.load import load_run
from tests.integrations.test_transformers import gpt2, rows
from tests.suggest.problems import same

STEPS = 50


class Logged(TrainerCallback):
    """What the trainer itself says about each step."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            self.losses.setdefault(state.global_step - 1, float(logs["loss"]))


def made(folder: Path, *, max_steps: int = STEPS, dropout: float = 0.1, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=max_steps,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "no", "logging_strategy": "steps", "logging_steps": 1, "learning_rate": 1e-2} | more,
    )
    trainer = Trainer(gpt2(dropout=dropout), arguments, train_dataset=rows(ragged=True))
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(trainer: Trainer, **more: Any) -> dict[str, Any]:
    """Everything that a training leaves behind, random states included."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        trainer.train(**more)
        inner = trainer.optimizer.optimizer
        return {
            "model": {n: t.clone() for n, t in trainer.model.state_dict().items()},
            "optimizer": inner.state_dict()["state"],
            "rng": torch.get_rng_state(),
            "hooks": len(inner._optimizer_step_pre_hooks),
            "own": "training_step" in vars(trainer),
        }


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "checkpointed": {"activation_checkpointing": True},
}


@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=[pytest.mark.slow] if name != "plain" else []) for name in SETTINGS]
)
def test_training_is_the_same_to_the_bit(setting: str, tmp_path: Path) -> None:
    more = SETTINGS[setting]
    trainer = made(tmp_path, **more)
    # overhead=0.99: bursts and probes run as often as they can, so that what they might disturb is disturbed
    callback = MonitorCallback(trainer, overhead=0.99, log=tmp_path / "run.jsonl", on_error="raise")
    watched, bare = trained(trainer), trained(made(tmp_path, **more))
    assert same(bare, watched)
    run = load_run(tmp_path / "run.jsonl")
    assert callback.monitor is not None
    assert run.series("train/loss")[0].tolist() == list(range(STEPS))
    closed = next(event for event in run.events if event.name == "closed")
    assert closed.detail["bursts"] > 0
    assert closed.detail["probes"] > 0
    assert closed.detail["errors"] == 0


@pytest.mark.parametrize("parts", [1, 2])
def test_losses_are_those_of_the_trainer(parts: int, tmp_path: Path) -> None:
    trainer, logged = made(tmp_path, max_steps=20, gradient_accumulation_steps=parts), Logged()
    trainer.add_callback(logged)
    with MonitorCallback(trainer, on_error="raise") as callback:
        trainer.train()
    assert callback.monitor is not None
    # The trainer rounds what it logs to four decimals.
    assert callback.monitor.run.series("train/loss")[1].tolist() == pytest.approx([*logged.losses.values()], abs=1e-4)
    assert list(logged.losses) == callback.monitor.run.series("train/loss")[0].tolist()
    assert callback not in trainer.callback_handler.callbacks


def failing(trainer: Trainer, at: int) -> Callable[..., Any]:
    original = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == at:
            raise KeyError("mine")
        return original(*args, **kwargs)

    return compute_loss


def test_an_exception_closes_the_monitor_and_passes(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    trainer.compute_loss = failing(trainer, 7)
    MonitorCallback(trainer, log=tmp_path / "run.jsonl", sinks=[CSVSink(tmp_path / "run.csv")])
    with pytest.raises(KeyError, match="mine"):
        trainer.train()
    run = load_run(tmp_path / "run.jsonl")
    assert run.steps.max() == 6
    assert run.events[-1].name == "closed"
    assert "6,metric,train/loss," in (tmp_path / "run.csv").read_text()
    assert len(trainer.optimizer.optimizer._optimizer_step_pre_hooks) == 0
    assert "training_step" not in vars(trainer)


def test_as_a_context_it_closes_whatever_fails(tmp_path: Path) -> None:
    class Broken(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyError("mine")

    def run() -> None:
        with MonitorCallback(trainer, log=tmp_path / "run.jsonl"):
            trainer.train()

    trainer = made(tmp_path)
    trainer.add_callback(Broken())
    with pytest.raises(KeyError, match="mine"):
        run()
    assert load_run(tmp_path / "run.jsonl").events[-1].name == "closed"
    assert "training_step" not in vars(trainer)


def test_a_resumed_training_goes_on_with_the_record(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    saving = {"save_strategy": "steps", "save_steps": 20}
    with MonitorCallback(made(tmp_path, max_steps=30, **saving), log=log) as callback:
        callback._trainer.train()
    again = made(tmp_path, max_steps=25, **saving)
    with MonitorCallback(again, log=log):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    run = load_run(log)
    assert (run.attempts, int(run.steps.max())) == (2, 24)
    assert run.series("train/loss")[0].tolist() == list(range(25))
    assert {row.step for row in run.superseded} == set(range(20, 30))


def test_restoring_the_states_of_callbacks_does_no_harm(tmp_path: Path) -> None:
    log, saving = tmp_path / "run.jsonl", {"save_strategy": "steps", "save_steps": 10}
    with MonitorCallback(made(tmp_path, max_steps=10, **saving), log=log) as callback:
        callback._trainer.train()
    again = made(tmp_path, max_steps=15, restore_callback_states_from_checkpoint=True, **saving)
    with MonitorCallback(again, log=log):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert load_run(log).series("train/loss")[0].tolist() == list(range(15))


def test_evaluation_is_not_watched_and_other_objects_are_refused(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    callback = MonitorCallback(trainer, log=tmp_path / "run.jsonl")
    trainer.evaluate(eval_dataset=rows(16))
    assert callback.monitor is None
    assert not (tmp_path / "run.jsonl").exists()
    with pytest.raises(InvalidArgumentError, match=r"not a transformers\.Trainer"):
        MonitorCallback(trainer.model)  # type: ignore[arg-type]


def test_a_second_training_goes_on(tmp_path: Path) -> None:
    trainer = made(tmp_path, max_steps=10)
    MonitorCallback(trainer, log=tmp_path / "run.jsonl")
    trainer.train()
    trainer.train()
    assert load_run(tmp_path / "run.jsonl").series("train/loss")[0].tolist() == list(range(20))

"""The door for Transformers: the same answer as by hand, and a training afterwards that is the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

import dyntune
from dyntune.errors import InvalidArgumentError, NotConvergedError
from dyntune.integrations.transformers import suggest_lr
from tests.suggest.problems import same, snapshot

VOCABULARY, LENGTH = 13, 8
BUDGET = 100


def gpt2(*, dropout: float = 0.0) -> GPT2LMHeadModel:
    """Two layers of width 8, in eval mode as from_pretrained leaves a model."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0)).eval()


def rows(count: int = 160, *, ragged: bool = False) -> list[dict[str, Any]]:
    """Noisy counting; with `ragged` only some of the labels count."""
    g = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        text = (torch.arange(LENGTH) + torch.randint(VOCABULARY, (1,), generator=g)) % VOCABULARY
        noise = torch.rand(LENGTH, generator=g) < 0.1
        text = torch.where(noise, torch.randint(VOCABULARY, (LENGTH,), generator=g), text)
        labels = text.clone()
        if ragged:
            labels[1 + i % (LENGTH - 1) :] = -100
            labels[1] = text[1]
        found.append({"input_ids": text, "labels": labels})
    return found


class InOrder(Trainer):
    """Rows are not shuffled, so that batches can be made by hand."""

    def _get_train_sampler(self, train_dataset: Any = None) -> None:
        return None


def made(folder: Path, model: nn.Module | None = None, *, kind: Any = InOrder, **options: Any) -> Any:
    data = options.pop("data", None) or rows()
    more = {key: options.pop(key) for key in ("optimizers", "compute_loss_func") if key in options}
    quiet = {"use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True, "report_to": "none"}
    quiet |= {"save_strategy": "no", "logging_strategy": "no", "seed": 3}
    arguments = TrainingArguments(str(folder), **quiet | {"per_device_train_batch_size": 8} | options)
    return kind(model or gpt2(), arguments, train_dataset=data, **more)


def batches(data: list[dict[str, Any]], size: int = 8) -> list[dict[str, torch.Tensor]]:
    return [
        {key: torch.stack([row[key] for row in data[i : i + size]]) for key in data[0]}
        for i in range(0, len(data), size)
    ]


def decayed(model: nn.Module, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW with the groups that the Trainer makes: no decay for biases and norms."""
    named = list(model.named_parameters())
    plain = [p for n, p in named if "bias" in n or "ln_" in n]
    others = [p for n, p in named if not ("bias" in n or "ln_" in n)]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=5e-5, fused=True)


def by_hand(model: nn.Module, loss_fn: Any, data: Any = None, **options: Any) -> dyntune.Recommendation:
    options.setdefault("optimizer", decayed(model))
    options = {"clip_norm": 1.0, "num_steps": 60, "schedule": "linear with 0 steps of warm-up"} | options
    options.setdefault("max_gradients", BUDGET)
    return dyntune.suggest_lr(model.train(), batches(data or rows()), loss_fn, **options)


def counted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """As the Trainer counts for this class, whose name does not tell it that labels are shifted: the first, too."""
    return (batch["labels"] != -100).sum()


def own_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's loss as the Trainer has it: 7/8 of the mean here, since eight labels are counted for seven."""
    return model(**batch, num_items_in_batch=counted(batch)).loss


def assert_equal(one: dyntune.Recommendation, other: dyntune.Recommendation) -> None:
    assert one.to_dict() == other.to_dict()
    assert one.value is not None


def test_the_same_as_by_hand(tmp_path: Path) -> None:
    rec = suggest_lr(made(tmp_path), max_gradients=BUDGET)
    assert_equal(rec, by_hand(gpt2(), own_loss))
    assert any("train mode" in check for check in rec.checks)


def test_arguments_are_read(tmp_path: Path) -> None:
    options: dict[str, Any] = {"weight_decay": 0.1, "bf16": True, "max_grad_norm": 0.0, "max_steps": 40}
    trainer = made(tmp_path, lr_scheduler_type="cosine", warmup_steps=5, **options)
    model = gpt2()
    hand = by_hand(
        model,
        own_loss,
        optimizer=decayed(model, 0.1),
        autocast=torch.bfloat16,
        clip_norm=None,
        num_steps=40,
        schedule="cosine with 5 steps of warm-up",
    )
    assert_equal(suggest_lr(trainer, max_gradients=BUDGET), hand)


def smoothed(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    outputs = model(input_ids=batch["input_ids"], num_items_in_batch=counted(batch))
    smoother = LabelSmoother(epsilon=0.2)
    return smoother(outputs, batch["labels"], shift_labels=True, num_items_in_batch=counted(batch))


def test_label_smoothing(tmp_path: Path) -> None:
    rec = suggest_lr(made(tmp_path, label_smoothing_factor=0.2), max_gradients=BUDGET)
    assert_equal(rec, by_hand(gpt2(), smoothed))


def test_labels_are_counted_over_accumulated_batches(tmp_path: Path) -> None:
    """A step is the mean over the labels of all its batches, not the mean of their means."""
    data = rows(ragged=True)
    trainer = made(tmp_path, gradient_accumulation_steps=2, data=data)
    made_by_hand = batches(data)
    whole = {}
    for first, second in zip(made_by_hand[::2], made_by_hand[1::2], strict=True):
        for batch in (first, second):
            whole[batch["input_ids"].numpy().tobytes()] = counted(first) + counted(second)
    assert any(2 * counted(b) != whole[b["input_ids"].numpy().tobytes()] for b in made_by_hand)

    def share(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return 2 * model(**batch, num_items_in_batch=whole[batch["input_ids"].numpy().tobytes()]).loss

    rec = suggest_lr(trainer, max_gradients=150)
    assert_equal(rec, by_hand(gpt2(), share, data, accumulate=2, num_steps=30, max_gradients=150))


def gradients(trainer: Any) -> list[torch.Tensor]:
    """What ``Trainer.training_step`` leaves in ``.grad`` after one accumulated step."""
    group = batches(trainer.train_dataset)[:2]
    samples, count = trainer.get_batch_samples(iter(group), 2, trainer.args.device)
    trainer.current_gradient_accumulation_steps = 2
    trainer.create_optimizer()
    for inputs in samples:
        trainer.training_step(trainer.model, dict(inputs), count)
    found = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    return found


def uncounted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    shifted = labels[:, 1:].flatten()
    total = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), shifted, reduction="sum")
    return total / num_items_in_batch


class OwnLoss(InOrder):
    """A compute_loss that knows nothing of counts, and keeps what it saw."""

    loss_is_scaled_for_ga = False
    last: Any = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.last = model(**inputs).loss
        self.log({"loss": float(self.last.detach())})
        return self.last


@pytest.mark.parametrize(
    "options",
    [{}, {"compute_loss_func": uncounted}, {"kind": OwnLoss}, {"label_smoothing_factor": 0.1}],
    ids=["own", "function", "method", "smoothed"],
)
def test_a_step_has_the_trainers_gradient(tmp_path: Path, options: dict[str, Any], monkeypatch: Any) -> None:
    """The first twin's first accumulated gradient is that of Trainer.training_step."""
    from dyntune.pilot.twin import Twin

    trainer = made(tmp_path, gradient_accumulation_steps=2, data=rows(ragged=True), max_grad_norm=0.0, **options)
    found: list[list[torch.Tensor]] = []
    step = Twin.step

    def spied(twin: Twin, lr: float) -> float:
        loss = step(twin, lr)
        found.append([p.grad.clone() for p in twin.tensors])
        return loss

    monkeypatch.setattr(Twin, "step", spied)
    suggest_lr(trainer, max_gradients=150)
    expected = gradients(trainer)
    for ours, theirs in zip(found[0], expected, strict=True):
        # two sums of a few hundred float32 terms in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_train_afterwards_is_the_same_to_the_bit(tmp_path: Path, bf16: bool) -> None:
    def trained(*, asked: bool) -> Any:
        trainer = made(tmp_path, gpt2(dropout=0.1), kind=Trainer, num_train_epochs=1, bf16=bf16)
        for _ in range(2):  # the second time with a model that accelerate has wrapped, and a stepped optimizer
            if asked:
                rec = suggest_lr(trainer, max_gradients=60)
                assert rec.cost > 0
            trainer.train()
        return trainer

    one, two = trained(asked=False), trained(asked=True)
    for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert same(one.optimizer.state_dict()["state"], two.optimizer.state_dict()["state"])
    assert one.state.global_step == two.state.global_step
    assert len(one.accelerator._dataloaders) == len(two.accelerator._dataloaders)


def test_nothing_of_the_trainer_moves(tmp_path: Path) -> None:
    model = gpt2(dropout=0.1)
    trainer = made(tmp_path, model, kind=OwnLoss)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = snapshot(model)
    held = {name: id(item) for name, item in vars(trainer).items()}
    loaders = len(trainer.accelerator._dataloaders)
    references = len(trainer.accelerator.gradient_state.dataloader_references)
    suggest_lr(trainer, max_gradients=BUDGET)
    assert same(before, snapshot(model))
    assert {name: id(item) for name, item in vars(trainer).items()} == held
    assert trainer.optimizer is None
    assert trainer.last is None
    assert trainer.state.log_history == []
    assert len(trainer.accelerator._dataloaders) == loaders
    assert len(trainer.accelerator.gradient_state.dataloader_references) == references


def test_an_optimizer_of_the_users_keeps_its_ratios(tmp_path: Path) -> None:
    model = gpt2()
    head = list(model.transformer.ln_f.parameters())
    body = [p for p in model.parameters() if all(p is not h for h in head)]
    optimizer = torch.optim.SGD([{"params": body, "lr": 0.1}, {"params": head, "lr": 0.001}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)  # at zero now
    trainer = made(tmp_path, model, optimizers=(optimizer, scheduler))  # seeds the global generators
    before = snapshot(model, optimizer)
    rec = suggest_lr(trainer, max_gradients=BUDGET)
    assert same(before, snapshot(model, optimizer))
    ratios = torch.optim.SGD([{"params": body, "lr": 0.1}, {"params": head, "lr": 0.001}])
    assert_equal(rec, by_hand(model, own_loss, optimizer=ratios, schedule="LambdaLR"))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda t: setattr(t, "is_deepspeed_enabled", True), "DeepSpeed"),
        (lambda t: setattr(t.args, "_n_gpu", 4), "over 4 processes or devices"),
        (lambda t: setattr(t, "accelerator", type("A", (), {"mixed_precision": "fp8"})()), "'fp8' has no counterpart"),
        (lambda t: setattr(t.model, "rows", (i for i in range(3))), "cannot be copied"),
    ],
)
def test_refusals(tmp_path: Path, change: Any, fragment: str) -> None:
    trainer = made(tmp_path)
    change(trainer)
    with pytest.raises(InvalidArgumentError, match=fragment):
        suggest_lr(trainer, max_gradients=BUDGET)


def test_what_is_no_trainer_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="GPT2LMHeadModel without args"):
        suggest_lr(gpt2())  # type: ignore[arg-type]


def test_strict_and_progress_reach_the_measurement(tmp_path: Path) -> None:
    stages: list[str] = []
    with pytest.raises(NotConvergedError):
        suggest_lr(
            made(tmp_path, data=rows(8)),
            max_gradients=BUDGET,
            strict=True,
            progress=lambda stage, *_: stages.append(stage),
        )
    assert stages

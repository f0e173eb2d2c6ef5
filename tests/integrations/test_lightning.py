"""The door for Lightning: the same answer as the plain call, and nothing of module, data or trainer moved."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dyntune
from dyntune.errors import InvalidArgumentError, NotConvergedError
from dyntune.integrations.lightning import suggest_lr
from dyntune.integrations.lightning_reading import find_num_steps
from tests.suggest.problems import classification, mlp, same, snapshot

CE = nn.CrossEntropyLoss()
BUDGET = 100

pytestmark = [
    # Lightning's advice on the machine: workers of the loader, and logging intervals longer than these fits
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    # Lightning 2.6 on torch's tree utilities and on a scheduler that it steps itself
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
]


class Classifier(LightningModule):
    """BatchNorm, dropout, two parameter groups, and everything that a training step writes to."""

    def __init__(self, *, ratio: float = 0.1, extras: bool = True) -> None:
        super().__init__()
        self.net = mlp(extras=extras)
        self.ratio = ratio
        self.seen: list[torch.Tensor] = []
        self.total = torch.zeros(())
        self.indices: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = CE(self.net(x), y)
        self.seen.append(loss.detach())
        self.total += loss.detach()
        self.indices.append(batch_idx)
        self.log("loss", loss, prog_bar=True)
        self.log_dict({"twice": 2 * loss})
        return loss

    def configure_optimizers(self) -> Any:
        head = list(self.net[-1].parameters())
        body = [p for layer in self.net[:-1] for p in layer.parameters()]
        return torch.optim.SGD([{"params": body, "lr": 0.1}, {"params": head, "lr": 0.1 * self.ratio}], momentum=0.9)


class Data(LightningDataModule):
    """Rows made in setup(), as Lightning wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def setup(self, stage: str) -> None:
        x, y = (torch.cat(parts) for parts in zip(*classification(), strict=True))
        self.rows = TensorDataset(x, y)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=32, shuffle=True)


def made(**options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", devices=1, **{"max_epochs": 2} | quiet | options)


def plain(module: Classifier, batches: Any, **options: Any) -> dyntune.Recommendation:
    """The same by hand, on the network inside."""
    return dyntune.suggest_lr(
        module.net,
        batches,
        loss_fn=lambda m, batch: CE(m(batch[0]), batch[1]),
        optimizer=module.configure_optimizers(),
        max_gradients=BUDGET,
        **options,
    )


def values(rec: dyntune.Recommendation) -> dict[str, Any]:
    return rec.to_dict()


def test_the_same_as_the_plain_call() -> None:
    module, batches = Classifier(), classification()
    assert values(suggest_lr(module, batches, max_gradients=BUDGET)) == values(plain(module, batches))


def test_a_datamodule_and_what_the_trainer_says() -> None:
    module, data = Classifier(), Data()
    trainer = made(gradient_clip_val=0.5, precision="bf16-mixed", limit_train_batches=10)
    rec = suggest_lr(module, data, trainer=trainer, max_gradients=BUDGET)
    other = Data()
    other.setup("fit")
    by_hand = plain(module, other.train_dataloader(), clip_norm=0.5, autocast=torch.bfloat16, num_steps=20)
    assert values(rec) == values(by_hand)
    assert not hasattr(data, "rows")  # its setup ran on a copy


def test_accumulation_of_the_trainer() -> None:
    module, batches = Classifier(), classification()
    trainer = made(accumulate_grad_batches=2)
    rec = suggest_lr(module, batches, trainer=trainer, max_gradients=150)
    by_hand = dyntune.suggest_lr(
        module.net,
        batches,
        criterion=CE,
        optimizer=module.configure_optimizers(),
        accumulate=2,
        num_steps=24,
        max_gradients=150,
    )
    assert rec.value == by_hand.value


def test_what_is_given_wins_over_the_trainer() -> None:
    module, batches = Classifier(), classification()
    trainer = made(gradient_clip_val=1e-3, accumulate_grad_batches=4)
    options: dict[str, Any] = {"clip_norm": math.inf, "accumulate": 1, "num_steps": 7, "schedule": "cosine"}
    rec = suggest_lr(module, batches, trainer=trainer, max_gradients=BUDGET, **options)
    assert values(rec) == values(plain(module, batches, **options))


def test_ratios_of_groups_are_kept() -> None:
    """Lightning's own finder sets one rate for all groups; here a frozen-like head changes the answer."""
    batches = classification()
    even, uneven = Classifier(ratio=1.0, extras=False), Classifier(ratio=1e-3, extras=False)
    first = suggest_lr(even, batches, max_gradients=BUDGET)
    second = suggest_lr(uneven, batches, max_gradients=BUDGET)
    assert values(second) == values(plain(uneven, batches))
    assert second.value != first.value


class WarmedUp(Classifier):
    """A scheduler that starts at zero, and asks the trainer for the length."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_ratios_survive_a_warm_up_from_zero() -> None:
    batches = classification()
    rec = suggest_lr(WarmedUp(), batches, trainer=made(), max_gradients=BUDGET)
    by_hand = plain(Classifier(), batches, num_steps=48, schedule="LambdaLR")
    assert values(rec) == values(by_hand)


def test_a_module_that_needs_a_trainer_says_so() -> None:
    with pytest.raises(InvalidArgumentError, match=r"self\.trainer\.estimated_stepping_batches.*trainer=trainer"):
        suggest_lr(WarmedUp(), classification(), max_gradients=BUDGET)
    assert suggest_lr(WarmedUp(), classification(), num_steps=50, max_gradients=BUDGET).value is not None


def test_nothing_of_the_module_moves() -> None:
    module, trainer = Classifier(), made()
    module.net[0].weight.grad = torch.ones_like(module.net[0].weight)
    before = snapshot(module)
    held = {name: id(item) for name, item in vars(module).items()}
    suggest_lr(module, classification(), trainer=trainer, max_gradients=BUDGET)
    assert same(before, snapshot(module))
    assert {name: id(item) for name, item in vars(module).items()} == held
    assert module.seen == module.indices == []
    assert float(module.total) == 0.0
    assert module._trainer is None
    assert trainer.callback_metrics == {}


def trained(*, asked: bool) -> tuple[Classifier, Trainer]:
    """A fit, with or without having asked before, and in the middle of a second one."""
    module, data, trainer = Classifier(), Data(), made()
    torch.manual_seed(1)
    for _ in range(2):  # the second time with a module that is attached to a trainer, and an optimizer with state
        if asked:
            suggest_lr(module, data, trainer=trainer, max_gradients=60)
        trainer.fit(module, data)
        trainer.fit_loop.max_epochs += 2
    return module, trainer


def test_fit_afterwards_is_the_same_to_the_bit() -> None:
    (one, first), (two, second) = trained(asked=False), trained(asked=True)
    assert first.global_step == second.global_step == 96
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    state = first.optimizers[0].state_dict()["state"], second.optimizers[0].state_dict()["state"]
    assert same(*state)
    assert [float(x) for x in one.seen] == [float(x) for x in two.seen]
    assert one.indices == two.indices
    assert {k: float(v) for k, v in first.callback_metrics.items()} == {
        k: float(v) for k, v in second.callback_metrics.items()
    }


class Transferred(Classifier):
    """Transfer hooks of its own: rows are cut, and noise is added."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch["x"], batch["y"]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + torch.randn_like(batch[0]), batch[1]


def test_transfer_hooks_run_and_are_seeded() -> None:
    batches = [{"x": x, "y": y} for x, y in classification()]
    state = torch.get_rng_state()
    first = suggest_lr(Transferred(), batches, max_gradients=BUDGET, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(1)
    assert values(suggest_lr(Transferred(), batches, max_gradients=BUDGET, seed=1)) == values(first)
    assert values(suggest_lr(Transferred(), batches, max_gradients=BUDGET, seed=2)) != values(first)


def test_a_datamodules_transfer_hook_goes_first() -> None:
    class Shifted(Data):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] + 1, batch[1]

    module, data = Classifier(), Data()
    data.setup("fit")
    state = torch.get_rng_state()
    shifted = [(x + 1, y) for x, y in data.train_dataloader()]
    torch.set_rng_state(state)
    assert values(suggest_lr(module, Shifted(), max_gradients=BUDGET)) == values(plain(module, shifted))


def test_logging_by_hand_reaches_nobody() -> None:
    class Chatty(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.logger.experiment.add_scalar("step", self.global_step)
            self.print("here")
            return {"loss": super().training_step(batch, batch_idx), "more": 1}

    rec = suggest_lr(Chatty(), classification(), max_gradients=BUDGET)
    assert values(rec) == values(plain(Classifier(), classification()))


class Returning(Classifier):
    """configure_optimizers() returns what it is told to."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.automatic_optimization = what != "manual"

    def configure_optimizers(self) -> Any:
        one = super().configure_optimizers()
        forms = {
            "list": [one],
            "two lists": ([one], [torch.optim.lr_scheduler.ExponentialLR(one, 0.9)]),
            "list of mappings": [{"optimizer": one}],
            "nothing": None,
            "several": [one, torch.optim.Adam(self.parameters())],
        }
        return forms[self.what]


@pytest.mark.parametrize("what", ["list", "two lists", "list of mappings"])
def test_forms_of_one_optimizer(what: str) -> None:
    schedule = "ExponentialLR" if what == "two lists" else None
    rec = suggest_lr(Returning(what), classification(), max_gradients=BUDGET)
    assert values(rec) == values(plain(Classifier(), classification(), schedule=schedule))


class OwnClipping(Classifier):
    def configure_gradient_clipping(self, *arguments: Any, **options: Any) -> None:
        pass


class Drawing(Classifier):
    def training_step(self, dataloader_iter: Any) -> torch.Tensor:  # type: ignore[override]
        raise AssertionError("not called")


class Skipping(Classifier):
    def training_step(self, batch: Any) -> None:  # type: ignore[override]
        return None


LOADER = DataLoader(TensorDataset(torch.zeros(4, 8), torch.zeros(4, dtype=torch.long)), batch_size=2)


@pytest.mark.parametrize(
    ("module", "data", "trainer", "fragment"),
    [
        (lambda: Returning("manual"), None, {}, "automatic_optimization=False"),
        (lambda: Returning("several"), None, {}, "returned SGD, Adam: a learning rate is suggested for one"),
        (lambda: Returning("nothing"), None, {}, "returned nothing"),
        (mlp, None, {}, "Sequential without training_step"),
        (Classifier, "no data", {}, "no data: Classifier has no train_dataloader"),
        (Classifier, [LOADER, LOADER], {}, r"several loaders \(list\)"),
        (Classifier, {"a": LOADER, "b": LOADER}, {}, r"several loaders \(dict\)"),
        (Classifier, None, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "changes the direction"),
        (Classifier, None, {"precision": "64-true"}, "precision='64-true' converts"),
        (OwnClipping, None, {}, "configure_gradient_clipping"),
        (Drawing, None, {}, "dataloader_iter"),
        (Skipping, None, {}, "training_step returned a NoneType"),
    ],
)
def test_refusals(module: Any, data: Any, trainer: dict[str, Any], fragment: str) -> None:
    made_module = module()
    before = snapshot(made_module)
    given = classification() if data is None else None if data == "no data" else data
    with pytest.raises(InvalidArgumentError, match=fragment):
        suggest_lr(made_module, given, trainer=made(**trainer), max_gradients=BUDGET)
    assert same(before, snapshot(made_module))


def test_a_module_that_cannot_be_copied_is_refused() -> None:
    module = Classifier()
    module.generator = (i for i in range(3))
    with pytest.raises(InvalidArgumentError, match=r"cannot be copied.*generator"):
        suggest_lr(module, classification(), max_gradients=BUDGET)


def test_strict_and_progress_reach_the_measurement() -> None:
    stages: list[str] = []
    with pytest.raises(NotConvergedError):
        suggest_lr(
            Classifier(),
            classification()[0],
            max_gradients=BUDGET,
            strict=True,
            progress=lambda stage, *_: stages.append(stage),
        )
    assert stages


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 3}, 6),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, 3),
        ({"max_epochs": 3, "limit_train_batches": 1}, 3),
        ({"max_epochs": 4, "limit_train_batches": 0.5}, 4),
        ({"max_epochs": 3, "max_steps": 5}, 5),
        ({"max_epochs": -1, "max_steps": 5}, 5),
        ({"max_epochs": -1}, None),
    ],
)
def test_length_as_lightning_counts_it(options: dict[str, Any], steps: int | None) -> None:
    trainer = made(**options)
    assert find_num_steps(trainer, LOADER) == steps
    if steps is not None:
        module = Classifier()
        trainer.fit(module, LOADER)
        assert trainer.global_step == steps

"""Batches of unequal size are the concatenated data: losses, gradients and Hessians, for every way of counting."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyntune
from dyntune.objective.objective import Objective
from tests.objective.oracle import dense_hessian, relative_error
from tests.objective.zoo import classes, made, mlp, rows

SPLITS = {"60+4": (60, 4), "4+1": (4, 1), "6+6+4": (6, 6, 4), "1+1+1": (1, 1, 1)}
# float32: two orders of the same sums, weighted; the bound asked for is 1e-6. float64: the same with its epsilon.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
WEIGHT = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)


def cut(data: tuple[torch.Tensor, ...], sizes: tuple[int, ...]) -> list[tuple[torch.Tensor, ...]]:
    return list(zip(*(t.split(sizes) for t in data), strict=True))


def ignoring(labels: torch.Tensor, value: int) -> torch.Tensor:
    """A third of the labels, unevenly spread, replaced; the last one of each split stays."""
    labels = labels.clone()
    labels[: len(labels) // 2 : 2] = value
    return labels


@pytest.mark.parametrize("options", [{}, {"memory_limit": 1}, {"method": "finite-difference"}])
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_the_hessian_of_a_split_is_that_of_the_whole(sizes, options):
    model = mlp().double()
    whole = rows(sum(sizes), 4).double(), classes(sum(sizes))
    found = dyntune.hessian(model, cut(whole, sizes), criterion=nn.CrossEntropyLoss(), **options)
    truth = dense_hessian(model, whole, lambda call, data: F.cross_entropy(call(data[0]), data[1]))
    exact = found.engine != "finite-difference"
    # Finite differences in float64 are within 1e-9 (their own test); a wrong weight is off by percents.
    assert relative_error(found.to_dense(), truth) < (TOLERANCE[torch.float64] if exact else 1e-9)


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_in_float32(sizes):
    model = mlp()
    whole = rows(sum(sizes), 4), classes(sum(sizes))
    parts, one = (
        dyntune.hessian(model, batches, criterion=nn.CrossEntropyLoss()) for batches in (cut(whole, sizes), whole)
    )
    assert relative_error(parts.to_dense(), one.to_dense().double()) < TOLERANCE[torch.float32]


SOFT = torch.softmax(rows(16, 3, seed=4).double(), 1)
REAL = rows(16, 3, seed=5).double()
BINARY = (REAL > 0).double()
LABELS = classes(16)

CRITERIA: dict[str, tuple[Callable[..., torch.Tensor], torch.Tensor]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), LABELS),
    "ignore_index": (nn.CrossEntropyLoss(), ignoring(LABELS, -100)),
    "ignore_index beyond the classes": (nn.CrossEntropyLoss(ignore_index=255), ignoring(LABELS, 255)),
    "ignore_index that is a class": (nn.CrossEntropyLoss(ignore_index=1), LABELS),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), LABELS),
    "class weights, ignore_index": (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=255), ignoring(LABELS, 255)),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), ignoring(LABELS, -100)),
    "label smoothing, class weights": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2), ignoring(LABELS, -100)),
    "class probabilities": (nn.CrossEntropyLoss(), SOFT),
    "class probabilities, class weights": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), SOFT),
    "functional": (F.cross_entropy, ignoring(LABELS, -100)),
    "partial": (functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=255), ignoring(LABELS, 255)),
    "multi-label": (nn.MultiLabelSoftMarginLoss(), BINARY),
    "mean squared error": (nn.MSELoss(), REAL),
    "huber": (nn.HuberLoss(delta=0.5), REAL),
    "smooth l1": (F.smooth_l1_loss, REAL),
    "binary cross-entropy": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)), BINARY),
    "poisson": (nn.PoissonNLLLoss(), BINARY),
    "soft margin": (nn.SoftMarginLoss(), 2 * BINARY - 1),
    "hinge embedding": (nn.HingeEmbeddingLoss(), 2 * BINARY - 1),
    "kl, mean": (nn.KLDivLoss(reduction="mean"), SOFT),
    "kl, batchmean": (nn.KLDivLoss(reduction="batchmean"), SOFT),
    "a lambda over rows": (lambda outputs, targets: (outputs - targets).square().sum(1).mean(), REAL),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")  # torch on KLDivLoss
@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_on_parts_equals_itself_on_the_whole(name):
    criterion, targets = CRITERIA[name]
    model = mlp().double()
    whole = rows(16, 4).double(), targets
    objective = Objective(model, cut(whole, (6, 6, 4)), criterion=criterion)
    loss = criterion(model(whole[0]), targets)
    assert objective.loss() == pytest.approx(loss.item(), rel=1e-14)  # a few roundings of float64
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(objective.gradient(), gradient, strict=True):
        assert relative_error(a, b) < TOLERANCE[torch.float64]
    found = dyntune.hessian(model, cut(whole, (6, 6, 4)), criterion=criterion).to_dense()
    truth = dense_hessian(model, whole, lambda call, data: criterion(call(data[0]), data[1]))
    assert torch.linalg.norm(found - truth) <= TOLERANCE[torch.float64] * torch.linalg.norm(truth)


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(reduction="sum", weight=WEIGHT, ignore_index=255),
        functools.partial(F.cross_entropy, reduction="sum", weight=WEIGHT, ignore_index=255),
    ],
    ids=["module", "partial"],
)
@pytest.mark.parametrize("options", [{}, {"memory_limit": 1}])
def test_a_sum_is_added_up(criterion, options):
    model = mlp().double()
    whole = rows(16, 4).double(), ignoring(LABELS, 255)
    found = dyntune.hessian(model, cut(whole, (6, 6, 4)), criterion=criterion, **options)
    truth = dense_hessian(model, whole, lambda call, data: criterion(call(data[0]), data[1]))
    assert relative_error(found.to_dense(), truth) < TOLERANCE[torch.float64]
    assert found.objective.loss() == pytest.approx(criterion(model(whole[0]), whole[1]).item(), rel=1e-14)
    assert ", sum over " in found.objective.describe()["loss"]


def test_a_sum_loss_may_have_a_batch_in_which_nothing_counts():
    """Unlike a mean, its sum is defined: zero."""
    model, (x, y) = mlp().double(), (rows(6, 4).double(), classes(6))
    criterion = nn.CrossEntropyLoss(reduction="sum")
    ignored = (x[:2], torch.full((2,), -100))
    with_it, without = (dyntune.hessian(model, b, criterion=criterion) for b in ([(x, y), ignored], (x, y)))
    assert torch.equal(with_it.to_dense(), without.to_dense())


def test_sequences_of_different_lengths_are_weighted_by_elements():
    """Rows of different length cannot be concatenated; the mean over elements is still one mean."""
    model = mlp().double()
    batches = [
        (rows(2, 5, 4, seed=1).double(), rows(2, 5, 3, seed=2).double()),
        (rows(3, 1, 4, seed=3).double(), rows(3, 1, 3, seed=4).double()),
    ]
    found = dyntune.hessian(model, batches, criterion=nn.MSELoss())

    def mean(call: Callable[..., Any], data: Any) -> torch.Tensor:
        squares = [(call(x) - y).square().reshape(-1) for x, y in data]
        return torch.cat(squares).mean()

    assert relative_error(found.to_dense(), dense_hessian(model, batches, mean)) < TOLERANCE[torch.float64]
    assert found.objective.describe()["count_unit"] == "elements"


def test_pixels_that_do_not_count():
    """Segmentation: (N, classes, H) logits and (N, H) labels."""
    model = made(lambda: nn.Conv1d(2, 3, 1)).double()
    batches = [
        (rows(n, 2, 5, seed=n).double(), ignoring(classes(n, 5, seed=n).flatten(), 255).view(n, 5)) for n in (3, 1)
    ]
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    found = dyntune.hessian(model, batches, criterion=criterion)
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    truth = dense_hessian(model, whole, lambda call, data: criterion(call(data[0]), data[1]))
    assert relative_error(found.to_dense(), truth) < TOLERANCE[torch.float64]


def test_a_loss_of_the_users_own_brings_its_count():
    model = mlp().double()
    whole = rows(16, 4).double(), ignoring(LABELS, -100)

    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> dyntune.Loss:
        x, y = batch
        return dyntune.Loss(F.cross_entropy(model(x), y), count=(y != -100).sum())

    found = dyntune.hessian(model, cut(whole, (6, 6, 4)), loss_fn)
    truth = dense_hessian(model, whole, lambda call, data: F.cross_entropy(call(data[0]), data[1]))
    assert relative_error(found.to_dense(), truth) < TOLERANCE[torch.float64]


def test_counts_may_be_numbers_or_tensors_of_any_size():
    model, y = mlp().double(), classes(4)
    batches = [(rows(4, 4, seed=s).double(), y, {"count": c}) for s, c in enumerate((3e9, torch.tensor(1e9)))]

    def loss_fn(model: nn.Module, batch: Any) -> dyntune.Loss:
        return dyntune.Loss(F.cross_entropy(model(batch[0]), batch[1]), count=batch[2]["count"])

    truth = sum(
        share * dense_hessian(model, batch[:2], lambda call, data: F.cross_entropy(call(data[0]), data[1]))
        for share, batch in zip((0.75, 0.25), batches, strict=True)
    )
    assert relative_error(dyntune.hessian(model, batches, loss_fn).to_dense(), truth) < TOLERANCE[torch.float64]


class TinyForCausalLM(nn.Module):
    """A stand-in for a Hugging Face decoder: shifts the labels itself and returns an object with .loss and .logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.out(torch.tanh(self.embed(input_ids)))
        output = Output(logits=logits)
        if labels is not None:
            output["loss"] = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return output


class Output(dict):
    """ModelOutput: a dictionary with attributes; an absent entry is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)


def tokens(count: int, seed: int) -> dict[str, torch.Tensor]:
    ids = classes(count, 6, high=7, seed=seed)
    labels = ids.clone()
    labels[:, 0] = 3  # never a target: it is shifted out
    labels[: count // 2, 1 + seed % 3 :] = -100
    return {"input_ids": ids, "labels": labels}


def test_a_causal_lm_is_weighted_by_shifted_labels():
    model = made(TinyForCausalLM).double()
    batches = [tokens(5, 0), tokens(2, 1), tokens(1, 2)]
    found = dyntune.hessian(model, batches)

    def mean(call: Callable[..., Any], data: Any) -> torch.Tensor:
        logits = torch.cat([call(b["input_ids"])["logits"][:, :-1].flatten(0, 1) for b in data])
        return F.cross_entropy(logits, torch.cat([b["labels"][:, 1:].flatten() for b in data]))

    assert relative_error(found.to_dense(), dense_hessian(model, batches, mean)) < TOLERANCE[torch.float64]
    record = found.objective.describe()
    assert record["loss"] == "the model's own .loss, mean over shifted labels that are not -100"
    assert record["count_unit"] == "shifted labels that are not -100"


@pytest.mark.parametrize(
    ("name", "decoder", "shifted"),
    [
        ("GPT2LMHeadModel", True, True),
        ("PeftModelForCausalLM", True, True),
        ("BartForCausalLM", False, False),
        ("BertForMaskedLM", True, False),
    ],
)
def test_who_shifts_labels(name, decoder, shifted):
    kind = type(name, (TinyForCausalLM,), {"config": type("Config", (), {"is_encoder_decoder": not decoder})})
    rule = Objective(made(kind), tokens(4, 0)).rule
    assert rule.unit.startswith("shifted ") is shifted


def test_labels_that_are_real_numbers_count_by_rows():
    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": F.mse_loss(self.out(x).squeeze(1), labels)}

    model = made(Regression).double()
    whole = {"x": rows(7, 4).double(), "labels": rows(7, seed=1).double()}
    parts = [{k: v[:5] for k, v in whole.items()}, {k: v[5:] for k, v in whole.items()}]
    found = dyntune.hessian(model, parts).to_dense()
    assert relative_error(found, dyntune.hessian(copy.deepcopy(model), whole).to_dense()) < TOLERANCE[torch.float64]

"""loss_fn or criterion: what each is taken for, what it may return, what the record says."""

from __future__ import annotations

import functools
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyntune
from dyntune.errors import AmbiguousLossError, BatchError, InvalidArgumentError
from dyntune.objective.objective import Objective
from tests.objective.zoo import made, mlp, rows

X, Y = rows(6, 4), torch.arange(6) % 3
MODEL = mlp()
TRUTH = F.cross_entropy(MODEL(X), Y).item()


def objective(batch=(X, Y), loss_fn=None, model=MODEL, **options) -> Objective:
    return Objective(model, batch, loss_fn, **options)


def by_hand(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


SAME = {
    "loss_fn": {"loss_fn": by_hand},
    "loss_fn, Loss": {"loss_fn": lambda m, b: dyntune.Loss(by_hand(m, b), count=6)},
    "loss_fn, shape (1,)": {"loss_fn": lambda m, b: by_hand(m, b).reshape(1)},
    "loss_fn, callable object": {"loss_fn": functools.partial(by_hand)},
    "criterion module": {"criterion": nn.CrossEntropyLoss()},
    "criterion function": {"criterion": F.cross_entropy},
    "criterion partial": {"criterion": functools.partial(F.cross_entropy, label_smoothing=0.0)},
    "criterion of one's own": {"criterion": lambda outputs, targets: F.cross_entropy(outputs, targets)},
    "torch module as loss_fn": {"loss_fn": nn.CrossEntropyLoss()},
    "torch function as loss_fn": {"loss_fn": F.cross_entropy},
    "torch partial as loss_fn": {"loss_fn": functools.partial(F.cross_entropy, ignore_index=-1)},
    "partial of a partial": {"loss_fn": functools.partial(functools.partial(F.cross_entropy, ignore_index=-1))},
    "neither": {},
}


@pytest.mark.parametrize("options", SAME.values(), ids=SAME)
def test_all_say_the_same(options):
    # float32 rounding of one mean
    assert objective(**options).loss() == pytest.approx(TRUTH, rel=1e-6)


class Smoothed(nn.CrossEntropyLoss):
    """A subclass counts like its torch ancestor."""


ASSUMED = {
    "loss_fn": ({"loss_fn": by_hand}, "loss_fn returns a mean over rows", "rows"),
    "cross-entropy": (
        {"criterion": nn.CrossEntropyLoss()},
        "CrossEntropyLoss(model(inputs), targets), mean over targets that are not ignore_index",
        "targets that are not ignore_index",
    ),
    "subclass": (
        {"criterion": Smoothed()},
        "Smoothed(model(inputs), targets), mean over targets that are not ignore_index",
        "targets that are not ignore_index",
    ),
    "weighted": (
        {"loss_fn": functools.partial(F.cross_entropy, weight=torch.ones(3))},
        "cross_entropy(model(inputs), targets), mean over targets that are not ignore_index, weighted by class",
        "targets that are not ignore_index, weighted by class",
    ),
    "sum": (
        {"criterion": nn.CrossEntropyLoss(reduction="sum")},
        "CrossEntropyLoss(model(inputs), targets), sum over targets that are not ignore_index",
        "targets that are not ignore_index",
    ),
    "one's own": (
        {"criterion": lambda outputs, targets: F.cross_entropy(outputs, targets)},
        "<lambda>(model(inputs), targets), mean over rows",
        "rows",
    ),
}


@pytest.mark.parametrize(("options", "assumed", "unit"), ASSUMED.values(), ids=ASSUMED)
def test_the_record_says_what_was_assumed(options, assumed, unit):
    assert objective(**options).describe() == {
        "loss": assumed,
        "count_unit": unit,
        "num_batches": 1,
        "num_rows": 6,
        "mode": "train",
        "num_parameters": 43,
    }


def test_a_function_that_only_has_the_name_of_a_torch_loss_counts_rows():
    def cross_entropy(outputs, targets):
        return (outputs.sum(1) - targets).square().mean()

    assert objective(criterion=cross_entropy).describe()["count_unit"] == "rows"


def test_the_record_names_the_mode():
    model = mlp().eval()
    assert objective(model=model).describe()["mode"] == "eval"


# -- where inputs and targets come from --------------------------------------------------------------------------------

Pair = namedtuple("Pair", "x y")


class Keywords(nn.Module):
    """Takes its inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x, scale=1.0):
        return self.inner(x) * scale


@pytest.mark.parametrize(
    ("batch", "model"),
    [
        ((X, Y), MODEL),
        ([X, Y], MODEL),
        (Pair(X, Y), MODEL),
        *[({"x": X, key: Y}, Keywords()) for key in ("labels", "targets", "target", "label", "y")],
        ({"x": X, "scale": torch.ones(1), "labels": Y}, Keywords()),
        ([[[X, torch.ones(1)], Y]], Keywords()),
        ([({"x": X}, Y)], Keywords()),
    ],
)
def test_a_criterion_finds_inputs_and_targets(batch, model):
    assert objective(batch, criterion=nn.CrossEntropyLoss(), model=model).loss() == pytest.approx(TRUTH, rel=1e-6)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X, "a criterion needs a batch .inputs, targets.; this one is Tensor. Pass loss_fn=lambda model, batch"),
        ((X, X, Y), "this one is 3 elements"),
        ([X], "this one is 1 elements"),
        ({"x": X}, r"a mapping with keys \['x'\], none of them 'labels' or 'targets'"),
    ],
)
def test_a_criterion_without_targets_is_refused(batch, message):
    with pytest.raises(BatchError, match=message):
        objective(batch, criterion=nn.CrossEntropyLoss(), model=Keywords())


class Wrapped(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.inner, self.wrap = mlp(), wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: SimpleNamespace(logits=logits, hidden=None),
        lambda logits: {"logits": logits, "hidden": None},
        lambda logits: (logits, "hidden"),
        lambda logits: [logits],
    ],
    ids=["attribute", "mapping", "tuple", "list"],
)
@pytest.mark.parametrize("options", [{"criterion": nn.CrossEntropyLoss()}, {}], ids=["criterion", "neither"])
def test_a_criterion_finds_the_output(wrap, options):
    assert objective(model=Wrapped(wrap), **options).loss() == pytest.approx(TRUTH, rel=1e-6)


@pytest.mark.parametrize("options", [{"criterion": nn.CrossEntropyLoss()}, {}], ids=["criterion", "neither"])
@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (lambda t: SimpleNamespace(scores=t), "SimpleNamespace"),
        (lambda t: {"scores": t}, "dict"),
        (lambda t: (), "tuple"),
    ],
)
def test_an_output_without_a_tensor_is_refused(wrap, kind, options):
    with pytest.raises(AmbiguousLossError, match=rf"returned a {kind}; a criterion needs one tensor. Pass loss_fn="):
        objective(model=Wrapped(wrap), **options)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_fn": by_hand, "criterion": nn.MSELoss()}, "both loss_fn and criterion were given: which one"),
        ({"loss_fn": nn.MSELoss(), "criterion": nn.MSELoss()}, "both loss_fn and criterion were given"),
        ({"loss_fn": "mse"}, r"loss_fn is a str; pass a callable \(model, batch\) -> scalar tensor"),
        ({"criterion": 0.5}, r"criterion is a float; pass a callable \(outputs, targets\)"),
        ({"criterion": nn.MSELoss}, r"criterion is the class MSELoss, not an instance: write criterion=MSELoss\(\)"),
        ({"loss_fn": nn.CrossEntropyLoss}, r"loss_fn is the class CrossEntropyLoss.*loss_fn=CrossEntropyLoss\(\)"),
        ({"criterion": nn.CrossEntropyLoss(reduction="none")}, "CrossEntropyLoss has reduction='none': a loss is one"),
        ({"loss_fn": functools.partial(F.cross_entropy, reduction="none")}, "cross_entropy has reduction='none'"),
        (
            {"loss_fn": lambda m, b: by_hand(m, b).item()},
            r"loss_fn returned a float; .*\(not \.item\(\)\), or dyntune\.L",
        ),
        ({"loss_fn": lambda m, b: None}, "loss_fn returned a NoneType"),
        ({"loss_fn": lambda m, b: (by_hand(m, b), {})}, "loss_fn returned a tuple"),
        ({"loss_fn": lambda m, b: m(b[0])}, r"loss_fn returned a tensor of shape \(6, 3\); a loss is one number"),
        ({"loss_fn": lambda m, b: dyntune.Loss(0.5, count=6)}, r"loss_fn's Loss\.value returned a float"),
        ({"loss_fn": lambda m, b: dyntune.Loss(m(b[0]), count=6)}, r"Loss\.value returned a tensor of shape \(6, 3\)"),
        (
            {"loss_fn": lambda m, b: dyntune.Loss(by_hand(m, b), count=-6)},
            "batch 0 has count -6.0: a mean is over a pos",
        ),
        ({"loss_fn": lambda m, b: dyntune.Loss(by_hand(m, b), count=float("nan"))}, "batch 0 has count nan"),
        ({"criterion": lambda o, t: F.cross_entropy(o, t).item()}, "criterion <lambda> returned a float"),
        (
            {"criterion": lambda o, t: F.cross_entropy(o, t, reduction="none")},
            r"<lambda> returned a tensor of shape \(6,",
        ),
    ],
)
def test_refused_with_the_remedy(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        objective(**options)


# -- losses that the model computes ------------------------------------------------------------------------------------


class OwnLoss(nn.Module):
    def __init__(self, wrap, *, targets: bool = True) -> None:
        super().__init__()
        self.inner, self.wrap, self.targets = mlp(), wrap, targets

    def forward(self, x, labels=None):
        outputs = self.inner(x)
        if self.targets:
            return self.wrap(None if labels is None else F.cross_entropy(outputs, labels), outputs)
        return self.wrap(outputs.square().mean(), outputs)


def attribute(loss, logits):
    return SimpleNamespace(loss=loss, logits=logits)


def mapping(loss, logits):
    return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("wrap", [attribute, mapping])
def test_the_outputs_own_loss(wrap):
    found = objective({"x": X, "labels": Y}, model=OwnLoss(wrap))
    assert found.loss() == pytest.approx(TRUTH, rel=1e-6)
    assert found.describe()["loss"] == "the model's own .loss, mean over labels that are not -100"


@pytest.mark.parametrize("wrap", [attribute, mapping])
@pytest.mark.parametrize("batch", [X, (X, Y)], ids=["tensor", "pair"])
def test_the_own_loss_of_a_model_that_needs_no_targets(wrap, batch):
    model = OwnLoss(wrap, targets=False)
    found = objective(batch, model=model)
    assert found.loss() == pytest.approx(model.inner(X).square().mean().item(), rel=1e-6)


def test_a_criterion_goes_before_the_outputs_own_loss():
    found = objective({"x": X, "labels": Y}, model=OwnLoss(attribute), criterion=nn.MultiMarginLoss())
    assert found.loss() == pytest.approx(F.multi_margin_loss(MODEL(X), Y).item(), rel=1e-6)


def test_an_own_loss_that_is_no_scalar_is_refused():
    model = OwnLoss(lambda loss, logits: SimpleNamespace(loss=logits))
    with pytest.raises(InvalidArgumentError, match=r"the model's output \.loss returned a tensor of shape \(6, 3\)"):
        objective({"x": X, "labels": Y}, model=model)


@pytest.mark.parametrize(
    ("batch", "model", "message"),
    [
        ({"x": X}, OwnLoss(attribute), r"the model's output \(SimpleNamespace\) has no \.loss\. Say which loss"),
        ({"x": X}, Keywords(), r"the model's output \(Tensor\) has no \.loss"),
        (X, MODEL, r"a tensor without targets, and the model's output \(Tensor\) has no \.loss"),
        ((X, X, Y), MODEL, r"no loss was given and the batch is not \(inputs, targets\)"),
        ((X, {"y": Y}), MODEL, r"the batch is not \(inputs, targets\)"),
        ((X, Y), made(lambda: nn.Bilinear(4, 4, 3)), r"model\(inputs\) failed: .*missing 1 required"),
    ],
)
def test_no_loss_at_all_is_refused(batch, model, message):
    with pytest.raises(AmbiguousLossError, match=message + r"(.|\n)*criterion=torch\.nn\.CrossEntropyLoss\(\)"):
        objective(batch, model=model)

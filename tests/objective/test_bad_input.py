"""Losses that have no curvature to measure: a typed error that says so, and a model that is as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyntune
from dyntune import errors
from dyntune.objective.objective import Objective
from tests.objective.oracle import relative_error
from tests.objective.snapshot import changes, snapshot
from tests.objective.zoo import made, rows

X, Y = rows(6, 4), torch.arange(6) % 3
NAN = X.clone()
NAN[2, 1] = float("nan")
IGNORED = torch.full((6,), -100)
CE = nn.CrossEntropyLoss()


def build() -> nn.Module:
    model = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.1), nn.Linear(5, 3)))
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    model[0].weight.grad = torch.ones(5, 4)
    return model


def without_gradient(model, batch):
    with torch.no_grad():
        return F.cross_entropy(model(batch[0]), batch[1])


def detached(model, batch):
    return F.cross_entropy(model(batch[0]).detach(), batch[1])


def constant(model, batch):
    return torch.ones((), requires_grad=True) * 2


def frees_its_graph(model, batch):
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


def infinite(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1]) / 0


CASES = {
    "nan in the inputs": (
        (NAN, Y),
        {"criterion": CE},
        errors.NonFiniteError,
        "the loss of batch 0 is nan.*inputs, the t",
    ),
    "nan in a later batch": (
        [(X, Y), (NAN, Y)],
        {"criterion": CE},
        errors.NonFiniteError,
        "the loss of batch 1 is nan",
    ),
    "infinite loss": ((X, Y), {"loss_fn": infinite}, errors.NonFiniteError, "the loss of batch 0 is inf"),
    "all targets ignored": (
        (X, IGNORED),
        {"criterion": CE},
        errors.EmptyBatchError,
        r"batch 0 has no terms that count \(targets that are not ignore_index\): its mean loss is undefined. Leave it",
    ),
    "all targets of a later batch ignored": (
        [(X, Y), (X, IGNORED)],
        {"criterion": CE},
        errors.EmptyBatchError,
        "batch 1 has no terms that count",
    ),
    "all class weights zero": (
        (X, Y),
        {"criterion": nn.CrossEntropyLoss(weight=torch.zeros(3))},
        errors.EmptyBatchError,
        "batch 0 has no terms that count",
    ),
    "count of zero": (
        (X, Y),
        {"loss_fn": lambda m, b: dyntune.Loss(F.cross_entropy(m(b[0]), b[1]), count=0)},
        errors.EmptyBatchError,
        "batch 0 has no terms that count",
    ),
    "no rows": ((X[:0], Y[:0]), {"criterion": CE}, errors.EmptyBatchError, "batch 0 has no rows"),
    "under no_grad": (
        (X, Y),
        {"loss_fn": without_gradient},
        errors.NoGradientError,
        r"computed under torch\.no_grad\(\)",
    ),
    "detached": ((X, Y), {"loss_fn": detached}, errors.NoGradientError, r"detached or \.item\(\) values"),
    "another graph": ((X, Y), {"loss_fn": constant}, errors.NoGradientError, "does not depend on the selected"),
    "a parameter itself, not selected": (
        (X, Y),
        {"loss_fn": lambda m, b: m[0].bias[0], "params": "unused"},
        errors.NoGradientError,
        "does not depend on the selected",
    ),
    "a parameter without a part in the loss": (
        (X, Y),
        {"criterion": CE, "params": "unused"},
        errors.NoGradientError,
        "or from other parameters than those selected",
    ),
    "an integer loss": (
        (X, Y),
        {"loss_fn": lambda m, b: (m(b[0]).argmax(1) == b[1]).sum()},
        errors.NoGradientError,
        "does not depend",
    ),
    "ambiguous": ((X, torch.zeros(6)), {}, errors.AmbiguousLossError, "do not determine one"),
    "one-shot": (iter([(X, Y)]), {"criterion": CE}, errors.OneShotIteratorError, "islice"),
    "nothing selected": ((X, Y), {"criterion": CE, "params": "x"}, errors.NoParametersError, "matches none"),
    "both losses": ((X, Y), {"criterion": CE, "loss_fn": detached}, errors.InvalidArgumentError, "both loss_fn and"),
}


@pytest.mark.parametrize(("batches", "options", "error", "message"), CASES.values(), ids=CASES)
def test_refused_and_nothing_changed(batches, options, error, message):
    model = build()
    before = snapshot(model)
    for measure in (dyntune.hessian, dyntune.hessian_eigenvalues, dyntune.sharpness):
        with pytest.raises(error, match=message):
            measure(model, batches, **options)
    assert changes(before, snapshot(model)) == []


def test_a_graph_that_the_loss_frees_is_explained():
    model = build()
    before = snapshot(model)
    operator = dyntune.hessian(model, (X, Y), frees_its_graph)
    with pytest.raises(errors.NoGradientError, match=r"calls backward\(\) itself.*backward\(retain_graph=True\)"):
        operator @ torch.ones(operator.numel)
    with pytest.raises(errors.NoGradientError, match=r"calls backward\(\) itself"):
        operator.objective.gradient()
    assert changes(before, snapshot(model)) == []


def steps(model, batch):
    loss = F.cross_entropy(model(batch[0]), batch[1])
    with torch.no_grad():
        model[3].bias.add_(0.1)
    return loss


def writes_through_data(model, batch):
    loss = F.cross_entropy(model(batch[0]), batch[1])
    model[3].bias.data.mul_(1.5)
    return loss


@pytest.mark.parametrize("loss_fn", [steps, writes_through_data])
def test_a_loss_that_writes_to_parameters_is_refused_before_it_does_harm(loss_fn):
    model = build()
    before = snapshot(model)
    message = r"the forward pass writes to parameter '3\.bias'.*Renormalise outside, or measure copy\.deepcopy\(model\)"
    with pytest.raises(errors.InvalidArgumentError, match=message):
        dyntune.hessian(model, (X, Y), loss_fn)
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("options", [{"criterion": CE}, {}], ids=["criterion", "neither"])
@pytest.mark.parametrize("frozen", [False, True])
def test_so_is_an_embedding_that_renormalises_itself(frozen, options):
    model = made(lambda: nn.Sequential(nn.Embedding(6, 4, max_norm=0.5), nn.Linear(4, 3)))
    model[0].weight.requires_grad_(not frozen)
    before = snapshot(model)
    with pytest.raises(errors.InvalidArgumentError, match=r"'0\.weight' \(an embedding with max_norm, perhaps\)"):
        dyntune.hessian(model, (torch.arange(6), Y), **options)
    assert changes(before, snapshot(model)) == []


def test_an_error_in_the_users_own_code_comes_through_as_it_is():
    model = build()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        dyntune.hessian(model, (X[:, :3], Y), criterion=CE)
    assert changes(before, snapshot(model)) == []


def linear(model, batch):
    """Linear in the last bias, which does not occur elsewhere."""
    return model[0](batch[0]).square().mean() + model[3].bias.sum()


@pytest.mark.parametrize("options", [{}, {"memory_limit": 1}, {"memory_limit": 0}, {"method": "finite-difference"}])
def test_a_loss_linear_in_some_parameters_has_zero_rows(options):
    batches = [(X, Y), (X, Y)] if options.get("memory_limit") else (X, Y)
    operator = dyntune.hessian(build(), batches, linear, params=["0.*", "3.bias"], **options)
    matrix = operator.to_dense()
    assert not matrix[-3:].any()
    if options.get("method") is None:
        assert not matrix[:, -3:].any()
    assert matrix[:-3, :-3].any()


@pytest.mark.parametrize("options", [{}, {"memory_limit": 0}, {"method": "finite-difference"}])
def test_a_loss_linear_in_everything_has_a_zero_hessian(options):
    operator = dyntune.hessian(build(), (X, Y), lambda m, b: m[3].bias.sum(), params="3.bias", **options)
    assert not operator.to_dense().any()
    assert float(dyntune.eigenvalues(operator, which="magnitude")) == 0.0


@pytest.mark.parametrize("options", [{}, {"memory_limit": 1}, {"memory_limit": 0}, {"method": "finite-difference"}])
def test_one_batch_of_several_may_leave_the_parameters_out(options):
    """A head that only some batches use."""

    def loss_fn(model, batch):
        head = model[3](batch[0][:, :1].expand(-1, 5))
        return F.cross_entropy(head, batch[1]) if len(batch[0]) == 6 else torch.zeros(())

    both = dyntune.hessian(build(), [(X, Y), (X[:2], Y[:2])], loss_fn, params="3.*", **options)
    one = dyntune.hessian(build(), (X, Y), loss_fn, params="3.*", **options)
    # 6 of 8 rows; the tolerance is that of finite differences in float32
    assert relative_error(both.to_dense(), one.to_dense().double() * 6 / 8) < 1e-3


SHAPES = {
    "too few tensors": lambda space: space.normal(0)[:-1],
    "another shape": lambda space: [t.T if t.dim() == 2 else t for t in space.normal(0)],
    "another order": lambda space: space.normal(0)[::-1],
}


@pytest.mark.parametrize("vector", SHAPES.values(), ids=SHAPES)
def test_vectors_of_another_shape_are_refused(vector):
    operator = dyntune.hessian(build(), (X, Y), criterion=CE, params=["0.*", "3.*"])
    with pytest.raises(
        errors.ShapeMismatchError, match=r"vector has tensors of shape .*the operator needs \[\(5, 4\), "
    ):
        operator.matvec(vector(operator.space))
    with pytest.raises(errors.ShapeMismatchError, match="Pass one tensor per parameter"):
        operator.objective.hvp(vector(operator.space))


@pytest.mark.parametrize("size", [0, 42, 44])
def test_flat_vectors_of_another_size_are_refused(size):
    operator = dyntune.hessian(build(), (X, Y), criterion=CE, params=["0.*", "3.*"])
    with pytest.raises(errors.ShapeMismatchError, match=f"a flat vector has {size} elements, the operator needs 43"):
        operator @ torch.ones(size)


def test_a_product_that_is_not_finite_is_refused():
    """A finite loss may have an infinite second derivative: sqrt at zero."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    operator = dyntune.hessian(model, torch.ones(3, 2), lambda m, x: (m(x).square().sum() + 0.0).sqrt())
    with pytest.raises(errors.NonFiniteError):
        dyntune.eigenvalues(operator)


def test_nothing_here_warns():
    """Refusals are errors, never warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(errors.DyntuneError):
            Objective(build(), (X, IGNORED), criterion=CE)
    assert seen == []

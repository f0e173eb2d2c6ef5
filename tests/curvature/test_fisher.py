"""The empirical Fisher matrix against explicit gradients of single rows in float64, on unequal batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dyntune
from dyntune.errors import HVPUnsupportedError, StaleOperatorError
from tests.objective.oracle import relative_error
from tests.objective.snapshot import snapshot
from tests.objective.zoo import ZOO, classes, mlp, rows

# float64 products with different orders of summation
ROUNDING = 1e-12


def flat_gradient(loss: torch.Tensor, model: nn.Module) -> torch.Tensor:
    parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([p.reshape(-1) for p in parts])


def row_gradients(model: nn.Module, batch: Sequence[torch.Tensor], criterion: Callable[..., Any]) -> torch.Tensor:
    """(rows, parameters): every row in a forward pass of its own."""
    x, y = batch
    with sdpa_kernel(SDPBackend.MATH):
        return torch.stack([flat_gradient(criterion(model(x[i : i + 1]), y[i : i + 1]), model) for i in range(len(x))])


def mean_of_outer_products(gradients: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return gradients.T @ (gradients * (counts / counts.sum())[:, None])


def cut(batch: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """Three unequal batches."""
    n = len(batch[0])
    return [tuple(t[a:b] for t in batch) for a, b in pairwise([0, 1, n // 2, n])]


@pytest.mark.parametrize("name", ["mlp", "sdpa", "checkpointed sdpa", "encoder, eval", "conv", "tied", "lstm"])
def test_equals_the_dense_matrix_on_unequal_batches(name: str) -> None:
    case = ZOO[name]().double()
    gradients = row_gradients(case.model, case.batch, case.criterion)
    truth = mean_of_outer_products(gradients, torch.ones(len(gradients)).double())
    whole = dyntune.empirical_fisher(case.model, case.batch, criterion=case.criterion)
    ragged = dyntune.empirical_fisher(case.model, cut(case.batch), criterion=case.criterion)
    assert relative_error(whole.to_dense(), truth) < ROUNDING
    assert relative_error(ragged.to_dense(), truth) < ROUNDING


WEIGHT = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(weight=WEIGHT),
        functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=1),
        nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.1),
    ],
    ids=["weights", "weights and ignored", "ignored"],
)
def test_rows_weigh_as_much_as_they_count(criterion: Any) -> None:
    """A class weight scales a row's share, not its gradient; rows that do not count at all are left out."""
    model, x, y = mlp().double(), rows(12, 4).double(), classes(12)
    weight = getattr(criterion, "weight", None)
    if isinstance(criterion, functools.partial):
        weight = WEIGHT
    ignored = criterion.keywords["ignore_index"] if isinstance(criterion, functools.partial) else criterion.ignore_index
    counts = (torch.ones(3).double() if weight is None else weight)[y] * (y != ignored)
    kept = counts > 0
    assert 0 < kept.sum() < 12
    gradients = row_gradients(model, (x[kept], y[kept]), criterion)
    truth = mean_of_outer_products(gradients, counts[kept])
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    found = dyntune.empirical_fisher(model, batches, criterion=criterion)
    assert relative_error(found.to_dense(), truth) < ROUNDING


def test_sequences_weigh_by_their_tokens() -> None:
    """A row is a sequence: the gradient of its mean over tokens, weighted by how many of them count."""
    case = ZOO["tied"]().double()
    x, y = case.batch
    y = y.clone()
    y[0, 1:], y[2, 3:], y[3] = -100, -100, -100
    gradients = row_gradients(case.model, (x[:3], y[:3]), case.criterion)
    truth = mean_of_outer_products(gradients, torch.tensor([1.0, 5.0, 3.0]).double())
    found = dyntune.empirical_fisher(case.model, [(x[:1], y[:1]), (x[1:], y[1:])], criterion=case.criterion)
    assert relative_error(found.to_dense(), truth) < ROUNDING


def test_a_summed_loss_gives_the_sum() -> None:
    model, batch = mlp().double(), (rows(12, 4).double(), classes(12))
    criterion = nn.CrossEntropyLoss(reduction="sum", weight=torch.tensor([0.5, 2.0, 1.0]).double())
    gradients = row_gradients(model, batch, criterion)
    found = dyntune.empirical_fisher(model, cut(batch), criterion=criterion)
    assert relative_error(found.to_dense(), gradients.T @ gradients) < ROUNDING


@pytest.mark.parametrize("count", [False, True], ids=["mean", "Loss"])
def test_a_loss_function_of_the_user_on_a_mapping(count: bool) -> None:
    """Outputs in a mapping with other entries, and a loss that torch does not have."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp().double()

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            z = self.inner(x)
            return {"mean": z[:, :2], "log_scale": z[:, 2:], "size": z.detach().norm(), "name": "two"}

    def loss_fn(m: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        out = m(batch["x"])
        terms = (out["mean"] - batch["y"]).square() * torch.exp(-out["log_scale"]) + out["log_scale"]
        return dyntune.Loss(terms.mean(), count=terms.numel()) if count else terms.mean()

    model, x, y = Two(), rows(9, 4).double(), rows(9, 2, seed=5).double()
    row_losses = [loss_fn(model, {"x": x[i : i + 1], "y": y[i : i + 1]}) for i in range(9)]
    values = [r.value if isinstance(r, dyntune.Loss) else r for r in row_losses]
    gradients = torch.stack([flat_gradient(v, model) for v in values])
    batches = [{"x": x[:2], "y": y[:2]}, {"x": x[2:], "y": y[2:]}]
    found = dyntune.empirical_fisher(model, batches, loss_fn)
    assert relative_error(found.to_dense(), gradients.T @ gradients / 9) < ROUNDING


def test_batchnorm_gives_the_gradients_that_rows_have_within_their_batch() -> None:
    case = ZOO["batchnorm"]().double()
    x, y = case.batch
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    losses = torch.cat([F.cross_entropy(case.model(a), b, reduction="none") for a, b in batches])
    gradients = torch.stack([flat_gradient(loss, case.model) for loss in losses])
    found = dyntune.empirical_fisher(case.model, batches, criterion=case.criterion)
    assert relative_error(found.to_dense(), gradients.T @ gradients / 12) < ROUNDING


def test_selected_parameters_give_a_block() -> None:
    case = ZOO["mlp"]().double()
    whole = dyntune.empirical_fisher(case.model, case.batch, criterion=case.criterion)
    block = dyntune.empirical_fisher(case.model, case.batch, criterion=case.criterion, params="2.*")
    assert block.names == ("2.weight", "2.bias")
    last = block.numel
    assert relative_error(block.to_dense(), whole.to_dense()[-last:, -last:]) < ROUNDING


# -- identities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "sdpa", "conv"])
def test_identities(name: str) -> None:
    """Trace, rank, and the covariance that is left when the mean gradient is taken out."""
    case = ZOO[name]().double()
    gradients = row_gradients(case.model, case.batch, case.criterion)
    dense = dyntune.empirical_fisher(case.model, cut(case.batch), criterion=case.criterion).to_dense()
    assert float(dense.trace()) == pytest.approx(float(gradients.square().sum(1).mean()), rel=ROUNDING)
    torch.testing.assert_close(dense, dense.T, rtol=0, atol=1e-14)  # a few rounding units of entries below 1
    values = torch.linalg.eigvalsh(dense)
    assert values[0] > -1e-14
    assert int((values > 1e-10 * values[-1]).sum()) <= len(gradients) < len(dense)
    mean = gradients.mean(0)
    assert torch.linalg.eigvalsh(dense - torch.outer(mean, mean))[0] > -1e-14


def test_closed_form_for_linear_regression() -> None:
    """l_i = (w.x_i - y_i)^2 has the gradient 2 r_i x_i."""
    x, y = rows(20, 4).double(), rows(20, 1, seed=3).double()
    model = nn.Linear(4, 1, bias=False).double()
    residual = (model(x) - y).detach()
    found = dyntune.empirical_fisher(model, cut((x, y)), criterion=nn.MSELoss())
    assert relative_error(found.to_dense(), 4 * (x * residual.square()).T @ x / 20) < ROUNDING


def test_over_the_model_s_own_labels_it_is_gauss_newton_and_over_the_data_s_it_is_not() -> None:
    """Martens (2020), arXiv:1412.1193, section 9.2: the Fisher information of a softmax is its Gauss-Newton matrix."""
    model, x = mlp().double(), rows(1, 4).double()
    chances = model(x).softmax(1)[0].detach()
    each = [
        dyntune.empirical_fisher(model, (x, torch.tensor([k])), criterion=nn.CrossEntropyLoss()).to_dense()
        for k in range(3)
    ]
    truth = dyntune.gauss_newton(model, (x, torch.tensor([0])), criterion=nn.CrossEntropyLoss()).to_dense()
    assert relative_error(sum(p * f for p, f in zip(chances, each, strict=True)), truth) < ROUNDING  # type: ignore[arg-type]
    assert relative_error(each[0], truth) > 0.1


def test_scale_of_the_loss_squares() -> None:
    model, batch = mlp().double(), (rows(12, 4).double(), classes(12))
    one = dyntune.empirical_fisher(model, batch, lambda m, b: F.cross_entropy(m(b[0]), b[1])).to_dense()
    three = dyntune.empirical_fisher(model, batch, lambda m, b: 3 * F.cross_entropy(m(b[0]), b[1])).to_dense()
    assert relative_error(three, 9 * one) < ROUNDING


def test_largest_eigenvalue_in_float32() -> None:
    case = ZOO["mlp"]()
    operator = dyntune.empirical_fisher(case.model, cut(case.batch), criterion=case.criterion)
    double = case.double()
    truth = row_gradients(double.model, double.batch, double.criterion)
    exact = float(torch.linalg.matrix_norm(truth, 2) ** 2 / len(truth))
    assert float(dyntune.eigenvalues(operator, rtol=1e-4)) == pytest.approx(exact, rel=1e-4)


# -- refusals ----------------------------------------------------------------------------------------------------------


def contrastive(model: nn.Module, batch: Any) -> torch.Tensor:
    z = model(batch[0])
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def regularised(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1]) + 0.01 * sum(p.square().sum() for p in model.parameters())


def slanted(model: nn.Module, batch: Any) -> torch.Tensor:
    """A term past the outputs that is zero here, and whose gradient is not."""
    slant = sum((p - p.detach()).sum() for p in model.parameters())
    return F.cross_entropy(model(batch[0]), batch[1]) + 0.1 * slant


def recurrent(model: nn.Module, batch: Any) -> torch.Tensor:
    hidden = model(batch[0])
    return F.cross_entropy(model(F.pad(hidden, (0, 1))), batch[1])


def flattened(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0].repeat(2, 1)), batch[1].repeat(2))


def squeezed(model: nn.Module, batch: Any) -> torch.Tensor:
    out = model(batch[0])[:, 0].squeeze()
    return sum((out[i] - 1) ** 2 for i in range(len(out))) / len(out)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (contrastive, "couples the rows"),
        (regularised, "regulariser"),
        (slanted, "does not pass through the rows"),
        (recurrent, "couples the rows"),
        (flattened, "no differentiable tensor with the batch's 12 rows"),
        (squeezed, "row 0 of the model's output alone"),
    ],
)
def test_losses_that_are_no_mean_over_rows_are_refused(loss_fn: Any, message: str) -> None:
    case = ZOO["mlp"]()
    operator = dyntune.empirical_fisher(case.model, case.batch, loss_fn)
    before = snapshot(case.model)
    with pytest.raises(HVPUnsupportedError, match=message):
        operator.matvec(operator.space.normal(0))
    assert snapshot(case.model) == before


def test_a_model_that_computes_its_own_loss_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.inner(inputs)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    x, y = ZOO["mlp"]().batch
    model = Own()
    with pytest.raises(HVPUnsupportedError, match="the model computes it inside"):
        dyntune.empirical_fisher(model, {"inputs": x, "labels": y}) @ torch.ones(43)
    outside = dyntune.empirical_fisher(
        model, {"inputs": x, "labels": y}, lambda m, b: F.cross_entropy(m(**b)["logits"], b["labels"])
    )
    inner = dyntune.empirical_fisher(model.inner, (x, y), criterion=nn.CrossEntropyLoss())
    assert relative_error(outside.to_dense(), inner.to_dense()) < 1e-6  # float32


def changed_between_products(operator: Any, results: list[Any]) -> None:
    with operator.session() as product:
        results.append(product(operator.space.normal(0)))
        with torch.no_grad():
            operator.objective.tensors[0].neg_()
        results.append(product(operator.space.normal(0)))


def test_a_changed_parameter_is_stale() -> None:
    case = ZOO["mlp"]()
    operator = dyntune.empirical_fisher(case.model, case.batch, criterion=case.criterion)
    results: list[Any] = []
    with pytest.raises(StaleOperatorError, match=r"'0\.weight' was changed while"):
        changed_between_products(operator, results)
    assert len(results) == 1  # the second product is not made


def test_nothing_moves() -> None:
    case = ZOO["batchnorm"]()
    before = snapshot(case.model)
    operator = dyntune.empirical_fisher(case.model, cut(case.batch)[1:], criterion=case.criterion)
    dyntune.eigenvalues(operator)
    assert snapshot(case.model) == before
    assert not case.model._forward_hooks


def test_dropout_is_the_same_in_every_product_and_follows_the_seed() -> None:
    model = nn.Sequential(mlp().double(), nn.Dropout(0.5)).double()
    batch = rows(12, 4).double(), classes(12)
    made = [
        dyntune.empirical_fisher(model, batch, criterion=nn.CrossEntropyLoss(), seed=seed).to_dense()
        for seed in (0, 0, 1)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])

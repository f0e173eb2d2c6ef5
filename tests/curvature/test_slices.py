"""Losses along lines: closed forms, the dense Hessian, relations between slices, and a model that stays as it was."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import dyntune
from dyntune.errors import CheckpointError, InvalidArgumentError, NonFiniteError, ShapeMismatchError
from dyntune.objective.objective import Objective
from tests.objective.oracle import dense_hessian
from tests.objective.snapshot import changes, snapshot
from tests.objective.zoo import ZOO, made, mlp, rows

CROSS = nn.CrossEntropyLoss()
BATCHES = [(rows(12, 4, seed=1), torch.arange(12) % 3), (rows(5, 4, seed=2), torch.arange(5) % 3)]  # unequal counts


def flat(model: nn.Module, seed: int = 0) -> torch.Tensor:
    return rows(sum(p.numel() for p in model.parameters()), seed=seed).to(next(model.parameters()).dtype)


def quadratic() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Linear regression in float64: the loss is a quadratic in the weights."""
    model = made(lambda: nn.Linear(6, 2)).double()
    return model, (rows(20, 6).double(), rows(20, 2, seed=3).double())


def double_mlp() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    return mlp().double(), [(x.double(), y) for x, y in BATCHES]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.norm(self.first(x))))


def trained_norm(seed: int) -> nn.Module:
    """With running statistics of its own."""
    model = made(Normed, seed)
    with torch.no_grad():
        model.norm.running_mean.copy_(rows(6, seed=seed + 5))
        model.norm.running_var.copy_(rows(6, seed=seed + 6).abs() + 0.5)
        model.norm.num_batches_tracked += 1 + seed
    return model


# -- along a direction -------------------------------------------------------------------------------------------------


def test_on_a_quadratic_the_slice_is_its_parabola():
    model, batch = quadratic()
    found = dyntune.loss_slice(model, batch, criterion=nn.MSELoss(), direction=flat(model), radius=3.0)
    # Losses and prediction are sums of some hundred terms of about the size of the largest loss.
    np.testing.assert_allclose(found.losses, found.predicted, rtol=0, atol=1e-13 * found.losses.max())
    assert found.reach(1e-9) == 3.0
    assert found.finite.all()


@pytest.mark.parametrize("num_points", [3, 9])
def test_slope_and_curvature_are_those_of_the_dense_derivatives(num_points):
    model, batches = double_mlp()
    v = flat(model)
    found = dyntune.loss_slice(
        model, batches, criterion=CROSS, direction=v, radius=0.1, num_points=num_points, method="exact"
    )

    def loss(call, data):
        return CROSS(torch.cat([call(x) for x, _ in data]), torch.cat([y for _, y in data]))

    truth = dense_hessian(model, batches, loss)
    assert found.curvature == pytest.approx(float(v @ truth @ v), rel=1e-12)
    gradient = torch.autograd.grad(loss(model, batches), list(model.parameters()))
    assert found.slope == pytest.approx(float(torch.cat([g.reshape(-1) for g in gradient]) @ v), rel=1e-12)
    assert found.loss == pytest.approx(float(loss(model, batches).detach()), rel=1e-14)


def test_every_loss_is_that_of_a_model_with_the_moved_weights():
    model, batches = double_mlp()
    v = flat(model)
    found = dyntune.loss_slice(model, batches, criterion=CROSS, direction=v, radius=0.7, num_points=5)
    for t, loss in zip(found.distances, found.losses, strict=True):
        moved = copy.deepcopy(model)
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()) + t * v, moved.parameters())
        # The points are formed by the same operations in float64; only the loss of t = 0 is taken elsewhere.
        assert loss == pytest.approx(Objective(moved, batches, criterion=CROSS).loss(), rel=1e-15)


def test_along_an_eigenvector_the_curvature_is_its_eigenvalue():
    model, batches = double_mlp()
    pairs = dyntune.hessian_eigenvalues(model, batches, criterion=CROSS, k=2, rtol=1e-6)
    for index in range(2):
        found = dyntune.loss_slice(model, batches, criterion=CROSS, direction=pairs, index=index, num_points=3)
        assert found.length == pytest.approx(1.0, rel=1e-12)
        # A Rayleigh quotient of the vector that the value was computed from.
        assert found.curvature == pytest.approx(pairs[index], rel=1e-10)
        assert f"λ = {pairs[index]:.4g}" in found.direction
        assert found.unit == "distance in the parameters"


def test_turning_the_direction_round_mirrors_the_slice():
    model, batches = double_mlp()
    one, other = (
        dyntune.loss_slice(model, batches, criterion=CROSS, direction=sign * flat(model), radius=0.5)
        for sign in (1, -1)
    )
    np.testing.assert_array_equal(one.losses, other.losses[::-1])
    assert one.slope == -other.slope
    assert one.curvature == pytest.approx(other.curvature, rel=1e-14)


def test_a_longer_direction_shrinks_the_axis():
    model, batches = double_mlp()
    one = dyntune.loss_slice(model, batches, criterion=CROSS, direction=flat(model), radius=0.5)
    other = dyntune.loss_slice(model, batches, criterion=CROSS, direction=4 * flat(model), radius=0.125)
    np.testing.assert_array_equal(one.losses, other.losses)  # a power of two changes no rounding
    assert other.slope == pytest.approx(4 * one.slope, rel=1e-13)
    assert other.curvature == pytest.approx(16 * one.curvature, rel=1e-13)
    assert other.length == pytest.approx(4 * one.length)


def test_a_scaled_loss_keeps_the_default_radius():
    model, batches = double_mlp()
    one = dyntune.loss_slice(model, batches, criterion=CROSS, direction=flat(model), num_points=3)
    other = dyntune.loss_slice(
        model, batches, criterion=lambda o, y: 8 * CROSS(o, y), direction=flat(model), num_points=3
    )
    np.testing.assert_allclose(other.distances, one.distances, rtol=1e-13)
    r = one.distances[-1]
    assert abs(one.slope) * r + 0.5 * abs(one.curvature) * r**2 == pytest.approx(one.loss, rel=1e-12)


def test_a_direction_may_be_flat_or_one_tensor_per_parameter_and_of_a_block():
    model, batches = double_mlp()
    v = flat(model)
    sizes = [p.numel() for p in model.parameters()]
    parts = [t.view_as(p) for t, p in zip(v.split(sizes), model.parameters(), strict=True)]
    options = {"criterion": CROSS, "radius": 0.3, "num_points": 3}
    whole = dyntune.loss_slice(model, batches, direction=v, **options)
    np.testing.assert_array_equal(dyntune.loss_slice(model, batches, direction=parts, **options).losses, whole.losses)
    block = dyntune.loss_slice(model, batches, direction=parts[2:], params="2.*", **options)
    padded = [torch.zeros_like(p) for p in parts[:2]] + parts[2:]
    np.testing.assert_array_equal(block.losses, dyntune.loss_slice(model, batches, direction=padded, **options).losses)


def test_losses_that_are_not_finite_are_kept_and_flagged():
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(1.0)
    # log of a negative number is NaN, of zero minus infinity
    found = dyntune.loss_slice(
        model,
        torch.ones(1, 1).double(),
        lambda m, x: m(x).log().mean(),
        direction=torch.ones(1),
        radius=2.0,
        num_points=9,
    )
    assert found.losses[2] == -math.inf
    assert np.isnan(found.losses[:2]).all()
    assert found.finite.tolist() == [False] * 3 + [True] * 6
    assert found.reach(10.0) < 1.0  # not beyond the first that is spoiled
    json.dumps(found.to_dict(), allow_nan=False)
    assert "3 not finite" in str(found)


def test_reach_is_where_a_cubic_term_has_grown_to_the_tolerance():
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
    # w^2 + w^3 at 0: the error |t|^3 is 10 % of t^2 at |t| = 0.1
    found = dyntune.loss_slice(
        model,
        torch.ones(1, 1).double(),
        lambda m, x: (m.weight**2 + m.weight**3).sum() + 0 * m(x).sum() + 1.0,
        direction=torch.ones(1),
        radius=0.5,
        num_points=101,
    )
    assert found.reach(0.1) == pytest.approx(0.1, abs=0.011)  # one grid step
    assert found.reach(0.3) == pytest.approx(0.3, abs=0.011)


def test_dropout_masks_are_the_same_at_every_point():
    model = made(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))).double().train()
    batches = [(x.double(), y) for x, y in BATCHES]
    found = dyntune.loss_slice(model, batches, criterion=CROSS, direction=flat(model), radius=1e-4, num_points=21)
    # With fresh masks neighbours would differ by much more than the prediction allows at this distance.
    np.testing.assert_allclose(found.losses, found.predicted, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_points": 4}, "odd"),
        ({"num_points": 1}, "odd"),
        ({"radius": 0.0}, "radius"),
        ({"radius": math.inf}, "radius"),
        ({"direction": torch.zeros(43)}, "zero"),
        ({"direction": torch.full((43,), math.nan)}, "NaN"),
        ({"direction": {"weight": torch.ones(1)}}, "loss_path"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    with pytest.raises(InvalidArgumentError, match=match):
        dyntune.loss_slice(mlp(), BATCHES, criterion=CROSS, **({"direction": torch.ones(43)} | options))


def test_a_direction_of_another_model_and_an_eigenvector_that_is_not_there_are_refused():
    with pytest.raises(ShapeMismatchError):
        dyntune.loss_slice(mlp(), BATCHES, criterion=CROSS, direction=torch.ones(7))
    pairs = dyntune.hessian_eigenvalues(mlp(), BATCHES, criterion=CROSS)
    with pytest.raises(InvalidArgumentError, match="index=1"):
        dyntune.loss_slice(mlp(), BATCHES, criterion=CROSS, direction=pairs, index=1)


def test_a_flat_loss_asks_for_a_radius():
    model = nn.Linear(1, 1, bias=False)
    with pytest.raises(InvalidArgumentError, match="Give a radius"):
        dyntune.loss_slice(model, torch.ones(1, 1), lambda m, x: 0 * m(x).sum() + 1, direction=torch.ones(1))


# -- between two states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_the_ends_have_the_losses_of_the_checkpoints_exactly(name, tmp_path):
    case, other = ZOO[name](), ZOO[name]()
    with torch.no_grad():
        for p in other.model.parameters():
            p.add_(0.1 * rows(p.numel()).view_as(p))
    torch.save(other.model.state_dict(), tmp_path / "other.pt")
    options = {"criterion": case.criterion, "num_points": 3, "method": "exact"}
    path = dyntune.loss_path(case.model, case.batch, end=tmp_path / "other.pt", **options)
    at = dict(zip(path.distances, path.losses, strict=True))
    assert at[0.0] == Objective(case.model, case.batch, criterion=case.criterion).loss()
    assert at[1.0] == Objective(other.model, case.batch, criterion=case.criterion).loss()
    assert at[0.0] != at[1.0]


def test_the_ends_are_exact_where_layers_have_a_faster_kernel_without_gradients():
    layer = made(lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")).eval()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    x, loss_fn = rows(8, 10, 32), lambda m, x: m(x).square().mean()
    path = dyntune.loss_path(layer, x, loss_fn, end=other.state_dict(), num_points=3, beyond=0.0)
    assert path.losses[0] == Objective(layer, x, loss_fn).loss()
    assert path.losses[-1] == Objective(other, x, loss_fn).loss()


def test_weights_stored_in_bfloat16_move_in_float32():
    stored, other = mlp(seed=1).bfloat16(), mlp(seed=2).bfloat16()
    wide, wide_other = copy.deepcopy(stored).float(), copy.deepcopy(other).float()
    options = {"criterion": CROSS, "num_points": 5}
    path = dyntune.loss_path(stored, BATCHES, end=other.state_dict(), **options)
    np.testing.assert_array_equal(
        path.losses, dyntune.loss_path(wide, BATCHES, end=wide_other.state_dict(), **options).losses
    )
    found = dyntune.loss_slice(stored, BATCHES, direction=flat(wide), radius=1e-2, **options)
    np.testing.assert_array_equal(
        found.losses, dyntune.loss_slice(wide, BATCHES, direction=flat(wide), radius=1e-2, **options).losses
    )


def test_on_a_quadratic_the_path_is_a_parabola_and_has_no_barrier():
    model, batch = quadratic()
    end = {name: p + 1.0 for name, p in model.state_dict().items()}
    path = dyntune.loss_path(model, batch, criterion=nn.MSELoss(), end=end, beyond=0.5)
    np.testing.assert_allclose(path.losses, path.predicted, rtol=0, atol=1e-13 * path.losses.max())
    assert path.barrier <= path.rounding
    assert path.length == pytest.approx(math.sqrt(14), rel=1e-14)
    assert path.distances[0] == -0.5
    assert path.distances[-1] == 1.5


def test_the_barrier_is_the_height_above_the_straight_line():
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(-1.0)
    end = {"weight": torch.ones(1, 1)}
    # (w^2 - 1)^2 between w = -1 and 1: both ends 0, in the middle 1
    double_well = lambda m, x: ((m(x) ** 2 - 1) ** 2).mean() + m.weight.sum() * 0.25  # noqa: E731
    path = dyntune.loss_path(model, torch.ones(1, 1).double(), double_well, end=end)
    assert path.barrier == pytest.approx(1.0, rel=1e-14)


def test_the_way_back_is_the_same_way():
    a, b = mlp(seed=1).double(), mlp(seed=2).double()
    batches = [(x.double(), y) for x, y in BATCHES]
    there = dyntune.loss_path(a, batches, criterion=CROSS, end=b.state_dict())
    back = dyntune.loss_path(a, batches, criterion=CROSS, start=b.state_dict(), end=a.state_dict())
    np.testing.assert_allclose(there.losses, back.losses[::-1], rtol=1e-13)
    assert there.barrier == pytest.approx(back.barrier, rel=1e-12)


def test_frozen_parameters_that_differ_move_too_and_enter_the_prediction():
    a, b = mlp(seed=1).double(), mlp(seed=2).double()
    batches = [(x.double(), y) for x, y in BATCHES]
    free = dyntune.loss_path(a, batches, criterion=CROSS, end=b.state_dict(), num_points=5)
    a[0].requires_grad_(False)
    frozen = dyntune.loss_path(a, batches, criterion=CROSS, end=b.state_dict(), num_points=5)
    np.testing.assert_allclose(frozen.losses, free.losses, rtol=1e-14)
    assert frozen.curvature == pytest.approx(free.curvature, rel=1e-12)
    assert not a[0].weight.requires_grad


def test_in_evaluation_mode_differing_statistics_are_refused_unless_asked_for():
    a, b = trained_norm(1).eval(), trained_norm(2).eval()
    with pytest.raises(CheckpointError, match=r"norm\.running_mean"):
        dyntune.loss_path(a, BATCHES, criterion=CROSS, end=b.state_dict())
    path = dyntune.loss_path(a, BATCHES, criterion=CROSS, end=b.state_dict(), buffers="interpolate", num_points=3)
    assert path.predicted is None
    assert path.reach() is None
    at = dict(zip(path.distances, path.losses, strict=True))
    assert at[0.0] == Objective(a, BATCHES, criterion=CROSS).loss()
    assert at[1.0] == Objective(b, BATCHES, criterion=CROSS).loss()
    middle = copy.deepcopy(a)
    state = {n: (t + b.state_dict()[n]) / 2 if t.is_floating_point() else t for n, t in a.state_dict().items()}
    middle.load_state_dict(state)
    assert at[0.5] == pytest.approx(Objective(middle, BATCHES, criterion=CROSS).loss(), rel=1e-6)  # float32
    only_norm_trains = trained_norm(1).eval()
    only_norm_trains.norm.train()
    dyntune.loss_path(only_norm_trains, BATCHES, criterion=CROSS, end=b.state_dict(), num_points=3)


def test_a_path_needs_two_ends_and_a_finite_start():
    model = mlp()
    with pytest.raises(InvalidArgumentError, match="same parameters"):
        dyntune.loss_path(model, BATCHES, criterion=CROSS, end=model.state_dict())
    with pytest.raises(CheckpointError, match=r"1 missing \('2\.bias'\)"):
        dyntune.loss_path(
            model, BATCHES, criterion=CROSS, end={n: p for n, p in mlp(seed=1).state_dict().items() if n != "2.bias"}
        )
    spoiled = {n: p * math.nan for n, p in model.state_dict().items()}
    with pytest.raises(NonFiniteError):
        dyntune.loss_path(model, BATCHES, criterion=CROSS, start=spoiled, end=model.state_dict())
    path = dyntune.loss_path(model, BATCHES, criterion=CROSS, end=spoiled, num_points=3, beyond=0.0)
    assert path.finite.tolist() == [True, False, False]
    assert path.barrier == math.inf


# -- what stays as it was ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nothing_of_the_model_changes(mode):
    model = made(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3)))
    model.train(mode == "train")
    for p in list(model.parameters())[::2]:
        p.grad = torch.ones_like(p)
    end = {n: t + 0.1 if t.is_floating_point() else t for n, t in model.state_dict().items()}
    before, kept = snapshot(model), copy.deepcopy(end)
    dyntune.loss_slice(model, BATCHES, criterion=CROSS, direction=flat(model), radius=1.0, num_points=3)
    dyntune.loss_path(model, BATCHES, criterion=CROSS, end=end, num_points=3, buffers="interpolate")
    assert changes(before, snapshot(model)) == []
    assert all(torch.equal(end[n], kept[n]) for n in end)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_changes_when_it_is_cut_short(error):
    model = made(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)))
    before = snapshot(model)

    def stop(done: int, loss: float) -> None:
        if done == 3:
            raise error

    with pytest.raises(error):
        dyntune.loss_path(
            model,
            BATCHES,
            criterion=CROSS,
            end=made(lambda: copy.deepcopy(model)).state_dict() | {"0.bias": torch.ones(6)},
            progress=stop,
        )
    with pytest.raises(error):
        dyntune.loss_slice(model, BATCHES, criterion=CROSS, direction=flat(model), radius=1.0, progress=stop)
    assert changes(before, snapshot(model)) == []


def test_the_record_survives_json():
    found = dyntune.loss_slice(mlp(), BATCHES, criterion=CROSS, direction=flat(mlp()), radius=0.5, num_points=3)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["losses"] == found.losses.tolist()
    assert data["record"]["num_rows"] == 17
    assert data["kind"] == "direction"

"""Intervals for the population's extreme eigenvalues: dense float64 oracles, coverage, bias, refusals."""

from __future__ import annotations

import json
import math
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, t
from torch import nn

import dyntune
from dyntune.curvature.preconditioned import PreconditionedOperator
from dyntune.curvature.sampling import End, Sample, halves, population_estimate, population_estimates
from dyntune.errors import InvalidArgumentError, NotConvergedError, RefusedError
from dyntune.records import Estimate, Status
from tests.objective.oracle import dense_hessian
from tests.objective.snapshot import snapshot
from tests.objective.zoo import ZOO, Case, call, classes, made, mlp, rows

ENDS: tuple[End, ...] = ("largest", "smallest")
COUNT = 400
BATCHES, ROWS = 8, 16


def cut(case: Case, *edges: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = case.batch
    return [(x[a:b], y[a:b]) for a, b in pairwise([0, *edges, len(x)])]


def dense_sample(hessians: Any, weights: Any, end: End) -> Sample:
    """The numbers that the interval is made of, by numpy."""
    place = -1 if end == "largest" else 0

    def extreme(part: Any) -> tuple[float, Any]:
        values, vectors = np.linalg.eigh(np.average(hessians[part], axis=0, weights=weights[part]))
        return float(values[place]), vectors[:, place]

    plain, top = extreme(slice(None))
    even, odd = slice(0, None, 2), slice(1, None, 2)
    held_out = np.empty(len(hessians))
    for searched, left in ((even, odd), (odd, even)):
        v = extreme(searched)[1]
        held_out[left] = [v @ h @ v for h in hessians[left]]
    return Sample(
        plain=plain, limit=plain, inside=np.array([top @ h @ top for h in hessians]), held_out=held_out, weights=weights
    )


def numbers(estimate: Estimate) -> list[float]:
    return [float(estimate), estimate.low, estimate.high]


def tight(operator: Any, **options: Any) -> dyntune.Eigenvalues:
    """Solves to rounding, whatever tolerance is asked for."""
    return dyntune.eigenvalues(operator, **options | {"rtol": 1e-11})


class TestDense:
    """The real function, its solves tightened, against dense matrices."""

    @pytest.mark.parametrize("name", ["mlp", "sdpa", "conv"])
    @pytest.mark.parametrize("preconditioner", [False, True], ids=["plain", "scaled"])
    def test_on_unequal_batches(self, name: str, preconditioner: bool) -> None:
        case = ZOO[name]().double()
        batches = cut(case, 1, 3, 4)
        operator = dyntune.hessian(case.model, batches, criterion=case.criterion)
        hessians = np.stack([dense_hessian(case.model, b, call(case)).numpy() for b in batches])
        scale = None
        if preconditioner:
            p = torch.linspace(0.5, 2.0, operator.numel, dtype=torch.float64)
            scale = operator.space.unflatten(p)
            hessians = hessians / np.sqrt(p.numpy()) / np.sqrt(p.numpy())[:, None]
        weights = np.array([len(x) for x, _ in batches], dtype=float)
        plain = tight(PreconditionedOperator(operator, scale), which="both")
        found = population_estimates(operator, plain, ENDS, tight, scale=scale, rtol=1e-2, unit="u")
        for end in ENDS:
            expected = population_estimate(dense_sample(hessians, weights, end), end)
            assert found[end].status is expected.status
            assert found[end].covers == "both"
            # Quadratic in a direction's error of about sqrt(1e-11), times Student's quantile of 1.5 to 3 degrees.
            tolerance = 1e-5 * float(np.abs(np.linalg.eigvalsh(hessians)).max())
            assert [found[end].low, found[end].high] == pytest.approx([expected.low, expected.high], abs=tolerance)
            if expected.value is not None:
                assert float(found[end]) == pytest.approx(expected.value, abs=tolerance)

    def test_a_sum_over_batches_is_that_many_times_the_mean_batch(self) -> None:
        case = ZOO["mlp"]().double()
        criterion = nn.CrossEntropyLoss(reduction="sum")
        batches = cut(case, 3, 5, 9)
        operator = dyntune.hessian(case.model, batches, criterion=criterion)
        one = Case(case.model, case.batch, criterion)
        hessians = np.stack([dense_hessian(case.model, b, call(one)).numpy() for b in batches])
        plain = tight(operator, which="largest")
        found = population_estimates(operator, plain, ["largest"], tight, rtol=1e-2, unit="u")["largest"]
        expected = population_estimate(dense_sample(4 * hessians, np.ones(4), "largest"), "largest")
        assert numbers(found) == pytest.approx(numbers(expected), rel=1e-5)

    def test_finite_differences_give_the_same(self) -> None:
        case = ZOO["mlp"]().double()
        batches = cut(case, 3, 5, 9)
        exact, differences = (
            dyntune.sharpness(case.model, batches, criterion=case.criterion, covers="both", method=method).lambda_max
            for method in ("exact", "finite-difference")
        )
        assert exact is not None
        assert differences is not None
        assert "finite-difference" in differences.method
        # Richardson's two central differences in float64 are good to about 1e-10; the solvers may stop a step apart.
        assert numbers(differences) == pytest.approx(numbers(exact), rel=1e-3)


class TestSharpness:
    def test_is_the_function_above_at_its_default_tolerance(self) -> None:
        case = ZOO["mlp"]().double()
        batches = cut(case, 2, 5, 7, 9)
        found = dyntune.sharpness(
            case.model, batches, criterion=case.criterion, quantities=("lambda_min", "lambda_max"), covers="both"
        )
        operator = dyntune.hessian(case.model, batches, criterion=case.criterion)
        spent = []

        def solve(*args: Any, **kwargs: Any) -> dyntune.Eigenvalues:
            pairs = dyntune.eigenvalues(*args, **kwargs, seed=0)
            spent.append(pairs.num_products)
            return pairs

        plain = solve(operator, which="both", rtol=1e-2)
        expected = population_estimates(operator, plain, ENDS, solve, rtol=1e-2, unit="loss / parameter^2")
        assert found.lambda_max == expected["largest"]
        assert found.lambda_min == expected["smallest"]
        assert found.lambda_max is not None
        whole, first, second = spent  # the halves have three and two of the five batches; four directions at the end
        assert (
            found.num_products == found.lambda_max.num_products == math.ceil(whole + (3 * first + 2 * second) / 5 + 4)
        )
        assert json.dumps(found.to_dict(), allow_nan=False)

    @pytest.mark.parametrize("name", ["batchnorm", "lstm", "tied"])
    def test_contains_the_numerical_interval_at_the_outer_end(self, name: str) -> None:
        """The solver's doubt is part of the interval, and so is the plain value itself."""
        case = ZOO[name]()
        batches = [case.batch] * 2 + cut(case, 2)
        options: dict[str, Any] = {"criterion": case.criterion, "quantities": ("lambda_max", "lambda_min")}
        plain = dyntune.sharpness(case.model, batches, **options).estimates
        found = dyntune.sharpness(case.model, batches, **options, covers="both").estimates
        assert found["lambda_max"].high >= plain["lambda_max"].high
        assert found["lambda_min"].low <= plain["lambda_min"].low
        for name, estimate in found.items():
            assert estimate.low <= float(plain[name]) <= estimate.high

    def test_scales_with_the_loss(self) -> None:
        case = ZOO["mlp"]().double()
        batches = cut(case, 2, 5, 7, 9)
        one, eight = (
            dyntune.sharpness(
                case.model, batches, lambda m, b, c=c: c * case.criterion(m(b[0]), b[1]), covers="both"
            ).lambda_max
            for c in (1.0, 8.0)
        )
        assert one is not None
        assert eight is not None
        assert numbers(eight) == pytest.approx([8 * x for x in numbers(one)], rel=1e-10)

    def test_equal_batches_leave_the_solvers_doubt_only(self) -> None:
        case = ZOO["mlp"]().double()
        found = dyntune.sharpness(case.model, [case.batch] * 4, criterion=case.criterion, covers="both").lambda_max
        truth = float(torch.linalg.eigvalsh(dense_hessian(case.model, case.batch, call(case)))[-1])
        assert found is not None
        # A half's direction may lose 5% of the curvature, the solver's bracket 1%; both directions are good here.
        assert found.low >= 0.95 * truth
        assert found.high <= 1.02 * truth
        assert float(found) == pytest.approx(truth, rel=0.02)

    def test_is_deterministic_and_moves_nothing(self) -> None:
        model = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 3)))
        case = Case(model.train(), (rows(12, 4), classes(12)), nn.CrossEntropyLoss())
        optimizer = torch.optim.Adam(model.parameters())
        case.criterion(model(case.batch[0]), case.batch[1]).backward()
        optimizer.step()
        before = snapshot(model)
        options: dict[str, Any] = {
            "criterion": case.criterion,
            "optimizer": optimizer,
            "quantities": ("lambda_max", "lambda_min", "preconditioned"),
            "covers": "both",
        }
        first = dyntune.sharpness(model, cut(case, 3, 6, 9), **options)
        assert snapshot(model) == before
        assert dyntune.sharpness(model, cut(case, 3, 6, 9), **options).estimates == first.estimates
        assert first.preconditioned is not None
        assert first.preconditioned.unit == "1 / learning rate"

    def test_batches_have_dropout_masks_of_their_own(self) -> None:
        """Batches of equal rows differ by their masks alone; the same masks for all would hide the spread."""
        model = made(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))).train()
        batches = [(rows(12, 4), classes(12))] * 4
        plain = dyntune.sharpness(model, batches, criterion=nn.CrossEntropyLoss()).lambda_max
        found = dyntune.sharpness(model, batches, criterion=nn.CrossEntropyLoss(), covers="both").lambda_max
        assert plain is not None
        assert found is not None
        assert found.high > 1.05 * plain.high


@cache
def draws(gap: bool, end: End) -> tuple[float, list[Sample]]:
    """Linear regression in 12 dimensions: a row's Hessian is x x^T (its negative for the other end)."""
    variances = np.ones(12)
    if gap:
        variances[0] = 3.0
    sign = 1 if end == "largest" else -1
    rng = np.random.default_rng([3, gap, sign + 1])
    samples = []
    for _ in range(COUNT):
        x = rng.standard_normal((BATCHES, ROWS, 12)) * np.sqrt(variances)
        hessians = sign * np.einsum("bri,brj->bij", x, x) / ROWS
        samples.append(dense_sample(hessians, np.ones(BATCHES), end))
    return sign * float(variances.max()), samples


class TestPopulation:
    @pytest.mark.parametrize("end", ENDS)
    @pytest.mark.parametrize("gap", [True, False], ids=["gap", "no gap"])
    def test_covers_at_its_level(self, gap: bool, end: End) -> None:
        """At least: where there is no gap, the bracket of the two estimates comes on top of the spread."""
        truth, samples = draws(gap, end)
        covered = sum(truth in population_estimate(s, end) for s in samples)
        assert covered >= binom.ppf(1e-3, COUNT, 0.95)

    def test_the_plain_interval_does_not(self) -> None:
        truth, samples = draws(False, "largest")
        quantile = t.ppf(0.975, BATCHES - 1)
        covered = sum(abs(s.plain - truth) <= quantile * s.inside.std(ddof=1) / math.sqrt(BATCHES) for s in samples)
        assert covered < 0.5 * COUNT

    @pytest.mark.parametrize("end", ENDS)
    def test_the_plain_estimate_is_biased_outward_and_the_correction_removes_it(self, end: End) -> None:
        truth, samples = draws(True, end)
        sign = math.copysign(1, truth)
        plain = np.array([sign * (s.plain - truth) for s in samples])
        found = [population_estimate(s, end) for s in samples]
        ours = np.array([sign * (float(e) - truth) for e in found])
        error = plain.std() / math.sqrt(COUNT)
        assert plain.mean() > 5 * error
        assert abs(ours.mean()) < 3.3 * error  # one in a thousand for an estimate without bias
        assert sum(e.status is Status.OK for e in found) > 0.9 * COUNT

    def test_without_a_gap_the_status_says_that_the_value_is_not_established(self) -> None:
        """The correction is too small there: the value stays too high, the interval holds."""
        truth, samples = draws(False, "largest")
        found = [population_estimate(s, "largest") for s in samples]
        assert np.mean([float(e) for e in found]) > 1.2 * truth
        assert sum(e.status is Status.UNCERTAIN for e in found) > 0.5 * COUNT  # below 0.1 with the gap, above
        assert "depend on which batches" in found[0].reason

    def test_held_out_curvature_never_exceeds_the_plain_eigenvalue(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(200):
            count = int(rng.integers(2, 8))
            raw = rng.standard_normal((count, 5, 5))
            s = dense_sample(raw + raw.transpose(0, 2, 1), rng.uniform(0.1, 2, count), "largest")
            assert np.average(s.held_out, weights=s.weights) <= s.plain + 1e-12 * abs(s.plain)

    def test_ends_mirror_each_other(self) -> None:
        rng = np.random.default_rng(1)
        raw = rng.standard_normal((6, 4, 4))
        hessians, weights = raw @ raw.transpose(0, 2, 1), rng.uniform(1, 2, 6)
        up = population_estimate(dense_sample(hessians, weights, "largest"), "largest")
        down = population_estimate(dense_sample(-hessians, weights, "smallest"), "smallest")
        assert numbers(up) == pytest.approx([-float(down), -down.high, -down.low], rel=1e-12)
        assert "upward, corrected by -" in up.method
        assert "downward, corrected by " in down.method
        assert "by -" not in down.method

    def test_correction_and_error_in_closed_form(self) -> None:
        """Equal weights: a third of the distance; Student's quantile for B - 1. Unequal ones: Kish's number."""
        inside, held_out = np.array([4.0, 6.0, 5.0, 5.0]), np.array([3.0, 5.0, 4.0, 4.0])
        sample = Sample(plain=5.0, limit=5.1, inside=inside, held_out=held_out, weights=np.full(4, 7.0))
        found = population_estimate(sample, "largest")
        half = t.ppf(0.975, 3) * math.sqrt(2 / 3) / 2
        assert numbers(found) == pytest.approx([5 - 1 / 3, 4 - half, 5.1 + half], rel=1e-12)
        w = np.array([3.0, 3.0, 3.0, 1.0])
        found = population_estimate(
            Sample(plain=5.0, limit=5.0, inside=inside, held_out=held_out, weights=w), "largest"
        )
        mean, count = w @ held_out / 10, 100 / 28
        half = t.ppf(0.975, count - 1) * math.sqrt((w**2 @ (held_out - mean) ** 2) / 100 * count / (count - 1))
        ratio = 6 / 4 + 4 / 6
        assert found.low == pytest.approx(mean - half, rel=1e-12)
        assert float(found) == pytest.approx((ratio * 5 + mean) / (1 + ratio), rel=1e-12)

    @pytest.mark.parametrize("weight", [1e-12, 1e-20])
    def test_two_batches_that_are_one(self, weight: float) -> None:
        """A batch with next to all the weight: no spread can be told from the other."""
        sample = Sample(plain=2.0, limit=2.0, inside=[2.0, 1.0], held_out=[2.0, 1.0], weights=[1.0, weight])
        found = population_estimate(sample, "largest")
        assert found.high > 1e9
        assert found.low < -1e9
        assert found.status is Status.UNCERTAIN

    def test_halves_are_disjoint_and_whole(self) -> None:
        for count in range(2, 9):
            even, odd = halves(count)
            assert sorted([*even, *odd]) == list(range(count))
            assert 0 <= len(even) - len(odd) <= 1


class TestRefusals:
    def test_one_batch(self) -> None:
        case = ZOO["mlp"]()
        found = dyntune.sharpness(case.model, case.batch, criterion=case.criterion, covers="both").lambda_max
        assert found is not None
        assert found.status is Status.ONE_BATCH
        assert math.isinf(found.high)
        assert "biased upward" in found.method
        with pytest.raises(NotConvergedError, match="one batch"):
            dyntune.sharpness(case.model, case.batch, criterion=case.criterion, covers="both", strict=True)

    def test_a_sign_that_held_out_batches_do_not_confirm(self) -> None:
        sample = Sample(
            plain=-0.1, limit=-0.1, inside=np.full(4, -0.1), held_out=np.array([0.1, 0.3, 0.2, 0.2]), weights=np.ones(4)
        )
        found = population_estimate(sample, "smallest")
        assert found.status is Status.REFUSED
        assert found.value is None
        assert found.low == pytest.approx(-0.1)
        assert found.high > 0.2
        assert 0.0 in found
        with pytest.raises(RefusedError, match="sign"):
            float(found)

    def test_an_interval_that_holds_zero(self) -> None:
        spread = np.array([-3.0, 5.0, -3.0, 5.0])
        found = population_estimate(
            Sample(plain=1.0, limit=1.0, inside=spread, held_out=spread, weights=np.ones(4)), "largest"
        )
        assert found.status is Status.UNCERTAIN
        assert "zero" in found.reason

    def test_a_budget_that_ran_out(self) -> None:
        case = Case(mlp(), (rows(48, 4), classes(48)), nn.CrossEntropyLoss())
        found = dyntune.sharpness(
            case.model, cut(case, 12, 24, 36), criterion=case.criterion, covers="both", max_products=2
        ).lambda_max
        full = dyntune.sharpness(case.model, cut(case, 12, 24, 36), criterion=case.criterion, covers="both").lambda_max
        assert found is not None
        assert full is not None
        assert found.status is Status.NOT_CONVERGED
        assert "2 products" in found.reason
        assert found.low <= full.low + 0.05 * abs(full.low)  # poorer directions lower it; 5% is the halves' tolerance
        assert found.high >= float(full)

    def test_an_unknown_word(self) -> None:
        case = ZOO["mlp"]()
        with pytest.raises(InvalidArgumentError, match=r"covers='sampling'.*numerical.*both"):
            dyntune.sharpness(case.model, case.batch, criterion=case.criterion, covers="sampling")  # type: ignore[arg-type]

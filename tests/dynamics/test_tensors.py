"""Statistics of tensors against double precision by hand, in shards, and on the optimizers of torch."""

from __future__ import annotations

import math

import pytest
import torch

from dyntune.dynamics import tensors as module
from dyntune.dynamics.tensors import STATISTICS, SecondMoments, second_moments, tensor_sums
from dyntune.errors import InvalidArgumentError, ShapeMismatchError

SHAPES = ((30, 20), (7,), (2, 3, 4))
BETA1, BETA2, EPS, LR = 0.9, 0.99, 1e-3, 0.01


def drawn(seed, scale=1.0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(s, generator=generator) for s in shapes]


def by_hand(gradients, moments, now, before):
    """Rows as in STATISTICS, entry by entry in float64; moments already corrected."""
    rows = []
    for g, v, p, q in zip(gradients, moments, now, before, strict=True):
        g, v, p, q = (t.detach().double() for t in (g, v, p, q))
        norm = float(g.norm())
        rows.append(
            [
                norm,
                math.log(norm / math.sqrt(g.numel())),
                float((g**2 / torch.clamp(v, min=EPS**2)).mean().sqrt()),
                float((v.sqrt() < 10 * EPS).double().mean()),
                float((p - q).norm() / q.norm()),
            ]
        )
    return torch.tensor(rows).T


def trained(steps, scales, before_last=None):
    """Adam by hand in float64 beside torch's, on given gradients."""
    parameters = [torch.nn.Parameter(t) for t in drawn(0)]
    optimizer = torch.optim.Adam(parameters, lr=LR, betas=(BETA1, BETA2), eps=EPS)
    moments = [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    for step in range(1, steps + 1):
        gradients = drawn(step, scales(step))
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone()
        previous = [p.detach().clone() for p in parameters]
        if step == steps and before_last is not None:
            before_last(optimizer, parameters)
        optimizer.step()
        moments = [BETA2 * v + (1 - BETA2) * g.double() ** 2 for v, g in zip(moments, gradients, strict=True)]
    corrected = [v / (1 - BETA2**steps) for v in moments]
    return optimizer, parameters, previous, gradients, corrected


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_statistics_equal_adam_by_hand(steps):
    optimizer, parameters, previous, gradients, corrected = trained(steps, lambda step: 0.005 if step < steps else 0.05)
    moments = second_moments(optimizer, parameters, before_step=False)
    found = tensor_sums(gradients, moments=moments, parameters=parameters, previous=previous).statistics()
    expected = by_hand(gradients, corrected, parameters, previous)
    assert found.shape == (len(STATISTICS), len(SHAPES))
    # float32 entries and sums; the change is a difference of weights of size 1: 6e-8 beside steps of 0.01
    assert found[:4] == pytest.approx(expected[:4].numpy(), rel=1e-5, abs=1e-6)
    assert found[4] == pytest.approx(expected[4].numpy(), rel=1e-4)


def test_read_before_the_step_it_says_the_same():
    seen = {}

    def look(optimizer, parameters):
        seen["before"] = tensor_sums(
            [p.grad for p in parameters], moments=second_moments(optimizer, parameters, before_step=True)
        ).statistics()
        seen["told"] = second_moments(optimizer, parameters, before_step=True, steps=11).corrections

    optimizer, parameters, _, gradients, _ = trained(12, lambda step: 1.0, look)
    moments = second_moments(optimizer, parameters, before_step=False)
    after = tensor_sums(gradients, moments=moments).statistics()
    assert seen["before"][:4] == pytest.approx(after[:4].numpy(), rel=1e-5, abs=1e-6)
    assert seen["before"][4].isnan().all()
    uncounted = tensor_sums(gradients, moments=moments, below_eps=False).statistics()
    assert torch.equal(uncounted[:3], after[:3])
    assert uncounted[3].isnan().all()
    assert seen["told"] == pytest.approx(moments.corrections)


def test_first_step_has_staleness_one_and_a_jump_more():
    optimizer, parameters, _, gradients, _ = trained(1, lambda step: 1.0)
    moments = second_moments(optimizer, parameters, before_step=False)
    # entries below eps = 1e-3 count less than one: about one in 1250
    assert tensor_sums(gradients, moments=moments).statistics()[2] == pytest.approx(1.0, abs=1e-2)
    optimizer, parameters, _, gradients, _ = trained(50, lambda step: 1.0 if step < 50 else 30.0)
    moments = second_moments(optimizer, parameters, before_step=False)
    # g is 30 z, v is 1 + 0.025 * 900 z^2 on average: mean of 900 z^2 / (1 + 22.9 z^2) is 27, its root 5
    assert (tensor_sums(gradients, moments=moments).statistics()[2] > 3).all()


def test_half_of_the_share_is_the_median():
    v = torch.tensor([1.0, 2.0, 3.0, 40.0, 50.0]).square() * EPS**2
    for margin in (0.1, 1.0, 4.0, 20.0):
        moments = SecondMoments([margin**2 * v], [1.0], [EPS])
        share = float(tensor_sums([torch.ones(5)], moments=moments).statistics()[3, 0])
        below = float((margin**2 * v).sqrt().median()) < 10 * EPS
        assert (share > 0.5) == below


@pytest.mark.parametrize("limit", [1, 7, 100, 10_000])
def test_pieces_and_shards_change_nothing(limit, monkeypatch):
    optimizer, parameters, previous, gradients, _ = trained(5, lambda step: 1.0)
    moments = second_moments(optimizer, parameters, before_step=False)
    whole = tensor_sums(gradients, moments=moments, parameters=parameters, previous=previous)
    monkeypatch.setattr(module, "CHUNK_CPU", limit)
    cut = tensor_sums(gradients, moments=moments, parameters=parameters, previous=previous)
    assert cut.table == pytest.approx(whole.table.numpy(), rel=1e-6)

    def part(tensors, first):
        flat = [t.detach().reshape(-1) for t in tensors]
        return [t[: len(t) // 3] if first else t[len(t) // 3 :] for t in flat]

    halves = [
        tensor_sums(
            part(gradients, first),
            moments=SecondMoments(part(moments.values, first), moments.corrections, moments.eps),
            parameters=part(parameters, first),
            previous=part(previous, first),
        )
        for first in (True, False)
    ]
    assert (halves[0] + halves[1]).statistics() == pytest.approx(whole.statistics().numpy(), rel=1e-6, abs=1e-6)


def test_scaling_gradient_and_moment_together_moves_only_the_lengths():
    gradients, v = drawn(1), [t.square() + 1 for t in drawn(2)]
    one = tensor_sums(gradients, moments=SecondMoments(v, [1.0] * 3, [0.0] * 3)).statistics()
    scaled = SecondMoments([100 * t for t in v], [1.0] * 3, [0.0] * 3)
    other = tensor_sums([10 * g for g in gradients], moments=scaled).statistics()
    assert other[0] == pytest.approx(10 * one[0].numpy(), rel=1e-6)
    assert other[1] == pytest.approx(one[1].numpy() + math.log(10), rel=1e-5)
    assert other[2] == pytest.approx(one[2].numpy(), rel=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.Adam(p, foreach=True),
        lambda p: torch.optim.Adam(p, fused=True),
    ],
)
def test_optimizers_of_torch(make):
    parameters = [torch.nn.Parameter(t) for t in drawn(0)]
    optimizer = make(parameters)
    assert second_moments(optimizer, parameters, before_step=True) is None
    for step in range(3):
        for p, g in zip(parameters, drawn(step), strict=True):
            p.grad = g
        optimizer.step()
    moments = second_moments(optimizer, parameters, before_step=False)
    group = optimizer.param_groups[0]
    squares = [torch.stack([drawn(s)[i].double() ** 2 for s in range(3)]) for i in range(3)]
    if "alpha" in group:
        weights, correction = [0.99**2 * 0.01, 0.99 * 0.01, 0.01], 1.0
    else:
        weights, correction = [0.999**2 * 0.001, 0.999 * 0.001, 0.001], 1 - 0.999**3
    assert moments.corrections == pytest.approx([correction] * 3)
    if not group.get("amsgrad"):
        for v, s in zip(moments.values, squares, strict=True):
            assert v == pytest.approx((torch.tensor(weights)[:, None].view(3, *[1] * (s.dim() - 1)) * s).sum(0).numpy())
    else:
        assert moments.values[0] is optimizer.state[parameters[0]]["max_exp_avg_sq"]
        assert second_moments(optimizer, parameters, before_step=True) is None


def test_optimizers_without_one_have_none():
    parameters = [torch.nn.Parameter(t) for t in drawn(0)]
    for make in (torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adafactor):
        optimizer = make(parameters)
        for p, g in zip(parameters, drawn(1), strict=True):
            p.grad = g
        optimizer.step()
        assert second_moments(optimizer, parameters, before_step=False) is None


def test_nothing_is_changed():
    optimizer, parameters, previous, gradients, _ = trained(3, lambda step: 1.0)
    moments = second_moments(optimizer, parameters, before_step=True)
    lists = (gradients, moments.values, [p.detach() for p in parameters], previous)
    copies = [[t.clone() for t in tensors] for tensors in lists]
    tensor_sums(gradients, moments=moments, parameters=parameters, previous=previous)
    assert all(torch.equal(a, b) for x, y in zip(lists, copies, strict=True) for a, b in zip(x, y, strict=True))


def test_low_precision_empty_and_zero():
    gradients = [torch.full((300,), 3.0).bfloat16(), torch.empty(0), torch.zeros(4), torch.full((2,), math.inf)]
    found = tensor_sums(gradients).statistics()
    assert found[0].tolist() == pytest.approx([math.sqrt(2700), 0.0, 0.0, math.inf])
    assert found[1, 0] == pytest.approx(math.log(3))
    assert found[1, 1].isnan()
    assert found[1, 2] == -math.inf
    assert found[2:].isnan().all()


def test_no_gradient_no_moment_and_no_eps_is_no_staleness():
    moments = SecondMoments([torch.tensor([0.0, 4.0])], [1.0], [0.0])
    assert float(tensor_sums([torch.tensor([0.0, 2.0])], moments=moments).statistics()[2, 0]) == math.sqrt(0.5)


def test_bad_arguments_are_named():
    with pytest.raises(ShapeMismatchError, match="differ"):
        tensor_sums([torch.ones(2)], moments=SecondMoments([torch.ones(3)], [1.0], [EPS]))
    with pytest.raises(InvalidArgumentError, match="both"):
        tensor_sums([torch.ones(2)], parameters=[torch.ones(2)])
    with pytest.raises(InvalidArgumentError, match="no gradient"):
        tensor_sums([])

"""The sketch is linear, the same for wholes and shards, and as accurate as it says."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from dyntune.errors import InvalidArgumentError, ShapeMismatchError
from dyntune.numerics.sketch import CountSketch, cosine_error, splitmix64

EPS = torch.finfo(torch.float32).eps


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(kind, n, cosine, seed=0):
    """Two vectors of length 1 with a given cosine."""
    rng = np.random.default_rng(seed)
    side = math.isqrt(n)
    if kind == "normal":
        x, y = rng.standard_normal((2, n))
    elif kind == "student":
        x, y = rng.standard_t(2.5, (2, n))
    elif kind == "rank one":  # a layer whose inputs are positive
        x, y = (np.outer(rng.standard_normal(side), np.abs(rng.standard_normal(side))).ravel() for _ in range(2))
    else:  # one outlying input feature: all the energy on a stride that divides the width
        x, y = np.zeros((2, n))
        x[5::64], y[5::64] = rng.standard_normal((2, len(x[5::64])))
    x /= np.linalg.norm(x)
    y -= x * (x @ y)
    y = cosine * x + math.sqrt(1 - cosine**2) * y / np.linalg.norm(y)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)


@pytest.mark.parametrize("where", [0, 1, 8190, 8192, 20_000, 24_575])
def test_every_entry_has_one_bucket_and_one_sign(where):
    sketch = CountSketch(64, seed=3)  # blocks of 8192 entries
    alone = sketch([torch.ones(1)], ["w"], offsets=[where])
    assert alone.abs().sum() == 1
    within = torch.zeros(24_576)
    within[where] = 1
    assert torch.equal(sketch([within], ["w"]), alone)


@pytest.mark.parametrize("cuts", [(17,), (8192,), (100, 8200, 8201, 20_000), (1, 2, 3, 29_999)])
def test_shards_add_up_to_the_whole(cuts):
    x, sketch = normal(30_000), CountSketch(64, seed=1)
    ends = [0, *cuts, len(x)]
    shards = [sketch([x[a:b]], ["w"], offsets=[a]) for a, b in pairwise(ends)]
    # every bucket is a sum of about 30000 / 64 terms
    assert torch.allclose(sum(shards), sketch([x], ["w"]), rtol=0, atol=500 * EPS * float(x.abs().max()))


def test_lists_are_sums_and_order_does_not_matter():
    sketch, names = CountSketch(64, seed=1), ["a", "b", "c"]
    tensors = [normal(300, 30, seed=1), normal(7, seed=2), normal(2, 3, 4, seed=3)]
    whole = sketch(tensors, names)
    assert torch.allclose(whole, sum(sketch([t], [n]) for t, n in zip(tensors, names, strict=True)), atol=1e-4)
    assert torch.allclose(whole, sketch(tensors[::-1], names[::-1]), atol=1e-4)
    assert torch.allclose(sketch([-2 * t for t in tensors], names), -2 * whole, atol=1e-4)


def test_names_and_seeds_make_other_maps():
    x = normal(1000)
    found = [CountSketch(64, seed=s)([x], [n]) for s, n in ((0, "a"), (0, "b"), (1, "a"))]
    lengths = [float(f.norm()) for f in found]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        cosine = float(found[i] @ found[j]) / (lengths[i] * lengths[j])
        assert abs(cosine) < 4 / 8  # 64 numbers: 4 standard errors


@pytest.mark.parametrize("kind", ["normal", "student", "rank one", "feature"])
def test_inner_products_are_unbiased_with_the_variance_of_a_count_sketch(kind):
    width, draws, cosine = 256, 300, 0.3
    x, y = pair(kind, 160_000, cosine)
    found = []
    for seed in range(draws):
        sketch = CountSketch(width, seed=seed)
        found.append(float(sketch([x], ["w"]) @ sketch([y], ["w"])))
    predicted = math.sqrt((1 + cosine**2) / width)
    assert abs(np.mean(found) - cosine) < 4 * predicted / math.sqrt(draws)
    # standard error of a standard deviation: 1 / sqrt(2 draws) = 4%; rows are up to 6% shorter than the width, which is
    # 3% in the deviation. Energy in one feature lies where entries of a block do not collide: better, never worse.
    assert np.std(found) < 1.15 * predicted
    assert kind == "feature" or np.std(found) > 0.85 * predicted


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "student"])
def test_error_of_the_cosine_at_full_size(kind):
    x, y = pair(kind, 1_000_000, 0.3)
    found = []
    for seed in range(200):
        sketch = CountSketch(seed=seed)
        a, b = sketch([x], ["w"]), sketch([y], ["w"])
        found.append(float(a @ b / (a.norm() * b.norm())))
    predicted = cosine_error(0.3, 8192)
    assert predicted == pytest.approx(0.01005, abs=1e-5)
    # 5% standard error of a deviation of 200 draws, three of them
    assert np.std(found) == pytest.approx(predicted, rel=0.15)
    assert abs(np.mean(found) - 0.3) < 4 * predicted / math.sqrt(200)


def test_low_precision_and_layouts_are_read_as_they_are():
    x, sketch = normal(200, 100), CountSketch(64)
    half = x.bfloat16()
    assert torch.equal(sketch([half], ["w"]), sketch([half.float()], ["w"]))
    assert torch.equal(sketch([x.t()], ["w"]), sketch([x.t().contiguous()], ["w"]))
    assert not sketch([torch.nn.Parameter(x)], ["w"]).requires_grad


def test_the_global_generators_are_not_touched():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    CountSketch(64)([normal(10_000)], ["w"])
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_hash_is_splitmix64():
    # first outputs of the reference implementation for seed 1234567
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert splitmix64(1234567, np.arange(3, dtype=np.uint64)).tolist() == published


def test_what_cannot_be_sketched_is_said():
    with pytest.raises(InvalidArgumentError, match="width=32"):
        CountSketch(32)
    with pytest.raises(ShapeMismatchError, match="2 tensors, 1 names"):
        CountSketch(64)([torch.ones(1), torch.ones(1)], ["w"])
    assert CountSketch(64)([], []).tolist() == [0.0] * 64
    assert CountSketch(64)([torch.empty(0)], ["w"]).tolist() == [0.0] * 64

"""Packing tensors into segments and unpacking them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyntune.errors import ShapeMismatchError
from dyntune.numerics import vectors
from dyntune.numerics.vectors import SEGMENT_NUMEL, Basis, VectorSpace

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(torch.Size)  # 0-dim, empty and up to 64 elements
SPECS = st.lists(st.tuples(SHAPES, st.sampled_from([torch.float32, torch.float64])), min_size=1, max_size=8)


def space_of(specs) -> VectorSpace:
    shapes, dtypes = zip(*specs, strict=True)
    return VectorSpace(shapes, dtypes, [torch.device("cpu")] * len(shapes))


def same(a, b) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@given(SPECS, st.integers(1, 100), st.integers(1, 3))
@settings(deadline=None, max_examples=150)
def test_round_trip_through_a_basis(specs, segment_numel, rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "SEGMENT_NUMEL", segment_numel)  # so that small tensors fill segments, too
        space = space_of(specs)
        basis = Basis(space, rows)
        stored = [space.normal(7, row) for row in range(rows)]
        for row, vector in enumerate(stored):
            basis.load(row, vector)
        assert all(same(basis.views(row), vector) for row, vector in enumerate(stored))
        assert [tuple(t.shape) for t in basis.views(0)] == [tuple(s) for s, _ in specs]
        assert same(basis.release([rows - 1])[0], stored[-1])


@given(SPECS, st.integers(1, 100))
@settings(deadline=None, max_examples=150)
def test_segments_cover_every_tensor_once_and_mix_no_dtypes(specs, segment_numel):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "SEGMENT_NUMEL", segment_numel)
        space = space_of(specs)
        covered = []
        for segment in space.segments:
            members = range(segment.first, segment.first + len(segment.offsets) - 1)
            covered += members
            assert {space.dtypes[i] for i in members} == {segment.dtype}
            assert segment.numel <= segment_numel or len(members) == 1
        assert covered == list(range(len(specs)))


@given(SPECS)
@settings(deadline=None, max_examples=100)
def test_flat_round_trip(specs):
    space = space_of(specs)
    flat = torch.arange(space.numel, dtype=torch.float64)
    parts = space.unflatten(flat)
    assert [t.dtype for t in parts] == list(space.dtypes)
    assert [tuple(t.shape) for t in parts] == [tuple(s) for s in space.shapes]
    assert torch.equal(torch.cat([t.reshape(-1).double() for t in parts]), flat)


def test_a_tensor_of_exactly_one_segment_and_its_neighbours():
    sizes = [SEGMENT_NUMEL, 3, SEGMENT_NUMEL - 3, SEGMENT_NUMEL + 1, 1]
    space = space_of([(torch.Size([n]), torch.float32) for n in sizes])
    assert [s.numel for s in space.segments] == [SEGMENT_NUMEL, SEGMENT_NUMEL, SEGMENT_NUMEL + 1, 1]
    basis = Basis(space, 1)
    vector = [torch.full((n,), float(i)) for i, n in enumerate(sizes)]
    basis.load(0, vector)
    assert same(basis.views(0), vector)
    squares = sum(i * i * n for i, n in enumerate(sizes))  # a sum of small integers per block: exact
    assert float(basis.norm(0)) == pytest.approx(math.sqrt(squares), rel=1e-15)


def test_views_are_views():
    basis = Basis(space_of([(torch.Size([2, 2]), torch.float32), (torch.Size([]), torch.float32)]), 2)
    basis.buffers[0].zero_()
    for t in basis.views(1):
        t.fill_(3.0)
    assert torch.equal(basis.buffers[0], torch.tensor([[0.0] * 5, [3.0] * 5]))


def test_size_and_precision():
    space = space_of([(torch.Size([3, 2]), torch.float64), (torch.Size([]), torch.float32)])
    assert (space.numel, space.nbytes, space.dtype) == (7, 52, torch.float32)
    assert space.zeros()[0].dtype == torch.float64
    assert not any(t.any() for t in space.zeros())


def test_normal_vectors_depend_on_their_key_only():
    space = space_of([(torch.Size([50]), torch.float32)] * 2)
    torch.manual_seed(1)
    first = space.normal(3, 1)
    torch.manual_seed(2)
    assert same(first, space.normal(3, 1))
    assert not torch.equal(first[0], first[1])  # tensors of one vector differ
    assert not torch.equal(first[0], space.normal(3, 2)[0])


def test_normal_vectors_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    space_of([(torch.Size([50]), torch.float32)]).normal(1)
    assert torch.equal(before, torch.get_rng_state())


def test_normal_vectors_are_standard_normal():
    x = space_of([(torch.Size([100_000]), torch.float32)]).normal(0)[0].double()
    # Five standard errors of mean (1/sqrt n) and variance (sqrt(2/n)).
    assert abs(float(x.mean())) < 5 / math.sqrt(1e5)
    assert abs(float(x.var()) - 1) < 5 * math.sqrt(2e-5)


def test_wrong_shapes_are_named():
    space = space_of([(torch.Size([2, 3]), torch.float32)])
    with pytest.raises(ShapeMismatchError, match=r"start has tensors of shape \[\(3, 2\)\].*needs \[\(2, 3\)\]"):
        space.check([torch.zeros(3, 2)], name="start")
    with pytest.raises(ShapeMismatchError, match="2 tensors"):
        space.check([torch.zeros(2, 3)] * 2)
    with pytest.raises(ShapeMismatchError, match="5 elements, the operator needs 6"):
        space.unflatten(torch.zeros(5))


def test_check_converts_and_detaches():
    space = space_of([(torch.Size([2]), torch.float32)])
    given_vector = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (found,) = space.check([given_vector])
    assert found.dtype == torch.float32
    assert not found.requires_grad

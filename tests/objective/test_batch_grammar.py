"""What is one batch, what is many, and what is refused with which advice."""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple
from collections.abc import Iterator, Mapping, MutableMapping
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

from dyntune.errors import BatchError, EmptyBatchError, InvalidArgumentError, OneShotIteratorError
from dyntune.objective.batches import freeze_batches, is_single_batch, num_rows, tensors_of, to_device
from dyntune.objective.objective import Objective
from tests.objective.zoo import rows

CPU = torch.device("cpu")
X, Y = rows(5, 2), torch.arange(5) % 3
Pair = namedtuple("Pair", "inputs targets")


class BatchEncoding(UserDict):
    """A stand-in for the class of the same name in transformers: a UserDict with attributes."""

    def __getattr__(self, name: str) -> torch.Tensor:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


def frozen(batches, num_batches=16):
    return freeze_batches(batches, num_batches=num_batches, device=CPU)


ONE = {
    "tensor": X,
    "dict": {"x": X, "labels": Y},
    "BatchEncoding": BatchEncoding({"x": X, "labels": Y}),
    "read-only mapping": MappingProxyType({"x": X}),
    "list": [X, Y],
    "tuple": (X, Y),
    "named tuple": Pair(X, Y),
    "three": (X, X, Y),
    "list of one tensor": [X],
    "nested targets": (X, {"mask": Y}),
}


@pytest.mark.parametrize("batch", ONE.values(), ids=ONE)
def test_one_batch(batch):
    assert is_single_batch(batch)
    (drawn,) = frozen(batch)
    assert type(drawn) is type(batch)
    assert all(a is b for a, b in zip(tensors_of(drawn), tensors_of(batch), strict=True))
    assert num_rows(drawn) == 5


@pytest.mark.parametrize("name", [n for n in ONE if n != "tensor"])  # a list of tensors is one batch
@pytest.mark.parametrize("container", [list, tuple])
def test_many_batches(name, container):
    batch = ONE[name]
    drawn = frozen(container([batch, batch, batch]))
    assert len(drawn) == 3
    assert all(type(b) is type(batch) for b in drawn)


def test_a_list_of_two_tensors_is_inputs_and_targets_not_two_batches():
    """What a DataLoader yields, in the very container it yields."""
    objective = Objective(nn.Linear(2, 3), [X, Y], criterion=nn.CrossEntropyLoss())
    assert (len(objective.batches), objective.num_rows) == (1, 5)


def test_an_explicit_list_is_used_whole():
    assert len(frozen([(X, Y)] * 20, num_batches=2)) == 20


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.tensor(3.0), 1),
        (torch.zeros(4, 0), 4),
        ({"text": ["a", "b"], "x": X}, 5),
        ({"text": ["a", "b"]}, 1),
        ([[X[:2]], Y], 2),
    ],
)
def test_rows_are_the_first_dimension_of_the_first_tensor(batch, expected):
    assert num_rows(batch) == expected


# -- refused -----------------------------------------------------------------------------------------------------------


def generator() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield X, Y


@pytest.mark.parametrize(
    ("iterator", "name"),
    [(generator(), "generator"), (iter([(X, Y)]), "list_iterator"), (map(tuple, [(X, Y)]), "map")],
    ids=["generator", "iterator", "map"],
)
def test_a_one_shot_iterator_is_refused_unused(iterator, name):
    with pytest.raises(
        OneShotIteratorError, match=rf"one-shot iterator \({name}\).*list\(itertools\.islice\(iterator, 16\)\)"
    ):
        frozen(iterator)
    assert len(list(iterator)) == 1


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (None, BatchError, "batches is a NoneType; pass a tensor, a mapping"),
        (7, BatchError, "batches is a int; pass a tensor"),
        ("data.csv", BatchError, "batches is a string; pass tensors"),
        (b"data", BatchError, "batches is a string; pass tensors"),
        ([1.0, 2.0], BatchError, r"a list that holds \['float', 'float'\]; a batch is a tensor, a mapping, or a list"),
        (["a"], BatchError, r"holds \['str'\]"),
        ([(X, Y), None], BatchError, r"holds \['tuple', 'NoneType'\]"),
        ([], EmptyBatchError, r"batches is empty.*Pass a batch such as \(inputs, targets\)"),
        ((), EmptyBatchError, "batches is empty"),
        (X[:0], EmptyBatchError, r"batch 0 has no rows \(shapes \[\(0, 2\)\]\): its mean loss is undefined. Leave it"),
        ((X[:0], Y[:0]), EmptyBatchError, r"batch 0 has no rows \(shapes \[\(0, 2\), \(0,\)\]\)"),
        ([(X, Y), (X[:0], Y[:0])], EmptyBatchError, "batch 1 has no rows"),
        ({"x": X[:0]}, EmptyBatchError, "batch 0 has no rows"),
    ],
)
def test_what_is_no_batch_is_refused(batches, error, message):
    with pytest.raises(error, match=message):
        frozen(batches)


@pytest.mark.parametrize("number", [0, -1, 1.5, "some", None])
def test_num_batches_is_checked(number):
    with pytest.raises(InvalidArgumentError, match=r'num_batches=.*give a positive number, or "all"'):
        frozen([(X, Y)], num_batches=number)


def test_arrays_are_refused_once_a_criterion_needs_tensors():
    with pytest.raises(BatchError, match="this one is ndarray"):
        Objective(nn.Linear(2, 3), (np.zeros((5, 2)), np.zeros(5)), criterion=nn.CrossEntropyLoss())


# -- the user's containers are never written to ------------------------------------------------------------------------


class Wrapping(MutableMapping):
    """A mapping whose shallow copy shares its items."""

    def __init__(self, items: dict) -> None:
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __setitem__(self, key, value):
        self.items_[key] = value

    def __delitem__(self, key):
        del self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


def foreign() -> torch.Tensor:
    """A tensor that has to be replaced: autograd cannot save it."""
    with torch.inference_mode():
        return torch.ones(3, 2)


CONTAINERS = {
    "dict": lambda t: {"x": t, "name": "n"},
    "BatchEncoding": lambda t: BatchEncoding({"x": t}),
    "read-only mapping": lambda t: MappingProxyType({"x": t}),
    "a mapping of its own": lambda t: Wrapping({"x": t}),
    "list": lambda t: [t, Y],
    "named tuple": lambda t: Pair(t, Y),
    "nested": lambda t: (X, [{"x": t}]),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_tensors_that_autograd_cannot_use_are_replaced_in_a_copy(container):
    tensor = foreign()
    batch = container(tensor)
    moved = to_device(batch, CPU)
    assert any(t is tensor for t in tensors_of(batch))
    assert not any(t.is_inference() for t in tensors_of(moved))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(batch), tensors_of(moved), strict=True))
    if isinstance(batch, Mapping):
        assert list(moved) == list(batch)


def test_a_batch_encoding_keeps_its_attributes():
    moved = to_device(BatchEncoding({"input_ids": foreign()}), CPU)
    assert isinstance(moved, BatchEncoding)
    assert torch.equal(moved.input_ids, torch.ones(3, 2))
    assert not moved.input_ids.is_inference()


def test_a_batch_encoding_is_measured_like_a_dictionary():
    model, batch = nn.Linear(2, 3), {"input": X, "labels": Y}
    losses = [
        Objective(model, kind(copy.copy(batch)), criterion=nn.CrossEntropyLoss()).loss()
        for kind in (dict, BatchEncoding)
    ]
    assert losses[0] == losses[1]

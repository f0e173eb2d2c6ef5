"""Processes meet in a store: all of them go on, or none does."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from dyntune.objective.groups import is_broken_off, meet

LONG, SHORT = 20.0, 0.05


@pytest.fixture
def store():
    return dist.HashStore()


class Watched:
    """A store in which something happens right before one of its entries is waited for, or changed again."""

    def __init__(self, store: Any, then: Any) -> None:
        self.store, self.then = store, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def wait(self, names: list[str], timeout: Any) -> None:
        try:
            self.store.wait(names, timeout)
        finally:
            self.then()


def test_all_come(store):
    with ThreadPoolExecutor(3) as pool:
        waiting: list[Future[None]] = [pool.submit(meet, store, "here", rank, 3, LONG) for rank in range(3)]
        assert [w.result(LONG) for w in waiting] == [None] * 3


def test_one_does_not_come(store):
    with pytest.raises(RuntimeError, match=r"processes \[1, 2\] of 3 did not come"):
        meet(store, "here", 0, 3, SHORT)


def test_who_has_withdrawn_may_come_again(store):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="did not come"):
            meet(store, "here", 0, 2, SHORT)
    with pytest.raises(RuntimeError, match=r"processes \[0\] of 2"):  # the other has gone by now
        meet(store, "here", 1, 2, SHORT)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(meet, store, "here", rank, 2, LONG) for rank in range(2)]
        assert [w.result(LONG) for w in waiting] == [None] * 2


def test_nobody_withdraws_once_all_are_there(store):
    """The last one comes after the first has stopped waiting and before it has withdrawn: both go on."""
    late = Watched(store, then=lambda: meet(store, "here", 1, 2, LONG))
    meet(late, "here", 0, 2, SHORT)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (dist.DistBackendError("NCCL"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Timed out waiting"), False),
    ],
)
def test_broken_off(error, expected):
    assert is_broken_off(error) is expected

"""The harness itself: what a case returns, raises, or never comes to."""

from __future__ import annotations

import os
import signal
import threading
import warnings

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import Job

pytestmark = pytest.mark.slow


@pytest.fixture
def job():
    with Job(2) as job:
        yield job


def rank_and_sum() -> tuple[int, float]:
    mine = torch.ones(1) * dist.get_rank()
    dist.all_reduce(mine)
    return dist.get_rank(), float(mine)


def last_one(what: str) -> str:
    if dist.get_rank() == 1:
        if what == "raises":
            raise ArithmeticError("here")
        if what == "warns":
            warnings.warn("careful", stacklevel=1)
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hangs":
            threading.Event().wait()
    return "well"


def test_results_come_in_order_of_rank(job):
    assert job.run(rank_and_sum) == [(0, 1.0), (1, 1.0)]


@pytest.mark.parametrize(("what", "words"), [("raises", "ArithmeticError: here"), ("warns", "UserWarning: careful")])
def test_what_is_raised_is_shown(job, what, words):
    with pytest.raises(AssertionError, match=rf"(?s)rank 1: .*{words}"):
        job.run(last_one, what)
    assert job.run(last_one, "") == ["well", "well"]  # with fresh processes


def test_a_killed_process_is_seen(job):
    first, last = job.outcomes(last_one, "dies")
    assert (first.value, last.lost) == ("well", True)


def test_the_watchdog_ends_what_hangs(job):
    job.run(last_one, "")
    with pytest.raises(TimeoutError, match=r"ranks \[1\] were still busy after 1 s"):
        job.outcomes(last_one, "hangs", watchdog=1.0)
    assert job.run(last_one, "") == ["well", "well"]

"""Times of paired blocks against times that are prescribed."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.peer_suite import paired as module
from benchmarks.peer_suite.paired import Pairs, paired, periodic, summary


class Machine:
    """A clock of its own; what runs moves it on."""

    def __init__(self, monkeypatch):
        self.now = self.other = 0.0
        self.order: list[str] = []
        monkeypatch.setattr(module.time, "process_time", lambda: self.now)
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def steps(self, name, *, alone, behind=0.0, other=0.0):
        """A loop with so many seconds per step on its thread, on other threads and in other processes."""

        def run(count):
            self.order.append(name)
            self.now += count * (alone + behind)
            self.other += count * other
            return count * alone

        return run


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_blocks_take_turns_in_pairs_of_pairs(machine):
    paired(machine.steps("b", alone=1.0), machine.steps("w", alone=1.0), block=2, pairs=6)
    assert "".join(machine.order) == "bwbw" + "wbwb" + "bwbw"


def test_the_bare_block_is_its_thread_and_the_watched_one_all_else(machine):
    bare = machine.steps("b", alone=1.0, behind=0.25)  # a thread of the watcher's that works on meanwhile
    watched = machine.steps("w", alone=1.5, behind=0.125, other=0.5)
    found = paired(bare, watched, block=4, pairs=4, children=lambda: machine.other)
    assert found.bare.tolist() == [4.0] * 4
    assert found.watched.tolist() == [4 * (1.5 + 0.125 + 0.5 + 0.25)] * 4
    assert found.step_seconds == 1.0
    assert summary(found) == {"overhead": 1.375, "interval": [1.375, 1.375], "seconds_per_step": 1.375}


def test_a_longer_bare_block_counts_as_one_of_the_same_length(machine):
    found = paired(machine.steps("b", alone=0.5), machine.steps("w", alone=4.0), block=2, bare_block=64, pairs=4)
    assert found.bare.tolist() == [1.0] * 4
    assert summary(found)["overhead"] == 7.0


def test_an_even_number_of_pairs_is_kept_and_time_runs_out(machine):
    steps = machine.steps("b", alone=1.0)
    assert len(paired(steps, steps, block=1, pairs=20, seconds=9.0).bare) == 6  # after four pairs 8 s, after five 10
    assert len(paired(steps, steps, block=1, pairs=20, seconds=0.0).bare) == 4
    assert len(paired(steps, steps, block=1, pairs=2, seconds=0.0).bare) == 2


def test_quiet_steps_and_events_are_told_apart():
    quiet, event, step, block = 0.125, 32.0, 1.0, 16
    bare = np.full(6, step * block)
    found = periodic(Pairs(bare, bare + quiet * block + event * np.array([1, 0] * 3), block), (10, 1000))
    assert found["quiet_seconds"] == quiet
    assert found["event_seconds"] == event
    assert found["event_interval"] == [event, event]
    for period in (10, 1000):
        cost = found["at"][str(period)]
        assert cost["overhead"] == pytest.approx(quiet + event / period, rel=1e-15)
        assert cost["interval"] == pytest.approx([cost["overhead"]] * 2, rel=1e-15)


def test_at_the_period_that_was_run_it_is_the_plain_ratio():
    rng = np.random.default_rng(0)
    bare = rng.uniform(1, 2, 8)
    found = Pairs(bare, bare * rng.uniform(1, 3, 8), 5)
    at = periodic(found, (2 * found.block,))["at"]["10"]
    # the same sums in another order: a few roundings
    assert at["overhead"] == pytest.approx(summary(found)["overhead"], rel=1e-14)


@pytest.mark.parametrize("count", [200, 800])
def test_the_interval_is_that_of_a_mean(count):
    bare = np.ones(count)
    found = Pairs(bare, bare + np.tile([0.15, 0.25], count // 2), 1)  # a standard deviation of 0.05
    low, high = summary(found)["interval"]
    # 10,000 draws: an end is off by 0.027 of a standard error, the width by 1%; five times that
    assert high - low == pytest.approx(2 * 1.96 * 0.05 / np.sqrt(count), rel=0.05)
    assert (high + low) / 2 == pytest.approx(0.2, abs=5 * 0.02 * 0.05 / np.sqrt(count))


def test_an_odd_number_of_pairs_is_refused():
    with pytest.raises(ValueError, match="3 pairs"):
        periodic(Pairs(np.ones(3), np.ones(3), 1), (10,))

"""The tables of the monitor page from results that are prescribed."""

from __future__ import annotations

import pytest

from benchmarks import tables

ORIGIN = {
    "date": "2026-01-02T00:00:00+00:00",
    "cpu": "a processor",
    "threads": 1,
    "commit": "0123456789abcdef",
    "uncommitted_changes": False,
    "versions": {"torch": "2"},
}
WORDS = {"records": "losses", "source": "README"}


def measured(overhead, ends, *, at="1"):
    cost = {"overhead": overhead, "interval": ends}
    return {"at": {at: cost}, "step_seconds": 2e-3, "first_seconds": 0.25, "version": "1.2"}


@pytest.fixture
def peers():
    tool = measured(0.1, [0.05, 0.15], at="100")
    tool["at"]["1000"] = {"overhead": 12.0, "interval": [11.0, 13.4]}
    return {
        "provenance": ORIGIN,
        "watchers": {"dyntune": {**WORDS, "periods": []}, "tool": {**WORDS, "periods": [1000, 100]}},
        "runs": {
            "dyntune": {"MLP": measured(0.0123, [-0.001, 0.02])},
            "tool": {"MLP": tool, "CNN": {"failure": "TypeError: no such layer"}},
        },
    }


def test_a_row_for_every_period_and_failures_in_their_place(peers):
    lines = tables.monitor_peers(peers).splitlines()
    assert "| **dyntune** | 1.2% (-0.1 to 2.0); 250 ms | not run |" in lines
    assert "| tool, every 1,000 steps | 12 × (11 to 13); 250 ms | **fails**: TypeError |" in lines
    assert "| tool, every 100 steps | 10.0% (5.0 to 15.0); 250 ms | **fails**: TypeError |" in lines
    assert "Failures, 1 of 3:" in lines
    assert "- tool, CNN: TypeError: no such layer" in lines
    assert "| tool 1.2 | losses | README |" in lines


def test_the_head_says_how_long_a_step_is_and_nothing_is_said_of_no_failures(peers):
    del peers["runs"]["tool"]["CNN"]
    text = tables.monitor_peers(peers)
    assert text.splitlines()[0] == "| watched by | MLP, 2 ms |"
    assert "Failures" not in text


@pytest.mark.parametrize(("low", "said"), [(0.01, ""), (0.03, ", **above it**")])
def test_an_overhead_above_its_budget_says_so(low, said):
    never = dict.fromkeys(("tensors", "inside", "batch", "largest"))
    clock = {"costs": {"burst": 0.2, "batch": 0.05}, "steps_between": {"burst": 1234.5, **never}}
    model = {
        "parameters": 1000,
        "step_seconds": 1e-3,
        "steady_overhead": 0.035,
        "steady_interval": [low, 0.04],
        "allowed": 0.02,
        "first_seconds": 1.5,
        "first_steps": 40,
        "own_clock": clock,
    }
    idle = {"hooks_seconds": 12e-6, "interval": [11e-6, 13e-6]}
    text = tables.monitor_overhead({"models": {"MLP": model}, "idle": idle, "provenance": ORIGIN})
    row = text.splitlines()[2]
    assert f"| 3.5% ({100 * low:.1f} to 4.0){said} | 2.0% | 1.5 s, in 40 steps |" in row
    # a scalar of 3 significant digits; a cost without a period; a kind that was never measured
    assert row.endswith("| 200 ms; every 1230 steps | not measured | not measured | 50 ms; not again | not measured |")
    assert "12.0 µs (11.0 to 13.0)" in text


def test_every_table_of_the_page_has_a_renderer():
    page = tables.DOCUMENTS / "monitor.md"
    assert page in tables.PAGES
    text = page.read_text(encoding="utf-8")
    for name in ("monitor-peers", "monitor-overhead", "run-log", "signals", "tier2"):
        assert name in tables.RENDERERS
        assert tables.replaced(text, name, "| x |") is not None

"""The bar: when it is seen, what it says, and that it changes nothing."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch
from torch import nn

import dyntune
from dyntune.suggest import progress
from tests.suggest.problems import classification, mlp

CE = nn.CrossEntropyLoss()


class Terminal(io.StringIO):
    """Standard error that may be a terminal."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measures with a clock that goes `seconds` per look, and returns the result and what standard error got."""

    def run(shown: Any, *, terminal: bool, seconds: float, **options: Any) -> tuple[dyntune.Recommendation, str]:
        error = Terminal(terminal=terminal)
        now = [0.0]

        def clock() -> float:
            now[0] += seconds
            return now[0]

        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", error)
            patched.setattr("tqdm.std.time", clock)
            found = dyntune.suggest_lr(
                mlp(), classification(), criterion=CE, max_gradients=100, progress=shown, **options
            )
        return found, error.getvalue()

    return run


def test_a_bar_on_a_terminal_after_a_second(seen: Any) -> None:
    calls: list[tuple[str, float, float | None]] = []
    seen(lambda *call: calls.append(call), terminal=True, seconds=0.2)
    _, text = seen(None, terminal=True, seconds=0.2)
    lines = [line for line in text.split("\r") if line.strip()]
    assert all(line.startswith("learning rate: ") for line in lines)
    assert "/100 gradients" in lines[0]
    assert any("best so far: none yet" in line for line in lines)
    for stage, _, best in calls[2:]:  # the first may be over before a second is
        guess = "none yet" if best is None else dyntune.records.short_number(best)
        assert any(f"{stage} done, best so far: {guess}" in line for line in lines)
    assert text.endswith("\r")  # and it is cleared
    assert not text.rsplit("\r", 2)[-2].strip()


@pytest.mark.parametrize(
    ("shown", "terminal", "seconds", "visible"),
    [
        (None, True, 1e-4, False),  # over before a second is
        (None, False, 0.2, False),
        (False, True, 0.2, False),
        (True, False, 0.2, True),
        (True, True, 1e-4, True),
    ],
)
def test_when_a_bar_is_seen(seen: Any, shown: bool | None, terminal: bool, seconds: float, visible: bool) -> None:
    _, text = seen(shown, terminal=terminal, seconds=seconds)
    assert bool(text) is visible


def test_the_count_never_passes_the_budget_and_moves_within_stages(seen: Any) -> None:
    rec, text = seen(True, terminal=False, seconds=0.2)
    counts = [int(line.split("|")[2].split("/")[0]) for line in text.split("\r") if "/100" in line]
    assert counts == sorted(counts)
    assert len(set(counts)) > 40  # far more than there are stages
    assert counts[-1] == pytest.approx(rec.cost, abs=0.5)  # shown without decimals


def test_it_changes_nothing(seen: Any) -> None:
    state = torch.get_rng_state()
    results = [seen(shown, terminal=True, seconds=0.2)[0] for shown in (None, True, False, lambda *_: None)]
    assert all(result.to_dict() == results[0].to_dict() for result in results)
    assert torch.equal(state, torch.get_rng_state())


def test_no_thread_is_left() -> None:
    import threading

    before = set(threading.enumerate())
    with progress.reporting(True, limit=10) as (meter, tell):
        meter.charge(3)
        assert tell is not None
        tell("here", meter.spent, 0.1)
        assert set(threading.enumerate()) == before


def test_a_function_hears_of_stage_cost_and_guess(seen: Any) -> None:
    calls: list[tuple[str, float, float | None]] = []
    rec, text = seen(lambda *call: calls.append(call), terminal=True, seconds=0.2)
    assert text == ""
    _, spent, guesses = zip(*calls, strict=True)
    assert list(spent) == sorted(spent)
    assert 0 < spent[0] < spent[-1] <= rec.cost
    assert guesses[0] is None
    assert guesses[-1] in [pytest.approx(lr, rel=1e-12) for lr in rec.series["run_lr"]]  # one that was trained at


def test_the_bar_goes_away_when_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    error = Terminal(terminal=True)
    monkeypatch.setattr(sys, "stderr", error)

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        if error.getvalue().strip():
            raise KeyboardInterrupt
        return CE(model(batch[0]), batch[1])

    with pytest.raises(KeyboardInterrupt):
        dyntune.suggest_lr(mlp(), classification(), loss_fn, max_gradients=100, progress=True)
    assert not error.getvalue().rsplit("\r", 2)[-2].strip()


def test_without_a_standard_error_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # pythonw, daemons
    with progress.reporting(None, limit=10) as (meter, tell):
        meter.charge(4)
    assert tell is None
    assert meter.left == 6


# ipykernel and its event loop warn about each other, which is no concern of a reader.
@pytest.mark.filterwarnings("default")
@pytest.mark.slow
def test_in_a_notebook_one_display_is_updated() -> None:
    import nbformat
    from nbclient import NotebookClient

    opened = (
        "from dyntune.suggest import progress\n"
        "progress.SHOW_AFTER = 0.0\n"
        "manager = progress.reporting(None, limit=10)\n"
        "meter, tell = manager.__enter__()\n"
        "for i in range(9):\n"
        "    meter.charge(1)\n"
        "    tell(f'stage {i}', meter.spent, 0.1)\n"
        "drawn = meter._bar.refresh()\n"
    )
    second = opened.replace("manager", "second")  # a name of its own, or the first bar would be closed
    cells = [opened, second + "closed = second.__exit__(None, None, None)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    (present,), (cleared,) = (cell.outputs for cell in notebook.cells)  # no stream, which a saved notebook would keep
    assert present.output_type == cleared.output_type == "display_data"
    assert "9/10 gradients" in present.data["text/plain"]
    assert "stage 8 done, best so far: 0.1" in present.data["text/plain"]
    assert cleared.data["text/plain"] == ""

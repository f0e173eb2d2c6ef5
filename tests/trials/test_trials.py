"""Trials: the same results wherever they run, every failure recorded, and nothing run twice after a kill."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dyntune.errors import InvalidArgumentError, MissingDependencyError
from dyntune.trials.outcome import Outcome
from dyntune.trials.trials import Trials
from tests.trials.functions import Counted, Fragile, Unimportable, train

KEYS = [(lr, seed) for lr in (0.001, 0.01, 0.1) for seed in (0, 1)]
# Seconds after which a process that should be there, or gone, counts as a hang; starting one takes two to five.
PATIENCE = 60.0


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    pytest.importorskip("optuna")
    return tmp_path / "trials.log"


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


# -- in this process ---------------------------------------------------------------------------------------------------


def test_each_trial_runs_once_and_outcomes_come_in_the_order_asked() -> None:
    calls = []

    def function(point: float, seed: int) -> dict[str, float]:
        calls.append((point, seed))
        return {"loss": 10 * point + seed}

    with Trials(function) as trials:
        first = trials.run([(2.0, 0), (1.0, 0), (2.0, 0)])
        second = trials.run([(1.0, 0), (3.0, 1)])
    assert list(first) == [(2.0, 0), (1.0, 0)]
    assert list(second) == [(1.0, 0), (3.0, 1)]
    assert calls == [(2.0, 0), (1.0, 0), (3.0, 1)]
    assert second[3.0, 1].result == {"loss": 31.0}


def test_a_trial_that_raises_is_a_failure_with_its_reason() -> None:
    with Trials(Fragile(raises=0.01)) as trials:
        found = trials.run(KEYS)
    assert found[0.01, 1] == Outcome(reason="ValueError: no 0.01")
    assert [key for key, outcome in found.items() if outcome.reason] == [(0.01, 0), (0.01, 1)]


def test_a_result_that_is_not_json_is_a_failure_too() -> None:
    with Trials(lambda point, seed: {"loss": torch.tensor(point)}) as trials:
        outcome = trials.run([(1.0, 0)])[1.0, 0]
    assert "not JSON serializable" in outcome.reason


def test_losses_that_are_not_finite_are_results(journal: Path) -> None:
    for storage in (None, journal):
        with Trials(lambda point, seed: {"loss": [np.inf, np.nan][seed]}, storage=storage) as trials:
            found = trials.run([(1.0, 0), (1.0, 1)])
        assert [str(outcome.result["loss"]) for outcome in found.values()] == ["inf", "nan"]  # type: ignore[index]


def test_ctrl_c_is_not_a_failed_trial() -> None:
    def interrupted(point: float, seed: int) -> dict[str, float]:
        raise KeyboardInterrupt

    with Trials(interrupted) as trials, pytest.raises(KeyboardInterrupt):
        trials.run(KEYS)


def test_negative_workers_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="workers=-1"):
        Trials(train, workers=-1)


# -- recorded ----------------------------------------------------------------------------------------------------------


def test_what_is_recorded_is_not_run_again_and_is_the_same(journal: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    with Trials(Counted(count), storage=journal, name="one") as trials:
        first = trials.run(KEYS)
    with Trials(Counted(count), storage=str(journal), name="one") as trials:
        again = trials.run(KEYS[::-1])
    assert len(lines(count)) == len(KEYS)
    assert again == first
    with Trials(train) as trials:
        assert trials.run(KEYS) == first  # the bits went through the file unchanged
    with Trials(Counted(count), storage=journal, name="another") as trials:
        trials.run(KEYS[:1])
    assert len(lines(count)) == len(KEYS) + 1


def test_failures_are_recorded(journal: Path) -> None:
    with Trials(Fragile(raises=0.01), storage=journal) as trials:
        first = trials.run(KEYS)
    with Trials(train, storage=journal) as trials:
        assert trials.run(KEYS) == first


def test_trials_begun_by_another_come_last_and_are_not_waited_for(journal: Path, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    with Trials(train, storage=journal, name="shared") as trials:
        trials.run(KEYS[-1:])
    study = optuna.load_study(
        study_name="shared",
        storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal))),
    )
    elsewhere = study.ask()  # begun, and killed there
    elsewhere.suggest_float("point", KEYS[0][0], KEYS[0][0])
    elsewhere.suggest_int("seed", KEYS[0][1], KEYS[0][1])
    count = tmp_path / "count"
    with Trials(Counted(count), storage=journal, name="shared") as trials:
        assert list(trials.run(KEYS)) == KEYS
    assert lines(count) == [f"{point} {seed}" for point, seed in [*KEYS[1:-1], KEYS[0]]]


def test_the_global_random_state_stays_and_optuna_stays_silent(
    journal: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    optuna = pytest.importorskip("optuna")
    before, level = pickle.dumps(np.random.get_state()), optuna.logging.get_verbosity()
    with Trials(train, storage=journal) as trials:
        trials.run(KEYS)
    with Trials(train, storage=journal) as trials:
        trials.run(KEYS)
    assert pickle.dumps(np.random.get_state()) == before
    assert optuna.logging.get_verbosity() == level
    assert capfd.readouterr() == ("", "")


def test_a_storage_without_optuna_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependencyError, match=r"dyntune\[search\]"):
        Trials(train, storage=tmp_path / "trials.log")


@pytest.mark.slow  # two processes import torch
def test_a_killed_run_goes_on_where_it_stopped(journal: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    with Trials(train) as trials:
        uninterrupted = trials.run(KEYS)
    process = multiprocessing.get_context("spawn").Process(target=run_recorded, args=(count, journal))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    assert len(lines(count)) == 4  # the fourth was killed in the middle
    with Trials(Counted(count), storage=journal) as trials:
        assert trials.run(KEYS) == uninterrupted
    assert len(lines(count)) == len(KEYS) + 1


def run_recorded(count: Path, journal: Path) -> None:
    torch.set_num_threads(1)
    with Trials(Counted(count, last=3), storage=journal) as trials:
        trials.run(KEYS)


# -- over processes ----------------------------------------------------------------------------------------------------


def test_smoke_another_process_computes_the_same_bits() -> None:
    before = set(multiprocessing.active_children())  # other tests' own
    with Trials(Fragile(raises=0.01), workers=1) as trials:
        found = trials.run(KEYS)
        assert len(set(multiprocessing.active_children()) - before) == 1
    assert set(multiprocessing.active_children()) <= before
    with Trials(Fragile(raises=0.01)) as trials:
        assert trials.run(KEYS) == found


@pytest.mark.slow
def test_two_processes_share_the_trials_and_the_default_dtype(journal: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with Trials(train) as trials:
            here = trials.run(KEYS)
        with Trials(train, workers=2, storage=journal) as trials:
            assert trials.run(KEYS[:3]) | trials.run(KEYS) == here
    finally:
        torch.set_default_dtype(torch.float32)
    assert here[KEYS[0]].result["dtype"] == "torch.float64"  # type: ignore[index]
    with Trials(Fragile(dies=KEYS[0][0]), workers=2, storage=journal) as trials:
        assert trials.run(KEYS) == here  # all known: nothing is run


@pytest.mark.slow
def test_every_process_may_die_and_the_rest_still_runs() -> None:
    with Trials(Fragile(dies=7.0), workers=2) as trials:
        found = trials.run([(7.0, 0), (7.0, 1), (7.0, 2), *KEYS])
    died = Outcome(reason="the process that ran it died (SIGKILL, as when memory runs out)", lost=True)
    assert [found.pop((7.0, seed)) for seed in range(3)] == [died] * 3
    with Trials(train) as trials:
        assert trials.run(KEYS) == found


def test_what_cannot_be_sent_is_refused_at_once() -> None:
    with pytest.raises(InvalidArgumentError, match=r"workers=2: what is to be run cannot be sent.*workers=0"):
        Trials(lambda point, seed: {"loss": point}, workers=2)


@pytest.mark.slow
def test_what_cannot_be_read_there_is_refused_and_nothing_stays() -> None:
    before = multiprocessing.active_children()  # other tests' own
    with (
        Trials(Unimportable(), workers=2) as trials,
        pytest.raises(InvalidArgumentError, match=r"No module named 'notebook_cell'.*workers=0"),
    ):
        trials.run(KEYS)
    assert set(multiprocessing.active_children()) <= set(before)


def test_the_users_tensors_stay_where_they_are() -> None:
    """multiprocessing's own pickling would move them into shared memory."""
    model = torch.nn.Linear(4, 4)
    before = model.weight.data_ptr()
    Trials(model, workers=1)  # type: ignore[arg-type]
    assert model.weight.data_ptr() == before
    assert not model.weight.is_shared()


def wait_until(condition, *, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "kernel interrupt"])
def test_ctrl_c_leaves_no_process_behind(tmp_path: Path, whole_group: bool) -> None:
    """A terminal sends SIGINT to the whole group, a notebook to the kernel alone."""
    script = tmp_path / "script.py"
    script.write_text(
        "import signal\n"
        "from pathlib import Path\n"
        "from dyntune.trials.trials import Trials\n"
        "from tests.trials.functions import Endless\n"
        # A shell starts what it puts in the background with SIGINT ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        'if __name__ == "__main__":\n'
        f"    with Trials(Endless(Path({str(tmp_path)!r})), workers=2) as trials:\n"
        "        trials.run([(1.0, 0), (2.0, 0)])\n"
    )
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    )
    wait_until(lambda: len([p for p in tmp_path.iterdir() if p.name.isdigit()]) == 2, what="the trials did not begin")
    children = [int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()]
    assert all(alive(pid) for pid in children)
    (os.killpg if whole_group else os.kill)(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=PATIENCE)
    assert b"KeyboardInterrupt" in errors
    assert parent.returncode != 0
    wait_until(lambda: not any(alive(pid) for pid in children), what="processes were left behind")


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_of_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from dyntune.trials.trials import Trials\n"
        "from tests.trials.functions import train\n"
        "with Trials(train, workers=1) as trials:\n"
        "    trials.run([(0.1, 0)])\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    assert done.returncode == 1
    assert 'under `if __name__ == "__main__":`' in done.stderr

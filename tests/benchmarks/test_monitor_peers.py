"""Failures count, finished work is kept, events fall where they are looked for, and watchers leave training alone."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import benchmarks.peer_suite.paired
from benchmarks.peer_suite.paired import Training, paired
from benchmarks.peer_suite.watchers import WATCHERS, ByHand, Dyntune, Placebo, TensorBoard, Watched, Watcher

FOLDER = Path(benchmarks.peer_suite.paired.__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch):
    """benchmarks/monitor_peers.py as it is when it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # set on import, taken back with the fixture
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    return importlib.import_module("monitor_peers")


def small():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, (torch.randn(8, 4), torch.randint(3, (8,)))


class Counted(Watched):
    """Notes the steps at which an event falls due."""

    def __init__(self, make, folder, every):
        super().__init__(make, folder, every)
        self.events: list[int] = []

    def step(self):
        self.count += 1
        if self.count % self.every == 0:
            self.events.append(self.count)
        return super().step()


@pytest.mark.parametrize("block", [4, 5, 40])
def test_the_first_pair_and_every_second_one_hold_one_event(script, tmp_path, block):
    watched = Counted(small, tmp_path, 2 * block)
    watcher = Watcher(Counted, "torch", "torch", "", "", periods=(100,))
    size, _ = script._settle(watcher, Training(small), watched, block)
    assert size == block
    assert watched.events == []
    assert 2 * block - watched.count == block - block // 2  # of the next block's steps, the middle one
    counts = []

    def steps(count):
        before = len(watched.events)
        watched.steps(count)
        counts.append(len(watched.events) - before)
        return 0.0

    paired(lambda _: 1.0, steps, block=block, pairs=6)
    assert counts == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("kind", [Placebo, ByHand, TensorBoard, Dyntune])
def test_a_watched_training_is_the_same_training(kind, tmp_path):
    bare, watched = Training(small), kind(small, tmp_path, 10)
    try:
        bare.steps(12)
        watched.steps(12)
        assert watched.kept > 0
    finally:
        watched.close()
    for a, b in zip(bare.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(bare.model.parameters()), next(Training(small).model.parameters()))


def test_the_last_json_is_the_result_and_anything_else_a_failure(script):
    assert script.read('noise\n{"at": 1}\n{"at": 2}\nmore noise\n', "", 0) == {"at": 2}
    assert script.read("3\nnoise", "Traceback\nKilled", -9) == {"failure": "ended with status -9: Killed"}
    assert script.read("", "", 1) == {"failure": "ended with status 1: no message"}


def test_the_reason_is_the_first_error(script):
    def work():
        try:
            raise NotImplementedError("Embedding is not supported")
        finally:
            raise AttributeError("no grad")

    with pytest.raises(AttributeError) as caught:
        work()
    assert script.reason(caught.value) == "NotImplementedError: Embedding is not supported"
    assert script.reason(ValueError()) == "ValueError: no message"


def test_only_results_of_the_same_code_and_size_are_kept(script, tmp_path):
    path, stamp = tmp_path / "result.json", {"digest": "a", "pairs": 30}
    assert script.finished(path, stamp) == {}
    new, old = {"at": {}, "stamp": stamp}, {"at": {}, "stamp": {"digest": "a", "pairs": 4}}
    path.write_text(json.dumps({"runs": {"x": {"MLP": new, "CNN": old}, "y": {"MLP": old}}}))
    assert script.finished(path, stamp) == {"x": {"MLP": new}}


def test_a_tool_that_raises_or_records_nothing_is_a_failure(script, monkeypatch, capsys):
    class Broken(Placebo):
        def step(self):
            raise KeyError("hook")

    class Silent(Placebo):
        kept = 0

    monkeypatch.setitem(script.MODELS, "small", (small, 2, 4))
    for kind, message in ((Broken, "KeyError: 'hook'"), (Silent, "RuntimeError: it recorded nothing")):
        monkeypatch.setitem(script.WATCHERS, "tool", Watcher(kind, "torch", "torch", "", ""))
        assert script._child("tool", "small", 2) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"failure": message}


def test_a_tool_that_works_is_measured(script, monkeypatch, capsys):
    monkeypatch.setitem(script.MODELS, "small", (small, 2, 4))
    monkeypatch.setitem(script.WATCHERS, "tool", Watcher(Counted, "torch", "torch", "", "", periods=(100,)))
    monkeypatch.setattr(Counted, "kept", property(lambda self: len(self.events)), raising=False)
    assert script._child("tool", "small", 4) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["pairs"], found["block"], found["kept"]) == (4, 2, 2)
    assert list(found["at"]) == ["100"]


def test_every_row_says_what_it_records_and_where_that_is_written(script):
    for name, about in script.described().items():
        assert about["records"], name
        assert about["source"], name
    pinned = (FOLDER / "requirements-monitor-peers.txt").read_text()
    packages = {watcher.package for watcher in WATCHERS.values()} - {"torch", "dyntune"}
    assert [package for package in sorted(packages) if f"\n{package}==" not in pinned] == []

"""A series of saved weights: what is measured, what is refused, and what stays as it was."""

from __future__ import annotations

import ast
import builtins
import copy
import math
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dyntune
from dyntune.errors import (
    AmbiguousLossError,
    CheckpointError,
    InvalidArgumentError,
    MissingDependencyError,
    RunFileError,
)
from dyntune.monitor.steps import steps_in_names
from dyntune.objective.objective import Objective
from dyntune.objective.stored import match_state, read_checkpoint
from tests.objective.oracle import dense_hessian
from tests.objective.snapshot import changes, snapshot
from tests.objective.zoo import ZOO, Tied, made, mlp, rows

CROSS = nn.CrossEntropyLoss()
BATCHES = [(rows(12, 4, seed=1), torch.arange(12) % 3), (rows(5, 4, seed=2), torch.arange(5) % 3)]
LOSS = {"criterion": CROSS}


def trained(folder: Path, count: int = 3, *, momentum: float = 0.9) -> tuple[list[Path], list[nn.Module]]:
    """A short training, saved every five steps with its optimizer."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    paths, models = [], []
    for step in range(5 * count):
        if step % 5 == 0:
            paths.append(folder / f"step{step}.pt")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, paths[-1])
            models.append(copy.deepcopy(model))
        optimizer.zero_grad()
        CROSS(model(BATCHES[0][0]), BATCHES[0][1]).backward()
        optimizer.step()
    return paths, models


def saved(folder: Path, state: object, name: str = "a.pt") -> Path:
    torch.save(state, folder / name)
    return folder / name


# -- what is measured --------------------------------------------------------------------------------------------------


def test_every_checkpoint_is_measured_as_a_model_with_its_weights_would_be(tmp_path):
    paths, models = trained(tmp_path)
    run = dyntune.trace_checkpoints(mlp(seed=9), paths, BATCHES, quantities=("lambda_max", "lambda_min"), **LOSS)
    assert run.steps.tolist() == [0, 5, 10]
    low, high = run.interval("lambda_max")
    for i, model in enumerate(models):
        assert run["loss"][i] == Objective(model, BATCHES, criterion=CROSS).loss()
        truth = torch.linalg.eigvalsh(
            dense_hessian(
                model,
                BATCHES,
                lambda call, data: CROSS(torch.cat([call(x) for x, _ in data]), torch.cat([y for _, y in data])),
            )
        )
        assert low[i] <= float(truth[-1]) * (1 + 1e-5)  # products are in float32
        assert high[i] >= float(truth[-1]) * (1 - 1e-5)
        assert run["lambda_max"][i] == pytest.approx(float(truth[-1]), rel=1e-2)  # the default tolerance
        assert run["lambda_min"][i] == pytest.approx(float(truth[0]), rel=1e-2)
    assert [row.labels["checkpoint"] for row in run.rows] == ["step0.pt", "step5.pt", "step10.pt"]
    assert run.columns["lambda_max"].unit == "loss / parameter^2"
    assert run.assumed["num_rows"] == 17
    assert run.provenance["steps"] == "from the file names"


def test_a_checkpoint_measured_alone_gives_the_same_row(tmp_path):
    paths, _ = trained(tmp_path)
    quantities = ("lambda_max", "lambda_min", "batch", "directional")
    run = dyntune.trace_checkpoints(mlp(), paths, BATCHES, quantities=quantities, **LOSS)
    for i, path in enumerate(paths):
        alone = dyntune.trace_checkpoints(mlp(seed=3), [path], BATCHES, quantities=quantities, **LOSS)
        assert alone.rows == (run.rows[i],)


def test_series_go_up_in_step_whatever_the_order_of_the_files(tmp_path):
    paths, _ = trained(tmp_path)
    forth = dyntune.trace_checkpoints(mlp(), paths, BATCHES, **LOSS)
    back = dyntune.trace_checkpoints(mlp(), paths[::-1], BATCHES, **LOSS)
    assert forth.steps.tolist() == back.steps.tolist() == [0, 5, 10]
    np.testing.assert_array_equal(forth["loss"], back["loss"])
    np.testing.assert_array_equal(forth["lambda_max"], back["lambda_max"])


@pytest.mark.parametrize("name", ZOO)
def test_every_kind_of_model_is_lent_the_weights(name, tmp_path):
    case, other = ZOO[name](), ZOO[name]()
    with torch.no_grad():
        for p in other.model.parameters():
            p.add_(0.1 * rows(p.numel()).view_as(p))
    before = snapshot(case.model)
    path = saved(tmp_path, other.model.state_dict())
    run = dyntune.trace_checkpoints(case.model, [path], case.batch, criterion=case.criterion, max_products=3)
    assert run["loss"][0] == Objective(other.model, case.batch, criterion=case.criterion).loss()
    assert changes(before, snapshot(case.model)) == []


def test_the_log_holds_the_same_run_and_is_written_as_it_goes(tmp_path):
    paths, _ = trained(tmp_path)
    log, lengths = tmp_path / "run.jsonl", []
    run = dyntune.trace_checkpoints(
        mlp(), paths, BATCHES, log=log, progress=lambda n, loss: lengths.append(len(dyntune.load_run(log))), **LOSS
    )
    assert lengths == [1, 2, 3]
    again = dyntune.load_run(log)
    np.testing.assert_array_equal(again["lambda_max"], run["lambda_max"])
    assert again.provenance == run.provenance
    with pytest.raises(RunFileError, match="exists"):
        dyntune.trace_checkpoints(mlp(), paths, BATCHES, log=log, **LOSS)


def test_weights_that_are_not_finite_are_recorded_and_the_series_goes_on(tmp_path):
    paths, models = trained(tmp_path)
    for path, weights in ((paths[1], models[1].state_dict()),):
        weights["0.weight"][0, 0] = math.nan
        torch.save(weights, path)
    run = dyntune.trace_checkpoints(mlp(), paths, BATCHES, **LOSS)
    assert run.steps.tolist() == [0, 5, 10]
    assert np.isnan(run["loss"]).tolist() == [False, True, False]
    assert np.isnan(run["lambda_max"]).tolist() == [False, True, False]
    kind, reason = run.rows[1].status["lambda_max"]
    assert kind == "REFUSED"
    assert "'0.weight'" in reason
    assert run.rows[1].values["lambda_max"] is None


def test_a_loss_that_overflows_is_recorded_too(tmp_path):
    states = [{n: p * factor for n, p in mlp().state_dict().items()} for factor in (1.0, 1e30)]
    paths = [saved(tmp_path, state, f"{i}.pt") for i, state in enumerate(states)]
    run = dyntune.trace_checkpoints(
        mlp(), paths, BATCHES, lambda m, b: (m(b[0]) ** 2).sum() ** 2, quantities=("lambda_max",)
    )
    assert np.isfinite(run["loss"]).tolist() == [True, False]
    assert "loss of batch 0" in run.rows[1].status["loss"][1]


def test_quantities_that_need_the_optimizer_take_its_state_from_the_checkpoint(tmp_path):
    model = mlp()
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    paths, truth = [], []
    for step in range(1, 5):
        adam.zero_grad()
        CROSS(model(BATCHES[0][0]), BATCHES[0][1]).backward()
        adam.step()
        paths.append(saved(tmp_path, {"model": model.state_dict(), "optimizer": adam.state_dict()}, f"{step}.pt"))
        found = dyntune.sharpness(
            model, BATCHES, optimizer=adam, quantities=("preconditioned", "directional"), rtol=1e-4, **LOSS
        )
        truth.append((float(found.preconditioned), float(found.directional)))
    run = dyntune.trace_checkpoints(
        model,
        paths,
        BATCHES,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1.0),  # the rate comes from the checkpoint
        quantities=("lambda_max", "preconditioned", "directional"),
        rtol=1e-4,
        **LOSS,
    )
    np.testing.assert_allclose(run["preconditioned"], [p for p, _ in truth], rtol=2e-4)  # two solves to 1e-4
    np.testing.assert_allclose(run["directional"], [d for _, d in truth], rtol=1e-5)
    edge = float(dyntune.stability.threshold(adam)) / 3e-3
    np.testing.assert_allclose(run.limit("preconditioned"), edge, rtol=1e-12)
    assert np.isnan(run.limit("lambda_max")).all()
    assert run.names == ("loss", "lambda_max", "preconditioned", "directional")


def test_sgd_brings_its_limit_and_the_users_optimizer_is_not_touched(tmp_path):
    paths, _ = trained(tmp_path)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=7.0, momentum=0.5, weight_decay=0.25)
    before = copy.deepcopy(optimizer.state_dict())
    run = dyntune.trace_checkpoints(model, paths, BATCHES, optimizer=optimizer, **LOSS)
    np.testing.assert_allclose(run.limit("lambda_max"), 2 * 1.9 / 0.1, rtol=1e-12)  # 2 (1 + momentum) / lr, as saved
    assert optimizer.state_dict() == before
    bare = [saved(tmp_path, mlp().state_dict(), "bare.pt")]
    run = dyntune.trace_checkpoints(model, bare, BATCHES, optimizer=optimizer, **LOSS)
    np.testing.assert_allclose(run.limit("lambda_max"), 2 * 1.5 / 7.0 - 0.25, rtol=1e-12)
    run = dyntune.trace_checkpoints(model, bare, BATCHES, optimizer="momentum", **LOSS)
    assert np.isnan(run.limit("lambda_max")).all()  # a name has no learning rate


def test_without_state_what_needs_it_is_refused_and_the_rest_measured(tmp_path):
    model = mlp()
    user = torch.optim.Adam(model.parameters(), lr=1e-3)
    CROSS(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    user.step()  # its state belongs to its own weights, and must not be used for others
    path = saved(tmp_path, model.state_dict())
    run = dyntune.trace_checkpoints(
        model, [path], BATCHES, optimizer=user, quantities=("lambda_max", "preconditioned"), **LOSS
    )
    assert np.isfinite(run["lambda_max"]).all()
    assert run.rows[0].values["preconditioned"] is None
    assert "not stepped" in run.rows[0].status["preconditioned"][1]


@pytest.mark.parametrize(
    "spoil", [{"exp_avg_sq": torch.ones(2, 2, 2)}, {"step": "x"}, {"exp_avg_sq": None}, {"step": 3}]
)
def test_an_optimizer_state_that_makes_no_sense_is_refused(tmp_path, spoil):
    model = mlp()
    groups = torch.optim.Adam(model.parameters()).state_dict()["param_groups"]
    state = {"step": torch.tensor(3.0), "exp_avg_sq": torch.ones(5, 4), "exp_avg": torch.ones(5, 4)}
    optimizer = {"param_groups": groups, "state": dict.fromkeys(range(4), state | spoil)}
    path = saved(tmp_path, {"model": model.state_dict(), "optimizer": optimizer})
    with pytest.raises(CheckpointError, match="optimizer's state"):
        dyntune.trace_checkpoints(
            model, [path], BATCHES, optimizer=torch.optim.Adam, quantities=("preconditioned",), **LOSS
        )


def test_an_optimizer_of_other_groups_is_refused(tmp_path):
    paths, _ = trained(tmp_path)

    def two(params):
        return torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)

    with pytest.raises(CheckpointError, match="SGD"):
        dyntune.trace_checkpoints(mlp(), paths, BATCHES, optimizer=two, **LOSS)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {}},
        lambda s: {"model_state_dict": s},
        lambda s: {"module": s},
        lambda s: OrderedDict((f"module.{n}", t) for n, t in s.items()),
        lambda s: {"state_dict": {f"_orig_mod.{n}": t for n, t in s.items()}},
        lambda s: {f"module._orig_mod.{n}": t for n, t in s.items()},
        lambda s: {**s, "_extra_state": torch.zeros(3)},
        lambda s: {n: t.double() for n, t in s.items()},
    ],
)
def test_usual_wrappings_are_looked_through(tmp_path, wrapped):
    other = mlp(seed=4)
    path = saved(tmp_path, wrapped(other.state_dict()))
    run = dyntune.trace_checkpoints(mlp(), [path], BATCHES, **LOSS)
    assert run["loss"][0] == Objective(other, BATCHES, criterion=CROSS).loss()


def test_converted_storage_is_said(tmp_path):
    path = saved(tmp_path, {n: t.bfloat16() for n, t in mlp().state_dict().items()})
    run = dyntune.trace_checkpoints(mlp(), [path], BATCHES, **LOSS)
    assert run.rows[0].labels["stored as"] == "bfloat16"


def test_safetensors_files_are_read(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    other = mlp(seed=4)
    save_file(other.state_dict(), tmp_path / "a.safetensors")
    run = dyntune.trace_checkpoints(mlp(), [tmp_path / "a.safetensors"], BATCHES, **LOSS)
    assert run["loss"][0] == Objective(other, BATCHES, criterion=CROSS).loss()


def test_without_safetensors_the_line_to_install_it_is_said(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(MissingDependencyError, match=r"pip install 'dyntune\[safetensors\]'"):
        dyntune.trace_checkpoints(mlp(), [tmp_path / "a.safetensors"], BATCHES, **LOSS)


class Harmful:
    ran: list[str] = []  # noqa: RUF012

    def __reduce__(self):
        return (Harmful.ran.append, ("code",))


@pytest.mark.parametrize(
    "writer", [torch.save, lambda o, p: Path(p).write_bytes(pickle.dumps(o))], ids=["zip", "pickle"]
)
def test_code_in_a_file_is_not_run(tmp_path, writer):
    path = tmp_path / "a.pt"
    writer({"0.weight": Harmful()}, path)
    with pytest.raises(CheckpointError, match=r"a\.pt.*never done"):
        dyntune.trace_checkpoints(mlp(), [path], BATCHES, **LOSS)
    assert Harmful.ran == []


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}", b"\xff" * 100, b"\x00" * 4096])
def test_rubbish_is_a_typed_error(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"'a\."):
        read_checkpoint(path)


def test_a_file_cut_short_anywhere_is_a_typed_error(tmp_path):
    path = saved(tmp_path, mlp().state_dict())
    data = path.read_bytes()
    for end in range(0, len(data) - 1, 97):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: {n: t for n, t in s.items() if n != "0.bias"}, r"1 missing \('0\.bias'\); nothing unexpected"),
        (lambda s: s | {"extra": torch.ones(1)}, r"nothing missing; 1 unexpected \('extra'\)"),
        (lambda s: {"x" + n: t for n, t in s.items()}, "4 missing.*4 unexpected"),
        (lambda s: s | {"0.bias": torch.ones(3)}, r"'0\.bias' has shape \(3,\), the model needs \(5,\)"),
        (lambda s: s | {"0.bias": torch.ones(5).int()}, "int32"),
        (lambda s: s | {"0.bias": torch.ones(5, dtype=torch.complex64)}, "complex64"),
        (lambda s: s | {"0.bias": torch.ones(5).to_sparse()}, "dense"),
        (lambda s: s | {"0.bias": torch.ones(5, device="meta")}, "dense"),
        (lambda s: s | {"0.bias": [1.0] * 5}, "list"),
        (lambda s: {}, "4 missing"),
        (lambda s: {"model": {}}, "4 missing"),
        (lambda s: {3: torch.ones(1)}, "4 missing"),
    ],
)
def test_a_state_that_does_not_fit_says_what_and_where(change, match):
    with pytest.raises(CheckpointError, match=match):
        match_state(mlp(), change(mlp().state_dict()))


@pytest.mark.parametrize("held", [torch.ones(3), [1, 2], 7], ids=["tensor", "list", "number"])
def test_a_file_that_holds_no_mapping_is_refused(tmp_path, held):
    with pytest.raises(CheckpointError, match="not a mapping"):
        read_checkpoint(saved(tmp_path, held))


def test_of_tied_weights_one_name_is_enough_and_two_must_agree():
    model = made(Tied)
    state = model.state_dict()
    names = [n for n, t in state.items() if sum(torch.equal(t, o) for o in state.values() if o.shape == t.shape) > 1]
    assert len(names) == 2
    one = {n: t for n, t in state.items() if n != names[1]}
    assert set(match_state(model, one).parameters) == set(match_state(model, state).parameters)
    with pytest.raises(CheckpointError, match="does not tie"):
        match_state(model, state | {names[1]: state[names[0]] + 1})


def test_a_bad_file_stops_the_series_with_what_there_is_or_is_recorded(tmp_path):
    paths, _ = trained(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes()[:300])
    with pytest.raises(CheckpointError) as caught:
        dyntune.trace_checkpoints(mlp(), paths, BATCHES, **LOSS)
    assert caught.value.partial.steps.tolist() == [0]
    run = dyntune.trace_checkpoints(mlp(), paths, BATCHES, on_error="record", **LOSS)
    assert run.steps.tolist() == [0, 10]
    assert [(e.name, e.step, e.detail["checkpoint"]) for e in run.events] == [("unreadable", 5, "step5.pt")]


# -- what stays as it was ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_cut_short_the_model_is_as_before_and_the_log_holds_what_was_measured(tmp_path, error):
    paths, _ = trained(tmp_path)
    model = mlp(seed=5)
    for p in list(model.parameters())[::2]:
        p.grad = torch.ones_like(p)
    before, calls = snapshot(model), [0]

    def loss(m, batch):
        calls[0] += 1
        if calls[0] == stop:
            raise error
        return CROSS(m(batch[0]), batch[1])

    stop = 0
    dyntune.trace_checkpoints(model, paths, BATCHES, loss)
    total, calls[0] = calls[0], 0
    assert changes(before, snapshot(model)) == []
    for stop in range(1, total + 1, 2):
        log = tmp_path / f"{error.__name__}{stop}.jsonl"
        calls[0] = 0
        with pytest.raises(error):
            dyntune.trace_checkpoints(model, paths, BATCHES, loss, log=log)
        assert changes(before, snapshot(model)) == []
        run = dyntune.load_run(log)
        assert run.steps.tolist() == [0, 5, 10][: len(run)]
        assert (run.events[-1].name, run.events[-1].detail) == ("stopped", {"error": error.__name__})


def test_other_errors_carry_the_run_so_far(tmp_path):
    paths, _ = trained(tmp_path)
    with pytest.raises(AmbiguousLossError) as caught:
        dyntune.trace_checkpoints(mlp(), paths, (rows(4, 4), rows(4, 4)))
    assert len(caught.value.partial) == 0


def test_batches_that_are_bare_tensors_stay_many(tmp_path):
    model = mlp()
    data = [rows(3, 4), rows(5, 4, seed=1)]
    loader = torch.utils.data.DataLoader(torch.cat(data), batch_size=4)
    loss = lambda m, x: (m(x) ** 2).mean()  # noqa: E731
    run = dyntune.trace_checkpoints(model, [saved(tmp_path, model.state_dict())], loader, loss)
    assert run.assumed["num_batches"] == 2
    assert run["loss"][0] == Objective(model, loader, loss).loss()


def test_a_compiled_model_is_looked_through(tmp_path):
    other = mlp(seed=4)
    path = saved(tmp_path, torch.compile(other, backend="eager").state_dict())
    run = dyntune.trace_checkpoints(torch.compile(mlp(), backend="eager"), [path], BATCHES, **LOSS)
    assert run["loss"][0] == Objective(other, BATCHES, criterion=CROSS).loss()


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["step_100.pt", "step_20.pt"], [100, 20]),
        (["resnet50-1.pt", "resnet50-2.pt"], [1, 2]),
        (["checkpoint-500/model.safetensors", "checkpoint-1000/model.safetensors"], [500, 1000]),
        (["epoch=1-step=400.ckpt", "epoch=2-step=800.ckpt"], [400, 800]),
        (["e1_loss0.25.pt", "e2_loss0.35.pt"], [1, 2]),
        (["model_007.pt"], [7]),
        (["a.pt", "b.pt"], None),
        (["1_2.pt", "3_4.pt"], None),
        (["epoch1_lr3.pt", "epoch2_lr4.pt"], None),
        (["1.pt", "last.pt"], None),
        (["run1/5.pt", "run2/5.pt"], [1, 2]),
        (["v2_3.pt"], None),
        (["1.pt", "1.pt"], None),
        (["9" * 30 + ".pt", "1.pt"], None),
    ],
)
def test_steps_are_read_from_names_where_they_are_plain(names, steps):
    assert steps_in_names(names) == steps


def test_steps_may_be_given_or_counted(tmp_path):
    paths = [saved(tmp_path, mlp().state_dict(), name) for name in ("b.pt", "a.pt")]
    assert dyntune.trace_checkpoints(mlp(), paths, BATCHES, **LOSS).steps.tolist() == [0, 1]
    run = dyntune.trace_checkpoints(mlp(), paths, BATCHES, steps=[7, 3], **LOSS)
    assert run.steps.tolist() == [3, 7]
    assert [row.labels["checkpoint"] for row in run.rows] == ["a.pt", "b.pt"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"paths": []}, "empty"),
        ({"paths": "a.pt"}, "one path"),
        ({"steps": [1]}, "1 entries"),
        ({"steps": [1, -2]}, "from -2"),
        ({"quantities": ("lambda",)}, "lambda_max"),
        ({"quantities": ()}, "choose from"),
        ({"quantities": ("preconditioned",)}, "optimizer"),
        ({"on_error": "ignore"}, "ignore"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(tmp_path, options, match):
    paths = [saved(tmp_path, mlp().state_dict(), name) for name in ("0.pt", "1.pt")]
    log = tmp_path / "run.jsonl"
    with pytest.raises(InvalidArgumentError, match=match):
        dyntune.trace_checkpoints(mlp(), options.pop("paths", paths), BATCHES, log=log, **LOSS, **options)
    assert not log.exists()


def test_files_that_are_not_there_are_named_before_anything_is_measured(tmp_path):
    paths = [saved(tmp_path, mlp().state_dict()), tmp_path / "absent.pt"]
    with pytest.raises(CheckpointError, match=r"1 of 2.*absent\.pt"):
        dyntune.trace_checkpoints(mlp(), paths, BATCHES, **LOSS)


# -- the package -------------------------------------------------------------------------------------------------------


def _loads(tree: ast.AST) -> list[ast.Call]:
    """Calls of something called ``load`` of torch's."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "load"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
    ]


def _is_safe(call: ast.Call) -> bool:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    safe = given.get("weights_only")
    return isinstance(safe, ast.Constant) and safe.value is True and "pickle_module" not in given and None not in given


def test_no_file_is_ever_loaded_as_code():
    package = Path(dyntune.__file__).parent
    piped = {package / "trials" / "workers.py"}  # what a worker unpickles comes from its own parent, through a pipe
    found = 0
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            loaders = {"pickle", "dill", "cloudpickle", "joblib", "shelve"}.intersection(modules)
            assert not loaders or (loaders == {"pickle"} and path in piped), path
            names = [a.name for a in node.names] if isinstance(node, ast.ImportFrom) else []
            assert not (isinstance(node, ast.ImportFrom) and node.module == "torch" and "load" in names), path
        calls = _loads(tree)
        found += len(calls)
        assert all(_is_safe(call) for call in calls), path
    assert found >= 1


@pytest.mark.parametrize(
    ("line", "safe"),
    [
        ("torch.load(p, weights_only=True)", True),
        ("torch.load(p)", False),
        ("torch.load(p, weights_only=False)", False),
        ("torch.load(p, weights_only=flag)", False),
        ("torch.load(p, weights_only=True, pickle_module=other)", False),
        ("torch.load(p, weights_only=True, **more)", False),
    ],
)
def test_the_guard_sees_unsafe_loads(line, safe):
    calls = _loads(ast.parse(line))
    assert [_is_safe(call) for call in calls] == [safe]

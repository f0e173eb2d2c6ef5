"""Which parameters an objective speaks of, and that its Hessian is that block."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

import dyntune
from dyntune.errors import InvalidArgumentError, NonFiniteError, NoParametersError, UnsupportedDtypeError
from dyntune.objective.objective import Objective
from dyntune.objective.parameters import clean_name, select_parameters
from tests.objective.oracle import dense_hessian, relative_error
from tests.objective.zoo import ZOO, Tied, classes, made, mlp, rows, truth

BATCH = (rows(12, 4), torch.arange(12) % 3)
ENGINES = {
    "retained graph": {},
    "forward over reverse": {"memory_limit": 0},
    "finite differences": {"method": "finite-difference"},
}


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("*", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("*.weight", ["0.weight", "2.weight"]),
        ("0.*", ["0.weight", "0.bias"]),
        (["2.bias", "0.weight"], ["0.weight", "2.bias"]),  # the model's order, not the caller's
        (("*.bias",), ["0.bias", "2.bias"]),
        ((pattern for pattern in ("0.weight", "2.bias")), ["0.weight", "2.bias"]),
        (lambda name: name.endswith("bias"), ["0.bias", "2.bias"]),
    ],
)
def test_globs_and_predicates(selection, expected):
    assert list(select_parameters(mlp(), selection)) == expected


def test_frozen_parameters_are_left_out():
    model = mlp()
    model[0].requires_grad_(False)
    assert list(select_parameters(model)) == ["2.weight", "2.bias"]


def test_tied_parameters_are_there_once():
    assert list(select_parameters(made(Tied))) == ["embed.weight", "mix.weight", "mix.bias"]


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("0.weight", "0.weight"),
        ("module.0.weight", "0.weight"),
        ("_orig_mod.0.weight", "0.weight"),
        ("module._orig_mod.0.weight", "0.weight"),
        ("layers._orig_mod.0.weight", "layers.0.weight"),
        ("module", "module"),
        ("encoder.module.weight", "encoder.module.weight"),
    ],
)
def test_clean_names(name, clean):
    assert clean_name(name) == clean


def test_names_that_would_collide_keep_both_parameters():
    class Collides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.module = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x) * self.weight

    model = made(Collides)
    operator = dyntune.hessian(model, BATCH, criterion=nn.CrossEntropyLoss())
    assert operator.names == ("weight", "module.weight", "bias")
    for options in ENGINES.values():
        found = dyntune.hessian(model, BATCH, criterion=nn.CrossEntropyLoss(), **options)
        assert relative_error(found.to_dense(), operator.to_dense().double()) < 1e-3  # that of finite differences


def test_a_model_in_data_parallel_has_plain_names():
    wrapped = nn.DataParallel(mlp())
    operator = dyntune.hessian(wrapped, BATCH, criterion=nn.CrossEntropyLoss())
    assert operator.names == ("0.weight", "0.bias", "2.weight", "2.bias")


# Exact engines to rounding in float64; finite differences as in their own test.
TOLERANCE = {"retained graph": 1e-12, "forward over reverse": 1e-12, "finite differences": 1e-9}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "selection"),
    [
        ("mlp", "2.*"),
        ("batchnorm", ["0.weight", "1.*"]),
        ("lstm", "cells.weight_hh*"),
        ("tied", "embed.weight"),
        ("tied", "mix.*"),
        ("multihead", "attend.in_proj*"),
        ("checkpointed sdpa", "qkv.bias"),
    ],
)
def test_a_selection_gives_its_block_of_the_whole_hessian(name, selection, engine):
    case = ZOO[name]().double()
    found = dyntune.hessian(case.model, case.batch, criterion=case.criterion, params=selection, **ENGINES[engine])
    chosen = torch.cat(
        [torch.full((p.numel(),), n in found.names) for n, p in case.model.named_parameters() if p.requires_grad]
    )
    assert 0 < found.numel == int(chosen.sum()) < len(chosen)
    assert relative_error(found.to_dense(), truth(name)[chosen][:, chosen]) < TOLERANCE[engine]


@pytest.mark.parametrize("engine", ENGINES)
def test_sparse_embeddings(engine):
    batch = (classes(4, 5, high=6), classes(4, 5, high=6, seed=2))
    dense, sparse = (made(lambda s=s: Tied(sparse=s)).double() for s in (False, True))
    for model in (dense, sparse):  # a tied output layer makes dense gradients anyway
        model.out.weight = nn.Parameter(model.embed.weight.detach().clone())
    found, expected = (
        dyntune.hessian(m, batch, criterion=nn.CrossEntropyLoss(), **ENGINES[engine]).to_dense()
        for m in (sparse, dense)
    )
    # Forward mode does not know sparse gradients and falls back to finite differences.
    assert relative_error(found, expected) < (1e-12 if engine == "retained graph" else 1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_parametrised_weights(engine):
    """Parameters named by torch's parametrisation, and the matrix exponential behind them."""
    model = made(lambda: nn.Sequential(orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3))).double()
    batch = BATCH[0].double(), BATCH[1]
    found = dyntune.hessian(model, batch, criterion=nn.CrossEntropyLoss(), **ENGINES[engine])
    assert "0.parametrizations.weight.original" in found.names
    truth = dense_hessian(model, batch, lambda call, data: nn.functional.cross_entropy(call(data[0]), data[1]))
    assert relative_error(found.to_dense(), truth) < TOLERANCE[engine]


def test_parameters_of_mixed_precision_keep_their_dtypes():
    model = mlp()
    model[2].double()
    operator = dyntune.hessian(
        model, BATCH, lambda m, b: nn.functional.cross_entropy(m[2](m[1](m[0](b[0])).double()), b[1])
    )
    product = operator.matvec(operator.space.normal(0))
    assert [t.dtype for t in product] == [torch.float32, torch.float32, torch.float64, torch.float64]
    assert operator.dtype == torch.float32


def test_parameters_without_entries_are_passed_over():
    model = mlp()
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, 4)))
    assert list(select_parameters(model)) == ["0.weight", "0.bias", "2.weight", "2.bias"]


# -- refused -----------------------------------------------------------------------------------------------------------


def with_value(value: float) -> nn.Module:
    model = mlp()
    model[2].bias.data[1] = value
    return model


def complex_model() -> nn.Module:
    model = mlp()
    model[0].weight = nn.Parameter(torch.zeros(5, 4, dtype=torch.complex64))
    return model


def lazy_model() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: lazy modules are a new feature
        return nn.LazyLinear(3)


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return mlp()


@pytest.mark.parametrize(
    ("model", "selection", "error", "message"),
    [
        (
            mlp().requires_grad_(False),
            None,
            NoParametersError,
            r"no trainable parameters \(4 parameters, none.*requires_g",
        ),
        (nn.Identity(), None, NoParametersError, r"no trainable parameters \(0 parameters"),
        (
            mlp(),
            "head.*",
            NoParametersError,
            r"params='head\.\*' matches none of the 4 .*begin with: 0\.weight, 0\.bias",
        ),
        (mlp(), lambda name: False, NoParametersError, "matches none of the 4 trainable"),
        (mlp(), [], NoParametersError, r"params=\[\] matches none"),
        (mlp(), 3, InvalidArgumentError, "params holds int; parameters are chosen by name: give a glob"),
        (mlp(), mlp().parameters(), InvalidArgumentError, "params holds Parameter; parameters are chosen by name"),
        (mlp(), ["*.weight", 0], InvalidArgumentError, "params holds int, str"),
        (mlp().bfloat16(), None, UnsupportedDtypeError, r"'0\.weight' is stored in torch\.bfloat16.*\.float\(\)"),
        (mlp().half(), "2.*", UnsupportedDtypeError, r"'2\.weight' is stored in torch\.float16"),
        (complex_model(), None, UnsupportedDtypeError, r"stored in torch\.complex64"),
        (
            with_value(float("nan")),
            None,
            NonFiniteError,
            r"'2\.bias' \(1 in all\) holds NaN or infinity.*earlier check",
        ),
        (with_value(float("inf")), "2.*", NonFiniteError, r"'2\.bias'"),
        (lazy_model(), None, InvalidArgumentError, "'weight' holds no numbers yet.*run the model on one batch"),
        (mlp().to("meta"), None, InvalidArgumentError, r"'0\.weight' holds no numbers yet"),
        (in_inference_mode(), None, InvalidArgumentError, r"'0\.weight' was made under torch\.inference_mode"),
    ],
)
def test_refused_with_the_remedy(model, selection, error, message):
    with pytest.raises(error, match=message):
        select_parameters(model, selection)


def test_a_parameter_that_is_not_selected_may_be_of_any_kind():
    model = with_value(float("nan"))
    model[2].half()
    model.register_parameter("steps", nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False))
    assert list(select_parameters(model, "0.*")) == ["0.weight", "0.bias"]


def test_integer_parameters_are_not_trainable():
    model = mlp()
    model.register_parameter("steps", nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False))
    assert Objective(model, BATCH, criterion=nn.CrossEntropyLoss()).space.numel == 43

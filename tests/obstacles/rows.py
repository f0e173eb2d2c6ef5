"""The rows. Hugging Face's and peft's are in `language_models.py`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset

from dyntune import errors
from tests.objective.zoo import classes, made, rows
from tests.obstacles import models
from tests.obstacles.language_models import LANGUAGE_ROWS
from tests.obstacles.problem import EPS, Problem, Row

__all__ = ["ROWS"]

X, Y = rows(12, 4), classes(12)
SEQUENCE = rows(6, 5, 4)
LABELS = classes(6)
CE = nn.CrossEntropyLoss()

# Finite differences in float32: a step of 1e-2 leaves rounding of EPS / step in the gradient's difference, of which the
# product is a sum; truncation is h^4 after extrapolation, and smaller.
DIFFERENCES = 100 * EPS / 1e-2
DIFFERENCES_REASON = "finite differences in float32"
# bfloat16 has 8 bits, 4e-3 per operation; forward, back and back again through two layers add up to a few percent.
BFLOAT16 = 0.05
MASKS = "masks fixed by `seed`"


def plain(model: nn.Module, x: torch.Tensor = X, y: torch.Tensor = Y, criterion: Any = CE, **more: Any) -> Problem:
    """One batch and a criterion."""
    return Problem(
        model=model,
        batches=(x, y),
        term=lambda model, batch: criterion(model(batch[0]), batch[1]),
        loss={"criterion": criterion},
        criterion=criterion,
        **more,
    )


def mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3))


def build(make: Callable[[], nn.Module], *, train: bool = True, **options: Any) -> Callable[[], Problem]:
    return lambda: plain(made(make).train(train), **options)


def row(name: str, group: str, make: Callable[[], Problem], **expected: Any) -> Row:
    return Row(name=name, group=group, build=make, **expected)


# -- attention ---------------------------------------------------------------------------------------------------------

sequences = functools.partial(build, x=SEQUENCE, y=LABELS)


def masked() -> Problem:
    mask = torch.ones(5, 5).tril(1).bool()

    def term(model: nn.Module, batch: Any) -> torch.Tensor:
        return CE(model(batch[0], mask), batch[1])

    return Problem(model=made(models.Attention), batches=(SEQUENCE, LABELS), term=term, loss={"loss_fn": term})


def encoder(dropout: float = 0.0) -> nn.Module:
    return models.WithHead(nn.TransformerEncoderLayer(4, 2, 6, dropout=dropout, batch_first=True, activation=F.gelu))


ATTENTION = [
    row("scaled_dot_product_attention, training", "attention", sequences(models.Attention)),
    row("scaled_dot_product_attention, evaluation", "attention", sequences(models.Attention, train=False)),
    row("scaled_dot_product_attention, attn_mask", "attention", masked),
    row(
        "scaled_dot_product_attention, is_causal",
        "attention",
        sequences(lambda: models.Attention(causal=True)),
    ),
    row(
        "scaled_dot_product_attention, dropout_p",
        "attention",
        sequences(lambda: models.Attention(dropout=0.3)),
        note=MASKS,
        random=True,
    ),
    row(
        "nn.MultiheadAttention",
        "attention",
        sequences(lambda: models.WithHead(nn.MultiheadAttention(4, 2, batch_first=True))),
    ),
    row(
        "nn.MultiheadAttention, need_weights=False",
        "attention",
        sequences(lambda: models.WithHead(nn.MultiheadAttention(4, 2, batch_first=True), need_weights=False)),
    ),
    row("nn.TransformerEncoderLayer, training", "attention", sequences(encoder)),
    row("nn.TransformerEncoderLayer, evaluation", "attention", sequences(encoder, train=False)),
    row(
        "nn.TransformerEncoderLayer, dropout",
        "attention",
        sequences(lambda: encoder(0.2)),
        note=MASKS,
        random=True,
    ),
]

# -- compiled, checkpointed, layers ------------------------------------------------------------------------------------


def compiled(*, in_place: bool) -> Problem:
    torch.compiler.reset()  # past a limit of variants torch runs the code of one class eagerly, without a word
    model = made(models.Blocks)
    if in_place:
        model.compile(backend="aot_eager")
    else:
        model = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    problem = plain(model)
    CE(model(X), Y).backward()  # the user has trained: code is compiled, gradients are there
    return problem


def checkpointed(reentrant: bool) -> Problem:
    def unchecked(twin: nn.Module) -> nn.Module:
        twin.reentrant = None  # type: ignore[assignment]
        return twin

    return plain(made(lambda: models.Blocks(reentrant)), exact=unchecked)


PROGRAMS = [
    row(
        "torch.compile(model)",
        "compiled and checkpointed",
        lambda: compiled(in_place=False),
        note="measured eagerly, stays compiled",
    ),
    row(
        "model.compile()",
        "compiled and checkpointed",
        lambda: compiled(in_place=True),
        note="measured eagerly, stays compiled",
    ),
    row("checkpoint(use_reentrant=False)", "compiled and checkpointed", lambda: checkpointed(False)),
    row(
        "checkpoint(use_reentrant=True)",
        "compiled and checkpointed",
        lambda: checkpointed(True),
        error=errors.HVPUnsupportedError,
        fix="Pass use_reentrant=False",
    ),
    row("nn.LayerNorm", "layers", build(lambda: mlp(nn.LayerNorm(6)))),
    row("nn.LSTM", "layers", sequences(lambda: models.Recurrent(nn.LSTM), x=rows(6, 5, 3))),
    row("nn.GRU", "layers", sequences(lambda: models.Recurrent(nn.GRU), x=rows(6, 5, 3))),
]

# -- buffers and randomness --------------------------------------------------------------------------------------------


def settled(make: Callable[[], nn.Module], *, train: bool) -> Callable[[], Problem]:
    """After some training steps, so that running statistics are not those of a new model."""

    def problem() -> Problem:
        model = made(make).train()
        for shift in range(3):
            model(X + 0.5 * shift)
        return plain(model.train(train))

    return problem


def unseeded_noise() -> Problem:
    generator = torch.Generator().manual_seed(3)

    def term(model: nn.Module, batch: Any) -> torch.Tensor:
        noise = torch.randn(batch[0].shape, generator=generator)
        return CE(model(batch[0] + noise.to(batch[0].dtype)), batch[1])

    return Problem(model=made(mlp), batches=(X, Y), term=term, loss={"loss_fn": term})


def iterating_loss() -> Problem:
    stream = itertools.cycle([(rows(12, 4, seed=s), classes(12, seed=s)) for s in range(3)])

    def term(model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = next(stream)
        return CE(model(x.to(batch[0].dtype)), y)

    return Problem(model=made(mlp), batches=(X, Y), term=term, loss={"loss_fn": term})


RANDOMNESS = [
    row("BatchNorm, training", "buffers and randomness", settled(lambda: mlp(nn.BatchNorm1d(6)), train=True)),
    row("BatchNorm, evaluation", "buffers and randomness", settled(lambda: mlp(nn.BatchNorm1d(6)), train=False)),
    row(
        "spectral_norm, training",
        "buffers and randomness",
        settled(lambda: nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)), train=True),
        note="power iterations run on lent buffers",
    ),
    row(
        "spectral_norm, evaluation",
        "buffers and randomness",
        settled(lambda: nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)), train=False),
    ),
    row("Dropout", "buffers and randomness", build(lambda: mlp(nn.Dropout(0.4))), note=MASKS, random=True),
    row(
        "noise from a generator that a module holds",
        "buffers and randomness",
        build(models.Noise),
        note="seeded, and put back",
        random=True,
    ),
    row(
        "noise from a generator in the loss function",
        "buffers and randomness",
        unseeded_noise,
        error=errors.NondeterministicLossError,
        fix="seed a generator of your own at the start of each call",
        answer=False,
    ),
    row(
        "a loss that takes its data from an iterator",
        "buffers and randomness",
        iterating_loss,
        error=errors.NondeterministicLossError,
        fix="take the data from `batch`",
        answer=False,
    ),
]

# -- precision ---------------------------------------------------------------------------------------------------------


def autocast_in_loss() -> Problem:
    def term(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=batch[0].dtype == torch.float32):
            return CE(model(batch[0]), batch[1])

    return Problem(model=made(mlp), batches=(X, Y), term=term, loss={"loss_fn": term})


def scaled_training(*, fused: bool) -> Problem:
    """Between ``scaler.scale(loss).backward()`` and ``scaler.step(optimizer)``: gradients are scaled."""
    model = made(mlp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = CE(model(X), Y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    scaler.scale(CE(model(X), Y)).backward()
    return plain(model, held=(optimizer, scaler))


def stored(dtype: torch.dtype) -> Problem:
    return plain(made(mlp).to(dtype), x=X.to(dtype))


def cast_by_name() -> Problem:
    def as_given(twin: nn.Module) -> nn.Module:
        twin.by_name = False  # type: ignore[assignment]
        return twin

    return plain(made(models.CastByName).bfloat16(), exact=as_given)


PRECISION = [
    row(
        "autocast bfloat16 in the loss function",
        "precision",
        autocast_in_loss,
        tolerance=BFLOAT16,
        reason="bfloat16: 4e-3 an operation",
        note="as the loss function says",
    ),
    row(
        "caller within autocast",
        "precision",
        build(mlp, caller=lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
        note="measured in float32",
    ),
    row("GradScaler, AdamW", "precision", lambda: scaled_training(fused=False), note="gradients stay scaled"),
    row("GradScaler, fused AdamW", "precision", lambda: scaled_training(fused=True), note="gradients stay scaled"),
    row("bfloat16 parameters", "precision", lambda: stored(torch.bfloat16), note="through a float32 copy"),
    row("float16 parameters", "precision", lambda: stored(torch.float16), note="through a float32 copy"),
    row(
        "bfloat16 body, float32 head",
        "precision",
        lambda: plain(made(models.MixedPrecision), x=X.bfloat16()),
        note="through a float32 copy",
    ),
    row(
        "bfloat16 parameters, a cast by name in forward",
        "precision",
        cast_by_name,
        error=errors.UnsupportedDtypeError,
        fix=r"write x\.to\(self\.weight\.dtype\)",
    ),
]

# -- parameters --------------------------------------------------------------------------------------------------------


def frozen() -> Problem:
    model = made(mlp)
    model[0].requires_grad_(False)
    return plain(model)


def tokens(*, tied: bool, sparse: bool = False) -> Problem:
    model = made(lambda: models.TiedEmbedding(tied=tied, sparse=sparse))
    return plain(model, x=classes(4, 5, high=7), y=classes(4, 5, high=7, seed=2), weight=lambda batch: 20.0)


def branch() -> Problem:
    x, y = rows(8, 4), rows(8, 1, seed=1)
    return plain(made(models.Branch), x=x, y=y, criterion=nn.MSELoss())


def linear_everywhere() -> Problem:
    def term(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch[0]).mean() + sum(p.square().sum() for p in model[0].parameters())

    model = made(lambda: nn.Sequential(nn.Linear(4, 3)))
    return Problem(model=model, batches=(X, Y), term=term, loss={"loss_fn": term})


def constant() -> Problem:
    def term(model: nn.Module, batch: Any) -> torch.Tensor:
        return CE(model(batch[0]).detach(), batch[1])

    return Problem(model=made(mlp), batches=(X, Y), term=term, loss={"loss_fn": term})


def groups() -> Problem:
    model = made(mlp)
    optimizer = torch.optim.AdamW(
        [
            {"params": model[0].parameters(), "lr": 1e-3, "weight_decay": 0.1},
            {"params": model[-1].parameters(), "lr": 1e-2, "weight_decay": 0.0},
        ]
    )
    for _ in range(3):
        optimizer.zero_grad()
        CE(model(X), Y).backward()
        optimizer.step()
    return plain(model, held=(optimizer,))


def accumulating() -> Problem:
    """Micro-batches of 2, 4 and 6 rows; the gradients of the first are in ``.grad`` already."""
    parts = [(X[:2], Y[:2]), (X[2:6], Y[2:6]), (X[6:], Y[6:])]
    problem = plain(made(mlp), data=parts)
    CE(problem.model(X[:2]), Y[:2]).backward()
    return Problem(**{**vars(problem), "batches": parts})


def diverged() -> Problem:
    model = made(mlp)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    return plain(model)


PARAMETERS = [
    row("tied weights", "parameters", lambda: tokens(tied=True)),
    row("frozen parameters", "parameters", frozen),
    row("sparse embedding", "parameters", lambda: tokens(tied=False, sparse=True)),
    row("loss linear in one parameter and constant in another", "parameters", branch),
    row("loss linear in the output, quadratic in the weights", "parameters", linear_everywhere),
    row(
        "loss constant in all parameters",
        "parameters",
        constant,
        error=errors.NoGradientError,
        fix=r"no_grad\(\), from detached",
        answer=False,
    ),
    row("parameter groups with their own rates and decays", "parameters", groups, note="the optimizer is not asked"),
    row(
        "NaN parameters",
        "parameters",
        diverged,
        error=errors.NonFiniteError,
        fix="Measure an earlier checkpoint",
        answer=False,
    ),
]

# -- operations without a second derivative ----------------------------------------------------------------------------


def squared(function: type[models.Square]) -> Callable[[], Problem]:
    """The oracle squares by multiplication."""

    def true_square(twin: nn.Module) -> nn.Module:
        twin.square = lambda a: a * a  # type: ignore[assignment]
        return twin

    return lambda: plain(made(lambda: models.Squared(function.apply)), exact=true_square)


def by_formula(make: Callable[[], nn.Module]) -> Callable[[], Problem]:
    """The oracle uses the formula."""

    def formula(twin: nn.Module) -> nn.Module:
        twin.fused = False  # type: ignore[assignment]
        return twin

    return lambda: plain(made(make), exact=formula)


FUNCTIONS = [
    row(
        "weight_norm",
        "operations without a second derivative",
        by_formula(models.WeightNorm),
        engine="finite-difference",
        because="second derivative of weight_norm is wrong",
        tolerance=DIFFERENCES,
        reason=DIFFERENCES_REASON,
        note="wrong in torch itself; found by comparison with finite differences",
    ),
    row(
        "torch.cdist",
        "operations without a second derivative",
        by_formula(models.Distances),
        engine="finite-difference",
        because="_cdist_backward",
        tolerance=DIFFERENCES,
        reason=DIFFERENCES_REASON,
        note="torch says that it has none",
    ),
    row(
        "autograd.Function, once_differentiable",
        "operations without a second derivative",
        squared(models.Once),
        engine="finite-difference",
        because="once_differentiable",
        tolerance=DIFFERENCES,
        reason=DIFFERENCES_REASON,
        note="found in the gradient's graph",
    ),
    row(
        "autograd.Function, detached backward",
        "operations without a second derivative",
        squared(models.Detached),
        engine="finite-difference",
        because="second derivative of Detached is wrong",
        tolerance=DIFFERENCES,
        reason=DIFFERENCES_REASON,
        note="found by comparison with finite differences",
    ),
    row(
        "autograd.Function, twice differentiable",
        "operations without a second derivative",
        squared(models.Square),
        note="verified, exact",
    ),
]

# -- callers -----------------------------------------------------------------------------------------------------------

CALLERS = [
    row("caller within no_grad", "callers", build(mlp, caller=torch.no_grad)),
    row("caller within inference_mode", "callers", build(mlp, caller=torch.inference_mode)),
]

# -- losses and data ---------------------------------------------------------------------------------------------------

TOKENS = [(classes(2, 6, high=7, seed=s), classes(2, 6, high=7, seed=10 + s)) for s in range(2)]
TOKENS[1][1][:, 2:] = -100  # the second batch has a third of the first one's targets
WEIGHTS = torch.tensor([0.2, 1.0, 3.0])


def shuffled() -> Problem:
    generator = torch.Generator().manual_seed(7)
    loader = DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True, generator=generator)  # 5, 5 and 2 rows
    problem = plain(made(mlp), held=(generator,), data=[(X, Y)])
    return Problem(**{**vars(problem), "batches": loader})


def several(criterion: nn.Module, *, summed: bool = False, weight: Callable[[Any], float] | None = None) -> Problem:
    """Batches of 4 and 8 rows, of other classes."""
    order = Y.argsort()
    parts = [(X[order[:4]], Y[order[:4]]), (X[order[4:]], Y[order[4:]])]
    more = {} if weight is None else {"weight": weight}
    problem = plain(made(mlp), criterion=criterion, data=parts, summed=summed, **more)
    return Problem(**{**vars(problem), "batches": parts})


class InDouble(nn.CrossEntropyLoss):
    """Class weights follow the logits' dtype, so that the oracle's twin can use them."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets, self.weight.to(outputs.dtype))


def ignored() -> Problem:
    model = made(lambda: models.TiedEmbedding(tied=False))
    problem = plain(model, criterion=CE, data=TOKENS, weight=lambda batch: float((batch[1] != -100).sum()))
    return Problem(**{**vars(problem), "batches": TOKENS})


def auxiliary() -> Problem:
    """Weight decay from the model's parameters, and a penalty that a module leaves behind."""

    class Penalised(models.Blocks):
        def block(self, h: torch.Tensor) -> torch.Tensor:
            self.penalty = h.square().mean()
            return super().block(h)

    def term(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = CE(model(batch[0]), batch[1])
        return loss + 0.1 * model.penalty + 0.01 * sum(p.square().sum() for p in model.parameters())

    return Problem(model=made(Penalised), batches=(X, Y), term=term, loss={"loss_fn": term})


def one_shot() -> Problem:
    problem = plain(made(mlp), data=[(X, Y)])
    return Problem(**{**vars(problem), "batches": iter([(X, Y)])})


LOSSES = [
    row("shuffling loader, ragged last batch", "losses and data", shuffled, note="drawn once, weighted by rows"),
    row(
        "one-shot iterator",
        "losses and data",
        one_shot,
        error=errors.OneShotIteratorError,
        fix=r"batches = list\(itertools\.islice",
    ),
    row(
        'reduction="sum", two batches',
        "losses and data",
        lambda: several(nn.CrossEntropyLoss(reduction="sum"), summed=True),
    ),
    row("ignore_index, unequal counts", "losses and data", ignored, note="weighted by targets that count"),
    row(
        "class weights, two batches",
        "losses and data",
        lambda: several(InDouble(weight=WEIGHTS), weight=lambda batch: float(WEIGHTS[batch[1]].sum())),
        note="weighted by class weights",
    ),
    row(
        "label smoothing",
        "losses and data",
        lambda: plain(made(mlp), criterion=nn.CrossEntropyLoss(label_smoothing=0.2)),
    ),
    row("auxiliary terms from parameters and activations", "losses and data", auxiliary),
    row("gradient accumulation, unequal micro-batches", "losses and data", accumulating, note="weighted by rows"),
]

# -- failures in mid-probe ---------------------------------------------------------------------------------------------


def failing(condition: models.Condition) -> Callable[[], Problem]:
    """Two batches through a network with a module that fails when `condition` says so; the oracle has none."""

    def problem() -> Problem:
        parts = [(X[:6], Y[:6]), (X[6:], Y[6:])]

        def unhindered(twin: nn.Module) -> nn.Module:
            twin[1] = nn.Identity()  # type: ignore[index,operator]
            return twin

        base = plain(made(lambda: mlp(models.StopAt(condition))), data=parts, exact=unhindered)
        return Problem(**{**vars(base), "batches": parts})

    return problem


def no_second_graph(stop: models.StopAt, backward: bool) -> BaseException | None:
    """As if one batch's graph filled the memory."""
    return torch.OutOfMemoryError("simulated: no room for a second graph") if stop.live > 1 else None


def no_graph_of_a_gradient(stop: models.StopAt, backward: bool) -> BaseException | None:
    """As if a gradient's own graph did not fit: gradients are enabled in a backward pass only to make one."""
    making = backward and torch.is_grad_enabled()
    return torch.OutOfMemoryError("simulated: no room for the gradient's graph") if making else None


def no_backward(stop: models.StopAt, backward: bool) -> BaseException | None:
    """As if not even a gradient fitted."""
    return torch.OutOfMemoryError("simulated: no room for a gradient") if backward else None


def interrupted(stop: models.StopAt, backward: bool) -> BaseException | None:
    """Ctrl-C in the first backward pass."""
    return KeyboardInterrupt() if backward else None


FAILURES = [
    row(
        "out of memory: the batches' graphs together",
        "failures in mid-probe",
        failing(no_second_graph),
        engine="re-forward",
        because="out of memory with retained-graph: OutOfMemoryError: simulated",
        note="simulated; one batch at a time",
    ),
    row(
        "out of memory: the graph of a gradient",
        "failures in mid-probe",
        failing(no_graph_of_a_gradient),
        engine="forward-over-reverse",
        because="out of memory with re-forward: OutOfMemoryError: simulated",
        note="simulated",
    ),
    row(
        "out of memory: even a gradient",
        "failures in mid-probe",
        failing(no_backward),
        error=errors.InsufficientMemoryError,
        fix="Give batches of fewer rows",
        answer=False,
        note="simulated",
    ),
    row(
        "KeyboardInterrupt in a backward pass",
        "failures in mid-probe",
        failing(interrupted),
        error=KeyboardInterrupt,
        answer=False,
        note="passes through",
    ),
]

ROWS: dict[str, Row] = {
    found.name: found
    for found in itertools.chain(
        ATTENTION, LANGUAGE_ROWS, PROGRAMS, RANDOMNESS, PRECISION, PARAMETERS, FUNCTIONS, CALLERS, LOSSES, FAILURES
    )
}

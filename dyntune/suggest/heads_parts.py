"""Curvature of a transformer's parts: queries, keys, values, outputs, MLP, embeddings, and each head by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dyntune.curvature.eigenvalues import eigenvalues
from dyntune.curvature.hessian import HessianOperator, hessian
from dyntune.dynamics.attention_weights import AttentionWeights, Run, find_attention
from dyntune.errors import UnreadableModelError
from dyntune.numerics.submatrix import Submatrix, Window
from dyntune.objective.losses import Criterion, LossFunction

__all__ = ["head_spectra", "part_spectra", "parts_of"]

QK = ("queries", "keys")
# Products and relative accuracy of a part: these numbers are looked at side by side, nothing is computed from them.
PRODUCTS, RTOL = 30, 0.05
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def parts_of(model: nn.Module, names: Sequence[str]) -> dict[str, list[Window]]:
    """Windows of each part that a model has, by its name; what is in none (norms, biases, the head) is left out.

    The MLP is what else has two or more dimensions in the block around an attention module: the module below the
    nearest list of modules, or else the attention's parent.

    Args:
        model: With attention that :func:`~dyntune.dynamics.attention_weights.find_attention` can read.
        names: Of the parameters, in the order of the operator's vectors.

    Raises:
        UnreadableModelError: No attention was found.
    """
    attention = find_attention(model)
    if not attention:
        raise UnreadableModelError("no attention module was found by its parts, so that none has a spectrum.")
    places = {name: index for index, name in enumerate(names)}
    parts: dict[str, list[Window]] = {}
    for weights in attention.values():
        for part, runs in _runs(weights).items():
            parts.setdefault(part, []).extend(window for run in runs for window in _window(run, places))
    taken = {window.index for windows in parts.values() for window in windows}
    tensors = dict(model.named_parameters(remove_duplicate=False))

    def whole(chosen: Iterator[str]) -> list[Window]:
        found = dict.fromkeys(places[n] for n in chosen if n in places)
        windows = [Window(i, 0, tensors[names[i]].shape[0]) for i in found if i not in taken]
        taken.update(w.index for w in windows)
        return windows

    parts["embeddings"] = whole(
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)
    )
    blocks = {_block(model, name) for name in attention}
    parts["MLP"] = whole(
        name for name, p in tensors.items() if p.dim() > 1 and any(name.startswith(f"{b}.") for b in blocks if b)
    )
    return {part: windows for part, windows in parts.items() if windows}


def _runs(weights: AttentionWeights) -> dict[str, tuple[Run, ...]]:
    return {"queries": weights.query, "keys": weights.key, "values": weights.value, "outputs": weights.output}


def _window(run: Run, places: Mapping[str, int]) -> list[Window]:
    """The run as a window; none where its parameter is frozen."""
    return [Window(places[run.parameter], run.start, run.stop, run.dim)] if run.parameter in places else []


def _block(model: nn.Module, name: str) -> str:
    parts = name.split(".")
    modules = dict(model.named_modules())
    for length in range(len(parts) - 1, 0, -1):
        if isinstance(modules[".".join(parts[: length - 1])], _CONTAINERS):
            return ".".join(parts[:length])
    return ".".join(parts[:-1])


def part_spectra(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFunction | None,
    criterion: Criterion | None,
    *,
    seed: int,
) -> tuple[dict[str, float], float]:
    """Largest eigenvalue of each part's block of the Hessian, and the top eigenvector's mass on queries and keys.

    Args:
        model: As it is.
        batches: All are used.
        loss_fn: The loss.
        criterion: Likewise.
        seed: Of starting vectors.

    Returns:
        Numbers by name; those whose solve ran out of products are left out. The cost in gradients.
    """
    whole = hessian(model, list(batches), loss_fn, criterion=criterion, num_batches="all", seed=seed)
    parts = parts_of(model, whole.names)
    top = eigenvalues(whole, 1, rtol=RTOL, max_products=PRODUCTS, seed=seed)
    found: dict[str, float] = {}
    vector = top.vectors[0]
    pieces = list(whole.space.unflatten(vector)) if isinstance(vector, torch.Tensor) else list(vector)
    total = sum(float(t.double().square().sum()) for t in pieces)
    mass = sum(float(w.of(pieces).double().square().sum()) for part in QK for w in parts.get(part, ()))
    if top.converged:
        found["mass of the top eigenvector on queries and keys"] = mass / total
    products = top.num_products
    for part, windows in parts.items():
        value, spent = _largest(whole, windows, seed)
        products += spent
        if value is not None:
            found[f"lambda_max of {part}"] = value
    return found, 2.0 * products * len(batches)  # a product costs about two gradients


def head_spectra(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFunction | None,
    criterion: Criterion | None,
    *,
    seed: int,
) -> tuple[dict[str, tuple[float, ...]], float]:
    """Largest eigenvalue of the block of each head's queries and keys, by module; NaN where a solve did not end.

    Args:
        model: As it is.
        batches: All are used.
        loss_fn: The loss.
        criterion: Likewise.
        seed: Of starting vectors.

    Cost:
        A solve for each head of each module, one to three dozen products.
    """
    whole = hessian(model, list(batches), loss_fn, criterion=criterion, num_batches="all", seed=seed)
    places = {name: index for index, name in enumerate(whole.names)}
    found: dict[str, tuple[float, ...]] = {}
    products = 0
    for name, weights in find_attention(model).items():
        values = []
        for head in range(weights.heads):
            windows = [*_window(weights.query[head], places), *_window(weights.key_of(head), places)]
            value, spent = _largest(whole, windows, seed) if windows else (None, 0)
            products += spent
            values.append(float("nan") if value is None else value)
        found[name] = tuple(values)
    return found, 2.0 * products * len(batches)


def _largest(whole: HessianOperator, windows: Sequence[Window], seed: int) -> tuple[float | None, int]:
    found = eigenvalues(Submatrix(whole, windows), 1, rtol=RTOL, max_products=PRODUCTS, seed=seed)
    return (float(found.values[0]) if found.converged else None), found.num_products

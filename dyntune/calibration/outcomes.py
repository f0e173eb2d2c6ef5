"""Predicted probabilities and targets as what calibration is about: a probability, and whether it came true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from dyntune.errors import InvalidArgumentError, NonFiniteError

__all__ = ["Classes", "Outcomes", "as_array", "outcomes"]

Classes: TypeAlias = Literal["top", "each"]
Array: TypeAlias = "torch.Tensor | np.ndarray | Sequence[Any]"
SUM_RTOL = 1e-3  # of a row's probabilities: what a softmax in half precision leaves


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """One yes-or-no problem.

    Args:
        name: Which one, such as ``"top label"``, ``"class 3"``.
        confidence: Predicted probability; shape (N,), float64, in [0, 1].
        correct: Whether it came true; shape (N,), bool.
        below: Sum of the probabilities of classes before this one, (N,): of classes that exclude each other one number
            draws all. 0 otherwise.
    """

    name: str
    confidence: np.ndarray
    correct: np.ndarray
    below: np.ndarray | float = 0.0


def outcomes(probabilities: Array, targets: Array, *, classes: Classes = "top") -> tuple[Outcomes, ...]:
    """The yes-or-no problems in predictions.

    Args:
        probabilities: Shape (N,): of the positive class; (N, K) with integer targets: of K classes, rows that sum to 1;
            (N, L) with targets of the same shape: of L labels that do not exclude each other.
        targets: Shape (N,): class numbers, or 0 and 1; or (N, L): 0 and 1.
        classes: ``"top"``: the predicted class alone, for K classes. ``"each"``: every class, of all rows.

    Returns:
        One problem for ``"top"`` and for two classes given as (N,), K or L otherwise.

    Raises:
        InvalidArgumentError: Empty, shapes that do not fit, values outside [0, 1], unknown labels.
        NonFiniteError: A probability is NaN or infinite.

    Example:
        >>> (top,) = outcomes([[0.7, 0.3], [0.4, 0.6]], [0, 0])
        >>> top.confidence.tolist(), top.correct.tolist()
        ([0.7, 0.6], [True, False])
    """
    if classes not in ("top", "each"):
        raise InvalidArgumentError(f'classes={classes!r}: "top" (the predicted class) or "each".')
    p, y = as_array(probabilities, "probabilities").astype(np.float64), as_array(targets, "targets")
    if p.ndim not in (1, 2) or p.size == 0 or len(y) != len(p):
        raise InvalidArgumentError(
            f"probabilities of shape {p.shape} with targets of shape {y.shape}: give (N,) or (N, K), N of both, N > 0."
        )
    if not np.isfinite(p).all():
        raise NonFiniteError(
            f"{int((~np.isfinite(p)).sum())} of {p.size} probabilities are NaN or infinite: there is no frequency to "
            "hold them against. Look at the logits of those rows."
        )
    if p.min() < 0 or p.max() > 1:
        raise InvalidArgumentError(
            f"probabilities lie in [{p.min():.4g}, {p.max():.4g}]: these look like logits. Pass them through softmax "
            "or sigmoid, or ask suggest_temperature, which takes logits."
        )
    if p.ndim == 1 or y.ndim == 2:
        _yes_or_no(y, p.shape)
        columns = p[:, None] if p.ndim == 1 else p
        truth = y.reshape(columns.shape).astype(bool)
        names = ("positive class",) if p.ndim == 1 else tuple(f"label {i}" for i in range(p.shape[1]))
        return tuple(Outcomes(name=n, confidence=columns[:, i], correct=truth[:, i]) for i, n in enumerate(names))
    sums = p.sum(1)
    if np.abs(sums - 1).max() > SUM_RTOL:
        raise InvalidArgumentError(
            f"rows of probabilities sum to {sums.min():.4g} .. {sums.max():.4g}, not to 1: of classes they do. For "
            "labels that do not exclude each other give targets of the same shape as the probabilities."
        )
    labels = class_numbers(y, p.shape[1])
    if classes == "top":
        top = p.argmax(1)
        return (Outcomes(name="top label", confidence=p[np.arange(len(p)), top], correct=top == labels),)
    below = np.cumsum(p, 1) - p
    return tuple(
        Outcomes(name=f"class {k}", confidence=p[:, k], correct=labels == k, below=below[:, k])
        for k in range(p.shape[1])
    )


def as_array(values: Array, name: str) -> np.ndarray:
    """Numbers of any kind as an array on the CPU."""
    if isinstance(values, torch.Tensor):
        x = values.detach().cpu()
        return (x.double() if x.is_floating_point() else x).numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise InvalidArgumentError(f"{name} of type {array.dtype}: numbers are needed.")
    return array


def class_numbers(y: np.ndarray, count: int) -> np.ndarray:
    """Class numbers, checked against how many classes there are."""
    if y.ndim != 1 or not (y.dtype.kind in "iub" or np.array_equal(y, np.round(y))):
        raise InvalidArgumentError(f"targets of shape {y.shape} and type {y.dtype}: class numbers of shape (N,).")
    labels = y.astype(np.int64)
    if labels.min() < 0 or labels.max() >= count:
        raise InvalidArgumentError(
            f"targets lie in {labels.min()} .. {labels.max()}, but there are {count} classes (0 to {count - 1}). Rows "
            "that are to be ignored (-100) have to be left out of both."
        )
    return labels


def _yes_or_no(y: np.ndarray, shape: tuple[int, ...]) -> None:
    if y.shape != shape or not np.isin(y, (0, 1)).all():
        raise InvalidArgumentError(
            f"targets of shape {y.shape} beside probabilities of shape {shape}: 0 and 1 of the same shape are needed "
            "for a positive class or for labels, class numbers of shape (N,) for probabilities of shape (N, K)."
        )

r"""The logits that a model ends in: how large, their :math:`\log Z = \log\sum_j e^{z_j}`, and where it drifts.

Cross-entropy does not change when all logits of a position do, so nothing but weight decay or a z-loss holds
:math:`\log Z`; its drift away from zero precedes divergence at large learning rates. Source: Wortsman et al. (2023),
arXiv:2309.14322, section 3.2; the z-loss :math:`10^{-4} \log^2 Z` is of Chowdhery et al. (2022), arXiv:2204.02311.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.numerics.arithmetic import plain_arithmetic
from dyntune.numerics.student import LEVEL, student_interval
from dyntune.objective.batches import num_rows, tensors_of
from dyntune.objective.losses import LossFunction, tensor_output
from dyntune.objective.passes import ForwardPasses
from dyntune.records import Estimate, Status

__all__ = ["LogitTally", "OutputLogits", "output_logits"]

# Logits worked on at a time: 64 MiB of float32 with four temporaries.
BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class OutputLogits:
    """What a model's logits were on some batches.

    Args:
        max_abs_logit: Largest absolute logit; NaN where one is.
        log_z: Mean of log Z; the interval covers the choice of rows.
        log_z_spread: Standard deviation of log Z over positions.
        z_loss: Mean of ``(log Z)^2``; times 1e-4 it is the usual penalty.
        entropy: Mean entropy of the predictions in nats; the interval covers the choice of rows.
        classes: How many logits a position has.
        positions: How many positions were counted.
    """

    max_abs_logit: float
    log_z: Estimate
    log_z_spread: float
    z_loss: float
    entropy: Estimate
    classes: int
    positions: int
    row_means: tuple[tuple[float, float], ...] = field(repr=False)
    data: str = field(repr=False)

    def drift(self, earlier: OutputLogits) -> dict[Literal["log_z", "entropy"], Estimate]:
        """What changed since `earlier`, each with an interval at level 0.95.

        Measured on the same batches, differences are taken row by row, which leaves out how rows differ from each
        other; on others, the two are independent samples (Welch).

        Raises:
            InvalidArgumentError: Another number of classes.

        Example:
            >>> model, x = nn.Linear(3, 4), torch.randn(8, 3)
            >>> before = output_logits(model, x)
            >>> with torch.no_grad():
            ...     _ = model.bias.add_(0.5)
            >>> print(output_logits(model, x).drift(before)["log_z"])
            0.5 (0.5 .. 0.5) nats
        """
        if self.classes != earlier.classes:
            raise InvalidArgumentError(
                f"logits of {self.classes} classes now and of {earlier.classes} earlier: log Z grows with their "
                "number. Compare measurements of one model."
            )
        now, then = np.array(self.row_means), np.array(earlier.row_means)
        paired = self.data == earlier.data
        return {
            "log_z": _difference(now[:, 0], then[:, 0], paired=paired),
            "entropy": _difference(now[:, 1], then[:, 1], paired=paired),
        }


def output_logits(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    dim: int | None = None,
    num_batches: int | Literal["all"] = 16,
    autocast: torch.dtype | None = None,
    seed: int = 0,
) -> OutputLogits:
    """Size of a classifier's or language model's logits, log Z, and the entropy of its predictions.

    Args:
        model: The model, in its present mode. Its output is a tensor of logits, has ``.logits``, or begins with them.
        batches: As for :func:`dyntune.hessian`; of a pair the second element (the targets) is not used. Where a batch
            is a mapping with an ``attention_mask`` shaped like the positions, those with 0 are left out.
        loss_fn: ``(model, batch) -> logits``: how they are made, where not by ``model(inputs)``.
        dim: Which dimension holds the classes. Default: the last; 1 for outputs of four dimensions and more, as in
            ``cross_entropy``. For outputs (rows, classes, positions) pass 1.
        num_batches: How many batches to draw from a loader.
        autocast: Dtype of mixed precision, as in training.
        seed: Seed of dropout.

    Returns:
        The record; means give every row of the batches the same weight, whatever its number of positions.

    Raises:
        AmbiguousLossError: The output holds no tensor that could be logits.
        InvalidArgumentError: A single class, a `dim` that is none, or no position that counts; a sharded model.
        BatchError: See the batch grammar.

    Accuracy:
        In float32 at least; log Z and entropy from logits less their largest, so that large ones cost no digits.
    Cost:
        One forward pass per batch, and a few passes over its logits in blocks of 2^22.
    Source:
        Wortsman et al. (2023), arXiv:2309.14322, section 3.2.

    Example:
        >>> model = nn.Linear(3, 4)
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_(), model.bias.fill_(2.0)
        >>> found = output_logits(model, torch.randn(8, 3))
        >>> print(round(float(found.log_z) - math.log(4), 5), found.max_abs_logit)
        2.0 2.0
    """
    passes = ForwardPasses(model, batches, loss_fn, num_batches=num_batches, autocast=autocast, seed=seed)
    tally = LogitTally(dim)
    passes.run(lambda index, output: tally.update(passes.batches[index], tensor_output(output)))
    return tally.read(passes.batches)


class LogitTally:
    """Log Z and entropy of every position, batch by batch.

    Args:
        dim: See :func:`output_logits`.
    """

    def __init__(self, dim: int | None = None) -> None:
        self._dim, self._classes, self._offset = dim, 0, 0
        self._parts: list[torch.Tensor] = []
        self._owners: list[torch.Tensor] = []
        self._largest: list[torch.Tensor] = []

    def update(self, batch: Any, output: torch.Tensor) -> None:
        """Take in what the model made of a batch.

        Raises:
            InvalidArgumentError: A single class, or a `dim` that is none.
        """
        logits = _classes_last(output, self._dim)
        classes = self._classes = logits.shape[-1]
        kept = _kept(batch, logits)
        rows = num_rows(batch)
        owner = torch.arange(logits[..., 0].numel(), device=logits.device) // max(1, logits[..., 0].numel() // rows)
        flat, chosen = logits.reshape(-1, classes), kept.reshape(-1)
        with plain_arithmetic(logits.device), torch.no_grad():
            step = max(1, BLOCK // classes)
            for block, use in zip(torch.split(flat, step), torch.split(chosen, step), strict=True):
                found, peak = _positions(block[use])
                self._parts.append(found.cpu())
                self._largest.append(peak.cpu())
        self._owners.append(owner[chosen].clamp_max(rows - 1).cpu() + self._offset)
        self._offset += rows

    def read(self, batches: tuple[Any, ...]) -> OutputLogits:
        """The record.

        Args:
            batches: Those that were taken in.

        Raises:
            InvalidArgumentError: No position counts.
        """
        values, owner = torch.cat(self._parts, dim=1), torch.cat(self._owners)
        if not owner.numel():
            raise InvalidArgumentError("no position counts: the attention masks of all batches are zero everywhere.")
        means = _row_means(values, owner)
        log_z = values[0]
        return OutputLogits(
            max_abs_logit=float(torch.stack(self._largest).max()),
            log_z=_estimate(means[:, 0]),
            log_z_spread=float(log_z.std()) if log_z.numel() > 1 else 0.0,
            z_loss=float((log_z**2).mean()),
            entropy=_estimate(means[:, 1]),
            classes=self._classes,
            positions=log_z.numel(),
            row_means=tuple((a, b) for a, b in means.tolist()),
            data=_fingerprint(batches),
        )


def _classes_last(logits: torch.Tensor, dim: int | None) -> torch.Tensor:
    wanted = (1 if logits.dim() > 3 else -1) if dim is None else dim
    if not -logits.dim() <= wanted < logits.dim() or logits.shape[wanted] < 2:
        raise InvalidArgumentError(
            f"the model's output has shape {tuple(logits.shape)}, and dim={wanted} is to hold the logits of two "
            "classes or more. Pass dim=..., or loss_fn=lambda model, batch: logits."
        )
    return logits.movedim(wanted, -1)


def _kept(batch: Any, logits: torch.Tensor) -> torch.Tensor:
    """Which positions are not padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, torch.Tensor) and mask.shape == logits.shape[:-1]:
        return mask != 0
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)


def _positions(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log Z and entropy of each position, shape (2, positions), and the largest absolute logit, zero without any."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if not len(z):
        return z.new_zeros(2, 0).double(), z.new_zeros(()).double()
    peak = z.amax(-1, keepdim=True)
    shifted = z - peak
    powers = shifted.exp()
    total = powers.sum(-1)
    found = torch.stack([total.log() + peak[:, 0], total.log() - (shifted * powers).sum(-1) / total])
    return found.double(), z.abs().max().double()


def _row_means(values: torch.Tensor, owner: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Means over the positions of each row that has any. Shape (rows, 2)."""
    _, index, counts = torch.unique(owner, return_inverse=True, return_counts=True)
    sums = torch.zeros(2, len(counts), dtype=values.dtype).index_add_(1, index, values)
    means: np.ndarray[Any, np.dtype[np.float64]] = (sums / counts).T.numpy()
    return means


def _estimate(values: np.ndarray[Any, np.dtype[np.float64]], method: str = "mean over rows") -> Estimate:
    mean, low, high = student_interval(values.tolist())
    return _record(mean, low, high, f"{method}, {len(values)} rows", len(values))


def _record(mean: float, low: float, high: float, method: str, rows: int) -> Estimate:
    finite = math.isfinite(mean)
    status = Status.REFUSED if not finite else (Status.OK if rows > 1 else Status.UNCERTAIN)
    reasons = {
        Status.REFUSED: "the logits are not all finite: the run has diverged",
        Status.UNCERTAIN: "one row: how rows differ is unknown",
    }
    return Estimate(
        value=mean if finite else None,
        low=low if finite else -math.inf,
        high=high if finite else math.inf,
        level=LEVEL,
        unit="nats",
        method=method,
        covers="sampling",
        status=status,
        reason=reasons.get(status, ""),
    )


def _difference(
    now: np.ndarray[Any, np.dtype[np.float64]], then: np.ndarray[Any, np.dtype[np.float64]], *, paired: bool
) -> Estimate:
    if paired:
        return _estimate(now - then, "mean difference over the same rows")
    from scipy.special import stdtrit

    mean = float(now.mean() - then.mean())
    rows, method = min(len(now), len(then)), f"difference of means over {len(now)} and {len(then)} other rows"
    if rows < 2:
        return _record(mean, -math.inf, math.inf, method, rows)
    a, b = float(now.var(ddof=1)) / len(now), float(then.var(ddof=1)) / len(then)
    if a + b == 0 or not math.isfinite(a + b):
        return _record(mean, mean, mean, method, rows)
    freedom = (a + b) ** 2 / (a**2 / (len(now) - 1) + b**2 / (len(then) - 1))
    half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * math.sqrt(a + b)
    return _record(mean, mean - half, mean + half, method, rows)


def _fingerprint(batches: tuple[Any, ...]) -> str:
    """The same for the same batches in the same order."""
    digest = hashlib.sha256()
    for tensor in tensors_of(batches):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

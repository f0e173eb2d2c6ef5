r"""beta1 and beta2 together, with the learning rate that each pair implies: :func:`suggest_betas`."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError, NotConvergedError, RefusedError
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.pilot.optimizers import OptimizerLike, twin_optimizer
from dyntune.records import Recommendation, Status, short_number
from dyntune.stability.thresholds import Recurrence, recurrence, threshold
from dyntune.suggest.beta2 import suggest_beta2
from dyntune.suggest.beta2_rule import HALF_LIFE, refresh_beta2
from dyntune.suggest.progress import ProgressLike

__all__ = ["Betas", "Pair", "suggest_betas"]

PRESENT, SUGGESTED, TIED, REFRESHED = "present", "suggested", "tied at beta1", "tied, 1000 refreshes"
SOURCES: Mapping[str, str] = {
    TIED: "Orvieto and Gower (2025), arXiv:2505.21829 (beta1 = beta2)",
    REFRESHED: "Fernandez-Hernandez et al. (2026), arXiv:2605.10119 (beta1 = beta2 = 1 - 1000 / steps)",
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A pair of factors and the learning rates at which it is as far from instability as the present one.

    Args:
        name: Where it comes from.
        beta1: Momentum.
        beta2: Of the second moment.
        small_batch: Learning rate by the threshold of small batches, which does not depend on beta1.
        full_batch: Learning rate by the threshold of full batches.
    """

    name: str
    beta1: float
    beta2: float
    small_batch: float
    full_batch: float

    @property
    def lr(self) -> float:
        """The lower of the two: as far from the edge as the present pair, or farther, whatever the noise."""
        return min(self.small_batch, self.full_batch)

    def __str__(self) -> str:
        return (
            f"{self.name}: betas ({self.beta1:.6g}, {self.beta2:.6g}), lr {short_number(self.lr)} (small batches "
            f"{short_number(self.small_batch)}, full batches {short_number(self.full_batch)})"
        )


@dataclass(frozen=True, kw_only=True)
class Betas:
    """What :func:`suggest_betas` found.

    Args:
        beta2: The recommendation that the pair is made of, with evidence, checks and cost.
        pairs: The suggested pair first (missing where it was refused), then the present one and the others to try.
    """

    beta2: Recommendation
    pairs: tuple[Pair, ...]

    @property
    def value(self) -> Pair:
        """The suggested pair.

        Raises:
            RefusedError: None was established.
        """
        if self.beta2.value is None:
            raise RefusedError(f"no betas were suggested: {self.beta2.reason}", partial=self)
        return self.pairs[0]

    @property
    def status(self) -> Status:
        """That of beta2."""
        return self.beta2.status

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments for the optimizer: ``{"lr": ..., "betas": (..., ...)}``."""
        return {"lr": self.value.lr, "betas": (self.value.beta1, self.value.beta2)}

    def require(self) -> Betas:
        """Return self when the status is OK; raise the matching error otherwise (what ``strict=True`` does)."""
        if self.status is Status.OK and self.beta2.value is not None:
            return self
        error = RefusedError if self.beta2.value is None else NotConvergedError
        raise error(f"betas: {self.status.name}: {self.beta2.reason or self.status.value}", partial=self)

    def __str__(self) -> str:
        if self.beta2.value is None:
            return f"betas: refused. {self.beta2.reason}"
        text = f"betas ({self.value.beta1:.6g}, {self.value.beta2:.6g}), lr {short_number(self.value.lr)}"
        return text if self.status is Status.OK else f"{text} [{self.status.name.lower()}: {self.beta2.reason}]"

    def explain(self) -> str:
        """Every pair, and the whole chain behind beta2, in words."""
        lines = [str(self), "pairs, none of which was trained to the end:"]
        lines += [f"  {pair}" for pair in self.pairs]
        lines += [f"source: {SOURCES[pair.name]}" for pair in self.pairs if pair.name in SOURCES]
        return "\n".join([*lines, self.beta2.explain()])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        pairs = [
            {
                "name": pair.name,
                "betas": [pair.beta1, pair.beta2],
                "lr": pair.lr,
                "lr_small_batch": pair.small_batch,
                "lr_full_batch": pair.full_batch,
            }
            for pair in self.pairs
        ]
        return {"pairs": pairs, "beta2": self.beta2.to_dict()}

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.explain())}</pre>"


def betas_rule(
    beta2: Recommendation, *, present: tuple[float, float], lr: float, edge: Recurrence, num_steps: int | None = None
) -> Betas:
    r"""Pairs and their learning rates, from a recommendation for beta2; nothing is measured.

    With the preconditioner P held fixed, an Adam step is stable while :math:`\eta\lambda(P^{-1/2} H P^{-1/2})` is below
    :math:`c(\beta_1) = 2 (1 + \beta_1) / (1 - \beta_1)` on full batches, and below 2 on small ones. A pair is as far
    from the edge as the present one at :math:`\eta' = \eta\, c(\beta_1') / c(\beta_1)`, or at :math:`\eta' = \eta`.

    Args:
        beta2: What :func:`dyntune.suggest_beta2` returned.
        present: The optimizer's pair.
        lr: Its learning rate.
        edge: What the optimizer does on one eigenvector.
        num_steps: Length of the training to come; None if unknown.

    Source:
        Cohen et al. (2022), arXiv:2207.14484 (full batches); arXiv:2604.14108 with Adam's averaged momentum (small
        batches, derived: see ``dyntune.stability.thresholds``).
    """
    beta1, old = present
    tied = beta1 == old
    wanted = {}
    if beta2.value is not None:
        wanted[SUGGESTED] = (beta2.value if tied else beta1, beta2.value)
    wanted[PRESENT] = present
    if beta1 > 0:
        wanted[TIED] = (beta1, beta1)
    refreshed = None if num_steps is None else refresh_beta2(num_steps)
    if refreshed is not None and refreshed >= beta1:  # of short trainings it would be less than any momentum in use
        wanted[REFRESHED] = (refreshed, refreshed)
    pairs: list[Pair] = []
    for name, pair in wanted.items():
        if any(pair == (other.beta1, other.beta2) for other in pairs):
            continue
        full = lr * float(threshold(replace(edge, momentum=pair[0]))) / float(threshold(edge))
        pairs.append(Pair(name=name, beta1=pair[0], beta2=pair[1], small_batch=lr, full_batch=full))
    return Betas(beta2=beta2, pairs=tuple(pairs))


def suggest_betas(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    optimizer: OptimizerLike,
    lr: float | None = None,
    criterion: Criterion | None = None,
    num_steps: int | None = None,
    tokens_per_step: float | None = None,
    half_life: float = HALF_LIFE,
    known: tuple[float, float] | None = None,
    clip_norm: float | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    max_gradients: int = 200,
    probe: int | None = None,
    seed: int = 0,
    progress: ProgressLike = None,
    strict: bool = False,
) -> Betas:
    """Suggest Adam's two factors, and the learning rate that goes with each pair worth a try.

    The suggestion is the present beta1 with the beta2 of :func:`dyntune.suggest_beta2`; nothing is known here that
    would speak for another beta1. Beside it stand the present pair and the tied ones of recent papers, each with the
    learning rates at which it is as far from instability as the optimizer is now: changing beta1 from 0.9 to 0.95
    doubles the stable rate on full batches, and leaves it as it is on small ones. No pair is trained to its end.

    The user's model, optimizer, gradients, buffers and random states are bit-identical afterwards.

    Args:
        model: As for :func:`dyntune.suggest_lr`.
        batches: As for :func:`dyntune.suggest_lr`; of the size that will be used.
        loss_fn: As for :func:`dyntune.suggest_lr`.
        optimizer: A torch Adam, AdamW or NAdam; otherwise as for :func:`dyntune.suggest_beta2`.
        lr: As for :func:`dyntune.suggest_beta2`; the present pair's.
        criterion: As for :func:`dyntune.suggest_lr`.
        num_steps: Optimizer steps of the training to come.
        tokens_per_step: As for :func:`dyntune.suggest_beta2`.
        half_life: As for :func:`dyntune.suggest_beta2`.
        known: As for :func:`dyntune.suggest_beta2`.
        clip_norm: As for :func:`dyntune.suggest_lr`.
        accumulate: As for :func:`dyntune.suggest_lr`.
        autocast: As for :func:`dyntune.suggest_lr`.
        max_gradients: As for :func:`dyntune.suggest_beta2`.
        probe: As for :func:`dyntune.suggest_beta2`; of beta2 alone.
        seed: As for :func:`dyntune.suggest_beta2`.
        progress: As for :func:`dyntune.suggest_lr`.
        strict: Raise when the status is not OK.

    Returns:
        The pairs, of the first parameter group; the status is that of beta2.

    Raises:
        InvalidArgumentError: An optimizer without a pair of factors, or as :func:`dyntune.suggest_beta2`.
        DyntuneError: As :func:`dyntune.suggest_beta2`.
        RefusedError, NotConvergedError: With ``strict=True``.

    Cost:
        That of :func:`dyntune.suggest_beta2`.
    Assumes:
        That of :func:`dyntune.suggest_beta2`; that the preconditioner does not change with the pair.
    Source:
        Cohen et al. (2022), arXiv:2207.14484; Orvieto and Gower (2025), arXiv:2505.21829; see ``explain()``.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> g = torch.Generator().manual_seed(0)
        >>> data = [(torch.randn(16, 4, generator=g), torch.randn(16, 1, generator=g)) for _ in range(8)]
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> found = suggest_betas(
        ...     model, data, optimizer=optimizer, criterion=torch.nn.MSELoss(), num_steps=600, max_gradients=60
        ... )
        >>> found.settings
        {'lr': 0.001, 'betas': (0.9, 0.995)}
    """
    own = _made(model, optimizer)
    group = own.param_groups[0]
    if "betas" not in group or not isinstance(own, (torch.optim.Adam, torch.optim.NAdam)):
        raise InvalidArgumentError(
            f"a {type(own).__name__} has no pair of factors whose edge is known here: betas are settings of Adam, "
            "AdamW and NAdam. suggest_beta2 also takes RMSprop and Adafactor."
        )
    beta2 = suggest_beta2(
        model,
        batches,
        loss_fn,
        optimizer=optimizer,
        lr=lr,
        criterion=criterion,
        num_steps=num_steps,
        tokens_per_step=tokens_per_step,
        half_life=half_life,
        known=known,
        clip_norm=clip_norm,
        accumulate=accumulate,
        autocast=autocast,
        max_gradients=max_gradients,
        probe=probe,
        seed=seed,
        progress=progress,
    )
    rate = float(group["lr"]) if lr is None else lr
    result = betas_rule(
        beta2,
        present=(float(group["betas"][0]), float(group["betas"][1])),
        lr=rate,
        edge=replace(recurrence(own), lr=rate),
        num_steps=num_steps,
    )
    return result.require() if strict else result


def _made(model: nn.Module, optimizer: OptimizerLike) -> torch.optim.Optimizer:
    """The optimizer itself, or what a name or a factory makes for copies of the parameters."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    originals = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return twin_optimizer(optimizer, originals, {name: p.detach().clone() for name, p in originals.items()})

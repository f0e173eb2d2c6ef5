"""An entropy coefficient, and the learning rates that are stable with it: :func:`suggest_entropy_coef`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.numerics.affine import affine_spectrum
from dyntune.records import Estimate
from dyntune.rl.policy import PolicyObjective
from dyntune.stability.scales import diagonal_scale
from dyntune.stability.thresholds import Recurrence, recurrence, threshold
from dyntune.suggest.entropy_rule import EntropyCoefficient, EntropyEvidence, entropy_rule

__all__ = ["suggest_entropy_coef"]

EntropyOptimizer: TypeAlias = "Literal['sgd', 'momentum', 'adam'] | torch.optim.Optimizer"
NAMED = {"sgd": 0.0, "momentum": 0.9}


def suggest_entropy_coef(
    objective: PolicyObjective,
    *,
    lr: float,
    optimizer: EntropyOptimizer = "adam",
    alphas: tuple[float, float] | None = None,
    present: float | None = None,
    num_steps: int | None = None,
    clip_norm: float | None = None,
    gradient_norm: float | None = None,
    value_loss: Callable[[nn.Module], torch.Tensor] | None = None,
    max_products: int = 120,
    seed: int = 0,
    strict: bool = False,
) -> EntropyCoefficient:
    """Say for which entropy coefficients a learning rate is stable, the critical rate of each, and which to take.

    The Hessian of the policy loss minus alpha times the entropy is affine in alpha at the present parameters and batch:
    one Krylov space serves all alphas. The question answered is "if I changed alpha *now*"; parameters move with alpha,
    and the answer with them.

    Args:
        objective: Policy loss and entropy on a fixed batch, such as :meth:`dyntune.rl.PolicyObjective.of_batch`.
        lr: Learning rate, > 0.
        optimizer: The policy's own optimizer, which has stepped; its second moments are held still. ``"sgd"`` and
            ``"momentum"`` (0.9) need no state; ``"adam"`` by name has none and is refused.
        alphas: First and last coefficient; default 0 to 1, or to twice `present` where that is larger.
        present: The coefficient in use, for the drift and the warnings.
        num_steps: Steps of this same gradient over which half of the entropy is to last, as in full-batch ascent; None:
            the coefficient in use is kept where it is stable.
        clip_norm: What the norm of the whole gradient is clipped to, value loss included.
        gradient_norm: That norm before the clip. It shortens a plain step, and Adam's second moments are those of
            clipped gradients: either way curvature counts by as much less.
        value_loss: ``policy -> loss`` of the value function on the same batch: its curvature is told beside, never
            mixed in.
        max_products: Most directions to multiply.
        seed: Of random starts.
        strict: Raise when the status is not OK.

    Returns:
        ``value`` with the stable range ``[low, high]``, ``critical_lr(alpha)``, ``bracket(alpha)``, ``slope``, drift
        and warnings. The status is never better than UNCERTAIN: the choice has not been judged against brute force.

    Raises:
        InvalidArgumentError: A number outside its range, or an optimizer without a state.
        NonFiniteError: A loss or a product is NaN or infinite.
        RefusedError, NotConvergedError: With ``strict=True``.

    Accuracy:
        Critical rates: see ``dyntune.numerics.affine`` and ``tests/rl``. They are those of the estimator that the
        objective names, at the present parameters.
    Cost:
        Two Hessian-vector products for each direction on the batch, three dozen directions as a rule.
    Assumes:
        A batch that stands for the next ones; ratio one, as before the first inner step.
    Source:
        See ``dyntune.suggest.entropy_rule``.

    Example:
        >>> import dyntune.rl
        >>> bandit = dyntune.rl.SoftmaxBandit(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
        >>> policy = nn.ParameterList([nn.Parameter(bandit.optimum(0.5))])
        >>> exact = dyntune.rl.PolicyObjective(policy, lambda p: (-bandit.value(p[0], 0.0), bandit.entropy(p[0])))
        >>> found = suggest_entropy_coef(exact, lr=1.0, optimizer="sgd", alphas=(0.0, 1.0))
        >>> round(float(found.critical_lr(0.5)) / bandit.critical_lr(0.5), 4)
        1.0
    """
    if not 0 < lr < math.inf:
        raise InvalidArgumentError(f"lr={lr}: a learning rate is positive.")
    if present is not None and not 0 <= present < math.inf:
        raise InvalidArgumentError(f"present={present}: an entropy coefficient is 0 or more.")
    if num_steps is not None and num_steps < 1:
        raise InvalidArgumentError(f"num_steps={num_steps}: the entropy has to last one step at least.")
    first, last = (0.0, max(1.0, 2 * (present or 0.0))) if alphas is None else alphas
    limit, scale = _optimizer(optimizer, objective)
    factor = _clip(clip_norm, gradient_norm)
    acting = lr if factor is None else lr * factor
    spectrum = affine_spectrum(objective.family(scale), alphas=(first, last), max_products=max_products, seed=seed)
    loss, entropy = objective.gradients()
    by: Sequence[torch.Tensor] = [torch.ones_like(g) for g in loss] if scale is None else scale
    gain = sum(float((h * h / p).sum()) for h, p in zip(entropy, by, strict=True))
    # log(exp(x)) of a log standard deviation has a second derivative of rounding's size.
    ends = [spectrum.at(x, end) for x in (first, last) for end in ("largest", "smallest")]
    largest = max(abs(e.value) for e in ends)
    rounding = torch.finfo(objective.family().space.dtype).eps ** 0.5 * largest
    linear = gain > 0 and all(abs(e.slope) * (last - first) <= rounding for e in ends)
    checks = [f"policy loss: {objective.estimator}; {len(objective.parameters)} tensors are the policy's"]
    if objective.left_out:
        checks.append(f"not part of it: {len(objective.left_out)} tensors that move neither loss nor entropy")
    if scale is not None:
        checks.append("second moments held still: those that another coefficient would make are not known")
    result = entropy_rule(
        EntropyEvidence(
            spectrum=spectrum,
            threshold=limit,
            lr=acting,
            entropy=objective()[1],
            balance=objective.balance(scale),
            gain=gain,
            linear=linear,
            num_steps=num_steps,
            present=present,
            estimator=objective.estimator,
            covariance=objective.covariance() if "evaluate" in objective.batch else None,
            clip_factor=factor,
            value_curvature=None if value_loss is None else _value_curvature(objective, value_loss, seed),
            checks=tuple(checks),
            cost=4.0 * spectrum.num_products + 3.0,  # two products, each about two gradients
        )
    )
    return result.require() if strict else result


def _optimizer(optimizer: EntropyOptimizer, objective: PolicyObjective) -> tuple[Estimate, list[torch.Tensor] | None]:
    """Threshold of eigenvalue times learning rate, and the scale of the parameters."""
    if isinstance(optimizer, str):
        if optimizer not in NAMED:
            raise InvalidArgumentError(
                f"optimizer={optimizer!r} by name has no second moments, and curvature under Adam is relative to them. "
                "Give the policy's own optimizer after some steps (with stable-baselines3: model.policy.optimizer), or "
                '"sgd" or "momentum".'
            )
        return threshold(Recurrence("sgd", NAMED[optimizer], 1.0)), None
    limit = threshold(recurrence(optimizer))
    if limit.value is None:  # steps whose length does not follow the gradient have no scale, either
        return limit, None
    return limit, diagonal_scale(optimizer, list(objective.parameters.values()))


def _clip(clip_norm: float | None, gradient_norm: float | None) -> float | None:
    if clip_norm is None:
        return None
    if gradient_norm is None or not gradient_norm > 0 or not clip_norm > 0:
        raise InvalidArgumentError(
            f"clip_norm={clip_norm} with gradient_norm={gradient_norm}: how far a clip shortens a step follows from "
            "the norm of the whole gradient before it, value loss included; both are positive."
        )
    return min(1.0, clip_norm / gradient_norm)


def _value_curvature(objective: PolicyObjective, value_loss: Callable[[nn.Module], torch.Tensor], seed: int) -> float:
    alone = PolicyObjective(objective.policy, lambda policy: (value_loss(policy), torch.zeros(())))
    return affine_spectrum(alone.family(), alphas=(0.0, 1.0), seed=seed).at(0.0).value

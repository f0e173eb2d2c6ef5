r"""A policy's loss and entropy on a fixed batch, and their curvatures apart: :class:`PolicyObjective`.

What PPO descends in its inner epochs is :math:`L(w) - \alpha \bar H(w)` with
:math:`L = -\frac1N \sum A\, \pi_w(a|s) / \pi_{old}(a|s)`; its Hessian is
:math:`A + \alpha B`, affine in the entropy coefficient at fixed weights and batch. Three things go wrong elsewhere:

* the surrogate :math:`-A \log \pi_w` of A2C has the right gradient and a wrong Hessian (for a table of logits and
  exact advantages it is zero); the ratio form has the same gradient, and a Hessian that means something;
* the value loss, whose curvature is a hundred times that of the policy, hides it: parameters of the value function
  are left out;
* a log standard deviation that does not depend on the state makes the entropy linear, and B zero.

Sources: Foerster et al. (2018), arXiv:1802.05098 (DiCE); Farquhar et al. (2019), arXiv:1909.10549 (Loaded DiCE).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError, NonFiniteError
from dyntune.numerics.affine import AffineFamily
from dyntune.numerics.vectors import VectorSpace
from dyntune.objective.context import differentiable_twice, unwrap
from dyntune.objective.parameters import ParameterSelection, select_parameters

__all__ = ["Estimator", "PolicyObjective"]

Estimator: TypeAlias = Literal["ratio", "loaded-dice", "exact"]
Losses: TypeAlias = tuple[torch.Tensor, torch.Tensor]
# (policy, observations, actions) -> log-probabilities (N,), entropies (N,) or None
Evaluate: TypeAlias = Callable[[Any, Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

# Spread of advantages is divided by itself plus this, as stable-baselines3 and CleanRL do.
ADVANTAGE_EPS = 1e-8


class PolicyObjective:
    """(policy loss, mean entropy) as functions of a policy's parameters, on a fixed batch.

    Make one of a batch with :meth:`of_batch`; this constructor is for losses of your own.

    Args:
        policy: The module whose parameters move.
        losses: ``policy -> (loss, mean entropy)``, scalars with graphs; the same at every call.
        params: Which parameters: globs or a predicate on names. Those that neither loss depends on are left out, which
            takes care of a value network of its own; a shared body stays.
        estimator: What the loss is, for the record.
        batch: More about the batch, for whoever reads it.

    Attributes:
        parameters: By name, those that are measured.
        left_out: Names of trainable parameters that neither loss depends on.

    Raises:
        InvalidArgumentError: Losses that are no scalars, or that no parameter moves.
        NonFiniteError: A loss is NaN or infinite.
    """

    def __init__(
        self,
        policy: nn.Module,
        losses: Callable[[nn.Module], Losses],
        *,
        params: ParameterSelection = None,
        estimator: Estimator = "exact",
        batch: dict[str, Any] | None = None,
    ) -> None:
        self.policy, self._losses, self.estimator, self.batch = unwrap(policy), losses, estimator, batch or {}
        chosen = select_parameters(self.policy, params)
        self._device = next(iter(chosen.values())).device
        with differentiable_twice(self.policy, self._device):
            loss, entropy = self.losses()
            reached = [_gradients(x, list(chosen.values()), graph=False) for x in (loss, entropy)]
        used = [name for i, name in enumerate(chosen) if any(g[i] is not None for g in reached)]
        if not used:
            raise InvalidArgumentError("no parameter moves the policy loss or the entropy: is the graph cut somewhere?")
        self.parameters = {name: chosen[name] for name in used}
        self.left_out = tuple(name for name in chosen if name not in used)

    @classmethod
    def of_batch(
        cls,
        policy: nn.Module,
        evaluate: Evaluate,
        observations: Any,
        actions: torch.Tensor,
        advantages: torch.Tensor,
        *,
        estimator: Literal["ratio", "loaded-dice"] = "ratio",
        normalize: bool = True,
        mask: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
        discount: float = 1.0,
        params: ParameterSelection = None,
    ) -> PolicyObjective:
        """The objective of a batch of transitions.

        Args:
            policy: The module.
            evaluate: ``(policy, observations, actions) -> (log-probabilities (N,), entropies (N,))``; with
                stable-baselines3 ``lambda p, o, a: p.evaluate_actions(o, a)[1:]``.
            observations: As `evaluate` takes them.
            actions: N of them.
            advantages: Shape (N,).
            estimator: ``"ratio"``: what PPO descends, its Hessian exact for one-step problems. ``"loaded-dice"``: the
                Hessian of the return itself, for transitions in order of time; noisier.
            normalize: Whether to centre and scale the advantages, with statistics that are held still.
            mask: Which of the N count, as of tokens; shape (N,), bool.
            starts: Whether each transition is the first of its episode, for ``"loaded-dice"``. Shape (N,), bool.
            discount: Of dependencies on earlier actions in Loaded DiCE, in (0, 1]: 1 is unbiased.
            params: See :class:`PolicyObjective`.

        Raises:
            InvalidArgumentError: A log-probability surrogate was asked for, or shapes that do not fit.
        """
        if estimator not in ("ratio", "loaded-dice"):
            why = (
                ' "log-prob", the surrogate of A2C, has a wrong Hessian (zero for a table of logits and exact '
                'advantages); "ratio" has the same gradient at the present policy and is right for A2C, too.'
            )
            raise InvalidArgumentError(f'estimator={estimator!r}: choose "ratio" or "loaded-dice".{why}')
        count = len(advantages)
        if advantages.shape != (count,) or count == 0 or len(actions) != count:
            raise InvalidArgumentError(
                f"advantages has shape {tuple(advantages.shape)} and actions {tuple(actions.shape)}: one advantage for "
                "each action, in one dimension."
            )
        keep = torch.ones(count, dtype=torch.bool) if mask is None else mask.bool()
        keep = keep.to(advantages.device)
        if keep.shape != (count,) or not bool(keep.any()):
            raise InvalidArgumentError(
                f"mask has shape {tuple(keep.shape)} and {int(keep.sum())} that count, of {count}."
            )
        if estimator == "loaded-dice" and (starts is None or len(starts) != count or not bool(starts[0])):
            raise InvalidArgumentError(
                'estimator="loaded-dice" needs starts=: whether each transition is the first of its episode, in order '
                "of time; the first one is."
            )
        if not 0 < discount <= 1:
            raise InvalidArgumentError(f"discount={discount}: dependencies are discounted by a factor in (0, 1].")
        weights = advantages.detach()
        if normalize and int(keep.sum()) > 1:
            kept = weights[keep]
            weights = (weights - kept.mean()) / (kept.std() + ADVANTAGE_EPS)

        def losses(module: nn.Module) -> Losses:
            log_prob, entropy = evaluate(module, observations, actions)
            if log_prob.shape != (count,):
                raise InvalidArgumentError(
                    f"evaluate returned log-probabilities of shape {tuple(log_prob.shape)}, not ({count},): sum over "
                    "the dimensions of an action."
                )
            return -_surrogate(log_prob, weights, keep, starts, estimator, discount), _mean(entropy, keep)

        batch = {"count": int(keep.sum()), "advantages": weights, "keep": keep, "evaluate": evaluate}
        batch |= {"observations": observations, "actions": actions}
        return cls(policy, losses, params=params, estimator=estimator, batch=batch)

    def __call__(self) -> tuple[float, float]:
        """The policy loss, and the mean entropy in nats."""
        with torch.no_grad():
            loss, entropy = self.losses()
        return float(loss), float(entropy)

    def losses(self) -> Losses:
        """Both, with graphs."""
        loss, entropy = self._losses(self.policy)
        for name, value in (("policy loss", loss), ("mean entropy", entropy)):
            if value.numel() != 1:
                raise InvalidArgumentError(f"the {name} has shape {tuple(value.shape)}: a scalar is needed.")
            if not bool(torch.isfinite(value)):
                raise NonFiniteError(f"the {name} is {float(value.detach())}: its curvature is undefined.")
        return loss.reshape(()), entropy.reshape(())

    def gradients(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Of the policy loss and of the mean entropy, in the shapes of the parameters."""
        tensors = list(self.parameters.values())
        with differentiable_twice(self.policy, self._device):
            loss, entropy = self.losses()
            found = [_filled(_gradients(x, tensors, graph=False), tensors) for x in (loss, entropy)]
        return found[0], found[1]

    def family(self, scale: Sequence[torch.Tensor] | None = None) -> AffineFamily:
        r"""Hessians A of the policy loss and B of minus the mean entropy, as ``A + alpha B``.

        Args:
            scale: Diagonal P of an optimizer's preconditioner, in the shapes of the parameters: then
                :math:`P^{-1/2} (A + \alpha B) P^{-1/2}`, with P held still.
        """
        tensors = list(self.parameters.values())
        roots = None if scale is None else [s.detach().rsqrt() for s in scale]

        @contextmanager
        def session() -> Iterator[Callable[[Sequence[torch.Tensor]], tuple[list[torch.Tensor], list[torch.Tensor]]]]:
            with differentiable_twice(self.policy, self._device):
                loss, entropy = self.losses()
                first = _gradients(loss, tensors, graph=True)
                second = _gradients(-entropy, tensors, graph=True)

                def product(vector: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
                    v = list(vector) if roots is None else [x * r for x, r in zip(vector, roots, strict=True)]
                    found = [_product(g, v, tensors) for g in (first, second)]
                    if roots is not None:
                        found = [[x * r for x, r in zip(p, roots, strict=True)] for p in found]
                    return found[0], found[1]

                yield product

        return AffineFamily(VectorSpace.of(tensors), session)

    def drift(self, *, lr: float, alpha: float, scale: Sequence[torch.Tensor] | None = None) -> float:
        """Change of the mean entropy in one step of plain (or diagonally preconditioned) descent, to first order.

        Args:
            lr: Learning rate.
            alpha: Entropy coefficient.
            scale: As for :meth:`family`.
        """
        loss, entropy = self.gradients()
        by = [torch.ones_like(g) for g in loss] if scale is None else [s.detach() for s in scale]
        moved = sum(float((h * (g - alpha * h) / p).sum()) for g, h, p in zip(loss, entropy, by, strict=True))
        return -lr * moved

    def balance(self, scale: Sequence[torch.Tensor] | None = None) -> float:
        """The entropy coefficient at which the entropy stands still to first order; NaN where it has no gradient."""
        loss, entropy = self.gradients()
        by = [torch.ones_like(g) for g in loss] if scale is None else [s.detach() for s in scale]
        square = sum(float((h * h / p).sum()) for h, p in zip(entropy, by, strict=True))
        crossed = sum(float((h * g / p).sum()) for g, h, p in zip(loss, entropy, by, strict=True))
        return crossed / square if square > 0 else math.nan

    def covariance(self) -> float:
        """cov(log pi, A) over the batch: large and positive where entropy is about to fall (Cui et al. 2025)."""
        batch = self.batch
        if "evaluate" not in batch:
            raise InvalidArgumentError(
                "cov(log pi, A) is of a batch: make the objective with PolicyObjective.of_batch."
            )
        with torch.no_grad():
            log_prob = batch["evaluate"](self.policy, batch["observations"], batch["actions"])[0]
        x, y = log_prob[batch["keep"]].double(), batch["advantages"][batch["keep"]].double()
        return float(((x - x.mean()) * (y - y.mean())).mean())


def _mean(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    # A policy that has one entropy for all states may give one number.
    return values[keep].mean() if values.shape == keep.shape else values.mean()


def _surrogate(
    log_prob: torch.Tensor,
    weights: torch.Tensor,
    keep: torch.Tensor,
    starts: torch.Tensor | None,
    estimator: str,
    discount: float,
) -> torch.Tensor:
    """What is to be ascended: a mean over what counts."""
    weights = weights.to(log_prob)
    if estimator == "ratio":
        ratio = torch.exp(log_prob - log_prob.detach())
        return (weights * ratio)[keep].mean()
    assert starts is not None
    counted = torch.where(keep, log_prob, torch.zeros_like(log_prob))
    through, before = [], []
    running = log_prob.new_zeros(())
    for t in range(len(log_prob)):
        earlier = log_prob.new_zeros(()) if bool(starts[t]) else discount * running
        running = earlier + counted[t]
        before.append(earlier)
        through.append(running)
    w, v = torch.stack(through), torch.stack(before)
    boxes = torch.exp(w - w.detach()) - torch.exp(v - v.detach())
    # The magic boxes have value zero together: the surrogate's own value is put back, its derivatives are theirs.
    return (weights * (boxes + 1.0))[keep].mean()


def _gradients(value: torch.Tensor, tensors: Sequence[torch.Tensor], *, graph: bool) -> list[torch.Tensor | None]:
    if not value.requires_grad:
        return [None] * len(tensors)
    return list(torch.autograd.grad(value, tensors, create_graph=graph, retain_graph=True, allow_unused=True))


def _filled(found: Sequence[torch.Tensor | None], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.zeros_like(t) if g is None else g.detach() for g, t in zip(found, tensors, strict=True)]


def _product(
    gradients: Sequence[torch.Tensor | None], vector: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """H v; zero where the gradient does not depend on the parameters: a function that is linear in them."""
    moved = [(g, v) for g, v in zip(gradients, vector, strict=True) if g is not None and g.requires_grad]
    if not moved:
        return [torch.zeros_like(t) for t in tensors]
    outputs, weights = zip(*moved, strict=True)
    found = torch.autograd.grad(outputs, tensors, weights, retain_graph=True, allow_unused=True)
    return _filled(found, tensors)

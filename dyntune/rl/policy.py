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

from dyntune.errors import InvalidArgumentError, NonFiniteError, StaleOperatorError
from dyntune.numerics.affine import AffineFamily
from dyntune.numerics.random import stream_seed
from dyntune.numerics.vectors import VectorSpace
from dyntune.objective.context import differentiable_twice, unwrap
from dyntune.objective.parameters import ParameterSelection, select_parameters
from dyntune.objective.state import own_generators, preserved_state, seed_all

__all__ = ["Estimator", "PolicyObjective"]

Estimator: TypeAlias = Literal["ratio", "dice", "loaded-dice", "exact"]
Losses: TypeAlias = tuple[torch.Tensor, torch.Tensor]
# (policy, observations, actions) -> log-probabilities (N,), entropies (N,) or None
Evaluate: TypeAlias = Callable[[Any, Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

# Spread of advantages is divided by itself plus this, as stable-baselines3 and CleanRL do.
ADVANTAGE_EPS = 1e-8


class PolicyObjective:
    """(policy loss, mean entropy) as functions of a policy's parameters, on a fixed batch.

    Make one of a batch with :meth:`of_batch`; this constructor is for losses of your own. Measuring leaves parameters,
    buffers, ``.grad`` and random states as they are; dropout's masks are the same at every evaluation.

    Args:
        policy: The module whose parameters move.
        losses: ``policy -> (loss, mean entropy)``, scalars with graphs; the same at every call.
        params: Which parameters: globs or a predicate on names. Those that neither loss depends on are left out, which
            takes care of a value network of its own; a shared body stays.
        estimator: What the loss is, for the record.
        batch: More about the batch, for whoever reads it.
        seed: Of dropout's masks and whatever else the forward pass draws.

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
        seed: int = 0,
    ) -> None:
        self.policy, self._losses, self.estimator, self.batch = unwrap(policy), losses, estimator, batch or {}
        self._seed = seed
        chosen = select_parameters(self.policy, params)
        self._device = next(iter(chosen.values())).device
        with self._measuring():
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
        estimator: Literal["ratio", "dice", "loaded-dice"] = "ratio",
        normalize: bool = True,
        mask: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
        discount: float = 1.0,
        rewards: torch.Tensor | None = None,
        gamma: float = 1.0,
        params: ParameterSelection = None,
        seed: int = 0,
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
                Hessian of the return itself, for transitions in order of time; noisier. ``"dice"``: the same from
                rewards, without advantages to lower the noise, which is large.
            normalize: Whether to centre and scale the advantages, with statistics that are held still.
            mask: Which of the N count, as of tokens; shape (N,), bool.
            starts: Whether each transition is the first of its episode, for both DiCE. Shape (N,), bool.
            discount: Of dependencies on earlier actions in Loaded DiCE, in (0, 1]: 1 is unbiased.
            rewards: Of each transition, for ``"dice"``: taken as they are, not normalised. Shape (N,).
            gamma: Discount of the return, in (0, 1]: both DiCE weigh step t of an episode by its t-th power. With 1
                steps count alike, as those of a batch do in PPO.
            params: See :class:`PolicyObjective`.
            seed: See :class:`PolicyObjective`.

        Raises:
            InvalidArgumentError: A log-probability surrogate was asked for, or shapes that do not fit.
        """
        if estimator not in ("ratio", "dice", "loaded-dice"):
            why = (
                ' "log-prob", the surrogate of A2C, has a wrong Hessian (zero for a table of logits and exact '
                'advantages); "ratio" has the same gradient at the present policy and is right for A2C, too.'
            )
            raise InvalidArgumentError(f'estimator={estimator!r}: choose "ratio", "dice" or "loaded-dice".{why}')
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
        if estimator != "ratio" and (starts is None or len(starts) != count or not bool(starts[0])):
            raise InvalidArgumentError(
                f"estimator={estimator!r} needs starts=: whether each transition is the first of its episode, in order "
                "of time; the first one is."
            )
        if (estimator == "dice") != (rewards is not None) or (rewards is not None and rewards.shape != (count,)):
            given = None if rewards is None else tuple(rewards.shape)
            raise InvalidArgumentError(
                f'estimator={estimator!r} with rewards of shape {given}: "dice" is made of one reward for each action, '
                "the others of advantages alone."
            )
        if not 0 < discount <= 1 or not 0 < gamma <= 1:
            raise InvalidArgumentError(
                f"discount={discount}, gamma={gamma}: dependencies and steps are discounted by factors in (0, 1]."
            )
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
            if estimator == "ratio":
                return -_ratio(log_prob, weights, keep), _mean(entropy, keep)
            assert starts is not None
            worth = _discounted(weights if rewards is None else rewards.detach(), starts, gamma)
            return -_dice(log_prob, worth, keep, starts, None if estimator == "dice" else discount), _mean(
                entropy, keep
            )

        batch = {"count": int(keep.sum()), "advantages": weights, "keep": keep, "evaluate": evaluate}
        batch |= {"observations": observations, "actions": actions}
        return cls(policy, losses, params=params, estimator=estimator, batch=batch, seed=seed)

    def __call__(self) -> tuple[float, float]:
        """The policy loss, and the mean entropy in nats."""
        with self._measuring(), torch.no_grad():
            loss, entropy = self.losses()
        return float(loss), float(entropy)

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """For one forward pass and what is derived from it: nothing of the policy's changes, and it repeats."""
        with preserved_state(self.policy), differentiable_twice(self.policy, self._device):
            seed_all(stream_seed(self._seed), own_generators(self.policy))
            yield

    def losses(self) -> Losses:
        """Both, with graphs, as the policy is: buffers and random states move as in any forward pass."""
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
        with self._measuring():
            loss, entropy = self.losses()
            found = [_filled(_gradients(x, tensors, graph=False), tensors) for x in (loss, entropy)]
        return found[0], found[1]

    def family(self, scale: Sequence[torch.Tensor] | None = None) -> AffineFamily:
        r"""Hessians A of the policy loss and B of minus the mean entropy, as ``A + alpha B``.

        Args:
            scale: Diagonal P of an optimizer's preconditioner, in the shapes of the parameters: then
                :math:`P^{-1/2} (A + \alpha B) P^{-1/2}`, with P held still.

        Raises:
            StaleOperatorError: While a session is open: a parameter was changed, so that products would mix two points.
        """
        tensors = list(self.parameters.values())
        roots = None if scale is None else [s.detach().rsqrt() for s in scale]

        @contextmanager
        def session() -> Iterator[Callable[[Sequence[torch.Tensor]], tuple[list[torch.Tensor], list[torch.Tensor]]]]:
            with self._measuring():
                versions = [t._version for t in tensors]
                loss, entropy = self.losses()
                first = _gradients(loss, tensors, graph=True)
                second = _gradients(-entropy, tensors, graph=True)

                def product(vector: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
                    for (name, p), version in zip(self.parameters.items(), versions, strict=True):
                        if p._version != version:
                            raise StaleOperatorError(
                                f"parameter {name!r} was changed while the family's session was open: its products "
                                "would mix two points. Finish measuring before optimizer.step(), or measure a copy."
                            )
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
        with self._measuring(), torch.no_grad():
            log_prob = batch["evaluate"](self.policy, batch["observations"], batch["actions"])[0]
        x, y = log_prob[batch["keep"]].double(), batch["advantages"][batch["keep"]].double()
        return float(((x - x.mean()) * (y - y.mean())).mean())


def _mean(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    # A policy that has one entropy for all states may give one number.
    return values[keep].mean() if values.shape == keep.shape else values.mean()


def _ratio(log_prob: torch.Tensor, weights: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """What PPO ascends, unclipped and at ratio one: a mean over what counts."""
    ratio = torch.exp(log_prob - log_prob.detach())
    return (weights.to(log_prob) * ratio)[keep].mean()


def _discounted(weights: torch.Tensor, starts: torch.Tensor, gamma: float) -> torch.Tensor:
    """Each weight times gamma to the power of its place in the episode."""
    places = torch.arange(len(starts), device=starts.device)
    first = torch.where(starts.bool(), places, 0).cummax(0).values
    return weights * gamma ** (places - first).to(weights)


def _dice(
    log_prob: torch.Tensor, weights: torch.Tensor, keep: torch.Tensor, starts: torch.Tensor, discount: float | None
) -> torch.Tensor:
    r"""What DiCE ascends, as a mean over what counts; Loaded DiCE where dependencies have a discount.

    The magic box of a set of actions is the product of their ratios, one in value. DiCE weighs a reward with that of
    all actions up to it; Loaded DiCE an advantage with what its own action adds to that of the actions before it.
    """
    counted = torch.where(keep, log_prob, torch.zeros_like(log_prob))
    through, before = [], []
    running = log_prob.new_zeros(())
    first = starts.tolist()
    for t, own in enumerate(counted.unbind()):
        earlier = log_prob.new_zeros(()) if first[t] else (1.0 if discount is None else discount) * running
        running = earlier + own
        before.append(earlier)
        through.append(running)
    w, v = torch.stack(through), torch.stack(before)
    boxes = torch.exp(w - w.detach())
    if discount is not None:
        # The two boxes cancel in value: the surrogate's own is put back, derivatives are theirs.
        boxes = boxes - torch.exp(v - v.detach()) + 1.0
    return (weights.to(log_prob) * boxes)[keep].mean()


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

r"""What each tensor does at a step, in a handful of fused passes and without waiting for the device.

Everything is kept as *sums over entries* until the end. Those of the shards of a tensor add up to those of the whole,
so a sharded job reduces one small table and then divides; no norm of a shard is ever averaged.

Staleness is :math:`\mathrm{RMS}_t = \sqrt{\mathrm{mean}(g_t^2 / \max(\hat v_t, \epsilon^2))}` with :math:`\hat v_t` the
second moment that the step divides by: g_t is in it, and the bias correction. It is near 1 while v describes the
gradient (1 exactly in the first step), and large when the gradient outgrows it. Source: Wortsman et al. (2023),
arXiv:2304.13013, section 3 and algorithm 2 (StableAdamW, whose debiased beta2 makes the same corrected moment).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dyntune.errors import InvalidArgumentError, ShapeMismatchError

__all__ = ["STATISTICS", "SecondMoments", "TensorSums", "second_moments", "tensor_sums"]

# Rows of the table of sums.
COUNT, GRADIENT, SCALED, BELOW, CHANGE, WEIGHT = range(6)

STATISTICS = ("gradient_norm", "log_rms", "staleness", "below_eps", "update_ratio")

# Entries worked on at a time, so that passes over them are in cache on a CPU, and working memory is bounded on a GPU.
CHUNK_CPU = 1 << 18
CHUNK_GPU = 1 << 24
# A coordinate whose sqrt(v) is below this many eps is not adaptive any more: eps takes a tenth of its divisor or more.
EPS_MARGIN = 10.0
SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class SecondMoments:
    """Second moments of the optimizer, and what the step makes of them.

    Args:
        values: One tensor per parameter.
        corrections: What each is divided by, ``1 - beta2^t`` for Adam, 1 for RMSprop; t counts the gradients in it.
        eps: The optimizer's eps per parameter.
        beta2: Given where `values` were read *before* the step took the gradient in, so that it is taken in here; None
            where they were read afterwards.
    """

    values: Sequence[torch.Tensor]
    corrections: Sequence[float]
    eps: Sequence[float]
    beta2: Sequence[float] | None = None


def second_moments(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], *, before_step: bool, steps: int | None = None
) -> SecondMoments | None:
    """Read the second moments of Adam, AdamW, NAdam, RAdam or RMSprop.

    Args:
        optimizer: A torch optimizer.
        parameters: Those whose gradients are looked at.
        before_step: Whether the optimizer has yet to take in the present gradient (a step pre-hook).
        steps: How many gradients its moments hold now. By default read from the state, which waits for the device where
            the optimizer counts there (``capturable=True`` or ``fused=True``).

    Returns:
        None where the optimizer keeps no second moment per entry, or not of all parameters yet (before its first step),
        and for amsgrad before a step, whose maximum the present gradient may or may not raise.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = torch.optim.Adam([w])
        >>> second_moments(optimizer, [w], before_step=True) is None
        True
        >>> w.grad = torch.ones(3)
        >>> optimizer.step()
        >>> round(second_moments(optimizer, [w], before_step=False).corrections[0], 6)
        0.001
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    values, corrections, eps, betas = [], [], [], []
    for p in parameters:
        group: Mapping[str, Any] = groups.get(id(p), {})
        state: Mapping[str, Any] = optimizer.state.get(p, {})
        adam = "exp_avg_sq" in state and "betas" in group
        if not adam and not ("square_avg" in state and "alpha" in group):
            return None
        if before_step and "max_exp_avg_sq" in state:
            return None
        values.append(state.get("max_exp_avg_sq", state["exp_avg_sq"]) if adam else state["square_avg"])
        beta2 = float(group["betas"][1] if adam else group["alpha"])
        count = (float(state["step"]) if steps is None else steps) + before_step
        betas.append(beta2)
        corrections.append(1 - beta2**count if adam else 1.0)
        eps.append(float(group["eps"]))
    return SecondMoments(values, corrections, eps, betas if before_step else None)


@dataclass(frozen=True)
class TensorSums:
    """Sums over the entries of each tensor; on the device until somebody reads them.

    Args:
        table: Shape (6, tensors): entries, g^2, g^2 / max(v, eps^2), entries with sqrt(v) below 10 eps, squared change,
            squared weights of before. Rows that were not asked for are NaN.
    """

    table: torch.Tensor

    def __add__(self, other: TensorSums) -> TensorSums:
        """Sums over the entries of two shards."""
        return TensorSums(self.table + other.table)

    def statistics(self) -> torch.Tensor:
        """One row per name in ``STATISTICS``, one column per tensor; on the device. Shape (5, tensors).

        ``gradient_norm``; ``log_rms``, the natural logarithm of the gradient's root mean square (-inf where it is
        zero); ``staleness``; ``below_eps``, the share of entries whose ``sqrt(v)`` is below 10 eps: above one half
        exactly where the median is below; ``update_ratio``, the change's length over the weights' (infinite for weights
        that were all zero). A tensor without entries, and what was not asked for, has NaN.
        """
        t = self.table
        return torch.stack(
            [
                t[GRADIENT].sqrt(),
                (t[GRADIENT] / t[COUNT]).log() / 2,
                (t[SCALED] / t[COUNT]).sqrt(),
                t[BELOW] / t[COUNT],
                (t[CHANGE] / t[WEIGHT]).sqrt(),
            ]
        )


def tensor_sums(
    gradients: Sequence[torch.Tensor],
    *,
    moments: SecondMoments | None = None,
    parameters: Sequence[torch.Tensor] | None = None,
    previous: Sequence[torch.Tensor] | None = None,
    below_eps: bool = True,
) -> TensorSums:
    """Sums over the entries of each tensor, of this process's shards where parameters are distributed.

    The change of the parameters is measured on them, not computed from the optimizer's formula: a formula is right for
    the optimizers it knows, without clipping, decay schedules or a scaler that skips the step. It takes a copy of the
    parameters from before the step, on the steps that measure it.

    Args:
        gradients: One per tensor. Local tensors: of a DTensor pass ``to_local()``.
        moments: For staleness and the comparison with eps; see :func:`second_moments`.
        parameters: After the step; with `previous`.
        previous: Copies from before the step.
        below_eps: Whether to count entries whose second moment is below eps: half of what the moments cost.

    Returns:
        Sums in float64 (float32 on MPS) on the first gradient's device.

    Raises:
        ShapeMismatchError: Lists that do not fit together.
        InvalidArgumentError: Only one of `parameters` and `previous`, or no tensor at all.

    Accuracy: entries are squared in their own precision, float32 at least, and added up in pieces: about 1e-5 on a CPU
    for tensors of any size. Overflow shows as infinity.
    Cost: gradients are read once, and once more together with the moments; working memory for five times 2^18 entries
    on a CPU and 2^24 (0.34 GB) on a GPU, less if the model is smaller. No device synchronisation.

    Example:
        >>> sums = tensor_sums([torch.tensor([3.0, 4.0]), torch.zeros(5)])
        >>> dict(zip(STATISTICS, sums.statistics()[:2, 0].tolist()))  # doctest: +ELLIPSIS
        {'gradient_norm': 5.0, 'log_rms': 1.262...}
    """
    lists: list[Sequence[torch.Tensor]] = [gradients]
    if (parameters is None) != (previous is None):
        raise InvalidArgumentError("the change of the parameters needs both `parameters` and `previous`.")
    if not gradients:
        raise InvalidArgumentError("no gradient was given: statistics are of one tensor at least.")
    lists += [moments.values] if moments is not None else []
    lists += [parameters, previous] if parameters is not None and previous is not None else []
    if any([t.shape for t in other] != [t.shape for t in gradients] for other in lists[1:]):
        raise ShapeMismatchError(
            f"lists of {[len(x) for x in lists]} tensors (gradients, then moments, parameters, previous ones) differ "
            "in length or shapes: each needs one tensor per gradient."
        )
    device = gradients[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    table = torch.full((6, len(gradients)), math.nan, dtype=dtype, device=device)
    table[COUNT].copy_(torch.tensor([t.numel() for t in gradients], dtype=dtype), non_blocking=True)
    asked = [GRADIENT]
    asked += [] if moments is None else [SCALED, BELOW] if below_eps else [SCALED]
    asked += [CHANGE, WEIGHT] if parameters is not None else []
    for place in asked:
        table[place].zero_()
    flat = [[t.detach().reshape(-1) for t in tensors] for tensors in lists]
    for chunk in _chunks(flat[0]):
        which = [i for i, _, _ in chunk]
        sums = _sums([[tensors[i][a:b] for i, a, b in chunk] for tensors in flat], moments, which, below_eps=below_eps)
        columns = torch.tensor(which).to(device, non_blocking=True)
        for place, row in zip(asked, sums, strict=True):
            table[place].index_add_(0, columns, torch.stack(row).to(device, dtype, non_blocking=True))
    return TensorSums(table)


def _sums(
    parts: list[list[torch.Tensor]], moments: SecondMoments | None, which: list[int], *, below_eps: bool
) -> list[list[torch.Tensor]]:
    """Sums over every piece, in the order of the table."""
    gradients = _wide(parts[0])
    rows = [_squares(gradients)]
    if moments is not None:
        second = _wide(parts[1])
        if moments.beta2 is not None:
            betas = [moments.beta2[i] for i in which]
            taken = torch._foreach_mul(gradients, gradients)
            torch._foreach_mul_(taken, [1 - b for b in betas])
            second = list(torch._foreach_mul(second, betas))
            torch._foreach_add_(second, taken)
        # max(v / c, eps^2) c, kept above what float32 holds so that 0 / 0 cannot come up.
        floor = [max(moments.corrections[i] * moments.eps[i] ** 2, SMALLEST) for i in which]
        quotient = torch._foreach_div(gradients, torch._foreach_clamp_min(second, floor))
        scaled = [q.dot(g.to(q)) for q, g in zip(quotient, gradients, strict=True)]
        rows.append([s * moments.corrections[i] for s, i in zip(scaled, which, strict=True)])
        if below_eps:
            # -1 where below, 0 or 1 elsewhere; only the former survive the clamp, and their squares count them.
            limits = [moments.corrections[i] * (EPS_MARGIN * moments.eps[i]) ** 2 for i in which]
            under = list(torch._foreach_sub(second, limits))
            torch._foreach_sign_(under)
            torch._foreach_clamp_max_(under, 0.0)
            rows.append(_squares(under))
    if len(parts) > 2:
        now, before = (_wide(tensors) for tensors in parts[-2:])
        rows += [_squares(torch._foreach_sub(now, before)), _squares(before)]
    return rows


def _squares(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Squared length of each, the square in double precision: it may be beyond float32 where the length is not."""
    norms = torch.stack(torch._foreach_norm(list(tensors)))
    wide = norms if norms.device.type == "mps" else norms.double()
    return list(wide.square())


def _wide(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _chunks(tensors: Sequence[torch.Tensor]) -> Iterator[list[tuple[int, int, int]]]:
    """(tensor, begin, end) of pieces of one device and dtype, in lists that are worked on together."""
    chunk: list[tuple[int, int, int]] = []
    held, kind = 0, None
    for i, tensor in enumerate(tensors):
        limit = CHUNK_CPU if tensor.device.type == "cpu" else CHUNK_GPU
        for begin in range(0, tensor.numel(), limit):
            end = min(begin + limit, tensor.numel())
            if chunk and (held + end - begin > limit or kind != (tensor.device, tensor.dtype)):
                yield chunk
                chunk, held = [], 0
            chunk.append((i, begin, end))
            held, kind = held + end - begin, (tensor.device, tensor.dtype)
    if chunk:
        yield chunk

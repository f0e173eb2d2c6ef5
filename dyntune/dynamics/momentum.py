"""The gradient beside the optimizer's own moment of the past: a memory that costs nothing to keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dyntune.errors import ShapeMismatchError

__all__ = ["moment_cosine", "moment_products"]

# Entries added up in their own precision, float32 at least, before float64 takes over: 7e-6 off at worst (measured in
# dyntune.numerics.vectors).
BLOCK = 1 << 20


def moment_products(gradients: Sequence[torch.Tensor], moments: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inner products of the gradient with the first moment from *before* the step: no extra memory.

    The moment has to be read before the optimizer steps (in a step pre-hook). Afterwards it holds the gradient itself,
    and pure noise would show a cosine of ``sqrt(1 - beta1^2)``, 0.436 at beta1 = 0.9.

    Args:
        gradients: As the optimizer will see them.
        moments: ``exp_avg`` or ``momentum_buffer``, as it was left by the step before.

    Returns:
        ``<g, m>, |g|^2, |m|^2``, float64 on the first tensor's device (float32 where it has none). Shape (3,). Add
        those of shards up before :func:`moment_cosine`.

    Raises:
        ShapeMismatchError: Lists of different lengths, or empty ones.
    """
    if len(gradients) != len(moments) or not gradients:
        raise ShapeMismatchError(f"{len(gradients)} gradients and {len(moments)} moments: one of each per parameter.")
    device = gradients[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros(3, dtype=dtype, device=device)
    for gradient, moment in zip(gradients, moments, strict=True):
        g, m = gradient.detach().reshape(-1), moment.detach().reshape(-1)
        for x, y in zip(torch.split(g, BLOCK), torch.split(m, BLOCK), strict=True):
            x, y = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (x, y))
            total += torch.stack([x.dot(y), x.dot(x), y.dot(y)]).to(total, non_blocking=True)
    return total


def moment_cosine(products: torch.Tensor) -> torch.Tensor:
    """``cos(g_t, m_{t-1})`` from :func:`moment_products`, on the device. Shape ().

    White noise has 0 here, give or take ``1 / sqrt(n)``. Noise attenuates it as it does every raw cosine, and for Adam
    ``<g_t, m_{t-1}>`` is ``(1 - beta1)`` times the sum of ``beta1^(k-1) <g_t, g_{t-k}>`` over k.

    Example:
        >>> g, m = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])
        >>> round(float(moment_cosine(moment_products([g], [m]))), 6)
        0.6
    """
    return products[0] / (products[1] * products[2]).sqrt()

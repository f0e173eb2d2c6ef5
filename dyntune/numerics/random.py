"""Random vectors from a seed of our own: the global generators are never read or advanced."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["normal_like", "stream_seed"]


def stream_seed(*key: int) -> int:
    """A 63-bit seed for the stream named by `key`; different keys give independent streams (numpy SeedSequence)."""
    # SeedSequence pads with zeros and splits large integers: without length and fixed width (1,) and (1, 0) were one.
    words = [word for k in key for word in (k & 0xFFFFFFFF, k >> 32 & 0xFFFFFFFF)]
    return int(np.random.SeedSequence([len(key), *words]).generate_state(1, np.uint64)[0] >> 1)


def normal_like(shape: torch.Size, dtype: torch.dtype, device: torch.device, *, key: tuple[int, ...]) -> torch.Tensor:
    """Standard normal tensor that depends on `key` and `shape` only.

    Drawn on the CPU in float32 whatever the device and dtype, so that a model measured on another device starts from
    the same direction.
    """
    generator = torch.Generator().manual_seed(stream_seed(*key))
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(device=device, dtype=dtype)

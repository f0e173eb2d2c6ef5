"""The mode in which numbers are computed, whatever mode the caller is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["plain_arithmetic"]


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Autocast off and tensors that autograd may use, even if the caller is inside ``autocast`` or ``inference_mode``.

    Autocast would round every matrix product of Lanczos and of a backward pass to bfloat16; tensors made under
    ``inference_mode`` can neither be written to nor saved for backward outside of it. An autocast that is entered
    within inherits ``cache_enabled=False``: weights cast once and kept would not follow when the parameters move.
    """
    with torch.inference_mode(mode=False), torch.autocast(device.type, enabled=False, cache_enabled=False):
        yield

"""Where a run comes from: enough to repeat it, nothing about whose machine it was."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

__all__ = ["optimizer_summary", "provenance"]


def provenance(*, optimizer: torch.optim.Optimizer | None = None, **more: Any) -> dict[str, Any]:
    """Versions, kind of machine, time, optimizer, and whatever else belongs into the header.

    Args:
        optimizer: Summarised by :func:`optimizer_summary`.
        **more: As given.
    """
    own = sys.modules[__name__.partition(".")[0]]  # it is loaded; to import it from here would be a way up
    found = {
        "versions": {
            "dyntune": str(own.__version__),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "platform": f"{platform.system()} {platform.machine()}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }
    return found if optimizer is None else found | {"optimizer": optimizer_summary(optimizer)}


def optimizer_summary(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Class and groups of an optimizer as plain values.

    Returns:
        ``class``, and ``groups`` with their options, ``tensors`` (how many) and ``parameters`` (numbers in them; of a
        sharded parameter all of it).

    Example:
        >>> found = optimizer_summary(torch.optim.SGD([torch.ones(3, 2)], lr=0.5))
        >>> found["class"], found["groups"][0]["lr"], found["groups"][0]["parameters"]
        ('SGD', 0.5, 6)
    """
    return {"class": type(optimizer).__name__, "groups": [_group(group) for group in optimizer.param_groups]}


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    params = group["params"]
    options = {str(name): _plain(option) for name, option in group.items() if name not in ("params", "param_names")}
    return {"tensors": len(params), "parameters": sum(p.numel() for p in params), **options}


def _plain(option: Any) -> Any:
    if isinstance(option, torch.Tensor):  # a learning rate on the device
        return float(option) if option.numel() == 1 else f"tensor of shape {tuple(option.shape)}"
    if option is None or isinstance(option, (bool, int, float, str)):
        return option
    if isinstance(option, (list, tuple)):
        return [_plain(item) for item in option]
    return type(option).__name__  # never its repr, which may hold anything

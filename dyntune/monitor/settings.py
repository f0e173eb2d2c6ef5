"""What an optimizer's groups are told, besides the learning rate: :class:`Settings`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["Settings"]

OPTIONS = ("momentum", "eps", "weight_decay")
GROUPS = 64  # that are recorded; layer-wise settings of large models have about as many
NAMED = 64  # parameters of a group that are named


class Settings:
    """Numbers of every parameter group, told when they change.

    Columns ``optimizer/beta1``, ``optimizer/beta2`` (RMSprop's alpha is one), ``optimizer/eps``,
    ``optimizer/weight_decay`` and ``optimizer/momentum``, of the first group and, where they differ from it, of others:
    ``optimizer/eps/1``. The label ``group/1`` names the parameters of that group, one a line.

    Numbers that are kept in tensors are left out, since reading them would wait for the device.

    Args:
        optimizer: What steps.
        names: Of parameters, by identity.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
        self._optimizer, self._names = optimizer, names
        self._known: list[dict[str, float]] = []

    def look(self) -> tuple[dict[str, float], dict[str, str]]:
        """Columns and labels of what changed; the first time, of everything."""
        groups = self._optimizer.param_groups[:GROUPS]
        now = [_numbers(group) for group in groups]
        if now == self._known:
            return {}, {}
        self._known = now
        values = {f"optimizer/{name}": number for name, number in now[0].items()}
        labels: dict[str, str] = {}
        for index, (group, numbers) in enumerate(zip(groups, now, strict=True)):
            if index == 0:
                continue
            labels[f"group/{index}"] = "\n".join(self._names.get(id(p), "unnamed") for p in group["params"][:NAMED])
            for name, number in numbers.items():
                if number != now[0].get(name):
                    values[f"optimizer/{name}/{index}"] = number
        return values, labels


def _numbers(group: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, Any] = {name: group[name] for name in OPTIONS if name in group}
    betas = group.get("betas")
    if isinstance(betas, (tuple, list)) and len(betas) >= 2:
        found |= {"beta1": betas[0], "beta2": betas[1]}
    elif "alpha" in group and "lambd" not in group:  # ASGD's alpha is another thing
        found["beta2"] = group["alpha"]
    return {name: float(number) for name, number in found.items() if isinstance(number, (int, float))}

"""Which parameters have gradients, and which nobody updates: :class:`Wiring`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dyntune.objective.parameters import named_parameters

__all__ = ["FROZEN", "NAMED", "UNHELD", "UNREACHED", "Wiring"]

FROZEN, UNREACHED, UNHELD = "grad/frozen", "grad/unreached", "update/unheld"
NAMED = 256  # names in a label; of a model with more that are missing these tell enough
ENOUGH = 16  # steps after which a parameter that is updated at all was updated: accumulated, delayed, of another player
# Changes that are recorded: where experts or heads take turns it differs at every look, and says nothing.
MOST = 64


class Wiring:
    """Looks at which parameters take part, without reading a number from the device; tells what changed.

    - ``grad/frozen``: held by the optimizer, and ``requires_grad`` is off.
    - ``grad/unreached``: held by the optimizer, and no gradient came.
    - ``update/unheld``: not held by the optimizer; gradients come, and in 16 steps nobody wrote to it.

    Each is a column with the number of tensors and one, ``.../share``, of their share of all entries; a label of the
    same name holds the names of the tensors, one a line, and ``grad/unreached/leading`` how many of the first tensors
    of the optimizer are among them without a gap.

    Args:
        model: The model, unwrapped.
        optimizer: What steps.
        names: Of parameters, by identity.

    Cost:
        Some 0.2 microseconds a tensor.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
        self._model, self._optimizer, self._names = model, optimizer, names
        self._versions: dict[int, int] | None = None  # of what the optimizer does not hold, at the first look
        self._since = 0
        self._known: dict[str, tuple[str, ...]] = {}
        self._changes = 0

    def look(self, step: int) -> tuple[dict[str, float], dict[str, str]]:
        """After a step, while its gradients are there.

        Args:
            step: Its number.

        Returns:
            Columns and labels of the kinds that changed since the last look; the first time, of those with a tensor.
        """
        if self._changes >= MOST:
            return {}, {}
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        others = self._others({id(p) for p in held})
        total = sum(p.numel() for p in held) + sum(p.numel() for p in others)
        frozen = [p for p in held if not p.requires_grad]
        unreached = [p for p in held if p.requires_grad and p.grad is None]
        if len(unreached) + len(frozen) == len(held):  # already cleared, or there was no backward(): nothing is known
            unreached = []
        found = {FROZEN: frozen, UNREACHED: unreached, UNHELD: self._unheld(others, step)}
        values: dict[str, float] = {}
        labels: dict[str, str] = {}
        for kind, tensors in found.items():
            names = tuple(self._names.get(id(p), "unnamed") for p in tensors)
            if names == self._known.get(kind, ()):
                continue
            self._known[kind] = names
            values[kind] = float(len(names))
            values[f"{kind}/share"] = sum(p.numel() for p in tensors) / max(total, 1)
            labels[kind] = "\n".join(names[:NAMED])
        if UNREACHED in values:
            missing = {id(p) for p in unreached}
            gap = next((i for i, p in enumerate(held) if id(p) not in missing), len(held))
            values[f"{UNREACHED}/leading"] = float(gap)
        self._changes += bool(values)
        return values, labels

    def _others(self, held: set[int]) -> list[nn.Parameter]:
        return [p for p in named_parameters(self._model).values() if id(p) not in held]

    def _unheld(self, others: list[nn.Parameter], step: int) -> list[nn.Parameter]:
        """Of those, what has a gradient and was written to by nobody since the first look."""
        if self._versions is None:
            self._versions, self._since = {id(p): p._version for p in others}, step
            return []
        if step - self._since < ENOUGH:
            return []
        known = self._versions
        return [p for p in others if p.requires_grad and p.grad is not None and known.get(id(p), -1) == p._version]

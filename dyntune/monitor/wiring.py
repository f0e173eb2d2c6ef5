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
# Steps between the looks that have to agree before anything is said: experts, heads and accumulated parts that take
# turns have had theirs by then. Found by search: no parts that are there for n steps and away for n, n from 1 to 32,
# are away at the first five looks, wherever these begin (tests/monitor/test_wiring.py); the sixth is for longer turns.
CONFIRMING = (14, 15, 5, 4, 40)
# Changes that are recorded: where experts or heads take turns it differs at every look, and says nothing.
MOST = 64


class Wiring:
    """Looks at which parameters take part, without reading a number from the device; tells what changed.

    - ``grad/frozen``: held by the optimizer, and ``requires_grad`` is off.
    - ``grad/unreached``: held by the optimizer, and no gradient came.
    - ``update/unheld``: not held by the optimizer; gradients come, and in 16 steps nobody wrote to it.

    Each is a column with the number of tensors and others with their share of all entries (``.../share``) and the step
    at which that was seen first (``.../since``); a label of the same name holds the names of the tensors, one a line,
    and ``grad/unreached/leading`` how many of the first tensors of the optimizer are among them without a gap.

    What is missing is told once six looks, over 78 steps, have found it missing; what is there again, at once.

    Args:
        model: The model, unwrapped.
        optimizer: What steps.
        names: Of parameters, by identity.

    Attributes:
        due: Step at which it has to be looked at again, if that is still to come; looks before it say nothing.

    Cost:
        Some 0.2 microseconds a tensor.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
        self._model, self._optimizer, self._names = model, optimizer, names
        self._versions: dict[int, int] | None = None  # of what the optimizer does not hold, at the first look
        self._since = 0
        self._known: dict[str, tuple[str, ...]] = {}
        self._suspected: dict[str, tuple[int, int, tuple[str, ...]]] = {}  # since, looks, names missing in all of them
        self._changes = 0
        self.due = 0

    def look(self, step: int) -> tuple[dict[str, float], dict[str, str]]:
        """After a step, while its gradients are there.

        Args:
            step: Its number.

        Returns:
            Columns and labels of the kinds that changed since the last look; the first time, of those with a tensor.
        """
        if self._changes >= MOST or step < self.due:
            return {}, {}
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        others = self._others({id(p) for p in held})
        total = sum(p.numel() for p in held) + sum(p.numel() for p in others)
        frozen = [p for p in held if not p.requires_grad]
        unreached = [p for p in held if p.requires_grad and p.grad is None]
        found = {FROZEN: frozen, UNREACHED: unreached, UNHELD: self._unheld(others, step)}
        if len(unreached) + len(frozen) == len(held):  # already cleared, or there was no backward(): nothing is known
            del found[UNREACHED]
        values: dict[str, float] = {}
        labels: dict[str, str] = {}
        for kind, tensors in found.items():
            sizes = {self._names.get(id(p), "unnamed"): p.numel() for p in tensors}
            since, names = self._confirmed(kind, tuple(sizes), step)
            if names == self._known.get(kind, ()):
                continue
            self._known[kind] = names
            values[kind] = float(len(names))
            values[f"{kind}/share"] = sum(sizes[name] for name in names) / max(total, 1)
            values[f"{kind}/since"] = float(since)
            labels[kind] = "\n".join(names[:NAMED])
        if UNREACHED in values:
            missing = set(self._known[UNREACHED])
            gap = next((i for i, p in enumerate(held) if self._names.get(id(p)) not in missing), len(held))
            values[f"{UNREACHED}/leading"] = float(gap)
        self._changes += bool(values)
        looks = [count for _, count, _ in self._suspected.values()]
        self.due = step + (CONFIRMING[min(looks) - 1] if looks else 0)
        return values, labels

    def _confirmed(self, kind: str, now: tuple[str, ...], step: int) -> tuple[int, tuple[str, ...]]:
        """What is missing for certain, and the step at which the latest of it was seen first."""
        known = tuple(name for name in self._known.get(kind, ()) if name in now)  # the others are there again
        since, count, before = self._suspected.pop(kind, (step, 0, now))
        new = tuple(name for name in now if name in before and name not in known)
        if not new:
            return step, known
        if count < len(CONFIRMING):
            self._suspected[kind] = since, count + 1, new
            return step, known
        certain = {*known, *new}
        return since, tuple(name for name in now if name in certain)

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

"""One step looked at tensor by tensor: :class:`TensorLook`."""

from __future__ import annotations

import math
import statistics

import torch

from dyntune.dynamics.tensors import COUNT, STATISTICS, TensorSums, second_moments, tensor_sums
from dyntune.monitor.gradients import Gradients, real
from dyntune.objective.dtensor import local

__all__ = ["TensorLook"]

COLUMNS = {
    "log_rms": "grad/log_rms",
    "staleness": "adam/staleness",
    "below_eps": "adam/below_eps",
    "update_ratio": "update/ratio",
}


class TensorLook:
    """Gradients, second moments and change of every tensor at one step: begun before it, ended after it.

    Args:
        optimizer: What steps.
        found: Its gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, found: Gradients) -> None:
        with torch.no_grad():
            moments = second_moments(optimizer, found.parameters, before_step=True)
            if moments is not None:
                values = [real(local(v)) for v in moments.values]
                moments = type(moments)(values, moments.corrections, moments.eps, moments.beta2)
            self._sums = tensor_sums(found.tensors, moments=moments)
            # Gradients may be written to by the step (SGD with nesterov and foreach does), so nothing of them is kept.
            self._names, self._parameters = found.names, found.parameters
            self._previous = [real(local(p.detach())).clone() for p in found.parameters]

    def end(self) -> None:
        """The step is made."""
        with torch.no_grad():
            now = [real(local(p.detach())) for p in self._parameters]
            change = tensor_sums(now, parameters=now, previous=self._previous).table
        self._sums = TensorSums(torch.cat([self._sums.table[:4], change[4:]]))
        self._previous = []

    def values(self) -> dict[str, float]:
        """Statistics by column and tensor, and the largest of them; waits for the device."""
        table = self._sums.statistics().cpu()
        table[:, (self._sums.table[COUNT] == 0).cpu()] = math.nan
        found: dict[str, float] = {}
        for statistic, column in COLUMNS.items():
            values = dict(zip(self._names, table[STATISTICS.index(statistic)].tolist(), strict=True))
            known = {name: value for name, value in values.items() if not math.isnan(value)}
            found |= {f"{column}/{name}": value for name, value in known.items()}
            if known and statistic in ("staleness", "below_eps"):
                found[f"{column}_max"] = max(known.values())
            finite = [value for value in known.values() if math.isfinite(value)]
            if finite and statistic == "update_ratio":
                found["update/ratio_median"] = statistics.median(finite)
        return found

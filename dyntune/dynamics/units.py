r"""Units that no longer take part: dormant, silent, saturated, per activation in the network.

A unit is an entry of the last dimension of a linear layer's output and a channel of a convolution's. Its score is its
mean absolute activation over that of the layer,

.. math:: s_i = \frac{\mathbb E_x |h_i(x)|}{\frac1n \sum_k \mathbb E_x |h_k(x)|} ,

and it is *dormant* where :math:`s_i \le \tau`. It is *silent* where its input was above zero nowhere. Source of the
score: Sokar, Agarwal, Castro and Evci (2023), arXiv:2302.12902 (tau-dormant neurons).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from dyntune.dynamics.operations import OperationReader, Operations
from dyntune.errors import InvalidArgumentError, UnreadableModelError
from dyntune.numerics.arithmetic import plain_arithmetic
from dyntune.objective.batches import num_rows
from dyntune.objective.losses import LossFunction
from dyntune.objective.passes import ForwardPasses
from dyntune.objective.running import RunningModules

__all__ = ["DeadUnits", "UnitReader", "UnitStatistics", "dead_units"]

# The smaller of the positive thresholds that implementations of ReDo report side by side (0, 0.025 and 0.1).
TAU = 0.025
LEVEL = 0.95
# Saturated: the slope is at most a hundredth of its largest value, h (1 - h) of 1/4 or 1 - h^2 of 1.
FLAT = 0.01

_RECTIFIERS = {
    *("relu", "relu_", "gelu", "gelu_", "silu", "silu_", "mish", "mish_", "elu", "elu_", "celu", "celu_", "softplus"),
    *("leaky_relu", "leaky_relu_", "hardtanh", "hardtanh_", "hardswish", "hardswish_", "threshold", "threshold_"),
    *("_prelu_kernel", "rrelu_with_noise", "rrelu_with_noise_"),
}
_SLOPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": lambda h: 1 - h * h,
    "sigmoid": lambda h: 4 * h * (1 - h),
}
# Activations that libraries write as a module of several operations; torch's own are one operation each.
_COMPOSED = re.compile(r"gelu|silu|swish|mish|relu|softplus", re.IGNORECASE)
_CHANNELS = re.compile(r"conv|batch_norm|group_norm|instance_norm")
_FEATURES = re.compile(r"^(addmm|mm|bmm|baddbmm|linear|native_layer_norm|_fused_rms_norm)$")


@dataclass(frozen=True, kw_only=True)
class UnitStatistics:
    """One activation in the network.

    Args:
        kind: The operation, or the class of a composed activation.
        units: How many units there are.
        rows: Rows of the batches that they were watched on.
        dormant: Share of units whose score is at most tau; NaN where activations are not finite.
        silent: Share of units whose input was above zero nowhere; None for tanh and sigmoid.
        silent_units: Which those are.
        dead: Share of units that are both dormant and silent; None for tanh and sigmoid, NaN as above. A silent unit of
            a leaky activation still passes gradients on, and one of a GELU may.
        saturated: Share of activations with a slope below a hundredth of the largest; None but for tanh and sigmoid.
        activity_bound: A unit that was silent on all `rows` is active on less than this share of rows (one-sided,
            exact binomial, 95%, for each unit by itself; about ``3 / rows``).
    """

    kind: str
    units: int
    rows: int
    dormant: float
    silent: float | None
    silent_units: tuple[int, ...]
    dead: float | None
    saturated: float | None
    activity_bound: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; NaN becomes None."""
        return {name: None if isinstance(x, float) and math.isnan(x) else x for name, x in asdict(self).items()}


class DeadUnits(dict[str, UnitStatistics]):
    """Statistics by qualified name of the module that applies the activation, in the order of the forward pass.

    A second activation that the same module applies within one pass has ``#2`` behind the name.
    """

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {name: item.to_dict() for name, item in self.items()}


def dead_units(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    tau: float = TAU,
    num_batches: int | Literal["all"] = 16,
    autocast: torch.dtype | None = None,
    seed: int = 0,
) -> DeadUnits:
    """Shares of dormant, silent and saturated units of every activation, and how sure silence is.

    ReLU networks are sparse: half of all *activations* are zero in a healthy one. What is counted here are units that
    are so on all rows.

    Args:
        model: The model, in its present mode. Modules and functions are seen alike.
        batches: As for :func:`dyntune.hessian`; of a pair the second element (the targets) is not used.
        loss_fn: ``(model, batch) -> anything``: how the model is called, where it is not ``model(inputs)``.
        tau: Score at and below which a unit is dormant, >= 0; 0 for units that are exactly zero.
        num_batches: How many batches to draw from a loader.
        autocast: Dtype of mixed precision, as in training.
        seed: Seed of dropout.

    Returns:
        Statistics by activation.

    Raises:
        UnreadableModelError: No activation was seen.
        InvalidArgumentError: A negative `tau`; a model without parameters; a sharded model.
        BatchError: See the batch grammar.

    Accuracy:
        Means are summed in float64. Rows are taken to be independent draws; positions of a row are not, and do not
        count as more. A unit is a channel (dimension 1) where the last layer before the activation was a convolution
        or a batch, group or instance norm, else an entry of the last dimension. Gates inside fused recurrent kernels
        are not seen.
    Cost:
        One forward pass per batch and two passes over each activation; see ``benchmarks/tier2.py``.
    Source:
        Sokar et al. (2023), arXiv:2302.12902 (score); Clopper and Pearson (1934), Biometrika 26(4) (bound).

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
        >>> with torch.no_grad():
        ...     _ = model[0].bias.copy_(torch.tensor([9.0, 9.0, 9.0, -9.0]))
        >>> found = dead_units(model, torch.rand(100, 2))["1"]
        >>> found.silent_units, found.silent, round(found.activity_bound, 3)
        ((3,), 0.25, 0.03)
    """
    if not tau >= 0:
        raise InvalidArgumentError(f"tau={tau!r}: a unit's mean activation relative to its layer's is never negative.")
    passes = ForwardPasses(model, batches, loss_fn, num_batches=num_batches, autocast=autocast, seed=seed)
    reader = UnitReader(passes.model)
    passes.run(reading=Operations([reader], passes.batches))
    found = reader.read(tau)
    if not found:
        raise UnreadableModelError(
            "no activation was seen in the forward pass: no ReLU, GELU, SiLU, tanh, sigmoid or one of their relatives. "
            "Recurrent layers apply theirs inside of one kernel, which cannot be read."
        )
    return found


class _Tally:
    """Sums over rows and positions, per unit, on the device."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._sums: torch.Tensor | None = None  # of absolute activations, and activity
        self._flat: list[torch.Tensor] = []
        self._entries = self._rows = 0

    def update(self, before: torch.Tensor | None, after: torch.Tensor, dim: int, rows: int) -> None:
        """Take in one call: input above zero (None where that means nothing), output, the dimension of the units."""
        exact = torch.float32 if after.device.type == "mps" else torch.float64
        other = [d for d in range(after.dim()) if d != dim % after.dim()]
        size = after.abs().sum(other, dtype=exact) if other else after.abs().to(exact)
        active = torch.zeros_like(size) if before is None else (before.any(other) if other else before).to(exact)
        sums = torch.stack([size, active])
        if self._sums is not None and self._sums.shape != sums.shape:
            raise UnreadableModelError(
                f"an activation has {size.numel()} units in one batch and {self._sums.shape[1]} in another: give "
                "batches on which the layers keep their width."
            )
        self._sums = sums if self._sums is None else self._sums + sums
        if self.kind in _SLOPES:
            self._flat.append((_SLOPES[self.kind](after.float()) <= FLAT).sum())
        self._entries += after.numel()
        # Where rows and positions lie in one dimension only the batch knows how many are independent.
        self._rows += min(rows, after.shape[0])

    def read(self, tau: float) -> UnitStatistics:
        """The statistics."""
        assert self._sums is not None
        size, active = self._sums.cpu()
        units, saturating = size.numel(), self.kind in _SLOPES
        finite = bool(size.isfinite().all())
        silent = () if saturating else tuple((active == 0).nonzero()[:, 0].tolist())
        dormant = size <= tau * size.mean()
        dead = float((dormant & (active == 0)).double().mean()) if finite else math.nan
        return UnitStatistics(
            kind=self.kind,
            units=units,
            rows=self._rows,
            dormant=float(dormant.double().mean()) if finite else math.nan,
            silent=None if saturating else len(silent) / units,
            silent_units=silent,
            dead=None if saturating else dead,
            saturated=float(torch.stack(self._flat).sum()) / self._entries if saturating else None,
            activity_bound=1 - (1 - LEVEL) ** (1 / self._rows),
        )


class UnitReader(OperationReader):
    """Sees every activation of forward passes, those of composed modules as one.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tallies: dict[str, _Tally] = {}
        self._model, self._running = model, RunningModules(model)
        self._calls: dict[str, int] = {}
        self._dim, self._within, self._rows, self._wrapped = -1, 0, 0, False

    def read(self, tau: float = TAU) -> DeadUnits:
        """The statistics so far; empty where no activation was seen."""
        return DeadUnits({name: tally.read(tau) for name, tally in self._tallies.items()})

    def begin(self, batch: Any) -> None:
        """See :class:`OperationReader`."""
        self._calls, self._dim, self._within, self._rows = {}, -1, 0, num_rows(batch)
        if not self._wrapped:
            self._wrapped = True
            self._wrap_composed()

    def _wrap_composed(self) -> None:
        for name, module in self._model.named_modules():
            composed = _COMPOSED.search(type(module).__name__) and not type(module).__module__.startswith("torch.")
            if composed and not any(True for _ in module.children()) and not any(True for _ in module.parameters()):
                self._wrap(name, module)

    def _wrap(self, name: str, module: nn.Module) -> None:
        """Let a module's forward report what went in and came out; attributes are put back after the passes."""
        forward = module.forward

        def reporting(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            above = x > 0  # before a forward that works in place
            with self._composed():
                result = forward(x, *args, **kwargs)
            if not self._within:
                self._note(name, type(module).__name__, above, result)
            return result

        vars(module)["forward"] = reporting

    @contextmanager
    def _composed(self) -> Iterator[None]:
        self._within += 1
        try:
            yield
        finally:
            self._within -= 1

    def wants(self, name: str, func: Any) -> bool:  # noqa: ARG002 - the reader's interface
        """See :class:`OperationReader`."""
        shapes = _CHANNELS.search(name) or _FEATURES.search(name)
        return bool(shapes) or name in _RECTIFIERS or _kind(name) in _SLOPES

    def before(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG002 - the reader's interface
        """See :class:`OperationReader`."""
        if _CHANNELS.search(name) or _FEATURES.search(name):
            self._dim = 1 if _CHANNELS.search(name) else -1
        kind = _kind(name)
        if self._within or (name not in _RECTIFIERS and kind not in _SLOPES):
            return None
        return kind, None if kind in _SLOPES else args[0] > 0

    def after(self, name: str, args: Any, result: Any, noted: Any) -> None:  # noqa: ARG002 - the reader's interface
        """See :class:`OperationReader`."""
        if noted is not None:
            kind, above = noted
            self._note(self._running.innermost()[0], kind, above, result)

    def _note(self, module: str, kind: str, above: torch.Tensor | None, result: torch.Tensor) -> None:
        if result.dim() == 0 or result.numel() == 0:
            return
        if result.dim() == 1:
            result, above = result[None], None if above is None else above[None]
        self._calls[module] = self._calls.get(module, 0) + 1
        name = module if self._calls[module] == 1 else f"{module}#{self._calls[module]}"
        dim = self._dim if result.dim() > 2 else -1
        with plain_arithmetic(result.device), torch.no_grad():
            self._tallies.setdefault(name, _Tally(kind)).update(above, result, dim, self._rows)


def _kind(name: str) -> str:
    return name.removesuffix("_").removeprefix("_").removesuffix("_kernel")

r"""How a network's inputs and steps lie to what its matrices amplify and its loss curves.

*Spectral alignment* of a layer :math:`y = Wx`: the signs of :math:`\langle u, x \rangle` over the inputs, u the
direction of inputs that W amplifies most. While inputs lie on both sides, an update that strengthens u helps some and
harms others; once all are on one side, every step grows W further. The share on one side needs no scale, unlike norms.
Source: Qiu et al. (2025), arXiv:2510.04202.

*Alignment with the curvature*: the share of a gradient or update in the leading eigenvectors. Source: Gur-Ari, Roberts
and Dyer (2018), arXiv:1812.04754.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from dyntune.dynamics.operations import OperationReader, Operations
from dyntune.errors import InvalidArgumentError, UnreadableModelError
from dyntune.numerics.arithmetic import plain_arithmetic
from dyntune.numerics.random import normal_like
from dyntune.numerics.student import LEVEL, student_interval
from dyntune.numerics.vectors import dot
from dyntune.objective.batches import num_rows
from dyntune.objective.losses import LossFunction
from dyntune.objective.parameters import clean_name
from dyntune.objective.passes import ForwardPasses
from dyntune.records import Estimate, Status

__all__ = ["AlignmentReader", "LayerAlignment", "eigenvector_shares", "spectral_alignment"]

# Block Krylov: columns (one would not see a double singular value), most steps, and after how many the residual is
# compared with what is small enough, relative to the singular value squared.
COLUMNS, STEPS, CHECKED, RESIDUAL = 2, 60, 6, 1e-5
DENSE = 64  # inputs up to which a dense decomposition is no dearer than those products
# The direction is taken as known while the sine of its possible error is below this: a sign flips for inputs that lie
# within it of the plane, a share of about 2/pi times it for inputs in random directions.
RESOLVED = 0.1
# Multiples of machine epsilon that a residual may be off by: two products, a factorisation and a rotation.
ROUNDING = 10.0
_STREAM = 0xA119
_PRODUCTS = {"mm", "addmm"}
# What comes between a weight and its product under autocast.
_COPIES = {"_to_copy", "t", "transpose", "permute", "detach", "alias", "clone", "view"}


@dataclass(frozen=True, kw_only=True)
class LayerAlignment:
    """One weight matrix.

    Args:
        same_sign: Share of inputs on the more populated side, in [0.5, 1]; 1 is a collapse of sign diversity. The
            interval covers the choice of rows.
        mean_cosine: Mean absolute cosine of inputs with u.
        random_cosine: What that would be for inputs in random directions, ``sqrt(2 / (pi n))``.
        spectral_norm: Largest singular value of the matrix.
        direction_error: Bound on the sine of the angle between the u used and the true one (residual over gap).
        inputs: How many inputs there were.
    """

    same_sign: Estimate
    mean_cosine: float
    random_cosine: float
    spectral_norm: float
    direction_error: float
    inputs: int


def spectral_alignment(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    num_batches: int | Literal["all"] = 16,
    autocast: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, LayerAlignment]:
    """On which side of the top singular direction of every weight matrix its inputs lie.

    Args:
        model: The model, in its present mode.
        batches: As for :func:`dyntune.hessian`; of a pair the second element (the targets) is not used.
        loss_fn: ``(model, batch) -> anything``: how the model is called, where it is not ``model(inputs)``.
        num_batches: How many batches to draw from a loader.
        autocast: Dtype of mixed precision, as in training.
        seed: Seed of dropout and of the start of the iteration.

    Returns:
        By name of the weight, in the order of the forward pass. Matrices that multiply activations count, those inside
        ``nn.MultiheadAttention`` included; convolutions, embeddings and recurrent kernels do not. `same_sign` is
        refused where the direction is not resolved, because the two largest singular values are too close.

    Raises:
        UnreadableModelError: No product with a weight matrix was seen.
        InvalidArgumentError: A model without parameters; a sharded model.
        BatchError: See the batch grammar.

    Accuracy:
        u in float32 from a block Krylov space, to a residual of 1e-5 where 60 steps suffice; `direction_error` bounds
        what is left (Davis-Kahan).
    Cost:
        One forward pass per batch, one more matrix-vector product per layer in it, and up to 60 products of each
        matrix with two vectors, forth and back; see ``benchmarks/tier2.py``.
    Source:
        Qiu et al. (2025), arXiv:2510.04202.

    Example:
        >>> model = nn.Linear(3, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[5.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        >>> x = torch.tensor([[1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [3.0, 0.0, 4.0], [-1.0, 2.0, 0.0]])
        >>> found = spectral_alignment(model, x)["weight"]
        >>> float(found.same_sign), round(found.spectral_norm, 4)
        (0.75, 5.0)
    """
    passes = ForwardPasses(model, batches, loss_fn, num_batches=num_batches, autocast=autocast, seed=seed)
    reader = AlignmentReader(passes.model, seed=seed)
    passes.run(reading=Operations([reader], passes.batches))
    found = reader.read()
    if not found:
        raise UnreadableModelError(
            "no product of activations with a weight matrix was seen in the forward pass: convolutions, embeddings and "
            "recurrent kernels have no spectral alignment here."
        )
    return found


class _Layer:
    """Signs and cosines of one matrix's inputs."""

    def __init__(self, weight: torch.Tensor, *, seed: int) -> None:
        self._direction, self._norm, self._error = _leading(weight, seed=seed)
        self._positive: list[torch.Tensor] = []
        self._cosines: list[torch.Tensor] = []
        self._inputs = 0

    def update(self, inputs: torch.Tensor, rows: int) -> None:
        """Take in the inputs of one product. Shape (inputs, n)."""
        along = inputs.to(self._direction.dtype) @ self._direction
        length = torch.linalg.vector_norm(inputs, dim=-1, dtype=self._direction.dtype)
        known = length > 0  # an input of zero is on no side
        signs = torch.where(known, (along > 0).to(along.dtype), math.nan)
        groups = rows if rows and len(signs) % rows == 0 else 1
        self._positive.append(signs.reshape(groups, -1).nanmean(1).cpu())
        self._cosines.append((along.abs()[known] / length[known]).sum(dtype=torch.float32).cpu())
        self._inputs += int(known.sum())

    def read(self) -> LayerAlignment:
        """The record."""
        shares = torch.cat(self._positive).double()
        shares = shares[~shares.isnan()]
        size = len(self._direction)
        return LayerAlignment(
            same_sign=self._same_sign(shares),
            mean_cosine=float(torch.stack(self._cosines).sum()) / self._inputs if self._inputs else math.nan,
            random_cosine=math.sqrt(2 / (math.pi * size)),
            spectral_norm=self._norm,
            direction_error=self._error,
            inputs=self._inputs,
        )

    def _same_sign(self, shares: torch.Tensor) -> Estimate:
        reason = ""
        if not len(shares):
            reason = "all inputs are zero"
        elif not self._error < RESOLVED:
            reason = (
                f"the two largest singular values are too close: direction known to a sine of {self._error:.2g} only"
            )
        if reason:
            mean, low, high, status = None, 0.5, 1.0, Status.REFUSED
        else:
            mean, low, high = student_interval(shares.tolist())
            if mean < 0.5:  # u has no sign of its own
                mean, low, high = 1 - mean, 1 - high, 1 - low
            low, high = max(low, 0.0), min(high, 1.0)
            status = Status.OK if len(shares) > 1 else Status.UNCERTAIN
            reason = "" if len(shares) > 1 else "one row: how rows differ is unknown"
        return Estimate(
            value=mean,
            low=low,
            high=high,
            level=LEVEL,
            unit="1",
            method=f"share of inputs on one side, {len(shares)} rows",
            covers="sampling",
            status=status,
            reason=reason,
        )


def _leading(weight: torch.Tensor, *, seed: int) -> tuple[torch.Tensor, float, float]:
    """Direction of inputs that `weight` (inputs, outputs) amplifies most, its singular value, and a bound on the error.

    Block Krylov with Rayleigh-Ritz; the bound is the sine from residual over gap (Davis and Kahan 1970). Few inputs
    are decomposed densely: there the blocks would not fill the space.
    """
    w = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    if w.shape[0] <= DENSE:
        values, vectors = torch.linalg.eigh(w @ w.T)
        top = float(values[-1])
        gap = top - (float(values[-2]) if len(values) > 1 else 0.0)
        rounding = ROUNDING * torch.finfo(w.dtype).eps * top
        return vectors[:, -1], math.sqrt(max(top, 0.0)), min(1.0, rounding / gap) if gap > 0 else 1.0
    columns = min(COLUMNS, *w.shape)
    block = normal_like(torch.Size((w.shape[0], columns)), w.dtype, w.device, key=(_STREAM, seed))
    block, _ = torch.linalg.qr(block)
    basis, images = block, w @ (w.T @ block)
    # Beside columns that are all there are, the second singular value is zero.
    squares, residuals = torch.zeros(2), torch.zeros(2)
    for step in range(1, STEPS + 1):
        full = basis.shape[1] + columns > w.shape[0]
        if step % CHECKED == 0 or step == STEPS or full:
            values, turn = torch.linalg.eigh(basis.T @ images)
            ritz = basis @ turn[:, -columns:]
            found = torch.linalg.vector_norm(images @ turn[:, -columns:] - values[-columns:] * ritz, dim=0).cpu()
            squares[-columns:], residuals[-columns:] = values[-columns:].cpu(), found
            if full or not float(residuals.max()) > RESIDUAL * float(squares[-1]):
                break
        block = images[:, -columns:]
        for _ in range(3):  # twice is enough, and once more where the space is exhausted and only rounding is left
            block, _ = torch.linalg.qr(block - basis @ (basis.T @ block))
        basis, images = torch.cat([basis, block], 1), torch.cat([images, w @ (w.T @ block)], 1)
    value = float(squares[-1])
    gap = value - float(squares[0] + residuals[0])
    rounding = ROUNDING * torch.finfo(w.dtype).eps * value
    error = min(1.0, (float(residuals[-1]) + rounding) / gap) if gap > 0 else 1.0
    return ritz[:, -1], math.sqrt(max(value, 0.0)), error


class AlignmentReader(OperationReader):
    """Sees products of activations with weights, also with those that autocast has rounded.

    Args:
        model: The model.
        seed: Of the start of the iteration.
    """

    def __init__(self, model: nn.Module, *, seed: int) -> None:
        self._layers: dict[str, _Layer] = {}
        self._model, self._seed, self._rows = model, seed, 0
        self._weights: dict[int, tuple[str, int]] = {}
        self._rounded = WeakTensorKeyDictionary()

    def read(self) -> dict[str, LayerAlignment]:
        """By name of the weight; empty where no product was seen."""
        return {name: layer.read() for name, layer in self._layers.items()}

    def begin(self, batch: Any) -> None:
        """See :class:`OperationReader`."""
        self._rows = num_rows(batch)
        # Copies may stand in for the weights of this pass.
        named = self._model.named_parameters()
        self._weights = {p.untyped_storage().data_ptr(): (clean_name(n), p.numel()) for n, p in named if p.dim() == 2}

    def wants(self, name: str, func: Any) -> bool:  # noqa: ARG002 - the reader's interface
        """See :class:`OperationReader`."""
        return name in _PRODUCTS or name in _COPIES

    def before(self, name: str, func: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG002 - the reader's interface
        """See :class:`OperationReader`."""
        if name in _PRODUCTS:
            inputs, weight = args[-2:]
            if (owner := self._name(weight)) is not None and self._name(inputs) is None:
                self._note(owner, inputs, weight)

    def after(self, name: str, args: Any, result: Any, noted: Any) -> None:  # noqa: ARG002 - the reader's interface
        """See :class:`OperationReader`."""
        if name in _COPIES and (owner := self._name(args[0])) is not None:
            self._rounded[result] = owner

    def _name(self, tensor: torch.Tensor) -> str | None:
        rounded: str | None = self._rounded.get(tensor)  # type: ignore[no-untyped-call]
        if rounded is not None:
            return rounded
        name, size = self._weights.get(tensor.untyped_storage().data_ptr(), (None, 0))
        # A packed projection may be used in slices, each of which is a matrix of its own.
        return name if name is None or tensor.numel() == size else f"{name}[{tensor.storage_offset()}]"

    def _note(self, name: str, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        with plain_arithmetic(inputs.device), torch.no_grad():
            if name not in self._layers:
                self._layers[name] = _Layer(weight, seed=self._seed)
            self._layers[name].update(inputs, self._rows)


def eigenvector_shares(step: Sequence[torch.Tensor], vectors: Sequence[Sequence[torch.Tensor]]) -> tuple[float, ...]:
    """Squared cosine of a gradient or an update with each eigenvector; their sum is the share in the subspace.

    Where in the network the eigenvectors live is the matter of :func:`dyntune.block_mass`, the curvature of each layer
    by itself that of :func:`dyntune.block_eigenvalues`.

    Args:
        step: One tensor per parameter.
        vectors: Orthonormal vectors of the same shapes, such as ``dyntune.eigenvalues(operator, k).vectors``.

    Returns:
        One share per vector, in [0, 1]. A random direction has ``1 / n`` on average, n the number of parameters.

    Raises:
        InvalidArgumentError: The step is zero, or not finite.

    Cost: one inner product per vector.
    Source: Gur-Ari, Roberts and Dyer (2018), arXiv:1812.04754.

    Example:
        >>> eigenvector_shares([torch.tensor([3.0, 4.0])], [[torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])]])
        (0.36, 0.64)
    """
    length = dot(step, step)
    if not 0 < length < math.inf:
        raise InvalidArgumentError(f"the step has squared length {length:g}: it has no direction to compare.")
    return tuple(dot(step, vector) ** 2 / (length * dot(vector, vector)) for vector in vectors)

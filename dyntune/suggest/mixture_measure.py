"""Inner products of the gradients of single rows (or small parts) of several sources, in an optimizer's metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dyntune.errors import EmptyBatchError, InvalidArgumentError
from dyntune.numerics.random import stream_seed
from dyntune.numerics.sketch import CountSketch
from dyntune.numerics.vectors import dot
from dyntune.objective.batches import freeze_batches, map_tensors, num_rows
from dyntune.objective.context import unwrap
from dyntune.objective.dtensor import is_distributed_tensor
from dyntune.objective.objective import Objective, differentiate
from dyntune.stability.scales import diagonal_scale
from dyntune.stability.thresholds import recurrence

__all__ = ["SourceGradients", "measure_gradients", "metric_of", "parts_of"]

Scale = Sequence[torch.Tensor] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceGradients:
    """What the gradients of all sources' parts have in common.

    Args:
        gram: Inner products, those of one source side by side. Shape (n, n).
        counts: Gradients of each source.
        rows: Rows of each.
        sketched: Whether inner products of different gradients come from a sketch.
    """

    gram: NDArray[np.float64]
    counts: tuple[int, ...]
    rows: int
    sketched: bool


def parts_of(
    source: Any, name: str, *, rows: int, most: int, num_batches: int | Literal["all"], seed: int
) -> list[Any]:
    """At most `most` parts of `rows` rows each, drawn at random from a source's first batches, in their own order.

    Raises:
        EmptyBatchError: Nothing was drawn, or fewer rows than one part.
        BatchError: Not batches.
    """
    if isinstance(source, (list, tuple)) and not source:
        raise EmptyBatchError(
            f"source {name!r} is empty: nothing is known of its noise. Leave it out, or give it rows."
        )
    with torch.inference_mode(mode=False):
        batches = freeze_batches(source, num_batches=num_batches, device=torch.device("cpu"))
    places = [(i, start) for i, b in enumerate(batches) for start in range(0, num_rows(b) - rows + 1, rows)]
    if not places:
        raise EmptyBatchError(
            f"source {name!r} has no batch of {rows} rows, which one gradient is asked to be of (rows={rows}): give it "
            "larger batches, or make rows smaller."
        )
    chosen = np.sort(np.random.default_rng(stream_seed(seed)).permutation(len(places))[:most])
    return [_cut(batches[i], start, rows) for i, start in (places[j] for j in chosen)]


def _cut(batch: Any, start: int, rows: int) -> Any:
    whole = num_rows(batch)

    def part(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[start : start + rows] if tensor.dim() and tensor.shape[0] == whole else tensor

    return map_tensors(batch, part)


def metric_of(optimizer: torch.optim.Optimizer | None) -> tuple[Callable[[Objective], Scale], str]:
    """How to find the optimizer's diagonal for an objective's parameters, and what it is in words."""
    plain = "Euclidean"
    if optimizer is None:
        return (lambda _: None), plain
    if recurrence(optimizer).family in ("sign", "schedule-free"):
        return (lambda _: None), f"{plain}: the steps of {type(optimizer).__name__} have no diagonal that is known"
    if isinstance(optimizer, torch.optim.SGD):
        return (lambda o: diagonal_scale(optimizer, list(o.parameters.values()))), plain
    return (
        lambda o: diagonal_scale(optimizer, list(o.parameters.values())),
        f"{type(optimizer).__name__}'s, g.P^-1 g with its second moments held still",
    )


def measure_gradients(
    model: nn.Module,
    parts: Mapping[str, Sequence[Any]],
    *,
    rows: int,
    scale_of: Callable[[Objective], Scale],
    memory: int,
    objective_options: Mapping[str, Any],
) -> SourceGradients:
    """Gradient of every part, one backward pass each; the model and its state are left alone.

    Args:
        model: The model.
        parts: By source.
        rows: Of a part.
        scale_of: P of an objective's parameters; see :func:`metric_of`.
        memory: Bytes that gradients may take on the CPU; where they need more, sketches stand in for them.
        objective_options: For :class:`Objective`.

    Raises:
        InvalidArgumentError: A model that is sharded over processes.
    """
    sharded = next((name for name, p in unwrap(model).named_parameters() if is_distributed_tensor(p)), None)
    if sharded is not None:
        raise InvalidArgumentError(
            f"parameter {sharded!r} is sharded over processes: measure an unsharded copy of the model."
        )
    kept: list[torch.Tensor] = []
    norms: list[float] = []
    total = sum(len(each) for each in parts.values())
    sketch: CountSketch | None = None
    for each in parts.values():
        objective = Objective(model, list(each), num_checked=1, **objective_options)
        scale = scale_of(objective)
        size = sum(p.numel() for p in objective.parameters.values())
        if sketch is None and 4 * size * total > memory:
            sketch = CountSketch()
        share = 1 / rows if objective.adds_up else 1.0
        with objective.differentiating() as buffers:
            for index in range(len(objective.batches)):
                gradient = differentiate(objective.batch_loss(index, buffers).value, objective.tensors)
                if scale is not None:
                    gradient = [g / p.sqrt() for g, p in zip(gradient, scale, strict=True)]
                if share != 1.0:
                    gradient = [g * share for g in gradient]
                norms.append(dot(gradient, gradient))
                flat = (
                    torch.cat([g.detach().reshape(-1) for g in gradient])
                    if sketch is None
                    else sketch(gradient, list(objective.parameters))
                )
                # float64 models keep their digits: a variance of nearly equal gradients is a small difference.
                kept.append(flat.cpu() if flat.dtype == torch.float64 else flat.float().cpu())
    gram = _inner_products(kept)
    np.fill_diagonal(gram, norms)
    return SourceGradients(
        gram=gram,
        counts=tuple(len(each) for each in parts.values()),
        rows=rows,
        sketched=sketch is not None,
    )


def _inner_products(vectors: Sequence[torch.Tensor], columns: int = 1 << 20) -> NDArray[np.float64]:
    """In float64, a block of columns at a time."""
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for start in range(0, len(vectors[0]), columns // len(vectors) + 1):
        block = torch.stack([v[start : start + columns // len(vectors) + 1] for v in vectors]).double()
        total += block @ block.T
    return np.asarray(total.numpy())

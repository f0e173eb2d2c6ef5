"""The loss grammar: from what the user passes to a mean with its count.

Averages over batches are weighted by count, always: a ragged last batch, or batches with different numbers of tokens
that count, then give exactly the loss of the concatenated data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from dyntune.errors import AmbiguousLossError, BatchError, InvalidArgumentError
from dyntune.objective.batches import num_rows

__all__ = [
    "Criterion",
    "Loss",
    "LossFunction",
    "LossRule",
    "check_callable",
    "criterion_rule",
    "forward",
    "last_dim_cross_entropy",
    "scalar",
    "split_targets",
    "tensor_output",
    "torch_loss",
    "user_loss",
]

Criterion: TypeAlias = Callable[..., torch.Tensor]
Count: TypeAlias = "float | torch.Tensor"


@dataclass(frozen=True)
class Loss:
    """A mean loss with the number of terms it averages, for loss functions of your own.

    Args:
        value: Scalar tensor: the mean over `count` terms.
        count: How many terms (rows, tokens, summed weights) the mean is over, > 0.

    Example:
        >>> import torch
        >>> Loss(torch.tensor(0.5), count=12).count
        12
    """

    value: torch.Tensor
    count: Count


LossFunction: TypeAlias = Callable[[Any, Any], "torch.Tensor | Loss"]


@dataclass(frozen=True)
class LossRule:
    """How a batch becomes a loss.

    Args:
        evaluate: ``(model, batch) -> Loss``.
        reduction: ``"mean"``: batches are averaged by count. ``"sum"``: batches are added up, as the same criterion on
            the concatenated data would do.
        assumed: What was assumed, for the record.
        unit: What the counts count.
    """

    evaluate: Callable[[nn.Module, Any], Loss]
    reduction: Literal["mean", "sum"]
    assumed: str
    unit: str


def check_callable(function: Any, name: str, arguments: str) -> None:
    """Raise InvalidArgumentError unless `function` is None or a callable that is not a class."""
    if function is None or (callable(function) and not isinstance(function, type)):
        return
    if isinstance(function, type):
        raise InvalidArgumentError(
            f"{name} is the class {function.__name__}, not an instance: write {name}={function.__name__}()."
        )
    raise InvalidArgumentError(f"{name} is a {type(function).__name__}; pass a callable {arguments} -> scalar tensor.")


# -- a loss function of the user's own ---------------------------------------------------------------------------------


def user_loss(loss_fn: LossFunction, model: nn.Module, batch: Any) -> Loss:
    """What a loss function returned, with rows as its count where it names none."""
    result = loss_fn(model, batch)
    if isinstance(result, Loss):
        return Loss(scalar(result.value, "loss_fn's Loss.value"), result.count)
    return Loss(scalar(result, "loss_fn"), num_rows(batch))


def scalar(value: Any, source: str) -> torch.Tensor:
    """A loss as a tensor without dimensions; InvalidArgumentError where it is none."""
    if not isinstance(value, torch.Tensor):
        raise InvalidArgumentError(
            f"{source} returned a {type(value).__name__}; it must return a scalar tensor (not .item()), or "
            "dyntune.Loss(value, count)."
        )
    if value.numel() != 1:
        raise InvalidArgumentError(
            f"{source} returned a tensor of shape {tuple(value.shape)}; a loss is one number. Use reduction='mean', or "
            "return dyntune.Loss(values.mean(), count=values.numel())."
        )
    return value.reshape(())


# -- criteria ----------------------------------------------------------------------------------------------------------


def torch_loss(function: Any) -> str | None:
    """Name of the torch loss that `function` is: a module of torch.nn (or a subclass), or a function, maybe partial."""
    if isinstance(function, functools.partial):
        return torch_loss(function.func)
    if isinstance(function, nn.Module):
        bases = (base.__name__ for base in type(function).__mro__ if base.__module__ == "torch.nn.modules.loss")
        return next(bases, None)
    return _name(function) if getattr(function, "__module__", "") == "torch.nn.functional" else None


def _name(criterion: Any) -> str:
    if isinstance(criterion, functools.partial):
        return _name(criterion.func)
    name = getattr(criterion, "__name__", type(criterion).__name__)
    return str(name)


def _setting(criterion: Any, name: str, default: Any) -> Any:
    """A setting of a loss module (attribute) or of a partial function (keyword)."""
    if isinstance(criterion, functools.partial):
        return criterion.keywords.get(name, default)
    return getattr(criterion, name, default) if isinstance(criterion, nn.Module) else default


def criterion_rule(criterion: Criterion) -> LossRule:
    """A criterion applied to the model's output, with the count that its mean is over."""
    reduction = _setting(criterion, "reduction", "mean")
    if reduction == "none":
        raise InvalidArgumentError(
            f"{_name(criterion)} has reduction='none': a loss is one number. Use reduction='mean' or 'sum'."
        )
    count, unit = _count_rule(criterion, reduction)

    def evaluate(model: nn.Module, batch: Any) -> Loss:
        inputs, targets = split_targets(batch)
        outputs = tensor_output(forward(model, inputs))
        value = scalar(criterion(outputs, targets), f"criterion {_name(criterion)}")
        return Loss(value, count(outputs, targets))

    summed = reduction == "sum"
    assumed = f"{_name(criterion)}(model(inputs), targets), {'sum' if summed else 'mean'} over {unit}"
    return LossRule(evaluate, "sum" if summed else "mean", assumed, unit)


def _count_rule(criterion: Criterion, reduction: str) -> tuple[Callable[[torch.Tensor, torch.Tensor], Count], str]:
    """What the criterion's mean is over, and its name."""
    known = "cross_entropy" if criterion is last_dim_cross_entropy else torch_loss(criterion)
    name = (known or "").lower().replace("_", "")
    if name in {"crossentropyloss", "crossentropy", "nllloss", "nllloss2d"}:
        weight = _setting(criterion, "weight", None)
        ignored = _setting(criterion, "ignore_index", -100)
        unit = "targets that are not ignore_index" + ("" if weight is None else ", weighted by class")
        return functools.partial(_class_count, weight=weight, ignore_index=ignored), unit
    if name in _ELEMENTWISE and reduction != "batchmean":
        return _element_count, "elements"
    return lambda _, targets: float(num_rows(targets)), "rows"


_ELEMENTWISE = frozenset(
    [
        "mseloss",
        "l1loss",
        "smoothl1loss",
        "huberloss",
        "bceloss",
        "bcewithlogitsloss",
        "kldivloss",
        "poissonnllloss",
        "gaussiannllloss",
        "softmarginloss",
        "hingeembeddingloss",
        "binarycrossentropy",
        "binarycrossentropywithlogits",
        "kldiv",
        "poissonnllloss",
        "gaussiannllloss",
    ]
)


def _element_count(outputs: torch.Tensor, targets: torch.Tensor) -> Count:
    shape: torch.Size = torch.broadcast_shapes(outputs.shape, targets.shape)  # type: ignore[no-untyped-call]
    return float(shape.numel())


def last_dim_cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (..., classes) against targets (...)."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _class_count(
    outputs: torch.Tensor, targets: torch.Tensor, *, weight: torch.Tensor | None, ignore_index: int
) -> Count:
    """Denominator of cross-entropy's mean: targets not ignored, class weights summed where given."""
    if targets.is_floating_point():  # class probabilities: the mean is over everything but the class dimension
        return float(targets.numel() / outputs.shape[1 if outputs.dim() > 1 else 0])
    kept = targets != ignore_index
    if weight is None:
        return kept.sum()
    classes = torch.where(kept, targets, 0).long()  # ignore_index may lie outside the classes on either side
    return (weight.to(targets.device)[classes] * kept).sum()


def split_targets(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of a batch that goes with a criterion."""
    if isinstance(batch, Mapping):
        for key in ("labels", "targets", "target", "label", "y"):
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
        raise BatchError(
            f"the batch is a mapping with keys {list(batch)[:8]}, none of them 'labels' or 'targets': a criterion "
            "needs (inputs, targets). Pass loss_fn=lambda model, batch: ... instead."
        )
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        return batch[0], batch[1]
    size = f"{len(batch)} elements" if isinstance(batch, (list, tuple)) else type(batch).__name__
    raise BatchError(
        f"a criterion needs a batch (inputs, targets); this one is {size}. Pass loss_fn=lambda model, batch: ... to "
        "say how the loss is made."
    )


def forward(model: nn.Module, inputs: Any) -> Any:
    """Call the model: a mapping by keywords, a list or tuple by position, anything else as it is."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (list, tuple)):
        return model(*inputs)
    return model(inputs)


def tensor_output(outputs: Any) -> torch.Tensor:
    """The tensor a criterion compares: the output itself, its ``.logits``, or the first element."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    if isinstance(outputs, (list, tuple)) and outputs and isinstance(outputs[0], torch.Tensor):
        return outputs[0]
    raise AmbiguousLossError(
        f"the model returned a {type(outputs).__name__}; a criterion needs one tensor. Pass "
        "loss_fn=lambda model, batch: criterion(model(batch[0]).some_field, batch[1])."
    )

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

__all__ = ["Criterion", "Loss", "LossFunction", "LossRule", "resolve_loss"]

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


def resolve_loss(model: nn.Module, batch: Any, loss_fn: Any, criterion: Criterion | None) -> LossRule:
    """Apply the loss grammar.

    Args:
        model: The model, for the causal-LM counts and the shape of its outputs.
        batch: A sample batch.
        loss_fn: ``(model, batch) -> tensor or Loss``, or a torch loss, taken as a criterion; or None.
        criterion: ``(outputs, targets) -> tensor``; or None.

    Raises:
        InvalidArgumentError: Both were given, or ``reduction="none"``.
        AmbiguousLossError: Neither was given and the case is not clear.
    """
    if loss_fn is not None and criterion is not None:
        raise InvalidArgumentError("both loss_fn and criterion were given: which one is minimised? Pass one of them.")
    if loss_fn is not None and _is_torch_loss(loss_fn):
        loss_fn, criterion = None, loss_fn
    if criterion is not None:
        return _criterion_rule(criterion)
    if loss_fn is not None:
        if not callable(loss_fn):
            raise InvalidArgumentError(
                f"loss_fn is a {type(loss_fn).__name__}; pass a callable (model, batch) -> scalar tensor."
            )
        return LossRule(functools.partial(_user_loss, loss_fn), "mean", "loss_fn returns a mean over rows", "rows")
    return _inferred_rule(model, batch)


# -- a loss function of the user's own ---------------------------------------------------------------------------------


def _user_loss(loss_fn: LossFunction, model: nn.Module, batch: Any) -> Loss:
    result = loss_fn(model, batch)
    return result if isinstance(result, Loss) else Loss(_scalar(result, "loss_fn"), num_rows(batch))


def _scalar(value: Any, source: str) -> torch.Tensor:
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


def _is_torch_loss(function: Any) -> bool:
    """A loss module of torch.nn (or a subclass), or a loss function of torch.nn.functional, possibly partial."""
    if isinstance(function, functools.partial):
        return _is_torch_loss(function.func)
    if isinstance(function, nn.Module):
        return any(base.__module__ == "torch.nn.modules.loss" for base in type(function).__mro__)
    return getattr(function, "__module__", "") == "torch.nn.functional"


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


def _criterion_rule(criterion: Criterion) -> LossRule:
    reduction = _setting(criterion, "reduction", "mean")
    if reduction == "none":
        raise InvalidArgumentError(
            f"{_name(criterion)} has reduction='none': a loss is one number. Use reduction='mean' or 'sum'."
        )
    count, unit = _count_rule(criterion, reduction)

    def evaluate(model: nn.Module, batch: Any) -> Loss:
        inputs, targets = _split(batch)
        outputs = _tensor_output(_forward(model, inputs))
        value = _scalar(criterion(outputs, targets), f"criterion {_name(criterion)}")
        return Loss(value, count(outputs, targets))

    summed = reduction == "sum"
    assumed = f"{_name(criterion)}(model(inputs), targets), {'sum' if summed else 'mean'} over {unit}"
    return LossRule(evaluate, "sum" if summed else "mean", assumed, unit)


def _count_rule(criterion: Criterion, reduction: str) -> tuple[Callable[[torch.Tensor, torch.Tensor], Count], str]:
    """What the criterion's mean is over, and its name."""
    name = _name(criterion).lower().replace("_", "")
    if name in {"crossentropyloss", "crossentropy", "nllloss", "nllloss2d"}:
        weight = _setting(criterion, "weight", None)
        ignored = _setting(criterion, "ignore_index", -100)
        unit = "targets that are not ignore_index" + ("" if weight is None else ", weighted by class")
        return functools.partial(_class_count, weight=weight, ignore_index=ignored), unit
    if name in _ELEMENTWISE and reduction != "batchmean":
        return lambda outputs, targets: float(torch.broadcast_shapes(outputs.shape, targets.shape).numel()), "elements"
    return lambda outputs, targets: float(num_rows(targets)), "rows"


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
        "binarycrossentropy",
        "binarycrossentropywithlogits",
        "kldiv",
        "poissonnllloss",
        "gaussiannllloss",
    ]
)


def _class_count(
    outputs: torch.Tensor, targets: torch.Tensor, *, weight: torch.Tensor | None, ignore_index: int
) -> Count:
    """Denominator of cross-entropy's mean: targets not ignored, class weights summed where given."""
    if targets.is_floating_point():  # class probabilities: the mean is over everything but the class dimension
        return float(targets.numel() / outputs.shape[1 if outputs.dim() > 1 else 0])
    kept = targets != ignore_index
    if weight is None:
        return kept.sum()
    return (weight.to(targets.device)[targets.clamp_min(0)] * kept).sum()


def _split(batch: Any) -> tuple[Any, Any]:
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


def _forward(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (list, tuple)):
        return model(*inputs)
    return model(inputs)


def _tensor_output(outputs: Any) -> torch.Tensor:
    """The tensor a criterion compares: the output itself, its ``.logits``, or the first element."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    if isinstance(outputs, (list, tuple)) and outputs and isinstance(outputs[0], torch.Tensor):
        return outputs[0]
    raise AmbiguousLossError(
        f"the model returned a {type(outputs).__name__}; a criterion needs one tensor. Pass "
        "loss_fn=lambda model, batch: criterion(model(batch[0]).some_field, batch[1])."
    )


# -- no loss given -----------------------------------------------------------------------------------------------------

_ADVICE = (
    "Say which loss is minimised: criterion=torch.nn.CrossEntropyLoss() (or another), or "
    "loss_fn=lambda model, batch: ..., a scalar tensor."
)


def _inferred_rule(model: nn.Module, batch: Any) -> LossRule:
    """The output's own ``.loss``, or an unambiguous case by shape and dtype."""
    if isinstance(batch, Mapping):
        return _own_loss_rule(model, batch)
    if not (isinstance(batch, (list, tuple)) and len(batch) == 2 and isinstance(batch[1], torch.Tensor)):
        raise AmbiguousLossError(f"no loss was given and the batch is not (inputs, targets). {_ADVICE}")
    with torch.no_grad():
        outputs = _forward(model, batch[0])
    if getattr(outputs, "loss", None) is not None:
        return _own_loss_rule(model, batch)
    return _criterion_rule(_guess(_tensor_output(outputs), batch[1]))


def _guess(outputs: torch.Tensor, targets: torch.Tensor) -> Criterion:
    shapes = f"outputs {tuple(outputs.shape)} {outputs.dtype}, targets {tuple(targets.shape)} {targets.dtype}"
    if not targets.is_floating_point() and targets.dtype != torch.bool:
        classes_second = outputs.dim() >= 2 and outputs.shape[:1] + outputs.shape[2:] == targets.shape
        classes_last = outputs.dim() >= 3 and outputs.shape[:-1] == targets.shape
        if classes_second and not classes_last:
            return nn.CrossEntropyLoss()
        if classes_last and not classes_second:
            return _last_dim_cross_entropy
    elif targets.is_floating_point() and outputs.shape == targets.shape:
        if bool(((targets == 0) | (targets == 1)).all()):
            raise AmbiguousLossError(
                f"no loss was given; {shapes}, all targets 0 or 1: binary cross-entropy or a regression? {_ADVICE}"
            )
        return nn.MSELoss()
    raise AmbiguousLossError(f"no loss was given and {shapes} do not determine one. {_ADVICE}")


def _last_dim_cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (..., classes) against targets (...)."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


# Counted like any cross-entropy: by targets that are not ignored.
_last_dim_cross_entropy.__name__ = "cross_entropy"


def _own_loss_rule(model: nn.Module, batch: Any) -> LossRule:
    """The model computes its loss itself (Hugging Face style)."""
    shifted = _is_causal(model)

    def evaluate(model: nn.Module, batch: Any) -> Loss:
        outputs = _forward(model, batch)
        value = getattr(outputs, "loss", None)
        if value is None and isinstance(outputs, Mapping):
            value = outputs.get("loss")
        if value is None:
            raise AmbiguousLossError(
                f"no loss was given and the model's output ({type(outputs).__name__}) has no .loss. {_ADVICE}"
            )
        return Loss(_scalar(value, "the model's output .loss"), _label_count(batch, shifted=shifted))

    unit = "shifted labels that are not -100" if shifted else "labels that are not -100"
    return LossRule(evaluate, "mean", f"the model's own .loss, mean over {unit}", unit)


def _is_causal(model: nn.Module) -> bool:
    """Hugging Face names decoders ...ForCausalLM or ...LMHeadModel; encoder-decoders do not shift their labels."""
    config = getattr(model, "config", None)
    name = type(model).__name__
    return ("CausalLM" in name or "LMHead" in name) and not getattr(config, "is_encoder_decoder", False)


def _label_count(batch: Any, *, shifted: bool) -> Count:
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[-1]
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return float(num_rows(batch))
    kept = labels[..., 1:] if shifted and labels.dim() > 1 else labels
    return (kept != -100).sum()

"""Which loss is meant: `loss_fn`, `criterion`, the model's own, or what shapes and dtypes determine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dyntune.errors import AmbiguousLossError, InvalidArgumentError
from dyntune.objective.batches import num_rows
from dyntune.objective.losses import (
    Count,
    Criterion,
    Loss,
    LossRule,
    check_callable,
    criterion_rule,
    forward,
    last_dim_cross_entropy,
    scalar,
    tensor_output,
    torch_loss,
    user_loss,
)

__all__ = ["resolve_loss"]

_ADVICE = (
    "Say which loss is minimised: criterion=torch.nn.CrossEntropyLoss() (or another), or "
    "loss_fn=lambda model, batch: ..., a scalar tensor."
)


def resolve_loss(model: nn.Module, batch: Any, loss_fn: Any, criterion: Criterion | None) -> LossRule:
    """Apply the loss grammar.

    Args:
        model: The model, for the causal-LM counts and the shape of its outputs.
        batch: A sample batch.
        loss_fn: ``(model, batch) -> tensor or Loss``, or a torch loss, taken as a criterion; or None.
        criterion: ``(outputs, targets) -> tensor``; or None.

    Raises:
        InvalidArgumentError: Both were given, one is not callable, or ``reduction="none"``.
        AmbiguousLossError: Neither was given and the case is not clear.
    """
    if loss_fn is not None and criterion is not None:
        raise InvalidArgumentError("both loss_fn and criterion were given: which one is minimised? Pass one of them.")
    check_callable(loss_fn, "loss_fn", "(model, batch)")
    check_callable(criterion, "criterion", "(outputs, targets)")
    if loss_fn is not None and torch_loss(loss_fn) is not None:
        loss_fn, criterion = None, loss_fn
    if criterion is not None:
        return criterion_rule(criterion)
    if loss_fn is not None:
        return LossRule(functools.partial(user_loss, loss_fn), "mean", "loss_fn returns a mean over rows", "rows")
    return _inferred_rule(model, batch)


def _inferred_rule(model: nn.Module, batch: Any) -> LossRule:
    """The output's own ``.loss``, or an unambiguous case by shape and dtype."""
    if isinstance(batch, Mapping):
        return _own_loss_rule(model, lambda batch: batch)
    pair = isinstance(batch, (list, tuple)) and len(batch) == 2 and isinstance(batch[1], torch.Tensor)
    if not pair and not isinstance(batch, torch.Tensor):
        raise AmbiguousLossError(f"no loss was given and the batch is not (inputs, targets). {_ADVICE}")
    try:
        with torch.no_grad():
            outputs = forward(model, batch[0] if pair else batch)
    except TypeError as error:  # the model wants other arguments than the inputs
        raise AmbiguousLossError(f"no loss was given and model(inputs) failed: {error}. {_ADVICE}") from error
    if _own_loss(outputs) is not None:
        return _own_loss_rule(model, lambda batch: batch[0] if pair else batch)
    if not pair:
        raise AmbiguousLossError(
            f"no loss was given, the batch is a tensor without targets, and the model's output "
            f"({type(outputs).__name__}) has no .loss. {_ADVICE}"
        )
    return criterion_rule(_guess(tensor_output(outputs), batch[1]))


def _guess(outputs: torch.Tensor, targets: torch.Tensor) -> Criterion:
    shapes = f"outputs {tuple(outputs.shape)} {outputs.dtype}, targets {tuple(targets.shape)} {targets.dtype}"
    if not targets.is_floating_point() and targets.dtype != torch.bool:
        second = outputs.dim() >= 2 and outputs.shape[:1] + outputs.shape[2:] == targets.shape
        last = outputs.dim() >= 3 and outputs.shape[:-1] == targets.shape
        if second and not last and _are_classes(targets, outputs.shape[1]):
            return nn.CrossEntropyLoss()
        if last and not second and _are_classes(targets, outputs.shape[-1]):
            return last_dim_cross_entropy
    elif targets.is_floating_point() and outputs.shape == targets.shape:
        if bool(((targets == 0) | (targets == 1)).all()):
            raise AmbiguousLossError(
                f"no loss was given; {shapes}, all targets 0 or 1: binary cross-entropy or a regression? {_ADVICE}"
            )
        if _are_probabilities(targets):
            raise AmbiguousLossError(
                f"no loss was given; {shapes}, targets that sum to 1: cross-entropy with class probabilities or a "
                f"regression? {_ADVICE}"
            )
        return nn.MSELoss()
    raise AmbiguousLossError(f"no loss was given and {shapes} do not determine one. {_ADVICE}")


def _are_classes(targets: torch.Tensor, count: int) -> bool:
    """Whether integers can be classes out of `count`: one output for two classes, say, is another loss."""
    return count > 1 and bool(((targets >= 0) & (targets < count) | (targets == -100)).all())


def _are_probabilities(targets: torch.Tensor) -> bool:
    if targets.dim() < 2 or bool((targets < 0).any()):
        return False
    # 1e-3: probabilities are often stored in half precision.
    return any(bool(((targets.sum(dim) - 1).abs() < 1e-3).all()) for dim in (1, -1) if targets.shape[dim] > 1)


def _own_loss(outputs: Any) -> Any:
    """The loss that a model puts into its output (Hugging Face style), or None."""
    return outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)


def _own_loss_rule(model: nn.Module, inputs: Callable[[Any], Any]) -> LossRule:
    """The model computes its loss itself from ``inputs(batch)``."""
    shifted = _is_causal(model)

    def evaluate(model: nn.Module, batch: Any) -> Loss:
        try:
            outputs = forward(model, inputs(batch))
        except TypeError as error:  # the batch holds more than the model takes: targets, most likely
            raise AmbiguousLossError(f"no loss was given and model(**batch) failed: {error}. {_ADVICE}") from error
        value = _own_loss(outputs)
        if value is None:
            raise AmbiguousLossError(
                f"no loss was given and the model's output ({type(outputs).__name__}) has no .loss. {_ADVICE}"
            )
        return Loss(scalar(value, "the model's output .loss"), _label_count(batch, shifted=shifted))

    unit = "shifted labels that are not -100" if shifted else "labels that are not -100"
    return LossRule(evaluate, "mean", f"the model's own .loss, mean over {unit}", unit)


def _is_causal(model: nn.Module) -> bool:
    """Hugging Face names decoders ...ForCausalLM or ...LMHeadModel; encoder-decoders do not shift their labels."""
    config = getattr(model, "config", None)
    name = type(model).__name__
    return ("CausalLM" in name or "LMHead" in name) and not getattr(config, "is_encoder_decoder", False)


def _label_count(batch: Any, *, shifted: bool) -> Count:
    """Labels that count; rows where there are no integer labels."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return float(num_rows(batch))
    kept = labels[..., 1:] if shifted and labels.dim() > 1 else labels
    return (kept != -100).sum()

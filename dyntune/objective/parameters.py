"""Which parameters an objective speaks of: by name, trainable, each once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError, NonFiniteError, NoParametersError, UnsupportedDtypeError
from dyntune.objective.dtensor import local

__all__ = ["ParameterSelection", "clean_name", "named_parameters", "select_parameters"]

ParameterSelection: TypeAlias = "str | Iterable[str] | Callable[[str], bool] | None"


def clean_name(name: str) -> str:
    """A parameter's name without what DDP (``module.``) and ``torch.compile`` (``_orig_mod.``) put in front."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    return ".".join(parts[1:] if parts[0] == "module" and len(parts) > 1 else parts)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by clean name; where two clean names would be the same, the second keeps its full one."""
    named: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        clean = clean_name(name)
        named[name if clean in named else clean] = parameter
    return named


def select_parameters(
    model: nn.Module,
    selection: ParameterSelection = None,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
) -> dict[str, nn.Parameter]:
    """Trainable parameters by clean name, tied ones once, in the model's order.

    Args:
        model: The (unwrapped) model.
        selection: A glob or several (``"layers.*.weight"``), a predicate on names, or None for all.
        dtypes: What parameters may be stored in.

    Raises:
        NoParametersError: Nothing trainable is left.
        InvalidArgumentError: `selection` is none of these, or a selected parameter is not one that autograd can use.
        UnsupportedDtypeError: A selected parameter is stored in another dtype.
        NonFiniteError: A selected parameter holds NaN or infinity.
    """
    trainable = {name: p for name, p in named_parameters(model).items() if p.requires_grad}
    if not trainable:
        total = sum(1 for _ in model.parameters())
        raise NoParametersError(
            f"the model has no trainable parameters ({total} parameters, none with requires_grad=True): its loss has "
            "no curvature to measure. Call model.requires_grad_(True) on the part you train."
        )
    matches = _predicate(selection)
    chosen = {n: p for n, p in trainable.items() if matches(n) and not _is_empty(n, p)}
    if not chosen:
        raise NoParametersError(
            f"params={selection!r} matches none of the {len(trainable)} trainable parameters. Their names begin with: "
            f"{', '.join(list(trainable)[:6])}. Globs match whole names: '*.weight', 'encoder.*'."
        )
    for name, parameter in chosen.items():
        if parameter.dtype not in dtypes:
            raise UnsupportedDtypeError(
                f"parameter {name!r} is stored in {parameter.dtype}: curvature drowns in its rounding. Measure a "
                "float32 copy: dyntune.hessian(copy.deepcopy(model).float(), ...)."
            )
    _check_finite(chosen)
    return chosen


def _predicate(selection: ParameterSelection) -> Callable[[str], bool]:
    if selection is None:
        return lambda _: True
    if isinstance(selection, str):
        selection = (selection,)
    if callable(selection):
        return selection
    patterns = tuple(selection) if isinstance(selection, Iterable) else (selection,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        found = ", ".join(sorted({type(pattern).__name__ for pattern in patterns}))
        raise InvalidArgumentError(
            f"params holds {found}; parameters are chosen by name: give a glob such as '*.weight', a list of globs, or "
            "a predicate on names."
        )
    return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_empty(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter has no entries; one that cannot be measured at all is refused."""
    if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta:
        raise InvalidArgumentError(
            f"parameter {name!r} holds no numbers yet (a lazy module, or device 'meta'): run the model on one batch, "
            "or load its weights, before measuring."
        )
    if parameter.is_inference():
        raise InvalidArgumentError(
            f"parameter {name!r} was made under torch.inference_mode(), so autograd cannot use it. Build the model "
            "outside, or measure copy.deepcopy(model) made outside."
        )
    return parameter.numel() == 0


def _check_finite(parameters: dict[str, nn.Parameter]) -> None:
    parts = {name: part for name, p in parameters.items() if (part := local(p.detach())).numel()}
    norms = torch._foreach_norm(list(parts.values()), ord=float("inf")) if parts else ()
    finite = torch.stack([torch.isfinite(n).to("cpu") for n in norms]).tolist() if norms else []
    if not all(finite):
        bad = [name for name, ok in zip(parts, finite, strict=True) if not ok]
        raise NonFiniteError(
            f"parameter {bad[0]!r} ({len(bad)} in all) holds NaN or infinity: the run has already diverged. Measure an "
            "earlier checkpoint."
        )

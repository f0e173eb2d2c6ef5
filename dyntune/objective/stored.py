"""Weights from checkpoint files and state dicts: read without running code, matched with a model, lent to it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from dyntune.errors import CheckpointError, MissingDependencyError
from dyntune.objective.parameters import clean_name
from dyntune.objective.state import swapped

__all__ = ["Stored", "StoredState", "lent", "lent_buffers", "match_state", "read_checkpoint", "state_of", "weights_in"]

# A state dict, or the path of a file that holds one.
Stored: TypeAlias = "Mapping[str, Any] | str | os.PathLike[str]"

# Where training scripts put the weights in a larger checkpoint: Lightning and most examples, torchtune and GPT
# codebases, the PyTorch tutorials, DeepSpeed.
WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
# torch's "extra state" is whatever a module wants to remember, not a tensor that a forward pass could be lent.
EXTRA_STATE = "_extra_state"
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class StoredState:
    """Tensors for every parameter and persistent buffer of one model, on its devices and in its dtypes.

    Args:
        parameters: By the model's own name; tied parameters once.
        buffers: By the model's own name; shared buffers once.
        source: Where they come from, in words.
        dtypes: Storage types that were converted, such as ``"bfloat16"``; empty where nothing was.
    """

    parameters: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    source: str
    dtypes: tuple[str, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether every parameter is."""
        return all(bool(torch.isfinite(t).all()) for t in self.parameters.values())


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What a checkpoint file holds, tensors on the CPU. Code in a pickle is never run.

    Args:
        path: ``.safetensors``, or anything that ``torch.save`` wrote.

    Raises:
        CheckpointError: No such file, a damaged one, one that needs code to be run, or one that holds no mapping.
        MissingDependencyError: A ``.safetensors`` file without the package that reads it.
    """
    name = Path(path).name
    if not Path(path).is_file():
        raise CheckpointError(f"checkpoint {str(path)!r} is not a file. Check the path.")
    try:
        found = _read_safetensors(path) if name.endswith(".safetensors") else _read_torch(path)
    except MissingDependencyError:
        raise
    except Exception as error:  # the readers raise whatever a damaged file makes them stumble over
        raise CheckpointError(f"checkpoint {name!r} cannot be read: {_cause(error)}") from error
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"checkpoint {name!r} holds a {type(found).__name__}, not a mapping from names to tensors. Write it with "
            "torch.save(model.state_dict(), path)."
        )
    return found


def _read_torch(path: str | os.PathLike[str]) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingDependencyError(
            f"{Path(path).name!r} needs the package safetensors, which is not installed: pip install "
            "'dyntune[safetensors]'"
        ) from error
    return load_file(path, device="cpu")


def _cause(error: Exception) -> str:
    """The first line, or what refusing to run code means."""
    text = str(error).strip() or type(error).__name__
    if "weights_only" in text or "Weights only load failed" in text:
        return (
            "it is damaged, or holds pickled objects other than tensors, which would have to run code to be loaded; "
            "that is never done. Write it anew with torch.save(model.state_dict(), path), or as safetensors."
        )
    return f"{text.splitlines()[0][:200]} Is it damaged or cut short? Write it anew."


def weights_in(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict in a checkpoint: the checkpoint itself, or what a usual wrapper holds."""
    for wrapper in WRAPPERS:
        inner = checkpoint.get(wrapper)
        if isinstance(inner, Mapping) and any(isinstance(item, torch.Tensor) for item in inner.values()):
            return inner
    return checkpoint


def state_of(model: nn.Module) -> StoredState:
    """The model's own state, by reference."""
    parameters, buffers = _slots(model)
    return StoredState(
        parameters={names[0]: tensor.detach() for names, tensor, _ in parameters},
        buffers={names[0]: tensor for names, tensor, _ in buffers},
        source="the model's present weights",
    )


Slot: TypeAlias = "tuple[nn.Module, str]"
Held: TypeAlias = "tuple[list[str], torch.Tensor, list[Slot]]"


def _slots(model: nn.Module) -> tuple[list[Held], list[Held]]:
    """Every parameter and every persistent buffer: its names, the tensor, and where it is held."""
    found: tuple[dict[int, Held], dict[int, Held]] = ({}, {})
    for path, module in model.named_modules(remove_duplicate=False):
        for kind, tensors in enumerate((module._parameters, module._buffers)):
            for key, tensor in tensors.items():
                if tensor is None or (kind == 1 and key in module._non_persistent_buffers_set):
                    continue
                names, _, slots = found[kind].setdefault(id(tensor), ([], tensor, []))
                names.append(f"{path}.{key}" if path else key)
                if (module, key) not in slots:
                    slots.append((module, key))
    return list(found[0].values()), list(found[1].values())


def match_state(model: nn.Module, state: Mapping[str, Any], *, source: str = "the state dict") -> StoredState:
    """Check a state dict against a model, name by name, and bring its tensors to the model's devices and dtypes.

    Names are compared without what DDP and ``torch.compile`` put in front. Of tied parameters one name is enough.
    Non-persistent buffers stay the model's, "extra state" of modules is left out.

    Args:
        model: The (unwrapped) model.
        state: Names to tensors.
        source: What to call it in an error.

    Raises:
        CheckpointError: Missing or unexpected names, another shape, or something that is no dense tensor.
    """
    given: dict[str, Any] = {}
    for name, item in state.items():
        if not str(name).endswith(EXTRA_STATE):
            clean = clean_name(str(name))
            given[str(name) if clean in given else clean] = item
    parameters, buffers = _slots(model)
    expected = {clean_name(name) for names, _, _ in (*parameters, *buffers) for name in names}
    held = [[clean_name(name) for name in names] for names, _, _ in (*parameters, *buffers)]
    missing = [names[0] for names in held if not any(name in given for name in names)]
    unexpected = [name for name in given if name not in expected]
    if missing or unexpected:
        raise CheckpointError(
            f"{source} does not fit the model: {_listed('missing', missing)}; {_listed('unexpected', unexpected)}. "
            "Build the model that it was saved from."
        )
    dtypes: set[str] = set()
    fitted = [
        {names[0]: _fitted(tensor, [clean_name(n) for n in names], given, source, dtypes) for names, tensor, _ in kind}
        for kind in (parameters, buffers)
    ]
    return StoredState(parameters=fitted[0], buffers=fitted[1], source=source, dtypes=tuple(sorted(dtypes)))


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return f"nothing {what}"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what} ({', '.join(repr(n[:80]) for n in names[:SHOWN])}{more})"


def _fitted(
    own: torch.Tensor, names: list[str], given: Mapping[str, Any], source: str, dtypes: set[str]
) -> torch.Tensor:
    """The tensor for one of the model's, converted."""
    name, *others = [n for n in names if n in given]
    item = given[name]
    if not isinstance(item, torch.Tensor) or item.layout != torch.strided or item.is_meta or item.is_quantized:
        kind = f"{item.layout} tensor on {item.device}" if isinstance(item, torch.Tensor) else type(item).__name__
        raise CheckpointError(f"{source}: {name!r} is a {kind}, not a dense tensor with numbers in it.")
    if item.shape != own.shape:
        raise CheckpointError(
            f"{source}: {name!r} has shape {tuple(item.shape)}, the model needs {tuple(own.shape)}. Build the model "
            "that it was saved from."
        )
    if (item.is_floating_point(), item.is_complex()) != (own.is_floating_point(), own.is_complex()):
        raise CheckpointError(f"{source}: {name!r} is stored as {item.dtype}, the model needs {own.dtype}.")
    for other in others:
        if not isinstance(given[other], torch.Tensor) or not torch.equal(given[other], item):
            raise CheckpointError(
                f"{source}: {name!r} and {other!r} are one tensor in the model, and differ here: it was saved from a "
                "model that does not tie them."
            )
    if item.dtype != own.dtype:
        dtypes.add(str(item.dtype).removeprefix("torch."))
    moved = item.detach().to(device=own.device, dtype=own.dtype)
    return moved.clone() if moved.is_inference() else moved


@contextmanager
def lent_buffers(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let the model run with other persistent buffers, by the model's names; its own are put back afterwards."""
    found = [(module, key, tensors[names[0]]) for names, _, slots in _slots(model)[1] for module, key in slots]
    before = [module._buffers[key] for module, key, _ in found]
    try:
        for module, key, tensor in found:
            module._buffers[key] = tensor
        yield
    finally:
        for (module, key, _), own in zip(found, before, strict=True):
            module._buffers[key] = own


@contextmanager
def lent(model: nn.Module, state: StoredState, *, trainable: Collection[str] = ()) -> Iterator[None]:
    """Let the model run with other weights and buffers; its own are put back afterwards, also after an exception.

    Nothing is copied into the model's tensors: others stand in their place.

    Args:
        model: The (unwrapped) model that `state` was matched with.
        state: From :func:`match_state` or :func:`state_of`.
        trainable: Names of parameters that require a gradient meanwhile although the model's own do not.
    """
    pairs: list[tuple[Slot, torch.Tensor]] = []
    with torch.inference_mode(mode=False):
        for names, own, slots in _slots(model)[0]:
            wanted = own.requires_grad or names[0] in trainable
            stand_in = nn.Parameter(state.parameters[names[0]], requires_grad=wanted)
            pairs += [(slot, stand_in) for slot in slots]
    with swapped([slot for slot, _ in pairs], [tensor for _, tensor in pairs]), lent_buffers(model, state.buffers):
        yield

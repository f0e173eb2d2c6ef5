"""Where a fault can sit: the layers of a workload's model, in the order of the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

Named = tuple[str, nn.Module]
WEIGHTED = (nn.Linear, nn.Conv2d, nn.GRU, nn.Embedding)


def hidden(model: nn.Module) -> list[Named]:
    """Modules with weights, the output layer left out."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, WEIGHTED)]
    return found[:-1]


def spine(model: nn.Module) -> list[Named]:
    """Modules below the output layer through whose outputs everything passes: all before one lies below it."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Module):
        return hidden(model)
    return [*hidden(model)[:1], *((f"blocks.{name}", block) for name, block in blocks.named_children())]


def head(model: nn.Module) -> Named:
    """The output layer."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def parameters_of(layers: Iterable[Named]) -> list[str]:
    """Names of all parameters of the layers."""
    return [f"{name}.{own}" for name, module in layers for own, _ in module.named_parameters()]


def below(model: nn.Module, index: int) -> list[str]:
    """Names of the parameters that reach the output only through the spine's module `index`, its own included."""
    upper = [name for name, _ in spine(model)[index + 1 :]] + [head(model)[0]]
    above = [name for name, _ in model.named_parameters() if name.startswith(tuple(f"{u}." for u in upper))]
    above += [name for name, _ in model.named_parameters() if name.startswith("norm.")]
    if index == 0:
        above.append("position")  # added to the first module's output
    return [name for name, _ in model.named_parameters() if name not in set(above)]


def weights(module: nn.Module) -> list[nn.Parameter]:
    """Parameters with two or more axes."""
    return [p for p in module.parameters() if p.ndim > 1]


def on_output(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace what a module returns; of a tuple (GRU), its first entry."""

    def hook(_module: nn.Module, _inputs: object, out: object) -> object:
        if isinstance(out, tuple):
            return (change(out[0]), *out[1:])
        assert isinstance(out, torch.Tensor)
        return change(out)

    module.register_forward_hook(hook)

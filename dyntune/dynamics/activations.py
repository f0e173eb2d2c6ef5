r"""How large the outputs of layers are: the logarithm of their root mean square, by layer.

A signal that vanishes or explodes on its way through a network does so layer by layer, and shows as a slope of
:math:`\log \mathrm{RMS}(h_l)` over depth long before anything is not finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dyntune.dynamics.operations import OperationReader

__all__ = ["ActivationReader"]

# What these return says nothing that their input did not.
_PASSING_ON = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
# Where torch keeps what computes a parametrised weight: its outputs are weights.
_PARAMETRIZATIONS = "parametrizations"


class ActivationReader(OperationReader):
    """Root mean square of what every layer returns, from calls of its ``forward``.

    A layer is a module without children or with parameters of its own (``nn.MultiheadAttention``), dropout, identities
    and reshaping left out. Of several outputs the first counts; calls of a shared module count together. A layer that
    is not called in a pass, because its parent uses only its weights, is absent.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._norms: dict[str, list[torch.Tensor]] = {}
        self._entries: dict[str, int] = {}
        self._wrapped = False

    def wants(self, name: str, func: Any) -> bool:  # noqa: ARG002 - the reader's interface
        """See :class:`OperationReader`."""
        return False

    def begin(self, batch: Any) -> None:  # noqa: ARG002 - the reader's interface
        """See :class:`OperationReader`."""
        if not self._wrapped:
            self._wrapped = True
            for name, module in layers(self._model):
                self._wrap(name, module)

    def read(self) -> dict[str, float]:
        """Natural logarithm of the RMS by layer, in the order of first calls; -inf for all zeros; one device sync."""
        if not self._norms:
            return {}
        device = next(iter(self._norms.values()))[0].device  # a model's layers may lie on several
        sums = torch.stack([sum_of_squares(norms).to(device) for norms in self._norms.values()])
        counts = torch.tensor(list(self._entries.values()), dtype=sums.dtype)
        values = ((sums.cpu() / counts).log() / 2).tolist()
        return dict(zip(self._norms, values, strict=True))

    def _wrap(self, name: str, module: nn.Module) -> None:
        """Let a module's forward report what came out; attributes are put back after the passes."""
        forward = module.forward

        def reporting(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            self._note(name, first_tensor(result))
            return result

        vars(module)["forward"] = reporting

    def _note(self, name: str, output: torch.Tensor | None) -> None:
        if output is None or not output.is_floating_point() or output.layout != torch.strided or output.is_nested:
            return
        if not output.numel():
            return
        # In float64 no square of a float32 overflows or vanishes, which is what is looked for here.
        exact = torch.float32 if output.device.type == "mps" else torch.float64
        self._norms.setdefault(name, []).append(torch.linalg.vector_norm(output.detach(), dtype=exact))
        self._entries[name] = self._entries.get(name, 0) + output.numel()


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules that count as layers; see :class:`ActivationReader`."""
    for name, module in model.named_modules():
        below = [child for child, _ in module.named_children() if child != _PARAMETRIZATIONS]
        own = next(module.parameters(recurse=False), None) is not None
        inside = _PARAMETRIZATIONS in name.split(".")
        if (own or not below) and not inside and not isinstance(module, _PASSING_ON):
            yield name, module


def sum_of_squares(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of all entries together, from the norms of parts."""
    return norms[0].square() if len(norms) == 1 else torch.stack(tuple(norms)).square().sum()


def first_tensor(output: Any) -> torch.Tensor | None:
    """The first tensor of what a module returned; None where there is none."""
    if isinstance(output, torch.Tensor):
        return output
    items: Sequence[Any] = ()
    if isinstance(output, Mapping):
        items = tuple(output.values())
    elif isinstance(output, (list, tuple)):
        items = output
    return next((found for item in items if (found := first_tensor(item)) is not None), None)

"""Which of a model's modules is running: read off the call stack, so that no hook has to be attached."""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn

__all__ = ["RunningModules"]


class RunningModules:
    """Names the innermost module of a model whose code is on the call stack.

    A frame counts where its first argument is one of the modules: methods of theirs, and functions that are handed the
    module, as the attention functions of transformers are. Forward hooks would be seen by other threads, change which
    kernels torch's own layers choose, and have to be taken off again.

    Args:
        model: The model.

    Example:
        >>> class Asking(nn.Module):
        ...     def forward(self, ask):
        ...         return ask()
        >>> model = nn.ModuleDict({"inner": Asking()})
        >>> model["inner"](RunningModules(model).innermost)
        ('inner', Asking())
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(m): name for name, m in model.named_modules()}

    def innermost(self) -> tuple[str, nn.Module | None]:
        """Qualified name and module; ``("", None)`` where none is running."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_argcount:
                first = frame.f_locals.get(code.co_varnames[0])
                if isinstance(first, nn.Module) and id(first) in self._names:
                    return self._names[id(first)], first
            frame = frame.f_back
        return "", None

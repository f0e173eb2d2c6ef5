"""Forward passes as training makes them, for what is read off on the way: no loss, no gradient, no trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.numerics.random import stream_seed
from dyntune.objective.batches import freeze_batches, num_rows
from dyntune.objective.context import unwrap
from dyntune.objective.dtensor import is_distributed_tensor
from dyntune.objective.losses import LossFunction, check_callable, forward
from dyntune.objective.memory import enough_memory
from dyntune.objective.probe import stand_ins
from dyntune.objective.state import own_generators, preserved_state, seed_all

__all__ = ["ForwardPasses"]

Reading: TypeAlias = AbstractContextManager[Any]


class ForwardPasses:
    """A model's forward passes over frozen batches: in its present mode and dtypes, by the kernels that it trains with.

    Args:
        model: The model; wrappers of ``torch.compile`` and DDP are looked through.
        batches: See :mod:`dyntune.objective.batches`.
        loss_fn: ``(model, batch) -> anything``, where the model's inputs are not the batch itself, the batch without
            its second of two elements (the targets), or the keywords in a mapping.
        num_batches: How many batches to draw from a loader.
        autocast: Dtype of mixed precision; None for none.
        seed: Seed of dropout and other randomness in the forward pass.
        check_writes: Whether to make the first pass on copies of the parameters, to find out whether it writes to them.

    Raises:
        InvalidArgumentError: A sharded model, one without parameters, or a forward pass that writes to a parameter.
        BatchError: See :func:`freeze_batches`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        loss_fn: LossFunction | None = None,
        *,
        num_batches: int | Literal["all"] = 16,
        autocast: torch.dtype | None = None,
        seed: int = 0,
        check_writes: bool = True,
    ) -> None:
        check_callable(loss_fn, "loss_fn", "(model, batch)")
        self.model = unwrap(model)
        self._loss_fn, self._autocast, self.seed = loss_fn, autocast, seed
        self._check_writes = check_writes
        first = next(self.model.parameters(), None)
        if first is None:
            raise InvalidArgumentError("the model has no parameters: there is nothing that training could change.")
        sharded = [name for name, p in self.model.named_parameters() if is_distributed_tensor(p)]
        if sharded:
            raise InvalidArgumentError(
                f"parameter {sharded[0]!r} ({len(sharded)} in all) is sharded over processes: a pass of ours would "
                "gather it on every one. Measure an unsharded copy of the model."
            )
        self.device = first.device
        with torch.inference_mode(mode=False):
            self.batches = freeze_batches(batches, num_batches=num_batches, device=self.device)
        self._generators = own_generators(self.model)

    @property
    def num_rows(self) -> int:
        """Rows in all batches together."""
        return sum(num_rows(batch) for batch in self.batches)

    @property
    def mode(self) -> str:
        """``train`` or ``eval``."""
        return "train" if self.model.training else "eval"

    def run(self, take: Callable[[int, Any], None] | None = None, *, reading: Reading | None = None) -> None:
        """Run the model once per batch; everything of the user's is put back at the end.

        Args:
            take: Called after each pass with the batch's index and what the model (or `loss_fn`) returned.
            reading: Entered around each pass alone.
        """
        with ExitStack() as stack:
            stack.enter_context(enough_memory("a forward pass"))
            buffers = stack.enter_context(preserved_state(self.model, others=self._loss_fn is not None))
            stack.enter_context(_plain(self.device, self._autocast))
            for index, batch in enumerate(self.batches):
                buffers.renew()
                seed_all(stream_seed(self.seed, index), self._generators)
                # A pass that writes to a parameter is found out at the first batch, on copies.
                copies = stand_ins(self.model) if index == 0 and self._check_writes else nullcontext()
                with copies, reading or nullcontext():
                    output = self._output(batch)
                if take is not None:
                    take(index, output)

    def _output(self, batch: Any) -> Any:
        if self._loss_fn is not None:
            return self._loss_fn(self.model, batch)
        pair = isinstance(batch, (list, tuple)) and len(batch) == 2 and not isinstance(batch, Mapping)
        return forward(self.model, batch[0] if pair else batch)


@contextmanager
def _plain(device: torch.device, autocast: torch.dtype | None) -> Iterator[None]:
    """No gradients, compiled code eager, and the encoder layers' fast path off: it is one opaque kernel."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, dtype=autocast, enabled=autocast is not None))
        stack.enter_context(_slow_path())
        if "torch._dynamo" in sys.modules:  # otherwise nothing was compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _slow_path() -> Iterator[None]:
    """``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` by the operations that they consist of."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)

"""What a forward pass tells about the inside of a network, in columns: :class:`InsideProbe`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from dyntune.dynamics.activations import ActivationReader
from dyntune.dynamics.alignment import AlignmentReader
from dyntune.dynamics.attention import AttentionReader
from dyntune.dynamics.logits import LogitTally, OutputLogits
from dyntune.dynamics.operations import OperationReader, Operations
from dyntune.dynamics.units import UnitReader
from dyntune.errors import AmbiguousLossError, InvalidArgumentError
from dyntune.monitor.run import COMPANIONS
from dyntune.objective.batches import tensors_of
from dyntune.objective.context import unwrap
from dyntune.objective.losses import Criterion, LossFunction, check_callable, forward, split_targets, tensor_output
from dyntune.objective.losses import torch_loss as name_of_torch_loss
from dyntune.objective.passes import ForwardPasses
from dyntune.records import Estimate

__all__ = ["EVERY_PASS", "InsideProbe", "InsideQuantity"]

InsideQuantity: TypeAlias = Literal["attention", "heads", "units", "logits", "activations", "alignment"]
Values: TypeAlias = dict[str, "float | Estimate | None"]

# What costs little beside the pass itself; heads are many columns, alignment is many products.
EVERY_PASS: tuple[InsideQuantity, ...] = ("attention", "units", "logits", "activations")
# Torch's losses, without underscores, whose input is logits over classes (or their logarithmic softmax).
_OF_LOGITS = ("crossentropyloss", "crossentropy", "nllloss", "nllloss2d")


class InsideProbe:
    """Attention, units, layers and output logits off one forward pass, made as the loss makes it.

    The model runs in its present mode, without gradients and by the kernels that it trains with. No hook is attached;
    parameters, buffers, gradients, random states and modes are the same bits afterwards. Compiled code runs eagerly.

    Args:
        model: The model; wrappers of ``torch.compile`` and DDP are looked through.
        loss_fn: See :func:`dyntune.hessian`. It is called as it is, without gradients: one that takes gradients itself
            needs ``torch.enable_grad()`` in it.
        criterion: See there; only the model is run.
        autocast: Dtype of mixed precision, as in training; None for none.
        seed: Of dropout, the same masks at every call, and of the search for singular directions.

    Attributes:
        blind: Why a signal could not be had when it was last wanted, by signal. What a network does not have (attention
            in an MLP) is not in it.

    Raises:
        InvalidArgumentError: Both `loss_fn` and `criterion`, or one is not callable.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> with torch.no_grad():
        ...     _ = model[0].bias.copy_(torch.tensor([9.0, 9.0, 9.0, -9.0]))
        >>> probe = InsideProbe(model, criterion=nn.CrossEntropyLoss())
        >>> found = probe.values((torch.rand(8, 2), torch.zeros(8, dtype=torch.long)))
        >>> found["units/dead/1"], found["logits/log_z"].unit, "attention/max_logit" in found, probe.blind
        (0.25, 'nats', False, {})
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None = None,
        criterion: Criterion | None = None,
        *,
        autocast: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        if loss_fn is not None and criterion is not None:
            raise InvalidArgumentError("both loss_fn and criterion were given: which one is minimised? Pass one.")
        check_callable(loss_fn, "loss_fn", "(model, batch)")
        check_callable(criterion, "criterion", "(outputs, targets)")
        if loss_fn is not None and name_of_torch_loss(loss_fn) is not None:
            loss_fn, criterion = None, loss_fn
        self.blind: dict[str, str] = {}
        self._model, self._loss_fn, self._criterion = unwrap(model), loss_fn, criterion
        self._autocast, self._seed = autocast, seed
        self._first: OutputLogits | None = None
        self._checked = False

    def values(self, batch: Any, quantities: Sequence[InsideQuantity] = EVERY_PASS) -> Values:
        """Measure on a batch, in one forward pass.

        Args:
            batch: As the loss takes it. Drift of the logits is taken row by row where it is the batch of the first
                call, else between two samples.
            quantities: Any of ``"attention"``, ``"heads"`` (attention with a column per head), ``"units"``,
                ``"logits"``, ``"activations"`` and ``"alignment"``.

        Returns:
            By column; see :doc:`/concepts/inside-the-network`. What is not in the network has no columns.

        Raises:
            InvalidArgumentError: An unknown quantity.
            BatchError: See the batch grammar.
            InsufficientMemoryError: The pass does not fit.
            Exception: Whatever the model or `loss_fn` raises.

        Cost:
            One forward pass and a few passes over attention logits, activations and output logits, in
            ``benchmarks/inside.py``; copies of the parameters at the first call, to see that the pass writes to none.
            A few device synchronisations at the end.
        """
        wanted = tuple(dict.fromkeys([quantities] if isinstance(quantities, str) else quantities))
        if not wanted or not set(wanted) <= set(get_args(InsideQuantity)):
            raise InvalidArgumentError(f"quantities={quantities!r}: choose from {', '.join(get_args(InsideQuantity))}.")
        signals = ["attention" if quantity == "heads" else quantity for quantity in wanted]
        for signal in (*signals, *(["logits/log_z_drift"] if "logits" in signals else [])):
            self.blind.pop(signal, None)
        readers = {signal: self._reader(signal) for signal in signals}
        try:
            passes = ForwardPasses(
                self._model,
                batch,
                self._loss_fn if self._criterion is None else self._inputs_only,
                autocast=self._autocast,
                seed=self._seed,
                check_writes=not self._checked,
            )
            watched = Operations(tuple(readers.values()), passes.batches, tolerant=True)
            passes.run(reading=watched)
        except InvalidArgumentError as error:  # a sharded model, or a pass that writes to a parameter
            self.blind |= dict.fromkeys(signals, str(error))
            return {}
        self._checked = True
        self.blind |= {signal: watched.unreadable[r] for signal, r in readers.items() if r in watched.unreadable}
        found: Values = {}
        for signal, reader in readers.items():
            if signal not in self.blind:
                self._fill(found, reader, passes, heads="heads" in wanted)
        return found

    def _reader(self, signal: str) -> OperationReader:
        if signal == "attention":
            return AttentionReader(self._model)
        if signal == "units":
            return UnitReader(self._model)
        if signal == "activations":
            return ActivationReader(self._model)
        if signal == "alignment":
            return AlignmentReader(self._model, seed=self._seed)
        return _Outputs(self._model)

    @staticmethod
    def _inputs_only(model: nn.Module, batch: Any) -> Any:
        """What a criterion is given; its value is of no use here."""
        return forward(model, split_targets(batch)[0])

    def _fill(self, found: Values, reader: OperationReader, passes: ForwardPasses, *, heads: bool) -> None:
        if isinstance(reader, AttentionReader):
            self._attention(found, reader, heads=heads)
        elif isinstance(reader, UnitReader):
            self._units(found, reader)
        elif isinstance(reader, ActivationReader):
            for name, value in reader.read().items():
                _put(found, "activation/log_rms", name, value)
        elif isinstance(reader, AlignmentReader):
            layers = reader.read()
            for name, layer in layers.items():
                _put(found, "alignment", name, layer.same_sign)
            if not layers:
                self.blind["alignment"] = (
                    "no product of activations with a weight matrix was seen: convolutions, embeddings and recurrent "
                    "kernels have no spectral alignment here"
                )
        elif isinstance(reader, _Outputs):
            self._logits(found, reader, passes.batches)

    def _attention(self, found: Values, reader: AttentionReader, *, heads: bool) -> None:
        modules = reader.read()
        if not modules:
            kinds = (type(module).__name__ for module in self._model.modules())
            if (kind := next((kind for kind in kinds if "attention" in kind.lower()), None)) is not None:
                self.blind["attention"] = (
                    f"the model has a {kind}, but neither scaled_dot_product_attention nor a softmax over a batched "
                    "product of queries and keys was seen"
                )
            return
        found["attention/max_logit"] = modules.max_logit
        found["attention/entropy_min"] = _extreme(min, (h for m in modules.values() for h in m.relative_entropy))
        for name, module in modules.items():
            _put(found, "attention/max_logit", name, _extreme(max, module.max_logit))
            _put(found, "attention/entropy", name, sum(module.relative_entropy) / module.heads)
        if heads:
            for name, module in modules.items():
                for head, value in enumerate(module.relative_entropy):
                    _put(found, "attention/entropy", f"{name or _ROOT}/{head}", value)

    def _units(self, found: Values, reader: UnitReader) -> None:
        layers = reader.read()
        dead = {name: layer.dead for name, layer in layers.items() if layer.dead is not None}
        if dead:
            found["units/dead_max"] = _extreme(max, dead.values())
        for name, share in dead.items():
            _put(found, "units/dead", name, share)
        for name, layer in layers.items():
            if layer.saturated is not None:
                _put(found, "units/saturated", name, layer.saturated)
        if not layers and any(isinstance(module, nn.RNNBase) for module in self._model.modules()):
            self.blind["units"] = "recurrent layers apply their activations inside of one kernel"

    def _logits(self, found: Values, outputs: _Outputs, batches: tuple[Any, ...]) -> None:
        try:
            logits = self._output_logits(outputs, batches)
        except (AmbiguousLossError, InvalidArgumentError) as error:
            self.blind["logits"] = str(error)
            return
        found["logits/max_abs"] = logits.max_abs_logit
        found["logits/log_z"] = logits.log_z
        found["logits/entropy"] = logits.entropy
        if self._first is None:
            self._first = logits if logits.log_z.status.usable else None
            return
        try:
            found["logits/log_z_drift"] = logits.drift(self._first)["log_z"]
        except InvalidArgumentError as error:
            self.blind["logits/log_z_drift"] = str(error)

    def _output_logits(self, outputs: _Outputs, batches: tuple[Any, ...]) -> OutputLogits:
        """The record; AmbiguousLossError where it is not known what the logits are."""
        tally: LogitTally | None = None
        for batch, calls in zip(batches, outputs.calls, strict=True):
            if len(calls) != 1:
                raise AmbiguousLossError(
                    f"loss_fn calls the model {len(calls)} times for a batch: which output the logits are is not known"
                )
            output, version = calls[0]
            logits = tensor_output(output)
            if version is not None and logits._version != version:
                raise AmbiguousLossError("loss_fn writes to the model's output in place: what it was is not known")
            self._check_logits(logits is not output, batch)
            tally = LogitTally(self._class_dim(logits, batch)) if tally is None else tally
            tally.update(batch, logits)
        assert tally is not None  # freeze_batches refuses to find none
        return tally.read(batches)

    def _check_logits(self, named: bool, batch: Any) -> None:
        """Whether outputs are logits over classes: by the loss, else by the output's name, else by integer targets."""
        known = name_of_torch_loss(self._criterion)
        if known is not None:
            if known.lower().replace("_", "") not in _OF_LOGITS:
                raise AmbiguousLossError(f"{known} is not a loss of logits over classes: there is no log Z")
        elif not named and not any(_is_integer(t) for t in tensors_of(batch)):
            raise AmbiguousLossError(
                "the batch holds no integer targets: whether the model's outputs are logits over classes is not known"
            )

    def _class_dim(self, logits: torch.Tensor, batch: Any) -> int | None:
        """Where the classes are: for torch's cross-entropy behind the rows, else by the shape of integer targets."""
        if name_of_torch_loss(self._criterion) is not None:
            return 1 if logits.dim() > 1 else None
        shapes = {tuple(t.shape) for t in tensors_of(batch) if _is_integer(t)}
        second = logits.dim() > 1 and tuple(logits.shape[:1] + logits.shape[2:]) in shapes
        last = tuple(logits.shape[:-1]) in shapes
        return None if second == last else (1 if second else -1)


_ROOT = "(model)"


class _Outputs(OperationReader):
    """What each call of the model in a pass returned, with the version of its logits at that moment.

    A loss function returns a loss, so the model's output is taken where it is made.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.calls: list[list[tuple[Any, int | None]]] = []

    def wants(self, name: str, func: Any) -> bool:  # noqa: ARG002 - the reader's interface
        return False

    def begin(self, batch: Any) -> None:  # noqa: ARG002 - the reader's interface
        if not self.calls:
            self._wrap()
        self.calls.append([])

    def _wrap(self) -> None:
        """Let the model's forward report what came out; attributes are put back after the passes."""
        run = self._model.forward

        def reporting(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)
            try:
                version = tensor_output(result)._version
            except AmbiguousLossError:
                version = None
            self.calls[-1].append((result, version))
            return result

        vars(self._model)["forward"] = reporting


def _is_integer(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool


def _extreme(which: Any, values: Iterable[float]) -> float:
    """The largest or smallest; NaN where one is."""
    every = list(values)
    return math.nan if any(math.isnan(x) for x in every) else float(which(every))


def _put(found: Values, prefix: str, layer: str, value: float | Estimate | None) -> None:
    """Add a column. Layers may be called anything, also what the end of another column's interval is called."""
    name = f"{prefix}/{layer or _ROOT}"
    if name.endswith(COMPANIONS):
        name += "#1"
    while name in found:
        name += "'"
    found[name] = value

"""Leaving no trace: what a measurement borrows from the user's program and how it is put back.

Nothing here copies parameters: they are never written to. Gradients are set aside by reference, buffers are replaced
by clones while a measurement runs, random states are saved and restored.
"""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from dyntune.objective.dtensor import local

__all__ = [
    "BorrowedBuffers",
    "Generator",
    "cuda_ready",
    "generator_state",
    "own_generators",
    "parameter_slots",
    "preserved_rng",
    "preserved_state",
    "same_bits",
    "seed_all",
    "set_generator_state",
    "swapped",
    "undone",
]

# Random sources that a module may hold: those of torch, NumPy (both kinds) and Python.
Generator: TypeAlias = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


@contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Run `undo` at the end, and once more: an exception in the middle of putting things back comes out after that.

    Ctrl-C can arrive there, too, and what is put back goes through torch, where a mode of the user's may raise.

    Args:
        undo: Puts one kind of thing back; does no harm when it is repeated.
    """
    try:
        yield
    finally:
        try:
            undo()
        finally:
            undo()


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Save and restore the global random states of Python, NumPy and torch (all initialised CUDA devices)."""
    python_state, numpy_state, cpu_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if cuda_ready() else []

    def undo() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)

    with undone(undo):
        yield


def cuda_ready() -> bool:
    """Whether CUDA has a random state: where it is not initialised it has none, and asking would initialise it."""
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def own_generators(model: nn.Module) -> list[Generator]:
    """The generators that the model's modules hold as attributes, each once."""
    found = {id(item): item for m in model.modules() for item in _held_generators(m)}
    return list(found.values())


def _held_generators(module: nn.Module) -> list[Generator]:
    return [item for item in vars(module).values() if isinstance(item, Generator)]


def generator_state(generator: Generator) -> Any:
    """The present state; nothing is drawn."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state()


def set_generator_state(generator: Generator, state: Any) -> None:
    """Put back what :func:`generator_state` returned."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _seed(generator: Generator, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        kind: Any = type(generator.bit_generator)
        generator.bit_generator.state = kind(seed).state
    else:
        generator.seed(seed % 2**32)  # the range of RandomState


def seed_all(seed: int, own: Iterable[Generator] = ()) -> None:
    """Seed every global generator, and the model's `own`; only inside :func:`preserved_state`.

    The generators are seeded one by one because ``torch.manual_seed`` would also leave a pending seed on a CUDA that
    the user initialises later.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if cuda_ready():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)
    for held in own:
        _seed(held, seed)


class BorrowedBuffers:
    """Clones that stand in for the model's buffers, renewed before every forward pass that follows a write.

    BatchNorm and spectral normalisation write to their buffers in the forward pass. With clones in their place the
    user's tensors keep even their version counters, so a graph that the user holds stays valid.

    Args:
        model: The model.
        dtype: The dtype of a clone by that of its buffer.
    """

    def __init__(self, model: nn.Module, dtype: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype) -> None:
        self._dtype = dtype
        self._slots = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
        self._clones: dict[int, tuple[torch.Tensor, int]] = {}
        self.others = 0  # modules that are none of the model's

    def include(self, module: nn.Module) -> None:
        """Lend this module's own buffers, too, from now on."""
        self.others += 1
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                self._slots.append((module, name, buffer))
                module._buffers[name] = buffer.detach().clone()

    def renew(self) -> None:
        """Put clones with the original values in place; masks and counters that nothing wrote to are used again.

        Floating-point buffers are always cloned anew: a codebook may be written to through ``.data``, which leaves no
        trace in the version counter.
        """
        fresh: dict[int, torch.Tensor] = {}
        for module, name, original in self._slots:
            clone, version = self._clones.get(id(original), (None, -1))
            if id(original) in fresh:
                clone = fresh[id(original)]
            elif clone is None or clone._version != version or original.is_floating_point():
                clone = original.detach().to(self._dtype(original.dtype), copy=True)
                self._clones[id(original)] = (clone, clone._version)
            fresh[id(original)] = clone
            module._buffers[name] = clone


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal as memory is: NaN equals itself here, and 0.0 does not equal -0.0."""
    a, b = local(a.detach()), local(b.detach())
    if a.device != b.device or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b)))


def parameter_slots(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[list[tuple[nn.Module, str]]]:
    """For each parameter, every (module, attribute) that holds it: more than one where weights are tied."""
    slots: dict[int, list[tuple[nn.Module, str]]] = {id(p): [] for p in parameters}
    for module in model.modules():
        for name, held in module._parameters.items():
            if id(held) in slots:
                slots[id(held)].append((module, name))
    return list(slots.values())


@contextmanager
def swapped(slots: Sequence[tuple[nn.Module, str]], tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let `tensors` stand in for the parameters in `slots`, one each, as ``torch.func.functional_call`` does.

    Unlike there the scope is the caller's: a backward pass that recomputes activations (checkpointing) needs the same
    tensors as the forward pass had.
    """
    before = [module._parameters[name] for module, name in slots]
    try:
        for (module, name), tensor in zip(slots, tensors, strict=True):
            module._parameters[name] = tensor  # type: ignore[assignment]
        yield
    finally:
        for (module, name), parameter in zip(slots, before, strict=True):
            module._parameters[name] = parameter


class _Attributes:
    """What a module's own ``__dict__``, parameters and buffers held: references, no copies.

    A forward pass may put tensors there that carry a graph of ours: an auxiliary loss, the weight of an old-style
    ``spectral_norm``, the flat weights of an LSTM whose parameters were swapped.
    """

    def __init__(self, module: nn.Module) -> None:
        owned = vars(module)
        self._saved = [(held, dict(held)) for held in (owned, module._parameters, module._buffers)]

    def restore(self) -> None:
        for held, before in self._saved:
            for name in held.keys() - before.keys():
                del held[name]
            for name, item in before.items():
                if name not in held or held[name] is not item:
                    held[name] = item


@contextmanager
def preserved_state(
    model: nn.Module, dtype: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype, *, others: bool = False
) -> Iterator[BorrowedBuffers]:
    """Set gradients aside, lend clones of the buffers, and put everything back afterwards, also after an exception.

    Gradients are replaced by None meanwhile, so that a loss function which calls ``backward()`` itself accumulates
    into tensors that are thrown away. Modes are put back with the other attributes of the modules.

    Args:
        model: The model.
        dtype: See :class:`BorrowedBuffers`.
        others: Whether modules outside of the model may run, such as the other network in the loss of a GAN: each is
            then treated like the model's own from its first call on. It takes a global hook, which slows every module.
    """
    attributes = [_Attributes(m) for m in model.modules()]
    parameters = list(model.parameters())
    flags = [p.requires_grad for p in parameters]
    gradients = [p.grad for p in parameters]
    generators = [(g, generator_state(g)) for g in own_generators(model)]
    mode = torch.is_grad_enabled()

    def undo_gradients() -> None:
        for p, flag, gradient in zip(parameters, flags, gradients, strict=True):
            if p.requires_grad != flag:
                p.requires_grad_(flag)
            p.grad = gradient

    def undo_attributes() -> None:
        for saved in attributes:
            saved.restore()

    def undo_generators() -> None:
        for generator, state in generators:
            set_generator_state(generator, state)

    def undo_mode() -> None:
        torch.set_grad_enabled(mode)

    # Each by itself: what cannot be put back does not keep the others from it.
    with (
        preserved_rng(),
        undone(undo_mode),
        undone(undo_generators),
        undone(undo_attributes),
        undone(undo_gradients),
        ExitStack() as stack,
    ):
        for p in parameters:
            p.grad = None
        buffers = BorrowedBuffers(model, dtype)
        buffers.renew()
        if others:
            known, thread = {id(m) for m in model.modules()}, threading.get_ident()

            def take_in(module: nn.Module, _args: Any) -> None:
                if threading.get_ident() == thread and id(module) not in known:
                    known.add(id(module))
                    attributes.append(_Attributes(module))
                    generators.extend((g, generator_state(g)) for g in _held_generators(module))
                    buffers.include(module)

            hook = nn.modules.module.register_module_forward_pre_hook(take_in)
            stack.callback(hook.remove)
            # torch warns of hooks that fire once more for a compiled model, which does no harm here.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
        yield buffers

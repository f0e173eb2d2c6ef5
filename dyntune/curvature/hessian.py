"""The Hessian of a loss as an operator: :func:`hessian` and :func:`hessian_eigenvalues`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from dyntune.curvature.eigenvalues import FAILURE_PROBABILITY, Eigenvalues, eigenvalues
from dyntune.errors import HVPUnsupportedError, InvalidArgumentError
from dyntune.numerics.operator import LinearOperator, Product
from dyntune.numerics.target import Which
from dyntune.objective.dtensor import local
from dyntune.objective.hvp import (
    FiniteDifference,
    Session,
    first_line,
    forward_over_reverse_session,
    is_unsupported,
    reforward_session,
    retained_graph_session,
)
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.memory import enough_memory, is_out_of_memory, let_go, refuse
from dyntune.objective.objective import Objective
from dyntune.objective.parameters import ParameterSelection
from dyntune.objective.shards import ProcessGroupLike

__all__ = ["HessianOperator", "Method", "hessian", "hessian_eigenvalues"]

Method: TypeAlias = Literal["auto", "exact", "finite-difference"]
Engine: TypeAlias = Literal["retained-graph", "re-forward", "forward-over-reverse", "finite-difference"]

# A gradient's graph keeps what the forward pass saved, what the backward pass saved, and the backward's results. Saved
# tensors of both passes were counted as 2.0 to 2.3 times those of the forward pass (CNN with BatchNorm, transformer,
# MLP; torch 2.13, CPU); one more for the product's own temporaries.
GRAPH_PER_FORWARD_BYTES = 3.0
# Graphs may take this share of the memory that is free when the operator is made.
FREE_MEMORY_SHARE = 0.5
# An exact product may differ from finite differences by this multiple of their own estimate of their error (which is an
# upper one for smooth losses), and by their rounding; `tests/objective/test_custom_functions.py` has both sides.
VERIFY_FACTOR = 5.0
VERIFY_FLOOR = 1e-3
_VERIFY_STREAM = 0x7E57
# From the fastest to the lightest.
_BY_MEMORY: tuple[Engine, ...] = ("retained-graph", "re-forward", "forward-over-reverse", "finite-difference")
_MORE_MEMORY = {
    "retained-graph": "",
    "re-forward": "",
    "forward-over-reverse": ", or raise memory_limit: the other engines need no forward-mode derivative",
}


class HessianOperator(LinearOperator):
    """Hessian of an :class:`Objective`; holds no graph outside a session.

    Args:
        objective: The loss.
        method: ``"auto"``, ``"exact"`` or ``"finite-difference"``.
        memory_limit: Bytes that graphs may take; default half of what is free.

    The attributes ``engine`` and ``reason`` say how products are made and why.
    """

    def __init__(self, objective: Objective, *, method: Method = "auto", memory_limit: int | None = None) -> None:
        if method not in get_args(Method):
            raise InvalidArgumentError(f"method={method!r}; choose one of {', '.join(get_args(Method))}.")
        super().__init__(objective.space)
        self.objective = objective
        self.requested: Method = method
        self._differences = FiniteDifference()
        layout = objective.layout
        self._verified = not layout.worst([float(bool(objective.suspects))])[0]
        engine, self.reason = _choose_engine(objective, method, memory_limit)
        # Processes with less memory, or larger batches, decide for all.
        self.engine: Engine = _BY_MEMORY[int(layout.worst([float(_BY_MEMORY.index(engine))])[0])]
        if self.engine != engine:
            self.reason = "another process needs it"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in the order of the vectors."""
        return tuple(self.objective.parameters)

    @property
    def method(self) -> str:
        """How products are made; with finite differences, with the largest relative error met so far."""
        parts: list[str] = ["exact", self.engine] if self.engine != "finite-difference" else [self.engine]
        if self.engine == "finite-difference" and self._differences.worst_error is not None:
            parts.append(f"estimated relative error {self._differences.worst_error:.1e}")
        if self.objective.precision:
            parts.append(self.objective.precision.note)
        if self.objective.layout.team is not None:
            parts.append(f"{self.objective.layout.name} on {self.objective.layout.team.size} processes")
        return ", ".join(parts)

    @contextmanager
    def session(self) -> Iterator[Product]:
        """Open for many products at the present parameters.

        With ``method="auto"``, an operation without a second derivative makes the session (and later ones) fall back to
        finite differences; ``reason`` then names the operation. A model with operations that may be silently wrong (an
        ``autograd.Function`` written in Python, ``weight_norm``) is verified once: an exact product is compared with
        one by finite differences. Where memory runs out, a lighter engine takes over.

        Raises:
            HVPUnsupportedError: ``method="exact"`` and the model cannot be differentiated twice, or no gradient at all.
            InsufficientMemoryError: Memory ran out with the lightest engine that `method` permits.
            NondeterministicLossError: See :meth:`Objective.check_repeatable`, asked once.
            StaleOperatorError: The parameters changed while the session was open.
        """
        with ExitStack() as stack:
            self.objective.check_repeatable()
            while not self._verified and self.engine != "finite-difference":
                self._verify()
            opened = [self._open(stack)]

            def guarded(vector: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
                while True:
                    try:
                        return opened[0](vector)
                    except (RuntimeError, MemoryError) as error:
                        self._fall_back(error)  # over several processes all come here, or none
                    opened.clear()  # and with it the graph, before another one is built
                    stack.close()  # a session within a session would see buffers that the outer one has written to
                    opened.append(self._open(stack))

            yield guarded

    def _open(self, stack: ExitStack) -> Product:
        """Enter the engine's session, changing the engine if the graph cannot be built."""
        while True:
            failure: BaseException | None = None
            product: Product | None = None
            try:
                product = stack.enter_context(self._engine_session())
            except BaseException as error:
                failure = error
            failure = self.objective.layout.shared_failure(failure)
            if failure is None and product is not None:
                return self.objective.layout.across(product)
            product = None
            stack.close()
            if not isinstance(failure, (RuntimeError, MemoryError)):
                assert failure is not None
                raise failure
            self._fall_back(failure)

    def _verify(self) -> None:
        """Compare one exact product with finite differences: a backward that detaches raises no error."""
        vector = self.space.normal(_VERIFY_STREAM)
        layout, engine = self.objective.layout, self.engine
        differences = FiniteDifference()
        with ExitStack() as stack:
            product = self._open(stack)
            try:
                exact = [t.detach().clone() for t in product(vector)]
            except (RuntimeError, MemoryError) as error:
                self._fall_back(error)
        if self.engine != engine:
            return
        try:
            with enough_memory("finite differences"), differences.session(self.objective) as raw:
                estimate = list(layout.across(raw)(vector))
        except HVPUnsupportedError:  # a parameter that only the exact engines see: nothing to compare with
            self._verified = True
            return
        size, gap = self.space.norm(estimate), self.space.norm(torch._foreach_sub(exact, estimate))
        permitted = VERIFY_FLOOR + VERIFY_FACTOR * layout.worst([differences.worst_error or 0.0])[0]
        if gap > permitted * size:
            self._fall_back(
                HVPUnsupportedError(
                    f"the second derivative of {' or '.join(self.objective.suspects)} is wrong: a product is "
                    f"{gap / (size or 1.0):.1%} off finite differences, {permitted:.1%} permitted."
                )
            )
        self._verified = True

    def _engine_session(self) -> AbstractContextManager[Product]:
        if self.engine == "finite-difference":
            return self._differences.session(self.objective)
        sessions: dict[str, Session] = {
            "retained-graph": retained_graph_session,
            "re-forward": reforward_session,
            "forward-over-reverse": forward_over_reverse_session,
        }
        return sessions[self.engine](self.objective)

    def _fall_back(self, error: Exception) -> None:
        """Another engine from now on, if one is allowed and would help; re-raises otherwise."""
        if is_out_of_memory(error):
            self._lighten(error)
            return
        if not is_unsupported(error) or (self.engine == "finite-difference" and isinstance(error, HVPUnsupportedError)):
            raise error
        if self.engine == "finite-difference":
            raise HVPUnsupportedError(
                f"not even a gradient can be computed: {first_line(error)} Replace the operation."
            ) from error
        if self.requested == "exact":
            raise HVPUnsupportedError(
                f"the model cannot be differentiated twice ({self.engine}): {first_line(error)} Pass "
                "method='finite-difference' (4 gradients a product, with a reported error), or replace the "
                f"operation{_MORE_MEMORY[self.engine]}."
            ) from error
        self.engine = "finite-difference"
        self.reason = f"no second derivative: {first_line(error)}"

    def _lighten(self, error: Exception) -> None:
        """The next engine that needs less memory; raises where there is none."""
        exact = self.requested == "exact"
        lighter = [e for e in _BY_MEMORY[_BY_MEMORY.index(self.engine) + 1 :] if not exact or e != "finite-difference"]
        if not lighter:
            raise refuse(f"a product by {self.engine}", error) from error
        self.reason = f"out of memory with {self.engine}: {first_line(error)}"
        self.engine = lighter[0]
        let_go(error)

    def __repr__(self) -> str:
        return f"HessianOperator(n={self.numel}, {self.method}: {self.reason})"


def _choose_engine(objective: Objective, method: Method, memory_limit: int | None) -> tuple[Engine, str]:
    if method == "finite-difference":
        return "finite-difference", "asked for"
    if objective.layout.name == "sharded":
        return "finite-difference", "whole parameters on every process do not fit"
    if objective.layout.name == "parallel":  # forward mode is not known to work through every DTensor operation
        return "retained-graph", "tensor-parallel"
    one = GRAPH_PER_FORWARD_BYTES * objective.forward_bytes
    count = len(objective.batches)
    limit = FREE_MEMORY_SHARE * _free_memory(objective.space.device) if memory_limit is None else memory_limit
    need = f"{count} graph(s) of about {one / 2**20:.0f} MiB, {limit / 2**20:.0f} MiB allowed"
    if one * count <= limit:
        return "retained-graph", need
    if one <= limit:
        return "re-forward", need
    return "forward-over-reverse", need


def _gather_limit(model: nn.Module, method: Method, memory_limit: int | None) -> float:
    """Bytes that whole parameters of a sharded model may take on every process."""
    if method != "auto":
        return math.inf if method == "exact" else 0.0
    if memory_limit is not None:
        return float(memory_limit)
    parameter = next(model.parameters(), None)
    return math.inf if parameter is None else FREE_MEMORY_SHARE * _free_memory(local(parameter).device)


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return float(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: total memory below
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2
    return 4 * 2.0**30  # Windows without further dependencies: assume a small machine


def hessian(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    criterion: Criterion | None = None,
    params: ParameterSelection = None,
    num_batches: int | Literal["all"] = 16,
    method: Method = "auto",
    memory_limit: int | None = None,
    process_group: ProcessGroupLike = "auto",
    seed: int = 0,
) -> HessianOperator:
    """The Hessian of the loss with respect to the model's trainable parameters, as a linear operator.

    Nothing of the model changes: parameters are only read, buffers are lent clones, gradients, modes and random states
    are put back. The model is measured in its present mode; in training mode dropout's masks are fixed by `seed` and
    BatchNorm uses batch statistics.

    Args:
        model: A module. Parameters stored in bfloat16 or float16 are measured through float32 copies, which take four
            bytes each while a measurement runs, frozen ones included.
        batches: One batch (a tensor, a mapping, or a list/tuple that begins with a tensor), a list of batches, or a
            re-iterable such as a DataLoader.
        loss_fn: ``(model, batch) -> scalar mean`` or ``dyntune.Loss``; a torch loss is taken as `criterion`.
        criterion: ``(outputs, targets) -> scalar``.
        params: Glob(s) or predicate on parameter names: the block of the Hessian for these parameters.
        num_batches: How many batches to draw from a loader (``"all"`` for all of them).
        method: ``"auto"`` (exact where possible, else finite differences), ``"exact"``, ``"finite-difference"``.
        memory_limit: Bytes that autograd graphs may take; default half of the free memory.
        process_group: Over which processes of a ``torch.distributed`` job the loss is averaged. ``"auto"``: those of
            DDP, FSDP2 or tensor parallelism if the model uses one, else this process alone; None: this process alone;
            or a process group or :class:`dyntune.Team` whose processes hold copies of the model and their own batches.
            All of them have to make the same call.
        seed: Seed of dropout masks and other randomness of the forward pass.

    Returns:
        A symmetric operator of dimension n = number of selected entries; ``operator @ v`` takes and returns lists of
        tensors shaped like the parameters (or flat tensors). Unit: loss / parameter^2.

    Raises:
        DyntuneError: See ``dyntune.errors``: non-finite parameters or loss, a loss without gradient, empty batches,
            an ambiguous loss, one-shot iterators, unsupported dtypes, no trainable parameters.

    Accuracy:
        Exact up to rounding (about 1e-7 relative in float32, 1e-15 in float64), except with finite differences, whose
        estimated error is in ``operator.method``.
    Cost:
        One forward pass over the batches here, and one on the first batch before the first product; then per product
        about two gradients and no synchronisation.
    Source:
        Pearlmutter (1994), "Fast exact multiplication by the Hessian", Neural Computation 6(1).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> H = hessian(model, (x, y), criterion=torch.nn.MSELoss())
        >>> H @ torch.ones(2)
        tensor([1., 1.])
    """
    objective = Objective(
        model,
        batches,
        loss_fn,
        criterion=criterion,
        params=params,
        num_batches=num_batches,
        process_group=process_group,
        gather_limit=_gather_limit(model, method, memory_limit),
        seed=seed,
    )
    return HessianOperator(objective, method=method, memory_limit=memory_limit)


def hessian_eigenvalues(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    k: int = 1,
    criterion: Criterion | None = None,
    params: ParameterSelection = None,
    num_batches: int | Literal["all"] = 16,
    method: Method = "auto",
    memory_limit: int | None = None,
    process_group: ProcessGroupLike = "auto",
    which: Which = "largest",
    rtol: float = 1e-2,
    max_products: int | None = None,
    start: torch.Tensor | Sequence[torch.Tensor] | Eigenvalues | None = None,
    basis: int | None = None,
    failure_probability: float = FAILURE_PROBABILITY,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Eigenvalues:
    """Extreme Hessian eigenvalues in one line: :func:`hessian`, then :func:`eigenvalues`.

    Args, Returns, Raises: as those two.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batch = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))
        >>> round(float(hessian_eigenvalues(model, batch, criterion=torch.nn.MSELoss())), 4)
        4.0
    """
    operator = hessian(
        model,
        batches,
        loss_fn,
        criterion=criterion,
        params=params,
        num_batches=num_batches,
        method=method,
        memory_limit=memory_limit,
        process_group=process_group,
        seed=seed,
    )
    return eigenvalues(
        operator,
        k,
        which=which,
        rtol=rtol,
        max_products=max_products,
        start=start,
        basis=basis,
        failure_probability=failure_probability,
        seed=seed,
        progress=progress,
    )

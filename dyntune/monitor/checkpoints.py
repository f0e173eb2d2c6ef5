"""A training after the fact: :func:`trace_checkpoints` measures a series of saved weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from tqdm import tqdm

from dyntune.curvature.eigenvalues import eigenvalues
from dyntune.curvature.hessian import Method
from dyntune.curvature.sharpness import Quantity
from dyntune.errors import CheckpointError, DyntuneError, InvalidArgumentError
from dyntune.monitor.probe import Probe, check_quantities
from dyntune.monitor.run import Run
from dyntune.monitor.steps import steps_in_names
from dyntune.monitor.writer import RunWriter, provenance
from dyntune.numerics.arithmetic import plain_arithmetic
from dyntune.objective.batches import freeze_batches
from dyntune.objective.context import unwrap
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.objective import Objective
from dyntune.objective.parameters import ParameterSelection
from dyntune.objective.stored import match_state, read_checkpoint, weights_in
from dyntune.pilot.optimizers import OptimizerLike

__all__ = ["trace_checkpoints"]

Progress: TypeAlias = "Callable[[int, float], None] | None"

SHOW_AFTER = 2.0  # seconds, before which a progress bar would only flicker


def trace_checkpoints(
    model: nn.Module,
    paths: Sequence[str | os.PathLike[str]],
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    criterion: Criterion | None = None,
    quantities: Sequence[Quantity] = ("lambda_max",),
    optimizer: OptimizerLike | None = None,
    steps: Sequence[int] | None = None,
    params: ParameterSelection = None,
    num_batches: int | Literal["all"] = 16,
    method: Method = "auto",
    rtol: float = 1e-2,
    max_products: int | None = None,
    log: str | os.PathLike[str] | None = None,
    on_error: Literal["raise", "record"] = "raise",
    seed: int = 0,
    progress: Progress = None,
) -> Run:
    """Measure a series of saved checkpoints, all on the same batches, into a :class:`Run`.

    Each file is read without running any code in it (``torch.load(weights_only=True)``, or safetensors), its tensors
    stand in for the model's while it is measured, and the model's own weights, buffers and everything else are the
    same bits afterwards. No row depends on the others: measured alone, a checkpoint gives the same numbers.

    Args:
        model: The model that the checkpoints are of; its own weights do not matter. It is measured in its present
            mode, as :func:`dyntune.hessian` does.
        paths: Checkpoint files: a state dict, or one under ``"state_dict"``, ``"model"``, ``"model_state_dict"`` or
            ``"module"``, with or without what DDP and ``torch.compile`` put in front of names. Every name and shape
            has to fit. They are measured in the order of their steps.
        batches: As for :func:`dyntune.hessian`; a loader is drawn from once.
        loss_fn: See there.
        criterion: See there.
        quantities: As for :func:`dyntune.sharpness`; the loss is always measured.
        optimizer: As for :func:`dyntune.suggest_lr`. It is rebuilt for each checkpoint with the state that is saved
            there under ``"optimizer"``, ``"optimizer_state_dict"``, ``"optim"`` or ``"optimizer_states"`` (the first
            of them); what needs a state that the file does not have is refused for that file. With it come stability
            limits, as columns ``lambda_max.limit``, ``preconditioned.limit`` and ``batch.limit``.
        steps: Training step of each file. Default: from the names where they differ in one number only, or in one that
            follows the word *step*; otherwise 0, 1, 2 and so on.
        params: See :func:`dyntune.hessian`.
        num_batches: See there.
        method: See there.
        rtol: Accuracy of the eigenvalues relative to each.
        max_products: Budget of products per solve; see :func:`dyntune.eigenvalues`.
        log: A file, not there yet, to which each measurement is appended as it is made; see
            :func:`dyntune.load_run`. What was measured before an interruption is in it.
        on_error: What to do about a file that cannot be read or does not fit: ``"raise"``, or ``"record"`` it as an
            event and go on.
        seed: Seed of dropout masks and of the solver.
        progress: Called with (checkpoints so far, loss); default a progress bar on a terminal.

    Returns:
        One row per checkpoint: ``loss``, the quantities with the ends of their intervals, and the file's name as label.
        Weights or losses that are not finite are recorded as NaN with the reason, and the series goes on.

    Raises:
        CheckpointError: A file that cannot be read or does not fit the model (``partial``: the run so far).
        MissingDependencyError: A safetensors file without the package.
        RunFileError: The log exists already.
        InvalidArgumentError: No paths, steps that do not go with them, an unknown quantity, or one that needs an
            optimizer without one.
        DyntuneError: As :func:`dyntune.sharpness` (``partial``: the run so far).

    Cost:
        For each checkpoint what :func:`dyntune.sharpness` takes; memory of one checkpoint beside the model.

    Example:
        >>> import tempfile
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batch = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = [f"{folder}/step{step}.pt" for step in (10, 20)]
        ...     for path in paths:
        ...         torch.save(model.state_dict(), path)
        ...     run = trace_checkpoints(model, paths, batch, criterion=torch.nn.MSELoss())
        >>> run.steps.tolist(), run["lambda_max"].round(4).tolist()
        ([10, 20], [4.0, 4.0])
    """
    wanted = check_quantities(quantities, with_optimizer=optimizer is not None)
    if on_error not in ("raise", "record"):
        raise InvalidArgumentError(f'on_error={on_error!r}: choose "raise" or "record".')
    series, origin = _series(paths, steps)
    model = unwrap(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    device = trainable[0].device if trainable else torch.device("cpu")  # without any, the objective says so
    with plain_arithmetic(device):
        frozen = _Frozen(freeze_batches(batches, num_batches=num_batches, device=device))
    about = provenance(what="trace_checkpoints", seed=seed, steps=origin, quantities=list(wanted), rtol=rtol)
    probe = Probe(
        model,
        lambda: Objective(model, frozen, loss_fn, criterion=criterion, params=params, num_batches="all", seed=seed),
        wanted=wanted,
        optimizer=optimizer,
        method=method,
        solve=partial(eigenvalues, rtol=rtol, max_products=max_products, seed=seed),
    )
    with RunWriter(log, about) as writer, _reporting(progress, len(series)) as report:
        step = None
        try:
            for count, (step, path) in enumerate(series, start=1):
                report(count, _record(writer, probe, step, path, on_error))
        except BaseException as error:
            writer.event("stopped", step=step, error=type(error).__name__)
            if isinstance(error, DyntuneError):
                error.partial = writer.run
            raise
        return writer.run


class _Frozen:
    """Batches that are many, whatever each of them is: a list that begins with a tensor would be one."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def _series(paths: Sequence[str | os.PathLike[str]], steps: Sequence[int] | None) -> tuple[list[tuple[int, Path]], str]:
    """Files with their steps, ascending, and where the steps come from."""
    if isinstance(paths, (str, bytes, os.PathLike)):
        raise InvalidArgumentError(
            f"paths={str(paths)!r} is one path; give a list of them: sorted(folder.glob('*.pt'))."
        )
    files = [Path(path) for path in paths]
    if not files:
        raise InvalidArgumentError("paths is empty: there is no checkpoint to measure.")
    absent = [str(file) for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(f"{len(absent)} of {len(files)} checkpoints are no files, the first is {absent[0]!r}.")
    if steps is None:
        named = steps_in_names(files)
        numbers, origin = (list(range(len(files))), "counted") if named is None else (named, "from the file names")
    else:
        numbers, origin = [int(step) for step in steps], "given"
        if len(numbers) != len(files) or min(numbers) < 0:
            raise InvalidArgumentError(
                f"steps has {len(numbers)} entries from {min(numbers, default=0)} on for {len(files)} paths: give one "
                "number >= 0 for each."
            )
    return sorted(zip(numbers, files, strict=True), key=lambda pair: pair[0]), origin


@contextmanager
def _reporting(progress: Progress, total: int) -> Iterator[Callable[[int, float], None]]:
    """The caller's function, or a bar where the output is a terminal and it takes long."""
    if progress is not None:
        yield progress
        return
    with tqdm(total=total, desc="checkpoints", unit="file", leave=False, disable=None, delay=SHOW_AFTER) as bar:

        def update(count: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
            bar.update(count - bar.n)

        yield update


def _record(writer: RunWriter, probe: Probe, step: int, path: Path, on_error: Literal["raise", "record"]) -> float:
    """Measure one file into the run; its loss, NaN where there is none."""
    try:
        checkpoint = read_checkpoint(path)
        state = match_state(probe.model, weights_in(checkpoint), source=f"checkpoint {path.name!r}")
        found = probe.measure(state, checkpoint)
    except CheckpointError as error:
        if on_error == "raise":
            raise
        writer.event("unreadable", step=step, checkpoint=path.name, reason=str(error))
        return math.nan
    if found.assumed:
        writer.assume(**found.assumed)
    labels = {"checkpoint": path.name}
    if state.dtypes:
        labels["stored as"] = ", ".join(state.dtypes)
    writer.row(step, found.values, status=found.status, labels=labels)
    loss = found.values["loss"]
    return math.nan if loss is None else float(loss)

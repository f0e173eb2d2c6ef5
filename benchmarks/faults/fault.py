"""What a fault is: :class:`Fault`. The generators are in `faults_steps.py`, `faults_signal.py` and `faults_data.py`."""

from __future__ import annotations

import inspect
from typing import ClassVar, Literal

import torch

from benchmarks.faults.parts import Named, hidden
from benchmarks.faults.training import Batch, Training
from benchmarks.faults.workloads import ARCHITECTURES, Workload
from dyntune.monitor.alerts import Cause


class Fault:
    """One generator; an instance is one fault of one strength in one run.

    Args:
        strength: How strong, in the generator's own unit (`unit`); between `weakest` and `strongest`.
        onset: Step at which it begins; 0 for a fault of construction.
        seed: Chooses the layer, where there is a choice, and what is random in the fault.

    Attributes:
        family: The generator's name.
        cause: The true mechanism.
        where: Names of the parameters at fault; empty: all of them, or none.
        architectures: Those that it can harm.
        kind: Optimizers that it is about: of Adam's kind, of SGD's, or any.
        mid_run: Whether it begins at an onset within training.
        judged: What its severity goes by: the clean loss at the ``"end"``, the mean clean loss from the onset on
            (``"lost"``, for faults that pass), or nothing measured (``"size"``: severities are of the fault itself).
        sizes: Strengths of mild, medium and severe, where `judged` is ``"size"``.
    """

    family: ClassVar[str]
    cause: ClassVar[Cause]
    unit: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]] = ARCHITECTURES
    kind: ClassVar[Literal["adam", "sgd", "any"]] = "any"
    mid_run: ClassVar[bool] = False
    judged: ClassVar[Literal["end", "lost", "size"]] = "end"
    weakest: ClassVar[float]
    strongest: ClassVar[float]
    sizes: ClassVar[tuple[float, float, float]] = (1 / 3, 2 / 3, 1.0)

    def __init__(self, strength: float, *, onset: int, seed: int) -> None:
        self.strength, self.onset, self.seed = strength, onset, seed
        self.where: list[str] = []
        self.random = torch.Generator().manual_seed(seed)

    @classmethod
    def setting(cls, workload: Workload) -> Workload:
        """The workload that the fault is put into; its healthy twin trains in the same."""
        return workload

    @classmethod
    def fits(cls, workload: Workload) -> bool:
        """Whether it can be put into a workload."""
        return workload.architecture in cls.architectures

    def build(self, run: Training) -> None: ...

    def begin(self, run: Training) -> None: ...

    def before(self, run: Training) -> None: ...

    def batch(self, _run: Training, x: torch.Tensor, y: torch.Tensor) -> Batch:
        return x, y

    def after_backward(self, run: Training) -> None: ...

    # -- for generators ------------------------------------------------------------------------------------------------

    def pick(self, run: Training) -> Named:
        """One hidden layer, by the seed."""
        layers = hidden(run.model)
        return layers[self.seed % len(layers)]

    def is_on(self, run: Training) -> bool:
        """Whether the onset has come."""
        return run.step >= self.onset


def regroup(run: Training, names: list[str]) -> None:
    """Two parameter groups: the named parameters in the second."""
    named = dict(run.model.named_parameters())
    chosen = set(names)
    kind = type(run.optimizer)
    taken = inspect.signature(kind).parameters
    options = {name: value for name, value in run.optimizer.defaults.items() if name in taken}
    groups = [
        {"params": [p for n, p in named.items() if n not in chosen]},
        {"params": [p for n, p in named.items() if n in chosen]},
    ]
    run.optimizer = kind(groups, **options)
    run.base_lrs = [group["lr"] for group in run.optimizer.param_groups]

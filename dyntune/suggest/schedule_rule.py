"""The rule behind :func:`dyntune.suggest_schedule`: a recommendation in, every step's learning rate out."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch

from dyntune.errors import InvalidArgumentError, NotConvergedError, RefusedError
from dyntune.records import Recommendation, Status, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Schedule", "Shape", "peak_ratios"]

Shape: TypeAlias = Literal["constant", "linear", "cosine", "wsd"]

KNOB = "learning rate"
# Share of the steps in which "wsd" decays. The code of Haegele et al. (2024), github.com/epfml/schedules-and-scaling,
# has 0.1 as its default and 0.2 in its README; the longer of the two is the default here.
DECAY_SHARE = 0.2
# A warm-up that a training cannot hold is cut to the share at which lr_rule caps Adam's.
WARMUP_DIVISOR = 10

WARMUP_SOURCE = "Goyal et al. (2017), arXiv:1706.02677 (gradual warm-up)"
SOURCES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "linear": ("Bergsma et al. (2025), arXiv:2502.15938 (linear decay, to zero)",),
    "cosine": ("Loshchilov and Hutter (2017), arXiv:1608.03983 (cosine decay)",),
    "wsd": (
        "Hu et al. (2024), arXiv:2404.06395 (warm-up, stable, decay)",
        "Haegele et al. (2024), arXiv:2405.18392 and its code (linear decay over the last 10 to 20%)",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning rate over the steps of a training, with the evidence for its peak.

    Step `t` counts optimizer steps from 0. With W `warmup_steps`, N `num_steps` and D `decay_steps`, the rate is `peak`
    times

    - ``(t + 1) / (W + 1)`` for ``t < W``: the first step's is not zero, and step W is the first at the peak, as in the
      pilot's runs;
    - 1 up to step ``N - D``;
    - from there along the shape to `final`, which step N would have: the last step, ``N - 1``, is one short of it, so
      that none is spent at zero;
    - `final` afterwards (1 for ``"constant"``).

    ``"cosine"`` and ``"linear"`` decay all the way from the end of the warm-up, ``"wsd"`` (warm-up, stable, decay)
    linearly over its last steps. This is torch's ``SequentialLR`` of ``LinearLR(start_factor=1 / (W + 1),
    total_iters=W)`` and ``CosineAnnealingLR(T_max=N - W)`` or ``LinearLR``.

    Args:
        lr: What :func:`dyntune.suggest_lr` said; its value is the peak.
        num_steps: Optimizer steps of the training, > 0.
        warmup_steps: Steps below the peak at the start, in [0, num_steps).
        decay_steps: Steps of the decay: 0 for ``"constant"``, all after the warm-up for ``"linear"`` and ``"cosine"``,
            1 or more of them for ``"wsd"``.
        shape: ``"constant"``, ``"linear"``, ``"cosine"`` or ``"wsd"``.
        final: Where the decay ends, as a share of the peak, in [0, 1]; 1 for ``"constant"``.
        status: How far to trust it: that of `lr`, or UNCERTAIN where the warm-up had to be cut.
        reason: Why the status is what it is; empty when OK.

    Raises:
        InvalidArgumentError: A number outside its range, or an unknown shape.
    """

    lr: Recommendation
    num_steps: int
    warmup_steps: int
    decay_steps: int
    shape: Shape
    final: float
    status: Status
    reason: str = ""

    def __post_init__(self) -> None:
        _check(self.shape, self.num_steps, self.final)
        if self.lr.knob != KNOB:
            raise InvalidArgumentError(
                f"lr is a recommendation for the {self.lr.knob}: a schedule needs one for the {KNOB}."
            )
        if self.peak is not None and not 0 < self.peak < math.inf:
            raise InvalidArgumentError(f"peak={self.peak}: a learning rate is positive and finite.")
        if not 0 <= self.warmup_steps < self.num_steps:
            raise InvalidArgumentError(
                f"warmup_steps={self.warmup_steps} of num_steps={self.num_steps}: the peak would never be reached. "
                "Warm up for fewer steps, 0 for none."
            )
        left = self.num_steps - self.warmup_steps
        lowest, highest = {"constant": (0, 0), "wsd": (1, left)}.get(self.shape, (left, left))
        if not lowest <= self.decay_steps <= highest:
            raise InvalidArgumentError(
                f"decay_steps={self.decay_steps} of num_steps={self.num_steps} after warmup_steps={self.warmup_steps}: "
                f"shape {self.shape!r} decays in {lowest} to {highest} steps."
            )

    @classmethod
    def of(
        cls,
        lr: Recommendation | float,
        *,
        num_steps: int,
        schedule: Shape = "cosine",
        final: float | None = None,
        warmup_steps: int | None = None,
        decay_steps: int | None = None,
    ) -> Schedule:
        """The rule alone: a schedule for a learning rate that is known already. Nothing is measured.

        Args:
            lr: What :func:`dyntune.suggest_lr` returned (refused: the schedule is, too), or a number, > 0; with a
                number the status is UNCERTAIN, since there is no evidence behind it.
            num_steps: Optimizer steps of the training, > 0.
            schedule: ``"cosine"``, ``"linear"``, ``"wsd"`` or ``"constant"``.
            final: Where the decay ends, as a share of the peak, in [0, 1]; default 0.
            warmup_steps: In [0, num_steps); default what the recommendation says (none for a number), or a tenth of the
                steps where the training is not longer than that; the status then says so.
            decay_steps: Of ``"wsd"``; default a fifth of the steps, or what the warm-up leaves.

        Raises:
            InvalidArgumentError: A number outside its range, or an unknown shape.

        Example:
            >>> schedule = Schedule.of(0.1, num_steps=100, schedule="linear", warmup_steps=4)
            >>> [round(schedule.rate(step), 4) for step in (0, 3, 4, 52, 99)]
            [0.02, 0.08, 0.1, 0.05, 0.001]
        """
        final = (1.0 if schedule == "constant" else 0.0) if final is None else final
        _check(schedule, num_steps, final)
        if decay_steps is not None and schedule != "wsd":
            raise InvalidArgumentError(
                f"decay_steps={decay_steps} with schedule={schedule!r}: only 'wsd' has a stable phase before its decay."
            )
        if not isinstance(lr, Recommendation):
            lr = _given(lr)
        status, reason = lr.status, lr.reason
        if warmup_steps is None:
            warmup_steps = lr.warmup_steps or 0
            if warmup_steps >= num_steps:
                cut = min(max(1, num_steps // WARMUP_DIVISOR), num_steps - 1)
                added = (
                    f"num_steps={num_steps} does not outlast the rate's own warm-up of {warmup_steps} steps: cut to "
                    f"{cut}, with which it was not tried"
                )
                reason = f"{reason}; {added}" if reason else added
                status, warmup_steps = Status.UNCERTAIN if status is Status.OK else status, cut
        left = num_steps - warmup_steps
        if schedule == "constant":
            decay_steps = 0
        elif schedule != "wsd":
            decay_steps = left
        elif decay_steps is None:
            decay_steps = min(max(1, round(DECAY_SHARE * num_steps)), left)
        return cls(
            lr=lr,
            num_steps=num_steps,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            shape=schedule,
            final=final,
            status=status,
            reason=reason,
        )

    @property
    def peak(self) -> float | None:
        """The highest rate, of the first parameter group; None when refused."""
        return self.lr.value

    def factor(self, step: int) -> float:
        """The rate at a step over the peak, in [0, 1].

        Args:
            step: Optimizer steps taken before it, from 0; from `num_steps` on it is `final`.

        Raises:
            InvalidArgumentError: A negative step.
        """
        if step < 0:
            raise InvalidArgumentError(f"step={step}: steps are counted from 0.")
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        into = step - (self.num_steps - self.decay_steps)
        if self.shape == "constant" or into <= 0:
            return 1.0
        done = min(1.0, into / self.decay_steps)
        left = 0.5 * (1.0 + math.cos(math.pi * done)) if self.shape == "cosine" else 1.0 - done
        return self.final + (1.0 - self.final) * left

    def rate(self, step: int) -> float:
        """The learning rate of the first parameter group at a step, counted from 0.

        Raises:
            InvalidArgumentError: A negative step.
            RefusedError: The learning rate was refused.
        """
        return self._require_peak() * self.factor(step)

    def scheduler(self, optimizer: torch.optim.Optimizer, *, done: int = 0) -> torch.optim.lr_scheduler.LambdaLR:
        """A torch scheduler that drives the optimizer: call its ``step()`` after each of the optimizer's.

        Sets every group's learning rate to that of the next step, and its ``initial_lr`` to its peak. The first group
        peaks at `peak`, the others keep their ratio to it: the ratio of their ``initial_lr`` where all groups have one
        (an earlier scheduler, or a loaded state, left it), of their ``lr`` otherwise. A rate held as a tensor is filled
        in place. An earlier scheduler of the same optimizer is to be dropped: it would write the rates, too.

        To resume, make the scheduler first and load the states of optimizer and scheduler after, as torch asks for; or
        give `done`. A loaded state brings its own peaks.

        Args:
            optimizer: The user's; changed as described, here and at each ``step()`` of the scheduler.
            done: Optimizer steps taken already, when going on without a saved scheduler.

        Raises:
            RefusedError: The learning rate was refused.
            InvalidArgumentError: No optimizer, a negative `done`, or several groups of which the first has rate 0, so
                that the others have no ratio to it.

        Example:
            >>> optimizer = torch.optim.SGD(torch.nn.Linear(2, 1).parameters())
            >>> scheduler = Schedule.of(0.1, num_steps=10, warmup_steps=1).scheduler(optimizer)
            >>> optimizer.param_groups[0]["lr"]
            0.05
            >>> optimizer.step(), scheduler.step(), optimizer.param_groups[0]["lr"]
            (None, None, 0.1)
        """
        peak = self._require_peak()
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InvalidArgumentError(
                f"optimizer is a {type(optimizer).__name__}: a scheduler drives a torch Optimizer."
            )
        if done < 0:
            raise InvalidArgumentError(f"done={done}: the steps taken already cannot be negative.")
        for group, ratio in zip(optimizer.param_groups, peak_ratios(optimizer), strict=True):
            group["initial_lr"] = peak * ratio
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor, last_epoch=done - 1)

    def _require_peak(self) -> float:
        if self.peak is None:
            raise RefusedError(
                f"there is no schedule without a {KNOB}, and that was refused: {self.reason}", partial=self
            )
        return self.peak

    def require(self) -> Schedule:
        """Return self when the status is OK; raise the matching error otherwise (what ``strict=True`` does).

        Raises:
            RefusedError: The learning rate was refused.
            NotConvergedError: There is a schedule, but its status is not OK; the error carries it as ``partial``.
        """
        if self.status is Status.OK and self.peak is not None:
            return self
        error = RefusedError if self.peak is None else NotConvergedError
        raise error(f"schedule: {self.status.name}: {self.reason or self.status.value}", partial=self)

    def __str__(self) -> str:
        if self.peak is None:
            return f"schedule: refused. {self.reason}"
        return self.words if self.status is Status.OK else f"{self.words} [{self.status.name.lower()}: {self.reason}]"

    @property
    def words(self) -> str:
        """Peak, warm-up and decay in a few words, without the status."""
        start = f"up to {short_number(self.peak)}"
        if self.warmup_steps:
            start += f" after {_steps(self.warmup_steps)} of warm-up"
        end = "0" if self.final == 0 else f"{short_number(self.final)} of it"
        whole = _steps(self.num_steps)
        if self.shape == "constant":
            return f"{start}, constant for {whole}"
        if self.shape == "wsd":
            return f"{start}, stable, linear to {end} in the last {self.decay_steps} of {whole}"
        return f"{start}, {self.shape} to {end} over {whole}"

    def explain(self) -> str:
        """The schedule in words: its rates, status and sources, and the whole chain behind the peak."""
        lines = [f"schedule: {self}", f"status: {self.status.name}: {self.reason or self.status.value}"]
        if self.peak is not None:
            marks = {0: "first", self.warmup_steps: "first at the peak"}
            if self.shape == "wsd":
                marks[self.num_steps - self.decay_steps] = "last at the peak"
            marks[self.num_steps - 1] = "last"
            lines += [f"step {t} ({marks[t]}): {short_number(self.rate(t))}" for t in sorted(marks)]
        warmup = (WARMUP_SOURCE,) if self.warmup_steps else ()
        lines += [f"source: {source}" for source in (*warmup, *SOURCES[self.shape])]
        return "\n".join([*lines, self.lr.explain()])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "peak": self.peak,
            "num_steps": self.num_steps,
            "warmup_steps": self.warmup_steps,
            "decay_steps": self.decay_steps,
            "shape": self.shape,
            "final": self.final,
            "status": self.status.name,
            "reason": self.reason,
            "lr": self.lr.to_dict(),
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the rate over the steps (needs matplotlib, imported here only)."""
        from dyntune.plots import plot_schedule

        return plot_schedule(self, ax=ax)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.explain())}</pre>"


def _check(shape: str, num_steps: int, final: float) -> None:
    if shape not in get_args(Shape):
        raise InvalidArgumentError(f"schedule={shape!r} is not known (known: {', '.join(get_args(Shape))}).")
    if not isinstance(num_steps, int) or num_steps < 1:
        raise InvalidArgumentError(f"num_steps={num_steps!r}: the length of the training is a positive whole number.")
    if not 0 <= final <= 1:
        raise InvalidArgumentError(f"final={final}: the decay ends at a share of the peak, in [0, 1].")
    if shape == "constant" and final != 1:
        raise InvalidArgumentError(f"final={final} with schedule='constant', which does not decay: leave it out.")


def _given(value: float) -> Recommendation:
    """A number as a recommendation that says where it comes from."""
    return Recommendation(
        knob=KNOB,
        value=float(value),
        low=float(value),
        high=float(value),
        level=None,
        status=Status.UNCERTAIN,
        reason="the peak was given as a number: nothing was measured",
        rule="given",
        sources=(),
        evidence={},
        checks=(),
        cost=0.0,
    )


def peak_ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    """Peak of each group over that of the first."""
    groups = optimizer.param_groups
    key = "initial_lr" if all("initial_lr" in group for group in groups) else "lr"
    rates = [float(group[key]) for group in groups]
    if len(rates) > 1 and not (0 < rates[0] < math.inf and all(map(math.isfinite, rates))):
        raise InvalidArgumentError(
            f"the parameter groups have {key}={rates}: their ratios to the first are not defined. Give the first group "
            "a positive rate, and the others theirs relative to it."
        )
    return [1.0] if len(rates) == 1 else [rate / rates[0] for rate in rates]


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"

"""The demo's findings as a page."""

from __future__ import annotations

import dataclasses
import math
import platform

import torch
from matplotlib.axes import Axes

from dyntune import __version__
from dyntune.curvature.eigenvalues import Eigenvalues
from dyntune.demo.tour import DemoResult, Sweep
from dyntune.plots import plot_eigenvalues
from dyntune.plots.style import number
from dyntune.records import Recommendation
from dyntune.report import FigureBlock, Page, Section, Table, density_section, recommendation_section

__all__ = ["demo_page", "with_sweep"]


def demo_page(result: DemoResult) -> Page:
    """The page that ``dyntune demo`` writes; the same for the same result."""
    return Page(
        title="A learning rate, and the curvature behind it",
        lead=(
            f"A transformer with {result.numel:,} parameters learns {result.num_characters:,} characters of English, "
            "and dyntune looks at how it trains."
        ),
        sections=(
            recommendation_section(with_sweep(result), heading="The suggested learning rate"),
            _sweep_section(result),
            _sharpness_section(result),
            density_section(result.density, heading="All eigenvalues after training"),
        ),
        notes=(
            f"dyntune {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}, seed "
            f"{result.seed}. Loss: cross-entropy in nats per character; AdamW, warm-up, then linear decay; "
            f"batches of {result.size.batch_size} windows of {result.size.length} characters.",
            "One model, one seed: an illustration, not evidence that a rule works.",
        ),
    )


def with_sweep(result: DemoResult) -> Recommendation:
    """The recommendation with the sweep among its curves, so that one figure shows both."""
    recommendation, sweep = result.recommendation, result.sweep
    series = dict(recommendation.series) | {"sweep_lr": sweep.lrs, "sweep_loss": sweep.losses}
    return dataclasses.replace(recommendation, series=series)


def _sweep_section(result: DemoResult) -> Section:
    recommendation, sweep = result.recommendation, result.sweep
    rows = [(number(lr), _loss(loss), "") for lr, loss in zip(sweep.lrs, sweep.losses, strict=True)]
    best = min((loss for loss in sweep.losses if math.isfinite(loss)), default=math.nan)
    if sweep.suggested is not None and recommendation.value is not None:
        rows.append((number(recommendation.value), _loss(sweep.suggested), "suggested"))
    return Section(
        heading="Was it a good choice?",
        finding=_sweep_finding(result, best),
        table=Table(
            header=("learning rate", f"held-out loss after {sweep.num_steps} steps", ""),
            rows=tuple(sorted(rows, key=lambda row: float(row[0]))),
        ),
        advice=(
            f"Finding the best of the grid took {len(sweep.lrs) * sweep.num_steps:,} gradients, the suggestion "
            f"{recommendation.cost:.0f}. Where runs are cheap, sweep; where they are not, start from the suggestion.",
        ),
    )


def _loss(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "diverged"


def _sweep_finding(result: DemoResult, best: float) -> str:
    sweep = result.sweep
    if sweep.suggested is None or not math.isfinite(best):
        return "There is nothing to compare: either nothing was suggested, or no run of the sweep survived."
    lost = _regret(sweep, best)
    compared = f"{lost:.0%} of what the best one gained was lost" if lost > 0 else "none of the grid did better"
    return (
        f"Training at the suggested rate reached a loss of {sweep.suggested:.3f}; the best of {len(sweep.lrs)} rates "
        f"tried by brute force reached {best:.3f}, from {sweep.start:.3f} before training: {compared}."
    )


def _regret(sweep: Sweep, best: float) -> float:
    """Share of the attainable improvement that the suggestion missed."""
    assert sweep.suggested is not None
    return (min(sweep.suggested, sweep.start) - best) / (sweep.start - best)


def _sharpness_section(result: DemoResult) -> Section:
    before, after = result.before, result.after
    ratio = after[0] / before[0]
    change = f"{ratio:.1f} times what it was" if ratio >= 1 else f"{1 / ratio:.1f} times smaller"
    stages = (("before training", before), ("after training", after))
    return Section(
        heading="Sharpness before and after",
        finding=(
            f"The largest eigenvalue of the Hessian went from {number(before[0])} to {number(after[0])}, {change}: "
            "curvature at the start is not the curvature that training will meet."
        ),
        figures=tuple(
            FigureBlock(axes=axes, caption=f"The largest eigenvalues {name}.")
            for axes, (name, _) in zip(_on_one_scale(before, after), stages, strict=True)
        ),
        table=Table(
            header=("largest eigenvalue", "value", "bracket", "products"),
            rows=tuple(
                (
                    name,
                    number(found[0], 4),
                    f"{number(float(found.low[0]), 4)} .. {number(float(found.high[0]), 4)}",
                    str(found.num_products),
                )
                for name, found in stages
            ),
        ),
        advice=(
            "Do not take 2 / λ from before training as a learning rate: measure after a short pilot, as suggest_lr "
            "does.",
        ),
    )


def _on_one_scale(*results: Eigenvalues) -> list[Axes]:
    """Figures to compare: the same axis, with zero on it."""
    drawn = [plot_eigenvalues(result) for result in results]
    limits = [axes.get_xlim() for axes in drawn]
    for axes in drawn:
        axes.set_xlim(min(0.0, *(low for low, _ in limits)), max(high for _, high in limits))
    return drawn

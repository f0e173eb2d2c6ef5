"""Sections of a report, made from results."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dyntune.curvature.density import SpectralDensity
from dyntune.curvature.eigenvalues import Eigenvalues
from dyntune.plots import plot_density, plot_eigenvalues, plot_recommendation
from dyntune.plots.density import BULK, density_data
from dyntune.plots.eigenvalues import eigenvalues_data
from dyntune.plots.recommendation import recommendation_data
from dyntune.plots.style import number
from dyntune.records import Estimate, Recommendation, Status
from dyntune.report.page import FigureBlock, Section, Table

__all__ = ["density_section", "eigenvalues_section", "recommendation_section"]


def recommendation_section(result: Recommendation, *, heading: str | None = None) -> Section:
    """A recommendation: the choice, the evidence, how far to trust it.

    Args:
        result: Any recommendation.
        heading: Default: its knob.
    """
    return Section(
        heading=heading or result.knob.capitalize(),
        finding=_recommendation_finding(result),
        figures=(FigureBlock(axes=plot_recommendation(result), caption=_recommendation_caption(result)),),
        table=Table(header=("", "value", "interval", "unit"), rows=tuple(_recommendation_rows(result))),
        advice=tuple(_recommendation_advice(result)),
        background=tuple(_recommendation_background(result)),
    )


def _recommendation_finding(result: Recommendation) -> str:
    if result.value is None:
        return f"No {result.knob} can be suggested: {result.reason}"
    text = (
        f"A {result.knob} of {number(result.value)} is suggested; {number(result.low)} to {number(result.high)} "
        "is thought to do about as well"
    )
    limit = result.max_stable
    if limit is None or limit.value is None:
        return f"{text}."
    return f"{text}. Training should stay stable up to about {number(limit.value)}{_between(limit)}."


def _between(item: Estimate) -> str:
    """An interval in words, as far as it has ends."""
    if math.isfinite(item.high):
        return f" (somewhere from {number(item.low)} to {number(item.high)})"
    return f" (at least {number(item.low)}; no higher rate was seen to fail)"


def _recommendation_caption(result: Recommendation) -> str:
    data = recommendation_data(result)
    parts = [f"Top: loss over the {data.knob}."] if data.y_range is not None else []
    if any(curve.kind == "sweep" for curve in data.curves):
        parts.append("Green: what full runs at each value reach, measured to check the suggestion.")
    rows = "Blue: the suggestion with its range. Orange: where training stops being stable. Grey: other evidence."
    return " ".join([*parts, rows])


def _recommendation_rows(result: Recommendation) -> list[tuple[str, str, str, str]]:
    rows = []
    if result.value is not None:
        interval = f"{number(result.low)} .. {number(result.high)}"
        rows.append(("suggested", number(result.value), interval, result.knob))
    if result.max_stable is not None:
        rows.append(estimate_row("largest stable value", result.max_stable))
    if result.warmup_steps is not None:
        rows.append(("warm-up", str(result.warmup_steps), "", "steps"))
    for name, item in result.evidence.items():
        words = name.replace("_", " ")
        if isinstance(item, Estimate):
            rows.append(estimate_row(words, item))
        else:
            rows.append((words, _plain(item), "", ""))
    rows.append(("cost", f"{result.cost:.0f}", "", "gradients"))
    return rows


def _plain(item: float | str | None) -> str:
    if item is None:
        return "not measured"
    return number(item) if isinstance(item, float) else str(item)


def estimate_row(name: str, item: Estimate) -> tuple[str, str, str, str]:
    """(name, value, interval, unit); a refused estimate says so."""
    if item.value is None:
        return (name, "refused", item.reason, "")
    return (name, number(item.value), f"{number(item.low)} .. {number(item.high)}", item.unit.replace("^2", "²"))


def _recommendation_advice(result: Recommendation) -> list[str]:
    if result.value is None:
        return [result.status.value]
    warm = f", warmed up linearly over {result.warmup_steps} steps" if result.warmup_steps else ""
    advice = [f"Set the {result.knob} to {number(result.value)}{warm}."]
    if result.status is not Status.OK:
        advice.append(f"Status {result.status.name}: {result.reason or result.status.value}")
    if result.level is None:
        advice.append("How often the range holds the best value has not been measured yet: read it as a guide.")
    return advice


def _recommendation_background(result: Recommendation) -> Iterator[str]:
    yield f"Rule: {result.rule}."
    for check in result.checks:
        yield f"{check[:1].upper()}{check[1:]}."
    for source in result.sources:
        yield f"Source: {source}."


def eigenvalues_section(result: Eigenvalues, *, heading: str = "Sharpest directions") -> Section:
    """Extreme eigenvalues with brackets."""
    data = eigenvalues_data(result)
    rows = tuple(
        (name, number(value, 4), f"{number(low, 4)} .. {number(high, 4)}", f"{residual:.1e}", "yes" if sure else "no")
        for name, value, low, high, residual, sure in zip(
            data.names, data.values, data.low, data.high, result.residuals.tolist(), data.certified, strict=True
        )
    )
    first = f"The {data.names[0]} eigenvalue is {number(data.values[0], 4)}"
    if result.converged:
        finding = f"{first}, certified to {100 * result.rtol:g} % with {result.num_products} Hessian-vector products."
        advice: tuple[str, ...] = ()
    else:
        finding = f"{first} at least so far: {result.num_products} products did not settle every eigenvalue."
        advice = ("Raise max_products, or loosen rtol: the brackets show how far the values may still be off.",)
    return Section(
        heading=heading,
        finding=finding,
        figures=(
            FigureBlock(
                axes=plot_eigenvalues(result),
                caption="Each dot is an eigenvalue; its bar is what is not ruled out.",
            ),
        ),
        table=Table(header=("", "value", "bracket", "residual", "certified"), rows=rows),
        advice=advice,
    )


def density_section(result: SpectralDensity, *, heading: str = "All eigenvalues") -> Section:
    """The spectral density."""
    data = density_data(result)
    finding = (
        f"{BULK:.0%} of the {data.numel:,} eigenvalues lie within ±{number(data.bulk, 2)}, the largest at about "
        f"{number(data.largest)}: a few directions are far sharper than all the others."
        if data.largest > 10 * data.bulk
        else f"The {data.numel:,} eigenvalues lie between about {number(data.smallest)} and {number(data.largest)}."
    )
    rows = (
        ("smallest seen", number(data.smallest), "", "loss / parameter²"),
        ("largest seen", number(data.largest), "", "loss / parameter²"),
        estimate_row("trace", result.trace),
        ("mean eigenvalue", number(float(result.trace) / data.numel), "", "loss / parameter²"),
        ("smoothing width", number(result.bandwidth), "", "loss / parameter²"),
    )
    caption = (
        f"Share of the eigenvalues at each value, on a logarithmic scale; shaded: {result.level:.0%} band over random "
        "probes. Below the dashed line is less than one eigenvalue."
    )
    return Section(
        heading=heading,
        finding=finding,
        figures=(FigureBlock(axes=plot_density(result), caption=caption),),
        table=Table(header=("", "value", "interval", "unit"), rows=rows),
    )

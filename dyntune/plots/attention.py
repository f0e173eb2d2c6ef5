"""Logits and entropy of every attention head along a short training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dyntune.dynamics.attention import COLLAPSED
from dyntune.errors import InvalidArgumentError
from dyntune.plots.style import BLUE, MUTED, ORANGE, label, new_rows, tidy
from dyntune.suggest.heads_rule import HOT_LOGIT, Heads

__all__ = ["AttentionData", "attention_data", "draw_entropy", "draw_logits", "plot_attention"]

_HEIGHT = 2.2  # inches


@dataclass(frozen=True, kw_only=True)
class AttentionData:
    """What the figure shows.

    Args:
        title: One line above the figure.
        steps: At which attention was looked at.
        logits: Largest logit. Shape (heads of all modules, steps).
        entropy: Relative entropy, in [0, 1]; of the same shape.
    """

    title: str
    steps: tuple[int, ...]
    logits: tuple[tuple[float, ...], ...]
    entropy: tuple[tuple[float, ...], ...]


def attention_data(found: Heads, *, heads: int | None = None) -> AttentionData:
    """What :func:`plot_attention` shows, as plain data."""
    courses = {row.heads: row.course for row in found.table if row.course is not None}
    if not courses:
        raise InvalidArgumentError(
            "no attention was read along the short trainings, so that there is nothing to draw; checks say why."
        )
    wanted = (found.value if found.value in courses else next(iter(courses))) if heads is None else heads
    course = courses.get(wanted)
    if course is None:
        raise InvalidArgumentError(f"heads={heads}: attention was read for {', '.join(map(str, courses))} heads.")
    lr = next(row.lr for row in found.table if row.heads == wanted)
    rate = "" if lr.value is None else f" at learning rate {lr.value:.2g}"
    return AttentionData(
        title=f"Attention with {wanted} heads in each module{rate}, one line a head",
        steps=course.steps,
        logits=tuple(zip(*course.max_logit, strict=True)),
        entropy=tuple(zip(*course.relative_entropy, strict=True)),
    )


def draw_logits(ax: Axes, data: AttentionData) -> None:
    """Draw largest logits on given axes."""
    _draw(ax, data.steps, data.logits)
    highest = max((x for line in data.logits for x in line if math.isfinite(x)), default=0.0)
    if highest > HOT_LOGIT / 3:
        _mark(ax, data.steps, HOT_LOGIT, "saturated", below=False)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    tidy(ax, title=data.title, xlabel="", ylabel="largest logit", grid="y")


def draw_entropy(ax: Axes, data: AttentionData) -> None:
    """Draw relative entropies on given axes."""
    _draw(ax, data.steps, data.entropy)
    _mark(ax, data.steps, COLLAPSED, "collapsed", below=True)
    ax.set_ylim(0.0, 1.05)
    tidy(ax, title="", xlabel="step of the short training", ylabel="entropy / its largest", grid="y")


def _draw(ax: Axes, steps: Sequence[int], lines: Sequence[Sequence[float]]) -> None:
    opacity = max(0.25, min(0.9, 4 / max(1, len(lines))))
    for line in lines:
        ax.plot(steps, line, color=BLUE, linewidth=1.2, alpha=opacity)
    last = max(1, steps[-1])
    ax.set_xlim(-0.02 * last, 1.17 * last)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _mark(ax: Axes, steps: Sequence[int], value: float, text: str, *, below: bool) -> None:
    ax.axhline(value, color=ORANGE, linewidth=1.0, linestyle=(0, (4, 3)))
    side = "top" if below else "bottom"
    label(ax, 1.03 * max(1, steps[-1]), value, text, color=MUTED, va=side, offset=(0.0, -2.0 if below else 2.0))


def plot_attention(found: Heads, *, heads: int | None = None, ax: Axes | None = None) -> Axes:
    """Draw the largest logit and the relative entropy of every head along the short training at the suggested rate.

    Logits that grow while entropy falls precede a divergence; marks are where the softmax saturates and where a head
    counts as collapsed.

    Args:
        found: What :func:`dyntune.suggest_heads` returned.
        heads: Which number of heads; None: the chosen one.
        ax: Where to draw the logits alone; default a figure of its own, with the entropy below.

    Returns:
        The axes of the logits.

    Raises:
        InvalidArgumentError: No attention was read, or not for that number of heads.
    """
    data = attention_data(found, heads=heads)
    if ax is not None:
        draw_logits(ax, data)
        return ax
    upper, lower = new_rows(_HEIGHT, _HEIGHT)
    draw_logits(upper, data)
    draw_entropy(lower, data)
    return upper

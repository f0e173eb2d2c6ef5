"""Curvature by block, and the share of a direction in each: one row per block, in the model's order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from dyntune.curvature.blocks import BlockMass
from dyntune.curvature.eigenvalues import Eigenvalues
from dyntune.plots.style import BLUE, INK, LABEL_SIZE, MUTED, ORANGE, cleaned, label, new_axes, number, tidy, width_of
from dyntune.records import Estimate, Status

__all__ = [
    "BlockRow",
    "BlocksData",
    "MassData",
    "MassRow",
    "blocks_data",
    "draw_block_mass",
    "draw_blocks",
    "mass_data",
    "plot_block_mass",
    "plot_blocks",
    "short_names",
]

NAME_LENGTH = 34  # characters: leaves half the width of a figure to what it shows
_ROW, _MANY_ROWS, _MANY = 0.25, 0.165, 24  # inches a row; from so many rows on they and their names are smaller
_FRAME = 1.15  # inches for a title of two lines and the axis below


@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """One block; all tuples have one entry per value, the leading one first.

    Args:
        name: The block's name, as it is.
        values: Its eigenvalues, or its one estimate.
        low: Lower ends of their intervals.
        high: Upper ends; ``inf`` where nothing is known.
        sure: Whether all of them are established.
    """

    name: str
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    sure: bool


@dataclass(frozen=True, kw_only=True)
class BlocksData:
    """What the figure shows.

    Args:
        rows: Blocks in the model's order.
        whole: The same of the whole matrix, drawn as a last row; None where it was not given.
        x_range: Range that is shown; it holds zero.
        xlabel: Name of the quantity with its unit.
        title: One line above the figure.
    """

    rows: tuple[BlockRow, ...]
    whole: BlockRow | None
    x_range: tuple[float, float]
    xlabel: str
    title: str


@dataclass(frozen=True, kw_only=True)
class MassRow:
    """One block.

    Args:
        name: The block's name, as it is.
        share: Share of the direction's squared length, in [0, 1].
        expected: Share that a random direction has: the block's share of the parameters.
    """

    name: str
    share: float
    expected: float


@dataclass(frozen=True, kw_only=True)
class MassData:
    """What the figure shows.

    Args:
        rows: Blocks in the model's order; the shares sum to 1.
        title: One line above the figure.
    """

    rows: tuple[MassRow, ...]
    title: str


def short_names(names: Sequence[str], limit: int = NAME_LENGTH) -> list[str]:
    """Names on one line each, at most `limit` characters long.

    Where one is longer, the parts that all of them begin and end with go first, since they tell none from another. In
    what is still too long, parts keep three letters each, from the first on, and at last the middle goes.
    """
    kept = [cleaned(name, limit=1000) for name in names]
    if len(kept) > 1 and max(map(len, kept)) > limit:
        parts = [name.split(".") for name in kept]
        most = min(map(len, parts)) - 1
        before = _common(parts, most)
        after = _common([each[::-1] for each in parts], most - before)
        kept = [".".join(each[before : len(each) - after]) for each in parts]
    return [_abbreviated(name, limit) for name in kept]


def _abbreviated(name: str, limit: int) -> str:
    parts = name.split(".")
    for i in range(len(parts) - 1):
        if len(".".join(parts)) > limit:
            parts[i] = parts[i][:3]
    name = ".".join(parts)
    return name if len(name) <= limit else f"{name[: limit // 3]}…{name[limit // 3 + 1 - limit :]}"


def _common(parts: Sequence[Sequence[str]], most: int) -> int:
    """How many leading parts are the same in all, at most `most`."""
    same = [len(set(column)) == 1 for column in zip(*parts, strict=False)]
    return min([*(i for i, equal in enumerate(same) if not equal), len(same), most])


def blocks_data(
    found: Mapping[str, Eigenvalues] | Mapping[str, Estimate],
    *,
    whole: Eigenvalues | Estimate | None = None,
    quantity: str = "eigenvalue",
) -> BlocksData:
    """What :func:`plot_blocks` shows, as plain data."""
    rows = tuple(_row(name, item) for name, item in found.items())
    reference = None if whole is None else _row("the whole matrix", whole)
    shown = [0.0]
    for row in (*rows, *(() if reference is None else (reference,))):
        shown += [x for x in (*row.values, *row.low, *row.high) if math.isfinite(x)]
    width = (max(shown) - min(shown)) or 1.0
    units = [item.unit for item in found.values() if isinstance(item, Estimate)]
    unit = (units[0] if units else "loss / parameter^2").replace("^2", "²")
    return BlocksData(
        rows=rows,
        whole=reference,
        x_range=(min(shown) - 0.04 * width if min(shown) < 0 else 0.0, max(shown) + 0.04 * width),
        xlabel=f"{quantity} ({unit})" if unit else quantity,
        title=_blocks_title(rows, quantity),
    )


def _row(name: str, item: Eigenvalues | Estimate) -> BlockRow:
    if isinstance(item, Estimate):
        ends = [() if item.value is None else (end,) for end in (item.value or 0.0, item.low, item.high)]
        return BlockRow(name=name, values=ends[0], low=ends[1], high=ends[2], sure=item.status is Status.OK)
    values, low, high = (tuple(part.tolist()) for part in (item.values, item.low, item.high))
    return BlockRow(name=name, values=values, low=low, high=high, sure=item.converged)


def _short(name: str, rows: Sequence[BlockRow] | Sequence[MassRow]) -> str:
    """A name as its row shows it."""
    names = [row.name for row in rows]
    return short_names(names)[names.index(name)]


def _blocks_title(rows: tuple[BlockRow, ...], quantity: str) -> str:
    known = [row for row in rows if row.values]
    if not known:
        return f"No block has an established {quantity}"
    top = max(known, key=lambda row: row.values[0])
    missing = sum(not row.sure for row in rows)
    subject = f"Largest {quantity} of {len(rows)} blocks" if len(rows) > 1 else f"{quantity} of one block".capitalize()
    title = f"{subject}: {number(top.values[0])} in {_short(top.name, rows)}"
    return f"{title}; {missing} NOT established" if missing else title


def draw_blocks(ax: Axes, data: BlocksData) -> None:
    """Draw on given axes: one row per block, the first on top."""
    left, right = data.x_range
    ax.set_xlim(left, right)
    if left < 0:
        ax.axvline(0, color=MUTED, linewidth=0.8)
    small = len(data.rows) > _MANY
    for at, row in enumerate(data.rows):
        _draw_row(ax, row, at, color=BLUE if row.sure else ORANGE, small=small)
    names = [row.name for row in data.rows]
    if data.whole is not None and data.whole.values:
        color = INK if data.whole.sure else ORANGE
        ax.axvline(data.whole.values[0], color=color, linewidth=0.9, linestyle=(0, (4, 3)))
        _draw_row(ax, data.whole, len(names), color=color, small=small)
        names.append(data.whole.name)
    _name_rows(ax, names)
    tidy(ax, title=data.title, xlabel=data.xlabel, ylabel="", grid="x", columns=_columns(ax, names))


def _draw_row(ax: Axes, row: BlockRow, at: int, *, color: str, small: bool) -> None:
    left, right = ax.get_xlim()
    size = 3.5 if small else 5.0
    if row.values:
        ax.plot([0, row.values[0]], [at, at], color=color, linewidth=1.0, alpha=0.5)
    for rank, (value, low, high) in enumerate(zip(row.values, row.low, row.high, strict=True)):
        ax.plot([max(low, left), min(high, right)], [at, at], color=color, linewidth=size, alpha=0.35,
                solid_capstyle="butt")  # fmt: skip
        for end, known, arrow in ((left, math.isfinite(low), "<"), (right, math.isfinite(high), ">")):
            if not known:
                ax.plot([end], [at], marker=arrow, color=color, markersize=size, clip_on=False)
        full = "full" if row.sure and rank == 0 else "none"
        ax.plot(
            [value],
            [at],
            marker="o",
            color=color,
            markersize=size if rank == 0 else 0.7 * size,
            fillstyle=full,
            clip_on=False,
        )
    text = number(row.values[0]) if row.values else "refused"
    if row.values and not row.sure:
        text += ", not established"
    label(
        ax, 1.0, at, text, color=INK if row.sure else ORANGE, xycoords=ax.get_yaxis_transform(), va="center",
        offset=(8.0, 0.0), fontsize=_size(small=small),
    )  # fmt: skip


def _size(*, small: bool) -> float:
    return 7.5 if small else LABEL_SIZE


def _columns(ax: Axes, names: Sequence[str]) -> int:
    """Characters of a title line beside the names; a letter of a name takes 0.075 inches, one of a title 0.095."""
    return max(18, int((width_of(ax) - 0.075 * max(map(len, short_names(names)))) / 0.095))


def _name_rows(ax: Axes, names: list[str]) -> None:
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_yticks(range(len(names)), short_names(names))
    for text in ax.get_yticklabels():
        text.set_parse_math(False)
        text.set_fontsize(_size(small=len(names) > _MANY))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def mass_data(shares: BlockMass) -> MassData:
    """What :func:`plot_block_mass` shows, as plain data."""
    total = sum(shares.sizes.values())
    rows = tuple(MassRow(name=name, share=share, expected=shares.sizes[name] / total) for name, share in shares.items())
    top = max(rows, key=lambda row: row.share)
    where = f"{100 * top.share:.0f} % of the direction lies in {_short(top.name, rows)}"
    return MassData(rows=rows, title=f"{where} ({number(100 * top.expected, 2)} % of the parameters)")


def draw_block_mass(ax: Axes, data: MassData) -> None:
    """Draw on given axes: one bar per block, the first on top."""
    small = len(data.rows) > _MANY
    ax.set_xlim(0, 1.04 * max(max(row.share, row.expected) for row in data.rows))
    for at, row in enumerate(data.rows):
        ax.barh(at, row.share, height=0.62, color=BLUE, alpha=0.75, linewidth=0)
        ax.plot([row.expected] * 2, [at - 0.42, at + 0.42], color=ORANGE, linewidth=1.6, solid_capstyle="butt")
        label(
            ax, 1.0, at, f"{100 * row.share:.1f} %", xycoords=ax.get_yaxis_transform(), va="center", offset=(8.0, 0.0),
            fontsize=_size(small=small),
        )  # fmt: skip
    names = [row.name for row in data.rows]
    _name_rows(ax, names)
    ax.set_ylim(len(data.rows) + 0.35, -0.6)  # a line below the bars to say what the ticks are
    ax.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")
    tidy(ax, title=data.title, xlabel="share of the squared length", ylabel="", grid="x", columns=_columns(ax, names))
    label(
        ax, 1.0, len(data.rows), "| share of a random direction", color=ORANGE, xycoords=ax.get_yaxis_transform(),
        ha="right", va="center", fontsize=_size(small=small),
    )  # fmt: skip


def _height(count: int) -> float:
    """Inches for so many rows."""
    return _FRAME + max(count, 2) * (_MANY_ROWS if count > _MANY else _ROW)


def plot_blocks(
    found: Mapping[str, Eigenvalues] | Mapping[str, Estimate],
    *,
    whole: Eigenvalues | Estimate | None = None,
    quantity: str = "eigenvalue",
    ax: Axes | None = None,
) -> Axes:
    """Draw one quantity of every diagonal block with its interval.

    Args:
        found: What :func:`dyntune.block_eigenvalues` returned, or an estimate per block, such as traces.
        whole: The same of the whole matrix: a dashed line, which no block's largest eigenvalue exceeds.
        quantity: What it is, in words.
        ax: Where to draw; default a figure of its own (``.figure`` of what is returned), unknown to pyplot.

    Returns:
        The axes.

    Example:
        >>> import torch, dyntune
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> batch = (torch.eye(2), torch.zeros(2, 1))
        >>> found = dyntune.block_eigenvalues(model, batch, criterion=torch.nn.MSELoss())
        >>> plot_blocks(found).get_title(loc="left")[:30]
        'Largest eigenvalue of 2 blocks'
    """
    rows = len(found) + (whole is not None)
    axes = new_axes(height=_height(rows)) if ax is None else ax
    draw_blocks(axes, blocks_data(found, whole=whole, quantity=quantity))
    return axes


def plot_block_mass(shares: BlockMass, *, ax: Axes | None = None) -> Axes:
    """Draw the share of a direction in each block beside the share that a random direction has.

    Args:
        shares: What :func:`dyntune.block_mass` returned.
        ax: Where to draw; default a figure of its own (``.figure`` of what is returned), unknown to pyplot.

    Returns:
        The axes.

    Example:
        >>> import torch, dyntune
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> H = dyntune.hessian(model, (torch.eye(2), torch.zeros(2, 1)), criterion=torch.nn.MSELoss())
        >>> shares = dyntune.block_mass(H, [torch.ones(p.shape) for p in model.parameters()])
        >>> len(plot_block_mass(shares).patches)
        2
    """
    axes = new_axes(height=_height(len(shares) + 1)) if ax is None else ax
    draw_block_mass(axes, mass_data(shares))
    return axes

r"""A linear sketch: a list of tensors of any size as one vector of a few thousand numbers that keeps inner products.

It does so::

    <S x, S y> = <x, y> on average over the seed, with variance about (|x|^2 |y|^2 + <x, y>^2) / width

so that cosines of sketches have a standard error of about :math:`(1 - c^2) / \sqrt{width}`, light tails or heavy.

How entries find their bucket. A tensor is cut into blocks of 128 * width consecutive entries. Block b lies in rows of
:math:`q_b` entries, a prime a little below the width; its entries are multiplied by a table of random signs that all
blocks share, added up along the columns, and the row of sums lands on the sketch turned by :math:`o_b`, with sign
:math:`s_b`. The prime, the turn and the sign are hashed from the seed, the tensor's name and the block's place. So the
whole is a product and a column sum of each block, no index is stored per entry, and no gather is made. What the random
primes and turns are for: with rows of one length, weights of one input feature (a stride that divides the width) all
met in a handful of buckets.

An entry's bucket and sign depend on the seed, the tensor's name and the entry's place in the whole tensor, and on
nothing else. Sketches of the shards of a tensor, each given where it begins, therefore add up to the sketch of the
whole; sketches of different tensors add up to that of the list.

Source: Charikar, Chen, Farach-Colton (2004), Theor. Comput. Sci. 312(1) (CountSketch: a random bucket and sign per
entry); here the entries of one block share what they can without meeting each other more often.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dyntune.errors import InvalidArgumentError, ShapeMismatchError

__all__ = ["CountSketch", "cosine_error", "splitmix64"]

# Rows of the table of signs: 4 MB at a width of 8192, which a processor's cache holds. 10^7 entries took 3.5 ms with it
# and as long with a quarter of it, on one core; the larger one needs a quarter of the calls.
ROWS = 128
# Rows are this much shorter than the sketch at most; narrower sketches have too few primes to choose from.
SHORTEST_ROW = 15 / 16
NARROWEST = 64
MOST_PLANS = 16  # of different lists of tensors; a training loop has one or two

Words = NDArray[np.uint64]


def splitmix64(key: int, counter: Words) -> Words:
    """64 random bits for each counter: the stream named `key` of SplitMix64.

    Args:
        key: Any 64 bits.
        counter: Places in the stream, in any order. Shape (n,).

    Source: Steele, Lea, Flood (2014), "Fast splittable pseudorandom number generators", OOPSLA, figure 15; the mixing
    constants are Stafford's variant 13.

    Example:
        >>> hex(int(splitmix64(0, np.array([0], np.uint64))[0]))  # the first output of the stream of seed 0
        '0xe220a8397b1dcdaf'
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        z = np.uint64(key & (2**64 - 1)) + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: Words = z ^ (z >> np.uint64(31))
    return mixed


def cosine_error(cosine: float, width: int) -> float:
    """Standard error that the sketch adds to a cosine: ``(1 - c^2) / sqrt(width)``."""
    return (1 - min(cosine * cosine, 1.0)) / math.sqrt(width)


@dataclass(frozen=True)
class _Piece:
    """A rectangle of one block: rows of the table of signs, columns of it, and where its sums go."""

    tensor: int
    start: int  # in the flattened tensor
    rows: slice
    columns: slice
    landing: int  # first bucket of the sums, before they wrap around
    sign: float


@dataclass(frozen=True)
class _Plan:
    """Where everything goes, for tensors of given names, offsets and sizes on one device."""

    which: tuple[int, ...]  # the tensors of this device
    pieces: tuple[_Piece, ...]
    small: tuple[int, ...]  # tensors that are gathered instead
    places: torch.Tensor  # (numel of small,) int32: bucket, plus twice the width where the sign is negative


class CountSketch:
    """A linear map from lists of tensors to vectors of `width` numbers that keeps inner products.

    Args:
        width: Numbers in the sketch; at least 64.
        seed: Names the map: sketches compare only under the same seed and width.

    Accuracy: unbiased; standard error of a cosine c: ``(1 - c^2) / sqrt(width)`` (see :func:`cosine_error`), measured
    to be that within 10% for normal and Student-t(2.5) entries and for layers of rank one (``benchmarks/signals.py``),
    and less for energy in one column. A tensor whose energy lies on a stride of exactly one of the primes is sketched
    worse. Float32 throughout; shards add up to the whole to rounding.

    Cost: entries are read once; 4 * 128 * width bytes for the signs and as much for working, whatever the model's size
    (8.4 MB at the default width), and 4 bytes per entry of tensors no longer than the width. No device synchronisation.
    Three calls per 128 * width entries. On CUDA the sums of small tensors are atomic: the last bits may change.

    Example:
        >>> x = torch.linspace(-1, 1, 100_000)
        >>> sketch = CountSketch(seed=1)
        >>> whole = sketch([x], ["weight"])
        >>> halves = sketch([x[:30_001]], ["weight"]), sketch([x[30_001:]], ["weight"], offsets=[30_001])
        >>> bool(torch.allclose(whole, halves[0] + halves[1], atol=1e-4))
        True
        >>> whole.shape, abs(float(whole @ whole) / float(x @ x) - 1) < 0.1
        (torch.Size([8192]), True)
    """

    def __init__(self, width: int = 8192, *, seed: int = 0) -> None:
        if width < NARROWEST:
            raise InvalidArgumentError(
                f"width={width}: a sketch needs at least {NARROWEST} numbers; the standard error of a cosine is "
                "1 / sqrt(width), so 8192 gives 0.011."
            )
        self.width = width
        self.seed = seed
        self._span = ROWS * width
        self._primes = _primes(math.ceil(SHORTEST_ROW * width), width)
        self._plans: dict[tuple[object, ...], list[tuple[torch.device, _Plan]]] = {}
        self._signs: dict[torch.device, torch.Tensor] = {}
        self._work: dict[torch.device, torch.Tensor] = {}

    def __call__(
        self, tensors: Sequence[torch.Tensor], names: Sequence[str], *, offsets: Sequence[int] | None = None
    ) -> torch.Tensor:
        """The sketch of a list of tensors, which is the sum of the sketches of each.

        Args:
            tensors: Any shapes and floating dtypes, on any devices; non-contiguous ones are copied.
            names: Name of the whole tensor that each is, or is a part of.
            offsets: Where each part begins in its flattened whole; zeros by default. A part has to be contiguous in the
                whole: a shard along the first dimension is. (Of one cut along another, each row is a part.)

        Returns:
            Shape (width,), float32, on the first tensor's device.

        Raises:
            ShapeMismatchError: Not one name and one offset per tensor.
        """
        offsets = [0] * len(tensors) if offsets is None else offsets
        if not len(tensors) == len(names) == len(offsets):
            raise ShapeMismatchError(
                f"{len(tensors)} tensors, {len(names)} names and {len(offsets)} offsets: each tensor needs one of each."
            )
        if not tensors:
            return torch.zeros(self.width)
        flat = [t.detach().reshape(-1) for t in tensors]
        total: torch.Tensor | None = None
        for device, plan in self._planned(flat, names, offsets):
            found = self._on(device, plan, flat)
            total = found if total is None else total + found.to(total.device, non_blocking=True)
        assert total is not None
        return total

    def _on(self, device: torch.device, plan: _Plan, flat: list[torch.Tensor]) -> torch.Tensor:
        width, signs, work = self.width, self._table(device), self._work[device]
        sums = torch.zeros(4 * width, device=device)  # positive and negative halves, each with room to wrap around
        for piece in plan.pieces:
            part = signs[piece.rows, piece.columns]
            shape = part.shape
            values = flat[piece.tensor][piece.start : piece.start + shape.numel()].view(shape)
            signed = torch.mul(values, part, out=work[: shape.numel()].view(shape))
            columns = signed[0] if shape[0] == 1 else signed.sum(0)
            sums[piece.landing : piece.landing + shape[1]].add_(columns, alpha=piece.sign)
        if plan.small:
            sums.index_add_(0, plan.places, torch.cat([flat[i] for i in plan.small]).float())
        sums = sums.view(2, 2, width).sum(1)
        return sums[0] - sums[1]

    def _table(self, device: torch.device) -> torch.Tensor:
        if device not in self._signs:
            # One row more than full blocks of the longest rows have: shorter rows are more.
            shape = (self._span // self._primes[0] + 1, self.width)
            bits = splitmix64(self._key("signs"), np.arange(math.prod(shape), dtype=np.uint64)) >> np.uint64(63)
            signs = torch.from_numpy(1 - 2 * bits.astype(np.float32)).view(shape)
            self._signs[device] = signs.to(device)
            self._work[device] = torch.empty(math.prod(shape), device=device)
        return self._signs[device]

    def _planned(
        self, flat: Sequence[torch.Tensor], names: Sequence[str], offsets: Sequence[int]
    ) -> list[tuple[torch.device, _Plan]]:
        key = (tuple(names), tuple(offsets), tuple((t.numel(), t.device) for t in flat))
        if key not in self._plans:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            devices = list(dict.fromkeys(t.device for t in flat))
            sizes = [t.numel() for t in flat]
            self._plans[key] = [
                (d, self._plan([i for i, t in enumerate(flat) if t.device == d], sizes, names, offsets, d))
                for d in devices
            ]
        return self._plans[key]

    def _plan(
        self, which: list[int], sizes: list[int], names: Sequence[str], offsets: Sequence[int], device: torch.device
    ) -> _Plan:
        pieces: list[_Piece] = []
        small: list[int] = []
        places: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
        for i in which:
            found = self._pieces(i, names[i], offsets[i], sizes[i])
            if sizes[i] <= self.width:
                small.append(i)
                places += [self._places(piece) for piece in found]
            else:
                pieces += found
        return _Plan(tuple(which), tuple(pieces), tuple(small), torch.from_numpy(np.concatenate(places)).to(device))

    def _pieces(self, tensor: int, name: str, offset: int, size: int) -> list[_Piece]:
        """Rectangles that cover `size` entries from `offset` on, in their order."""
        key, pieces, at = self._key(f"tensor {name}"), [], offset
        end = offset + size
        blocks = np.arange(offset // self._span, -(-end // self._span), dtype=np.uint64)
        for block, word in zip(blocks.tolist(), splitmix64(key, blocks).tolist(), strict=True):
            row_length = self._primes[(word >> 32) % len(self._primes)]
            turn, sign = (word & 0x7FFFFFFF) % self.width, 1.0 - 2.0 * (word >> 31 & 1)
            until = min(end, (block + 1) * self._span)
            while at < until:
                row, column = divmod(at - block * self._span, row_length)
                whole = (until - at) // row_length
                if column == 0 and whole:
                    rows, columns = slice(row, row + whole), slice(0, row_length)
                else:
                    rows, columns = slice(row, row + 1), slice(column, min(row_length, column + until - at))
                pieces.append(_Piece(tensor, at - offset, rows, columns, turn + columns.start, sign))
                at += (rows.stop - rows.start) * (columns.stop - columns.start)
        return pieces

    def _places(self, piece: _Piece) -> NDArray[np.int32]:
        """Buckets of the entries of a piece, in order, twice the width later where the sign is negative."""
        signs = self._table(torch.device("cpu"))[piece.rows, piece.columns].numpy() * piece.sign
        length = piece.columns.stop - piece.columns.start
        buckets = np.arange(piece.landing, piece.landing + length) + 2 * self.width * (signs < 0)
        flat: NDArray[np.int32] = buckets.astype(np.int32).reshape(-1)
        return flat

    def _key(self, name: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest(), "little")


def _primes(low: int, high: int) -> list[int]:
    """Primes from `low` to `high`."""
    return [n for n in range(low, high + 1) if all(n % d for d in range(2, math.isqrt(n) + 1))]

r"""Rows from several sources in chosen proportions, with the importance weights that leave the objective as it is.

Stratified: a batch of B rows has :math:`\lfloor p_i B \rfloor` or one more of source i, by systematic sampling, so that
it is :math:`p_i B` on average. A row then counts

.. math:: \frac{w_i B}{n_i} \quad \text{where } p_i B \ge 1, \qquad \frac{w_i}{p_i} \quad \text{otherwise}

in the batch's mean, with :math:`n_i` its source's rows in the batch: unbiased both times, and the first leaves no noise
from the counts. Multinomial: the source is drawn anew for each row, and counts :math:`w_i / p_i`.

Within a source rows come in a random order, each once before any comes again. All of it is a function of the seed and
of how much has been drawn: the state is a handful of numbers.

Source: Madow (1949), Ann. Math. Stat. 20 (systematic sampling); Horvitz and Thompson (1952) (weights).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Dataset, Sampler

from dyntune.errors import InvalidArgumentError
from dyntune.numerics.random import stream_seed
from dyntune.numerics.water_filling import checked_floors
from dyntune.suggest.mixture_rule import Mixture, Sampling, checked_weights

__all__ = ["IndexedMixture", "MixtureSampler"]

# Batches whose shares are remembered: more than workers prefetch (2 each by default) in any loader we have seen.
REMEMBERED = 1024


class IndexedMixture(Dataset[Any]):
    """Data sets one after the other, each item with its index: ``(item, index)``, to ask for its importance.

    Args:
        datasets: One for each source.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> both = IndexedMixture([TensorDataset(torch.zeros(2)), TensorDataset(torch.ones(3))])
        >>> len(both), both[3]
        (5, ((tensor(1.),), 3))
    """

    def __init__(self, datasets: Sequence[Dataset[Any]]) -> None:
        self.whole: ConcatDataset[Any] = ConcatDataset(datasets)

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.whole[index], index


class MixtureSampler(Sampler[int]):
    """Indices into a :class:`torch.utils.data.ConcatDataset` of the sources, for ``DataLoader(..., sampler=...)``.

    Args:
        sizes: Rows of each source, in order; or the sources' data sets themselves.
        mixture: What :func:`dyntune.suggest_mixture` found; or shares that add up to one.
        batch_size: Rows of a batch, the same as the DataLoader's.
        weights: Of the sources in the objective, where `mixture` is shares alone. Default like the sizes.
        sampling: Likewise; default ``"stratified"``.
        num_samples: Indices of one pass, rounded up to whole batches; default the rows of all sources.
        seed: Of everything that is drawn; the global random state is not used.

    Raises:
        InvalidArgumentError: A source without rows, shares or weights that do not add up to one, or a source with a
            weight and no share, whose rows could stand for nothing.

    Accuracy: unbiased for the weighted mean; ``tests/training/test_mixture_sampler.py``.
    Assumes: batches of ``batch_size`` consecutive indices (the DataLoader's own batching, ``drop_last`` or not).

    Example:
        >>> sampler = MixtureSampler([100, 10], [0.75, 0.25], batch_size=4, weights=[0.5, 0.5], num_samples=8)
        >>> batch = list(sampler)[:4]
        >>> sorted(i >= 100 for i in batch), sampler.importance(batch).sum().item()
        ([False, False, False, True], 4.0)
    """

    def __init__(
        self,
        sizes: Sequence[int | Sized],
        mixture: Mixture | Sequence[float],
        *,
        batch_size: int,
        weights: Sequence[float] | None = None,
        sampling: Sampling | None = None,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        self.sizes = tuple(n if isinstance(n, int) else len(n) for n in sizes)
        if not self.sizes or min(self.sizes) < 1:
            raise InvalidArgumentError(f"sizes={self.sizes}: every source has a row at least. Leave empty ones out.")
        if batch_size < 1 or (num_samples is not None and num_samples < 1):
            raise InvalidArgumentError(f"batch_size={batch_size}, num_samples={num_samples}: both are 1 or more.")
        given = mixture if isinstance(mixture, Mixture) else None
        if weights is None:
            weights = given.weights if given else [n / sum(self.sizes) for n in self.sizes]
        self.weights = checked_weights(weights, len(self.sizes))
        self.sampling: Sampling = sampling or (given.sampling if given else "stratified")
        if self.sampling not in ("stratified", "multinomial"):
            raise InvalidArgumentError(f'sampling={self.sampling!r}: it is "stratified" or "multinomial".')
        self.batch_size, self.seed = batch_size, seed
        self.num_samples = sum(self.sizes) if num_samples is None else num_samples
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._batches = 0
        self._taken = [0] * len(self.sizes)
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}
        self._drawn: OrderedDict[bytes, tuple[float, ...]] = OrderedDict()
        self.proportions: tuple[float, ...] = ()
        self.update(mixture)

    def update(self, mixture: Mixture | Sequence[float]) -> None:
        """Draw in other proportions from the next batch on; batches already drawn keep their weights.

        Raises:
            InvalidArgumentError: As for the class, or a refused mixture.
        """
        shares = mixture.proportions if isinstance(mixture, Mixture) else mixture
        if shares is None:
            raise InvalidArgumentError("the mixture was refused and has no proportions: keep the present ones.")
        found = checked_floors(shares, len(self.sizes))
        # 1e-6: shares that were written down with six digits.
        if abs(found.sum() - 1) > 1e-6:
            raise InvalidArgumentError(f"proportions={list(shares)} add up to {found.sum():.6g}: shares add up to one.")
        unseen = [i for i, (p, w) in enumerate(zip(found, self.weights, strict=True)) if p == 0 and w > 0]
        if unseen:
            raise InvalidArgumentError(
                f"source {unseen[0]} has weight {self.weights[unseen[0]]:.4g} and share 0: no importance weight makes "
                "up for rows that never come. Give it a share, or no weight."
            )
        self.proportions = tuple((found / found.sum()).tolist())

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        for _ in range(len(self) // self.batch_size):
            yield from self.next_batch()

    def next_batch(self) -> list[int]:
        """The next batch's indices, in random order."""
        rng = np.random.default_rng(stream_seed(self.seed, 0, self._batches))
        sources = self._sources(rng)
        self._batches += 1
        indices = [self._next_row(int(i)) for i in sources]
        self._drawn[_key(indices)] = self.proportions
        while len(self._drawn) > REMEMBERED:
            self._drawn.popitem(last=False)
        return indices

    def _sources(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Which source each row of a batch comes from."""
        ends = np.cumsum(self.proportions)
        ends[-1] = 1.0
        if self.sampling == "multinomial":
            return np.searchsorted(ends, rng.random(self.batch_size), side="right")
        # Equally spaced points on [0, 1): their start decides who gets the rows that are left over. The order of the
        # sources is drawn, too, or neighbours would share theirs in every batch.
        order = rng.permutation(len(self.sizes))
        ends = np.cumsum(np.array(self.proportions)[order])
        ends[-1] = 1.0
        points = (np.arange(self.batch_size) + rng.random()) / self.batch_size
        return rng.permutation(order[np.searchsorted(ends, points, side="right")])

    def _next_row(self, source: int) -> int:
        size = self.sizes[source]
        epoch, place = divmod(self._taken[source], size)
        self._taken[source] += 1
        if self._orders.get(source, (-1,))[0] != epoch:
            order = np.random.default_rng(stream_seed(self.seed, 1, source, epoch)).permutation(size)
            self._orders[source] = epoch, order
        return int(self._starts[source] + self._orders[source][1][place])

    def sources_of(self, indices: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Which source each index belongs to. Shape (n,), int64.

        Raises:
            InvalidArgumentError: An index outside all sources.
        """
        asked = np.asarray(indices, dtype=np.int64)
        if asked.ndim != 1 or not asked.size or asked.min() < 0 or asked.max() >= self._starts[-1]:
            raise InvalidArgumentError(f"indices of shape {asked.shape}: one or more from 0 to {self._starts[-1] - 1}.")
        return torch.from_numpy(np.searchsorted(self._starts, asked, side="right") - 1)

    def importance(self, indices: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """What each row of one batch counts: ``(sampler.importance(indices) * losses).mean()`` is unbiased.

        Args:
            indices: Of a whole batch as it was drawn, in order.

        Returns:
            Shape (n,), float32. Batches drawn before an :meth:`update` have the weights that they were drawn with.

        Raises:
            InvalidArgumentError: As for :meth:`sources_of`.
        """
        sources = self.sources_of(indices).numpy()
        shares = np.array(self._drawn.get(_key(indices), self.proportions))
        weights, counts = np.array(self.weights), np.bincount(sources, minlength=len(self.sizes))
        each = np.divide(weights, shares, out=np.zeros_like(weights), where=shares > 0)
        if self.sampling == "stratified":
            # 1e-9: p B = 1 up to rounding, such as 0.2 * 5. Whoever has a row for certain has its weight whole.
            certain = (shares * len(sources) >= 1 - 1e-9) & (counts > 0)
            each[certain] = weights[certain] * len(sources) / counts[certain]
        return torch.from_numpy(each[sources]).float()

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON types: how much was drawn (prefetched batches included), the seed and the shares."""
        return {
            "seed": self.seed,
            "batches": self._batches,
            "taken": list(self._taken),
            "proportions": list(self.proportions),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken.

        Raises:
            InvalidArgumentError: A state of other sources.
        """
        if len(state["taken"]) != len(self.sizes):
            raise InvalidArgumentError(f"the state is of {len(state['taken'])} sources; there are {len(self.sizes)}.")
        self.update(state["proportions"])
        self.proportions = tuple(state["proportions"])  # to the last bit
        self.seed, self._batches = int(state["seed"]), int(state["batches"])
        self._taken = [int(n) for n in state["taken"]]
        self._orders.clear()


def _key(indices: Sequence[int] | torch.Tensor) -> bytes:
    return np.asarray(indices, dtype=np.int64).tobytes()

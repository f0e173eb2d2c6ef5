r"""What attention does, per module and head: logits, entropy, collapsed rows, mass on the first token.

Fused kernels return neither logits nor probabilities. Both are computed again from the queries and keys that a kernel
was given, in blocks of bounded size, with the same scale, masks and grouping of heads; where a model makes its logits
itself (the math kernel, ``nn.MultiheadAttention`` with weights, "eager" implementations), those are read as they enter
the softmax. With logits z over the keys that a query may attend to, and :math:`t = z - \max z`,

.. math:: H = \log \sum_j e^{t_j} - \frac{\sum_j t_j e^{t_j}}{\sum_j e^{t_j}} ,

which does not lose digits to large logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from dyntune.dynamics.operations import OperationReader, Operations
from dyntune.dynamics.scores import DenseScores, FusedScores, Scores
from dyntune.errors import InvalidArgumentError, UnreadableModelError
from dyntune.numerics.arithmetic import plain_arithmetic
from dyntune.objective.losses import LossFunction
from dyntune.objective.passes import ForwardPasses
from dyntune.objective.running import RunningModules

__all__ = ["COLLAPSED", "AttentionReader", "AttentionStatistics", "HeadStatistics", "attention_statistics"]

# A row counts as collapsed below this share of the largest entropy it could have: about one key out of a hundred.
COLLAPSED = 0.1
MEMORY_LIMIT = 1 << 26
# Tensors as large as a block of logits that are alive at a time, their masks included.
TEMPORARIES = 6

_FUSED = {
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
}
_SOFTMAX = {"_softmax", "_safe_softmax"}
_PRODUCTS = {"bmm", "baddbmm"}
# What happens to logits between the product of queries and keys and the softmax: scales, masks, biases, caps, shapes.
_CARRIED = {
    *(
        "add",
        "add_",
        "sub",
        "sub_",
        "mul",
        "mul_",
        "div",
        "div_",
        "neg",
        "tanh",
        "tanh_",
        "clamp",
        "clamp_",
        "clamp_min",
    ),
    *(
        "where",
        "masked_fill",
        "masked_fill_",
        "copy_",
        "_to_copy",
        "clone",
        "detach",
        "alias",
        "cat",
        "constant_pad_nd",
    ),
    *("view", "_unsafe_view", "expand", "permute", "transpose", "squeeze", "unsqueeze", "slice", "select", "split"),
}


@dataclass(frozen=True, kw_only=True)
class HeadStatistics:
    """One attention module. Every tuple has one entry per head; means give every row of the batches the same weight.

    Args:
        max_logit: Largest logit on an allowed key, as it enters the softmax: scaled, finite biases included.
        entropy: Mean entropy of the queries' distributions over keys, in nats.
        entropy_error: Its standard error over rows of the batches; NaN for one row.
        relative_entropy: Mean of the entropy over the logarithm of the number of allowed keys, in [0, 1].
        collapsed: Share of queries whose relative entropy is below ``COLLAPSED``.
        first_token: Mean probability on the first key that is not padding, over queries that may attend to it.
        first_token_if_uniform: What `first_token` would be if all allowed keys had the same probability.
        queries: How many queries of each head were counted: those with two or more allowed keys that are not padding.
        rows: How many rows they are of.
    """

    max_logit: tuple[float, ...]
    entropy: tuple[float, ...]
    entropy_error: tuple[float, ...]
    relative_entropy: tuple[float, ...]
    collapsed: tuple[float, ...]
    first_token: tuple[float, ...]
    first_token_if_uniform: tuple[float, ...]
    queries: int
    rows: int

    @property
    def heads(self) -> int:
        """How many heads there are."""
        return len(self.max_logit)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; NaN and infinity become None."""
        return {
            name: [x if math.isfinite(x) else None for x in item] if isinstance(item, tuple) else item
            for name, item in asdict(self).items()
        }


class AttentionStatistics(dict[str, HeadStatistics]):
    """Statistics by qualified name of the attention module, in the order of their first calls."""

    @property
    def max_logit(self) -> float:
        """The largest of all heads; NaN where a logit is."""
        every = [x for module in self.values() for x in module.max_logit]
        return math.nan if any(math.isnan(x) for x in every) else max(every)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {name: module.to_dict() for name, module in self.items()}


def attention_statistics(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    num_batches: int | Literal["all"] = 16,
    autocast: torch.dtype | None = None,
    memory_limit: int = MEMORY_LIMIT,
    seed: int = 0,
) -> AttentionStatistics:
    """Largest logit, entropy, collapsed rows and mass on the first token of every attention head.

    The model runs forward once per batch, in its present mode, without gradients. No hook is attached and no kernel is
    exchanged, except that torch's opaque fast path for encoder layers in eval mode is taken apart, and compiled code
    runs eagerly. Growing logits with falling entropy precede divergence; a low entropy alone may be a healthy, sharp
    head. Published marks: QK-Clip acts on logits of 100; logits of 1e4 have diverged.

    Args:
        model: Any module that attends through ``scaled_dot_product_attention``, ``nn.MultiheadAttention`` or its own
            batched product and softmax. DDP and ``torch.compile`` wrappers are looked through.
        batches: As for :func:`dyntune.hessian`; of a pair the second element (the targets) is not used.
        loss_fn: ``(model, batch) -> anything``: how the model is called, where it is not ``model(inputs)``.
        num_batches: How many batches to draw from a loader.
        autocast: Dtype of mixed precision, as in training.
        memory_limit: Bytes that our blocks of logits may take at a time; a single query and head take what they take.
        seed: Seed of dropout, which does not touch the probabilities of its own layer.

    Returns:
        Statistics by module. A query counts where it has two or more allowed keys; keys that are barred to all queries
        are padding, and so is, in self-attention, the query at their place. An additive mask bars at -1e4 and below.
        A head with logits of NaN or plus infinity has NaN.

    Raises:
        UnreadableModelError: No attention was seen, or an operation that hides its logits (flex or packed attention).
        InvalidArgumentError: `memory_limit` is not positive; a model without parameters; a sharded model.
        BatchError: See the batch grammar.

    Accuracy:
        Logits are computed in float32 (float64 for a model in float64) from the queries and keys that the kernel got,
        so that half precision rounds those but not the logits. Against a dense softmax in float64: see
        ``tests/dynamics/test_attention.py``. The largest logit is that of these batches, a lower bound for others.
    Cost:
        One forward pass per batch, and as many operations as the attention's own logits, several times over: see
        ``benchmarks/tier2.py``. One device synchronisation per module at the end.
    Source:
        Zhai et al. (2023), arXiv:2303.06296 (entropy collapse); Wortsman et al. (2023), arXiv:2309.14322 (growth of
        logits); Kimi Team (2025), arXiv:2507.20534 (QK-Clip); Xiao et al. (2023), arXiv:2309.17453 (first token).

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> with torch.no_grad():
        ...     _ = layer.self_attn.in_proj_weight.zero_()
        >>> found = attention_statistics(layer, torch.randn(4, 5, 8))
        >>> [round(h, 4) for h in found["self_attn"].entropy], round(math.log(5), 4)
        ([1.6094, 1.6094], 1.6094)
    """
    if memory_limit <= 0:
        raise InvalidArgumentError(f"memory_limit={memory_limit!r}: blocks of logits take a positive number of bytes.")
    passes = ForwardPasses(model, batches, loss_fn, num_batches=num_batches, autocast=autocast, seed=seed)
    reader = AttentionReader(passes.model, memory_limit)
    passes.run(reading=Operations([reader], passes.batches))
    found = reader.read()
    if not found:
        raise UnreadableModelError(
            "no attention was seen in the forward pass: neither scaled_dot_product_attention nor a softmax over a "
            "batched product of queries and keys. Does the model attend at all, and in PyTorch operations? With "
            'transformers, model.set_attn_implementation("sdpa") makes it readable.'
        )
    return found


class AttentionReader(OperationReader):
    """Sees the logits of every attention module in forward passes, where Python functions are taken apart.

    Args:
        model: The model.
        memory_limit: See :func:`attention_statistics`.
    """

    def __init__(self, model: nn.Module, memory_limit: int = MEMORY_LIMIT) -> None:
        self._tallies: dict[str, _Tally] = {}
        self._model, self._running, self._limit = model, RunningModules(model), memory_limit
        self._weights: set[int] = set()
        self._products = WeakTensorKeyDictionary()

    def read(self) -> AttentionStatistics:
        """The statistics so far; empty where no attention was seen."""
        return AttentionStatistics({name: tally.read() for name, tally in self._tallies.items()})

    def begin(self, batch: Any) -> None:  # noqa: ARG002 - the reader's interface
        """See :class:`OperationReader`."""
        # A product with a weight is a layer, not queries times keys. Copies may stand in for the weights of this pass.
        self._weights = {p.untyped_storage().data_ptr() for p in self._model.parameters()}

    def wants(self, name: str, func: Any) -> bool:
        """See :class:`OperationReader`."""
        known = name in _FUSED or name in _SOFTMAX or name in _PRODUCTS or name in _CARRIED
        return known or _hides_logits(name, func)

    def before(self, name: str, func: Any, args: Any, kwargs: Any) -> None:
        """See :class:`OperationReader`."""
        if name in _FUSED:
            self._note(FusedScores.of({**_by_name(func, args), **kwargs}))
        elif name in _SOFTMAX:
            self._softmax(*args[:2])
        elif _hides_logits(name, func):
            raise UnreadableModelError(
                f"module {self._running.innermost()[0]!r} attends by {func}, which hides its queries and keys. Let it "
                'use scaled_dot_product_attention; with transformers: model.set_attn_implementation("sdpa").'
            )

    def after(self, name: str, args: Any, result: Any, noted: Any) -> None:  # noqa: ARG002 - the reader's interface
        """See :class:`OperationReader`."""
        if name in _PRODUCTS:
            if not any(t.untyped_storage().data_ptr() in self._weights for t in args if isinstance(t, torch.Tensor)):
                self._products[result] = True
        elif name in _CARRIED and self._is_product(args):
            for tensor in result if isinstance(result, (list, tuple)) else (result,):
                self._products[tensor] = True

    def _is_product(self, args: Any) -> bool:
        return any(
            t in self._products if isinstance(t, torch.Tensor) else isinstance(t, (list, tuple)) and self._is_product(t)
            for t in args
        )

    def _softmax(self, logits: torch.Tensor, dim: int) -> None:
        if logits in self._products and dim % logits.dim() == logits.dim() - 1:
            self._note(DenseScores(logits))

    def _note(self, scores: Scores) -> None:
        name, module = self._running.innermost()
        if isinstance(module, nn.MultiheadAttention):
            scores = scores.with_heads(module.num_heads)
        tally = self._tallies.setdefault(name, _Tally(scores.shape[1]))
        if tally.heads != scores.shape[1]:
            tally = self._tallies.setdefault(f"{name} ({scores.shape[1]} heads)", _Tally(scores.shape[1]))
        with plain_arithmetic(scores.device), torch.no_grad():
            tally.update(scores, self._limit)


def _hides_logits(name: str, func: Any) -> bool:
    return name not in _FUSED and ("attention" in name or "flash_attn" in str(func))


def _by_name(func: Any, args: Any) -> Mapping[str, Any]:
    return {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}


# Sums over rows of the batches of the row's means over queries.
_ENTROPY, _RELATIVE, _COLLAPSED, _FIRST, _UNIFORM = range(5)


class _Tally:
    """Sums of one module, on the device until they are read."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self._largest: list[torch.Tensor] = []
        self._means: list[torch.Tensor] = []  # each (5, rows, heads)
        self._queries: list[torch.Tensor] = []

    def update(self, scores: Scores, limit: int) -> None:
        """Take in one call of the module."""
        rows, heads, _, _ = scores.shape
        exact = torch.float32 if scores.device.type == "mps" else torch.float64
        kept, first = scores.kept()
        sums = torch.zeros(5, rows, heads, dtype=exact, device=scores.device)
        counts = torch.zeros(2, rows, heads, dtype=exact, device=scores.device)
        largest = torch.full((heads,), -math.inf, dtype=exact, device=scores.device)
        for b, h, q in _blocks(scores, limit):
            z = scores.block(b, h, q)
            peak, values, weights = _rows(z, kept[b, None, q], first[b])
            largest[h] = torch.maximum(largest[h], peak.to(exact))
            sums[:, b, h] += values.sum(-1, dtype=exact)
            counts[:, b, h] += weights.sum(-1, dtype=exact)
        self._largest.append(largest)
        self._means.append(torch.cat([sums[:_FIRST] / counts[0], sums[_FIRST:] / counts[1]]))
        self._queries.append(counts[0].sum() / heads)

    def read(self) -> HeadStatistics:
        """The statistics."""
        means = torch.cat(self._means, dim=1).to("cpu", torch.float64)
        # 0 / 0 where a row has no query that counts (or none that may attend to the first key); NaN stays NaN.
        known = ~torch.cat([s.isnan() for s in self._means], dim=1).cpu()
        poisoned = ~(torch.stack(self._largest) < math.inf).all(0).cpu()
        number = known.sum(1)
        mean = means.nan_to_num(0.0).sum(1) / number
        spread = ((means[_ENTROPY] - mean[_ENTROPY]).nan_to_num(0.0) ** 2).sum(0)
        error = (spread / (number[_ENTROPY] - 1).clamp_min(0) / number[_ENTROPY]).sqrt()
        mean[:, poisoned], error[poisoned] = math.nan, math.nan
        columns = [tuple(column.tolist()) for column in mean]
        return HeadStatistics(
            max_logit=tuple(torch.stack(self._largest).amax(0).tolist()),
            entropy=columns[_ENTROPY],
            entropy_error=tuple(error.tolist()),
            relative_entropy=columns[_RELATIVE],
            collapsed=columns[_COLLAPSED],
            first_token=columns[_FIRST],
            first_token_if_uniform=columns[_UNIFORM],
            queries=int(torch.stack(self._queries).sum()),
            rows=int(number[_ENTROPY].max()),
        )


def _blocks(scores: Scores, limit: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts of rows, heads and queries whose logits, with all temporaries, stay below `limit` bytes."""
    rows, heads, queries, keys = scores.shape
    room = max(1, limit // (TEMPORARIES * max(1, keys) * scores.dtype.itemsize))  # queries at a time
    q = min(queries, room)
    h = min(heads, max(1, room // max(1, q)))
    b = min(rows, max(1, room // max(1, q * h)))
    for i, j, k in product(range(0, rows, b or 1), range(0, heads, h or 1), range(0, queries, q or 1)):
        yield slice(i, min(i + b, rows)), slice(j, min(j + h, heads)), slice(k, min(k + q, queries))


def _rows(z: torch.Tensor, kept: torch.Tensor, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest logit per head; statistics of each query, zero where it does not count; which count for which.

    Args:
        z: Logits, minus infinity where barred. Shape (rows, heads, queries, keys).
        kept: Which queries are not padding. Shape (rows, 1, queries).
        first: The first key that is not padding. Shape (rows,).

    Returns:
        Shapes (heads,), (5, rows, heads, queries), (2, rows, heads, queries).
    """
    barred = z == -math.inf
    allowed = z.shape[-1] - barred.sum(-1)
    peak = z.amax(-1)
    shifted = (z - peak[..., None]).masked_fill_(barred, 0.0)
    powers = shifted.exp().masked_fill_(barred, 0.0)
    total = powers.sum(-1)
    at_first = first[:, None, None, None].expand(*z.shape[:-1], 1)
    mass = powers.gather(-1, at_first)[..., 0] / total
    entropy = total.log() - shifted.mul_(powers).sum(-1) / total
    counts = kept & (allowed >= 2)
    sees_first = counts & ~barred.gather(-1, at_first)[..., 0]
    relative = entropy / allowed.clamp_min(2).to(z.dtype).log()
    values = torch.stack([entropy, relative, (relative < COLLAPSED).to(z.dtype), mass, 1 / allowed.to(z.dtype)])
    weights = torch.stack([counts, sees_first])
    values = values.masked_fill(~weights[[0, 0, 0, 1, 1]], 0.0)
    heads_first = peak.masked_fill(~kept, -math.inf).transpose(0, 1).flatten(1)
    return heads_first.amax(-1), values, weights

r"""Which weights belong to which attention head, and how strongly each head can score: :func:`find_attention`.

Libraries keep queries, keys and values in one matrix or in three, as rows or as columns, head after head or kind after
kind; in all of them the weights of one head are one run of rows or columns. The logits of head h before scaling are
:math:`x^T W_{Q,h}^T W_{K,h}\, y`, so that :math:`\|W_{Q,h}^T W_{K,h}\|_2` bounds them by the lengths of x and y.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError, UnreadableModelError

__all__ = ["AttentionWeights", "Run", "find_attention", "qk_norms"]

HEADS = ("num_heads", "n_head", "num_attention_heads", "nhead", "n_heads", "heads")
HEAD_DIM = ("head_dim", "attention_head_size", "attn_head_dim", "head_size", "key_value_proj_dim", "d_kv")
QUERY = ("q_proj", "query", "q", "to_q", "q_lin", "wq", "linear_q")
KEY = ("k_proj", "key", "k", "to_k", "k_lin", "wk", "linear_k")
VALUE = ("v_proj", "value", "v", "to_v", "v_lin", "wv", "linear_v")
OUTPUT = ("out_proj", "o_proj", "c_proj", "to_out", "proj", "dense", "out_lin", "wo", "o", "output")
# Queries of all heads, then keys, then values.
IN_TURN = ("qkv", "qkv_proj", "c_attn", "in_proj", "Wqkv", "to_qkv")
# Query, key and value of the first head, then of the second: GPT-NeoX, BLOOM.
INTERLEAVED = ("query_key_value",)


@dataclass(frozen=True)
class Run:
    """Consecutive rows or columns of a parameter.

    Args:
        parameter: Qualified name.
        start: First of them.
        stop: One past the last.
        dim: 0 for rows (``nn.Linear``), 1 for columns (transformers' ``Conv1D``, and what follows a head in `output`).
    """

    parameter: str
    start: int
    stop: int
    dim: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of such a tensor; a view."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """The weights of one attention module, head by head.

    Args:
        head_dim: Width of a query.
        query: One run for each head.
        key: One for each head of keys and values; fewer than queries have where groups of them share one.
        value: Likewise.
        output: What takes in each head's result, one run for each head of queries; empty where it is in another module.
    """

    head_dim: int
    query: tuple[Run, ...]
    key: tuple[Run, ...]
    value: tuple[Run, ...]
    output: tuple[Run, ...]

    @property
    def heads(self) -> int:
        """Of queries."""
        return len(self.query)

    def key_of(self, head: int) -> Run:
        """The keys that a head of queries meets."""
        return self.key[head * len(self.key) // self.heads]


def find_attention(model: nn.Module, *, names: Iterable[str] | None = None) -> dict[str, AttentionWeights]:
    """The attention modules of a model with the weights of each of their heads.

    Found are ``nn.MultiheadAttention``, and modules with one projection for queries, keys and values or one for each,
    under the names that transformers, timm, diffusers and many handwritten models give them, and with a number of heads
    or a width of heads in the module or in its ``config``. Query heads may share keys (grouped-query attention), and
    the width of a head need not be the width of the model over their number.

    Args:
        model: Any module; DDP and compiled wrappers are looked through.
        names: Qualified names of the modules to read; None: all that are found. Each of these has to be one.

    Returns:
        By qualified name, in the model's order; empty where there is none.

    Raises:
        UnreadableModelError: A module of `names` whose projections are not known, or with sizes that do not add up.
        InvalidArgumentError: A name that is no module's.

    Example:
        >>> found = find_attention(nn.TransformerEncoderLayer(8, 2, 16))
        >>> {name: (module.heads, module.head_dim) for name, module in found.items()}
        {'self_attn': (2, 4)}
    """
    model = _unwrapped(model)
    wanted = None if names is None else set(names)
    modules = dict(model.named_modules())
    if wanted is not None and (missing := wanted - set(modules)):
        raise InvalidArgumentError(
            f"names has {sorted(missing)[0]!r}, which is no module of the model. Its modules are named in "
            "model.named_modules()."
        )
    parameters = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    found: dict[str, AttentionWeights] = {}
    for name, module in modules.items():
        if wanted is not None and name not in wanted:
            continue
        weights = _read(name, module, parameters)
        if weights is not None:
            found[name] = weights
        elif wanted is not None:
            raise UnreadableModelError(
                f"module {name!r} ({type(module).__name__}) has no projections of queries and keys under a known name "
                f"({', '.join((*QUERY, *IN_TURN, *INTERLEAVED))}), or says neither how many heads it has nor how wide "
                "they are."
            )
    return found


def qk_norms(model: nn.Module, *, names: Iterable[str] | None = None) -> dict[str, tuple[float, ...]]:
    r"""Spectral norm of :math:`W_{Q,h}^T W_{K,h}` of every head, before the scale of the logits.

    Args:
        model: As for :func:`find_attention`.
        names: See there.

    Returns:
        By module, one number for each head of queries. Norms of queries and keys inside the module (QK-norm), rotations
        and biases are not part of it.

    Raises:
        UnreadableModelError: No attention was found, or see :func:`find_attention`.

    Cost:
        Two QR factorisations of d x d_h and the singular values of a d_h x d_h matrix for each head, in float64 on the
        CPU; never a d x d matrix.
    Source:
        Zhai et al. (2023), arXiv:2303.06296, bound the entropy of attention from below by this norm.

    Example:
        >>> layer = nn.MultiheadAttention(4, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.in_proj_weight.copy_(torch.eye(4).repeat(3, 1))
        >>> qk_norms(layer)
        {'': (1.0, 1.0)}
    """
    found = find_attention(model, names=names)
    if not found:
        raise UnreadableModelError(
            "no attention module was found by its parts: dyntune.dynamics.attention_weights.find_attention says which "
            "are known."
        )
    tensors = dict(_unwrapped(model).named_parameters(remove_duplicate=False))
    return {name: tuple(_norm(tensors, w.query[h], w.key_of(h)) for h in range(w.heads)) for name, w in found.items()}


def _norm(tensors: dict[str, nn.Parameter], query: Run, key: Run) -> float:
    factors = []
    for run in (query, key):
        part = run.of(tensors[run.parameter].detach()).to("cpu", torch.float64)
        factors.append(torch.linalg.qr(part.T if run.dim == 0 else part)[1])  # of (d, d_h): the rest is orthonormal
    return float(torch.linalg.matrix_norm(factors[0] @ factors[1].T, 2))


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _read(name: str, module: nn.Module, parameters: dict[int, str]) -> AttentionWeights | None:
    """The weights of one module; None where it is no attention that is known."""
    if isinstance(module, nn.MultiheadAttention):
        return _torch(module, parameters)
    query, key, value = (_child(module, names) for names in (QUERY, KEY, VALUE))
    fused, interleaved = _child(module, IN_TURN), _child(module, INTERLEAVED)
    first = query if query is not None and key is not None and value is not None else fused or interleaved
    if first is None:
        return None
    heads, dim = _number(module, HEADS), _number(module, HEAD_DIM)
    if heads is None and dim is None:
        return None
    rows = _out(first)
    if first is query and key is not None and value is not None:
        dim = dim if dim is not None and rows % dim == 0 else _divided(name, rows, heads)
        sizes = rows, _out(key), _out(value)
        starts = (parameters[id(query.weight)], 0), (parameters[id(key.weight)], 0), (parameters[id(value.weight)], 0)
        steps = dim, dim, dim
    else:
        parameter = parameters[id(first.weight)]
        kv_heads = _number(module, ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")) or heads
        if heads is None or kv_heads is None:
            return None
        dim = _divided(name, rows, heads + 2 * kv_heads)
        sizes = heads * dim, kv_heads * dim, kv_heads * dim
        if interleaved is not None and first is interleaved:
            starts, steps = ((parameter, 0), (parameter, dim), (parameter, 2 * dim)), (3 * dim,) * 3
            if heads != kv_heads:
                raise UnreadableModelError(
                    f"module {name!r} interleaves {heads} heads of queries with {kv_heads} of keys: how is not known."
                )
        else:
            starts, steps = ((parameter, 0), (parameter, sizes[0]), (parameter, sizes[0] + sizes[1])), (dim,) * 3
    if any(size % dim for size in sizes) or sizes[0] // dim % max(1, sizes[1] // dim):
        raise UnreadableModelError(
            f"module {name!r} has queries, keys and values of sizes {sizes} for heads of width {dim}, which does "
            "not divide them."
        )
    across = 1 if _transposed(first) else 0
    runs = [
        tuple(Run(parameter, at + h * step, at + h * step + dim, across) for h in range(size // dim))
        for (parameter, at), step, size in zip(starts, steps, sizes, strict=True)
    ]
    output = _child(module, OUTPUT)
    return AttentionWeights(
        head_dim=dim,
        query=runs[0],
        key=runs[1],
        value=runs[2],
        output=() if output is None else _taking_in(output, parameters, dim, len(runs[0])),
    )


def _torch(module: nn.MultiheadAttention, parameters: dict[int, str]) -> AttentionWeights:
    width, dim = module.embed_dim, module.head_dim
    starts: list[tuple[Any, int]] = [(module.in_proj_weight, i * width) for i in range(3)]
    if not module._qkv_same_embed_dim:  # keys or values of another width have matrices of their own
        starts = [(w, 0) for w in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)]
    runs = [
        tuple(Run(parameters[id(w)], at + h * dim, at + (h + 1) * dim, 0) for h in range(module.num_heads))
        for w, at in starts
    ]
    output = _taking_in(module.out_proj, parameters, dim, module.num_heads)
    return AttentionWeights(head_dim=dim, query=runs[0], key=runs[1], value=runs[2], output=output)


def _taking_in(layer: nn.Module, parameters: dict[int, str], dim: int, heads: int) -> tuple[Run, ...]:
    """The weights that take in each head's result; none where the layer does not take in all of them."""
    weight: Any = layer.weight
    across = 0 if _transposed(layer) else 1
    if weight.shape[across] != heads * dim:
        return ()
    return tuple(Run(parameters[id(weight)], h * dim, (h + 1) * dim, across) for h in range(heads))


def _child(module: nn.Module, names: Sequence[str]) -> Any:
    """The first child of one of these names that has a matrix for a weight; of a sequence, its first layer."""
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, (nn.Sequential, nn.ModuleList)) and len(child):
            child = child[0]
        weight = getattr(child, "weight", None)
        if isinstance(child, nn.Module) and isinstance(weight, nn.Parameter) and weight.dim() == 2:
            return child
    return None


def _transposed(layer: nn.Module) -> bool:
    """Whether a layer keeps inputs as rows, as transformers' Conv1D does."""
    return type(layer).__name__ == "Conv1D"


def _out(layer: Any) -> int:
    return int(layer.weight.shape[1 if _transposed(layer) else 0])


def _number(module: nn.Module, names: Sequence[str]) -> int | None:
    """The first of these that the module, or its config, has as a positive whole number."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _divided(name: str, rows: int, parts: int | None) -> int:
    if parts is None or rows % parts:
        raise UnreadableModelError(f"module {name!r} projects to {rows} values, which {parts} heads do not divide.")
    return rows // parts

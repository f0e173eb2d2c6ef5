"""Attention statistics against a dense softmax in float64, whatever kernel or implementation computes the attention."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dyntune
from dyntune.dynamics.attention import COLLAPSED
from dyntune.dynamics.scores import BARRED
from dyntune.errors import InvalidArgumentError, UnreadableModelError
from tests.objective.snapshot import changes, snapshot
from tests.objective.zoo import made, rows

EPS = torch.finfo(torch.float32).eps
FIELDS = ("max_logit", "entropy", "relative_entropy", "collapsed", "first_token", "first_token_if_uniform")


def dense(logits: torch.Tensor, allowed: torch.Tensor, padding: torch.Tensor | None = None) -> Any:
    """The definitions in NumPy, query by query.

    Args:
        logits: Shape (rows, heads, queries, keys), without masks.
        allowed: Same shape.
        padding: Which positions are padding. Shape (rows, positions).
    """
    z, ok = logits.detach().double().numpy(), allowed.numpy()
    n, heads, queries, _ = z.shape
    pad = np.zeros((n, z.shape[3]), dtype=bool) if padding is None else padding.numpy()
    found: dict[str, list[float]] = {name: [] for name in FIELDS}
    for h in range(heads):
        means: list[list[float]] = [[], [], [], [], []]
        largest = -math.inf
        for b in range(n):
            own: list[list[float]] = [[], [], [], [], []]
            first = int(np.argmin(pad[b]))
            for q in range(queries):
                if queries == z.shape[3] and pad[b, q]:
                    continue
                keys = np.flatnonzero(ok[b, h, q])
                if len(keys) == 0:
                    continue
                row = z[b, h, q, keys]
                largest = max(largest, row.max())
                if len(keys) < 2:
                    continue
                p = np.exp(row - row.max())
                p /= p.sum()
                entropy = -sum(x * math.log(x) for x in p if x > 0)
                share = entropy / math.log(len(keys))
                for values, value in zip(own[:3], (entropy, share, float(share < COLLAPSED)), strict=True):
                    values.append(value)
                if first in keys:
                    own[3].append(p[list(keys).index(first)])
                    own[4].append(1 / len(keys))
            for values, mine in zip(means, own, strict=True):
                if mine:
                    values.append(float(np.mean(mine)))
        for name, value in zip(FIELDS, (largest, *map(np.mean, means)), strict=True):
            found[name].append(float(value))
    return SimpleNamespace(**found)


def agree(found: Any, truth: Any, *, rtol: float = 100 * EPS, scale: float = 1.0) -> None:
    """Sums of a few hundred terms in float32; entropies lose what the logits' rounding, `scale` times eps, moves."""
    for name in FIELDS:
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=rtol, abs=100 * EPS * scale), name


class Attend(nn.Module):
    """Attention by ``scaled_dot_product_attention``; the queries and keys are kept for the oracle."""

    def __init__(self, heads: int = 4, groups: int = 4, width: int = 8, *, gain: float = 3.0, **options: Any) -> None:
        super().__init__()
        self.heads, self.groups, self.width, self.options = heads, groups, width, options
        self.q, self.k = nn.Linear(6, heads * width), nn.Linear(6, groups * width)
        self.gain = gain

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n, length = x.shape[:2]
        q = self.gain * self.q(x).view(n, length, self.heads, self.width).transpose(1, 2)
        return q, self.k(x).view(n, length, self.groups, self.width).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.split(x)
        return F.scaled_dot_product_attention(q, k, k, enable_gqa=self.heads != self.groups, **self.options)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        twin = copy.deepcopy(self).double()
        q, k = twin.split(x.double())
        scale = self.options.get("scale") or self.width**-0.5
        return (q @ k.repeat_interleave(self.heads // self.groups, 1).transpose(-1, -2) * scale).detach()


X = rows(3, 7, 6)
CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()


def allowed(mask: torch.Tensor, heads: int = 4) -> torch.Tensor:
    return mask.expand(3, heads, 7, 7)


def only(model: nn.Module, batches: Any = X, **options: Any) -> Any:
    (found,) = dyntune.attention_statistics(model, batches, **options).values()
    return found


KEEP = torch.ones(3, 7, dtype=torch.bool)
KEEP[1, :3] = False  # padded on the left
KEEP[2, 5:] = False
PADDED = KEEP[:, None, None, :] & CAUSAL


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(
    ("options", "mask", "padding"),
    [
        ({}, torch.ones(7, 7, dtype=torch.bool), None),
        ({"is_causal": True}, CAUSAL, None),
        ({"scale": 0.7}, torch.ones(7, 7, dtype=torch.bool), None),
        ({"attn_mask": PADDED}, PADDED, ~KEEP),
        ({"attn_mask": torch.zeros(3, 1, 7, 7).masked_fill(~PADDED, -math.inf)}, PADDED, ~KEEP),
        ({"attn_mask": torch.zeros(3, 1, 7, 7).masked_fill(~PADDED, torch.finfo().min)}, PADDED, ~KEEP),
        ({"attn_mask": torch.zeros(3, 1, 7, 7).masked_fill(~PADDED, BARRED)}, PADDED, ~KEEP),
        ({"is_causal": True, "dropout_p": 0.5}, CAUSAL, None),  # by the math kernel
    ],
    ids=["all", "causal", "scaled", "boolean", "infinite", "lowest", "mild", "dropout"],
)
def test_every_mask_and_grouping(options, mask, padding, groups):
    model = made(lambda: Attend(groups=groups, **options))
    agree(only(model), dense(model.logits(X), allowed(mask), padding))


@pytest.mark.parametrize("shape", [(4, 7, 7), (1, 4, 7, 7), (7, 7)])
def test_a_finite_bias_belongs_to_the_logits(shape):
    """Three dimensions go by the math kernel on the CPU, the others by the fused one."""
    bias = rows(*shape, seed=5)
    model = made(lambda: Attend(attn_mask=bias))
    agree(only(model), dense(model.logits(X) + bias.double(), allowed(torch.ones(7, 7, dtype=torch.bool))))


def test_queries_that_may_not_see_the_first_key_do_not_count_for_it():
    window = CAUSAL & ~CAUSAL.tril(-3)
    model = made(lambda: Attend(attn_mask=window))
    found = only(model)
    agree(found, dense(model.logits(X), allowed(window)))
    assert found.first_token_if_uniform == pytest.approx([(1 / 2 + 1 / 3) / 2] * 4)


def test_rows_count_alike_over_unequal_batches():
    model = made(lambda: Attend(is_causal=True))
    found = only(model, [(X[:1], X[:1]), (X[1:], X[1:])])
    agree(found, only(model, X))
    assert found.rows == 3
    assert found.queries == 18  # the first query has one key, and no choice
    parts = [only(model, X[i : i + 1]).entropy for i in range(3)]
    assert found.entropy_error == pytest.approx(np.std(parts, axis=0, ddof=1) / math.sqrt(3), rel=1e-4)
    assert all(math.isnan(e) for e in only(model, X[:1]).entropy_error)


@pytest.mark.parametrize("limit", [1, 700, 5000, 10**9])
def test_the_size_of_the_blocks_does_not_matter(limit):
    model = made(lambda: Attend(attn_mask=PADDED))
    agree(only(model, memory_limit=limit), dense(model.logits(X), allowed(PADDED), ~KEEP))


def test_blocks_stay_within_the_limit():
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None:
                self.bytes = max(self.bytes, result.untyped_storage().nbytes())
            return result

    long = rows(2, 512, 6)
    model = made(lambda: Attend(heads=2, groups=2, is_causal=True))
    with Largest() as seen:
        only(model, long, memory_limit=120_000)
    assert seen.bytes < 120_000  # the logits of a head alone are 1 MB
    with Largest() as seen:
        only(model, long)
    assert seen.bytes > 10**6


# -- models of other people --------------------------------------------------------------------------------------------


def in_projected(layer: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """Logits of self-attention, in float64."""
    w, b = layer.in_proj_weight.detach().double(), layer.in_proj_bias.detach().double()
    q, k, _ = (x.double() @ w.T + b).chunk(3, -1)
    q, k = (t.view(*t.shape[:2], layer.num_heads, -1).transpose(1, 2) for t in (q, k))
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


class Heads(nn.Module):
    def __init__(self, *, weights: bool) -> None:
        super().__init__()
        self.inner, self.weights = nn.MultiheadAttention(6, 2, batch_first=True), weights
        nn.init.normal_(self.inner.in_proj_weight)
        nn.init.normal_(self.inner.in_proj_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x, need_weights=self.weights, attn_mask=~CAUSAL)[0]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_multihead_attention(weights, train):
    model = made(lambda: Heads(weights=weights)).train(train)
    found = dyntune.attention_statistics(model, X)
    assert list(found) == ["inner"]
    agree(found["inner"], dense(in_projected(model.inner, X), allowed(CAUSAL, 2)))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_encoder_layers_also_where_their_fast_path_would_run(padded, train):
    def build() -> nn.TransformerEncoder:
        layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, dropout=0.3)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)

    model = made(build).train(train)
    keep = KEEP.clone()
    keep[1] = True  # nested tensors are padded on the right
    found = dyntune.attention_statistics(model, X, lambda m, x: m(x, src_key_padding_mask=~keep if padded else None))
    assert list(found) == ["layers.0.self_attn", "layers.1.self_attn"]
    keys = keep[:, None, None, :] if padded else torch.ones(1, dtype=torch.bool)
    truth = dense(in_projected(model.layers[0].self_attn, X), allowed(keys, 2), ~keep if padded else None)
    agree(found["layers.0.self_attn"], truth)
    assert torch.backends.mha.get_fastpath_enabled()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return made(lambda: GPT2LMHeadModel(config)).train()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return made(lambda: LlamaForCausalLM(config)).train()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("build", [gpt2, llama])
def test_transformers_by_both_implementations(build, padded):
    """Padded, dropout on (GPT-2); the truth is the model's own probabilities, which eager attention returns."""
    model = build()
    with torch.no_grad():  # at initialisation all heads are uniform
        for name, p in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "c_attn" in name:
                p.copy_(rows(*p.shape, seed=len(name)))
    tokens = torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens} | ({"attention_mask": KEEP.long()} if padded else {})
    found = {}
    for kind in ("eager", "sdpa"):
        model.set_attn_implementation(kind)
        found[kind] = dyntune.attention_statistics(model.eval() if kind == "sdpa" else model.train(), batch)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        probabilities = model.eval()(**batch, output_attentions=True).attentions[0]
    names = list(found["sdpa"])
    assert len(names) == 2
    assert names[0].endswith(("h.0.attn", "layers.0.self_attn"))
    assert names == list(found["eager"])
    heads = probabilities.shape[1]
    keep = KEEP if padded else torch.ones_like(KEEP)
    mask = allowed(keep[:, None, None, :] & CAUSAL, heads)
    truth = dense(probabilities.log().clamp_min(-200), mask, ~keep)
    for kind in ("sdpa", "eager"):
        first = found[kind][names[0]]
        if kind == "eager" and build is gpt2:  # dropout on the embeddings: another input
            continue
        truth.max_logit = first.max_logit  # probabilities do not tell
        # The model's own probabilities are in float32, from logits of up to 20.
        agree(first, truth, rtol=1e-4, scale=20.0)
    other = dyntune.attention_statistics(model, batch)
    agree(other[names[0]], found["sdpa"][names[0]], scale=20.0)


def test_compiled_models_and_wrappers():
    model = made(lambda: Attend(is_causal=True))
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    agree(only(compiled), dense(model.logits(X), allowed(CAUSAL)))
    inner = nn.Sequential(torch.compile(model, backend="eager"))
    assert list(dyntune.attention_statistics(inner, X)) == ["0._orig_mod"]


@pytest.mark.parametrize("stored", [False, True])
def test_half_precision_rounds_queries_and_keys_but_not_the_logits(stored):
    model = made(lambda: Attend(is_causal=True))
    if stored:
        low = copy.deepcopy(model).bfloat16()
        found, q_k = only(low, X.bfloat16()), low.split(X.bfloat16())
    else:
        found = only(model, autocast=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            q_k = model.split(X)
    q, k = (t.detach().double() for t in q_k)
    agree(found, dense(q @ k.transpose(-1, -2) / math.sqrt(8), allowed(CAUSAL)))
    # eight bits: the rounding of 3 q, of up to ten, by 2^-9
    assert found.max_logit == pytest.approx(only(model).max_logit, rel=0.05)
    assert found.max_logit != pytest.approx(only(model).max_logit, rel=1e-5)


# -- metamorphic -------------------------------------------------------------------------------------------------------


def test_permuting_heads_permutes_the_entries():
    model = made(lambda: Attend(is_causal=True))
    before, order = only(model), [2, 0, 3, 1]
    with torch.no_grad():
        for layer in (model.q, model.k):
            for p in (layer.weight, layer.bias):
                p.copy_(p.view(4, 8, -1)[order].reshape(p.shape))
    after = only(model)
    for name in FIELDS:
        assert getattr(after, name) == pytest.approx([getattr(before, name)[i] for i in order], rel=1e-5)


def test_scaling_queries_scales_logits():
    one, three = (made(lambda g=g: Attend(gain=g)) for g in (1.0, 3.0))
    assert only(three).max_logit == pytest.approx([3 * x for x in only(one).max_logit], rel=1e-5)
    assert all(a < b for a, b in zip(only(three).entropy, only(one).entropy, strict=True))


def test_identical_keys_give_the_largest_entropy():
    model = made(Attend)
    nn.init.zeros_(model.k.weight)
    found = only(model)
    assert found.entropy == pytest.approx([math.log(7)] * 4, rel=1e-6)
    assert found.relative_entropy == pytest.approx([1.0] * 4, rel=1e-6)
    assert found.first_token == pytest.approx(found.first_token_if_uniform, rel=1e-6)


def test_collapsed_heads_are_seen():
    model = made(lambda: Attend(gain=3e4))
    found = only(model)
    assert max(found.max_logit) > 1e4
    assert min(found.collapsed) > 0.9
    assert max(found.entropy) < 0.05
    assert all(e >= 0.0 for e in found.entropy)


# -- what is not attention, and what cannot be read --------------------------------------------------------------------


class Gated(nn.Module):
    """A router's softmax, class probabilities, linear attention, and one attention that is written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.qk, self.soft = nn.Linear(6, 5), nn.Linear(6, 12), nn.Softmax(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.gate(x).softmax(-1).sum(-1, keepdim=True)
        q, k = self.qk(x).view(3, 7, 2, 6).transpose(1, 2).chunk(2, -1)
        linear = q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ k)
        scores = (q @ k.mT / 2.0).masked_fill(~CAUSAL, -1e9)
        return (self.soft(scores) @ linear).sum((1, 3)).softmax(-1)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_only_a_product_of_activations_into_a_softmax_is_attention(autocast):
    model = made(Gated)
    found = dyntune.attention_statistics(model, X, autocast=autocast)
    assert list(found) == ["soft"]
    assert found["soft"].heads == 2
    assert found["soft"].queries == 18


class Router(nn.Linear):
    """Per-head gates: a batched product with a weight, and a softmax."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.weight.T.expand(3, 6, 5)).softmax(-1)


def test_a_batched_product_with_a_weight_is_a_layer():
    with pytest.raises(UnreadableModelError):
        dyntune.attention_statistics(made(lambda: Router(6, 5)), X)


def test_a_model_without_attention_is_refused():
    with pytest.raises(UnreadableModelError, match=r"no attention was seen(.|\n)*set_attn_implementation"):
        dyntune.attention_statistics(nn.Linear(6, 2), X)


def test_an_operation_that_hides_its_logits_is_refused():
    @torch.library.custom_op("dyntune_test::packed_attention", mutates_args=())
    def packed(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    class Packed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return packed(super().forward(x))

    with pytest.raises(UnreadableModelError, match=r"module '0' attends by dyntune_test\.packed_attention"):
        dyntune.attention_statistics(nn.Sequential(Packed(6, 6)), X)


@pytest.mark.parametrize("limit", [0, -5])
def test_bad_limits(limit):
    with pytest.raises(InvalidArgumentError, match="memory_limit"):
        only(Attend(), memory_limit=limit)


def test_logits_that_are_not_finite_give_nan():
    model = made(Attend)
    nn.init.constant_(model.q.bias, math.nan)
    found = only(model)
    assert all(math.isnan(x) for name in FIELDS if name != "first_token_if_uniform" for x in getattr(found, name))
    assert math.isnan(dyntune.attention_statistics(model, X).max_logit)
    assert found.to_dict()["entropy"] == [None] * 4


@pytest.mark.parametrize("shape", [(1, 1, 6), (2, 1, 6), (1, 9, 6)])
def test_small_shapes(shape):
    found = only(made(lambda: Attend(is_causal=True)), rows(*shape))
    assert found.queries == shape[0] * (shape[1] - 1)
    assert all(math.isfinite(x) for x in found.max_logit)
    if shape[1] == 1:
        assert all(math.isnan(x) for x in found.entropy)


def test_nothing_of_the_users_moves():
    model = made(lambda: nn.Sequential(nn.Linear(6, 6), nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)))
    for mode in (True, False):
        before = snapshot(model.train(mode))
        dyntune.attention_statistics(model, X)
        with pytest.raises(ZeroDivisionError):
            dyntune.attention_statistics(model, X, lambda m, x: m(x).sum() / 0 if 1 // 0 else None)
        assert changes(before, snapshot(model)) == []
        assert torch.backends.mha.get_fastpath_enabled()

"""Weights of single heads against what kernels are given, in torch, transformers and handwritten models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dyntune.dynamics.attention_weights import AttentionWeights, find_attention, qk_norms
from dyntune.errors import InvalidArgumentError, UnreadableModelError

WIDTH, TOKENS = 24, 7


class Timm(nn.Module):
    """The layout of timm's Attention, with a width of heads of its own."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(WIDTH, 3 * heads * head_dim, bias=False)
        self.proj = nn.Linear(heads * head_dim, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=17, n_positions=8, n_embd=WIDTH, n_layer=2, n_head=3)), 3, 3, 8


def llama() -> Any:
    """Grouped queries, and a width of heads that is not the model's over their number."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=17,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
    )
    return LlamaForCausalLM(config), 4, 2, 10


def qwen3() -> Any:
    """Norms of queries and keys in the module: their lengths are not those of the products."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=17,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
    )
    return Qwen3ForCausalLM(config), 6, 3, 8


def bert() -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=17, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=6, intermediate_size=16
    )
    return BertModel(config), 6, 6, 4


def neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=17, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=3, intermediate_size=16
    )
    return GPTNeoXForCausalLM(config), 3, 3, 8


def encoder() -> Any:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 4, 4, 6


def timm() -> Any:
    return nn.Sequential(Timm(2, 5), Timm(2, 5)), 2, 2, 5


def inputs_of(model: nn.Module, names: list[str], run: Callable[[], Any]) -> list[torch.Tensor]:
    """What each attention module was given."""
    seen: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())

    def keep(name: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            seen[name] = (args[0] if args else kwargs["hidden_states"]).detach()

        return hook

    handles = [modules[name].register_forward_pre_hook(keep(name), with_kwargs=True) for name in names]
    run()
    for handle in handles:
        handle.remove()
    return [seen[name] for name in names]


@pytest.mark.parametrize("make", [gpt2, llama, bert, neox, encoder, timm])
def test_heads_are_those_that_kernels_are_given(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths of every query, key and value: rotations by position keep them, and no two heads share them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, heads, kv_heads, dim = make()
        floats = torch.randn(2, TOKENS, WIDTH)
        integers = torch.randint(0, 17, (2, TOKENS))
    model.train()  # torch's opaque fast path is for eval mode
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.zero_()
    x = floats if make in (encoder, timm) else integers
    found = find_attention(model)
    assert len(found) == 2
    calls: list[tuple[torch.Tensor, ...]] = []
    kernel = nn.functional.scaled_dot_product_attention

    def kept(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args[:3])
        return kernel(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", kept)

    def run() -> None:
        with torch.no_grad():
            model(x)

    given = inputs_of(model, list(found), run)
    assert len(calls) == 2
    tensors = dict(model.named_parameters())
    for (_, weights), h, call in zip(found.items(), given, calls, strict=True):
        assert (weights.heads, len(weights.key), weights.head_dim) == (heads, kv_heads, dim)
        for runs, tensor in zip((weights.query, weights.key, weights.value), call, strict=True):
            for head, part in enumerate(runs):
                w = part.of(tensors[part.parameter])
                lengths = (h @ (w.T if part.dim == 0 else w)).norm(dim=-1)
                # transformers may repeat the keys of a group before the kernel
                at = head * tensor.shape[1] // len(runs)
                torch.testing.assert_close(lengths, tensor[:, at].norm(dim=-1), rtol=1e-4, atol=1e-5)
        assert make is bert or [run.stop - run.start for run in weights.output] == [dim] * heads


def test_norms_are_those_of_the_dense_product() -> None:
    for make in (gpt2, llama, qwen3, bert, neox, encoder, timm):
        model = make()[0]
        tensors = dict(model.named_parameters())
        norms = qk_norms(model)
        for name, weights in find_attention(model).items():
            assert len(norms[name]) == weights.heads
            for head, norm in enumerate(norms[name]):
                parts = [
                    run.of(tensors[run.parameter].detach()).double()
                    for run in (weights.query[head], weights.key_of(head))
                ]
                q, k = (w if run.dim == 0 else w.T for w, run in zip(parts, (weights.query[head],) * 2, strict=True))
                assert norm == pytest.approx(float(torch.linalg.matrix_norm(q.T @ k, 2)), rel=1e-9)


def test_scaling_queries_scales_the_norm() -> None:
    layer = nn.MultiheadAttention(8, 2)
    before = qk_norms(layer)[""]
    run = find_attention(layer)[""].query[1]
    with torch.no_grad():
        run.of(layer.in_proj_weight).mul_(3.0)
    after = qk_norms(layer)[""]
    assert after == pytest.approx((before[0], 3 * before[1]))


def test_keys_of_another_width() -> None:
    layer = nn.MultiheadAttention(8, 2, kdim=5, vdim=3)
    weights = find_attention(layer)[""]
    assert [run.parameter for run in (weights.query[0], weights.key[1], weights.value[1])] == [
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
    ]
    q, k = layer.q_proj_weight.detach().double()[4:], layer.k_proj_weight.detach().double()[4:]
    assert qk_norms(layer)[""][1] == pytest.approx(float(torch.linalg.matrix_norm(q.T @ k, 2)))


def test_runs_cover_every_projection_once() -> None:
    for make in (gpt2, llama, neox, encoder, timm):
        model = make()[0]
        counts = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for weights in find_attention(model).values():
            for run in (*weights.query, *weights.key, *weights.value, *weights.output):
                run.of(counts[run.parameter]).add_(1)
        used = [c for c in counts.values() if c.any()]
        assert used
        assert all((c == 1).all() for c in used)


def test_wrappers_are_looked_through_and_names_choose() -> None:
    model = encoder()[0]
    compiled = torch.compile(model, backend="eager")
    assert list(find_attention(compiled)) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert list(find_attention(model, names=["layers.1.self_attn"])) == ["layers.1.self_attn"]
    with pytest.raises(InvalidArgumentError, match="'nowhere'"):
        find_attention(model, names=["nowhere"])
    with pytest.raises(UnreadableModelError, match=r"'layers.0.linear1' \(Linear\)"):
        find_attention(model, names=["layers.0.linear1"])


def test_models_without_attention() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3))
    assert find_attention(model) == {}
    with pytest.raises(UnreadableModelError, match="no attention"):
        qk_norms(model)


def test_sizes_that_do_not_add_up() -> None:
    broken = Timm(2, 5)
    broken.num_heads = 7
    with pytest.raises(UnreadableModelError, match="21 heads do not divide"):
        find_attention(broken)
    bare = Timm(2, 5)
    del bare.num_heads
    del bare.head_dim
    assert find_attention(bare) == {}
    assert isinstance(find_attention(Timm(2, 5))[""], AttentionWeights)

"""Which parameters are queries, MLP, embeddings; their blocks' eigenvalues against the dense Hessian."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dyntune
from dyntune.dynamics.attention_weights import find_attention
from dyntune.errors import UnreadableModelError
from dyntune.objective.context import differentiable_twice
from dyntune.suggest.heads_measure import step_costs
from dyntune.suggest.heads_parts import head_spectra, part_spectra, parts_of

CE = nn.CrossEntropyLoss()


class Small(nn.Module):
    """Tokens to classes, by one encoder layer with queries, keys and values in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 8)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.tokens(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


def small() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return Small().double(), (torch.randint(5, (16, 4)), torch.randint(3, (16,)))


def test_parts_of_a_model_with_one_matrix_for_all_three() -> None:
    model, _ = small()
    names = [name for name, _ in model.named_parameters()]
    parts = parts_of(model, names)
    told = {part: {(names[w.index], w.start, w.stop, w.dim) for w in windows} for part, windows in parts.items()}
    inside, out = "layers.0.self_attn.in_proj_weight", "layers.0.self_attn.out_proj.weight"
    assert told["queries"] == {(inside, 0, 4, 0), (inside, 4, 8, 0)}
    assert told["keys"] == {(inside, 8, 12, 0), (inside, 12, 16, 0)}
    assert told["values"] == {(inside, 16, 20, 0), (inside, 20, 24, 0)}
    assert told["outputs"] == {(out, 0, 4, 1), (out, 4, 8, 1)}
    assert told["MLP"] == {("layers.0.linear1.weight", 0, 12, 0), ("layers.0.linear2.weight", 0, 8, 0)}
    assert told["embeddings"] == {("tokens.weight", 0, 5, 0)}


def test_parts_of_transformers_models() -> None:
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    shape: dict[str, Any] = {"vocab_size": 11, "num_hidden_layers": 2}
    gpt: Any = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    bert: Any = BertForSequenceClassification(
        BertConfig(**shape, hidden_size=8, num_attention_heads=2, intermediate_size=12, max_position_embeddings=8)
    )
    for model, mlp, embedded in ((gpt, 2 * (8 * 32 + 32 * 8), 11 * 8 + 8 * 8), (bert, None, (11 + 8 + 2) * 8)):
        names = [name for name, _ in model.named_parameters()]
        shapes = [p.shape for _, p in model.named_parameters()]
        parts = parts_of(model, names)
        sizes = {
            part: sum(shapes[w.index].numel() // shapes[w.index][w.dim] * (w.stop - w.start) for w in windows)
            for part, windows in parts.items()
        }
        assert sizes["queries"] == sizes["keys"] == sizes["values"] == 2 * 8 * 8
        assert sizes["embeddings"] == embedded
        assert sizes["MLP"] == (mlp if mlp is not None else 2 * (8 * 12 + 12 * 8 + 8 * 8))  # BERT's output lies outside


def test_blocks_and_the_mass_on_queries_and_keys_are_those_of_the_dense_hessian() -> None:
    model, batch = small()
    found, cost = part_spectra(model, [batch], None, CE, seed=0)
    dense, names = dyntune.hessian(model, batch, criterion=CE).to_dense(), [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    places = torch.arange(len(dense)).split([s.numel() for s in shapes])
    shaped = [place.view(s) for place, s in zip(places, shapes, strict=True)]
    for part, windows in parts_of(model, names).items():
        rows = torch.cat([w.of(shaped).reshape(-1) for w in windows])
        truth = float(torch.linalg.eigvalsh(dense[rows][:, rows])[-1])
        assert found[f"lambda_max of {part}"] == pytest.approx(truth, rel=0.05)  # the tolerance that is asked for
    top = torch.linalg.eigh(dense)[1][:, -1]
    rows = torch.cat([w.of(shaped).reshape(-1) for p in ("queries", "keys") for w in parts_of(model, names)[p]])
    share = float(top[rows].square().sum())
    # An eigenvector of a value to 5% is off by the root of that, over the gap.
    assert found["mass of the top eigenvector on queries and keys"] == pytest.approx(share, abs=0.05)
    assert cost > 0
    heads, _ = head_spectra(model, [batch], None, CE, seed=0)
    weights = find_attention(model)["layers.0.self_attn"]
    where = shaped[names.index("layers.0.self_attn.in_proj_weight")]
    for head, value in enumerate(heads["layers.0.self_attn"]):
        rows = torch.cat([run.of(where).reshape(-1) for run in (weights.query[head], weights.key_of(head))])
        truth = float(torch.linalg.eigvalsh(dense[rows][:, rows])[-1])
        assert value == pytest.approx(truth, rel=0.05)


def test_no_attention_has_no_parts() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UnreadableModelError):
        parts_of(model, ["weight", "bias"])


def test_costs_of_a_step() -> None:
    """A linear layer: three products of 2 m n k operations but for the gradient of the data, which none needs."""
    from dyntune.objective.objective import Objective

    model, batch = nn.Linear(6, 4, bias=False), (torch.randn(10, 6), torch.randn(10, 4))
    rule = Objective(model, batch, criterion=nn.MSELoss()).rule
    flops, saved = step_costs(model, rule, batch, seed=0)
    assert flops == 2 * (2 * 10 * 6 * 4)
    assert saved == 4 * (10 * 6 + 10 * 4 + 10 * 4)  # the data; what was predicted and the targets, for the squares
    attending, data = small()
    with differentiable_twice(attending, torch.device("cpu")):  # nothing of it stays on
        pass
    rule = Objective(attending, data, criterion=CE).rule
    assert step_costs(attending, rule, data, seed=0)[0] > 0

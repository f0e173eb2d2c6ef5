"""suggest_heads end to end: the same data for all, real libraries, factories that cannot, and what is not touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dyntune import suggest_heads
from dyntune.errors import InvalidArgumentError, NotConvergedError
from dyntune.records import Status
from dyntune.suggest.heads_rule import Heads

WIDTH, TOKENS, CLASSES = 16, 6, 4
CE = nn.CrossEntropyLoss()


class Encoder(nn.Module):
    """Sequences to a class."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, heads, 32, batch_first=True, dropout=0.0)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x).mean(1))


def data(batches: int = 24, rows: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sequences whose class is where the largest first coordinate is."""
    g = torch.Generator().manual_seed(0)
    made = []
    for _ in range(batches):
        x = torch.randn(rows, TOKENS, WIDTH, generator=g)
        made.append((x, x[:, :CLASSES, 0].argmax(1)))
    return made


def suggest(factory: Any = Encoder, batches: Any = None, **options: Any) -> Heads:
    given: dict[str, Any] = {"head_counts": [1, 4], "seeds": 2, "probe_steps": 30, "max_gradients": 200} | options
    given = {"criterion": CE, "curvature": False} | given
    return suggest_heads(factory, data() if batches is None else batches, given.pop("loss_fn", None), **given)


def test_a_table_with_everything() -> None:
    found = suggest(curvature=True, seeds=2)
    assert [row.heads for row in found.table] == [1, 4]
    assert [row.head_dim for row in found.table] == [16, 4]
    assert found.value in (1, 4)
    assert found.lr == float(found.row.lr) > 0
    assert found.status is Status.UNCERTAIN
    for row in found.table:
        assert row.parameters == sum(p.numel() for p in Encoder(1).parameters())
        assert float(row.loss) < 1.6  # about log 4 before training
        assert float(row.critical_lr) > float(row.lr)
        assert row.step_seconds > 0
        for name in ("largest attention logit", "attention entropy", "lambda_max", "preconditioned lambda_max"):
            assert row.measured[name] > 0
        assert f"{'largest norm of queries with keys'}, growth per step" in row.measured
    assert found.cost > 2 * 2 * (30 + 20)


def test_one_seed_one_answer_but_for_the_clock() -> None:
    def without_clock(found: Heads) -> Any:
        told = found.to_dict()
        for row in told["table"]:
            del row["step_seconds"]
        return told["table"], told["effects"]

    few: dict[str, Any] = {"max_gradients": 60, "probe_steps": 20, "seeds": 1}
    first = without_clock(suggest(seed=3, **few))
    assert first == without_clock(suggest(seed=3, **few))
    assert first != without_clock(suggest(seed=4, **few))


def test_counts_that_do_not_matter_are_told_alike() -> None:
    """A factory that ignores the count: all is equal to the last bit, and the effect is none."""
    found = suggest(lambda heads: Encoder(2 + 0 * heads), seeds=3, max_gradients=100, probe_steps=20)
    assert found.verdict == "equivalent"
    assert all(effect.value == 1.0 for effect in found.effects.values())
    one, other = found.table
    assert one.loss.to_dict() == other.loss.to_dict()
    assert any("attention modules with [2]" in check for check in found.checks)


def test_random_numbers_and_data_stay() -> None:
    torch.manual_seed(5)
    before, batches = torch.get_rng_state(), data()
    copies = [(x.clone(), y.clone()) for x, y in batches]
    suggest(batches=batches, seeds=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(a, b) for pair, kept in zip(batches, copies, strict=True) for a, b in zip(pair, kept, strict=True)
    )


def test_a_count_that_cannot_be_built_names_those_that_can() -> None:
    with pytest.raises(InvalidArgumentError, match=r"model_factory\(3\) raised .*builds: 1, 4\."):
        suggest(head_counts=[1, 3, 4])
    with pytest.raises(InvalidArgumentError, match="none of them"):
        suggest(head_counts=[3])
    with pytest.raises(InvalidArgumentError, match="returned a int"):
        suggest(lambda heads: heads)


def test_bad_input() -> None:
    for counts in ([], [0], [1.5], ["2"]):
        with pytest.raises(InvalidArgumentError, match="head_counts"):
            suggest(head_counts=counts)
    model = Encoder(1)
    with pytest.raises(InvalidArgumentError, match="every head count has its own"):
        suggest(optimizer=torch.optim.AdamW(model.parameters()))
    with pytest.raises(InvalidArgumentError, match="seeds=0"):
        suggest(seeds=0)
    with pytest.raises(InvalidArgumentError, match="probe_steps=3"):
        suggest(probe_steps=3)
    with pytest.raises(NotConvergedError):
        suggest(seeds=1, strict=True)


def test_progress_and_loss_functions() -> None:
    told: list[tuple[str, float, float | None]] = []
    found = suggest(
        loss_fn=lambda model, batch: CE(model(batch[0]), batch[1]),
        criterion=None,
        seeds=1,
        progress=lambda *done: told.append(done),
    )
    assert [line.split(":")[0] for line, _, _ in told] == [f"seed 1 of 1, {h} heads" for h in (1, 4, 1, 4)]
    spent = [cost for _, cost, _ in told]
    assert spent == sorted(spent)
    assert spent[-1] == found.cost
    assert [lr for _, _, lr in told[2:]] == pytest.approx([row.lr.value for row in found.table])
    assert all("largest attention logit" in row.measured for row in found.table)
    assert found.verdict == "undecided"  # one seed


def test_transformers_models() -> None:
    """GPT-2 by its configuration, whose loss is its own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(heads: int) -> nn.Module:
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=13, n_positions=8, n_embd=16, n_layer=1, n_head=heads, use_cache=False)
        )

    g = torch.Generator().manual_seed(0)
    batches = [{"input_ids": ids, "labels": ids} for ids in (torch.randint(13, (8, 8), generator=g) for _ in range(20))]
    found = suggest(make, batches, criterion=None, head_counts=[2, 4], seeds=1, curvature=True)
    assert [row.head_dim for row in found.table] == [8, 4]
    assert all(row.measured["lambda_max"] > 0 for row in found.table)
    with pytest.raises(InvalidArgumentError, match=r"model_factory\(3\)"):
        suggest(make, batches, criterion=None, head_counts=[2, 3], seeds=1)


def test_no_attention_is_no_reason_to_fail() -> None:
    found = suggest(lambda _: nn.Sequential(nn.Flatten(), nn.Linear(WIDTH * TOKENS, CLASSES)), seeds=1)
    assert found.table[0].head_dim is None
    assert any("attention was not read" in check for check in found.checks)


def test_processes_find_the_same() -> None:
    """The same numbers but for the clock; what cannot be sent is refused before anything is measured."""

    def without_clock(found: Heads) -> Any:
        return [{k: v for k, v in row.items() if k != "step_seconds"} for row in found.to_dict()["table"]]

    few: dict[str, Any] = {"seeds": 1, "max_gradients": 60, "probe_steps": 20}
    alone, shared = suggest(**few), suggest(**few, workers=2)
    assert without_clock(alone) == without_clock(shared)
    assert any("2 trainings side by side" in check for check in shared.checks)
    with pytest.raises(InvalidArgumentError, match="cannot be sent to another process"):
        suggest(lambda heads: Encoder(heads), **few, workers=1)
    with pytest.raises(InvalidArgumentError, match="workers=-1"):
        suggest(**few, workers=-1)


def test_heads_one_by_one() -> None:
    found = suggest(seeds=1, per_head=True, curvature=True, head_counts=[2], max_gradients=60)
    row = found.table[0]
    for name in ("largest attention logit", "norm of queries with keys", "lambda_max of queries and keys"):
        (values,) = row.by_head[name].values()
        assert len(values) == 2
    (growth,) = row.by_head["largest attention logit, growth per step"].values()
    assert max(abs(x) for x in growth) < 1
    assert row.course is not None
    assert row.course.steps == (0, 5, 10, 15, 20, 25, 30)
    assert all(len(values) == 2 for values in row.course.max_logit)
    assert 0 < row.measured["mass of the top eigenvector on queries and keys"] < 1
    for part in ("queries", "keys", "values", "outputs", "MLP"):
        assert row.measured[f"lambda_max of {part}"] <= row.measured["lambda_max"] * 3  # one batch of the four
    assert row.measured["rate at which one step raises the loss"] > 0
    assert row.flops
    assert row.saved_bytes
    assert row.flags == ()


def test_hot_attention_is_flagged_before_any_training() -> None:
    class Hot(Encoder):
        def __init__(self, heads: int) -> None:
            super().__init__(heads)
            with torch.no_grad():
                self.layer.self_attn.in_proj_weight[: 2 * WIDTH] *= 10

    found = suggest(Hot, seeds=1, max_gradients=60)
    for row in found.table:
        assert any("before training" in flag for flag in row.flags)
    assert "flagged: attention logits of" in str(found)

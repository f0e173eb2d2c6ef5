"""What the monitor reads off the inside of a network, against values computed by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyntune
from dyntune.dynamics.activations import ActivationReader
from dyntune.errors import BatchError, InvalidArgumentError
from dyntune.monitor.inside import EVERY_PASS, InsideProbe
from dyntune.monitor.run import COMPANIONS
from dyntune.records import Status
from tests.neutrality.faults import ERRORS, SITES
from tests.neutrality.measurements import Subject
from tests.neutrality.test_faults import DATA, check, step
from tests.objective.snapshot import changes, snapshot
from tests.objective.zoo import classes, made, rows

EPS = torch.finfo(torch.float32).eps
ALL = (*EVERY_PASS, "heads", "alignment")
X, Y = rows(24, 6), classes(24, high=3)


class Attend(nn.Module):
    """Causal attention with two heads by the fused kernel; queries and keys are kept for the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        self.seen = q.detach(), k.detach()
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Language(nn.Module):
    """Two blocks of attention and ReLU over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.blocks = nn.ModuleList([nn.Sequential(Attend(), nn.Linear(8, 16), nn.ReLU()) for _ in range(2)])
        self.back = nn.ModuleList([nn.Linear(16, 8) for _ in range(2)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block, back in zip(self.blocks, self.back, strict=True):
            x = x + back(block(x))
        return self.out(x)


class Everything(nn.Module):
    """Attention, BatchNorm, dropout, a recurrent layer's tuple and an activation of several operations."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(2, 2, 8, dropout=0.2, batch_first=True, activation=PlainSiLU())
        self.layer, self.rnn = layer, nn.GRU(2, 4, batch_first=True)
        self.norm, self.out = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.rnn(self.layer(x.reshape(-1, 2, 2)))[0].flatten(1)))


class PlainSiLU(nn.Module):
    """An activation as libraries write it: its ``forward`` is replaced while reading."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


def mlp() -> nn.Sequential:
    """One hidden layer of ten units, three of which no input of ``X`` activates."""
    model = made(lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Dropout(0.5), nn.Linear(10, 3)))
    with torch.no_grad():
        model[0].bias[[1, 4, 7]] = -60.0
    return model


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    drawn = classes(5, 8, high=11)
    return drawn[:, :-1], drawn[:, 1:]


def token_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


# -- values ------------------------------------------------------------------------------------------------------------


def relative_entropy(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of causal attention, per head, in float64: the largest logit, and the mean entropy over log of allowed keys."""
    length = q.shape[-2]
    barred = torch.ones(length, length, dtype=torch.bool).triu(1)
    z = (q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(barred, -math.inf)
    entropy = torch.distributions.Categorical(logits=z).entropy()
    return z.amax((0, 2, 3)), (entropy[..., 1:] / torch.arange(2, length + 1).double().log()).mean((0, 2))


def test_attention_is_that_of_a_dense_softmax():
    model = made(Language)
    found = InsideProbe(model, token_loss).values(tokens(), ("heads",))
    model(tokens()[0])
    largest, lowest = [], []
    for index, block in enumerate(model.blocks):
        peak, entropy = relative_entropy(*block[0].seen)
        name = f"blocks.{index}.0"
        # Sums of a few dozen terms in float32, of logits of order one.
        assert found[f"attention/max_logit/{name}"] == pytest.approx(float(peak.max()), rel=100 * EPS)
        assert found[f"attention/entropy/{name}"] == pytest.approx(float(entropy.mean()), rel=100 * EPS)
        for head in range(2):
            assert found[f"attention/entropy/{name}/{head}"] == pytest.approx(float(entropy[head]), rel=100 * EPS)
        largest.append(float(peak.max()))
        lowest.append(float(entropy.min()))
    assert found["attention/max_logit"] == pytest.approx(max(largest), rel=100 * EPS)
    assert found["attention/entropy_min"] == pytest.approx(min(lowest), rel=100 * EPS)
    assert len(found) == 2 + 2 * 2 + 2 * 2


def test_dead_units_are_counted():
    found = InsideProbe(mlp(), criterion=nn.CrossEntropyLoss()).values((X, Y), ("units",))
    assert found == {"units/dead/1": pytest.approx(0.3), "units/dead_max": pytest.approx(0.3)}


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.2), nn.ELU(), nn.Hardtanh()], ids=repr)
def test_a_unit_that_is_below_zero_is_not_dead_where_gradients_pass(activation):
    model = made(lambda: nn.Sequential(nn.Linear(6, 10), activation, nn.Linear(10, 3)))
    with torch.no_grad():
        model[0].bias[2] = -60.0
    assert dyntune.dead_units(model, X)["1"].silent_units == (2,)
    assert InsideProbe(model).values((X, Y), ("units",))["units/dead/1"] == 0.0


def test_saturation_of_tanh_has_its_own_column():
    model = made(lambda: nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)))
    with torch.no_grad():
        model[0].bias[[0, 5]] = 50.0
    assert InsideProbe(model).values((X, Y), ("units",)) == {"units/saturated/1": pytest.approx(0.2)}


def test_log_z_and_its_drift():
    model = mlp().eval()
    probe = InsideProbe(model, criterion=nn.CrossEntropyLoss())
    first = probe.values((X, Y), ("logits",))
    z = model(X).detach().double()
    log_z = z.logsumexp(-1)
    assert float(first["logits/log_z"]) == pytest.approx(float(log_z.mean()), rel=100 * EPS)
    half = 2.0686576 * float(log_z.std()) / math.sqrt(24)  # Student t, 23 degrees, 97.5%
    assert first["logits/log_z"].high - first["logits/log_z"].value == pytest.approx(half, rel=1e-5)
    entropy = torch.distributions.Categorical(logits=z).entropy().mean()
    assert float(first["logits/entropy"]) == pytest.approx(float(entropy), rel=100 * EPS)
    assert first["logits/max_abs"] == pytest.approx(float(z.abs().max()), rel=100 * EPS)
    assert "logits/log_z_drift" not in first
    with torch.no_grad():
        model[3].bias += 0.5
    again = probe.values((X.clone(), Y.clone()), ("logits",))["logits/log_z_drift"]
    # On the same rows the shift is exact up to rounding of log Z; on others it has the width of two samples.
    assert (again.low, again.high) == (pytest.approx(0.5, abs=100 * EPS), pytest.approx(0.5, abs=100 * EPS))
    other = probe.values((rows(24, 6, seed=9), Y), ("logits",))["logits/log_z_drift"]
    assert other.high - other.low > 0.1
    assert "same rows" in again.method
    assert "other rows" in other.method


def test_the_size_of_activations():
    model = mlp().eval()
    found = InsideProbe(model).values((X, Y), ("activations",))
    truth, h = {}, X
    for name, module in model.named_children():
        h = module(h)
        truth[f"activation/log_rms/{name}"] = float(h.detach().double().square().mean().log() / 2)
    del truth["activation/log_rms/2"]  # dropout passes on
    assert found == pytest.approx(truth, rel=10 * EPS)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_signals_whose_squares_leave_float32_are_seen(scale):
    model = made(lambda: nn.Sequential(nn.Linear(6, 10, bias=False), nn.Linear(10, 3, bias=False)))
    before = InsideProbe(model).values((X, Y), ("activations",))
    with torch.no_grad():
        model[0].weight *= scale
    after = InsideProbe(model).values((X, Y), ("activations",))
    for name, value in after.items():
        assert value - before[name] == pytest.approx(math.log(scale), rel=10 * EPS)


def test_a_signal_that_is_gone_or_not_finite():
    model = made(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[0].bias, -1.0)
    found = InsideProbe(model).values((X, Y))
    assert found["activation/log_rms/1"] == -math.inf
    assert found["units/dead_max"] == 1.0
    nn.init.constant_(model[0].bias, math.nan)
    found = InsideProbe(model).values((X, Y))
    assert math.isnan(found["activation/log_rms/1"])
    assert math.isnan(found["units/dead_max"])
    assert found["logits/log_z"].status is Status.REFUSED


def test_layers_that_are_shared_parametrised_or_used_by_their_weights_only():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice = nn.Linear(4, 4)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.normed(self.twice(self.twice(x)))
            return self.attend(x, x, x)[0]

    model, x = made(Odd), rows(3, 5, 4)
    found = InsideProbe(model).values(x, ("activations",))
    assert list(found) == [f"activation/log_rms/{name}" for name in ("twice", "normed", "attend")]
    once = model.twice(x)
    both = torch.stack([once, model.twice(once)]).detach().double()
    assert found["activation/log_rms/twice"] == pytest.approx(float(both.square().mean().log() / 2), rel=100 * EPS)


def test_alignment_is_that_of_the_function():
    model = mlp().eval()
    found = InsideProbe(model, seed=3).values((X, Y), ("alignment",))
    truth = dyntune.spectral_alignment(model, (X, Y), seed=3)
    assert found == {f"alignment/{name}": layer.same_sign for name, layer in truth.items()}


def test_one_pass_reads_what_single_ones_do():
    """Readers do not see what the others compute."""
    model = made(Everything)
    probe = InsideProbe(model, criterion=nn.CrossEntropyLoss(), seed=4)
    data = (rows(16, 4), classes(16))
    together = probe.values(data, ALL)
    apart: dict[str, Any] = {}
    for quantity in ALL:
        apart |= InsideProbe(model, criterion=nn.CrossEntropyLoss(), seed=4).values(data, (quantity,))
    assert together == apart
    assert {name.split("/")[0] for name in together} == {"attention", "units", "logits", "activation", "alignment"}
    assert "units/dead/layer.activation" in together


def test_one_pass_runs_the_model_once():
    model = mlp()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    InsideProbe(model).values((X, Y), ALL)
    assert calls == [1]


# -- neutrality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_nothing_moves(training):
    model = made(Everything).train(training)
    data = (rows(16, 4), classes(16))
    F.cross_entropy(model(data[0]), data[1]).backward()
    probe = InsideProbe(model, criterion=nn.CrossEntropyLoss())
    before = snapshot(model)
    first = probe.values(data, ALL)
    assert changes(before, snapshot(model)) == []
    second = probe.values(data, ALL)
    assert changes(before, snapshot(model)) == []
    first["logits/log_z_drift"] = second["logits/log_z_drift"]
    assert float(second["logits/log_z_drift"]) == 0.0
    assert second == first  # dropout draws the same masks


@pytest.mark.parametrize("site", SITES)
def test_nothing_moves_when_it_is_cut_short(site):
    def subject() -> Subject:
        model = made(Everything).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = Subject(model, DATA, optimizer, {"criterion": nn.CrossEntropyLoss()})
        step(found, 0)
        return found

    def measure(s: Subject, fuse: Any) -> None:
        InsideProbe(s.model, **s.loss).values(s.batches, ALL)

    assert check(measure, site, itertools.cycle(ERRORS), 6, build=subject) >= 3


def test_an_error_of_the_model_comes_out_and_leaves_no_trace():
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError(float(self.first(x).sum()))

    model = made(Failing)
    before = snapshot(model)
    with pytest.raises(KeyError):
        InsideProbe(model).values((X, Y))
    assert changes(before, snapshot(model)) == []


# -- models and losses as they come ------------------------------------------------------------------------------------


def test_a_network_without_attention_or_activations_has_no_such_columns():
    probe = InsideProbe(made(lambda: nn.Linear(6, 3)))
    found = probe.values((X, Y))
    assert set(found) == {"logits/max_abs", "logits/log_z", "logits/entropy", "activation/log_rms/(model)"}
    assert probe.blind == {}


def test_attention_that_cannot_be_seen_is_named():
    class LinearAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(x * x.mean(0))

    probe = InsideProbe(made(LinearAttention))
    assert not any(name.startswith("attention") for name in probe.values((X, Y)))
    assert "LinearAttention" in probe.blind["attention"]


def test_attention_that_hides_its_logits_costs_only_its_own_columns():
    library = torch.library.Library("dyntune_inside_test", "DEF")
    library.define("some_attention(Tensor x) -> Tensor")
    library.impl("some_attention", lambda x: x.clone(), "CompositeExplicitAutograd")

    class Hiding(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.ops.dyntune_inside_test.some_attention(x))

    probe = InsideProbe(made(lambda: Hiding(nn.Linear(6, 3), nn.ReLU())))
    found = probe.values((X, Y))
    assert "some_attention" in probe.blind["attention"]
    assert {"units/dead/1", "logits/log_z", "activation/log_rms/0"} <= set(found)
    assert not any(name.startswith("attention") for name in found)
    assert "attention" not in InsideProbe(probe._model).values((X, Y), ("units",))


def test_a_recurrent_network_says_that_its_units_are_hidden():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.rnn(x[:, None])[0][:, 0])

    probe = InsideProbe(made(Recurrent))
    assert "activation/log_rms/rnn" in probe.values((X, Y))
    assert "recurrent" in probe.blind["units"]


@pytest.mark.parametrize(
    ("criterion", "output", "says"),
    [
        (nn.MSELoss(), 3, "MSELoss is not a loss of logits"),
        (F.binary_cross_entropy_with_logits, 3, "binary_cross_entropy_with_logits is not"),
        (nn.CrossEntropyLoss(), 1, "logits of two classes or more"),
        (None, 3, "no integer targets"),
    ],
)
def test_outputs_that_are_no_logits_over_classes_have_no_log_z(criterion, output, says):
    model = made(lambda: nn.Linear(6, output))
    probe = InsideProbe(model, criterion=criterion)
    found = probe.values((X, rows(24, output)), ("logits", "activations"))
    assert list(found) == ["activation/log_rms/(model)"]
    assert says in probe.blind["logits"]


def test_a_loss_that_calls_the_model_twice_leaves_open_which_output_is_meant():
    probe = InsideProbe(mlp(), lambda model, batch: (model(batch[0]) + model(-batch[0])).sum())
    assert "units/dead/1" in probe.values((X, Y))
    assert "calls the model 2 times" in probe.blind["logits"]


def test_a_loss_that_changes_the_logits_in_place_is_found_out():
    probe = InsideProbe(mlp(), lambda model, batch: F.cross_entropy(model(batch[0]).div_(3.0), batch[1]))
    assert not any(name.startswith("logits") for name in probe.values((X, Y)))
    assert "in place" in probe.blind["logits"]


def test_a_reason_goes_when_the_signal_comes_back():
    probe = InsideProbe(mlp())
    probe.values((X, rows(24, 3)))
    assert "logits" in probe.blind
    assert "logits/log_z" in probe.values((X, Y))
    assert probe.blind == {}


class Wrapped(nn.Module):
    """Returns its logits in a tuple, in a mapping under the usual name, or under another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = mlp(), how

    def forward(self, x: torch.Tensor) -> Any:
        z = self.inner(x)
        return {"tuple": (z, x), "logits": {"hidden": x, "logits": z}, "other": {"out": z}}[self.how]


@pytest.mark.parametrize("how", ["tuple", "logits"])
@pytest.mark.parametrize("as_loss", [False, True])
def test_outputs_that_are_tuples_or_mappings(how, as_loss):
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        output = model(batch[0])
        return F.cross_entropy(output[0] if how == "tuple" else output["logits"], batch[1])

    plain = InsideProbe(mlp().eval()).values((X, Y), ("logits",))
    probe = InsideProbe(Wrapped(how).eval(), loss) if as_loss else InsideProbe(Wrapped(how).eval())
    assert probe.values((X, Y), ("logits",)) == plain


def test_an_output_without_logits_is_named():
    probe = InsideProbe(Wrapped("other"))
    assert "units/dead/inner.1" in probe.values((X, Y))
    assert "returned a dict" in probe.blind["logits"]


@pytest.mark.parametrize("classes_second", [True, False])
def test_the_classes_are_where_the_targets_say(classes_second):
    z = made(lambda: nn.Linear(6, 5 * 7))

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = z

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.z(x).view(-1, 7, 5)
            return out.transpose(1, 2) if classes_second else out

    found = InsideProbe(Sequence()).values((X, classes(24, 7, high=5)), ("logits",))
    truth = z(X).detach().double().view(-1, 7, 5).logsumexp(-1).mean()
    assert float(found["logits/log_z"]) == pytest.approx(float(truth), rel=100 * EPS)
    criterion = nn.CrossEntropyLoss()
    if classes_second:
        again = InsideProbe(Sequence(), criterion=criterion).values((X, classes(24, 7, high=5)), ("logits",))
        assert again == found


@pytest.mark.parametrize("given", ["criterion", "loss_fn", "torch loss as loss_fn", "nothing"])
def test_losses_in_every_form_give_the_same(given):
    form: dict[str, Any] = {
        "criterion": {"criterion": nn.CrossEntropyLoss()},
        "loss_fn": {"loss_fn": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])},
        "torch loss as loss_fn": {"loss_fn": nn.CrossEntropyLoss()},
        "nothing": {},
    }[given]
    assert InsideProbe(mlp(), **form).values((X, Y), ALL) == InsideProbe(mlp()).values((X, Y), ALL)


def test_a_mapping_with_a_criterion_goes_without_its_targets():
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp().eval()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.inner(inputs)

    probe = InsideProbe(Keywords(), criterion=nn.CrossEntropyLoss())
    found = probe.values({"inputs": X, "labels": Y}, ("logits",))
    assert found == InsideProbe(mlp().eval()).values((X, Y), ("logits",))


def test_a_compiled_model_is_looked_through():
    model = made(Language)
    compiled = torch.compile(model, backend="eager")
    plain = InsideProbe(model, token_loss).values(tokens(), ALL)
    assert InsideProbe(compiled, token_loss).values(tokens(), ALL) == plain
    # The loss may hold the compiled model itself.
    closed = InsideProbe(model, lambda _, batch: token_loss(compiled, batch)).values(tokens(), ALL)
    assert closed == plain


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder(norm_first):
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
        return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 5))

    model, data = made(build).eval(), (rows(4, 6, 8), classes(4, 6, high=5))
    found = InsideProbe(model).values(data, ("heads", *EVERY_PASS))
    truth = dyntune.attention_statistics(model, data)
    assert found["attention/max_logit"] == truth.max_logit
    for name, heads in truth.items():
        assert found[f"attention/entropy/{name}/1"] == heads.relative_entropy[1]
    assert {f"units/dead/0.layers.{i}" for i in range(2)} <= {name.partition("#")[0] for name in found}
    assert "activation/log_rms/0.layers.1.self_attn" in found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_hugging_face_model(implementation):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=4, attn_implementation=implementation
    )
    model = made(lambda: transformers.GPT2LMHeadModel(config)).train()
    ids = classes(3, 8, high=20)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    before = snapshot(model)
    probe = InsideProbe(model)
    found = probe.values(batch, ALL)
    assert changes(before, snapshot(model)) == []
    assert probe.blind == {}
    assert [n for n in found if n.startswith("attention/max_logit/")] == [
        f"attention/max_logit/transformer.h.{i}.attn" for i in range(2)
    ]
    assert f"attention/entropy/transformer.h.1.attn/{3}" in found
    assert "units/dead/transformer.h.0.mlp.act" in found
    model.eval()
    log_z = InsideProbe(model).values(batch, ("logits",))["logits/log_z"]
    with torch.no_grad():
        z = model(**batch).logits.double().logsumexp(-1)
    truth = torch.stack([row[keep != 0].mean() for row, keep in zip(z, mask, strict=True)]).mean()
    assert float(log_z) == pytest.approx(float(truth), rel=100 * EPS)


def test_layers_may_be_called_anything():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"a/0": Attend(), "a": Attend(), "b\n☃": nn.Linear(8, 3), "(model)": nn.ReLU()})
            self.low = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.low(self.layers["(model)"](self.layers["a"](self.layers["a/0"](x))))
            return self.layers["b\n☃"](x)

    model = made(Named)
    found = InsideProbe(model).values((rows(4, 5, 8), classes(4, 5)), ("heads", *EVERY_PASS))
    statistics = dyntune.attention_statistics(model, rows(4, 5, 8))
    assert len([name for name in found if name.startswith("attention/entropy/")]) == 2 + 4
    assert found["attention/entropy/layers.a/0'"] == statistics["layers.a"].relative_entropy[0]
    assert "activation/log_rms/layers.b\n☃" in found
    # What the end of an interval of another column is called would not be listed.
    assert not any(name.endswith(COMPANIONS) for name in found)
    assert "units/dead/low" in found


def test_a_layer_called_like_the_end_of_an_interval_is_told_apart():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.path = nn.ModuleDict({"low": nn.Linear(6, 6), "high": nn.Linear(6, 3)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.path["high"](self.path["low"](x))

    found = InsideProbe(made(Named)).values((X, Y), ("activations",))
    assert list(found) == ["activation/log_rms/path.low#1", "activation/log_rms/path.high#1"]


def test_a_pass_that_writes_to_a_parameter_is_refused_without_harm():
    model = made(lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Linear(3, 2)))
    before = snapshot(model)
    probe = InsideProbe(model)
    assert probe.values(torch.arange(5)) == {}
    assert changes(before, snapshot(model)) == []
    assert set(probe.blind) == set(EVERY_PASS)
    assert "writes to parameter '0.weight'" in probe.blind["units"]


def test_arguments_that_mean_nothing_are_refused():
    with pytest.raises(InvalidArgumentError, match="both loss_fn and criterion"):
        InsideProbe(mlp(), token_loss, nn.CrossEntropyLoss())
    with pytest.raises(InvalidArgumentError, match=r"quantities=\('gradients',\)"):
        InsideProbe(mlp()).values((X, Y), ("gradients",))
    with pytest.raises(BatchError):
        InsideProbe(mlp()).values((X[:0], Y[:0]))


def test_no_layer_no_numbers():
    assert ActivationReader(mlp()).read() == {}

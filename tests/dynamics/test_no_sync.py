"""Nothing waits for the device: meta tensors have no values, so any attempt to read one raises."""

from __future__ import annotations

import pytest
import torch

from dyntune.dynamics.autocorrelation import GradientAutocorrelation
from dyntune.dynamics.edge import directional_curvature, step_curvature
from dyntune.dynamics.momentum import moment_cosine, moment_products
from dyntune.dynamics.noise import noise_terms
from dyntune.dynamics.tensors import second_moments, tensor_sums
from dyntune.numerics.sketch import CountSketch

SHAPES = ((300, 200), (7,), (2, 3, 4))


def tensors():
    return [torch.empty(s, device="meta") for s in SHAPES]


def test_values_of_meta_tensors_cannot_be_read():
    with pytest.raises(RuntimeError, match="meta"):
        tensors()[0].sum().item()


def test_signals_read_no_value():
    g, m = tensors(), tensors()
    sketch = CountSketch(64)
    a, b = sketch(g, ["a", "b", "c"]), sketch(m, ["a", "b", "c"])
    assert a.shape == (64,)
    recorder = GradientAutocorrelation(lags=2, batch_size=8, population=64)
    for step in range(4):
        recorder.update((a + b) / 2, step=step, halves=(a, b))
    found = [
        moment_cosine(moment_products(g, m)),
        directional_curvature(g, m),
        step_curvature(g, m, tensors(), lr=0.1, scale=tensors()),
        noise_terms(torch.empty(2, device="meta"), [4, 4], torch.empty((), device="meta")).signal,
    ]
    assert all(x.device.type == "meta" and x.shape == () for x in found)


@pytest.mark.parametrize("before_step", [True, False])
def test_statistics_of_tensors_read_no_value(before_step):
    parameters = [torch.nn.Parameter(t) for t in tensors()]
    optimizer = torch.optim.Adam(parameters, foreach=True)
    for p in parameters:
        p.grad = torch.empty_like(p)
        state = {"step": torch.tensor(3.0), "exp_avg": torch.empty_like(p), "exp_avg_sq": torch.empty_like(p)}
        optimizer.state[p] = state
    sums = tensor_sums(
        [p.grad for p in parameters],
        moments=second_moments(optimizer, parameters, before_step=before_step),
        parameters=parameters,
        previous=tensors(),
    )
    assert sums.statistics().device.type == "meta"

"""Runs made by hand, as a monitor records them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

from dyntune.monitor.run import Column, Event, Row, Run
from tests.plots.records import HOSTILE

Kind = Literal["healthy", "edge", "diverging"]

NAMES = ("embed.weight", "blocks.0.attention.qkv.weight", "blocks.0.mlp.0.weight", "blocks.0.mlp.0.bias", "head.weight")

HOSTILE_NAMES = (
    HOSTILE,
    "</script><script>alert(1)</script>",
    "</style></title><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' autofocus onfocus='alert(1)",
    "{{ 7 * 7 }}{% for x in () %}",
    "<svg/onload=alert(1)>",
    "javascript:alert(1)",
    "<!--<script>",
    "]]><![CDATA[",
    "\u202egnp.exe\u2028\u2029",
    "w" * 3000,
    "url(http://example.invalid/x)",
    "<link rel=stylesheet href=http://example.invalid/y.css>",
    "\\u003cscript\\u003e",
    "",
)


def monitored(
    kind: Kind = "edge",
    *,
    steps: int = 600,
    every: int = 20,
    names: tuple[str, ...] = NAMES,
    words: str = "",
    seed: int = 0,
) -> Run:
    """A run of one kind; `words` is put into every text that a user or a file decides."""
    text = words or None
    return Run(
        rows=list(_rows(kind, steps, every, names, text, np.random.default_rng(seed))),
        events=tuple(_events(kind, steps, text)),
        columns={
            "train/loss": Column(name="train/loss", unit=text or "loss"),
            "grad/norm": Column(name="grad/norm", unit=text or "loss / parameter"),
        },
        provenance={
            "versions": {"dyntune": "0.1", "torch": "2.6", text or "more": text or "1"},
            "platform": "Linux",
            "optimizer": {"class": text or "AdamW", "groups": [{"lr": 1e-3, "betas": [0.9, 0.95]}]},
            "overhead": 0.02,
        },
        assumed={"loss": text or "criterion"},
        id=text or "0123456789ab",
        path=f"/runs/{(words or 'run').replace('/', '-')}.jsonl",
    )


def _rows(
    kind: Kind, steps: int, every: int, names: tuple[str, ...], text: str | None, rng: np.random.Generator
) -> Iterator[Row]:
    for step in range(steps):
        share = step / steps
        broken = kind == "diverging" and share > 0.95
        rate = 1e-3 * min(1.0, step / 30 + 0.03) * (1 + math.cos(math.pi * share)) / 2
        loss = 0.6 + 2.2 * math.exp(-5 * share) + 0.08 * float(rng.standard_normal())
        if kind == "diverging" and share > 0.7:
            loss += 30 * (share - 0.7) ** 2
        values: dict[str, float | None] = {
            "train/loss": math.nan if broken else loss,
            "train/lr": rate,
            "grad/norm": 0.4 + loss * abs(1 + 0.2 * float(rng.standard_normal())),
        }
        if text is not None:
            values[f"train/lr/{text}"] = 0.5 * rate
        labels: dict[str, str] = {}
        if step % every == 0:
            values |= _burst(kind, share, step, names, rng)
            values["curvature/lr_crit"] = rate / max(float(values["stability/lr_ratio"] or 0), 0.02)
            labels = {"regime": _regime(kind, share), "regime_reason": text or "lag 1 is -0.93, lag 2 0.91"}
        yield Row(step=step, values=values, labels=labels)


def _burst(
    kind: Kind, share: float, step: int, names: tuple[str, ...], rng: np.random.Generator
) -> dict[str, float | None]:
    ceiling = {"healthy": 0.55, "edge": 1.0, "diverging": 0.95}[kind]
    ratio = ceiling * (1 - math.exp(-6 * share)) + 0.03 * float(rng.standard_normal())
    if kind == "diverging" and share > 0.7:
        ratio += 5 * (share - 0.7)
    values: dict[str, float | None] = {
        "stability/lr_ratio": ratio,
        "stability/lr_ratio.low": 0.97 * ratio,
        "stability/lr_ratio.high": 1.03 * ratio,
        "stability/batch_ratio": 0.6 * ratio,
        "stability/step_curvature": 1.8 * ratio,
        "stability/step_curvature.limit": 2.0,
        "monitor/overhead": 0.012 + 0.01 / (1 + step),
        "monitor/step_s": 0.0042,
    }
    for i, name in enumerate(names):
        values |= {
            f"adam/staleness/{name}": 1 + 0.1 * i * abs(float(rng.standard_normal())),
            f"update/ratio/{name}": 1e-3 * 10 ** (0.3 * i - 0.5) * (1.1 - share),
            f"grad/log_rms/{name}": -6 - i - 2 * share + 0.1 * float(rng.standard_normal()),
        }
    return values


def _regime(kind: Kind, share: float) -> str:
    if kind == "healthy" or share < 0.4:
        return "smooth" if share < 0.5 else "stationary_noise"
    return "diverging" if kind == "diverging" and share > 0.75 else "edge"


def _events(kind: Kind, steps: int, text: str | None) -> Iterator[Event]:
    yield Event(
        name="blind",
        step=None,
        detail={"signal": text or "grad/noise_scale", "reason": text or "no batch could be cut in two"},
    )
    if kind == "diverging":
        yield _alert(int(0.76 * steps), "diverging", text or "Curvature along the step is above its limit.", text)
        yield _alert(int(0.951 * steps), "non-finite", text or "The loss is NaN.", text)
        yield _alert(int(0.96 * steps), "non-finite", text or "The loss is NaN.", text)
    if text is not None:
        yield Event(name="error", step=3, detail={"where": text, "error": text, "message": text})
        yield Event(name="disabled", step=3, detail={"part": text, "reason": text})
        yield Event(name=text, step=4, detail={text: text})
    yield Event(
        name="closed",
        step=None,
        detail={"steps": steps, "overhead": 0.0123, "bursts": 30, "probes": 12, "errors": 0},
    )


def _alert(step: int, kind: str, said: str, text: str | None) -> Event:
    return Event(
        name="alert",
        step=step,
        detail={
            "kind": kind,
            "severity": "critical",
            "text": said,
            "advice": text or "Go back to a checkpoint and lower the learning rate.",
            "evidence": {text or "ratio": 1.31, "loss_above_start": True, "reason": text or "amplitude 1.08"},
        },
    )

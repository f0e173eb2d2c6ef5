"""The scenarios: what is trained on what, how, and for how long; and which half each one belongs to.

A family is a data set with an architecture. The split into halves was fixed by family on 2026-11-23, before any
scenario had been trained and before anything was tuned: no pair of data set and architecture is in both. Recipes and
constants are fitted on ``"tune"``; ``"test"`` is for reporting. Scenarios may be corrected for validity (a best LR at
the edge of the sweep, no difference between LRs, too slow), never for how a recipe fares on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from benchmarks.lr.scenario import Scenario


@dataclass(frozen=True)
class Family:
    """Scenarios that share data set and architecture: common settings, and one row of changes each."""

    name: str
    half: str
    rows: dict[str, dict[str, Any]]
    common: dict[str, Any] = field(default_factory=dict)

    def scenarios(self) -> list[Scenario]:
        return [
            Scenario(name=f"{self.name}:{row}", family=self.name, half=self.half, **(self.common | changes))
            for row, changes in self.rows.items()
        ]


def _long(optimizer: str, *, warmup: int = 200, **changes: Any) -> dict[str, Any]:
    """4,000 steps of small batches with linear warm-up and cosine decay."""
    return {"optimizer": optimizer, "steps": 4000, "batch": 8, "warmup": warmup, "schedule": "cosine"} | changes


def _short(optimizer: str, **changes: Any) -> dict[str, Any]:
    return {"optimizer": optimizer} | changes


TUNE = [
    Family(
        "digits/mlp-relu",
        "tune",
        {
            "sgd-long": _long("sgd", label_noise=0.2),
            "sgd-long-cold": _long("sgd", label_noise=0.2, warmup=0),
            "adamw-long": _long("adamw", label_noise=0.2, weight_decay=0.05),
            "momentum-long-summed": _long("momentum", batch=4, loss_scale=4.0, smoothing=0.1, width=16),
            "nesterov-256": _short("nesterov", batch=256, width=128, label_noise=0.2),
            "adam-wide-ntk": _short("adam", width=256, label_noise=0.2, model=(("multiplier", 0.0625),)),
            "rmsprop-raw-inputs": _short(
                "rmsprop", input_scale=8.0, steps=400, label_noise=0.2, model=(("multiplier", 8.0),)
            ),
        },
    ),
    Family(
        "breast/mlp-tanh",
        "tune",
        {
            "adam-long": _long("adam", batch=4, label_noise=0.1, model=(("multiplier", 8.0),)),
            "adam-long-cold": _long("adam", batch=4, label_noise=0.1, model=(("multiplier", 8.0),), warmup=0),
            "sgd-long": _long("sgd", batch=4, label_noise=0.1, model=(("multiplier", 4.0),)),
            "nadam-long-ntk": _long("nadam", width=64, label_noise=0.1, model=(("multiplier", 0.125),)),
            "rmsprop-ntk": _short("rmsprop", batch=16, label_noise=0.1, width=64, model=(("multiplier", 0.0625),)),
            "adamw-multiplied": _short("adamw", batch=16, label_noise=0.1, model=(("multiplier", 8.0),), steps=400),
        },
        {"loss": "binary", "width": 16},
    ),
    Family(
        "mnist/cnn",
        "tune",
        {
            "momentum": _short("momentum", clip=1.0),
            "adamw-groups": _short("adamw", groups=(("*.weight", 0.25),), weight_decay=0.01),
            "nadam-dropout": _short("nadam", model=(("dropout", 0.2),), batch=16),
            "sgd-mse": _short("sgd", loss="mse", batch=64),
            "nesterov-summed": _short("nesterov", batch=16, loss_scale=16.0, clip=5.0),
        },
        {"width": 8},
    ),
    Family(
        "shakespeare/post-ln",
        "tune",
        {
            "adamw": _short("adamw", warmup=30, schedule="cosine", clip=1.0),
            "adamw-cold": _short("adamw", schedule="cosine", clip=1.0),
            "adam-small": _short("adam", batch=4, steps=400, schedule="linear", warmup=20),
            "momentum": _short("momentum", warmup=30, schedule="cosine"),
            "sgd-clip": _short("sgd", clip=0.5, batch=16),
        },
        {"loss": "text", "batch": 8},
    ),
    Family(
        "digits/resnet",
        "tune",
        {
            "momentum": _short("momentum", weight_decay=5e-4),
            "sgd-small-batch": _short("sgd", batch=8),
            "adam-cosine": _short("adam", schedule="cosine", warmup=20, label_noise=0.2),
            "rmsprop": _short("rmsprop", batch=64, label_noise=0.2),
        },
        {"width": 8},
    ),
    Family(
        "diabetes/mlp-gelu",
        "tune",
        {
            "sgd-long": _long("sgd"),
            "momentum-long": _long("momentum", loss_scale=32.0, batch=16, width=8),
            "momentum-long-cold": _long("momentum", loss_scale=32.0, batch=16, width=8, warmup=0),
            "rmsprop-long": _long("rmsprop", batch=4, width=8, model=(("multiplier", 4.0),)),
            "nesterov-ntk": _short("nesterov", width=128, model=(("multiplier", 0.125),), batch=64),
            "adamw-full-batch": _short("adamw", batch=256, width=64, weight_decay=0.1, model=(("multiplier", 0.125),)),
            "nadam-multiplied": _short("nadam", batch=64, width=32, model=(("multiplier", 16.0),)),
        },
        {"loss": "regression", "width": 16},
    ),
    Family(
        "digits/gru",
        "tune",
        {
            "adam": _short("adam"),
            "nadam": _short("nadam", batch=16, schedule="linear"),
            "nesterov": _short("nesterov", clip=1.0),
            "sgd": _short("sgd", batch=8, steps=400),
            "rmsprop-groups": _short("rmsprop", groups=(("head.*", 8.0),)),
        },
        {"width": 24, "label_noise": 0.1},
    ),
    Family(
        "mnist/autoencoder",
        "tune",
        {
            "adam-long-pixels": _long("adam", loss="pixels", batch=4),
            "nesterov-long": _long("nesterov"),
            "nadam-long": _long("nadam", loss="pixels"),
            "nadam-long-cold": _long("nadam", loss="pixels", warmup=0),
            "momentum-summed": _short("momentum", loss_scale=196.0, batch=64, steps=400),
            "adamw-big-init": _short("adamw", init_scale=1.5, batch=64),
            "sgd-pixels": _short("sgd", loss="pixels", batch=16, steps=400),
        },
        {"loss": "reconstruction", "width": 32},
    ),
    Family(
        "digits/finetune-mlp",
        "tune",
        {
            "adamw": _short("adamw", batch=16),
            "sgd-long": _long("sgd", batch=4, label_noise=0.3),
            "rmsprop-long-head": _long("rmsprop", label_noise=0.3, groups=(("4.*", 10.0),)),
            "nadam-head": _short("nadam", groups=(("4.*", 10.0),), label_noise=0.2),
        },
        {"start": "mlp-on-mnist8", "fresh_head": True},
    ),
]

TEST = [
    Family(
        "mnist/mlp-relu",
        "test",
        {
            "sgd-long": _long("sgd", width=16),
            "momentum-long": _long("momentum", width=16, batch=4),
            "momentum-long-cold": _long("momentum", width=16, batch=4, warmup=0),
            "adamw-long-ntk": _long("adamw", label_noise=0.2, weight_decay=1e-3, model=(("multiplier", 1 / 64),)),
            "adam-ntk": _short("adam", width=256, model=(("multiplier", 0.03125),), batch=64),
            "sgd-256-big-init": _short("sgd", batch=256, width=64, init_scale=2.0),
        },
    ),
    Family(
        "digits/mlp-tanh",
        "test",
        {
            "adam-long": _long("adam", label_noise=0.3, width=16),
            "adam-long-cold": _long("adam", label_noise=0.3, width=16, warmup=0),
            "nesterov-long-mse": _long("nesterov", loss="mse", label_noise=0.2, clip=1.0),
            "rmsprop-long": _long("rmsprop", batch=4, smoothing=0.1, model=(("multiplier", 16.0),)),
            "sgd-mse-summed": _short("sgd", loss="mse", loss_scale=320.0, width=64),
            "nadam-big-init": _short("nadam", init_scale=2.0, width=128, batch=64, model=(("multiplier", 0.03125),)),
        },
    ),
    Family(
        "mnist/mlp-gelu",
        "test",
        {
            "nadam-long": _long("nadam", width=16, batch=4),
            "nesterov-long": _long("nesterov", model=(("depth", 4),), smoothing=0.1),
            "rmsprop-128": _short("rmsprop", batch=128, width=128, model=(("multiplier", 1 / 64),)),
            "momentum-dropout": _short("momentum", model=(("dropout", 0.2),), width=128, steps=400),
        },
    ),
    Family(
        "digits/cnn",
        "test",
        {
            "sgd": _short("sgd", batch=16),
            "adam": _short("adam", label_noise=0.2, schedule="cosine"),
            "nesterov-groups": _short("nesterov", groups=(("7.*", 0.1),), clip=2.0, label_noise=0.1),
            "rmsprop-tanh": _short("rmsprop", model=(("activation", "tanh"),), smoothing=0.1, batch=64),
        },
        {"width": 8},
    ),
    Family(
        "mnist/resnet",
        "test",
        {
            "adamw": _short("adamw", weight_decay=0.05),
            "nesterov": _short("nesterov", weight_decay=1e-3, label_noise=0.2),
            "sgd-128": _short("sgd", batch=128, steps=200),
            "momentum-4": _short("momentum", batch=4, steps=400),
        },
        {"width": 8},
    ),
    Family(
        "digits/vit",
        "test",
        {
            "adamw": _short("adamw", warmup=30, schedule="cosine", weight_decay=0.05, clip=1.0),
            "adamw-cold": _short("adamw", schedule="cosine", weight_decay=0.05, clip=1.0),
            "sgd": _short("sgd", clip=1.0),
            "nadam-8": _short("nadam", batch=8, steps=400),
            "momentum-128": _short("momentum", batch=128, steps=200),
        },
        {"width": 24},
    ),
    Family(
        "shakespeare/gru",
        "test",
        {
            "rmsprop": _short("rmsprop"),
            "momentum-clip": _short("momentum", clip=0.25),
            "adam-big-init": _short("adam", init_scale=2.0, schedule="linear"),
        },
        {"loss": "text", "batch": 8},
    ),
    Family(
        "pydoc/pre-ln",
        "test",
        {
            "adamw": _short("adamw", betas=(0.9, 0.95), weight_decay=0.1, clip=1.0, warmup=30, schedule="cosine"),
            "adamw-cold": _short("adamw", betas=(0.9, 0.95), weight_decay=0.1, clip=1.0, schedule="cosine"),
            "rmsprop": _short("rmsprop", batch=16),
            "sgd": _short("sgd"),
        },
        {"loss": "text", "batch": 8},
    ),
    Family(
        "shakespeare/gpt",
        "test",
        {
            "adamw": _short("adamw", betas=(0.9, 0.95), weight_decay=0.1, clip=1.0, warmup=30, schedule="cosine"),
            "adam-4": _short("adam", batch=4, steps=400),
            "nadam-groups": _short("nadam", groups=(("embed.*", 4.0),), schedule="linear"),
            "nesterov-clip": _short("nesterov", clip=0.5, warmup=30, schedule="cosine"),
            "sgd-dropout": _short("sgd", model=(("dropout", 0.1),), loss_scale=32.0),
        },
        {"loss": "text", "batch": 8},
    ),
    Family(
        "pydoc/post-ln",
        "test",
        {
            "nadam": _short("nadam", warmup=30),
            "momentum": _short("momentum", clip=1.0, schedule="linear"),
            "adam-one-block-small-init": _short("adam", init_scale=0.5, model=(("depth", 1),)),
        },
        {"loss": "text", "batch": 8},
    ),
    Family(
        "digits/autoencoder",
        "test",
        {
            "sgd-long-pixels": _long("sgd", loss="pixels", loss_scale=64.0),
            "rmsprop-long": _long("rmsprop"),
            "rmsprop-long-cold": _long("rmsprop", warmup=0),
            "adamw-long-pixels": _long("adamw", loss="pixels", batch=4, weight_decay=0.1),
            "momentum-big-init": _short("momentum", init_scale=2.0, batch=64, steps=400),
        },
        {"loss": "reconstruction", "width": 32},
    ),
    Family(
        "diabetes/mlp-tanh",
        "test",
        {
            "sgd-long": _long("sgd", batch=4, loss_scale=8.0),
            "sgd-long-cold": _long("sgd", batch=4, loss_scale=8.0, warmup=0),
            "nadam-long": _long("nadam", width=8),
            "nesterov-long-ntk": _long("nesterov", width=64, model=(("multiplier", 0.125),), batch=16),
            "adam-raw-inputs": _short("adam", input_scale=20.0, batch=64, width=64, model=(("multiplier", 16.0),)),
        },
        {"loss": "regression", "width": 16},
    ),
    Family(
        "breast/mlp-relu",
        "test",
        {
            "adamw-long": _long("adamw", batch=4, label_noise=0.1, weight_decay=0.01, model=(("multiplier", 16.0),)),
            "sgd-long": _long("sgd", label_noise=0.1),
            "nesterov-long-summed": _long("nesterov", label_noise=0.1, loss_scale=8.0),
            "nadam-deep": _short("nadam", label_noise=0.1, model=(("depth", 4), ("multiplier", 16.0)), width=32),
        },
        {"loss": "binary", "width": 16},
    ),
    Family(
        "mnist8/finetune-mlp",
        "test",
        {
            "momentum-long": _long("momentum", batch=4),
            "adam-long-head": _long("adam", groups=(("4.*", 10.0),)),
            "nesterov": _short("nesterov", batch=16),
            "rmsprop": _short("rmsprop", label_noise=0.2),
        },
        {"start": "mlp-on-digits", "fresh_head": True},
    ),
    Family(
        "shakespeare/lora-gpt",
        "test",
        {
            "adamw": _short("adamw", lora=4, warmup=20, schedule="linear"),
            "sgd": _short("sgd", lora=4),
            "adam-rank-1": _short("adam", lora=1, batch=16),
        },
        {"loss": "text", "batch": 8, "start": "gpt-on-pydoc"},
    ),
    Family(
        "pydoc/finetune-gpt",
        "test",
        {
            "adamw": _short("adamw", warmup=20, schedule="linear"),
            "momentum": _short("momentum", clip=1.0),
        },
        {"loss": "text", "batch": 8, "start": "gpt-on-shakespeare"},
    ),
    Family(
        "mnist8/lora-mlp",
        "test",
        {
            "rmsprop-long": _long("rmsprop", label_noise=0.2),
            "nadam-long": _long("nadam", batch=4),
            "sgd": _short("sgd", batch=16),
        },
        {"start": "mlp-on-digits", "fresh_head": True, "lora": 4},
    ),
]

SCENARIOS = {scenario.name: scenario for family in (*TUNE, *TEST) for scenario in family.scenarios()}


def select(*, half: str | None = None, only: str | None = None) -> list[Scenario]:
    """Scenarios of a half, or those whose names match a glob."""
    return [s for s in SCENARIOS.values() if half in (None, s.half) and fnmatch(s.name, only or "*")]

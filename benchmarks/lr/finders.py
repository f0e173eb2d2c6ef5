"""The LR finders that people use, run through their own packages as their documentation says.

They are installed from requirements.txt into an environment of their own, without their dependencies on torch; nothing
here is imported unless it is asked for. Each takes a scenario and a seed and returns the suggestion, or None where the
tool gives none. All see the scenario's model, optimizer, loss, batch size and, where they have it, clipping.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.lr.scenario import Scenario

STEPS = 100  # the default of each of these tools
Finder = Callable[[Scenario, int], float | None]


def _loader(scenario: Scenario, seed: int) -> DataLoader[Any]:
    data = scenario.data()
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        TensorDataset(data.x, data.y), batch_size=scenario.batch, shuffle=True, drop_last=True, generator=generator
    )


@contextlib.contextmanager
def _quietly(seed: int) -> Iterator[None]:
    """A seeded global state, an empty working directory, and no output."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    here = os.getcwd()
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        tempfile.TemporaryDirectory() as folder,
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)


def _usable(lr: float | None) -> float | None:
    return float(lr) if lr is not None and math.isfinite(lr) and lr > 0 else None


def torch_lr_finder(scenario: Scenario, seed: int) -> float | None:
    """torch-lr-finder's README: from 1e-7 to 100 in 100 steps; the steepest gradient."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from torch_lr_finder import LRFinder

    with _quietly(seed):
        model = scenario.new_model(seed)
        finder = LRFinder(model, scenario.new_optimizer(model, 1e-7), scenario.criterion, device="cpu")
        finder.range_test(_loader(scenario, seed), start_lr=1e-7, end_lr=100, num_iter=STEPS)
        _, axes = plt.subplots()
        try:
            found = finder.plot(ax=axes, suggest_lr=True)
        finally:
            plt.close("all")
    return _usable(found[1]) if isinstance(found, tuple) else None


def lightning(scenario: Scenario, seed: int) -> float | None:
    """``Tuner(trainer).lr_find(module)`` with the defaults: from 1e-8 to 1 in 100 steps."""
    import lightning.pytorch as pl
    from lightning.pytorch.tuner import Tuner

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.lr = scenario.new_model(seed), 1e-3

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return scenario.criterion(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return scenario.new_optimizer(self.model, self.lr)

    with _quietly(seed):
        trainer = pl.Trainer(
            **{"accelerator": "cpu", "devices": 1, "logger": False, "max_epochs": -1},
            **{"enable_progress_bar": False, "enable_model_summary": False, "gradient_clip_val": scenario.clip},
        )
        found = Tuner(trainer).lr_find(Module(), train_dataloaders=_loader(scenario, seed))
        lr = None if found is None else found.suggestion()
    return _usable(lr)


@functools.lru_cache(maxsize=4)
def _fastai(scenario: Scenario, seed: int) -> dict[str, float]:
    """``Learner.lr_find()`` with its four rules: one run, from 1e-7 to 10 in 100 steps."""
    from fastai.basics import DataLoaders, Learner, OptimWrapper
    from fastai.callback.schedule import minimum, slide, steep, valley
    from fastai.callback.training import GradientClip

    from benchmarks.lr.scenario import OPTIMIZERS

    kind, options = OPTIMIZERS[scenario.optimizer]
    if scenario.betas is not None:
        options = options | {"betas": scenario.betas}
    rules = (valley, slide, minimum, steep)
    with _quietly(seed):
        opt = functools.partial(OptimWrapper, opt=kind, **options)
        clips = [] if scenario.clip is None else [GradientClip(scenario.clip)]
        loaders = DataLoaders(_loader(scenario, seed), _loader(scenario, seed), device=torch.device("cpu"))
        learner = Learner(
            loaders, scenario.new_model(seed), scenario.criterion, opt_func=opt, cbs=clips, wd=scenario.weight_decay
        )
        with learner.no_bar():
            found = learner.lr_find(num_it=STEPS, show_plot=False, suggest_funcs=rules)
    return dict(zip((rule.__name__ for rule in rules), found, strict=True))


def fastai(rule: str) -> Finder:
    """One of fastai's rules: valley (its default), slide, minimum, steep."""
    return lambda scenario, seed: _usable(_fastai(scenario, seed)[rule])


FINDERS: dict[str, Finder] = {
    "torch-lr-finder": torch_lr_finder,
    "lightning": lightning,
    **{f"fastai-{rule}": fastai(rule) for rule in ("valley", "slide", "minimum", "steep")},
}

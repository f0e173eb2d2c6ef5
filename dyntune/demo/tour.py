"""What the demo measures: :func:`tour`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from dyntune.curvature.density import SpectralDensity, spectral_density
from dyntune.curvature.eigenvalues import Eigenvalues
from dyntune.curvature.hessian import hessian, hessian_eigenvalues
from dyntune.demo.data import Batch, Text, english
from dyntune.demo.model import CharTransformer, loss_fn, train
from dyntune.records import Recommendation
from dyntune.suggest.lr import suggest_lr

__all__ = ["DemoResult", "Size", "Sweep", "tour"]

# Chosen before anything was measured, so that the suggestion cannot have had a hand in it: factor 4, 1e-4 to 0.4.
SWEEP_LRS = tuple(1e-4 * 4**i for i in range(7))


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much the demo does.

    Args:
        num_steps: Steps of every training run.
        lrs: Learning rates of the sweep.
        max_gradients: Budget of the suggestion.
        batch_size: Windows per batch.
        length: Characters per window.
        width: Width of the model.
        eigenvalues: How many eigenvalues.
        products: Budget of products for them.
        curvature_batches: Batches on which curvature is measured.
        probes: Random probes of the density.
        steps: Lanczos steps of each.
    """

    num_steps: int = 300
    lrs: tuple[float, ...] = SWEEP_LRS
    max_gradients: int = 200
    batch_size: int = 16
    length: int = 64
    width: int = 64
    eigenvalues: int = 3
    products: int = 250
    curvature_batches: int = 2
    probes: int = 6
    steps: int = 24

    @classmethod
    def quick(cls) -> Size:
        """For tests: seconds, and numbers that mean little."""
        return cls(
            num_steps=10,
            lrs=SWEEP_LRS[1:7:2],
            max_gradients=60,
            batch_size=4,
            length=16,
            width=16,
            eigenvalues=1,
            products=40,
            curvature_batches=1,
            probes=2,
            steps=8,
        )


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What training reaches: the same start, the same batches, another learning rate.

    Args:
        lrs: The grid.
        losses: Held-out loss at the end of each run; NaN or infinite where it blew up.
        start: Held-out loss before training.
        suggested: Held-out loss of the run at the suggested rate; None where nothing was suggested.
        num_steps: Steps of each run.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    start: float
    suggested: float | None
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Everything that the demo measured.

    Args:
        numel: Parameters of the model.
        num_characters: Characters of the training text.
        before: Largest eigenvalues before training.
        after: The same after training at the suggested rate.
        density: All eigenvalues after training.
        recommendation: The suggested learning rate.
        sweep: The truth to compare it with.
        seed: What everything was drawn from.
        size: How much was done.
    """

    numel: int
    num_characters: int
    before: Eigenvalues
    after: Eigenvalues
    density: SpectralDensity
    recommendation: Recommendation
    sweep: Sweep
    seed: int
    size: Size


Say = Callable[[str], None]


def tour(*, size: Size | None = None, seed: int = 0, say: Say | None = None) -> DemoResult:
    """Measure, suggest, train, measure again.

    Args:
        size: How much to do; default what takes one to two minutes on two cores.
        seed: Seed of the weights and the batches.
        say: Called with each finding as one line of text.

    Returns:
        All results; the same ones for the same seed on the same machine.
    """
    size, say = size or Size(), say or (lambda _: None)
    text = english()
    model: nn.Module = _model(text, size, seed)
    numel = sum(p.numel() for p in model.parameters())
    say(f"A transformer with {numel:,} parameters learns {len(text.train):,} characters of Python's own help.")
    batches = text.batches(text.train, size.num_steps, size=size.batch_size, length=size.length, seed=seed + 1)
    probe = batches[: size.curvature_batches]

    with _bar("sharpness", None, "product") as update:
        before = _eigenvalues(model, probe, size, seed, update)
    say(f"Sharpness before training: {before[0]:.4g} ({before.num_products} Hessian-vector products).")

    with _bar("learning rate", size.max_gradients, "gradient") as update:
        recommendation = suggest_lr(
            model,
            batches,
            loss_fn,
            optimizer="adamw",
            num_steps=size.num_steps,
            schedule="linear decay",
            max_gradients=size.max_gradients,
            seed=seed,
            progress=lambda _stage, spent, _best: update(spent),
        )
    say(f"Suggested learning rate: {recommendation}.")

    sweep, model = _sweep(text, batches, recommendation, size, seed)
    say(_verdict(sweep))

    with _bar("sharpness", None, "product") as update:
        after = _eigenvalues(model, probe, size, seed, update)
    say(f"Sharpness after training: {after[0]:.4g}.")

    with _bar("spectral density", size.probes, "probe") as update:
        density = spectral_density(
            hessian(model, probe, loss_fn, seed=seed),
            num_probes=size.probes,
            num_steps=size.steps,
            seed=seed,
            progress=lambda done, _: update(done),
        )
    return DemoResult(
        numel=numel,
        num_characters=len(text.train),
        before=before,
        after=after,
        density=density,
        recommendation=recommendation,
        sweep=sweep,
        seed=seed,
        size=size,
    )


def _model(text: Text, size: Size, seed: int) -> CharTransformer:
    return CharTransformer(len(text.characters), width=size.width, length=size.length, seed=seed)


def _eigenvalues(
    model: nn.Module, batches: list[Batch], size: Size, seed: int, update: Callable[[float], None]
) -> Eigenvalues:
    return hessian_eigenvalues(
        model,
        batches,
        loss_fn,
        k=size.eigenvalues,
        max_products=size.products,
        seed=seed,
        progress=lambda done, _: update(done),
    )


def _sweep(
    text: Text, batches: list[Batch], recommendation: Recommendation, size: Size, seed: int
) -> tuple[Sweep, nn.Module]:
    """Train at every rate and at the suggested one; also the model that the latter made (else the untrained one)."""
    held_out = text.batches(text.held_out, 8, size=size.batch_size, length=size.length, seed=seed + 2)
    warmup = recommendation.warmup_steps or 0
    model: nn.Module = _model(text, size, seed)
    start = _loss(model, held_out)
    losses, suggested = [], None
    rates = [*size.lrs, *([] if recommendation.value is None else [recommendation.value])]
    with tqdm(total=len(rates) * size.num_steps, desc="sweep", unit="step", leave=False, disable=None) as bar:
        for index, lr in enumerate(rates):
            trained = _model(text, size, seed)
            train(trained, _counted(batches, bar), lr=lr, warmup=warmup, num_steps=size.num_steps)
            loss = _loss(trained, held_out)
            if index < len(size.lrs):
                losses.append(loss)
            else:
                suggested, model = loss, trained
    sweep = Sweep(lrs=size.lrs, losses=tuple(losses), start=start, suggested=suggested, num_steps=size.num_steps)
    return sweep, model


def _counted(batches: list[Batch], bar: tqdm) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        bar.update()


def _loss(model: nn.Module, batches: list[Batch]) -> float:
    with torch.no_grad():
        return sum(float(loss_fn(model, batch)) for batch in batches) / len(batches)


def _verdict(sweep: Sweep) -> str:
    best = min(range(len(sweep.lrs)), key=lambda i: (not sweep.losses[i] < float("inf"), sweep.losses[i]))
    there = "" if sweep.suggested is None else f"loss {sweep.suggested:.3f} there, "
    return (
        f"After {sweep.num_steps} steps each: {there}{sweep.losses[best]:.3f} at {sweep.lrs[best]:.2g}, the best of "
        f"{len(sweep.lrs)} rates tried; {sweep.start:.3f} before training."
    )


@contextmanager
def _bar(name: str, total: int | None, unit: str) -> Iterator[Callable[[float], None]]:
    """A progress bar that is told the count so far; none where the output is no terminal."""
    with tqdm(total=total, desc=name, unit=unit, leave=False, disable=None) as bar:
        yield lambda done: bar.update(done - bar.n)

"""Draw the figures of the README and the documentation: python docs/make_figures.py [FOLDER]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from torch import nn

import dyntune
from dyntune.demo import tour
from dyntune.demo.data import Batch, english
from dyntune.demo.model import CharTransformer, loss_fn
from dyntune.demo.page import with_sweep
from dyntune.plots import plot_density, plot_recommendation
from dyntune.plots.style import BLUE, GREEN, ORANGE, label, new_axes, tidy
from dyntune.plots.svg import to_svg

HERE = Path(__file__).resolve().parent
SEED = 0
RATE = 3e-3

Figure = tuple[Axes, str]  # and what it shows, for readers who do not see it


def main() -> int:
    """Measure with the default seeds and write one SVG for each figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "_static")
    parser.add_argument("--only", choices=("demo", "concepts"), help="one half of them")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads add up in another order, and training carries that on: other figures
    figures: dict[str, Figure] = {}
    if options.only != "concepts":
        figures |= of_the_demo()
    if options.only != "demo":
        figures |= of_a_transformer() | of_noisy_targets()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, (axes, description) in figures.items():
        svg = to_svg(axes.get_figure(root=True), name=name, description=description, standalone=True)
        (options.folder / f"{name}.svg").write_text(f"{svg}\n", encoding="utf-8")
    return 0


def of_the_demo() -> dict[str, Figure]:
    """What `dyntune demo` measures."""
    result = tour(say=lambda line: sys.stderr.write(f"{line}\n") and None)
    return {
        "demo": (
            plot_recommendation(with_sweep(result)),
            "The suggested learning rate with its range, and what training at seven other rates reached.",
        ),
        "density": (plot_density(result.density), "Density of the Hessian's eigenvalues after training."),
    }


def of_a_transformer() -> dict[str, Figure]:
    """Curvature of a small character transformer after 200 steps of AdamW."""
    text = english()
    batches = text.batches(text.train, 208, size=16, length=32, seed=SEED)
    model = CharTransformer(len(text.characters), width=32, length=32, seed=SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for batch in batches[:200]:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    fresh = batches[200:]
    few = fresh[:1]
    operator = dyntune.hessian(model, few, loss_fn)
    top = dyntune.eigenvalues(operator)
    found = dyntune.sharpness(
        model,
        fresh,
        loss_fn,
        optimizer=optimizer,
        quantities=("lambda_max", "lambda_min", "preconditioned", "batch", "directional", "critical_lr"),
    )
    return {
        "sharpness": (
            found.plot(optimizer=optimizer),
            "Curvature of a small transformer under AdamW as a multiple of the limits at its learning rate.",
        ),
        "blocks": (
            dyntune.block_eigenvalues(model, few, loss_fn).plot(whole=top),
            "Largest eigenvalue of the diagonal block of every layer, and of the whole Hessian.",
        ),
        "mass": (
            dyntune.block_mass(operator, top.vectors[0]).plot(),
            "Share of the top eigenvector in every layer, beside that of a random direction.",
        ),
        "slice": (
            dyntune.loss_slice(model, few, loss_fn, direction=top).plot(),
            "Loss along the top eigenvector, and what gradient and curvature at the middle predict.",
        ),
    }


def of_noisy_targets() -> dict[str, Figure]:
    """Hessian, Gauss-Newton and empirical Fisher while a network learns targets of which a fifth are random."""
    model, batch = _noisy_problem()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    steps, series = range(0, 401, 20), {"H": [], "G": [], "F": []}
    for step in range(max(steps) + 1):
        if step in steps:
            for name, make in (("H", dyntune.hessian), ("G", dyntune.gauss_newton), ("F", dyntune.empirical_fisher)):
                series[name].append(float(dyntune.eigenvalues(make(model, batch, criterion=criterion))))
        optimizer.zero_grad()
        criterion(model(batch[0]), batch[1]).backward()
        optimizer.step()
    ax = new_axes(height=2.9)
    looks = (
        ("H", "Hessian", BLUE, "-", 6),
        ("G", "Gauss-Newton", ORANGE, "--", -6),
        ("F", "empirical Fisher", GREEN, "-", 0),
    )
    for key, name, color, line, up in looks:
        ax.plot(steps, series[key], color=color, linewidth=1.6, linestyle=line)
        label(ax, steps[-1], series[key][-1], name, color=color, offset=(5, up), va="center", columns=13)
    ax.set_yscale("log")
    tidy(ax, title="Gauss-Newton follows the Hessian, empirical Fisher does not", xlabel="step of full-batch Adam",
         ylabel="largest eigenvalue", grid="y")  # fmt: skip
    return {"gauss-newton": (ax, "Largest eigenvalues of Hessian, Gauss-Newton and empirical Fisher over training.")}


def _noisy_problem() -> tuple[nn.Module, Batch]:
    """A small network, and 512 rows of a linear rule with a fifth of its classes drawn anew."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        x = torch.randn(512, 16)
        y = (x @ torch.randn(16, 4)).argmax(dim=1)
        return model, (x, torch.where(torch.rand(512) < 0.2, torch.randint(4, (512,)), y))


if __name__ == "__main__":
    sys.exit(main())

"""Draw the figures of the README and the documentation from the demo: python docs/make_figures.py [FOLDER]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dyntune.demo import tour
from dyntune.demo.page import with_sweep
from dyntune.plots import plot_density, plot_recommendation
from dyntune.plots.svg import to_svg

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Run the demo with its default seed and write one SVG for each figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "_static")
    folder = parser.parse_args().folder
    result = tour(say=lambda line: sys.stderr.write(f"{line}\n") and None)
    figures = {
        "demo": (
            plot_recommendation(with_sweep(result)),
            "The suggested learning rate with its range, and what training at seven other rates reached.",
        ),
        "density": (plot_density(result.density), "Density of the Hessian's eigenvalues after training."),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (axes, description) in figures.items():
        svg = to_svg(axes.get_figure(root=True), name=name, description=description, standalone=True)
        (folder / f"{name}.svg").write_text(f"{svg}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

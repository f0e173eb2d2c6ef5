"""Figures: for each, what is shown as plain data, and the drawing of it. Importing this loads matplotlib."""

from dyntune.plots.density import plot_density as plot_density
from dyntune.plots.eigenvalues import plot_eigenvalues as plot_eigenvalues
from dyntune.plots.recommendation import plot_recommendation as plot_recommendation

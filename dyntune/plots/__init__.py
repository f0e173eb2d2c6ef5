"""Figures: for each, what is shown as plain data, and the drawing of it. Importing this loads matplotlib."""

from dyntune.plots.attention import plot_attention as plot_attention
from dyntune.plots.beta2 import plot_beta2 as plot_beta2
from dyntune.plots.blocks import plot_block_mass as plot_block_mass
from dyntune.plots.blocks import plot_blocks as plot_blocks
from dyntune.plots.density import plot_density as plot_density
from dyntune.plots.eigenvalues import plot_eigenvalues as plot_eigenvalues
from dyntune.plots.entropy import plot_entropy as plot_entropy
from dyntune.plots.entropy import plot_entropy_coef as plot_entropy_coef
from dyntune.plots.heads import plot_heads as plot_heads
from dyntune.plots.mixture import plot_mixture as plot_mixture
from dyntune.plots.recommendation import plot_recommendation as plot_recommendation
from dyntune.plots.reliability import plot_reliability as plot_reliability
from dyntune.plots.run import plot_run as plot_run
from dyntune.plots.schedule import plot_schedule as plot_schedule
from dyntune.plots.sharpness import plot_sharpness as plot_sharpness
from dyntune.plots.slices import plot_slice as plot_slice
from dyntune.plots.stability_map import plot_stability_map as plot_stability_map
from dyntune.plots.story import plot_story as plot_story

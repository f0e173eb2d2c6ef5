"""Measure the training dynamics of PyTorch models and turn them into choices with evidence."""

from dyntune import errors as errors
from dyntune import stability as stability
from dyntune.curvature.algebra import affine as affine
from dyntune.curvature.blocks import block_eigenvalues as block_eigenvalues
from dyntune.curvature.blocks import block_mass as block_mass
from dyntune.curvature.density import SpectralDensity as SpectralDensity
from dyntune.curvature.density import spectral_density as spectral_density
from dyntune.curvature.eigenvalues import Eigenvalues as Eigenvalues
from dyntune.curvature.eigenvalues import eigenvalues as eigenvalues
from dyntune.curvature.fisher import empirical_fisher as empirical_fisher
from dyntune.curvature.gauss_newton import gauss_newton as gauss_newton
from dyntune.curvature.hessian import HessianOperator as HessianOperator
from dyntune.curvature.hessian import hessian as hessian
from dyntune.curvature.hessian import hessian_eigenvalues as hessian_eigenvalues
from dyntune.curvature.paths import loss_path as loss_path
from dyntune.curvature.preconditioned import preconditioned as preconditioned
from dyntune.curvature.sharpness import Sharpness as Sharpness
from dyntune.curvature.sharpness import sharpness as sharpness
from dyntune.curvature.slices import LossSlice as LossSlice
from dyntune.curvature.slices import loss_slice as loss_slice
from dyntune.curvature.trace import trace as trace
from dyntune.dynamics.alignment import eigenvector_shares as eigenvector_shares
from dyntune.dynamics.alignment import spectral_alignment as spectral_alignment
from dyntune.dynamics.attention import attention_statistics as attention_statistics
from dyntune.dynamics.logits import output_logits as output_logits
from dyntune.dynamics.units import dead_units as dead_units
from dyntune.monitor.checkpoints import trace_checkpoints as trace_checkpoints
from dyntune.monitor.load import load_run as load_run
from dyntune.monitor.monitor import Monitor as Monitor
from dyntune.monitor.run import Run as Run
from dyntune.monitor.story import Story as Story
from dyntune.monitor.story import explain as explain
from dyntune.numerics.operator import LinearOperator as LinearOperator
from dyntune.objective.losses import Loss as Loss
from dyntune.objective.team import Team as Team
from dyntune.records import Estimate as Estimate
from dyntune.records import Recommendation as Recommendation
from dyntune.records import Status as Status
from dyntune.suggest.beta2 import suggest_beta2 as suggest_beta2
from dyntune.suggest.beta2_run import suggest_beta2_from_run as suggest_beta2_from_run
from dyntune.suggest.betas import suggest_betas as suggest_betas
from dyntune.suggest.lr import suggest_lr as suggest_lr
from dyntune.suggest.schedule import suggest_schedule as suggest_schedule
from dyntune.suggest.schedule_rule import Schedule as Schedule

__version__ = "0.1.0"

"""Reinforcement learning: policy objectives, curvature over the entropy coefficient, problems with exact answers."""

from dyntune.rl.bandit import GaussianBandit as GaussianBandit
from dyntune.rl.bandit import SoftmaxBandit as SoftmaxBandit
from dyntune.rl.bandit import tanh_gaussian_entropy as tanh_gaussian_entropy
from dyntune.rl.ceilings import smoothness_ceiling as smoothness_ceiling
from dyntune.rl.exact import dice_return as dice_return
from dyntune.rl.exact import ratio_hessian as ratio_hessian
from dyntune.rl.exact import return_hessian as return_hessian
from dyntune.rl.lqr import LQR as LQR
from dyntune.rl.mdp import TabularMDP as TabularMDP
from dyntune.rl.policy import Estimator as Estimator
from dyntune.rl.policy import PolicyObjective as PolicyObjective
from dyntune.rl.squashed import SquashedBandit as SquashedBandit
from dyntune.rl.temperature import TemperatureMap as TemperatureMap
from dyntune.rl.temperature import feasible_entropy as feasible_entropy

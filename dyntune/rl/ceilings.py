r"""How curved can a softmax policy's objective be? Bounds that hold for every policy and every problem of a size.

Let :math:`\pi` be a softmax over A actions and :math:`v` a unit vector of changes of its logits, with
:math:`\bar v = E_\pi v`. Then :math:`\mathrm{Var}_\pi(v) \le 1/2` and :math:`(v_a - \bar v)^2 \le 2`, since two entries
of a unit vector differ by at most :math:`\sqrt 2`. The second derivative along v is

.. math:: E_\pi[(f - \bar f)(v - \bar v)^2] - \tau \mathrm{Var}_\pi(v), \qquad f = q - \tau \log \pi,

for action values q. With q in an interval of length s the return alone gives at most :math:`s/2`, the entropy alone
between :math:`-(1 + \log A)/2` and :math:`2 \log A`.

In a discounted MDP the second derivative of the values is :math:`M(T_{\theta\theta} + 2 T_{\theta V})` with the
occupancy :math:`M = (I - \gamma P_\pi)^{-1}`, of norm at most :math:`1/(1-\gamma)`, and the soft Bellman operator T: a
term of the above kind per state, and a cross term
:math:`2\gamma E_d \mathrm{Cov}_\pi(v, P\,dV)` in which :math:`|\mathrm{Cov}| \le \|dV\|_\infty / \sqrt 2` and
:math:`\|dV\|_\infty \le \max_s |\mathrm{Cov}_\pi(f, v)| / (1-\gamma)`. With
:math:`|\mathrm{Cov}_\pi(q, v)| \le s / (2\sqrt 2)` and :math:`|\mathrm{Cov}_\pi(\log\pi, v)| \le \sqrt 2 \log A` the
terms add up to

.. math:: \frac{s}{2 (1-\gamma)^3} + \tau \frac{(4 - 3\gamma) \log A}{2 (1-\gamma)^3},

where s is now the length of the interval of rewards. Published constants are larger: :math:`8/(1-\gamma)^3` for the
return with rewards in [0, 1] (Agarwal et al. 2021, arXiv:1908.00261, Lemma D.4; Mei et al. 2020, arXiv:2005.06392,
Lemma 7).

Such a ceiling is above what a given policy shows by a factor of three without a future and of thousands with a long
one: a check that a measured number cannot be right, never advice about a learning rate.
"""

from __future__ import annotations

import math

from dyntune.errors import InvalidArgumentError

__all__ = ["smoothness_ceiling"]


def smoothness_ceiling(*, actions: int, gamma: float = 0.0, tau: float = 0.0, spread: float = 1.0) -> float:
    """Bound on the spectral norm of the Hessian over all softmax policies and all MDPs of a size: see the module.

    Args:
        actions: A >= 1.
        gamma: Discount, in [0, 1); 0 for a bandit.
        tau: Weight of the entropy in every step, >= 0.
        spread: Largest minus smallest reward, >= 0.

    Returns:
        Unit return / parameter^2.

    Raises:
        InvalidArgumentError: A number outside its range.

    Example:
        >>> smoothness_ceiling(actions=2, gamma=0.5)
        4.0
    """
    if actions < 1 or not 0 <= gamma < 1:
        raise InvalidArgumentError(f"actions={actions}, gamma={gamma}: at least one action, and a discount in [0, 1).")
    if not 0 <= tau < math.inf or not 0 <= spread < math.inf:
        raise InvalidArgumentError(f"tau={tau}, spread={spread}: finite numbers >= 0.")
    return (spread + tau * (4 - 3 * gamma) * math.log(actions)) / (2 * (1 - gamma) ** 3)

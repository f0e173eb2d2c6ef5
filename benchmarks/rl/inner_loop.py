"""PPO's inner loop on a fixed rollout, plain gradient steps: when a step raises the loss, when a direction flips.

    python benchmarks/rl/inner_loop.py

A PPO of stable-baselines3 is trained on CartPole to some rollouts; at each of them the loss of the policy (ratio form,
unclipped, policy parameters alone, in float64) is that of an inner loop. Two claims are local, and tried where they are
meant: beside a minimum of the inner loop's loss (L-BFGS from the policy as it is, with an entropy coefficient of 1, at
which there is a minimum):

- the first step raises the loss from 2 / lambda_dir on, lambda_dir = g.Hg / g.g the curvature along the gradient;
- the gradient's component along the top eigenvector changes sign from step to step and grows by |1 - eta lambda| for a
  rate above 2 / lambda_max, and only then.

The first is also tried at the policy as it was collected, with a coefficient of 0.01: there a step of that length
leaves the neighbourhood in which the loss is quadratic, and the claim does not hold. Writes results/inner_loop.json.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import copy
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import itertools

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from torch.distributions import Categorical

from benchmarks.peer_suite.provenance import provenance
from dyntune.integrations.stable_baselines3 import policy_objective
from dyntune.numerics.affine import affine_spectrum
from dyntune.rl import PolicyObjective

RESULT = Path(__file__).resolve().parent / "results" / "inner_loop.json"
ROLLOUTS, SEEDS = (1, 3, 6), (0, 1, 2)
ALPHA, COLLECTED = 1.0, 0.01
SHARES = (0.5, 0.8, 0.95, 1.05, 1.2, 1.5)  # of the edge along the top eigenvector
PUSH = 1e-4  # length, so that the loss is as good as quadratic
ITERATIONS = 400  # of L-BFGS
STEPS = 6


class Kept(BaseCallback):
    """Copies of the policy with its objective's batch, at the end of some rollouts."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.found = 0, []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.count += 1
        if self.count in ROLLOUTS:
            policy = copy.deepcopy(self.model.policy).double()  # before it is asked, which leaves a graph in it
            self.found.append((self.count, policy, policy_objective(self.model).batch))


def moved(objective: PolicyObjective, direction: list[torch.Tensor], by: float) -> None:
    with torch.no_grad():
        for p, d in zip(objective.parameters.values(), direction, strict=True):
            p.add_(d, alpha=by)


def gradient(objective: PolicyObjective, alpha: float = ALPHA) -> list[torch.Tensor]:
    loss, entropy = objective.gradients()
    return [g - alpha * h for g, h in zip(loss, entropy, strict=True)]


def value(objective: PolicyObjective, alpha: float = ALPHA) -> float:
    loss, entropy = objective()
    return loss - alpha * entropy


def minimised(objective: PolicyObjective) -> float:
    """Bring the parameters to a minimum; the length of the gradient there."""
    parameters = list(objective.parameters.values())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=ITERATIONS, history_size=50, tolerance_grad=1e-9, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        for p, g in zip(parameters, gradient(objective), strict=True):
            p.grad = g
        return value(objective)

    optimizer.step(closure)  # type: ignore[arg-type]
    for p in parameters:
        p.grad = None
    g = gradient(objective)
    return math.sqrt(dot(g, g))


def dot(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def frozen(policy: Any, batch: dict[str, Any]) -> PolicyObjective:
    """The ratio objective with the old log-probabilities held at the present ones for good, as in an inner loop."""
    x, actions, weights = batch["observations"].double(), batch["actions"], batch["advantages"].double()

    def distribution(module: Any) -> Categorical:
        # evaluate_actions() itself turns observations into float32.
        return Categorical(logits=module.action_net(module.mlp_extractor.forward_actor(x)))

    with torch.no_grad():
        old = distribution(policy).log_prob(actions)

    def losses(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = distribution(module)
        return -(weights * torch.exp(found.log_prob(actions) - old)).mean(), found.entropy().mean()

    return PolicyObjective(policy, losses, estimator="ratio")


def first_rise(objective: PolicyObjective, alpha: float) -> dict[str, float]:
    """The rate from which one step raises the loss, by bisection, and 2 / lambda_dir."""
    g = gradient(objective, alpha)
    with objective.family().session() as product:
        a, b = product(g)
        curvature = dot(g, [x + alpha * y for x, y in zip(a, b, strict=True)]) / dot(g, g)
    if curvature <= 0:
        return {"lambda_dir": curvature, "predicted": math.inf, "observed": math.nan}
    start = value(objective, alpha)

    def rises(lr: float) -> bool:
        moved(objective, g, -lr)
        after = value(objective, alpha)
        moved(objective, g, lr)
        return after > start

    low, high = 0.0, 8 / curvature
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if rises(middle) else (middle, high)
    return {"lambda_dir": curvature, "predicted": 2 / curvature, "observed": high}


def flips(objective: PolicyObjective) -> list[dict[str, float]]:
    """Factors by which the gradient's component along the top eigenvector is multiplied, by share of the edge."""
    spectrum = affine_spectrum(objective.family(), alphas=(0.0, ALPHA), rtol=1e-6, bracket_rtol=0.01)
    top, v = spectrum.at(ALPHA), spectrum.direction(ALPHA)
    kept = [p.detach().clone() for p in objective.parameters.values()]
    found = []
    for share in SHARES:
        lr = share * 2 / top.value
        moved(objective, v, PUSH)
        parts = [dot(gradient(objective), v)]
        for _ in range(STEPS):
            moved(objective, gradient(objective), -lr)
            parts.append(dot(gradient(objective), v))
        _put(objective, kept)
        factors = [b / a for a, b in itertools.pairwise(parts)]
        found.append({"share": share, "expected": 1 - 2 * share, "factor": factors[0], "last": factors[-1]})
    return found


def _put(objective: PolicyObjective, values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for p, x in zip(objective.parameters.values(), values, strict=True):
            p.copy_(x)


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for seed in SEEDS:
        kept = Kept()
        PPO("MlpPolicy", "CartPole-v1", n_steps=512, batch_size=64, seed=seed, device="cpu").learn(
            512 * max(ROLLOUTS), callback=kept
        )
        for count, policy, batch in kept.found:
            objective = frozen(policy, batch)
            row: dict[str, Any] = {"seed": seed, "rollout": count, "collected": first_rise(objective, COLLECTED)}
            row["gradient"] = minimised(objective)
            row["flips"] = flips(objective)
            g = torch.Generator().manual_seed(seed)
            beside = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in objective.parameters.values()]
            moved(objective, beside, PUSH / math.sqrt(dot(beside, beside)))
            row["rise"] = first_rise(objective, ALPHA)
            rows.append(row)
            print(json.dumps(row), flush=True)
    ratios = [r["rise"]["observed"] / r["rise"]["predicted"] for r in rows]
    far = [r["collected"]["observed"] / r["collected"]["predicted"] for r in rows if r["collected"]["lambda_dir"] > 0]
    errors = [abs(f["factor"] / f["expected"] - 1) for r in rows for f in r["flips"] if f["share"] > 1]
    signs = [f["factor"] < 0 and f["last"] < 0 for r in rows for f in r["flips"] if f["share"] > 1]
    grew = {
        share: sum(abs(f["factor"]) > 1 for r in rows for f in r["flips"] if f["share"] == share) for share in SHARES
    }
    summary = {
        "first_rise_ratio": {"n": len(ratios), "least": min(ratios), "most": max(ratios)},
        "as_collected": {"n": len(far), "least": min(far), "most": max(far), "negative": len(rows) - len(far)},
        "factor_error_above_edge": {"n": len(errors), "worst": max(errors)},
        "flips_above_edge": [sum(signs), len(signs)],
        "grows": {str(k): [n, len(rows)] for k, n in grew.items()},
    }
    print(json.dumps(summary, indent=1))
    result = {"schema": 1, "about": "plain steps on the policy loss of a fixed rollout", "alpha": ALPHA}
    result |= {"summary": summary, "rows": rows}
    result["provenance"] = provenance() | {"command": "python benchmarks/rl/inner_loop.py"}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

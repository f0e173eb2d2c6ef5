"""One Hessian-vector product against one gradient, for each library's own product."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from peer_suite.plain import flatten, gradient, rebuilt_product, retained_product
from peer_suite.problems import Problem
from peer_suite.solvers import Trial, build_pyhessian

GRADIENT = "gradient"
RAW_RETAINED = "torch, double backward, retained graph"
RAW_REBUILT = "torch, double backward, new graph"
DYNTUNE = "dyntune, session"

Call = Callable[[], object]
Prepare = Callable[[Problem, list[Tensor], ExitStack], Call]


def _gradient(problem: Problem, _vector: list[Tensor], _stack: ExitStack) -> Call:
    model = problem.fresh_model()
    return lambda: gradient(problem, model)


def _retained(problem: Problem, vector: list[Tensor], _stack: ExitStack) -> Call:
    product = retained_product(problem, problem.fresh_model())
    return lambda: product(vector)


def _rebuilt(problem: Problem, vector: list[Tensor], _stack: ExitStack) -> Call:
    product = rebuilt_product(problem, problem.fresh_model())
    return lambda: product(vector)


def _pyhessian_product(problem: Problem, vector: list[Tensor], _stack: ExitStack) -> Call:
    from pyhessian import hessian_vector_product

    computation = build_pyhessian(Trial(problem, problem.fresh_model(), seed=0))
    return lambda: hessian_vector_product(computation.gradsH, computation.params, vector)


def _eigenthings_product(problem: Problem, vector: list[Tensor], _stack: ExitStack) -> Call:
    from hessian_eigenthings import HessianOperator, supervised_loss

    batches = [(problem.inputs, problem.targets)]
    operator = HessianOperator(problem.fresh_model(), batches, supervised_loss(problem.criterion))
    flat = flatten(vector)
    return lambda: operator.matvec(flat)


def _curvlinops_product(problem: Problem, vector: list[Tensor], _stack: ExitStack) -> Call:
    from curvlinops import HessianLinearOperator

    model = problem.fresh_model()
    batches = [(problem.inputs, problem.targets)]
    operator = HessianLinearOperator(model, problem.criterion, list(model.parameters()), batches)
    flat = flatten(vector)
    return lambda: operator @ flat


def _dyntune_product(problem: Problem, vector: list[Tensor], stack: ExitStack) -> Call:
    import dyntune

    batch = (problem.inputs, problem.targets)
    operator = dyntune.hessian(problem.fresh_model(), batch, criterion=problem.criterion)
    product = stack.enter_context(operator.session())
    return lambda: product(vector)


@dataclass(frozen=True)
class Product:
    """`prepare` builds whatever the library keeps between products and returns the call to be timed."""

    name: str
    library: str
    prepare: Prepare


PRODUCTS = (
    Product(GRADIENT, "torch", _gradient),
    Product(RAW_RETAINED, "torch", _retained),
    Product(RAW_REBUILT, "torch", _rebuilt),
    Product(DYNTUNE, "dyntune", _dyntune_product),
    Product("PyHessian", "pyhessian", _pyhessian_product),
    Product("eigenthings", "hessian_eigenthings", _eigenthings_product),
    Product("curvlinops", "curvlinops", _curvlinops_product),
)


def time_products(problem: Problem, products: list[Product], num_rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of each product in each round; the order is shuffled anew in every round.

    The first round is not counted: it pays for lazy imports and for the allocator's first growth.
    """
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator) for p in problem.model.parameters()]
    times: dict[str, list[float]] = {product.name: [] for product in products}
    order = random.Random(0)
    with ExitStack() as stack:
        calls = [(product.name, product.prepare(problem, vector, stack)) for product in products]
        for round_index in range(num_rounds + 1):
            for name, call in order.sample(calls, len(calls)):
                start = time.process_time()
                call()
                elapsed = time.process_time() - start
                if round_index > 0:
                    times[name].append(round(1e3 * elapsed, 4))
    return times

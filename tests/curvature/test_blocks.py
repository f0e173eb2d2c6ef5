"""Diagonal blocks against the dense float64 Hessian, and shares of a direction."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import dyntune
from dyntune.curvature.blocks import block_of
from dyntune.errors import InvalidArgumentError, ShapeMismatchError
from tests.objective.zoo import ZOO, truth


@pytest.mark.parametrize("name", ["mlp", "encoder, train", "tied", "lstm"])
@pytest.mark.parametrize("by", ["parameter", "layer"])
def test_equal_the_blocks_of_the_dense_matrix_on_unequal_batches(name: str, by: str) -> None:
    case = ZOO[name]()
    x, y = case.batch
    found = dyntune.block_eigenvalues(
        case.model,
        [(x[:1], y[:1]), (x[1:], y[1:])],
        criterion=case.criterion,
        by=by,  # type: ignore[arg-type]
        which="both",
    )
    matrix, at = truth(name), 0
    places: dict[str, list[int]] = {}
    for parameter, p in case.model.named_parameters():
        places.setdefault(block_of(parameter, by), []).extend(range(at, at + p.numel()))  # type: ignore[arg-type]
        at += p.numel()
    assert list(found) == list(places)
    top = float(torch.linalg.eigvalsh(matrix)[-1])
    for block, index in places.items():
        values = torch.linalg.eigvalsh(matrix[index][:, index])
        assert found[block].converged
        # rtol of the solver, and float32 rounding of the whole Hessian for blocks whose curvature vanishes
        assert found[block][0] == pytest.approx(float(values[-1]), rel=1e-2, abs=1e-6 * top)
        assert found[block][-1] == pytest.approx(float(values[0]), rel=1e-2, abs=1e-6 * top)
        assert found[block][0] <= top * (1 + 1e-5)  # interlacing


def test_all_blocks_see_the_same_draw_of_a_shuffling_loader() -> None:
    case = ZOO["mlp"]()
    loader = DataLoader(TensorDataset(*case.batch), batch_size=4, shuffle=True)
    torch.manual_seed(0)
    first = dyntune.block_eigenvalues(case.model, loader, criterion=case.criterion, num_batches=2)
    torch.manual_seed(0)
    whole = dyntune.hessian_eigenvalues(case.model, loader, criterion=case.criterion, num_batches=2, params="0.*")
    assert first["0"][0] == pytest.approx(float(whole), rel=1e-5)


def test_mass_of_a_direction() -> None:
    case = ZOO["mlp"]()
    operator = dyntune.hessian(case.model, case.batch, criterion=case.criterion)
    vector = [torch.zeros(s) for s in operator.space.shapes]
    vector[0].fill_(3.0)  # 0.weight, 20 entries
    vector[3].fill_(4.0)  # 2.bias, 3 entries
    shares = dyntune.block_mass(operator, vector)
    assert shares == pytest.approx({"0": 180 / 228, "2": 48 / 228})
    by_parameter = dyntune.block_mass(operator, vector, by="parameter")
    assert by_parameter["0.bias"] == 0.0
    assert sum(by_parameter.values()) == pytest.approx(1.0)
    with pytest.raises(ShapeMismatchError, match="zero"):
        dyntune.block_mass(operator, [0 * v for v in vector])


@pytest.mark.parametrize(
    ("name", "by", "block"),
    [
        ("weight", "layer", "weight"),
        ("a.b.c.weight", "layer", "a.b.c"),
        ("a.b.c.weight", 1, "a"),
        ("a.b.c.weight", 3, "a.b.c"),
        ("a.b.c.weight", 9, "a.b.c"),
        ("a.b.c.weight", "parameter", "a.b.c.weight"),
    ],
)
def test_block_names(name: str, by: int, block: str) -> None:
    assert block_of(name, by) == block
    if name != "weight":
        with pytest.raises(InvalidArgumentError, match="by=0"):
            block_of(name, 0)

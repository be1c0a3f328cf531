"""Directional descent, by hand in the plane, and a word that is learned by it."""

import math

import pytest
import torch

from oneword.engines.errors import UsageError
from oneword.train.directional import DirectionalDescent, unit
from oneword.train.norms import vocabulary_mean_norm
from oneword.train.recipe import Norm, Optimizer, Recipe, named_recipe


def turned(
    rows: list[list[float]], gradient: list[list[float]], lr: float, kappa: float = 0.0, length: float = 2.0
) -> torch.Tensor:
    """The rows after one step."""
    parameter = torch.nn.Parameter(length * unit(torch.tensor(rows)))
    optimizer = DirectionalDescent([{"params": [parameter], "length": length}], lr, kappa)
    parameter.grad = torch.tensor(gradient)
    optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("gradient", [[0.0, 3.0], [5.0, 3.0], [-5.0, 3000.0], [0.0, 1e-6]])
def test_a_step_turns_a_row_by_the_arc_tangent_of_the_rate_whatever_the_gradients_size_and_radial_part(
    gradient: list[float],
) -> None:
    (row,) = turned([[1.0, 0.0]], [gradient], lr=0.5)

    angle = -math.atan(0.5)  # against the gradient
    torch.testing.assert_close(row, 2 * torch.tensor([math.cos(angle), math.sin(angle)]), atol=2e-2, rtol=0)
    assert float(row.norm()) == pytest.approx(2, abs=1e-6)


def test_rows_turn_independently_and_keep_their_length() -> None:
    rows = turned([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[0.0, 1.0, 0.0], [0.0, 0.0, -9.0]], lr=0.1)

    torch.testing.assert_close(rows[0], 2 * unit(torch.tensor([[1.0, -0.1, 0.0]]))[0])
    torch.testing.assert_close(rows[1], 2 * unit(torch.tensor([[0.0, 1.0, 0.1]]))[0])


def test_the_prior_turns_a_row_towards_where_it_began_as_far_as_its_share_of_the_gradient() -> None:
    parameter = torch.nn.Parameter(torch.tensor([[1.0, 0.0, 0.0]]))
    optimizer = DirectionalDescent([{"params": [parameter], "length": 1.0}], 1.0, kappa=1.0)
    parameter.grad = torch.tensor([[0.0, 5.0, 0.0]])
    optimizer.step()
    half = math.sqrt(0.5)
    torch.testing.assert_close(parameter.detach(), torch.tensor([[half, -half, 0.0]]))  # the prior is radial here

    parameter.grad = torch.tensor([[0.0, 0.0, 2.0]])
    optimizer.step()

    # By hand: -(1, 0, 0) without its part along (1, -1, 0) is -(1, 1, 0) / 2; with (0, 0, 2) its length is sqrt(4.5).
    step = torch.tensor([-0.5, -0.5, 2.0]) / math.sqrt(4.5)
    expected = unit(torch.tensor([[half, -half, 0.0]]) - step)
    torch.testing.assert_close(parameter.detach(), expected)


def test_a_row_with_a_gradient_of_zero_stays_beside_one_that_turns() -> None:
    parameter = torch.nn.Parameter(torch.eye(2))
    optimizer = DirectionalDescent([{"params": [parameter], "length": 1.0}], 0.2, kappa=0.01)
    parameter.grad = torch.tensor([[0.0, 5.0], [5.0, 0.0]])
    optimizer.step()
    away = parameter.detach().clone()
    parameter.grad = torch.tensor([[0.0, 0.0], [5.0, 0.0]])
    optimizer.step()

    assert float(away[0, 1]) < -0.1
    assert parameter[0].equal(away[0])
    assert not parameter[1].equal(away[1])


def test_the_mean_length_leaves_out_rows_of_zeros() -> None:
    assert vocabulary_mean_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])) == 3.0


def test_a_directional_recipe_has_no_other_rule_for_lengths() -> None:
    assert named_recipe("directional").optimizer is Optimizer.DIRECTIONAL
    with pytest.raises(UsageError, match="leave it at free"):
        Recipe(optimizer=Optimizer.DIRECTIONAL, norm=Norm.FIXED)

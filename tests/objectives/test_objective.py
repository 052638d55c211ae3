"""What objectives share: coefficients that follow a schedule, and means that may have nothing to count."""

import numpy as np
import pytest

from derta_jax.config import objective_class
from derta_jax.errors import UserError
from derta_jax.objectives.derta import Derta
from derta_jax.objectives.objective import LAST_STEP, Mean, at_step, mean_of


@pytest.mark.parametrize(
    ("coefficient", "step", "expected"),
    [
        (0.5, 7, 0.5),
        (2, 0, 2.0),
        (((0, 1.0), (10, 3.0)), 0, 1.0),
        (((0, 1.0), (10, 3.0)), 5, 2.0),
        (((0, 1.0), (10, 3.0)), 400, 3.0),
        (((4, 0.0), (6, 1.0), (8, 0.0)), 2, 0.0),
        (((4, 0.0), (6, 1.0), (8, 0.0)), 7, 0.5),
        (((0, 1.0), (10, 3.0)), LAST_STEP, 3.0),
    ],
)
def test_a_coefficient_is_linear_between_its_steps_and_constant_outside(coefficient, step, expected):
    assert float(at_step(Derta(rto_weight=coefficient).rto_weight, step)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "wrong", ["much", True, -1.0, np.inf, [], [[0, 1.0], [0, 2.0]], [[5, 1.0], [3, 2.0]], [[0, -1.0]], [[0]], {"0": 1}]
)
def test_a_wrong_coefficient_is_refused(wrong):
    with pytest.raises(ValueError, match=r"a number from 0 on, or a list of \[step, number\] with increasing steps"):
        Derta(rto_weight=wrong)


def test_a_mean_of_nothing_is_none():
    assert mean_of(Mean(np.float32(3), np.float32(2))) == 1.5
    assert mean_of(Mean(np.float32(0), np.float32(0))) is None


def test_an_objective_that_there_is_not_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"no objective 'derta_plsu'.*did you mean 'derta_plus'"):
        objective_class("derta_plsu")


def test_authors_rows_are_refused_by_name():
    with pytest.raises(UserError, match="objective derta: a-3 is a row of the authors' files, which has one answer"):
        Derta().refuse_authors_row("a-3")

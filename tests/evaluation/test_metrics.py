# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import itertools
import math
from fractions import Fraction

import pytest
from scipy import stats

from trl_dlr.evaluation import majority_at_k, mean_interval, pass_at_k, wilson_interval


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one(num_samples):
    for num_correct, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        draws = list(itertools.combinations([True] * num_correct + [False] * (num_samples - num_correct), k))
        assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 2) == 0.5  # three of six pairs hold the right one
    assert pass_at_k(10, 3, 1) == 0.3
    assert pass_at_k(5, 0, 5) == 0.0 and pass_at_k(5, 1, 5) == 1.0


def test_pass_at_k_keeps_its_digits_where_binomials_overflow():
    exact = 1 - Fraction(math.comb(9_990, 500), math.comb(10_000, 500))
    assert pass_at_k(10_000, 10, 500) == float(exact)
    assert pass_at_k(10_000, 1, 1) == 1e-4


def test_majority_at_k_by_hand():
    samples, is_correct = ["7", "5", "#### 7.0", "5", "7", "5"], [True, False, True, False, True, False]
    assert majority_at_k(samples, is_correct, 1) == 0.5
    assert majority_at_k(samples, is_correct, 2) == pytest.approx(1.0)  # of equals, the first: 7, 7, 7
    assert majority_at_k(samples, is_correct, 3) == 0.5  # 7 5 7 and 5 7 5
    assert majority_at_k(samples, is_correct, 4) == 1.0  # 7 5 7 5; the other two do not vote
    assert majority_at_k(samples[1:], is_correct[1:], 5) == 0.0  # 5 7 5 7 5


def test_mean_interval_by_hand():
    # Mean 2, standard deviation 1, t of 2 degrees of freedom 4.302653 at 97.5%
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-6)
    assert mean_interval([0.25, 0.25]) == (0.25, 0.25, 0.25)
    assert mean_interval([0.125, 0.25], bounds=(0.0, 1.0)) == (0.1875, 0.0, pytest.approx(0.9816, abs=1e-4))


@pytest.mark.parametrize(("num_right", "num_questions"), [(0, 12), (3, 12), (12, 12), (1, 1), (700, 1319)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_interval_is_scipys(num_right, num_questions, level):
    expected = stats.binomtest(num_right, num_questions).proportion_ci(level, method="wilson")
    found = wilson_interval(num_right / num_questions, num_questions, level)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_k(4, 1, 5), "`k` must be between 1 and `num_samples=4`, got 5"),
        (lambda: pass_at_k(4, 5, 1), "`num_correct` must be between 0 and `num_samples=4`, got 5"),
        (lambda: majority_at_k(["1"], [True], 2), "`k` must be between 1 and the number of completions 1, got 2"),
        (lambda: majority_at_k(["1", "2"], [True], 1), "`is_correct` must have 2 entries.*got 1"),
        (lambda: mean_interval([0.5]), "`values` must hold at least two runs, got 1. Use `wilson_interval`"),
        (lambda: wilson_interval(1.5, 3), "`share` must be between 0 and 1, got 1.5"),
        (lambda: wilson_interval(0.5, 0), "`num_questions` must be at least 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

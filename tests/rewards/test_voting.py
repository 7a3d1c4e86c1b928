# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import pytest

from trl_dlr.rewards import majority_vote


@pytest.mark.parametrize(
    ("completions", "place"),
    [
        (["<answer>5</answer>"], 0),
        (
            ["<answer>5</answer>", "<answer>7</answer>", "so\n#### 7.0"],
            1,
        ),  # a number is the same however it is written
        (
            ["<answer>5</answer>", "<answer>7</answer>", "<answer>7</answer>", "<answer>5</answer>"],
            0,
        ),  # the first wins
        (["#### 1,000", "#### 12", "#### 1000", "#### 12", "#### 12.00"], 1),
        (["<answer>x+1</answer>", "<answer>2</answer>", "<answer>1+x</answer>"], 0),  # as is an expression
        (["no", "yes", "yes"], 1),
        (["", "", "<answer>3</answer>"], 0),
    ],
)
def test_the_first_completion_with_the_most_frequent_answer(completions, place):
    assert majority_vote(completions) == place


def test_no_completions():
    with pytest.raises(ValueError, match="`completions` must hold at least one completion"):
        majority_vote([])

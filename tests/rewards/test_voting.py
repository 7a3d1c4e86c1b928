# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import pytest

from trl_dlr.rewards import correctness, majority_vote, math_judge


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
        (["<answer>1</answer>", "x = 5", "5"], 1),
        (["listen", "silent", "Silent."], 1),
        (["12", "1,2", "2 and 1"], 1),
        (["1728", "1331 and 1728", "1728 and 1331"], 1),  # a part is not the whole
        (["2022", "2024-01-01", "2024-01-01"], 1),  # nor a date what its numbers come to
        (["It is 3", "1 1/2", "The total is $1.50.", "**3/2**"], 1),
        (["A", "The answer is B", "(B)"], 1),
        (["2 + 3", "4 + 1", "5", "5.0"], 0),  # what is left to compute is not that number, but the same expression
    ],
)
def test_the_first_completion_with_the_most_frequent_answer(completions, place):
    assert majority_vote(completions) == place


def test_no_completions():
    with pytest.raises(ValueError, match="`completions` must hold at least one completion"):
        majority_vote([])


def test_votes_on_expressions_ask_in_proportion_to_their_number(monkeypatch):
    asked = []
    monkeypatch.setattr(math_judge, "same_expression", lambda gold, answer: asked.append(answer))
    assert majority_vote([f"x + {number}" for number in range(50)] * 2 + ["7"] * 3) == 100
    assert len(asked) <= 50 * correctness.MAX_EXPRESSIONS

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import threading

import pytest

from trl_dlr.rewards import correctness_reward, extract_answer


@pytest.mark.parametrize(
    ("completion", "gold", "reward"),
    [
        ("42", "42", 1.0),
        ("The answer is 42.", "42", 1.0),
        ("<think>1 + 1 = 3</think><answer>2</answer>", "2", 1.0),
        ("<think>it is 2</think><answer>3</answer>", "2", -1.0),
        ("<answer>1,000</answer>", "Ten times a hundred.\n#### 1000", 1.0),
        ("so #### 72", "#### 72", 1.0),
        ("$18", "18", 1.0),
        ("42.0", "42", 1.0),
        ("41.9", "42", -1.0),
        ("0.5", r"\frac{1}{2}", 1.0),
        (r"\boxed{\frac{1}{2}}", "1/2", 1.0),
        ("x+1", "1+x", 1.0),
        ("1", "1+x", -1.0),
        ("Paris", "Paris", 1.0),
        ("paris", "London", -1.0),
        ("", "3", -1.0),
    ],
)
def test_string_number_and_expression(completion, gold, reward):
    assert correctness_reward([completion], answer=[gold]) == [reward]


def test_conversational_completions_and_trls_column_name():
    completions = [[{"role": "assistant", "content": "7"}], [{"role": "assistant", "content": "8"}]]
    assert correctness_reward(completions, solution=["7", "7"]) == [1.0, -1.0]


def test_works_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.extend(correctness_reward(["x+1"], answer=["1+x"])))
    thread.start()
    thread.join()
    assert results == [1.0]


def test_a_dataset_without_gold_answers_is_refused():
    with pytest.raises(ValueError, match="answer.*solution"):
        correctness_reward(["7"])


def test_extract_answer_takes_the_last_statement():
    assert extract_answer("<answer>1</answer> no, <answer> 2 </answer>") == "2"
    assert extract_answer("work\n#### 5") == "5"
    assert extract_answer(" plain ") == "plain"

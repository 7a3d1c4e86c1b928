# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import json

import pytest
import reasoning_gym

from trl_dlr.rewards import correctness_reward, get_reasoning_gym_reward


def test_a_task_judges_its_own_answers():
    # Whatever uses each of the numbers once and gives the target is right, and the entry names one such expression
    entry = {"question": "", "answer": "10 - (2 * 3)", "metadata": {"source_dataset": "countdown"}}
    entry["metadata"] |= {"numbers": [2, 3, 10], "target": 4, "expression": "10 - (2 * 3)"}
    texts = ["10 - 2*3", "<answer>10 - 3 - 3</answer>", "<answer>10 - 3 * 2</answer>"]
    assert get_reasoning_gym_reward([entry])(completions=texts, index=[0, 0, 0]) == [1.0, -1.0, 1.0]
    assert correctness_reward(["10 - 3 - 3"], answer=["10 - (2 * 3)"]) == [1.0]  # which knows nothing of the rules


def test_right_in_another_form_than_the_entrys():
    entries = [{"question": "", "answer": "1000", "metadata": {"source_dataset": "chain_sum"}}]
    assert get_reasoning_gym_reward(entries)(completions=["+01,000.00"], index=[0]) == [1.0]


def test_answers_that_would_compute_for_ever_are_wrong():
    entry = {"question": "", "answer": "10 - (2 * 3)", "metadata": {"source_dataset": "countdown"}}
    entry["metadata"] |= {"numbers": [9, 9, 9, 9], "target": 4, "expression": "10 - (2 * 3)"}
    texts = ["9**9**9**9", "<answer>9^(9^(9^9))</answer>", [{"role": "assistant", "content": None}]]
    assert get_reasoning_gym_reward([entry])(completions=texts, index=[0, 0, 0]) == [-1.0] * 3


def test_part_of_the_marks_is_wrong():
    dataset = reasoning_gym.create_dataset("chain_sum", size=2, seed=0)
    text = f"It is {dataset[0]['answer']}"
    assert 0 < dataset.score_answer(text, dataset[0]) < 1
    assert get_reasoning_gym_reward(dataset)(completions=[text], index=[0]) == [-1.0]
    assert correctness_reward([text], answer=[dataset[0]["answer"]]) == [1.0]


@pytest.mark.parametrize("as_chat", [False, True])
def test_lines_of_a_file_of_several_tasks(as_chat):
    made = [reasoning_gym.create_dataset(task, size=1, seed=0)[0] for task in ("chain_sum", "letter_counting")]
    entries = [json.loads(json.dumps(entry)) for entry in made]
    texts = [made[1]["answer"], made[0]["answer"], made[0]["answer"]]
    if as_chat:
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    assert get_reasoning_gym_reward(entries)(completions=texts, index=[1, 0, 1]) == [1.0, 1.0, -1.0]

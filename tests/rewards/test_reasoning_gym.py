# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import json

import pytest
import reasoning_gym

from trl_dlr.rewards import correctness_reward, get_reasoning_gym_reward, math_judge


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


@pytest.mark.parametrize("as_chat", [False, True])
def test_answers_that_would_compute_for_ever_are_wrong(as_chat, caplog):
    entry = {"question": "", "answer": "10 - (2 * 3)", "metadata": {"source_dataset": "countdown"}}
    entry["metadata"] |= {"numbers": [2, 3, 10], "target": 4, "expression": "10 - (2 * 3)"}
    # The first two are seen to be; the third is stopped
    texts = ["9**9**9**9", "<answer>9^(9^(9^9))</answer>", "9**(99*99*99*99*99*99*99)", "10 - 3 * 2"]
    if as_chat:
        texts = [[{"role": "assistant", "content": text}] for text in (*texts[:3], None)]
    start = math_judge.spent
    rewards = get_reasoning_gym_reward([entry])(completions=texts, index=[0] * 4)
    assert rewards == [-1.0, -1.0, -1.0, -1.0 if as_chat else 1.0]
    assert math_judge.spent - start < 4
    assert [record.message.split(" answers")[0] for record in caplog.records] == ["3 of 4"]


def test_entries_are_judged_as_they_are():
    # Tuples and keys that are numbers would not come through JSON
    entry = reasoning_gym.create_dataset("arc_agi", size=1, seed=0)[0]
    assert get_reasoning_gym_reward([entry])(completions=[entry["answer"]], index=[0]) == [1.0]


def test_a_task_that_there_is_none():
    entry = {"question": "", "answer": "1", "metadata": {"source_dataset": "countup"}}
    with pytest.raises(ValueError, match="tasks that reasoning-gym has, got one of 'countup'"):
        get_reasoning_gym_reward([entry])(completions=["1"], index=[0])


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

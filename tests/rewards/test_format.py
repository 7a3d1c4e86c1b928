# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import time

import pytest

from trl_dlr.rewards import get_pattern_reward, get_tag_format_reward, tag_format_reward


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>a</think><answer>4</answer>", 1.0),
        ("  <think>\na\nb\n</think>\n<answer>\n4\n</answer>\n", 1.0),
        ("<think>a</think><answer>4", -1.0),
        ("<think>a</think>", -1.0),
        ("<think></think><answer>4</answer>", -1.0),
        ("<think> </think><answer>4</answer>", -1.0),
        ("<answer>4</answer><think>a</think>", -1.0),
        ("so: <think>a</think><answer>4</answer>", -1.0),
        ("<think>a<think>b</think></think><answer>4</answer>", -1.0),
        ("<think>a</think><answer>3</answer><answer>4</answer>", -1.0),
        ("", -1.0),
        ("<think><think></think><answer>42</answer>", -1.0),
        ("<think>ok</think><answer>4<answer>2</answer>", -1.0),
        ("<think>ok</think></think><answer>42</answer>", -1.0),
        ("<think>ok</think><answer>42</answer></answer>", -1.0),
        ("<think><answer>42</answer></think>", -1.0),
        ("<think>ok<answer></think>42</answer>", -1.0),
        ("<think>ok</think>so<answer>42</answer>", -1.0),
        ("<think>1 < 2 > 0</think><answer><b>4</b></answer>", 1.0),
    ],
)
def test_tags(completion, reward):
    assert tag_format_reward(completions=[completion]) == [reward]
    assert tag_format_reward(completions=[[{"role": "assistant", "content": completion}]]) == [reward]


@pytest.mark.parametrize("piece", ["a", "<", "<think>", "</think>", "<think>a</think><answer>", "<think> ", "\n"])
def test_time_is_linear_in_the_length(piece):
    texts = [prefix + (piece * 40_000)[:40_000] for prefix in ("", "<think>", "<think>a</think><answer>")]
    start = time.thread_time()
    assert tag_format_reward(completions=texts) == [-1.0] * 3
    assert time.thread_time() - start < 0.5  # 0.01 is used


def test_completions_without_text():
    assert tag_format_reward(completions=[[], [{"role": "assistant", "content": None}]]) == [-1.0, -1.0]
    parts = [{"type": "text", "text": "<think>a</think>"}, {"type": "text", "text": "<answer>4</answer>"}]
    assert tag_format_reward(completions=[[{"role": "assistant", "content": parts}]]) == [1.0]


def test_other_tags_and_patterns():
    assert get_tag_format_reward(["answer"])(completions=["<answer>4</answer>", "4"]) == [1.0, -1.0]
    number = get_pattern_reward(r"-?\d+", name="number_alone")
    assert number(completions=["-4 ", "4 apples"]) == [1.0, -1.0]
    assert number.__name__ == "number_alone"


@pytest.mark.parametrize("tags", [[], "answer", ["a b"], [1], 1])
def test_bad_tags(tags):
    with pytest.raises(ValueError, match="tags"):
        get_tag_format_reward(tags)


def test_bad_pattern():
    for pattern in ("(", 5):
        with pytest.raises(ValueError, match="`pattern` must be a regular expression, got"):
            get_pattern_reward(pattern)

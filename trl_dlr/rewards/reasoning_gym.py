# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Correctness as reasoning-gym's own tasks judge it."""

from collections.abc import Callable, Sequence
from typing import Any

from .extraction import completion_text, extract_answer
from .math_judge import INTRACTABLE


def get_reasoning_gym_reward(entries: Sequence[dict[str, Any]]) -> Callable[..., list[float]]:
    r"""
    Reward function of +1 if a task's own `score_answer` gives the completion's answer full marks, else -1.

    A task may have many right answers, of which its entries name one: only its own judgement is fair to all of them.

    Args:
        entries (`Sequence[dict]`):
            Entries of reasoning-gym: a dataset of it, or lines of a file that were written from one. The reward reads a
            dataset column `index`, the place of a question's entry.

    Example:

    ```python
    >>> import reasoning_gym

    >>> from trl_dlr.rewards import get_reasoning_gym_reward

    >>> reward = get_reasoning_gym_reward(reasoning_gym.create_dataset("chain_sum", size=10, seed=0))
    >>> reward(completions=["<answer>no idea</answer>"], index=[0])
    [-1.0]
    ```
    """
    from reasoning_gym.factory import get_score_answer_fn

    score_of = {}  # task -> its judgement

    def reasoning_gym_reward(
        completions: list[str] | list[list[dict[str, Any]]], index: list[int], **kwargs
    ) -> list[float]:
        rewards = []
        for completion, place in zip(completions, index, strict=True):
            answer = extract_answer(completion_text(completion))
            entry = entries[place]
            task = entry["metadata"]["source_dataset"]
            if task not in score_of:
                score_of[task] = get_score_answer_fn(task)
            # Some tasks compute what they are given, however long that takes
            is_tractable = not INTRACTABLE.search(answer.replace("**", "^"))
            rewards.append(1.0 if is_tractable and score_of[task](answer, entry) >= 1.0 else -1.0)
        return rewards

    return reasoning_gym_reward

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Correctness as reasoning-gym's own tasks judge it."""

from collections.abc import Callable, Sequence
from typing import Any

from .extraction import completion_text, extract_answer
from .math_judge import INTRACTABLE, InTime, ask


def get_reasoning_gym_reward(entries: Sequence[dict[str, Any]]) -> Callable[..., list[float]]:
    r"""
    Reward function of +1 if a task's own `score_answer` gives the completion's answer full marks, else -1.

    A task may have many right answers, of which its entries name one: only its own judgement is fair to all of them.
    It is asked in a process of its own, within the limits that [`correctness_reward`] has.

    Args:
        entries (`Sequence[dict]`):
            Entries of reasoning-gym: a dataset of it, or lines of a file that were written from one. The reward reads
            a dataset column `index`, the place of a question's entry.

    Example:

    ```python
    >>> import reasoning_gym

    >>> from trl_dlr.rewards import get_reasoning_gym_reward

    >>> reward = get_reasoning_gym_reward(reasoning_gym.create_dataset("chain_sum", size=10, seed=0))
    >>> reward(completions=["<answer>no idea</answer>"], index=[0])
    [-1.0]
    ```
    """
    from reasoning_gym.factory import DATASETS

    def score(answer: str, entry: dict[str, Any]) -> float | None:
        task = entry["metadata"]["source_dataset"]
        if task not in DATASETS:
            raise ValueError(f"`entries` must be of tasks that reasoning-gym has, got one of {task!r}.")
        # Some tasks compute what they are given, however long that takes
        return None if INTRACTABLE.search(answer.replace("**", "^")) else ask(task, answer, entry)

    def reasoning_gym_reward(
        completions: list[str] | list[list[dict[str, Any]]], index: list[int], **kwargs
    ) -> list[float]:
        score_in_time = InTime(score, len(completions))
        scores = [
            score_in_time(extract_answer(completion_text(completion)), entries[position])
            for completion, position in zip(completions, index, strict=True)
        ]
        score_in_time.warn()
        return [-1.0 if score is None or score < 1.0 else 1.0 for score in scores]

    return reasoning_gym_reward

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Format reward (equation 2): +1 if the required structure is there and complete, else -1."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from .extraction import completion_text


def get_pattern_reward(pattern: str, name: str = "format_reward") -> Callable[..., list[float]]:
    r"""
    Reward function of +1 for completions that match a regular expression from end to end, else -1.

    Args:
        pattern (`str`):
            Regular expression; `.` matches newlines, white space around the completion is ignored.
        name (`str`, *optional*, defaults to `"format_reward"`):
            Name of the function, under which trainers log it.

    Example:

    ```python
    >>> from trl_dlr.rewards import get_pattern_reward

    >>> get_pattern_reward(r"-?\d+")(completions=["42", "It is 42."])
    [1.0, -1.0]
    ```
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except (re.error, TypeError) as error:
        raise ValueError(f"`pattern` must be a regular expression, got {pattern!r}: {error}.") from error

    def format_reward(completions: list[str] | list[list[dict[str, Any]]], **kwargs) -> list[float]:
        texts = map(completion_text, completions)
        return [1.0 if compiled.fullmatch(text.strip()) else -1.0 for text in texts]

    format_reward.__name__ = name
    return format_reward


def get_tag_format_reward(tags: Sequence[str] = ("think", "answer")) -> Callable[..., list[float]]:
    r"""
    Reward function of +1 for completions that consist of the given tags, in order, each opened and closed exactly once
    and not empty, else -1 (equation 2 of [DeepLatent Reasoning](https://huggingface.co/papers/2601.17275)).

    Args:
        tags (`Sequence[str]`, *optional*, defaults to `("think", "answer")`):
            Names of the tags.

    Example:

    ```python
    >>> from trl_dlr.rewards import get_tag_format_reward

    >>> get_tag_format_reward(["answer"])(completions=["<answer>42</answer>", "<answer>42"])
    [1.0, -1.0]
    ```
    """
    is_list = isinstance(tags, Sequence) and not isinstance(tags, str) and len(tags) > 0
    if not is_list or not all(isinstance(tag, str) and re.fullmatch(r"\w[\w-]*", tag) for tag in tags):
        raise ValueError(
            f"`tags` must be a non-empty sequence of tag names such as ('think', 'answer'), got {tags!r}."
        )
    any_tag = re.compile(f"(</?(?:{'|'.join(tags)})>)")
    expected = [tag for name in tags for tag in (f"<{name}>", f"</{name}>")]

    def tag_format_reward(completions: list[str] | list[list[dict[str, Any]]], **kwargs) -> list[float]:
        rewards = []
        for completion in completions:
            parts = any_tag.split(completion_text(completion))  # texts, with the tags between them
            outside, inside = "".join(parts[::4]), parts[2::4]
            is_formatted = parts[1::2] == expected and not outside.strip() and all(part.strip() for part in inside)
            rewards.append(1.0 if is_formatted else -1.0)
        return rewards

    return tag_format_reward


tag_format_reward = get_tag_format_reward()

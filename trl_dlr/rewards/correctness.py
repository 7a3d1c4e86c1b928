# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Correctness reward (equation 1): +1 if the answer equals the gold answer, else -1."""

import re
import threading
from decimal import Decimal, InvalidOperation

from math_verify import parse, verify


ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
GSM8K_MARK = re.compile(r"####\s*(.+)")
PROSE = re.compile(
    r"(?<![\\A-Za-z])[A-Za-z]{2,}|\$|\\boxed"
)  # a word that is no LaTeX command, or LaTeX with delimiters


def extract_answer(text: str) -> str:
    """
    The part of `text` that states the answer: inside the last `<answer>…</answer>`, else after the last GSM8K `####`,
    else the whole text.
    """
    for pattern in (ANSWER_TAG, GSM8K_MARK):
        if found := pattern.findall(text):
            return found[-1].strip()
    return text.strip()


def _as_number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.strip().strip("$").rstrip(".").replace(",", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def answers_agree(answer: str, gold: str) -> bool:
    """Whether two answers are the same string, number or mathematical expression (by math-verify)."""
    if answer == gold:
        return True
    answer_number, gold_number = _as_number(answer), _as_number(gold)
    if answer_number is not None and gold_number is not None:
        return answer_number == gold_number
    # math-verify's time limits use signals, which only the main thread may set
    limit = 5 if threading.current_thread() is threading.main_thread() else None

    def parsed(text: str) -> list:
        # Of a bare expression without delimiters, math-verify reads a number only ("1+x" as 1); in prose it has to search
        delimited = f"${text}$"
        first, second = (text, delimited) if PROSE.search(text) else (delimited, text)
        return parse(first, parsing_timeout=limit) or parse(second, parsing_timeout=limit)

    expected, given = parsed(gold), parsed(answer)
    return bool(expected and given) and verify(expected, given, timeout_seconds=limit)


def correctness_reward(
    completions: list[str] | list[list[dict[str, str]]],
    answer: list[str] | None = None,
    solution: list[str] | None = None,
    **kwargs,
) -> list[float]:
    r"""
    Reward of +1 if the completion's answer equals the gold answer as a string, a number or a mathematical expression
    (by math-verify), else -1 (equation 1 of [DeepLatent Reasoning](https://huggingface.co/papers/2601.17275)).

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Completions, plain or conversational.
        answer (`list[str]`, *optional*):
            Gold answers (dataset column `answer`). A GSM8K solution ending in `#### 42` is understood.
        solution (`list[str]`, *optional*):
            Gold answers under TRL's column name, read if there is no `answer`.
        **kwargs:
            Other columns and arguments that trainers pass; not used.

    Returns:
        `list[float]`: +1.0 or -1.0 each.

    Example:

    ```python
    >>> from trl_dlr.rewards import correctness_reward

    >>> correctness_reward(["<answer>1,000</answer>", "It is 5."], answer=["#### 1000", "#### 6"])
    [1.0, -1.0]
    ```
    """
    gold = answer if answer is not None else solution
    if gold is None:
        raise ValueError("`correctness_reward` needs gold answers, but there is no column `answer` or `solution`.")
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [
        1.0 if answers_agree(extract_answer(text), extract_answer(str(target))) else -1.0
        for text, target in zip(texts, gold, strict=True)
    ]

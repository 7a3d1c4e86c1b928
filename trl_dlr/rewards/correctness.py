# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Correctness reward (equation 1): +1 if the answer equals the gold answer, else -1. And the vote by the same equality.

What does not state the answer must never be paid, for a policy will find it. Every answer that is marked (`<answer>`,
`####`, `\\boxed{}`, "the answer is", or alone on the text) is paid in any usual notation. Prose is paid where one rule
finds the answer, which [`stated_number`] gives, and is -1 else, also where a reader would understand it.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from numbers import Number
from typing import Any

from . import math_judge, reading
from .extraction import completion_text, extract_answer
from .math_judge import InTime


def answers_agree(answer: str, gold: str) -> bool:
    """
    Whether an answer is the gold answer: the same number, letter, list of numbers, expression or words. What the gold
    answer is decides how the answer is read. A number has to be stated, with its unit or in a sentence, and must not
    be left to compute: `2 + 3` is not 5, and `4 + 12 = 16` is 16.
    """
    return _agree(answer, gold, math_judge.same_expression)


def _agree(answer: str, gold: str, same_expression: Callable[[str, str], bool | None]) -> bool:
    raw, answer, gold = answer, reading.normalize(answer), reading.normalize(gold)
    if not answer or not gold or answer == gold:
        return answer == gold != ""
    if choice := reading.letter(gold):
        return reading.stated_letter(answer) == choice
    if number := reading.quantity(gold):
        stated = reading.stated_number(answer)
        return stated is not None and reading.same_number(stated, number)
    if numbers := reading.listed_numbers(gold):
        stated = reading.stated_list(answer)
        return len(stated) == len(numbers) and all(map(reading.same_number, stated, numbers))
    if reading.is_math(gold):
        expression = reading.stated_expression(raw)
        if expression is None:
            return False
        return "".join(expression.split()) == "".join(gold.split()) or bool(same_expression(gold, expression))
    return reading.as_words(gold) in reading.stated_words(answer)


def correctness_reward(
    completions: list[str] | list[list[dict[str, Any]]],
    answer: list[str] | None = None,
    solution: list[str] | None = None,
    **kwargs,
) -> list[float]:
    r"""
    Reward of +1 if the completion's answer equals the gold answer as a number, a letter, words or a mathematical
    expression, else -1 (equation 1 of [DeepLatent Reasoning](https://huggingface.co/papers/2601.17275)). See
    [`extract_answer`] and [`answers_agree`].

    Expressions are compared by math-verify, in a process of its own, which bounds them in every thread: a pair may
    take one second, and all of a call two and a twentieth for each completion. What is not decided by then, or too
    large to try, is -1; a warning says how many those were. The seconds are those of the processor, so that a reward
    does not depend on what else the machine does: where it is busy, they last longer by the clock.

    Args:
        completions (`list[str]` or `list[list[dict[str, Any]]]`):
            Completions, plain or conversational. One without text is -1.
        answer (`list[str]`, *optional*):
            Gold answers (dataset column `answer`), texts or numbers. A GSM8K solution ending in `#### 42` is
            understood.
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
    column, golds = ("answer", answer) if answer is not None else ("solution", solution)
    if golds is None:
        raise ValueError("`correctness_reward` needs gold answers, but there is no column `answer` or `solution`.")
    if len(golds) != len(completions):
        raise ValueError(
            f"`{column}` must hold a gold answer for each completion, got {len(golds)} for {len(completions)} "
            "completions."
        )
    same_expression, rewards = InTime(math_judge.same_expression, len(completions)), []
    for completion, gold in zip(completions, golds, strict=True):
        if not isinstance(gold, str | Number) or str(gold).strip().lower() in ("", "nan"):
            raise ValueError(f"`{column}` must hold a text or a number as each gold answer, got {gold!r}.")
        answer = extract_answer(completion_text(completion))
        rewards.append(1.0 if _agree(answer, extract_answer(str(gold)), same_expression) else -1.0)
    same_expression.warn()
    return rewards


MAX_EXPRESSIONS = 8  # different ones that another is compared with


def majority_vote(completions: list[str]) -> int:
    """
    Place of the first completion that gives the most frequent answer. Answers count as the same when they state the
    same number, letter, list of numbers, words, or equal expressions; of equally frequent ones, the first to appear
    wins.

    Args:
        completions (`list[str]`):
            Completions of one question, at least one.

    Returns:
        `int`: index in `completions`.

    Example:

    ```python
    >>> from trl_dlr.rewards import majority_vote

    >>> majority_vote(["It is 5", "<answer>7</answer>", "#### 7.0"])
    1
    ```
    """
    if not completions:
        raise ValueError("`completions` must hold at least one completion, got none.")
    answers = [_meaning(extract_answer(completion)) for completion in completions]
    same_expression, first = (
        InTime(math_judge.same_expression, len(completions)),
        {},
    )  # answer -> the first one that is equal to it
    for answer in dict.fromkeys(answers):
        others = [other for other in dict.fromkeys(first.values()) if isinstance(other, str)][:MAX_EXPRESSIONS]
        equal = (other for other in others if isinstance(answer, str) and same_expression(other, answer))
        first[answer] = next(equal, answer)
    votes = [first[answer] for answer in answers]
    return votes.index(Counter(votes).most_common(1)[0][0])


def _meaning(answer: str) -> Hashable:
    """What stands for all answers that are the same; for an expression its text, of which several may be equal."""
    text = reading.normalize(answer)
    if choice := reading.letter(text):
        return (choice,)
    if number := reading.stated_number(text):
        return number._replace(name=None)
    if numbers := reading.listed_numbers(text):
        return tuple(number._replace(name=None) for number in numbers)
    expression = reading.stated_expression(answer)
    return (reading.as_words(text),) if expression is None else "".join(expression.split())

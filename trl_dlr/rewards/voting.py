# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Self-consistency: the answer that most completions of a question agree on."""

from .correctness import answers_agree, extract_answer


def majority_vote(completions: list[str]) -> int:
    """
    Place of the first completion that gives the most frequent answer. Answers count as the same when
    [`correctness_reward`] would take one for the other; of equally frequent ones, the first to appear wins.

    Args:
        completions (`list[str]`):
            Completions of one question, at least one.

    Returns:
        `int`: place in `completions`.

    Example:

    ```python
    >>> from trl_dlr.rewards import majority_vote

    >>> majority_vote(["It is 5", "<answer>7</answer>", "#### 7.0"])
    1
    ```
    """
    if not completions:
        raise ValueError("`completions` must hold at least one completion, got none.")
    votes = {}  # first place of each answer -> its votes
    answers = [extract_answer(completion) for completion in completions]
    for answer in answers:
        same = next((place for place in votes if answers_agree(answer, answers[place])), None)
        if same is None:
            same = answers.index(answer)
        votes[same] = votes.get(same, 0) + 1
    return max(votes, key=votes.get)

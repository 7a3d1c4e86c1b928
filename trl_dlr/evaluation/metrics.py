# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Figures of repeated samples, and how certain they are."""

import math
import statistics
from collections.abc import Sequence

from ..rewards import majority_vote


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    r"""
    Unbiased estimate of the chance that at least one of k samples is right, \( 1 - \binom{n-c}{k} / \binom{n}{k} \)
    ([arXiv 2107.03374](https://huggingface.co/papers/2107.03374)). Computed in integers, so exact but for the last
    rounding.

    Args:
        num_samples (`int`):
            Samples n of a question.
        num_correct (`int`):
            How many of them, c, are right.
        k (`int`):
            Samples that one would draw.

    Example:

    ```python
    >>> from trl_dlr.evaluation import pass_at_k

    >>> pass_at_k(4, 1, 2)
    0.5
    ```
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"`k` must be between 1 and `num_samples={num_samples}`, got {k}.")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"`num_correct` must be between 0 and `num_samples={num_samples}`, got {num_correct}.")
    draws = math.comb(num_samples, k)
    return (draws - math.comb(num_samples - num_correct, k)) / draws


def majority_at_k(completions: Sequence[str], is_correct: Sequence[bool], k: int) -> float:
    """
    Share of votes among k samples whose winner is right: each k samples in a row vote once ([`majority_vote`]), and
    what is left over does not vote. With as many samples as k it is the one vote of all.

    Args:
        completions (`Sequence[str]`):
            Samples of a question.
        is_correct (`Sequence[bool]`):
            Whether each is right.
        k (`int`):
            Samples that vote together.
    """
    if len(completions) != len(is_correct):
        raise ValueError(
            f"`is_correct` must have {len(completions)} entries, one a completion, got {len(is_correct)}."
        )
    if not 1 <= k <= len(completions):
        raise ValueError(f"`k` must be between 1 and the number of completions {len(completions)}, got {k}.")
    starts = range(0, len(completions) - k + 1, k)
    winners = [start + majority_vote(list(completions[start : start + k])) for start in starts]
    return statistics.fmean(bool(is_correct[winner]) for winner in winners)


def mean_interval(
    values: Sequence[float], level: float = 0.95, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[float, float, float]:
    """
    Mean of independent runs, and its confidence interval by Student's t.

    Args:
        values (`Sequence[float]`):
            One value a run, at least two.
        level (`float`, *optional*, defaults to `0.95`):
            Confidence level.
        bounds (`tuple[float, float]`, *optional*):
            Ends that a mean cannot pass, `(0.0, 1.0)` for shares.

    Returns:
        `tuple[float, float, float]`: mean, lower and upper end. The interval is about repeating the runs, not about
        other questions: of one run, use [`wilson_interval`].
    """
    if len(values) < 2:
        raise ValueError(
            f"`values` must hold at least two runs, got {len(values)}. Use `wilson_interval` for one run."
        )
    from scipy import stats  # of the extra "eval": training does without

    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    reach = stats.t.ppf((1 + level) / 2, df=len(values) - 1).item() * error
    return mean, max(mean - reach, bounds[0]), min(mean + reach, bounds[1])


def wilson_interval(share: float, num_questions: int, level: float = 0.95) -> tuple[float, float]:
    """
    Confidence interval of a share over questions by Wilson's score, which is sound for few questions and for shares of
    0 and 1.

    Args:
        share (`float`):
            Share of questions, or the mean over questions of values between 0 and 1, for which it is rather too wide.
        num_questions (`int`):
            Number of questions.
        level (`float`, *optional*, defaults to `0.95`):
            Confidence level.

    Returns:
        `tuple[float, float]`: lower and upper end.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` must be between 0 and 1, got {share}.")
    if num_questions < 1:
        raise ValueError(f"`num_questions` must be at least 1, got {num_questions}.")
    squared = statistics.NormalDist().inv_cdf((1 + level) / 2) ** 2 / num_questions
    center = share + squared / 2
    reach = math.sqrt(squared * (share * (1 - share) + squared / 4))
    low, high = (center - reach) / (1 + squared), (center + reach) / (1 + squared)
    return min(max(low, 0.0), share), max(min(high, 1.0), share)  # rounding must not leave the share outside

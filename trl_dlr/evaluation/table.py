# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A policy and its controls over several seeds, row by row."""

import statistics
import time
from collections.abc import Callable

from accelerate.utils import gather_object
from datasets import Dataset

from ..models.reasoner import LatentReasoner
from .controls import SAMPLED, answer_questions, score_answers
from .metrics import majority_at_k, mean_interval, pass_at_k, wilson_interval


# name of a row -> latents that it is given
ROWS = {
    "policy": "own",
    "mean_latents": "mean",
    "no_latents": "none",
    "plain_anchors": "anchors",
    "zero_latents": "zero",
    "fresh_head": "fresh_head",
    "shuffled": "shuffled",
}


def interval(values: list[float], num_questions: int) -> dict[str, float | str | list[float]]:
    """Mean with its 95% interval: over seeds by Student's t, of a single run over questions by Wilson's score."""
    if len(values) > 1:
        mean, low, high = mean_interval(values)
        return {"mean": mean, "low": low, "high": high, "interval": "seeds", "runs": values}
    return {
        "mean": values[0],
        **dict(zip(("low", "high"), wilson_interval(values[0], num_questions), strict=True)),
        "interval": "questions",
        "runs": values,
    }


def evaluate_row(
    reasoner: LatentReasoner,
    dataset: Dataset,
    reward: Callable[..., list[float]],
    latents: str,
    name: str,
    seeds: list[int],
    num_samples: int,
    k: int,
    batch_size: int,
) -> dict[str, dict | float]:
    """
    Figures of one row of a table.

    Args:
        reasoner ([`LatentReasoner`]):
            Policy and main model.
        dataset ([`~datasets.Dataset`]):
            Questions with a column `"prompt"` and the columns that the reward reads.
        reward (`Callable`):
            Reward above 0 for a right answer.
        latents (`str`):
            Which latents are given, as in [`evaluate_latents`].
        name (`str`):
            Name of the row, for the progress bar.
        seeds (`list[int]`):
            Seeds of the latents, a run each. What does not depend on them runs once.
        num_samples (`int`):
            Trajectories per question.
        k (`int`):
            k of pass@k and majority@k.
        batch_size (`int`):
            Questions decoded together.

    Returns:
        `dict`: `pass@1`, `pass@k` and `majority@k`, each with its mean, 95% interval and runs; the mean number of tokens
        of an answer, answers decoded, tokens through the main model and seconds, of a run.
    """
    engine, runs = reasoner.engine, []
    counters = ("num_decoded", "num_completion_tokens", "num_forward_tokens")
    for seed in seeds if latents in SAMPLED else seeds[:1]:
        before, start = [getattr(engine, counter) for counter in counters], time.perf_counter()
        answers = answer_questions(reasoner, dataset, latents, num_samples, batch_size, seed, f"{name}, seed {seed}")
        seconds = time.perf_counter() - start
        work = [getattr(engine, counter) - count for counter, count in zip(counters, before, strict=True)]
        num_decoded, num_answer_tokens, num_tokens = (
            sum(counts) for counts in zip(*gather_object([work]), strict=True)
        )
        rewards = score_answers(dataset, answers, reward)
        is_judged = ~rewards.isnan().any(dim=1)  # the reward has an opinion on all of a question's answers
        answers = [texts for texts, is_kept in zip(answers, is_judged.tolist(), strict=True) if is_kept]
        is_correct = (rewards[is_judged] > 0).tolist()
        run = {"pass@1": statistics.fmean(statistics.fmean(row) for row in is_correct)}
        if latents in SAMPLED and k > 1:
            run[f"pass@{k}"] = statistics.fmean(pass_at_k(len(row), sum(row), k) for row in is_correct)
            run[f"majority@{k}"] = statistics.fmean(
                majority_at_k(texts, row, k) for texts, row in zip(answers, is_correct, strict=True)
            )
        work = {"answer_tokens": num_answer_tokens / num_decoded, "decoded": num_decoded}
        runs.append((run, {**work, "forward_tokens": num_tokens, "seconds": seconds}))
    figures = {figure: interval([run[figure] for run, _ in runs], len(is_correct)) for figure in runs[0][0]}
    return figures | {figure: statistics.fmean(work[figure] for _, work in runs) for figure in runs[0][1]}


def print_table(results: dict[str, dict]) -> None:
    columns = list(dict.fromkeys(column for figures in results.values() for column in figures))
    widths = [22 if "@" in column else 16 for column in columns]
    print(f"\n{'':<14}" + "".join(f"{column:>{width}}" for column, width in zip(columns, widths, strict=True)))
    for name, figures in results.items():
        cells = []
        for column in columns:
            value = figures.get(column)
            if isinstance(value, dict):
                cells.append(f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]")
            else:
                cells.append("-" if value is None else f"{value:.1f}")
        print(f"{name:<14}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))

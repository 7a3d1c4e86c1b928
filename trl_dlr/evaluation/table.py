# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A policy and its controls over several seeds, row by row."""

import statistics
import time
from collections.abc import Callable

from accelerate.utils import gather_object
from datasets import Dataset

from ..reasoners.latent_reasoner import LatentReasoner
from .controls import SAMPLED, answer_questions, score_answers
from .metrics import majority_at_k, pass_at_k, wilson_interval


LEGEND = {
    "policy": "latents sampled by the policy",
    "mean_latents": "the mean of every latent step",
    "no_latents": "the question alone",
    "plain_anchors": "as many plain tokens of the anchor text",
    "zero_latents": "latents of 0",
    "fresh_head": "latents of the policy with a latent head drawn anew",
    "shuffled": "latents sampled for another question",
    "pass@1": "share of right answers",
    "pass@k": "chance that one of k samples is right",
    "majority@k": "share of questions of which most of k samples agree on the right answer",
    "truncated": "share of answers cut off at `max_new_tokens`",
}


def interval(values: list[float], num_questions: int) -> dict[str, float | int | list[float]]:
    """
    Mean over runs with its 95% interval over questions. A question's mean over runs and samples lies between 0 and 1,
    so Wilson's score covers what differs between questions and what differs between samples of one. Student's t over a
    few runs would know of the second alone, go beyond 0 and 1, and be empty where the runs agree.
    """
    mean = statistics.fmean(values)
    low, high = wilson_interval(mean, num_questions)
    return {"mean": mean, "low": low, "high": high, "num_questions": num_questions, "runs": values}


def evaluate_row(
    reasoner: LatentReasoner,
    dataset: Dataset,
    reward: Callable[..., list[float]],
    control: str,
    seeds: list[int],
    num_samples: int,
    k: int,
    batch_size: int,
) -> dict[str, dict | float]:
    """
    Metrics of one row of a table.

    Args:
        reasoner ([`LatentReasoner`]):
            Policy and main model.
        dataset ([`~datasets.Dataset`]):
            Questions with a column `"prompt"` and the columns that the reward reads.
        reward (`Callable`):
            Reward above 0 for a right answer.
        control (`str`):
            Which latents are given, as in [`answer_questions`].
        seeds (`list[int]`):
            Seeds of the latents, a run each. What does not depend on them runs once.
        num_samples (`int`):
            Trajectories per question.
        k (`int`):
            k of pass@k and majority@k.
        batch_size (`int`):
            Questions decoded together.

    Returns:
        `dict`: `pass@1`, `pass@k` and `majority@k`, each with its mean, 95% interval and runs; the mean number of
        tokens of an answer, the share of answers that were cut off, answers decoded, tokens through the main model and
        seconds, of a run.
    """
    engine, runs = reasoner.engine, []
    counters = ("num_decoded", "num_completion_tokens", "num_truncated", "num_forward_tokens")
    for seed in seeds if control in SAMPLED else seeds[:1]:
        before, start = [getattr(engine, counter) for counter in counters], time.perf_counter()
        answers = answer_questions(
            reasoner, dataset, control, num_samples, batch_size, seed, f"{control}, seed {seed}"
        )
        seconds = time.perf_counter() - start
        work = [getattr(engine, counter) - count for counter, count in zip(counters, before, strict=True)]
        num_decoded, num_answer_tokens, num_truncated, num_tokens = (
            sum(counts) for counts in zip(*gather_object([work]), strict=True)
        )
        rewards = score_answers(dataset, answers, reward)
        is_judged = ~rewards.isnan().any(dim=1)  # the reward has an opinion on all of a question's answers
        answers = [texts for texts, is_kept in zip(answers, is_judged.tolist(), strict=True) if is_kept]
        is_correct = (rewards[is_judged] > 0).tolist()
        if not is_correct:
            raise ValueError("`reward` must judge all answers to at least one question, got `None` for each of them.")
        run = {"pass@1": statistics.fmean(statistics.fmean(row) for row in is_correct)}
        if control in SAMPLED and k > 1:
            run[f"pass@{k}"] = statistics.fmean(pass_at_k(len(row), sum(row), k) for row in is_correct)
            run[f"majority@{k}"] = statistics.fmean(
                majority_at_k(texts, row, k) for texts, row in zip(answers, is_correct, strict=True)
            )
        work = {"answer_tokens": num_answer_tokens / num_decoded, "truncated": num_truncated / num_decoded}
        runs.append((run, {**work, "decoded": num_decoded, "forward_tokens": num_tokens, "seconds": seconds}))
    metrics = {metric: interval([run[metric] for run, _ in runs], len(is_correct)) for metric in runs[0][0]}
    return metrics | {metric: statistics.fmean(work[metric] for _, work in runs) for metric in runs[0][1]}


def print_table(results: dict[str, dict]) -> None:
    columns = list(dict.fromkeys(column for metrics in results.values() for column in metrics))
    widths = [22 if "@" in column else 16 for column in columns]
    print(f"\n{'':<14}" + "".join(f"{column:>{width}}" for column, width in zip(columns, widths, strict=True)))
    for name, metrics in results.items():
        cells = []
        for column in columns:
            value = metrics.get(column)
            if isinstance(value, dict):
                cells.append(f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]")
            else:
                cells.append("-" if value is None else f"{value:.{2 if column == 'truncated' else 1}f}")
        print(f"{name:<14}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    print()
    for name in (*results, *columns):
        if meaning := LEGEND.get(name) or LEGEND.get(f"{name.partition('@')[0]}@k"):
            print(f"{name:<14}{meaning}")
    num_questions = next(iter(results.values()))["pass@1"]["num_questions"]
    print(
        f"{'[low, high]':<14}95% interval by Wilson's score, as for other questions of the kind of these "
        f"{num_questions}"
    )

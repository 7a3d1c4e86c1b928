# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Questions with worked answers, steps before a completion, as supervised trainers read them."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .dataset_checks import check_prompts, check_rows, splits


def as_text(completion: str | list[dict[str, str]]) -> str:
    """A standard completion, or a conversational one of a single message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def check_worked_datasets(train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse datasets without rows. Their columns are checked when they are prepared."""
    for given, name in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset")):
        for split_name, split in splits(given, name).items():
            check_rows(split, split_name)


def with_worked_columns(dataset: Dataset, dataset_name: str, num_stages: int) -> Dataset:
    """
    `dataset` with columns `"prompt"`, `"completion"` and `"answer"`, and with `"steps"` if a curriculum needs them.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `"prompt"` or `"question"`, `"completion"` or `"answer"`, and `"steps"`, a list of texts.
        dataset_name (`str`):
            Its name in messages.
        num_stages (`int`):
            Stages of the curriculum; 0 for none.

    Raises:
        `ValueError`: if a column is missing, or the steps of a row.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(f"`{dataset_name}_dataset` must be a `datasets.Dataset`, got {type(dataset).__name__}.")
    columns = dataset.column_names
    for name, other in (("prompt", "question"), ("completion", "answer")):
        if name not in columns and other not in columns:
            raise ValueError(f"`{dataset_name}_dataset` must have a column {name!r} or {other!r}, has {columns}.")
        if name not in columns:
            dataset = dataset.add_column(name, dataset[other])
    check_prompts(dataset, f"{dataset_name}_dataset")
    for index, completion in enumerate(dataset["completion"]):
        is_message = isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict)
        if not isinstance(completion[0].get("content") if is_message else completion, str):
            raise ValueError(
                f"`{dataset_name}_dataset` has a 'completion' that is neither a text nor a list of one message with a text "
                f"as 'content', in row {index}: {str(completion)[:200]!r}."
            )
    if "answer" not in columns:
        dataset = dataset.add_column("answer", [as_text(completion) for completion in dataset["completion"]])
    if num_stages > 0 and "steps" not in columns:
        raise ValueError(
            f"`{dataset_name}_dataset` must have a column 'steps', a list of texts, for a curriculum of "
            f"`num_stages={num_stages}` stages. It has {columns}."
        )
    if "steps" in columns and (empty := [i for i, steps in enumerate(dataset["steps"]) if not steps]):
        raise ValueError(f"`{dataset_name}_dataset` has no 'steps' in {len(empty)} rows, the first is {empty[0]}.")
    return dataset


def tokenize_completions(
    rows: dict[str, list], processing_class: PreTrainedTokenizerBase
) -> dict[str, list[list[int]]]:
    """
    Steps, a line each, then the completion and the end token.

    Args:
        rows (`dict[str, list]`):
            Columns `"completion"` and, if there are any, `"steps"`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model that writes.

    Returns:
        `dict[str, list[list[int]]]`: `"completion_ids"`, and `"step_index"`, the number of the step that each token
        belongs to, from 0, and -1 in what comes after the steps.
    """
    tokenized = {"completion_ids": [], "step_index": []}
    for i, completion in enumerate(rows["completion"]):
        steps = rows["steps"][i] if "steps" in rows else []
        pieces = [f"{step}\n" for step in steps] + [as_text(completion)]
        ids = [processing_class(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
        ids[-1] = ids[-1] + [processing_class.eos_token_id]
        tokenized["completion_ids"].append([token for piece in ids for token in piece])
        places = [*range(len(steps)), -1]
        tokenized["step_index"].append([p for p, piece in zip(places, ids, strict=True) for _ in piece])
    return tokenized

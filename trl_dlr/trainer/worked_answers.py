# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Questions with worked answers, steps before a completion, as supervised trainers read them."""

from collections.abc import Callable
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig
from trl.data_utils import is_conversational

from .dataset_checks import check_prompt_column, check_rows, column_names, read_column, splits


logger = get_logger(__name__)


def as_text(completion: str | list[dict[str, str]]) -> str:
    """A standard completion, or a conversational one of a single message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def check_worked_datasets(train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse datasets without rows. Their columns are checked when they are prepared."""
    for given, name in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset")):
        for split_name, split in splits(given, name).items():
            check_rows(split, split_name)


def with_worked_columns(
    dataset: Dataset | IterableDataset, dataset_name: str, num_stages: int
) -> Dataset | IterableDataset:
    """
    `dataset` with columns `"prompt"`, `"completion"` and `"answer"`, and with `"steps"` if a curriculum needs them.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `"prompt"` or `"question"`, `"completion"` or `"answer"`, and `"steps"`, a list of texts. A stream can
            be trained on without a curriculum; only its first rows are looked at.
        dataset_name (`str`):
            Its name in messages.
        num_stages (`int`):
            Stages of the curriculum; 0 for none.

    Raises:
        `ValueError`: if a column is missing, or the steps of a row.
    """
    is_stream = isinstance(dataset, IterableDataset)
    if not isinstance(dataset, Dataset) and not (is_stream and dataset_name == "train" and num_stages == 0):
        reason = " Stages count its epochs." if dataset_name == "train" else " All of its questions are answered."
        raise ValueError(
            f"`{dataset_name}_dataset` must be a `datasets.Dataset`, got {type(dataset).__name__}."
            f"{reason if is_stream else ''}"
        )
    columns = column_names(dataset)
    for name, other in (("prompt", "question"), ("completion", "answer")):
        if name not in columns and other not in columns:
            raise ValueError(f"`{dataset_name}_dataset` must have a column {name!r} or {other!r}, has {columns}.")
        if name not in columns:
            dataset = with_column(dataset, name, other)
    check_prompt_column(dataset, f"{dataset_name}_dataset")
    for index, completion in enumerate(read_column(dataset, "completion")):
        is_message = isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict)
        if not isinstance(completion[0].get("content") if is_message else completion, str):
            raise ValueError(
                f"`{dataset_name}_dataset` has a 'completion' that is neither a text nor a list of one message with a text "
                f"as 'content', in row {index}: {str(completion)[:200]!r}."
            )
    if "answer" not in columns:
        dataset = with_column(dataset, "answer", "completion", as_text)
    if num_stages > 0 and "steps" not in columns:
        raise ValueError(
            f"`{dataset_name}_dataset` must have a column 'steps', a list of texts, for a curriculum of "
            f"`num_stages={num_stages}` stages. It has {columns}."
        )
    for index, steps in enumerate(read_column(dataset, "steps") if "steps" in columns else ()):
        if steps is not None and not (isinstance(steps, list) and all(isinstance(step, str) for step in steps)):
            raise ValueError(
                f"`{dataset_name}_dataset` has 'steps' that are no list of texts in row {index}, got {str(steps)[:200]!r}. "
                "Give a list with a text for each step."
            )
    if "steps" in columns and (empty := [i for i, steps in enumerate(read_column(dataset, "steps")) if not steps]):
        raise ValueError(f"`{dataset_name}_dataset` has no 'steps' in {len(empty)} rows, the first is {empty[0]}.")
    return dataset


def with_column(
    dataset: Dataset | IterableDataset, name: str, other: str, make: Callable[[Any], Any] = lambda value: value
) -> Dataset | IterableDataset:
    """`dataset` with a column made of another one."""
    if isinstance(dataset, Dataset):
        return dataset.add_column(name, [make(value) for value in dataset[other]])
    return dataset.map(lambda row: {name: make(row[other])})


def tokenize_worked_answers(
    dataset: Dataset | IterableDataset,
    dataset_name: str,
    args: SFTConfig,
    tokenize: Callable[[dict[str, list]], dict[str, list]],
    lengths_of: Callable[[dict[str, Any]], list[int]],
    limits: dict[str, int | None],
) -> Dataset | IterableDataset:
    """
    Tokenize a dataset, and leave out rows that are longer than a limit: a cut answer would have no end.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows of [`with_worked_columns`].
        dataset_name (`str`):
            Its name in messages.
        args ([`~trl.SFTConfig`]):
            Configuration, which says with how many processes, and whether rows are shuffled.
        tokenize (`Callable`):
            From a batch of rows to further columns.
        lengths_of (`Callable`):
            From a tokenized row to the number of tokens that each limit is for.
        limits (`dict[str, int | None]`):
            Most tokens, `None` for any number, by what sets the limit.

    Raises:
        `ValueError`: if no row is left.
    """

    def fits(row: dict[str, Any]) -> bool:
        return all(
            limit is None or length <= limit for length, limit in zip(lengths_of(row), limits.values(), strict=True)
        )

    described = " or ".join(name for name, limit in limits.items() if limit is not None)
    if isinstance(dataset, IterableDataset):
        whole = dataset.map(tokenize, batched=True)
        if described:
            logger.info(f"Rows of the stream `{dataset_name}_dataset` that are longer than {described} are left out.")
            whole = whole.filter(fits)
    else:
        num_proc = args.dataset_num_proc
        dataset = dataset.map(tokenize, batched=True, num_proc=num_proc, desc=f"Tokenizing {dataset_name} dataset")
        whole = dataset.filter(fits, num_proc=num_proc, desc=f"Leaving long rows out of {dataset_name} dataset")
        if len(whole) == 0:
            raise ValueError(
                f"Every row of `{dataset_name}_dataset` is longer than {described}. Shorten the rows, or raise the limit."
            )
        if len(whole) < len(dataset):
            logger.warning(
                f"{len(dataset) - len(whole)} of {len(dataset)} rows of `{dataset_name}_dataset` are longer than "
                f"{described} and are left out."
            )
    return whole.shuffle(seed=args.seed) if args.shuffle_dataset else whole


def end_of_answer(
    processing_class: PreTrainedTokenizerBase,
    eos_token_ids: list[int],
    is_chat: bool,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> int:
    """
    The token that ends an answer: after a conversation the one by which the chat template ends it, if that is one of
    `eos_token_ids`, at which decoding stops; else the tokenizer's end of sequence.
    """
    if is_chat:
        chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        text = processing_class.apply_chat_template(chat, tokenize=False, **(chat_template_kwargs or {}))
        after = processing_class(text.rpartition("answer")[2], add_special_tokens=False)["input_ids"]
        if ends := [token for token in after if token in eos_token_ids]:
            return ends[0]
    return eos_token_ids[0] if processing_class.eos_token_id is None else processing_class.eos_token_id


def tokenize_completions(
    rows: dict[str, list],
    processing_class: PreTrainedTokenizerBase,
    eos_token_ids: list[int],
    chat_template_kwargs: dict[str, Any] | None = None,
) -> dict[str, list[list[int]]]:
    """
    Steps, a line each, then the completion and the token that ends it, see [`end_of_answer`].

    Args:
        rows (`dict[str, list]`):
            Columns `"prompt"`, `"completion"` and, if there are any, `"steps"`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model that writes.
        eos_token_ids (`list[int]`):
            Tokens at which decoding stops.
        chat_template_kwargs (`dict`, *optional*):
            Keyword arguments for the chat template.

    Returns:
        `dict[str, list[list[int]]]`: `"completion_ids"`, and `"step_index"`, the number of the step that each token
        belongs to, from 0, and -1 in what comes after the steps.
    """
    tokenized = {"completion_ids": [], "step_index": []}
    is_chat = is_conversational({"prompt": rows["prompt"][0]})
    end = end_of_answer(processing_class, eos_token_ids, is_chat, chat_template_kwargs)
    for i, completion in enumerate(rows["completion"]):
        steps = rows["steps"][i] if "steps" in rows else []
        pieces = [f"{step}\n" for step in steps] + [as_text(completion)]
        ids = [processing_class(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
        ids[-1] = [*ids[-1], end]
        tokenized["completion_ids"].append([token for piece in ids for token in piece])
        places = [*range(len(steps)), -1]
        tokenized["step_index"].append([p for p, piece in zip(places, ids, strict=True) for _ in piece])
    return tokenized

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Questions for training and evaluation: from the Hub, from local files, or generated."""

import itertools
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from ..cli.parser import did_you_mean
from ..option_docs import described
from ..rewards import correctness_reward, get_reasoning_gym_reward


FILE_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
QUESTION_COLUMNS = ("question", "problem")
ANSWER_COLUMNS = ("answer", "solution")
COLOURS = "red green blue yellow black white brown pink".split()
ANIMALS = "fox cat dog horse cow bird fish wolf".split()
REASONING_GYM = "reasoning_gym/"
GENERATED = ("addition", "codes", REASONING_GYM)


@described
@dataclass
class QuestionArguments:
    """
    Questions, and how many of them a policy and its controls are evaluated on.

    Args:
        dataset_name (`str`, *optional*):
            Hub dataset, or a local file (JSON, JSONL, CSV or Parquet, compressed or not), with a column `prompt`,
            `question` or `problem`, and gold answers in `answer` or `solution`. Or what is generated: `addition` (What
            is a + b?), `codes` (secret digits of colours and animals, a look-up that only the policy can learn) or
            `reasoning_gym/<task>`, whose answers are judged by the task itself.
        dataset_config (`str`, *optional*):
            Configuration of a Hub dataset.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Held-out split of a Hub dataset, or a part such as `test[:100]`.
        system_prompt (`str`, *optional*):
            System message, for questions without a column `prompt`.
        prompt_template (`str`, *optional*):
            Text with `{question}` in it, for models without a chat template. If unset, prompts are conversational.
        num_eval_questions (`int`, *optional*):
            Held-out questions, the first ones. In training, the policy and its controls answer them before and after;
            if unset, they do not. In evaluation, all questions if unset.
        num_eval_samples (`int`, *optional*, defaults to `4`):
            Trajectories per held-out question; pass@k has this k.
        eval_batch_questions (`int`, *optional*, defaults to `12`):
            Held-out questions decoded together.
    """

    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_test_split: str = "test"
    system_prompt: str | None = None
    prompt_template: str | None = None
    num_eval_questions: int | None = None
    num_eval_samples: int = 4
    eval_batch_questions: int = 12

    def __post_init__(self):
        if self.dataset_name is None:
            raise ValueError("`dataset_name` must be set: pass --dataset_name, or name it in the --config file.")
        for name in ("num_eval_questions", "num_eval_samples", "eval_batch_questions"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")

    def first_questions(self, dataset: Dataset) -> Dataset:
        """The questions to evaluate on."""
        return dataset if self.num_eval_questions is None else dataset.take(min(self.num_eval_questions, len(dataset)))


Judge = Callable[..., list[float]]


def load_test_questions(args: QuestionArguments) -> tuple[Dataset, Judge]:
    """
    Held-out questions and the reward that judges answers to them. A local file is taken as a whole. Entries of
    reasoning-gym, also those of a file, are judged by their task's own `score_answer`.
    """
    judge = correctness_reward
    if (generated := generate_questions(args.dataset_name)) is not None:
        _, dataset, judge = generated
    elif file_loader(args.dataset_name) is not None:
        dataset, is_json = load_rows(args.dataset_name, None, "train"), file_loader(args.dataset_name) == "json"
        entries = read_json(args.dataset_name) if is_json else dataset
        if all("source_dataset" in (entry.get("metadata") or ()) for entry in entries):
            if not is_json:  # where all metadata have the same keys, or are texts
                raise ValueError(
                    f"`dataset_name`: entries of reasoning-gym must be a file of JSON, got {args.dataset_name!r}."
                )
            dataset, judge = dataset.add_column("index", range(len(dataset))), get_reasoning_gym_reward(entries)
    else:
        dataset = load_rows(args.dataset_name, args.dataset_config, args.dataset_test_split)
    return with_prompts(args.first_questions(dataset), args.system_prompt, args.prompt_template), judge


def generate_questions(name: str) -> tuple[Dataset, Dataset, Judge] | None:
    """Training questions, held-out ones and their judge, or `None` for the name of a file or of a Hub dataset."""
    if name == "addition":
        return *addition(), correctness_reward
    if name == "codes":
        return *codes(), correctness_reward
    if name.startswith(REASONING_GYM):
        import reasoning_gym

        entries = reasoning_gym.create_dataset(name.removeprefix(REASONING_GYM), size=2200, seed=0)
        rows = [
            {"question": row["question"], "answer": row["answer"], "index": index} for index, row in enumerate(entries)
        ]
        test = rows[:200]
        held_out = {row["question"] for row in test}  # a small task draws some of them again
        train = [row for row in rows[200:] if row["question"] not in held_out]
        return Dataset.from_list(train), Dataset.from_list(test), get_reasoning_gym_reward(entries)
    return None


def addition(max_operand: int = 12, num_test: int = 36) -> tuple[Dataset, Dataset]:
    """
    All sums of two numbers up to `max_operand`, some of them held out, the same ones for every seed. A pair is held
    out in both orders: 4 + 12 is no new question after 12 + 4.
    """
    pairs = list(itertools.combinations_with_replacement(range(1, max_operand + 1), 2))
    random.Random(0).shuffle(pairs)
    train, test = [], []
    for a, b in pairs:
        orders = dict.fromkeys([(a, b), (b, a)])
        split = test if len(test) + len(orders) <= num_test else train
        split += [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in orders]
    return Dataset.from_list(train), Dataset.from_list(test)


def codes(num_test: int = 16) -> tuple[Dataset, Dataset]:
    """
    Secret codes: every colour and every animal stands for a digit, drawn once and for all, and the code of the red fox
    is both. The main model cannot know them: only latents that carry what the policy has learned can bring them.
    """
    draw = random.Random(0)
    digits = {word: draw.randrange(10) for word in (*COLOURS, *ANIMALS)}
    pairs = list(itertools.product(COLOURS, ANIMALS))
    draw.shuffle(pairs)
    rows = [
        {"question": f"The code of the {colour} {animal} is", "answer": f"{digits[colour]}{digits[animal]}"}
        for colour, animal in pairs
    ]
    return Dataset.from_list(rows[num_test:]), Dataset.from_list(rows[:num_test])


# ---- Files ----


def file_loader(name: str) -> str | None:
    """Loader of `datasets` for a local file, which may be compressed; `None` for a folder or a name on the Hub."""
    suffixes = [suffix for suffix in Path(name).suffixes if suffix not in COMPRESSIONS]
    return FILE_LOADERS.get(suffixes[-1]) if suffixes else None


def load_rows(name: str, config: str | None, split: str) -> Dataset:
    """One split of a Hub dataset, or of a local file, which has one split, `"train"`."""
    if (loader := file_loader(name)) is None:
        if Path(name).is_file():
            raise ValueError(f"`dataset_name` must be a file of {', '.join(FILE_LOADERS)}, got {name!r}.")
        try:
            return load_dataset(name, config, split=split)
        except DatasetNotFoundError as error:
            hint = did_you_mean(name, GENERATED)
            raise ValueError(f"`dataset_name`: {' '.join(str(error).split())}.{hint}") from error
    try:
        return load_dataset(loader, data_files=name, split=split)
    except (DatasetGenerationError, StopIteration, ValueError) as error:
        # With datasets 4.7, no JSON is a `ValueError`, which says less; nothing to read is a `StopIteration`
        fault = what_is_broken(name, loader) or str(error.__cause__ or error)
        raise ValueError(f"`dataset_name`: the file {name!r} cannot be read: {fault}.") from error


def read_json(name: str) -> list[dict]:
    """
    Rows of a local JSON or JSONL file as they stand there, where `datasets` would give all of them the same keys.
    """
    with fsspec.open(name, "rt", encoding="utf-8", compression="infer") as file:
        text = file.read()
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def what_is_broken(name: str, loader: str) -> str | None:
    """Where a text file is no JSON, with its line, or that it is empty; `None` if it is neither."""
    if loader == "parquet":
        return None
    with fsspec.open(name, "rt", encoding="utf-8", errors="replace", compression="infer") as file:
        text = file.read()
    if not text.strip():
        return "it is empty"
    is_whole = loader != "json" or text.lstrip().startswith("[")  # one list, rather than an object a line
    for number, line in [(1, text)] if is_whole else enumerate(text.split("\n"), 1):
        try:
            if loader == "json" and line.strip():
                json.loads(line)
        except json.JSONDecodeError as error:
            return f"line {number + error.lineno - 1}, column {error.colno} is no JSON ({error.msg})"
    return None


# ---- Prompts and targets ----


def with_prompts(dataset: Dataset, system_prompt: str | None = None, prompt_template: str | None = None) -> Dataset:
    """
    Questions as prompts: conversational, or text if there is a template. Prompts that are there stay as they are.

    Raises:
        `ValueError`: there are neither prompts nor questions, or prompts and what to make prompts with, or a template
        without its question, or one and a system message.
    """
    columns = dataset.column_names
    question = next((name for name in QUESTION_COLUMNS if name in columns), None)
    if "prompt" not in columns and question is None:
        raise ValueError(f"`dataset_name` must have a column 'prompt', 'question' or 'problem', has {columns}.")
    if "prompt" in columns:
        for name, value in (("system_prompt", system_prompt), ("prompt_template", prompt_template)):
            if value:
                raise ValueError(
                    f"`{name}` is for questions, but the dataset has a column 'prompt', which is used as it is, got "
                    f"{value!r}. Unset `{name}`, or rename or remove that column."
                )
    if system_prompt and prompt_template is not None:
        raise ValueError(
            "`system_prompt` is a message of a chat, but `prompt_template` makes plain prompts, got "
            f"{system_prompt!r}. Unset either, or write the one into the other."
        )
    if prompt_template is not None and "{question}" not in prompt_template:
        raise ValueError(f"`prompt_template` must have {{question}} in it, got {prompt_template!r}.")

    def prompt(row: dict) -> dict:
        if prompt_template is not None:  # in which other braces are text
            return {"prompt": prompt_template.replace("{question}", str(row[question]))}
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return {"prompt": [*system, {"role": "user", "content": str(row[question])}]}

    if "prompt" not in columns:
        dataset = dataset.map(prompt)
    gold = next((name for name in ANSWER_COLUMNS if name in columns), None)
    if gold is not None and "answer" not in columns:
        dataset = dataset.rename_column(gold, "answer")
    return dataset


def with_targets(dataset: Dataset | None, answer_tags: list[str] | None) -> Dataset | None:
    """
    Questions with the completion to learn and the steps before it; all of them, if no answer has steps. Completions
    that are there stay as they are.
    """
    if dataset is None or "completion" in dataset.column_names:
        return dataset
    if "answer" not in dataset.column_names or None in dataset["answer"]:
        raise ValueError(
            "The dataset must have a column 'completion', or an 'answer' in every row, to learn to write: "
            f"it has {', '.join(dataset.column_names)}. Tasks that only judge answers are for reinforcement learning."
        )
    dataset = dataset.map(worked, fn_kwargs={"answer_tags": answer_tags})
    with_steps = dataset.filter(lambda row: len(row["steps"]) > 0)
    return with_steps if len(with_steps) > 0 else dataset.remove_columns("steps")


def worked(row: dict[str, Any], answer_tags: list[str] | None) -> dict[str, Any]:
    """Steps without GSM8K's calculator marks, and the result as the format reward asks for it."""
    steps, _, result = str(row["answer"]).rpartition("####")
    lines = [re.sub(r"<<.*?>>", "", line).strip() for line in steps.splitlines() if line.strip()]
    tag = answer_tags[-1] if answer_tags else None
    return {"steps": lines, "completion": f"<{tag}>{result.strip()}</{tag}>" if tag else result.strip()}

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Arguments that training commands share, and what they stand for: models and questions."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedModel
from trl import ModelConfig, get_quantization_config

from ..models import first_layers, fresh_layers
from ..models.hub import check_location
from ..trainer.arguments import LatentPolicyArguments
from ..trainer.policy_training import load_main_model


FILE_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
ASSISTANTS = {"first_layers": first_layers, "fresh_layers": fresh_layers}
QUESTION_COLUMNS = ("question", "problem")
ANSWER_COLUMNS = ("answer", "solution")


@dataclass
class RunArguments:
    """
    Models and data of a training command.

    Args:
        main_model_name_or_path (`str`, *optional*):
            Frozen main model: a Hub id or a folder.
        policy (`str`, *optional*):
            Saved policy to go on from, instead of a new one around the assistant `model_name_or_path`.
        assistant_num_layers (`int`, *optional*, defaults to `4`):
            Layers of an assistant made from the main model (`model_name_or_path` `first_layers` or `fresh_layers`).
        dataset_name (`str`, *optional*):
            Hub dataset, or a local file (JSON, JSONL, CSV or Parquet), with a column `prompt`, `question` or `problem`.
        dataset_config (`str`, *optional*):
            Configuration of a Hub dataset.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on, or a part such as `"train[:128]"`.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on, if `eval_strategy` is set.
        system_prompt (`str`, *optional*):
            System message, for questions without a column `prompt`.
        prompt_template (`str`, *optional*):
            Text with `{question}` in it, for models without a chat template.
        report (`bool`, *optional*, defaults to `False`):
            Whether to write `<output_dir>/report/report.html` during and after training (needs matplotlib).
    """

    main_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Frozen main model: Hub id or folder."}
    )
    policy: str | None = field(default=None, metadata={"help": "Saved policy to go on from."})
    assistant_num_layers: int = field(default=4, metadata={"help": "Layers of an assistant made from the main model."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub dataset, or local JSON, JSONL, CSV or Parquet file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on, such as 'train[:128]'."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on, with eval_strategy."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message for questions."})
    prompt_template: str | None = field(default=None, metadata={"help": "Text with {question}, instead of a chat."})
    report: bool = field(default=False, metadata={"help": "Write a page with plots during and after training."})

    def __post_init__(self):
        for name in ("main_model_name_or_path", "dataset_name"):
            if getattr(self, name) is None:
                raise ValueError(f"`{name}` must be set: pass --{name}, or name it in the --config file.")
        for name in filter(None, (self.main_model_name_or_path, self.policy)):
            check_location(name)


def resolve_models(
    model: str | None,
    main_model: str | PreTrainedModel,
    assistant_num_layers: int,
    training_args: LatentPolicyArguments,
    model_args: ModelConfig,
) -> dict[str, object]:
    """
    What a trainer is given as `model`, `main_model` and `quantization_config`. An assistant that is made from the main
    model needs its weights, so that one is loaded here.
    """
    if model is None:
        raise ValueError(
            f"`model_name_or_path` must be set: {', '.join(ASSISTANTS)}, a Hub id or a path. Or set `policy`."
        )
    quantization_config = get_quantization_config(model_args)
    if model in ASSISTANTS:
        source = main_model
        if isinstance(source, str):
            source = load_main_model(source, training_args)
        model = ASSISTANTS[model](source, assistant_num_layers)
        if quantization_config is None:  # else the trainer loads it again, quantized
            main_model = source
    else:
        given = {"revision": model_args.model_revision, "attn_implementation": model_args.attn_implementation}
        given = {name: value for name, value in given.items() if value not in (None, "main")}
        training_args.model_init_kwargs = {**given, **(training_args.model_init_kwargs or {})} or None
    return {"model": model, "main_model": main_model, "quantization_config": quantization_config}


def load_split(args: RunArguments, split: str) -> Dataset:
    """One split of a training command's data."""
    return load_dataset_split(args.dataset_name, args.dataset_config, split, args.system_prompt, args.prompt_template)


def load_dataset_split(
    name: str, config: str | None, split: str, system_prompt: str | None, prompt_template: str | None
) -> Dataset:
    """One split, with a column `prompt` and the gold answers as `answer`."""
    return with_prompts(load_rows(name, config, split), system_prompt, prompt_template)


def file_loader(name: str) -> str | None:
    """Loader of `datasets` for a local file, which may be compressed; `None` for a folder or a name on the Hub."""
    suffixes = [suffix for suffix in Path(name).suffixes if suffix not in COMPRESSIONS]
    return FILE_LOADERS.get(suffixes[-1]) if suffixes else None


def load_rows(name: str, config: str | None, split: str) -> Dataset:
    """One split of a Hub dataset, or of a local file, which has one split, `"train"`."""
    if (loader := file_loader(name)) is None:
        return load_dataset(name, config, split=split)
    try:
        return load_dataset(loader, data_files=name, split=split)
    except (DatasetGenerationError, StopIteration, ValueError) as error:
        # With datasets 4.7, no JSON is a `ValueError`, which says less; nothing to read is a `StopIteration`
        place = what_is_broken(name, loader) or str(error.__cause__ or error)
        raise ValueError(f"`dataset_name`: the file {name!r} cannot be read: {place}.") from error


def read_json(name: str) -> list[dict]:
    """Rows of a local JSON or JSONL file as they stand there, where `datasets` would give all of them the same keys."""
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
            f"`system_prompt` is a message of a chat, but `prompt_template` makes plain prompts, got {system_prompt!r}. Unset "
            "either, or write the one into the other."
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

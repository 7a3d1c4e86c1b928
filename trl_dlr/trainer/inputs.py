# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What trainers are given, checked before anything is built: datasets, tokenizers, adapters and rewards."""

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from accelerate.utils import parse_flag_from_env
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, PeftType
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl import GRPOConfig
from trl.trainer.utils import get_callable_name, get_config_model_id, is_async_callable

from ..generation.text import check_prompts
from ..models.hub import check_location, readable_damage
from ..rewards import correctness_reward


def config_or_default(args: Any, config_class: type[TrainingArguments], model: Any, suffix: str) -> TrainingArguments:
    """Configuration of a trainer: the default one, named after `model`, if there is none."""
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{name.split('/')[-1] or 'model'}-{suffix}")
    if not isinstance(args, config_class):
        raise ValueError(f"`args` must be a `{config_class.__name__}`, got {type(args).__name__}.")
    return args


def refuse_arguments(trainer: str, reason: str, **arguments) -> None:
    """Refuse arguments of [`~trl.GRPOTrainer`] that were given to a trainer for which they have no meaning."""
    for name, value in arguments.items():
        if value:
            raise ValueError(f"`{name}` has no meaning for `{trainer}`: {reason}.")


def refuse_fsdp(args: TrainingArguments) -> None:
    """Refuse to be sharded by FSDP, before anything is built."""
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(
            f"FSDP (`fsdp={args.fsdp!r}`, or `ACCELERATE_USE_FSDP` in the environment) is not supported: rollouts, "
            "references and checkpoints here are of a model that is whole on every process. Use DDP, or DeepSpeed "
            "ZeRO-2 (accelerate_configs/deepspeed_zero2.yaml)."
        )


def load_tokenizer(model: str | PreTrainedModel, name: str, **kwargs) -> PreTrainedTokenizerBase:
    """Tokenizer saved with `model`; `name` is the argument to blame if there is none."""
    path = model if isinstance(model, str) else model.config.name_or_path
    if not path:
        raise ValueError(f"`{name}` must be given: the model was built in memory and names no tokenizer.")
    check_location(path)
    with readable_damage(path):
        return AutoTokenizer.from_pretrained(path, padding_side="left", truncation_side="left", **kwargs)


def check_vocabulary(model: PreTrainedModel, processing_class: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer with tokens that a model has no embeddings for; `name` is the argument to blame."""
    num_embeddings = model.get_input_embeddings().weight.size(0)
    if len(processing_class) > num_embeddings:
        raise ValueError(
            f"`{name}` has {len(processing_class)} tokens, but {type(model).__name__} has embeddings for "
            f"{num_embeddings}. Give the tokenizer that belongs to it, or resize the embeddings "
            "(`resize_token_embeddings`)."
        )


def check_adapter(model: Any, peft_config: PeftConfig | None) -> None:
    """Refuse what is no adapter of a model's modules, or needs more than the input."""
    if peft_config is None and isinstance(model, PeftModel):
        peft_config = model.active_peft_config
    if peft_config is None:
        return
    if not isinstance(peft_config, PeftConfig):
        raise ValueError(
            f"`peft_config` must be a `PeftConfig`, such as `LoraConfig`, got {type(peft_config).__name__}."
        )
    needs_more = peft_config.is_prompt_learning or peft_config.peft_type == PeftType.POLY
    if needs_more or not hasattr(peft_config, "target_modules"):
        raise ValueError(
            f"`peft_config` must be of an adapter of modules, such as `LoraConfig`, got {type(peft_config).__name__}: "
            "what is read are questions and latents, without virtual tokens, numbers of tasks or other adapters."
        )


def as_reward_funcs(reward_funcs: Any) -> Any:
    """What was given as `reward_funcs`, as TRL takes it, each with its name in the error if it fails."""
    if isinstance(reward_funcs, tuple):
        reward_funcs = list(reward_funcs)
    several = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    if not several:
        raise ValueError("`reward_funcs` must hold at least one reward function, got [].")
    for reward_func in several:
        if not isinstance(reward_func, str) and not callable(reward_func):
            raise ValueError(
                "`reward_funcs` must be functions, models or names of models, one or a list of them, got "
                f"{type(reward_func).__name__}."
            )
    named = [f if isinstance(f, (str, nn.Module)) else naming_itself(f) for f in several]
    return named if isinstance(reward_funcs, list) else named[0]


def naming_itself(reward_func: Callable) -> Callable:
    """`reward_func`, with its name in the error if it raises, with its traceback, or if a reward is infinite."""
    name = get_callable_name(reward_func)

    def error(cause: Exception) -> RuntimeError:
        return RuntimeError(f"The reward function '{name}' raised {type(cause).__name__}: {cause}")

    def finite(rewards: list[float | None]) -> list[float | None]:
        if infinite := [reward for reward in rewards if reward is not None and math.isinf(reward)]:
            raise ValueError(
                f"The reward function '{name}' returned {infinite[0]}, which leaves no mean to compare with. Return a "
                "number, or None where there is no reward."
            )
        return rewards

    if is_async_callable(reward_func):

        async def wrapped(*args, **kwargs):
            try:
                rewards = await reward_func(*args, **kwargs)
            except Exception as cause:
                raise error(cause) from cause
            return finite(rewards)

    else:

        def wrapped(*args, **kwargs):
            try:
                rewards = reward_func(*args, **kwargs)
            except Exception as cause:
                raise error(cause) from cause
            return finite(rewards)

    functools.update_wrapper(wrapped, reward_func)
    wrapped.__name__ = name
    return wrapped


# Arguments of reward functions that are TRL's, or replace a column without a word
REWARD_ARGUMENTS = {"prompts", "completions", "trainer_state", "log_extra", "log_metric"}
OTHER_NAMES = ("question", "problem", "query", "instruction", "input", "text")  # of a column of prompts
NUM_STREAMED = 16  # rows of a stream that are looked at


def check_datasets(train_dataset: Any, eval_dataset: Any, args: GRPOConfig) -> None:
    """
    Refuse datasets of prompts that reinforcement learning could not use.

    Args:
        train_dataset (`Any`):
            What was given as the training dataset.
        eval_dataset (`Any`):
            What was given as the evaluation dataset, or `None`.
        args ([`~trl.GRPOConfig`] with [`GroupArguments`]):
            Configuration, which says how many different prompts a rollout takes.

    Raises:
        `ValueError`: if there are too few rows, no column `"prompt"`, or prompts that are no text, or if evaluation
        batches do not hold whole groups.
    """
    if not isinstance(train_dataset, (Dataset, IterableDataset)):
        hint = ""
        if isinstance(train_dataset, dict):
            hint = f" Pass one of its splits, {', '.join(map(repr, train_dataset))}."
        raise ValueError(
            "`train_dataset` must be a `Dataset` or an `IterableDataset` with a column 'prompt', got "
            f"{type(train_dataset).__name__}.{hint}"
        )
    for name, dataset in {"train_dataset": train_dataset, **splits(eval_dataset, "eval_dataset")}.items():
        check_rows(dataset, name)
        check_prompt_column(dataset, name)
        if found := REWARD_ARGUMENTS & set(column_names(dataset)):
            raise ValueError(
                f"`{name}` has a column {sorted(found)[0]!r}, which is what reward functions get from the trainer "
                "under that name, beside the columns. Rename or remove it."
            )
    if eval_dataset is not None:
        args.check_evaluation()
    num_prompts = args.generation_batch_size // args.num_generations
    if (num_rows := count_rows(train_dataset, num_prompts)) < num_prompts:
        raise ValueError(
            f"`train_dataset` has {num_rows} of the {num_prompts} rows that a rollout takes "
            f"(`generation_batch_size={args.generation_batch_size}` / `num_generations={args.num_generations}`), so "
            "nothing would be trained on. Add rows, raise `num_generations`, or lower `per_device_train_batch_size`, "
            "which `generation_batch_size` is a multiple of."
        )


def splits(dataset: Any, name: str) -> dict[str, Dataset | IterableDataset]:
    """The datasets that were given as one or as several, by what they are called in messages."""
    several = {f"{name}[{split!r}]": part for split, part in dataset.items()} if isinstance(dataset, dict) else {}
    several = {name: part for name, part in (several or {name: dataset}).items() if part is not None}
    for split_name, part in several.items():
        if not isinstance(part, (Dataset, IterableDataset)):
            raise ValueError(
                f"`{split_name}` must be a `Dataset` or an `IterableDataset`, got {type(part).__name__}. "
                "`Dataset.from_list` makes one of a list of rows."
            )
    return several


def check_gold_answers(reward_funcs: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse datasets of checked prompts without the gold answers that [`correctness_reward`] reads."""
    several = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    if not any(reward_func is correctness_reward for reward_func in several):
        return
    for name, dataset in {"train_dataset": train_dataset, **splits(eval_dataset, "eval_dataset")}.items():
        columns = column_names(dataset)
        if not {"answer", "solution"} & set(columns):
            raise ValueError(
                f"`{name}` must have a column 'answer' or 'solution' of gold answers for `correctness_reward`, has "
                f"{columns}."
            )


def count_rows(dataset: Dataset | IterableDataset, at_most: int) -> int:
    if isinstance(dataset, Dataset):
        return len(dataset)
    return sum(1 for _ in itertools.islice(dataset, at_most))


def check_rows(dataset: Dataset | IterableDataset, name: str) -> None:
    """Refuse a dataset without rows."""
    if count_rows(dataset, 1) == 0:
        raise ValueError(f"`{name}` has no rows. Check what it was loaded or filtered from.")


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Columns of a dataset with rows; a stream may show them by its first one alone."""
    return dataset.column_names or list(next(iter(dataset)))


def read_column(dataset: Dataset | IterableDataset, name: str) -> Iterator[Any]:
    """A column of all rows, or of the first ones of a stream."""
    if isinstance(dataset, Dataset):
        return iter(dataset[name])
    return (row[name] for row in itertools.islice(dataset, NUM_STREAMED))


def check_prompt_column(dataset: Dataset | IterableDataset, name: str) -> None:
    """
    Refuse a dataset without a column `"prompt"` of texts or conversations, or with images.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with rows.
        name (`str`):
            Its name in messages.
    """
    columns = column_names(dataset)
    if found := {"image", "images", "environment"} & set(columns):
        raise ValueError(
            f"`{name}` has a column {sorted(found)[0]!r}, but this trainer reads text prompts alone. Remove the "
            "column."
        )
    if "prompt" not in columns:
        hint = ""
        if other := next((column for column in OTHER_NAMES if column in columns), None):
            hint = f" Rename it: `dataset.rename_column({other!r}, 'prompt')`."
        elif "messages" in columns:
            hint = " Make one of what comes before the answer in 'messages'."
        raise ValueError(f"`{name}` must have a column 'prompt', has {columns}.{hint}")
    check_prompts(read_column(dataset, "prompt"), f"`{name}`")


def check_chat_templates(
    dataset: Any,
    name: str,
    chat_template_kwargs: dict[str, Any] | None = None,
    **processing_classes: PreTrainedTokenizerBase,
) -> None:
    """
    Refuse conversational prompts for a tokenizer that cannot render them. One prompt with each sequence of roles is
    tried.

    Args:
        dataset (`Any`):
            Dataset of checked prompts, several of them, or `None`.
        name (`str`):
            Its name in messages.
        chat_template_kwargs (`dict`, *optional*):
            Keyword arguments for the chat templates.
        **processing_classes ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizers, by the names of the arguments that give them.
    """
    for split_name, split in splits(dataset, name).items():
        kinds = {}
        for index, prompt in enumerate(read_column(split, "prompt")):
            if isinstance(prompt, list):
                kinds.setdefault(tuple(message["role"] for message in prompt), (index, prompt))
        for processing_name, processing_class in processing_classes.items():
            if kinds and processing_class.chat_template is None:
                raise ValueError(
                    f"`{processing_name}` has no chat template, but the prompts of `{split_name}` are conversational. "
                    "Set its `chat_template`, or give prompts as text."
                )
            for roles, (index, prompt) in kinds.items():
                try:
                    processing_class.apply_chat_template(
                        prompt, add_generation_prompt=True, tokenize=False, **(chat_template_kwargs or {})
                    )
                except Exception as error:  # of the template's author's choice
                    raise ValueError(
                        f"The chat template of `{processing_name}` cannot render row {index} of `{split_name}`, with "
                        f"the roles {', '.join(roles)}: {error}. Give conversations that it takes (a template without "
                        "a system role wants that text in the user's message), or set another `chat_template`."
                    ) from error


def longest_prompts(*datasets: Any, num_rows: int = 16) -> Iterator[list]:
    """The longest prompts of each of several datasets by characters, without tokenizing all of them."""
    for dataset in datasets:
        for split in splits(dataset, "").values():
            yield heapq.nlargest(num_rows, read_column(split, "prompt"), key=lambda prompt: len(str(prompt)))

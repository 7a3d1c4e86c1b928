# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Questions with worked answers, as supervised trainers read them, and which part of an answer the latents stand for,
stage by stage.
"""

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from trl import SFTConfig
from trl.data_utils import is_conversational

from .arguments import CurriculumArguments
from .inputs import check_prompt_column, check_rows, column_names, read_column, splits


class Curriculum(TrainerCallback, ExportableState):
    """
    Moves on stage by stage, in the manner of Coconut ([arXiv 2412.06769](https://huggingface.co/papers/2412.06769)).

    In stage s the first s reasoning steps are gone and latents stand for them; in the last stage all steps are gone,
    in stage 0 none. Without stages all latents are always there, and so is the whole completion. A stage is over after
    `epochs_per_stage`, or as soon as what is logged of it reaches `stage_accuracy`.

    Args:
        args ([`CurriculumArguments`]):
            Configuration of the trainer.
        epochs_of_stage_0 (`int`, *optional*):
            Epochs before stage 1. If `None`, there is no stage 0 to mix in either.
    """

    RECORDED = ("num_stages", "latents_per_stage", "curriculum_unit", "epochs_per_stage", "stage_accuracy")

    def __init__(self, args: CurriculumArguments, epochs_of_stage_0: int | None = None):
        self.args = args
        self.epochs_of_stage_0 = epochs_of_stage_0
        self.go_to({})

    def go_to(self, attributes: dict[str, Any]) -> None:
        """To where a checkpoint was, or to the beginning."""
        self.stage = attributes.get("stage", 0 if self.epochs_of_stage_0 else 1)
        self.began = attributes.get("began", 0.0)  # epoch
        self.is_learned = attributes.get("is_learned", False)

    def go_to_checkpoint(self, checkpoint: str) -> None:
        """To the stage of a checkpoint."""
        self.go_to(stored_attributes(TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))))

    def state(self) -> dict[str, Any]:
        attributes = {"stage": self.stage, "began": self.began, "is_learned": self.is_learned}
        return {"args": {}, "attributes": attributes}

    def on_train_begin(self, args, state, control, **kwargs):
        self.go_to(stored_attributes(state) if state.global_step > 0 else {})

    def on_log(self, args, state, control, logs=None, **kwargs):
        least = self.args.stage_accuracy
        if least is not None and logs.get("mean_token_accuracy", 0.0) >= least:
            self.is_learned = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.stage < self.args.num_stages:
            logger.warning(
                f"Training ended in stage {self.stage} of {self.args.num_stages}: the model has not learned to think "
                "in the latents of the last. Raise `max_steps` or `num_train_epochs`."
            )

    def begin_step(self, state: TrainerState, optimizer: torch.optim.Optimizer) -> None:
        """To the next stage if this one is over, before the rows of a step are drawn."""
        epochs = self.epochs_of_stage_0 if self.stage == 0 else self.args.epochs_per_stage
        is_over = self.is_learned or state.epoch - self.began > epochs - 1e-6
        if is_over and self.stage < self.args.num_stages:
            self.go_to({"stage": self.stage + 1, "began": state.epoch})
            if self.args.reset_optimizer:
                reset_optimizer(optimizer)

    def draw_stages(self, num_rows: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """
        Stage of each row: the present one, mixed with those up to it if there is a `generator` to choose them. Every
        process draws those of all processes' rows, and takes its own: what one process trains on, several do.
        """
        stages = torch.full((num_rows,), self.stage)
        if generator is not None and self.args.stage_mixing > 0:
            number = num_rows * self.args.world_size
            is_mixed = torch.rand(number, generator=generator) < self.args.stage_mixing
            first = 1 if self.epochs_of_stage_0 is None else 0
            others = torch.randint(first, self.stage + 1, (number,), generator=generator)
            drawn = torch.where(is_mixed, others, self.stage)
            stages = drawn[self.args.process_index * num_rows :][:num_rows]
        return stages

    def what_is_left(
        self, completion_ids: torch.Tensor, step_index: torch.Tensor, stages: torch.Tensor
    ) -> torch.Tensor:
        """Worked answers as rows of these stages have them, see [`keep_after_stage`]."""
        tokens_per_stage = self.args.latents_per_stage if self.args.curriculum_unit == "token" else None
        return keep_after_stage(completion_ids, step_index, stages, self.args.num_stages, tokens_per_stage)


def stored_attributes(state: TrainerState) -> dict[str, Any]:
    """What the curriculum had stored in a trainer's state."""
    return state.stateful_callbacks[Curriculum.__name__]["attributes"]


def stage_generator(trainer: Trainer) -> torch.Generator:
    """What draws the stages of a step's rows, the same in every process and after a checkpoint."""
    return torch.Generator().manual_seed(trainer.args.seed * 1_000_003 + trainer.state.global_step)


def reset_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Moments and step counts start anew. Under DeepSpeed they are views of its partitions, and are set to 0 in place."""
    optimizer = optimizer.optimizer  # within accelerate's
    if not hasattr(optimizer, "optimizer"):
        optimizer.state.clear()
        return
    for state in optimizer.optimizer.state.values():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            state[name] = state[name].zero_() if isinstance(state[name], torch.Tensor) else 0


def keep_after_stage(
    completion_ids: torch.Tensor,
    step_index: torch.Tensor,
    stages: torch.Tensor,
    num_stages: int,
    tokens_per_stage: int | None = None,
) -> torch.Tensor:
    """
    What of worked answers is left to be written.

    Args:
        completion_ids (`torch.Tensor` of shape `(batch_size, length)`):
            Steps and answer, padded with -100.
        step_index (`torch.Tensor` of shape `(batch_size, length)`):
            Number of the step that a token belongs to, from 0; -1 in the answer and on padding.
        stages (`torch.Tensor` of shape `(batch_size,)`):
            Stage of each row.
        num_stages (`int`):
            Number of stages; rows in the last one have no step left.
        tokens_per_stage (`int`, *optional*):
            If given, stages take this many tokens of the steps instead of whole steps.

    Returns:
        `torch.Tensor` of shape `(batch_size, longest)`: the same ids without what is gone, padded with -100.
    """
    is_step = step_index >= 0
    index = is_step.cumsum(1) - 1 if tokens_per_stage is not None else step_index
    gone = stages.unsqueeze(1) * (tokens_per_stage or 1)
    is_gone = is_step & ((index < gone) | (stages == num_stages).unsqueeze(1))
    rows = [ids[keep] for ids, keep in zip(completion_ids, ~is_gone & (completion_ids != -100), strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def add_markers(
    model: PreTrainedModel, processing_class: PreTrainedTokenizerBase, markers: Sequence[str]
) -> list[int]:
    """
    Ids of marker tokens. Missing ones are added, with the mean embedding as their own.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal LM. Its embeddings grow if they have too few rows.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        markers (`Sequence[str]`):
            Tokens.

    Returns:
        `list[int]`: an id for each marker.

    Raises:
        `ValueError`: if one is missing and the model has an adapter already.
    """
    missing = [token for token in markers if token not in processing_class.get_vocab()]
    if missing:
        if hasattr(model, "peft_config"):
            raise ValueError(
                f"`model` has an adapter, but its tokenizer has no {', '.join(missing)}. Pass the model without "
                "adapter and a `peft_config`, so that the tokens can be added to it before."
            )
        processing_class.add_tokens(missing, special_tokens=True)
        ids = processing_class.convert_tokens_to_ids(missing)
        num_rows = model.get_input_embeddings().num_embeddings
        if max(ids) >= num_rows:
            model.resize_token_embeddings(len(processing_class), mean_resizing=False)
        known = min(num_rows, min(ids))
        with torch.no_grad():
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight[ids] = table.weight[:known].mean(0)
    return processing_class.convert_tokens_to_ids(list(markers))


def train_markers(peft_config: PeftConfig, model: PreTrainedModel, ids: list[int]) -> PeftConfig:
    """
    `peft_config` with the embeddings of `ids` trained beside the adapter and saved with it.

    Raises:
        `ValueError`: if its kind of adapter cannot train them.
    """
    peft_config = copy.deepcopy(peft_config)
    embed_tokens = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embed_tokens).rpartition(".")[2]
    if name in (getattr(peft_config, "modules_to_save", None) or []):  # the whole table
        return peft_config
    if peft_config.is_prompt_learning or not hasattr(peft_config, "trainable_token_indices"):
        raise ValueError(
            f"`peft_config` must be one that can train embeddings of single tokens, such as `LoraConfig`, or name "
            f"{name!r} in `modules_to_save`, got {type(peft_config).__name__}: the model has to learn its markers."
        )
    trained = peft_config.trainable_token_indices or {}
    trained = dict(trained) if isinstance(trained, dict) else {name: trained}
    trained[name] = sorted({*trained.get(name, []), *ids})
    peft_config.trainable_token_indices = trained
    return peft_config


logger = get_logger(__name__)


def as_text(completion: str | list[dict[str, str]]) -> str:
    """A standard completion, or a conversational one of a single message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def check_worked_datasets(train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse datasets without rows. Their columns are checked when they are prepared."""
    for dataset, name in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset")):
        for split_name, split in splits(dataset, name).items():
            check_rows(split, split_name)


def with_worked_columns(
    dataset: Dataset | IterableDataset, dataset_name: str, num_stages: int
) -> Dataset | IterableDataset:
    """
    `dataset` with columns `"prompt"`, `"completion"` and `"answer"`, and with `"steps"` if a curriculum needs them.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `"prompt"` or `"question"`, `"completion"` or `"answer"`, and `"steps"`, a list of texts. A
            stream can be trained on without a curriculum; only its first rows are looked at.
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
                f"`{dataset_name}_dataset` has a 'completion' that is neither a text nor a list of one message with a "
                f"text as 'content', in row {index}: {str(completion)[:200]!r}."
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
                f"`{dataset_name}_dataset` has 'steps' that are no list of texts in row {index}, got "
                f"{str(steps)[:200]!r}. Give a list with a text for each step."
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
                f"Every row of `{dataset_name}_dataset` is longer than {described}. Shorten the rows, or raise the "
                "limit."
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
        indices = [*range(len(steps)), -1]
        tokenized["step_index"].append([p for p, piece in zip(indices, ids, strict=True) for _ in piece])
    return tokenized

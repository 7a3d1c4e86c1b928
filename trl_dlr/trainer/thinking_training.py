# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What all trainers of a language model that thinks by itself do alike: how it is loaded, and how it is saved."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from trl.trainer import grpo_trainer
from trl.trainer.utils import create_model_from_path

from ..models.hub import check_location, hub_name, readable_damage
from ..models.loading import reference_copy
from ..models.main_model import eval_mode
from ..models.thinking import Thinker, ThinkingConfig
from ..reasoners.thinking_reasoner import ThinkingReasoner
from .checkpoints import whole_files
from .hub import PushesMixin


class ThinkingTrainingMixin(PushesMixin):
    """
    For a TRL trainer with [`CheckpointsMixin`] of a causal LM that thinks as `self.thinker` lets it, or as
    `thinking_config` and `latent_type` say: checkpoints that are whole, and that say how the model thinks, and pushes.
    """

    thinker: Thinker

    @property
    def thinking_config(self) -> ThinkingConfig | None:
        """How the model thinks now. `None` while it does not."""
        return self.thinker.config

    @property
    def latent_type(self) -> str:
        return self.thinker.config.latent_type

    @contextmanager
    def answering(self) -> Iterator[ThinkingReasoner]:
        """The model as a reasoner, for as long as it answers. While it does not think, it is given one latent."""
        model = self.accelerator.unwrap_model(self.model)
        config = self.thinking_config or ThinkingConfig(
            self.latent_type, num_latents=1, max_completion_length=self.args.max_completion_length
        )
        with eval_mode(model):
            yield ThinkingReasoner(model, self.processing_class, config)

    @property
    def run_summary(self) -> dict[str, str]:
        """What a report says of the model."""
        config = self.thinking_config
        latents = "none yet" if config is None else f"{config.num_latents} {config.latent_type.replace('_', ' ')}"
        return {"Model": self.model.config.name_or_path or "built in memory", "Latents": latents}

    def _checkpoint_record(self) -> dict[str, Any]:
        record = super()._checkpoint_record()
        record["policy"] = {"latent_type": self.latent_type, **record["policy"]}
        return record

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        for config in getattr(self.accelerator.unwrap_model(self.model), "peft_config", {}).values():
            if os.path.isdir(config.base_model_name_or_path or ""):  # a path that holds anywhere on this machine
                config.base_model_name_or_path = os.path.abspath(config.base_model_name_or_path)
        with whole_files(output_dir or self.args.output_dir) as folder:
            super()._save(folder, state_dict)
            os.remove(os.path.join(folder, TRAINING_ARGS_NAME))  # a pickle
            if self.thinking_config is not None:
                self.thinking_config.save_pretrained(folder)
            self._saved_names = os.listdir(folder)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ):
        """As [`~trl.trainer.base_trainer._BaseTrainer.create_model_card`], without links to what is not on the Hub."""
        if not self.is_world_process_zero():
            return
        model_name = model_name or Path(self.args.output_dir).absolute().name
        super().create_model_card(model_name, hub_name(dataset_name) if "/" in (dataset_name or "") else None, tags)
        path = Path(self.args.output_dir, "README.md")
        card = path.read_text(encoding="utf-8").replace("[None](https://huggingface.co/None)", "a local model")
        path.write_text(card.replace('model="None"', f'model="{model_name}"'), encoding="utf-8")


def load_causal_lm(model: str, args: TrainingArguments, quantization_config: Any = None) -> PreTrainedModel:
    """A causal LM to train, loaded with TRL's defaults. TRL itself would read its configuration from elsewhere."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.num_processes > 1:
        kwargs["device_map"] = None
    check_location(model)
    with readable_damage(model):
        return create_model_from_path(model, AutoModelForCausalLM, **kwargs)


@contextmanager
def init_kwargs_were_used() -> Iterator[None]:
    """For a model of [`load_causal_lm`]: TRL would warn that it ignores `model_init_kwargs`."""
    logger = logging.getLogger("trl.trainer.grpo_trainer")

    def is_true(record: logging.LogRecord) -> bool:
        return "`model_init_kwargs` will be ignored" not in record.getMessage()

    logger.addFilter(is_true)
    try:
        yield
    finally:
        logger.removeFilter(is_true)


@contextmanager
def reference_is_a_copy(model: PreTrainedModel) -> Iterator[None]:
    """
    While a [`~trl.GRPOTrainer`] is built: its reference is `model` as it is. TRL would load one by the model's name,
    which one that was built in memory does not have, and which names other weights than those of one that was trained
    since.
    """
    load = grpo_trainer.create_model_from_path
    grpo_trainer.create_model_from_path = lambda *args, **kwargs: reference_copy(model)
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = load

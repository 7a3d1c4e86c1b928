# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from dataclasses import dataclass

from trl import SFTConfig

from ..option_docs import described
from .arguments import CurriculumArguments, ReportableArguments, refuse_options


# Around latents, and in the place of one. A tokenizer that does not have them is given them.
START_LATENT, LATENT, END_LATENT = MARKERS = "<|start-latent|>", "<|latent|>", "<|end-latent|>"
# TRL options that speak of sequences that are fixed. Here a stage makes them, from questions, steps and answers.
REFUSED_OPTIONS = {
    "packing": "the latents of every row are computed one after the other, in columns that all rows share",
    "eval_packing": "the latents of every row are computed one after the other, in columns that all rows share",
    "padding_free": "rows are padded such that their latents share columns",
    "assistant_only_loss": "the loss is on the steps that are left and the answer",
    "completion_only_loss": "the loss is on the steps that are left and the answer",
    "truncation_mode": "rows that are too long are left out, since a worked answer without its end has none",
    "pad_to_multiple_of": "rows are padded such that their latents share columns, without sequence parallelism",
    "eos_token": "an answer ends where the model's own decoding stops",
    "chat_template_path": "the tokenizer's own template renders the questions",
    "dataset_kwargs": "questions, steps and answers are tokenized apart",
}


@described
@dataclass
class CoconutSFTConfig(ReportableArguments, CurriculumArguments, SFTConfig):
    r"""
    Configuration class for the [`CoconutSFTTrainer`].

    This class includes only the parameters that are specific to Coconut, and those of [`~trl.SFTConfig`] and
    [`CurriculumArguments`] with other defaults. For a full list of training arguments, please refer to the
    [`~trl.SFTConfig`], [`~transformers.TrainingArguments`] and [`CurriculumArguments`] documentation.

    Parameters:
        > Parameters whose default values are overridden from SFTConfig

        learning_rate (`float`, *optional*, defaults to `1e-4`):
            The initial learning rate.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether to trade compute for memory. No KV cache can be kept then, so each latent takes a pass over all
            that is before it.
        max_length (`int` or `None`, *optional*, defaults to `1024`):
            Most tokens of a question with its latents and its whole worked answer. Rows with more are left out.

        > Parameters of the curriculum

        num_stages (`int`, *optional*, defaults to `3`):
            Number S of stages. In stage s, `latents_per_stage * s` latents stand for the first s steps; in the last,
            for all of them.
        max_latents (`int`, *optional*):
            Most latents of a stage. If `None`, `latents_per_stage * num_stages`. With c latents a stage, S = 4 and 3c
            latents at most, the last stage takes what is left of chains with more than 3 steps: the paper's schedule.
        cot_epochs (`int`, *optional*, defaults to `0`):
            Epochs of stage 0, before the first latent: plain supervised fine-tuning on all steps. Coconut begins with
            a model that was trained so.
        stage_mixing (`float`, *optional*, defaults to `0.4`):
            Probability with which an example is taken from a stage that is drawn uniformly from those up to the
            present one, stage 0 among them: what was learned before is kept.

        > Parameters of the evaluation

        max_completion_length (`int`, *optional*, defaults to `256`):
            Tokens written at most when held-out questions are answered.
    """

    learning_rate: float = 1e-4
    gradient_checkpointing: bool = False
    num_stages: int = 3
    max_latents: int | None = None
    cot_epochs: int = 0
    stage_mixing: float = 0.4
    max_completion_length: int = 256

    def __post_init__(self):
        super().__post_init__()
        refuse_options(self, REFUSED_OPTIONS, SFTConfig, "CoconutSFTTrainer")
        self.check_curriculum_arguments()
        for name, least in (("num_stages", 1), ("cot_epochs", 0), ("max_completion_length", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if self.max_latents is not None and self.max_latents < self.latents_per_stage:
            raise ValueError(
                f"`max_latents={self.max_latents}` must be at least `latents_per_stage={self.latents_per_stage}`, the "
                "latents of the first stage."
            )
        begins = self.cot_epochs + (self.num_stages - 1) * self.epochs_per_stage
        if self.max_steps <= 0 and self.num_train_epochs <= begins:
            raise ValueError(
                f"`num_train_epochs={self.num_train_epochs:g}` must be more than {begins}: the last of "
                f"`num_stages={self.num_stages}` stages begins after `cot_epochs` + (`num_stages` - 1) * "
                f"`epochs_per_stage` = {begins} epochs."
            )

    def latents_of(self, stage: int) -> int:
        """Latents of a row in `stage`."""
        num_latents = self.latents_per_stage * stage
        return num_latents if self.max_latents is None else min(num_latents, self.max_latents)

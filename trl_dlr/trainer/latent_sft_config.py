# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import math
from dataclasses import dataclass

from trl import SFTConfig

from ..option_docs import described
from .arguments import CurriculumArguments, LatentPolicyArguments, ReportableArguments, refuse_options


# TRL options that speak of a model whose own tokens are trained. Here the main model writes, and the policy is
# trained.
REFUSED_OPTIONS = {
    "packing": "every question has latents of its own",
    "eval_packing": "every question has latents of its own",
    "padding_free": "every question has latents of its own",
    "assistant_only_loss": "the loss is on the completion alone",
    "completion_only_loss": "the loss is on the completion alone",
    "truncation_mode": "rows that are too long are left out, since an answer without its end has none",
    "pad_to_multiple_of": "latents stand between question and answer, without sequence parallelism",
    "dataset_kwargs": "questions and answers are tokenized apart, each by the model that reads it",
    "eos_token": "the main model's own ends a completion",
    "chat_template_path": "the main model's own template renders its prompts",
    "activation_offloading": "the policy is small, and the main model is not trained",
}


@described
@dataclass
class LatentSFTConfig(ReportableArguments, CurriculumArguments, LatentPolicyArguments, SFTConfig):
    r"""
    Configuration class for the [`LatentSFTTrainer`].

    This class includes only the parameters that are specific to latent supervised fine-tuning, and those of
    [`~trl.SFTConfig`] with other defaults. For a full list of training arguments, please refer to the
    [`~trl.SFTConfig`], [`~transformers.TrainingArguments`], [`LatentPolicyArguments`] and [`CurriculumArguments`]
    documentation. With a curriculum, which needs a column `"steps"`, the policy has `num_stages * latents_per_stage`
    latents.

    Parameters:
        > Parameters whose default values are overridden from SFTConfig

        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Learning rate of the policy, which is small.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether to trade compute for memory, in the assistant and in the main model that the gradient passes.

        > Parameters of the latents

        mean_bound (`float`, *optional*, defaults to `1.0`):
            Root mean square of μ/σ up to which means cost nothing; the squared excess is added to the loss. Without a
            bound, samples of a question come to decode alike and leave reinforcement learning nothing to explore. 0
            switches it off. Soft tokens, which have no σ, have no bound.

        > Parameters of the evaluation

        max_completion_length (`int`, *optional*, defaults to `256`):
            Tokens that the main model writes at most when held-out questions are answered.
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + LatentPolicyArguments._DICT_FIELDS

    learning_rate: float = 1e-3
    gradient_checkpointing: bool = False
    mean_bound: float = 1.0
    max_completion_length: int = 256

    def __post_init__(self):
        super().__post_init__()
        refuse_options(self, REFUSED_OPTIONS, SFTConfig, "LatentSFTTrainer")
        self.check_policy_arguments()
        self.check_curriculum_arguments()
        if self.max_completion_length < 1:
            raise ValueError(f"`max_completion_length` must be at least 1, got {self.max_completion_length}.")
        if not (self.mean_bound >= 0 and math.isfinite(self.mean_bound)):
            raise ValueError(f"`mean_bound` must be a number of at least 0, got {self.mean_bound}.")
        if self.num_stages > 0 and self.num_latents != self.num_stages * self.latents_per_stage:
            raise ValueError(
                f"`num_latents={self.num_latents}` must be `num_stages * latents_per_stage` = {self.num_stages} * "
                f"{self.latents_per_stage} = {self.num_stages * self.latents_per_stage}, the latents of the last "
                "stage."
            )

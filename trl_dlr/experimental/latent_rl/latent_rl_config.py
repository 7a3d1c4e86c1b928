# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import math
from dataclasses import dataclass, field

from trl import GRPOConfig

from ...models.thinking import LATENT_TYPES
from ...option_docs import described
from ...trainer.arguments import refuse_options
from ...trainer.soft_token_grpo_config import SoftTokenGRPOConfig


NO_POLICY_GRADIENT = "the loss is the value head's score of the latents, without ratios, advantages or a reference"
# Options of the trainers that this one takes its rollouts from
REFUSED_SOFT_TOKEN_OPTIONS = dict.fromkeys(("invalid_samples", "first_latent_selection"), NO_POLICY_GRADIENT)
REFUSED_SOFT_TOKEN_OPTIONS["max_redraws"] = "accuracy, and the labels of the value head, are of all groups"
REFUSED_SOFT_TOKEN_OPTIONS["stop_at_end_marker"] = "the score is a mean over a fixed number of latents"
REFUSED_GRPO_OPTIONS = dict.fromkeys(
    (
        "beta",
        "epsilon",
        "epsilon_high",
        "delta",
        "loss_type",
        "importance_sampling_level",
        "top_entropy_quantile",
        "entropy_coef",
        "use_adaptive_entropy",
        "off_policy_mask_threshold",
        "mask_truncated_completions",
        "router_aux_loss_coef",
    ),
    NO_POLICY_GRADIENT,
)


@described
@dataclass
class LatentRLConfig(SoftTokenGRPOConfig):
    r"""
    Configuration class for the [`LatentRLTrainer`].

    This class includes only the parameters that are specific to latent RL, and those of [`SoftTokenGRPOConfig`] with
    other defaults. For a full list of training arguments, please refer to the [`SoftTokenGRPOConfig`],
    [`~trl.GRPOConfig`] and [`~transformers.TrainingArguments`] documentation. Answers are sampled;
    `generation_kwargs={"do_sample": False}` decodes them greedily. The schedule of `learning_rate` counts the steps of
    both phases. The best checkpoint is the one with the best `value/accuracy`, unless `metric_for_best_model` says
    otherwise: the loss is another one in each phase.

    Parameters:
        > Parameters whose default values are overridden from SoftTokenGRPOConfig

        latent_type (`str`, *optional*, defaults to `"hidden_states"`):
            What a latent is. The only one that gradient passes through is `"hidden_states"`.
        num_generations (`int`, *optional*, defaults to `2`):
            Answers to each question. Its latents are not drawn and are the same for all, so the least that TRL
            permits.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Schedule of `learning_rate`.

        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether to trade compute for memory. No KV cache can be kept then, so each latent takes a pass over all
            that is before it.

        > Parameters of the value head

        value_warmup_steps (`int`, *optional*, defaults to `100`):
            Steps of the first phase, in which only the value head learns. In all steps after them only the language
            model does.
        value_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Learning rate of the value head.
        pos_weight (`float`, *optional*, defaults to `20.0`):
            Weight of correct answers in the value head's loss, against wrong ones, for models that are seldom right.
            At values other than 1, the score is no calibrated probability, and near 1 for models that are often right.

        > Parameters of the stop at reward hacking

        hacking_window (`int`, *optional*, defaults to `10`):
            Rollouts over which predicted accuracy and accuracy are averaged; 0 switches the stop off.
        hacking_threshold (`float`, *optional*, defaults to `0.1`):
            The run stops if the value head predicts an accuracy for the latest rollouts that is higher by more than
            this than before the language model's first update, and their accuracy is not higher.
    """

    latent_type: str = field(default="hidden_states", metadata={"choices": ["hidden_states"]})
    num_generations: int = 2
    lr_scheduler_type: str = "constant"
    gradient_checkpointing: bool = False
    value_warmup_steps: int = 100
    value_learning_rate: float = 1e-3
    pos_weight: float = 20.0
    hacking_window: int = 10
    hacking_threshold: float = 0.1

    def __post_init__(self):
        if self.latent_type != "hidden_states" and self.latent_type in LATENT_TYPES:
            raise ValueError(
                f"`latent_type` must be 'hidden_states' for `LatentRLTrainer`, got {self.latent_type!r}: the gradient "
                "of the score passes through the latents, which are the model's own hidden states."
            )
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "value/accuracy"  # the loss is another one in each phase
        refuse_options(self, REFUSED_SOFT_TOKEN_OPTIONS, SoftTokenGRPOConfig, "LatentRLTrainer")
        refuse_options(self, REFUSED_GRPO_OPTIONS, GRPOConfig, "LatentRLTrainer")
        super().__post_init__()
        if self.fp16:
            raise ValueError(
                "`fp16=True` scales gradients, and the value head's phase has none for the language model. Use `bf16`."
            )
        if self.value_warmup_steps < 1:
            raise ValueError(
                f"`value_warmup_steps` must be at least 1, got {self.value_warmup_steps}: a head that has not learned "
                "has nothing to say."
            )
        for name in ("value_learning_rate", "pos_weight"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"`{name}` must be a positive number, got {getattr(self, name)}.")
        for name in ("hacking_window", "hacking_threshold"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"`{name}` must be a number of at least 0, got {getattr(self, name)}.")

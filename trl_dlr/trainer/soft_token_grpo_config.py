# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import math
from dataclasses import dataclass, field, fields

from trl import GRPOConfig

from ..generation.engine import check_generation_kwargs
from ..generation.transformers_engine import GENERATION_FIELDS, SAMPLING_FIELDS
from ..models.soft_tokens import SOFT_TOKEN_SCORES
from ..models.thinking import LATENT_TYPES, ThinkingConfig, ThinkingOptions
from ..option_docs import described
from .arguments import GroupArguments, RemedyArguments, ReportableArguments, refuse_options


# TRL options that generate from token ids alone
REFUSED_OPTIONS = {
    "use_vllm": "latents are fed back as embeddings, step by step, which vLLM cannot do",
    "use_transformers_continuous_batching": "it generates from token ids, not from embeddings",
    "vllm_enable_sleep_mode": "there is no vLLM",
    "sync_ref_model": "the KL is to the model that the run began with; checkpoints hold no other",
}


@described
@dataclass
class SoftTokenGRPOConfig(ReportableArguments, GroupArguments, RemedyArguments, ThinkingOptions, GRPOConfig):
    r"""
    Configuration class for the [`SoftTokenGRPOTrainer`].

    This class includes only the parameters that are specific to it, and those of [`~trl.GRPOConfig`] with other
    defaults. For a full list of training arguments, please refer to the [`ThinkingOptions`], [`GroupArguments`],
    [`RemedyArguments`], [`~trl.GRPOConfig`] and [`~transformers.TrainingArguments`] documentation.
    `max_completion_length` is the token budget of the answer, which the latents do not count for. `temperature`,
    `top_p`, `top_k`, `min_p` and `repetition_penalty` are those of the answer's tokens.

    The published recipes are `examples/configs/lepo.yaml` ([2604.17892](https://huggingface.co/papers/2604.17892)) and
    `examples/configs/latent_grpo.yaml` ([2604.27998](https://huggingface.co/papers/2604.27998)).

    Parameters:
        > Parameters whose default values are overridden from GRPOConfig

        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout. With dropout, unchanged weights would not give a ratio of 1.

        > Parameters of the model

        freeze_embeddings (`bool`, *optional*, defaults to `False`):
            Whether input embeddings and LM head stay as they are, as in Latent-GRPO's release.

        > Parameters of the loss

        soft_token_score (`str`, *optional*, defaults to `"lepo"`):
            What stands for the log-probability of a soft token. `"exact"`: the Gumbel-softmax density over the whole
            vocabulary. `"lepo"`: LEPO's surrogate, whose gradient is taken without a ratio. `"latent_grpo"`:
            Latent-GRPO's surrogate.
        end_marker_in_loss (`bool`, *optional*, defaults to `False`):
            Whether the first token of `end_marker` is scored as any other token where the model has ended its thought
            with it, as in Latent-GRPO's release. It is the likeliest token there, not a draw.

        > Parameters of the rollout

        max_redraws (`int`, *optional*, defaults to `0`):
            Times at most that groups whose rewards are all alike are drawn anew, as in Latent-GRPO. `redrawn_groups` is
            logged, the number of groups that were, in units of those of a rollout. Metrics of completions are of all
            that were drawn.
    """

    disable_dropout: bool = True
    soft_token_score: str = field(default="lepo", metadata={"choices": list(SOFT_TOKEN_SCORES)})
    freeze_embeddings: bool = False
    end_marker_in_loss: bool = False
    max_redraws: int = 0

    def __post_init__(self):
        super().__post_init__()
        refuse_options(self, REFUSED_OPTIONS, GRPOConfig, "SoftTokenGRPOTrainer")
        self.check_remedies()
        if self.end_marker_in_loss and not self.stop_at_end_marker:
            raise ValueError(
                "`end_marker_in_loss=True` needs `stop_at_end_marker=True`, got False: no marker is the model's own choice."
            )
        if self.invalid_samples != "keep" and not self.stop_at_end_marker:
            raise ValueError(
                f"`invalid_samples={self.invalid_samples!r}` needs `stop_at_end_marker=True`, got False: invalid are "
                "samples whose thought had to be ended."
            )
        if self.max_redraws < 0:
            raise ValueError(f"`max_redraws` must be at least 0, got {self.max_redraws}.")
        num_rows = self.per_device_train_batch_size * self.steps_per_generation
        if self.max_redraws > 0 and num_rows % self.num_generations != 0:
            raise ValueError(
                f"`max_redraws={self.max_redraws}` draws whole groups anew, so `per_device_train_batch_size` * "
                f"`steps_per_generation`, got {num_rows}, must be a multiple of "
                f"`num_generations={self.num_generations}`."
            )
        for name in ("temperature", "repetition_penalty"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"`{name}` must be a positive number, got {getattr(self, name)}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"`min_p` must be between 0 and 1 or unset, got {self.min_p}.")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must be at least 0 (which keeps all), got {self.top_k}.")
        fields_here = set(SAMPLING_FIELDS) & self.__dataclass_fields__.keys() | {"repetition_penalty"}
        check_generation_kwargs(
            self.generation_kwargs or {},
            {name: kind for name, kind in GENERATION_FIELDS.items() if name not in fields_here},
            "`GenerationConfig` that the configuration does not have itself",
            self.max_completion_length,
        )
        self.check_thinking()
        if self.soft_token_score not in SOFT_TOKEN_SCORES:
            raise ValueError(
                f"`soft_token_score` must be one of {', '.join(SOFT_TOKEN_SCORES)}, got {self.soft_token_score!r}."
            )
        if not LATENT_TYPES[self.latent_type].is_scored:
            if self.first_latent_selection:
                raise ValueError(
                    f"`first_latent_selection=True` has no meaning for `latent_type={self.latent_type!r}`: those latents "
                    "are not drawn, so they have no advantages. Leave it at False."
                )
            if self.soft_token_score != (default := self.__dataclass_fields__["soft_token_score"].default):
                raise ValueError(
                    f"`soft_token_score={self.soft_token_score!r}` has no meaning for "
                    f"`latent_type={self.latent_type!r}`: those latents are not drawn. Leave it at {default!r}."
                )
            return
        if self.soft_token_score == "exact":
            whole = {"noise_scale": 1.0, "one_sided_noise": False, "latent_top_k": None}
            whole |= {"latent_top_p": 1.0, "mixture_size": None}
            for name, value in whole.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"`soft_token_score='exact'` is the density of the whole Gumbel-softmax vector, so `{name}` "
                        f"must be {value}, got {getattr(self, name)}. Take 'lepo' or 'latent_grpo', which are "
                        "surrogates."
                    )
        if self.one_sided_noise and self.soft_token_score != "latent_grpo":
            raise ValueError(
                f"`one_sided_noise=True` is Latent-GRPO's, with `soft_token_score='latent_grpo'`, got "
                f"{self.soft_token_score!r}. Leave it at False."
            )
        if self.soft_token_score == "lepo" and self.beta != 0:
            raise ValueError(
                f"`beta={self.beta}` with `soft_token_score='lepo'`: its latents have no ratio, so TRL's estimate of "
                "the KL does not apply to them. Set `beta` to 0, as the paper does, or take another score."
            )

    def thinking_config(self) -> ThinkingConfig:
        """The fields that say how the model thinks."""
        return ThinkingConfig(
            **{field.name: getattr(self, field.name) for field in fields(ThinkingOptions)},
            chat_template_kwargs=self.chat_template_kwargs,
            max_completion_length=self.max_completion_length,
        )

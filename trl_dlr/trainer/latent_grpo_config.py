# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import math
from dataclasses import dataclass, field

from trl import GRPOConfig

from ..option_docs import described
from .arguments import (
    GroupArguments,
    LatentPolicyArguments,
    RemedyArguments,
    ReportableArguments,
    check_group_advantages,
    refuse_options,
)
from .losses import CONTRASTIVE_SIMILARITIES


# TRL options that speak of a policy that writes tokens. Ours draws latents, and the main model's tokens are not
# trained.
REFUSED_OPTIONS = {
    "use_transformers_continuous_batching": "it generates from token ids, not from embeddings",
    "vllm_enable_sleep_mode": "the main model's weights never change, and waking would load them again",
    "vllm_structured_outputs_regex": "what vLLM should be told goes into `generation_kwargs`",
    "cast_lm_head_to_fp32": "the latent policy has no LM head; its densities are float32 already",
    "router_aux_loss_coef": "the latent policy has no LM loss to balance",
    "top_entropy_quantile": "it masks tokens by their entropy; a Gaussian's says nothing of its step",
    "temperature": "the main model decodes greedily; exploration is the latents' standard deviation, `sigma`",
    "top_p": "the main model decodes greedily",
    "top_k": "the main model decodes greedily",
    "min_p": "the main model decodes greedily",
    "repetition_penalty": "the main model decodes greedily; what its tokens should be kept from goes into `generation_kwargs`",
    "cache_implementation": "a question's cache is repeated for its trajectories, which takes a dynamic one",
    "transformers_continuous_batching_config": "it generates from token ids, not from embeddings",
    "sync_ref_model": "the KL is to the policy that the run began with; checkpoints hold no other",
    "use_bias_correction_kl": "the KL has a closed form, which has no bias",
    "vllm_importance_sampling_cap": "no token is trained on, so none is weighed",
    "vllm_importance_sampling_clip_min": "no token is trained on, so none is weighed",
    "vllm_importance_sampling_clip_max": "no token is trained on, so none is weighed",
    "vllm_importance_sampling_mode": "no token is trained on, so none is weighed",
}
SELECTIONS = ("top_random", "top_bottom", "top", "random")


@described
@dataclass
class LatentGRPOConfig(ReportableArguments, GroupArguments, LatentPolicyArguments, RemedyArguments, GRPOConfig):
    r"""
    Configuration class for the [`LatentGRPOTrainer`].

    This class includes only the parameters that are specific to latent GRPO training, and those of [`~trl.GRPOConfig`]
    with other defaults. For a full list of training arguments, please refer to the [`LatentPolicyArguments`],
    [`GroupArguments`], [`RemedyArguments`], [`~trl.GRPOConfig`] and [`~transformers.TrainingArguments`] documentation.
    `max_completion_length` is the main model's token budget per completion, `num_generations` is the number G of
    latent trajectories per question, and `beta` weighs the closed-form KL of the latents' densities. `use_vllm` decodes
    the frozen main model with vLLM, in process (`vllm_mode="colocate"`) or by a stock server (`vllm_mode="server"`,
    started with `vllm serve <main model> --enable-prompt-embeds`), which any number of runs can share, as its weights
    are never updated. `generation_kwargs` are then fields of `vllm.SamplingParams`.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters whose default values are overridden from GRPOConfig

        learning_rate (`float`, *optional*, defaults to `3e-4`):
            Learning rate of the assistant.
        per_device_train_batch_size (`int`, *optional*, defaults to `64`):
            Trajectories per device and step. A trajectory is a few latents: they are cheap.
        num_generations (`int`, *optional*, defaults to `16`):
            Number G of latent trajectories per question. Must divide the global batch.
        num_iterations (`int`, *optional*, defaults to `4`):
            Passes over each rollout. Nothing is decoded again, so they are cheap.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout. With dropout, unchanged weights would not give a ratio of 1.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether to trade compute for memory in the assistant, which is small by design.

        > Parameters of the frozen main model

        decoding_batch_size (`int`, *optional*):
            Trajectories that transformers decodes together at most, to bound the memory of their KV cache. If `None`,
            all of a rollout. vLLM has its own limits.

        > Parameters of the pre-screening, which decides what the main model decodes

        prescreening_fraction (`float`, *optional*, defaults to `1.0`):
            Share ρ of each question's G trajectories that are decoded, K = ⌈ρG⌉ (equation 13; the paper's is 0.18).
            The others have no reward and are outside the group's statistics and the loss. Evaluation decodes all.
        prescreening_selection (`str`, *optional*, defaults to `"top_random"`):
            Which K are decoded, by the scores of a value head that learns online from decoded rewards: `"top"` (the
            best), `"top_random"` (the best, and a random share), `"top_bottom"` (the best and the worst in equal
            parts, and a random share: groups stay mixed once most answers are right) or `"random"`.
        prescreening_warmup_rollouts (`int`, *optional*, defaults to `20`):
            Rollouts at the start that are decoded whole, for the value head to learn from.

        > Parameters of the loss

        beta (`float`, *optional*, defaults to `0.0`):
            Weight β of the closed-form KL to the frozen reference policy (equation 7). At 0, TRL's default, no
            reference is kept; the paper uses 0.01.
        latent_cost (`float`, *optional*, defaults to `0.0`):
            With `learn_stop`, what each latent step takes off a trajectory's total reward before advantages are
            computed, so that the shorter of two equally right trajectories is preferred. It shapes the reward: the
            rewards that are logged are without it.
        gamma (`float`, *optional*, defaults to `0.0`):
            Weight γ of the contrastive loss (equation 6).
        hybrid_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the hybrid term: the advantage-weighted mean log-likelihood of each decoded completion under the
            main model, through reparameterized latents. It costs a pass forward and back through the main model, and
            is what trains an up-projection (`injection="trained"`) in reinforcement learning.
        contrastive_similarity (`str`, *optional*, defaults to `"cosine"`):
            `"dot"` (equation 8 as printed), `"cosine"`, `"infonce"` or `"margin"`. See [`contrastive_loss`].

        > Parameters that keep a run healthy

        exploration_check_prompts (`int`, *optional*, defaults to `8`):
            Number of training prompts on which the share of groups with differing rewards is measured before training;
            0 skips the check.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + LatentPolicyArguments._DICT_FIELDS

    # Defaults that differ from GRPOConfig: an assistant that is small, and rollouts that are used more than once
    learning_rate: float = 3e-4
    per_device_train_batch_size: int = 64
    num_generations: int = 16
    num_iterations: int = 4
    disable_dropout: bool = True
    gradient_checkpointing: bool = False

    # Main model
    decoding_batch_size: int | None = None

    # Pre-screening
    prescreening_fraction: float = 1.0
    prescreening_selection: str = field(default="top_random", metadata={"choices": list(SELECTIONS)})
    prescreening_warmup_rollouts: int = 20

    # Loss
    latent_cost: float = 0.0
    gamma: float = 0.0
    hybrid_coef: float = 0.0
    contrastive_similarity: str = field(default="cosine", metadata={"choices": list(CONTRASTIVE_SIMILARITIES)})

    # Health
    exploration_check_prompts: int = 8

    def __post_init__(self):
        super().__post_init__()
        refuse_options(self, REFUSED_OPTIONS, GRPOConfig, "LatentGRPOTrainer")
        self.check_policy_arguments()
        self.check_remedies()
        if self.hybrid_coef > 0 and self.use_vllm:
            raise ValueError(
                f"`hybrid_coef={self.hybrid_coef}` needs gradients through the main model, which `use_vllm=True` "
                "leaves to vLLM. Set either."
            )
        if self.decoding_batch_size is not None and self.decoding_batch_size < 1:
            raise ValueError(f"`decoding_batch_size` must be at least 1 or unset, got {self.decoding_batch_size}.")
        if not 0 < self.prescreening_fraction <= 1:
            raise ValueError(
                "`prescreening_fraction` must be above 0 and at most 1 (which decodes all), got "
                f"{self.prescreening_fraction}."
            )
        if self.prescreening_fraction < 1 and self.num_decoded < 2:
            raise ValueError(
                f"`prescreening_fraction={self.prescreening_fraction}` decodes {self.num_decoded} of "
                f"`num_generations={self.num_generations}` trajectories of a question, which have nothing to be "
                "compared with. Raise either so that at least 2 are decoded."
            )
        if self.latent_cost > 0:
            check_group_advantages(self, f"`latent_cost={self.latent_cost}` is compared within a group")
        at_least_0 = (
            "beta",
            "latent_cost",
            "gamma",
            "hybrid_coef",
            "exploration_check_prompts",
            "prescreening_warmup_rollouts",
        )
        for name in at_least_0:
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"`{name}` must be a number of at least 0, got {getattr(self, name)}.")
        for name in ("prescreening_selection", "contrastive_similarity"):
            choices = self.__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        needed = {  # what an option means nothing without
            "prescreening_selection": ("`prescreening_fraction` below 1", self.prescreening_fraction < 1),
            "contrastive_similarity": ("`gamma` above 0", self.gamma > 0),
            "decoding_batch_size": ("`use_vllm=False`, since vLLM makes its own batches", not self.use_vllm),
        }
        for name, (what, is_there) in needed.items():
            default = LatentGRPOConfig.__dataclass_fields__[name].default
            if not is_there and getattr(self, name) != default:
                raise ValueError(f"`{name}={getattr(self, name)!r}` needs {what}. Leave it at {default!r}.")

    @property
    def num_decoded(self) -> int:
        """Number K = ⌈ρG⌉ of a question's trajectories that are decoded (equation 13)."""
        # A float product a hair above a whole number is that number: 0.07 * 100 is 7
        return math.ceil(round(self.prescreening_fraction * self.num_generations, 9))

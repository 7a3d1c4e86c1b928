# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..models import LatentPolicyConfig
from ..models.latent_policy_config import DENSITIES
from ..models.soft_tokens import SOFT_TOKEN_SCORES


@dataclass
class LatentPolicyArguments:
    r"""
    What the configurations of all trainers of a [`LatentPolicyModel`] have in common.

    Parameters:
        > Parameters of the latent policy, used when `model` is an assistant rather than a [`LatentPolicyModel`]

        latent_density (`str`, *optional*, defaults to `"gaussian"`):
            What a latent is: `"gaussian"`, a vector with a Gaussian density, or `"soft_tokens"`, a mixture of the main
            model's tokens.
        latent_dim (`int`, *optional*, defaults to `16`):
            Size d of a Gaussian latent.
        num_latents (`int`, *optional*, defaults to `4`):
            Number T of latent steps per trajectory, at most T if `learn_stop`.
        learn_stop (`bool`, *optional*, defaults to `False`):
            Whether the policy decides after each latent step if it is the last. [`LatentSFTTrainer`] always takes all
            steps, and does not train the decision.
        min_latents (`int`, *optional*, defaults to `1`):
            Steps that are always taken if `learn_stop`.
        initial_stop_prob (`float`, *optional*, defaults to `0.05`):
            Probability of a stop at each step that is free to, before training, if `learn_stop`.
        latent_sampling (`str`, *optional*, defaults to `"autoregressive"`):
            `"autoregressive"` (each latent is fed back, the paper's) or `"parallel"` (learned queries, one pass).
        sigma (`float`, *optional*, defaults to `1.0`):
            Standard deviation of a latent.
        learn_sigma (`bool`, *optional*, defaults to `False`):
            Whether `sigma` is trained, one value per dimension.
        normalize_mean (`bool`, *optional*, defaults to `False`):
            Whether means are scaled to unit root mean square.
        soft_token_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature τ of a soft token's mixture.
        soft_token_score (`str`, *optional*, defaults to `"lepo"`):
            What stands for a soft token's log-probability: `"exact"` (the Gumbel-softmax density), or a surrogate,
            `"lepo"` or `"latent_grpo"`.
        one_sided_noise (`bool`, *optional*, defaults to `False`):
            Whether Gumbel noise is clamped and shifted to be at least 0, for `"latent_grpo"`.
        latent_top_k (`int`, *optional*):
            Most likely tokens that are candidates of a soft token. If `None`, all.
        latent_top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass that the candidates must have.
        mixture_size (`int`, *optional*):
            Number K of candidates that are mixed, those with the highest perturbed log-probabilities. If `None`, all.
        injection (`str`, *optional*, defaults to `"anchors"`):
            `"anchors"` (offsets from the embeddings of `anchor_text`), `"components"` (principal components of the main
            model's embedding table) or `"trained"` (a parameter, which a pure policy gradient does not reach).
        injection_scale (`float`, *optional*, defaults to `0.3`):
            Size of the latents' share of an embedding, in units of the main model's measured embedding RMS.
        anchor_text (`str`, *optional*, defaults to `"Answer: "`):
            Text whose tokens, in turn, are the anchors.
        freeze_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the assistant's input embeddings stay as they are.

        > Parameters of the frozen main model

        main_model_init_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`], used when `main_model` is a
            string. If `dtype` is not given, the checkpoint's own is used. `revision`, `token`, `cache_dir` and the like
            are used for its tokenizer as well, as those of `model_init_kwargs` are for the assistant's.
        allow_main_model_mismatch (`bool`, *optional*, defaults to `False`):
            Whether to go on, with a warning, when the policy was built for a main model with other weights.

        > Parameters of the prompts

        chat_template_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments for both chat templates, such as `{"enable_thinking": False}`. They are kept in the
            policy's configuration, and a [`LatentReasoner`] uses them. If `None`, those that the policy has.

        > Parameters of the optimization

        projection_learning_rate (`float`, *optional*):
            Learning rate of the projection layers: all that is not the assistant. If `None`, `learning_rate`.
        projection_max_grad_norm (`float`, *optional*):
            Gradient norm to which the projection layers are clipped on their own. If `None`, `max_grad_norm`.
    """

    _DICT_FIELDS: ClassVar[list[str]] = ["main_model_init_kwargs", "chat_template_kwargs"]

    # Latent policy
    latent_density: str = field(
        default="gaussian",
        metadata={
            "help": "What a latent is: 'gaussian' (a vector) or 'soft_tokens' (a mixture of the main model's tokens).",
            "choices": list(DENSITIES),
        },
    )
    latent_dim: int = field(default=16, metadata={"help": "Size d of a Gaussian latent."})
    num_latents: int = field(default=4, metadata={"help": "Number T of latent steps per trajectory."})
    learn_stop: bool = field(
        default=False, metadata={"help": "Whether the policy decides after each latent step if it is the last."}
    )
    min_latents: int = field(default=1, metadata={"help": "Steps that are always taken if `learn_stop`."})
    initial_stop_prob: float = field(
        default=0.05, metadata={"help": "Probability of a stop at each step that is free to, before training."}
    )
    latent_sampling: str = field(
        default="autoregressive",
        metadata={
            "help": "How latents are drawn: 'autoregressive' feeds each one back, 'parallel' draws all in one pass.",
            "choices": ["autoregressive", "parallel"],
        },
    )
    sigma: float = field(default=1.0, metadata={"help": "Standard deviation of a latent."})
    learn_sigma: bool = field(default=False, metadata={"help": "Whether sigma is trained, one value per dimension."})
    normalize_mean: bool = field(
        default=False, metadata={"help": "Whether means are scaled to unit root mean square, which bounds them."}
    )
    soft_token_temperature: float = field(default=1.0, metadata={"help": "Temperature of a soft token's mixture."})
    soft_token_score: str = field(
        default="lepo",
        metadata={
            "help": "Log-probability of a soft token: 'exact' (density), or the surrogates 'lepo' and 'latent_grpo'.",
            "choices": list(SOFT_TOKEN_SCORES),
        },
    )
    one_sided_noise: bool = field(
        default=False, metadata={"help": "Whether Gumbel noise is clamped and shifted to be at least 0."}
    )
    latent_top_k: int | None = field(
        default=None, metadata={"help": "Most likely tokens that are candidates of a soft token. If unset, all."}
    )
    latent_top_p: float = field(default=1.0, metadata={"help": "Probability mass of a soft token's candidates."})
    mixture_size: int | None = field(
        default=None, metadata={"help": "Candidates that are mixed, the best perturbed ones. If unset, all."}
    )
    injection: str = field(
        default="anchors",
        metadata={
            "help": "How latents become embeddings of the main model: 'anchors' (offsets from anchor tokens), "
            "'components' (principal components of its embedding table) or 'trained' (a parameter).",
            "choices": ["anchors", "components", "trained"],
        },
    )
    injection_scale: float = field(
        default=0.3, metadata={"help": "Size of the latents' share of an embedding, relative to the embeddings' RMS."}
    )
    anchor_text: str = field(default="Answer: ", metadata={"help": "Text whose tokens, in turn, are the anchors."})
    freeze_embeddings: bool = field(
        default=False, metadata={"help": "Whether the assistant's input embeddings stay as they are."}
    )

    # Main model
    main_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for loading the main model when `main_model` is a string."},
    )
    allow_main_model_mismatch: bool = field(
        default=False,
        metadata={"help": "Whether to go on when the policy was built for a main model with other weights."},
    )

    # Prompts
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for both chat templates. If unset, those that the policy has."},
    )

    # Optimization
    projection_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projection layers. If unset, `learning_rate`."}
    )
    projection_max_grad_norm: float | None = field(
        default=None, metadata={"help": "Norm to which the projection layers' gradients are clipped on their own."}
    )

    def check_policy_arguments(self) -> None:
        for name in ("latent_density", "latent_sampling", "injection"):
            choices = self.__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        LatentPolicyConfig(**self.policy_kwargs())  # which checks the others
        for name in ("projection_learning_rate", "projection_max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be a number of at least 0, got {value}.")

    def check_policy(self, config: LatentPolicyConfig) -> None:
        """Refuse fields that were set to other values than a given policy has: they are the policy's."""
        own_names = {"density": "latent_density", "sampling": "latent_sampling"}
        for name, value in self.policy_kwargs().items():
            own_name = own_names.get(name, name)
            if own_name in self._set_fields and value != getattr(config, name):
                raise ValueError(
                    f"`{own_name}={value!r}` is of a new policy, but the one given as `model` has {getattr(config, name)!r}. "
                    f"Leave `{own_name}` unset, or give an assistant as `model`."
                )

    def policy_kwargs(self) -> dict[str, Any]:
        """Fields of [`LatentPolicyConfig`] that this configuration sets."""
        names = ("latent_dim", "num_latents", "anchor_text", "freeze_embeddings")
        names += ("learn_stop", "min_latents", "initial_stop_prob", *itertools.chain(*DENSITIES.values()))
        own = {"density": self.latent_density, "sampling": self.latent_sampling}
        return own | {name: getattr(self, name) for name in names}

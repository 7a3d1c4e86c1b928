# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Configuration of a latent policy: its fields, and which of them go together."""

import math
from dataclasses import dataclass, field

from transformers import AutoConfig, PreTrainedConfig

from ..field_types import check_field_types
from ..option_docs import described
from .injection import INJECTIONS
from .soft_tokens import SOFT_TOKEN_SCORES, SoftTokenOptions


# Fields of a configuration that one density has and the others do not
DENSITIES = {
    "gaussian": ("sigma", "learn_sigma", "state_sigma", "injection", "injection_scale"),
    "soft_tokens": (
        "soft_token_temperature",
        "soft_token_score",
        "one_sided_noise",
        "latent_top_k",
        "latent_top_p",
        "mixture_size",
    ),
}


@described
@dataclass
class LatentOptions(SoftTokenOptions):
    r"""
    What a latent policy is: fields of its [`LatentPolicyConfig`], and of the configurations of the trainers that build
    one.

    Parameters:
        latent_density (`str`, *optional*, defaults to `"gaussian"`):
            What a latent is: `"gaussian"`, a vector with a Gaussian density ([`DiagonalGaussian`]), or
            `"soft_tokens"`, a mixture of the main model's tokens ([`SoftTokens`]).
        latent_dim (`int`, *optional*, defaults to `16`):
            Size d of a Gaussian latent. Small is what pure RL can train; larger needs a supervised start. Of soft
            tokens it is the main model's vocabulary, whatever is given.
        num_latents (`int`, *optional*, defaults to `4`):
            Number T of latent steps per trajectory, at most T if `learn_stop`.
        learn_stop (`bool`, *optional*, defaults to `False`):
            Whether the policy decides after each latent step if it is the last, by a Bernoulli draw given the same
            state as the step's latent. The decision is part of the action and of its density. [`LatentSFTTrainer`]
            always takes all steps, and does not train the decision.
        min_latents (`int`, *optional*, defaults to `1`):
            Steps that are always taken if `learn_stop`.
        initial_stop_prob (`float`, *optional*, defaults to `0.05`):
            Probability of a stop at each step that is free to, before training, if `learn_stop`.
        latent_sampling (`str`, *optional*, defaults to `"autoregressive"`):
            `"autoregressive"`: each latent is fed back before the next is drawn (the paper's). `"parallel"`: T learned
            query vectors after the question, all latents in one pass.
        sigma (`float`, *optional*, defaults to `1.0`):
            Standard deviation σ of a Gaussian latent (its initial value if `learn_sigma`).
        learn_sigma (`bool`, *optional*, defaults to `False`):
            Whether σ is trained, one value per dimension.
        state_sigma (`bool`, *optional*, defaults to `False`):
            Whether σ depends on the state that a latent's mean comes from, as in GTS
            ([2602.14077](https://huggingface.co/papers/2602.14077)): log σ plus a linear map of it, which is 0 before
            training.
        soft_token_score (`str`, *optional*, defaults to `"lepo"`):
            What stands for a soft token's log-probability: `"exact"` (the Gumbel-softmax density), or the surrogates
            of the papers, `"lepo"` and `"latent_grpo"`.
        injection (`str`, *optional*, defaults to `"anchors"`):
            How Gaussian latents become embeddings of the main model, see [`LatentInjector`]: `"anchors"` (offsets from
            the embeddings of `anchor_text`), `"components"` (principal components of the main model's embedding table)
            or `"trained"` (a parameter, which a pure policy gradient does not reach).
        injection_scale (`float`, *optional*, defaults to `0.3`):
            Size of the latents' share of an embedding, in units of the main model's measured embedding RMS.
        anchor_text (`str`, *optional*, defaults to `"Answer: "`):
            Text whose tokens, in turn, are the anchors.
        freeze_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the assistant's input embeddings stay as they are.
    """

    latent_density: str = field(default="gaussian", metadata={"choices": list(DENSITIES)})
    latent_dim: int = 16
    num_latents: int = 4
    learn_stop: bool = False
    min_latents: int = 1
    initial_stop_prob: float = 0.05
    latent_sampling: str = field(default="autoregressive", metadata={"choices": ["autoregressive", "parallel"]})
    sigma: float = 1.0
    learn_sigma: bool = False
    state_sigma: bool = False
    soft_token_score: str = field(default="lepo", metadata={"choices": list(SOFT_TOKEN_SCORES)})
    injection: str = field(default="anchors", metadata={"choices": list(INJECTIONS)})
    injection_scale: float = 0.3
    anchor_text: str = "Answer: "
    freeze_embeddings: bool = False

    def check_latents(self) -> None:
        """Refuse values that do not fit, or not together."""
        if not isinstance(self.anchor_text, str):
            raise ValueError(f"`anchor_text` must be a text, got {self.anchor_text!r}.")
        for name in ("latent_dim", "num_latents", "min_latents"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        self.check_soft_tokens()
        for name in ("sigma", "injection_scale"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"`{name}` must be a positive number, got {getattr(self, name)}.")
        if self.learn_stop and self.min_latents >= self.num_latents:
            raise ValueError(
                f"`min_latents={self.min_latents}` must be below `num_latents={self.num_latents}` with "
                "`learn_stop=True`, or there is no stop to learn."
            )
        if not self.learn_stop and self.min_latents != 1:
            raise ValueError(
                f"`min_latents={self.min_latents}` needs `learn_stop=True`: without it every trajectory has all "
                f"`num_latents={self.num_latents}` steps."
            )
        default = LatentOptions.__dataclass_fields__["initial_stop_prob"].default
        if not self.learn_stop and self.initial_stop_prob != default:
            raise ValueError(
                f"`initial_stop_prob={self.initial_stop_prob}` needs `learn_stop=True`: without it there is no stop. "
                f"Leave it at {default}."
            )
        if not 0 < self.initial_stop_prob < 1:
            raise ValueError(f"`initial_stop_prob` must be between 0 and 1, got {self.initial_stop_prob}.")
        for name in ("latent_density", "latent_sampling", "soft_token_score", "injection"):
            choices = LatentOptions.__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        self._check_density()

    def _check_density(self) -> None:
        if self.state_sigma and self.learn_sigma:
            raise ValueError(
                "`state_sigma=True` trains σ, one value per dimension included, so `learn_sigma` has no meaning beside "
                "it, got True. Leave it at False."
            )
        if self.one_sided_noise and self.latent_density == "gaussian":
            raise ValueError(
                "`one_sided_noise=True` is for soft tokens alone: the gradient of a Gaussian's log-density in its "
                "mean, (z - μ)/σ², has a direction, which noise of one sign would bias, and no sign to protect. "
                "Leave it at False."
            )
        for density in set(DENSITIES) - {self.latent_density}:
            for name in DENSITIES[density]:
                default = LatentOptions.__dataclass_fields__[name].default
                if getattr(self, name) != default:
                    raise ValueError(
                        f"`{name}={getattr(self, name)!r}` belongs to `latent_density={density!r}`, and the policy "
                        f"has `latent_density={self.latent_density!r}`. Leave it at {default!r}."
                    )
        if self.one_sided_noise and self.soft_token_score != "latent_grpo":
            raise ValueError(
                "`one_sided_noise=True` is for `soft_token_score='latent_grpo'`, whose gradient it gives the "
                f"advantage's sign, got {self.soft_token_score!r}, which is of plain Gumbel noise."
            )
        is_cut = self.latent_top_k is not None or self.latent_top_p < 1 or self.mixture_size is not None
        if is_cut and self.latent_density == "soft_tokens" and self.soft_token_score == "exact":
            raise ValueError(
                "`soft_token_score='exact'` is the density of mixtures of the whole vocabulary, so `latent_top_k` and "
                "`mixture_size` must be unset and `latent_top_p` 1.0: with tokens cut off it is none. Use 'lepo' or "
                "'latent_grpo'."
            )
        if self.mixture_size is not None and self.mixture_size > (self.latent_top_k or self.mixture_size):
            raise ValueError(
                f"`mixture_size={self.mixture_size}` must be at most `latent_top_k={self.latent_top_k}`, the "
                "candidates that it chooses from."
            )


class LatentPolicyConfig(LatentOptions, PreTrainedConfig):
    r"""
    Configuration of a [`LatentPolicyModel`]: [`LatentOptions`], the assistant, and the main model that it belongs to.

    Args:
        assistant_config (`PreTrainedConfig` or `dict`):
            Configuration of the assistant's backbone.
        main_model_name_or_path (`str`, *optional*):
            Main model that the policy belongs to.
        main_model_revision (`str`, *optional*):
            Revision of the main model.
        main_model_fingerprint (`str`, *optional*):
            Fingerprint of the main model's weights, see [`weights_fingerprint`].
        main_model_dtype (`str`, *optional*):
            Dtype that the main model computed in when the policy was trained.
        main_hidden_size (`int`, *optional*):
            Size H of the main model's input embeddings.
        anchor_ids (`list[int]`, *optional*):
            Tokens of the main model whose embeddings the latents are offsets from, one each.
        max_completion_length (`int`, *optional*):
            Tokens that the main model wrote at most when the policy was trained.
        chat_template_kwargs (`dict`, *optional*):
            Keyword arguments of the chat templates that conversational prompts were rendered with in training.
    """

    model_type = "latent_policy"
    sub_configs = {"assistant_config": AutoConfig}

    assistant_config: dict | PreTrainedConfig | None = None
    main_model_name_or_path: str | None = None
    main_model_revision: str | None = None
    main_model_fingerprint: str | None = None
    main_model_dtype: str | None = None
    main_hidden_size: int | None = None
    anchor_ids: list[int] | None = None
    max_completion_length: int | None = None
    chat_template_kwargs: dict | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if not isinstance(self.assistant_config, PreTrainedConfig):
            self.assistant_config = AutoConfig.for_model(**{"model_type": "llama", **(self.assistant_config or {})})
        if kwargs.pop("normalize_mean", False):
            raise ValueError("`normalize_mean=True` is an option of version 0.1.0, which alone can load this policy.")
        for old in {"density", "sampling"} & kwargs.keys():  # as version 0.1.0 saved them
            new, value = f"latent_{old}", kwargs.pop(old)
            if getattr(self, new) not in (value, LatentOptions.__dataclass_fields__[new].default):
                raise ValueError(
                    f"`{old}={value!r}` is the former name of `{new}={getattr(self, new)!r}`. Leave it out."
                )
            setattr(self, new, value)
        super().__post_init__(**kwargs)
        check_field_types(self)
        self.check_latents()

    @property
    def hidden_size(self) -> int:
        return self.assistant_config.get_text_config().hidden_size

    @property
    def feature_size(self) -> int:
        """Size of what a latent is compared, judged and fed back by."""
        return self.latent_dim if self.latent_density == "gaussian" else self.main_hidden_size or self.hidden_size

    @property
    def has_anchors(self) -> bool:
        """Whether latents are offsets from the tokens of `anchor_text`."""
        return self.latent_density == "gaussian" and self.injection == "anchors"

    @property
    def latents_in_words(self) -> str:
        """What a trajectory is, for cards and reports."""
        number = f"{self.min_latents} to {self.num_latents}" if self.learn_stop else self.num_latents
        if self.latent_density == "gaussian":
            return f"{number} latents of size {self.latent_dim} ({self.injection})"
        return f"{number} soft tokens over the main model's {self.latent_dim} tokens"

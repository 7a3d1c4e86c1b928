# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The latent policy: an assistant LM that samples latents, and the projection that hands them to the main model."""

import copy
import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import ModelOutput

from .distributions import DiagonalGaussian, SoftTokens, StoppedDensity, concatenate, take_rows
from .fingerprint import fingerprints_match, weights_fingerprint
from .injection import INJECTIONS, LatentInjector
from .soft_token_policy import SoftTokenHead, SoftTokenInjector, vocabulary_size
from .soft_tokens import SOFT_TOKEN_SCORES


SAMPLINGS = ("autoregressive", "parallel")
# Fields of a configuration that one density has and the others do not
DENSITIES = {
    "gaussian": ("sigma", "learn_sigma", "normalize_mean", "injection", "injection_scale"),
    "soft_tokens": (
        "soft_token_temperature",
        "soft_token_score",
        "one_sided_noise",
        "latent_top_k",
        "latent_top_p",
        "mixture_size",
    ),
}


class LatentPolicyConfig(PreTrainedConfig):
    r"""
    Configuration of a [`LatentPolicyModel`].

    Args:
        assistant_config (`PreTrainedConfig` or `dict`):
            Configuration of the assistant's backbone.
        density (`str`, *optional*, defaults to `"gaussian"`):
            What a latent is: `"gaussian"`, a vector with a Gaussian density ([`DiagonalGaussian`]), or `"soft_tokens"`, a
            mixture of the main model's tokens ([`SoftTokens`]).
        latent_dim (`int`, *optional*, defaults to `16`):
            Size d of a latent. Small is what pure RL can train; larger needs a supervised start. Of soft tokens it is
            the main model's vocabulary, whatever is given.
        num_latents (`int`, *optional*, defaults to `4`):
            Number T of latent steps per trajectory, at most T if `learn_stop`.
        learn_stop (`bool`, *optional*, defaults to `False`):
            Whether the policy decides after each step if it is the last, by a Bernoulli draw given the same state as the
            step's latent. The decision is part of the action and of its density.
        min_latents (`int`, *optional*, defaults to `1`):
            Steps that are always taken if `learn_stop`.
        initial_stop_prob (`float`, *optional*, defaults to `0.05`):
            Probability of a stop at each step that is free to, before training, if `learn_stop`.
        freeze_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the assistant's input embeddings are kept as they are.
        sampling (`str`, *optional*, defaults to `"autoregressive"`):
            `"autoregressive"`: each latent is fed back before the next is drawn (the paper's). `"parallel"`: T learned
            query vectors after the question, all latents in one pass.
        sigma (`float`, *optional*, defaults to `1.0`):
            Standard deviation σ of a latent (its initial value if `learn_sigma`).
        learn_sigma (`bool`, *optional*, defaults to `False`):
            Whether σ is a parameter, one per latent dimension.
        normalize_mean (`bool`, *optional*, defaults to `False`):
            Whether means are scaled to unit root mean square, which bounds ‖μ‖/σ.
        soft_token_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature τ of a soft token's mixture.
        soft_token_score (`str`, *optional*, defaults to `"exact"`):
            What stands for a soft token's log-probability: `"exact"` (the Gumbel-softmax density), or the surrogates of
            the papers, `"lepo"` and `"latent_grpo"`.
        one_sided_noise (`bool`, *optional*, defaults to `False`):
            Whether Gumbel noise is clamped and shifted to be at least 0, for `"latent_grpo"`.
        latent_top_k (`int`, *optional*):
            Most likely tokens that are candidates. If `None`, all.
        latent_top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass that the candidates must have.
        mixture_size (`int`, *optional*):
            Number K of candidates that are mixed, those with the highest perturbed log-probabilities. If `None`, all.
        injection (`str`, *optional*, defaults to `"anchors"`):
            How latents become embeddings of the main model: `"anchors"`, `"components"` or `"trained"`. See
            [`LatentInjector`].
        injection_scale (`float`, *optional*, defaults to `0.3`):
            Size of the latents' share of an embedding, in units of the main model's measured embedding RMS.
        anchor_text (`str`, *optional*, defaults to `"Answer: "`):
            Text whose tokens, in turn, are the base of the injected embeddings under `"anchors"`.
        main_model_name_or_path (`str`, *optional*):
            Main model that the policy belongs to.
        main_model_revision (`str`, *optional*):
            Revision of the main model.
        main_model_fingerprint (`str`, *optional*):
            Fingerprint of the main model's weights, see [`weights_fingerprint`].
        main_hidden_size (`int`, *optional*):
            Size H of the main model's input embeddings.
        chat_template_kwargs (`dict`, *optional*):
            Keyword arguments of the chat templates that conversational prompts were rendered with in training.
    """

    model_type = "latent_policy"
    sub_configs_defaults = {"assistant_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    assistant_config: dict | PreTrainedConfig | None = None
    density: str = "gaussian"
    latent_dim: int = 16
    num_latents: int = 4
    learn_stop: bool = False
    min_latents: int = 1
    initial_stop_prob: float = 0.05
    freeze_embeddings: bool = False
    sampling: str = "autoregressive"
    sigma: float = 1.0
    learn_sigma: bool = False
    normalize_mean: bool = False
    soft_token_temperature: float = 1.0
    soft_token_score: str = "exact"
    one_sided_noise: bool = False
    latent_top_k: int | None = None
    latent_top_p: float = 1.0
    mixture_size: int | None = None
    injection: str = "anchors"
    injection_scale: float = 0.3
    anchor_text: str = "Answer: "
    main_model_name_or_path: str | None = None
    main_model_revision: str | None = None
    main_model_fingerprint: str | None = None
    main_hidden_size: int | None = None
    chat_template_kwargs: dict | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in ("latent_dim", "num_latents", "min_latents"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("latent_top_k", "mixture_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1 or unset, got {getattr(self, name)}.")
        if not 0 < self.latent_top_p <= 1:
            raise ValueError(f"`latent_top_p` must be above 0 and at most 1, got {self.latent_top_p}.")
        for name in ("sigma", "injection_scale", "soft_token_temperature"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"`{name}` must be a positive number, got {getattr(self, name)}.")
        if self.learn_stop and self.min_latents >= self.num_latents:
            raise ValueError(
                f"`min_latents={self.min_latents}` must be below `num_latents={self.num_latents}` with `learn_stop=True`, or "
                "there is no stop to learn."
            )
        if not self.learn_stop and self.min_latents != 1:
            raise ValueError(
                f"`min_latents={self.min_latents}` needs `learn_stop=True`: without it every trajectory has all "
                f"`num_latents={self.num_latents}` steps."
            )
        if not 0 < self.initial_stop_prob < 1:
            raise ValueError(f"`initial_stop_prob` must be between 0 and 1, got {self.initial_stop_prob}.")
        known = {"sampling": SAMPLINGS, "injection": INJECTIONS}
        known |= {"density": tuple(DENSITIES), "soft_token_score": tuple(SOFT_TOKEN_SCORES)}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        self._check_density()

    def _check_density(self) -> None:
        if self.one_sided_noise and self.density == "gaussian":
            raise ValueError(
                "`one_sided_noise=True` is for soft tokens alone: the gradient of a Gaussian's log-density in its mean, "
                "(z - μ)/σ², has a direction, which noise of one sign would bias, and no sign to protect. Leave it at False."
            )
        for density in set(DENSITIES) - {self.density}:
            for name in DENSITIES[density]:
                default = type(self).__dataclass_fields__[name].default
                if getattr(self, name) != default:
                    raise ValueError(
                        f"`{name}={getattr(self, name)!r}` belongs to `density={density!r}`, and the policy has "
                        f"`density={self.density!r}`. Leave it at {default!r}."
                    )
        if self.one_sided_noise and self.soft_token_score != "latent_grpo":
            raise ValueError(
                "`one_sided_noise=True` is for `soft_token_score='latent_grpo'`, whose gradient it gives the advantage's "
                f"sign, got {self.soft_token_score!r}, which is of plain Gumbel noise."
            )
        is_cut = self.latent_top_k is not None or self.latent_top_p < 1 or self.mixture_size is not None
        if is_cut and self.density == "soft_tokens" and self.soft_token_score == "exact":
            raise ValueError(
                "`soft_token_score='exact'` is the density of mixtures of the whole vocabulary, so `latent_top_k` and "
                "`mixture_size` must be unset and `latent_top_p` 1.0: with tokens cut off it is none. Use 'lepo' or "
                "'latent_grpo'."
            )
        if self.mixture_size is not None and self.mixture_size > (self.latent_top_k or self.mixture_size):
            raise ValueError(
                f"`mixture_size={self.mixture_size}` must be at most `latent_top_k={self.latent_top_k}`, the candidates "
                "that it chooses from."
            )

    @property
    def hidden_size(self) -> int:
        return self.assistant_config.get_text_config().hidden_size

    @property
    def feature_size(self) -> int:
        """Size of what a latent is compared, judged and fed back by."""
        return self.latent_dim if self.density == "gaussian" else self.main_hidden_size or self.hidden_size

    @property
    def latents_in_words(self) -> str:
        """What a trajectory is, for cards and reports."""
        number = f"{self.min_latents} to {self.num_latents}" if self.learn_stop else self.num_latents
        if self.density == "gaussian":
            return f"{number} latents of size {self.latent_dim} ({self.injection})"
        return f"{number} soft tokens over the main model's {self.latent_dim} tokens"


class LatentHead(nn.Module):
    """Density of a latent step from the assistant's hidden state: μ = W_μ · norm(h), σ fixed or learned (eq. 9)."""

    def __init__(self, config: LatentPolicyConfig):
        super().__init__()
        self.normalize_mean = config.normalize_mean
        self.mean = nn.Linear(config.hidden_size, config.latent_dim)
        log_std = torch.full((config.latent_dim,), math.log(config.sigma))
        if config.learn_sigma:
            self.log_std = nn.Parameter(log_std)
        else:
            self.register_buffer("log_std", log_std)

    def forward(self, hidden_states: torch.Tensor) -> DiagonalGaussian:
        # Densities are float32 whatever the assistant computes in: a log-ratio sums over T * d dimensions
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = F.rms_norm(hidden_states.float(), hidden_states.shape[-1:], eps=1e-6)
            mean = F.linear(hidden_states, self.mean.weight.float(), self.mean.bias.float())
            if self.normalize_mean:
                mean = F.rms_norm(mean, mean.shape[-1:], eps=1e-6)
            # A copy: DDP takes a parameter that is itself an output for one that was not used
            return DiagonalGaussian(mean, self.log_std.clone())

    def reset_parameters(self) -> None:
        # ‖μ‖ starts well below σ: the first groups are explored rather than decided
        init.normal_(self.mean.weight, std=0.1 / math.sqrt(self.mean.in_features))
        init.zeros_(self.mean.bias)

    def draw_noise(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        return torch.randn(shape, device=device)

    def draw(self, density: DiagonalGaussian, noise: torch.Tensor) -> torch.Tensor:
        """Latents of `density`, drawn with `noise`."""
        return density.rsample(noise)


class StopHead(nn.Linear):
    """Log-odds that a step is the last, from the state that its latent is drawn from; infinite where nothing is free."""

    def __init__(self, config: LatentPolicyConfig):
        super().__init__(config.hidden_size, 1)
        self.min_latents = config.min_latents
        self.num_latents = config.num_latents

    def forward(self, hidden_states: torch.Tensor, num_before: int = 0) -> torch.Tensor:
        """States `(batch_size, T, hidden_size)` of the steps after the first `num_before` to `(batch_size, T)`."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = F.rms_norm(hidden_states.float(), hidden_states.shape[-1:], eps=1e-6)
            logits = F.linear(hidden_states, self.weight.float(), self.bias.float()).squeeze(-1)
        step = 1 + num_before + torch.arange(logits.size(1), device=logits.device)
        logits = logits.masked_fill(step < self.min_latents, -torch.inf)
        return logits.masked_fill(step >= self.num_latents, torch.inf)


@dataclass
class LatentPolicyOutput(ModelOutput):
    """
    Densities of the latent steps of a batch.

    Args:
        steps ([`DiagonalGaussian`] or [`SoftTokens`]):
            Density of each latent, given the question and the latents before it. `density` is that of the action: the
            same, or with `learn_stop` the joint one of latent and decision.
        latents (`torch.Tensor` of shape `(batch_size, num_latents, latent_dim)`, *optional*):
            What [`~LatentPolicyModel.sample`] drew from these densities.
        question_states (`torch.Tensor` of shape `(batch_size, hidden_size)`):
            Hidden state of the assistant at the question's last token, without gradient.
        lengths (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            Steps that each trajectory took. Latents after them are 0.
        stop_logits (`torch.Tensor` of shape `(batch_size, num_latents)`, *optional*):
            With `learn_stop`, log-odds that a step is the last, infinite where it has no choice.
    """

    steps: DiagonalGaussian | SoftTokens | None = None
    latents: torch.Tensor | None = None
    question_states: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    stop_logits: torch.Tensor | None = None

    @property
    def density(self) -> DiagonalGaussian | SoftTokens | StoppedDensity:
        return self.steps if self.stop_logits is None else StoppedDensity(self.steps, self.stop_logits, self.lengths)

    @property
    def mean(self) -> torch.Tensor:
        """Latents without noise, shape `(batch_size, num_latents, latent_dim)`."""
        return self.density.mean


class LatentPolicyModel(PreTrainedModel):
    """
    Assistant LM, latent head and projector: everything that DeepLatent Reasoning trains, and nothing else.

    Calling the model scores: one teacher-forced pass over the question and given latents yields the density of every
    latent step. [`~LatentPolicyModel.sample`] draws latents step by step. [`~LatentPolicyModel.inject`] turns latents
    into embeddings of the main model. Use [`~LatentPolicyModel.from_assistant`] to build a policy for a main model, and
    `save_pretrained` / `from_pretrained` / `push_to_hub` as with any transformers model.

    Args:
        config ([`LatentPolicyConfig`]):
            Configuration of the policy.
    """

    config_class = LatentPolicyConfig
    base_model_prefix = "assistant"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LatentPolicyConfig):
        super().__init__(config)
        self.assistant = AutoModel.from_config(config.assistant_config)
        if config.density == "gaussian":
            sizes = config.latent_dim, config.num_latents, config.main_hidden_size or config.hidden_size
            self.latent_head = LatentHead(config)
            self.injector = LatentInjector(*sizes, config.injection, config.injection_scale)
        else:
            self.latent_head, self.injector = SoftTokenHead(config), SoftTokenInjector(config)
        if config.learn_stop:
            self.stop_head = StopHead(config)
        if config.sampling == "autoregressive":
            self.latent_in = nn.Linear(config.feature_size, config.hidden_size, bias=False)
        else:
            self.queries = nn.Embedding(config.num_latents, config.hidden_size)
        self.get_input_embeddings().requires_grad_(not config.freeze_embeddings)
        # TRL and Trainer align special tokens here
        self.generation_config = GenerationConfig()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As [`~transformers.PreTrainedModel.from_pretrained`]."""
        loaded = super().from_pretrained(*args, **kwargs)
        policy = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info=True`
        # Loading puts new parameters, all trainable, in place of those that were built
        policy.get_input_embeddings().requires_grad_(not policy.config.freeze_embeddings)
        return loaded

    @classmethod
    def from_assistant(
        cls,
        assistant: "str | PreTrainedModel",
        main_model: PreTrainedModel,
        main_processing_class: PreTrainedTokenizerBase,
        assistant_init_kwargs: dict[str, Any] | None = None,
        **config_kwargs,
    ) -> "LatentPolicyModel":
        """
        Build a policy that speaks to `main_model`.

        Args:
            assistant (`str` or [`~transformers.PreTrainedModel`]):
                Any causal LM or its backbone: Hub id, path or instance, whose weights are copied. See
                [`first_layers`] and [`fresh_layers`] for assistants made from the main model itself.
            main_model ([`~transformers.PreTrainedModel`]):
                Frozen causal LM that will decode the answers. Its embedding table is measured, nothing is shared.
            main_processing_class ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the main model, for the anchor text.
            assistant_init_kwargs (`dict`, *optional*):
                Keyword arguments for `from_pretrained`, if `assistant` is a string.
            **config_kwargs:
                Fields of [`LatentPolicyConfig`].

        Returns:
            [`LatentPolicyModel`]: in float32.
        """
        if isinstance(assistant, str):
            assistant = AutoModel.from_pretrained(
                assistant, **{"dtype": torch.float32, **(assistant_init_kwargs or {})}
            )
        backbone = assistant.base_model
        if any(tensor.is_meta or not tensor.is_floating_point() for tensor in backbone.parameters()):
            raise ValueError(
                "`assistant` must hold trainable floating-point weights, but some are quantized or on the meta device. "
                "Load it in float32 or bfloat16; `quantization_config` is for the frozen main model."
            )
        assistant_config = copy.deepcopy(backbone.config)
        # A GGUF or otherwise dequantized load still says that it is quantized, and could not be saved
        if hasattr(assistant_config, "quantization_config"):
            del assistant_config.quantization_config
        assistant_config.dtype = None
        if config_kwargs.get("density") == "soft_tokens":
            config_kwargs["latent_dim"] = vocabulary_size(main_model)
        config = cls.config_class(
            assistant_config=assistant_config,
            main_model_name_or_path=main_model.config.name_or_path or None,
            main_model_revision=getattr(main_model.config, "_commit_hash", None),
            main_model_fingerprint=weights_fingerprint(main_model),
            main_hidden_size=main_model.get_input_embeddings().embedding_dim,
            **config_kwargs,
        )
        config._attn_implementation = backbone.config._attn_implementation
        policy = cls(config).float()
        policy.assistant.load_state_dict(backbone.state_dict())
        policy._start_from(main_model, main_processing_class)
        return policy

    @torch.no_grad()
    def _start_from(self, main_model: PreTrainedModel, main_processing_class: PreTrainedTokenizerBase) -> None:
        """Set what depends on the main model, and feed the assistant latents of the size of what it knows."""
        rms = self.get_input_embeddings().weight.float().square().mean().sqrt()
        if self.config.sampling == "parallel":
            nn.init.normal_(self.queries.weight, std=rms.item())
        elif self.config.density == "gaussian":
            nn.init.normal_(self.latent_in.weight, std=(rms / self.config.latent_dim**0.5).item())
        elif self.latent_in.in_features == self.latent_in.out_features:
            nn.init.eye_(self.latent_in.weight)  # an assistant made from the main model has its embeddings
        else:
            of_main = main_model.get_input_embeddings().weight.float().square().sum(-1).mean().sqrt()
            nn.init.normal_(self.latent_in.weight, std=(rms / of_main).item())
        if self.config.density == "gaussian":
            self.injector.fit(main_model, main_processing_class, self.config.anchor_text)
        self._take_vocabulary(main_model)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, (LatentHead, SoftTokenHead)):
            module.reset_parameters()
        elif isinstance(module, StopHead):
            init.zeros_(module.weight)
            prob = self.config.initial_stop_prob
            init.constant_(module.bias, math.log(prob / (1 - prob)))

    def get_input_embeddings(self) -> nn.Module:
        return self.assistant.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.assistant.set_input_embeddings(value)

    def get_output_embeddings(self) -> None:
        return None

    def check_main_model(self, main_model: PreTrainedModel, allow_mismatch: bool = False) -> None:
        """
        Check that the policy was built for `main_model`.

        Raises:
            `ValueError`: if embedding sizes differ, or if the recorded fingerprint is another model's and
            `allow_mismatch` is not set (a warning if it is).
        """
        hidden_size = main_model.get_input_embeddings().embedding_dim
        own_size = self.config.main_hidden_size or self.config.hidden_size
        built_for = (
            f"(it was built for {self.config.main_model_name_or_path!r}). Pass that main model, or build a policy for this "
            "one with `LatentPolicyModel.from_assistant`."
        )
        if hidden_size != own_size:
            raise ValueError(
                f"`main_model` has embeddings of size {hidden_size}, but the policy injects embeddings of size {own_size} "
                f"{built_for}"
            )
        if self.config.density == "soft_tokens" and vocabulary_size(main_model) != self.config.latent_dim:
            raise ValueError(
                f"`main_model` has {vocabulary_size(main_model)} tokens, but the policy mixes {self.config.latent_dim} "
                f"{built_for}"
            )
        recorded = self.config.main_model_fingerprint
        if recorded is None:
            return
        fingerprint = weights_fingerprint(main_model)
        if not fingerprints_match(recorded, fingerprint):
            message = (
                f"`main_model` has weights with fingerprint {fingerprint}, but the policy was built for "
                f"{self.config.main_model_name_or_path!r} with fingerprint {recorded}."
            )
            if not allow_mismatch:
                raise ValueError(
                    f"{message} Pass that main model, or set `allow_main_model_mismatch=True` to go on regardless."
                )
            warnings.warn(message, stacklevel=2)

    def attach_main_model(self, main_model: PreTrainedModel, allow_mismatch: bool = False) -> None:
        """
        Check that the policy was built for `main_model`, as [`~LatentPolicyModel.check_main_model`] does, and let soft
        tokens have its vocabulary: its embedding tables are part of no checkpoint. Gaussian latents need nothing of it.

        Raises:
            `ValueError`: as [`~LatentPolicyModel.check_main_model`].
        """
        self.check_main_model(main_model, allow_mismatch)
        self._take_vocabulary(main_model)

    def _take_vocabulary(self, main_model: PreTrainedModel) -> None:
        for module in self.modules():  # an adapter has copies of some
            if isinstance(module, (SoftTokenHead, SoftTokenInjector)):
                module.attach(main_model, self.device)

    def untrained_head(self) -> LatentHead | SoftTokenHead:
        """A latent head as training begins with it."""
        if self.config.density == "gaussian":
            head = LatentHead(self.config).to(self.device)
        else:
            head = SoftTokenHead(self.config).to(self.device)
            head.unembedding = self.latent_head.unembedding
        self._init_weights(head)
        return head

    def _run_assistant(self, attention_mask: torch.Tensor, **kwargs) -> Any:
        if "position_ids" in inspect.signature(self.assistant.forward).parameters:
            # Counted from the first real token, so that left padding changes nothing
            length = kwargs["input_ids" if "input_ids" in kwargs else "inputs_embeds"].size(1)
            kwargs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return self.assistant(attention_mask=attention_mask, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        latents: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        **kwargs,
    ) -> LatentPolicyOutput:
        """
        Density of every latent step: of given latents in one teacher-forced pass, or of those drawn with given noise.

        Args:
            input_ids (`torch.Tensor` of shape `(batch_size, prompt_length)`):
                Left-padded question in the assistant's tokens.
            attention_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`):
                0 on padding.
            latents (`torch.Tensor` of shape `(batch_size, num_latents, latent_dim)`, *optional*):
                Latents whose steps are conditioned on the ones before them. Required for autoregressive sampling,
                unless `noise` is given.
            noise (`torch.Tensor` of shape `(batch_size, num_latents, latent_dim)`, *optional*):
                Draw as many reparameterized latents, `mean + std * noise`, through which gradients pass (zeros: means).
                They may be fewer than `config.num_latents`. There is no decision to stop.
            lengths (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Steps that each trajectory of `latents` took, if not all. What the others hold has no effect.

        Returns:
            [`LatentPolicyOutput`]: with `latents` if `noise` was given.
        """
        # The trajectories of a question share its reading, which is computed once
        readings, rows = torch.stack([input_ids, attention_mask], 1).unique(dim=0, return_inverse=True)
        if noise is not None:
            return self._draw(*readings.unbind(1), rows, noise)
        if lengths is None:
            lengths = torch.full_like(rows, self.config.num_latents)
        if self.config.sampling == "parallel":
            output = self._density_of_queries(*readings.unbind(1), rows, self.config.num_latents)
            output.lengths = lengths
            return output
        fed = self._feed(latents[:, :-1])
        if self._keeps_no_cache:
            hidden_states = self._read_through(input_ids, attention_mask, fed)[:, input_ids.size(1) - 1 :]
        else:
            cache, attention_mask, hidden_states = self._read_question(*readings.unbind(1), rows)
            if fed.size(1) > 0:
                later = self._run_assistant(
                    F.pad(attention_mask, (0, fed.size(1)), value=1),
                    inputs_embeds=fed,
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
                hidden_states = torch.cat([hidden_states, later], dim=1)
        return LatentPolicyOutput(
            self.latent_head(hidden_states),
            question_states=hidden_states[:, 0].detach(),
            lengths=lengths,
            stop_logits=self._stop_logits(hidden_states),
        )

    def _feed(self, latents: torch.Tensor) -> torch.Tensor:
        """What the assistant is given of latents before the next one."""
        return self.latent_in(self.features(latents).to(self.latent_in.weight.dtype))

    def _stop_logits(self, hidden_states: torch.Tensor, num_before: int = 0) -> torch.Tensor | None:
        return self.stop_head(hidden_states, num_before) if self.config.learn_stop else None

    @property
    def _keeps_no_cache(self) -> bool:
        """Gradient checkpointing recomputes layers, and so keeps no cache."""
        return self.training and self.is_activation_checkpointing

    def _density_of_queries(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, rows: torch.Tensor, num_latents: int
    ) -> LatentPolicyOutput:
        """Parallel sampling: all steps from one pass over each question, repeated for the rows that share it."""
        queries = self.queries.weight[:num_latents].expand(input_ids.size(0), -1, -1)
        hidden_states = self._read_through(input_ids, attention_mask, queries)
        density = self.latent_head(hidden_states[:, input_ids.size(1) :])
        states = hidden_states[:, input_ids.size(1) - 1].detach()
        stop_logits = self._stop_logits(hidden_states[:, input_ids.size(1) :])
        return LatentPolicyOutput(
            take_rows(density, rows),
            question_states=states[rows],
            stop_logits=None if stop_logits is None else stop_logits[rows],
        )

    def _draw(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        rows: torch.Tensor,
        noise: torch.Tensor,
        stop_draws: torch.Tensor | None = None,
    ) -> LatentPolicyOutput:
        """
        Latents of `rows` of questions, drawn with `noise`: in one pass, or step by step, each fed back. A trajectory stops
        where the probability of that is above its number in `stop_draws`, shape `(num_rows, num_latents)`.
        """
        if self.config.sampling == "parallel":
            output = self._density_of_queries(input_ids, attention_mask, rows, noise.size(1))
            output.latents = self.latent_head.draw(output.steps, noise)
        else:
            output = self._draw_stepwise(input_ids, attention_mask, rows, noise, stop_draws)
        if stop_draws is None:
            output.lengths, output.stop_logits = torch.full_like(rows, noise.size(1)), None
        else:
            output.lengths = (output.stop_logits.sigmoid() > stop_draws).long().argmax(1) + 1
            output.latents = output.latents.masked_fill(~output.density.is_taken.unsqueeze(-1), 0.0)
        return output

    def _draw_stepwise(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        rows: torch.Tensor,
        noise: torch.Tensor,
        stop_draws: torch.Tensor | None,
    ) -> LatentPolicyOutput:
        """Autoregressive sampling, until every trajectory has stopped."""
        cache, mask, hidden_states = None, attention_mask[rows], None
        if not self._keeps_no_cache:
            cache, mask, hidden_states = self._read_question(input_ids, attention_mask, rows)
        densities, latents, fed = [], [], self.latent_in.weight.new_empty(len(rows), 0, self.config.hidden_size)
        stop_logits, is_over = [], torch.zeros_like(rows, dtype=torch.bool)
        for step in range(noise.size(1)):
            if cache is None:
                hidden_states = self._read_through(input_ids[rows], mask, fed)[:, -1:]
            elif step > 0:
                mask = F.pad(mask, (0, 1), value=1)
                hidden_states = self._run_assistant(
                    mask, inputs_embeds=fed[:, -1:], past_key_values=cache, use_cache=True
                ).last_hidden_state
            if step == 0:
                question_states = hidden_states[:, 0].detach()
            density = self.latent_head(hidden_states)
            densities.append(density)
            latents.append(self.latent_head.draw(density, noise[:, step : step + 1]))
            if stop_draws is not None:
                stop_logits.append(self.stop_head(hidden_states, step))
                is_over = is_over | (stop_logits[-1].squeeze(1).sigmoid() > stop_draws[:, step])
                if is_over.all():
                    break
            fed = torch.cat([fed, self._feed(latents[-1])], dim=1)
        missing = noise.size(1) - len(densities)
        steps = concatenate(densities, dim=1)
        steps = steps.given({name: F.pad(parameter, (0, 0, 0, missing)) for name, parameter in steps.rows().items()})
        latents = F.pad(torch.cat(latents, dim=1), (0, 0, 0, missing))
        if stop_draws is not None:
            stop_logits = F.pad(torch.cat(stop_logits, dim=1), (0, missing), value=torch.inf)
        return LatentPolicyOutput(
            steps, latents, question_states, stop_logits=None if stop_draws is None else stop_logits
        )

    def _read_through(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, fed: torch.Tensor) -> torch.Tensor:
        """Hidden states of a question and the embeddings fed after it, in one pass."""
        prompt = self.get_input_embeddings()(input_ids)
        return self._run_assistant(
            F.pad(attention_mask, (0, fed.size(1)), value=1),
            inputs_embeds=torch.cat([prompt, fed.to(prompt.dtype)], dim=1),
            use_cache=False,
        ).last_hidden_state

    def _read_question(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, rows: torch.Tensor
    ) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
        """Each question once; its KV cache, mask and last hidden state, repeated for the rows that share it."""
        cache = DynamicCache(config=self.assistant.config)
        hidden_states = self._run_assistant(
            attention_mask, input_ids=input_ids, past_key_values=cache, use_cache=True
        ).last_hidden_state
        cache.batch_select_indices(rows)
        return cache, attention_mask[rows], hidden_states[rows, -1:]

    @torch.no_grad()
    def sample(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_samples: int | torch.Tensor = 1,
        deterministic: bool = False,
    ) -> LatentPolicyOutput:
        """
        Draw trajectories of latents; the question is encoded once, however many are drawn.

        Args:
            input_ids (`torch.Tensor` of shape `(batch_size, prompt_length)`):
                Left-padded questions in the assistant's tokens.
            attention_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`):
                0 on padding.
            num_samples (`int` or `torch.Tensor` of shape `(batch_size,)`, *optional*, defaults to `1`):
                Trajectories per question, or one number for each question.
            deterministic (`bool`, *optional*, defaults to `False`):
                Whether to take the mean of every step instead of a sample, and to stop where that is likelier than not.

        Returns:
            [`LatentPolicyOutput`]: float32 latents with the densities that they were drawn from, for the sum of
            `num_samples` rows, a question's trajectories next to each other.
        """
        rows = torch.arange(input_ids.size(0), device=input_ids.device).repeat_interleave(
            torch.as_tensor(num_samples, device=input_ids.device)
        )
        shape = len(rows), self.config.num_latents, self.config.latent_dim
        if deterministic:
            noise = torch.zeros(shape, device=rows.device)
        elif self.config.sampling == "parallel":
            noise = self.draw_noise(shape)
        else:  # step by step, so that fewer latents are the same first ones
            noise = torch.cat([self.draw_noise((shape[0], 1, shape[2])) for _ in range(shape[1])], dim=1)
        stop_draws = None
        if self.config.learn_stop:
            stop_draws = noise.new_full(shape[:2], 0.5) if deterministic else torch.rand(shape[:2], device=rows.device)
        with eval_mode(self):
            return self._draw(input_ids, attention_mask, rows, noise, stop_draws)

    def draw_noise(self, shape: tuple[int, int, int]) -> torch.Tensor:
        """Noise of shape `(B, T, latent_dim)` to draw latents with, as the density has it: `forward` takes it."""
        return self.latent_head.draw_noise(shape, self.device)

    def features(self, latents: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """
        What latents are compared, judged and fed back by, shape `(B, T, config.feature_size)`: themselves, or for soft
        tokens the embeddings that they inject. 0 after the first `lengths` of a row, if not all are there.
        """
        features = self.injector.features(latents)
        if lengths is None:
            return features
        is_taken = torch.arange(latents.size(1), device=latents.device) < lengths.unsqueeze(1)
        return features.masked_fill(~is_taken.unsqueeze(-1), 0.0)

    def zero_latents(self, num_rows: int) -> LatentPolicyOutput:
        """Latents of 0, for a control: under `injection="anchors"` they are the anchor tokens."""
        latents = torch.zeros(num_rows, self.config.num_latents, self.config.latent_dim, device=self.device)
        return LatentPolicyOutput(latents=latents, lengths=torch.full((num_rows,), latents.size(1)))

    def inject(self, latents: torch.Tensor) -> torch.Tensor:
        """Embeddings of the main model for `latents`: `(B, T, latent_dim)` to float32 `(B, T, main_hidden_size)`."""
        return self.injector(latents)


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put `model` in evaluation mode (no dropout, no gradient checkpointing) and back to the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


AutoConfig.register(LatentPolicyConfig.model_type, LatentPolicyConfig)
AutoModel.register(LatentPolicyConfig, LatentPolicyModel)

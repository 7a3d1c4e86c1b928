# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The latent policy: an assistant LM that samples latents, and the projection that hands them to the main model."""

import copy
import inspect
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.utils import ModelOutput

from .architectures import (
    CACHE_ARGUMENT,
    attention_layers,
    check_family,
    check_stands_alone,
    embedding_table,
    has_code_of_its_own,
    has_recurrent_state,
    latent_token_ids,
    per_layer_inputs,
    text_backbone,
)
from .densities import DiagonalGaussian, SoftTokens, StoppedDensity, concatenate, take_rows
from .heads import LatentHead, SoftTokenHead, StopHead, vocabulary_size
from .hub import hub_name, location_of, name_or_model, readable_damage
from .injection import LatentInjector, SoftTokenInjector
from .latent_policy_config import LatentPolicyConfig
from .main_model import eval_mode, fingerprints_match, is_checkpointed, warn_of_cast, weights_fingerprint


@dataclass
class LatentPolicyOutput(ModelOutput):
    """
    Densities of the latent steps of a batch.

    Args:
        steps ([`DiagonalGaussian`] or [`SoftTokens`]):
            Density of each latent, given the question and the latents before it. `density` is that of the action: the
            same, or with `learn_stop` the joint one of latent and decision.
        latents (`torch.Tensor` of shape `(batch_size, num_latents, latent_dim)`, *optional*):
            What was drawn from these densities.
        latent_embeds (`torch.Tensor` of shape `(batch_size, num_latents, main_hidden_size)`, *optional*):
            `latents` as embeddings of the main model, if calling the model drew them: a trained up-projection is used
            within the call, where DDP sees it.
        question_states (`torch.Tensor` of shape `(batch_size, hidden_size)`):
            Hidden state of the assistant at the question's last token, without gradient.
        lengths (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            Steps that each trajectory took. Latents after them are 0.
        stop_logits (`torch.Tensor` of shape `(batch_size, num_latents)`, *optional*):
            With `learn_stop`, log-odds that a step is the last, infinite where it has no choice.
    """

    steps: DiagonalGaussian | SoftTokens | None = None
    latents: torch.Tensor | None = None
    latent_embeds: torch.Tensor | None = None
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

    def limit(self, num_latents: torch.Tensor) -> None:
        """End trajectories after the first `num_latents`, shape `(batch_size,)` or `()`, if they took more."""
        self.lengths = self.lengths.minimum(num_latents.to(self.lengths))
        is_over = torch.arange(self.latents.size(1), device=self.lengths.device) >= self.lengths.unsqueeze(1)
        self.latents = self.latents.masked_fill(is_over.unsqueeze(-1), 0.0)


class LatentPolicyModel(PreTrainedModel):
    """
    Assistant LM, latent head and projector: everything that DeepLatent Reasoning trains, and nothing else.

    Calling the model scores: one teacher-forced pass over the question and given latents yields the density of every
    latent step. [`~LatentPolicyModel.sample`] draws latents step by step. [`~LatentPolicyModel.inject`] turns latents
    into embeddings of the main model. Use [`~LatentPolicyModel.from_assistant`] to build a policy for a main model,
    and `save_pretrained` / `from_pretrained` / `push_to_hub` as with any transformers model.

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
        assistant_config = config.assistant_config
        self.assistant = AutoModel.from_config(
            assistant_config, trust_remote_code=has_code_of_its_own(assistant_config)
        )
        # Passes that are differentiated keep no cache of a state that the next position overwrites
        self.has_recurrent_state = has_recurrent_state(self.assistant)
        self.has_attention = any(attention_layers(self.assistant))
        if config.latent_density == "gaussian":
            sizes = config.latent_dim, config.num_latents, config.main_hidden_size or config.hidden_size
            self.latent_head = LatentHead(config)
            self.injector = LatentInjector(*sizes, config.injection, config.injection_scale)
        else:
            self.latent_head, self.injector = SoftTokenHead(config), SoftTokenInjector(config)
        if config.learn_stop:
            self.stop_head = StopHead(config)
        if config.latent_sampling == "autoregressive":
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
        with readable_damage(args[0] if args else kwargs["pretrained_model_name_or_path"]):
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
        if unknown := sorted(config_kwargs.keys() - cls.config_class.__dataclass_fields__.keys()):
            raise ValueError(
                f"`LatentPolicyConfig` has no field {', '.join(unknown)}. See `LatentOptions` for its fields."
            )
        assistant = name_or_model(assistant, "assistant")
        if isinstance(assistant, str):
            kwargs = {"dtype": torch.float32, **(assistant_init_kwargs or {})}
            with readable_damage(assistant):
                assistant = AutoModel.from_pretrained(assistant, **kwargs)
        check_family(assistant, "assistant")
        backbone = text_backbone(assistant)
        if any(tensor.is_meta or not tensor.is_floating_point() for tensor in backbone.parameters()):
            raise ValueError(
                "`assistant` must hold trainable floating-point weights, but some are quantized or on the meta "
                "device. Load it in float32 or bfloat16; `quantization_config` is for the frozen main model."
            )
        check_stands_alone(backbone.config, "assistant")
        assistant_config = copy.deepcopy(backbone.config)
        assistant_config.name_or_path = assistant.config.name_or_path  # which the text part of a wrapper has not
        if has_code_of_its_own(assistant_config):
            name = type(backbone).__name__
            warnings.warn(
                f"The assistant, a {name}, runs code that came with it, and a saved policy brings none: load one "
                f"after `AutoConfig.register({assistant_config.model_type!r}, {type(assistant_config).__name__})` and "
                f"`AutoModel.register({type(assistant_config).__name__}, {name})`.",
                stacklevel=2,
            )
        # A GGUF or otherwise dequantized load still says that it is quantized, and could not be saved
        if hasattr(assistant_config, "quantization_config"):
            del assistant_config.quantization_config
        assistant_config.dtype = None
        warn_of_cast(main_model)
        config = cls.config_class(
            assistant_config=assistant_config,
            main_model_name_or_path=location_of(main_model),
            main_model_revision=getattr(main_model.config, "_commit_hash", None),
            main_model_fingerprint=weights_fingerprint(main_model),
            main_hidden_size=main_model.get_input_embeddings().embedding_dim,
            **config_kwargs,
        )
        if config.latent_density == "soft_tokens":
            config.latent_dim = vocabulary_size(main_model)
        config._attn_implementation = backbone.config._attn_implementation
        policy = cls(config).float()
        policy.assistant.load_state_dict(backbone.state_dict())
        policy._start_from(main_model, main_processing_class)
        return policy

    @torch.no_grad()
    def _start_from(self, main_model: PreTrainedModel, main_processing_class: PreTrainedTokenizerBase) -> None:
        """Set what depends on the main model, and feed the assistant latents of the size of what it knows."""
        rms = embedding_table(self.get_input_embeddings()).float().square().mean().sqrt()
        if self.config.latent_sampling == "parallel":
            nn.init.normal_(self.queries.weight, std=rms.item())
        elif self.config.latent_density == "gaussian":
            nn.init.normal_(self.latent_in.weight, std=(rms / self.config.latent_dim**0.5).item())
        elif self.latent_in.in_features == self.latent_in.out_features:
            nn.init.eye_(self.latent_in.weight)  # an assistant made from the main model has its embeddings
        else:
            of_main = embedding_table(main_model.get_input_embeddings()).float().square().sum(-1).mean().sqrt()
            nn.init.normal_(self.latent_in.weight, std=(rms / of_main).item())
        if self.config.latent_density == "gaussian":
            anchor_text = self.config.anchor_text
            self.config.anchor_ids = self.injector.fit(main_model, main_processing_class, anchor_text)
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

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The name that TRL and PEFT ask for, without the warning of it that newer versions of transformers give."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def check_main_model(self, main_model: PreTrainedModel, allow_mismatch: bool = False) -> None:
        """
        Check that the policy was built for `main_model`.

        Raises:
            `ValueError`: if embedding sizes differ, or if the recorded fingerprint is another model's and
            `allow_mismatch` is not set (a warning if it is).
        """
        hidden_size = main_model.get_input_embeddings().embedding_dim
        policy_size = self.config.main_hidden_size or self.config.hidden_size
        built_for = (
            f"(it was built for {self.config.main_model_name_or_path!r}). Pass that main model, or build a policy for "
            "this one with `LatentPolicyModel.from_assistant`."
        )
        if hidden_size != policy_size:
            raise ValueError(
                f"`main_model` has embeddings of size {hidden_size}, but the policy injects embeddings of size "
                f"{policy_size} {built_for}"
            )
        if self.config.latent_density == "soft_tokens" and vocabulary_size(main_model) != self.config.latent_dim:
            raise ValueError(
                f"`main_model` has {vocabulary_size(main_model)} tokens, but the policy mixes "
                f"{self.config.latent_dim} {built_for}"
            )
        warn_of_cast(main_model)
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
        tokens have its vocabulary: its embedding tables are part of no checkpoint. Gaussian latents need nothing of
        it. A folder that the configuration names is replaced by the one that the model was found in.

        Raises:
            `ValueError`: as [`~LatentPolicyModel.check_main_model`].
        """
        self.check_main_model(main_model, allow_mismatch)
        found = location_of(main_model)
        if found is not None and hub_name(self.config.main_model_name_or_path) is None:
            self.config.main_model_name_or_path = found
        self._take_vocabulary(main_model)

    def _take_vocabulary(self, main_model: PreTrainedModel) -> None:
        for module in self.modules():  # an adapter has copies of some
            if isinstance(module, (SoftTokenHead, SoftTokenInjector)):
                module.attach(main_model, self.device)

    @property
    def max_prompt_length(self) -> int | None:
        """Tokens of a question at most, given the assistant's positions, of which latents take some."""
        max_positions = getattr(self.assistant.config.get_text_config(), "max_position_embeddings", None)
        num_fed = self.config.num_latents - (
            self.config.latent_sampling == "autoregressive"
        )  # the last one is not fed back
        return None if max_positions is None else max_positions - num_fed

    def check_length(self, prompt_length: int) -> None:
        """Raise a `ValueError` if a question has more than `max_prompt_length` tokens."""
        if self.max_prompt_length is not None and prompt_length > self.max_prompt_length:
            raise ValueError(
                f"A prompt of {prompt_length} tokens and `num_latents={self.config.num_latents}` together exceed the "
                f"assistant's {self.assistant.config.get_text_config().max_position_embeddings} positions. Shorten "
                "the prompts, or take an assistant with more."
            )

    def untrained_head(self) -> LatentHead | SoftTokenHead:
        """A latent head as training begins with it."""
        if self.config.latent_density == "gaussian":
            head = LatentHead(self.config).to(self.device)
        else:
            head = SoftTokenHead(self.config).to(self.device)
            head.unembedding = self.latent_head.unembedding
        self._init_weights(head)
        return head

    def _run_assistant(self, attention_mask: torch.Tensor, token_ids: torch.Tensor | None = None, **kwargs) -> Any:
        """The assistant's pass. Beside `inputs_embeds`, `token_ids` stand for them, if they are not all latents."""
        length = kwargs["input_ids" if "input_ids" in kwargs else "inputs_embeds"].size(1)
        if "position_ids" in inspect.signature(self.assistant.forward).parameters:
            # Counted from the first real token, so that left padding changes nothing
            kwargs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        if not self.has_attention:  # padding that was read before is none of its business
            attention_mask = attention_mask[:, -length:]
        if (embeds := kwargs.get("inputs_embeds")) is not None:
            token_ids = latent_token_ids(self.assistant, embeds) if token_ids is None else token_ids
            kwargs |= per_layer_inputs(self.assistant, token_ids)
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
        With both, latents are drawn from the densities that the given ones have.

        Args:
            input_ids (`torch.Tensor` of shape `(batch_size, prompt_length)`):
                Left-padded question in the assistant's tokens.
            attention_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`):
                0 on padding.
            latents (`torch.Tensor` of shape `(batch_size, num_latents, latent_dim)`, *optional*):
                Latents whose steps are conditioned on the ones before them. Required for autoregressive sampling,
                unless `noise` is given.
            noise (`torch.Tensor` of shape `(batch_size, num_latents, latent_dim)`, *optional*):
                Draw as many reparameterized latents, `mean + std * noise`, through which gradients pass (zeros:
                means). Without `latents` they may be fewer than `config.num_latents`, and there is no decision to
                stop.
            lengths (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Steps that each trajectory of `latents` took, if not all. What the others hold has no effect.

        Returns:
            [`LatentPolicyOutput`]: with `latents` and `latent_embeds` if `noise` was given.
        """
        # The trajectories of a question share its reading, which is computed once
        readings, rows = torch.stack([input_ids, attention_mask], 1).unique(dim=0, return_inverse=True)
        questions = *readings.unbind(1), rows
        if noise is not None and latents is None:
            output = self._draw(*questions, noise)
        else:
            if self.config.latent_sampling == "parallel":
                output = self._density_of_queries(*questions, self.config.num_latents)
            else:
                output = self._density_of_latents(*questions, latents, lengths)
            output.lengths = torch.full_like(rows, self.config.num_latents) if lengths is None else lengths
            if noise is not None:
                output.latents = output.density.rsample(noise)
        if noise is not None:
            output.latent_embeds = self.inject(output.latents)
        return output

    def _density_of_latents(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        rows: torch.Tensor,
        latents: torch.Tensor,
        lengths: torch.Tensor | None = None,
    ) -> LatentPolicyOutput:
        """
        Autoregressive sampling: all steps, each given the latents before it, from one pass over questions and latents.
        """
        fed = self._feed(latents[:, :-1])
        if lengths is not None:  # Gemma 3n takes roots of sizes, which have no gradient at 0
            is_taken = torch.arange(fed.size(1), device=fed.device) < lengths.unsqueeze(1)
            fed = fed.masked_fill(~is_taken.unsqueeze(-1), 1.0)
        if is_checkpointed(self) or self.has_recurrent_state:
            hidden_states = self._read_through(input_ids[rows], attention_mask[rows], fed)[:, input_ids.size(1) - 1 :]
        else:
            cache, attention_mask, hidden_states = self._read_question(input_ids, attention_mask, rows)
            if fed.size(1) > 0:
                later = self._run_assistant(
                    F.pad(attention_mask, (0, fed.size(1)), value=1),
                    inputs_embeds=fed,
                    use_cache=True,
                    **{CACHE_ARGUMENT: cache},
                ).last_hidden_state
                hidden_states = torch.cat([hidden_states, later], dim=1)
        return LatentPolicyOutput(
            self.latent_head(hidden_states),
            question_states=hidden_states[:, 0].detach(),
            stop_logits=self._stop_logits(hidden_states),
        )

    def _feed(self, latents: torch.Tensor) -> torch.Tensor:
        """What the assistant is given of latents before the next one."""
        return self.latent_in(self.features(latents).to(self.latent_in.weight.dtype))

    def _stop_logits(self, hidden_states: torch.Tensor, num_before: int = 0) -> torch.Tensor | None:
        return self.stop_head(hidden_states, num_before) if self.config.learn_stop else None

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
        Latents of `rows` of questions, drawn with `noise`: in one pass, or step by step, each fed back. A trajectory
        stops where the probability of that is above its number in `stop_draws`, shape `(num_rows, num_latents)`.
        """
        if self.config.latent_sampling == "parallel":
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
        if not (is_checkpointed(self) or (self.has_recurrent_state and torch.is_grad_enabled())):
            cache, mask, hidden_states = self._read_question(input_ids, attention_mask, rows)
        densities, latents, fed = [], [], self.latent_in.weight.new_empty(len(rows), 0, self.config.hidden_size)
        stop_logits, is_over = [], torch.zeros_like(rows, dtype=torch.bool)
        for step in range(noise.size(1)):
            if cache is None:
                hidden_states = self._read_through(input_ids[rows], mask, fed)[:, -1:]
            elif step > 0:
                mask = F.pad(mask, (0, 1), value=1)
                hidden_states = self._run_assistant(
                    mask, inputs_embeds=fed[:, -1:], use_cache=True, **{CACHE_ARGUMENT: cache}
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
        steps = steps.replace({name: F.pad(parameter, (0, 0, 0, missing)) for name, parameter in steps.rows().items()})
        latents = F.pad(torch.cat(latents, dim=1), (0, 0, 0, missing))
        if stop_draws is not None:
            stop_logits = F.pad(torch.cat(stop_logits, dim=1), (0, missing), value=torch.inf)
        stop_logits = None if stop_draws is None else stop_logits
        return LatentPolicyOutput(steps, latents, question_states=question_states, stop_logits=stop_logits)

    def _read_through(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, fed: torch.Tensor) -> torch.Tensor:
        """Hidden states of a question and the embeddings fed after it, in one pass."""
        prompt = self.get_input_embeddings()(input_ids)
        return self._run_assistant(
            F.pad(attention_mask, (0, fed.size(1)), value=1),
            token_ids=torch.cat([input_ids, latent_token_ids(self.assistant, fed)], dim=1),
            inputs_embeds=torch.cat([prompt, fed.to(prompt.dtype)], dim=1),
            use_cache=False,
        ).last_hidden_state

    def _read_question(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, rows: torch.Tensor
    ) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
        """Each question once; its KV cache, mask and last hidden state, repeated for the rows that share it."""
        cache = DynamicCache(config=self.assistant.config)
        hidden_states = self._run_assistant(
            attention_mask, input_ids=input_ids, use_cache=True, **{CACHE_ARGUMENT: cache}
        ).last_hidden_state
        cache.reorder_cache(rows)
        return cache, attention_mask[rows], hidden_states[rows, -1:]

    @torch.no_grad()
    def sample(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_samples: int | torch.Tensor = 1,
        deterministic: bool = False,
        seeds: list[int] | None = None,
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
                Whether to take the mean of every step instead of a sample, and to stop where that is likelier than
                not.
            seeds (`list[int]`, *optional*):
                One for each question, whose trajectories are then drawn as if it were alone. If `None`, torch's global
                generator goes on.

        Returns:
            [`LatentPolicyOutput`]: float32 latents with the densities that they were drawn from, for the sum of
            `num_samples` rows, a question's trajectories next to each other.
        """
        counts = torch.as_tensor(num_samples, device=input_ids.device).expand(input_ids.size(0))
        rows = torch.arange(input_ids.size(0), device=input_ids.device).repeat_interleave(counts)
        self.check_length(input_ids.size(1))
        if deterministic or seeds is None:
            noise, stop_draws = self._draw_randomness(len(rows), deterministic)
        else:
            drawn = []
            for seed, count in zip(seeds, counts.tolist(), strict=True):
                generator = torch.Generator(input_ids.device).manual_seed(seed)
                drawn.append(self._draw_randomness(count, generator=generator))
            noise, stop_draws = (None if part[0] is None else torch.cat(part) for part in zip(*drawn, strict=True))
        with eval_mode(self):
            return self._draw(input_ids, attention_mask, rows, noise, stop_draws)

    def _draw_randomness(
        self, num_rows: int, deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Noise of latents, shape `(num_rows, T, latent_dim)`, and numbers by which they stop, `(num_rows, T)`."""
        shape = num_rows, self.config.num_latents, self.config.latent_dim
        if deterministic:
            noise = torch.zeros(shape, device=self.device)
        elif self.config.latent_sampling == "parallel":
            noise = self.draw_noise(shape, generator)
        else:  # step by step, so that fewer latents are the same first ones
            step = shape[0], 1, shape[2]
            noise = torch.cat([self.draw_noise(step, generator) for _ in range(shape[1])], dim=1)
        if not self.config.learn_stop:
            return noise, None
        if deterministic:
            return noise, noise.new_full(shape[:2], 0.5)
        return noise, torch.rand(shape[:2], device=self.device, generator=generator)

    def draw_noise(self, shape: tuple[int, int, int], generator: torch.Generator | None = None) -> torch.Tensor:
        """Noise of shape `(B, T, latent_dim)` to draw latents with, as the density has it: `forward` takes it."""
        return self.latent_head.draw_noise(shape, self.device, generator)

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


AutoConfig.register(LatentPolicyConfig.model_type, LatentPolicyConfig)
AutoModel.register(LatentPolicyConfig, LatentPolicyModel)

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A language model that thinks in latents of its own, then answers in tokens."""

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicCache

from ..field_types import check_field_types
from ..option_docs import described
from .architectures import CACHE_ARGUMENT, attention_layers, embedding_table, ready_to_generate
from .hub import find_file, readable_damage
from .main_model import moved_right
from .soft_tokens import SoftTokenOptions, gumbel_noise, keep_candidates


THINKING_FILE = "thinking_config.json"


class SoftTokenLatents:
    """Latents that are mixtures of token embeddings, stored as the candidates' ids and perturbed log-probabilities."""

    needs_hidden_states = False
    is_scored = True

    def __init__(self, config: "ThinkingConfig", vocab_size: int):
        sizes = ("latent_top_k", "min_candidates", "mixture_size")
        for name in sizes:
            if (getattr(config, name) or 0) > vocab_size:
                raise ValueError(
                    f"`{name}` must be at most the vocabulary's {vocab_size} tokens, got {getattr(config, name)}."
                )
        self.config = config
        self.num_stored = config.mixture_size or config.latent_top_k or vocab_size

    def draw(self, logits: torch.Tensor, hidden_states: None, deterministic: bool) -> dict[str, torch.Tensor]:
        """One latent for each row: `token_ids` and `perturbed`, shape `(batch_size, K)`, -inf where fewer remain."""
        config = self.config
        candidates = keep_candidates(logits, config.latent_top_k, config.latent_top_p, config.min_candidates)
        perturbed = logits.float().log_softmax(-1).masked_fill(candidates.isneginf(), -torch.inf)
        if not deterministic:
            noise = gumbel_noise(perturbed.shape, perturbed.device, config.one_sided_noise)
            perturbed = perturbed + config.noise_scale * noise
        if self.num_stored == perturbed.size(-1):
            token_ids = torch.arange(self.num_stored, device=logits.device).expand_as(perturbed)
            return {"token_ids": token_ids, "perturbed": perturbed}
        perturbed, token_ids = perturbed.topk(self.num_stored, dim=-1)
        return {"token_ids": token_ids, "perturbed": perturbed}

    def embed(self, embed_tokens: nn.Module, token_ids: torch.Tensor, perturbed: torch.Tensor) -> torch.Tensor:
        """Embeddings of stored latents: `(..., K)` to `(..., hidden_size)`."""
        weights = (perturbed / self.config.soft_token_temperature).softmax(-1)
        if self.num_stored == embed_tokens.num_embeddings:  # in the order of the table: no copy of it for each latent
            table = embedding_table(embed_tokens)
            return weights.to(table.dtype) @ table
        mixed = embed_tokens(token_ids)
        return (weights.to(mixed.dtype).unsqueeze(-1) * mixed).sum(-2)


class HiddenStateLatents:
    """
    Latents that are the model's own last hidden states, stored as they are. Nothing is drawn, so nothing is scored.
    """

    needs_hidden_states = True
    is_scored = False

    def __init__(self, config: "ThinkingConfig", vocab_size: int):
        pass

    def draw(self, logits: torch.Tensor, hidden_states: torch.Tensor, deterministic: bool) -> dict[str, torch.Tensor]:
        return {"states": hidden_states}

    def embed(self, embed_tokens: nn.Module, states: torch.Tensor) -> torch.Tensor:
        return states.to(embed_tokens.weight.dtype, copy=True)  # CTRL scales in place what it is given


LATENT_TYPES = {"soft_tokens": SoftTokenLatents, "hidden_states": HiddenStateLatents}


@described
@dataclass
class ThinkingOptions(SoftTokenOptions):
    r"""
    How a language model thinks: fields of its [`ThinkingConfig`], and of the configurations of the trainers of such
    models.

    Parameters:
        latent_type (`str`, *optional*, defaults to `"soft_tokens"`):
            What a latent is. `"soft_tokens"`: a mixture of token embeddings, the model's own next-token distribution
            perturbed by Gumbel noise. `"hidden_states"`: the last hidden state of the position before, as it is
            (Coconut, [arXiv 2412.06769](https://huggingface.co/papers/2412.06769)): deterministic.
        num_latents (`int`, *optional*, defaults to `8`):
            Number T of latents, or the most there can be if `stop_at_end_marker`.
        start_marker (`str`, *optional*):
            Text whose tokens are put after the prompt, before the first latent.
        end_marker (`str`, *optional*):
            Text whose tokens are put after the last latent, before the answer.
        stop_at_end_marker (`bool`, *optional*, defaults to `False`):
            Whether thinking ends as soon as the first token of `end_marker` is the most likely one. A sample that has
            not ended after `num_latents` is made to, and is called invalid.
        noise_scale (`float`, *optional*, defaults to `1.0`):
            Factor η of the Gumbel noise.
        min_candidates (`int`, *optional*, defaults to `1`):
            Candidates there are at least.
    """

    latent_type: str = field(default="soft_tokens", metadata={"choices": list(LATENT_TYPES)})
    num_latents: int = 8
    start_marker: str | None = None
    end_marker: str | None = None
    stop_at_end_marker: bool = False
    noise_scale: float = 1.0
    min_candidates: int = 1

    def check_thinking(self) -> None:
        """Refuse values that do not fit, or not together."""
        if self.latent_type not in LATENT_TYPES:
            raise ValueError(f"`latent_type` must be one of {', '.join(LATENT_TYPES)}, got {self.latent_type!r}.")
        self.check_soft_tokens()
        for name in ("num_latents", "min_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not (self.noise_scale >= 0 and math.isfinite(self.noise_scale)):
            raise ValueError(f"`noise_scale` must be a number of at least 0, got {self.noise_scale}.")
        if self.latent_top_k is not None and self.latent_top_k < self.min_candidates:
            raise ValueError(
                f"`latent_top_k={self.latent_top_k}` must be at least `min_candidates={self.min_candidates}`."
            )
        if self.mixture_size is not None and self.mixture_size > self.min_candidates:
            raise ValueError(
                f"`mixture_size={self.mixture_size}` must be at most `min_candidates={self.min_candidates}`, so that "
                "there are as many candidates to choose from."
            )
        if not LATENT_TYPES[self.latent_type].is_scored:
            for name in (*SoftTokenOptions.__dataclass_fields__, "noise_scale", "min_candidates"):
                if getattr(self, name) != (default := ThinkingOptions.__dataclass_fields__[name].default):
                    raise ValueError(
                        f"`{name}={getattr(self, name)}` has no meaning for `latent_type={self.latent_type!r}`: those "
                        f"latents are not drawn. Leave it at {default}."
                    )
        if self.stop_at_end_marker and not self.end_marker:
            raise ValueError("`stop_at_end_marker=True` needs an `end_marker`, got none.")


@dataclass
class ThinkingConfig(ThinkingOptions):
    r"""
    How a language model thinks, [`ThinkingOptions`], and how it answers. It is saved beside the model, which is an
    ordinary causal LM.

    Args:
        chat_template_kwargs (`dict`, *optional*):
            Keyword arguments for the chat template, with which prompts are rendered.
        max_completion_length (`int`, *optional*):
            Tokens of an answer at most when the model was trained.

    Raises:
        `ValueError`: if a field does not fit.
    """

    chat_template_kwargs: dict | None = None
    max_completion_length: int | None = None

    def __post_init__(self):
        check_field_types(self)
        self.check_thinking()

    @property
    def has_anchors(self) -> bool:
        """Latents are what they are, no offsets."""
        return False

    @property
    def anchor_ids(self) -> None:
        return None

    def save_pretrained(self, save_directory: str) -> None:
        """Write `thinking_config.json` to a folder."""
        Path(save_directory, THINKING_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **hub) -> "ThinkingConfig":
        """
        Read it from a folder or the Hub.

        Args:
            pretrained_model_name_or_path (`str`):
                Folder or Hub id of the model.
            **hub:
                `revision`, `token` and `cache_dir`.

        Raises:
            `ValueError`: if there is none, or one of another version with fields unknown here.
        """
        path = find_file(pretrained_model_name_or_path, THINKING_FILE, **hub)
        if path is None:
            raise ValueError(
                f"{pretrained_model_name_or_path!r} has no {THINKING_FILE}: it was not trained to think, or not yet, "
                "as in Coconut's stage 0."
            )
        with readable_damage(pretrained_model_name_or_path):
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a dictionary, got {values!r:.80}.")
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise ValueError(f"{path} has fields that this version does not know: {', '.join(unknown)}.")
        return cls(**values)


@dataclass
class Thoughts:
    """
    What a batch of rows has thought.

    Args:
        latents (`dict[str, torch.Tensor]`):
            Stored latents, each of shape `(batch_size, T, ...)`: all that is needed to embed and to score them.
        lengths (`torch.Tensor` of shape `(batch_size,)`):
            How many of them each row has.
        has_ended (`torch.Tensor` of shape `(batch_size,)`):
            False for rows that were made to end at the cap.
    """

    latents: dict[str, torch.Tensor]
    lengths: torch.Tensor
    has_ended: torch.Tensor

    def with_rows(self, others: "Thoughts", rows: list[tuple[int, int]]) -> "Thoughts":
        """The same with other rows in some places: pairs of a row here and one of `others`."""
        pairs = torch.tensor(rows, dtype=torch.long, device=self.lengths.device).view(-1, 2)

        def put(values: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            if values.dim() > 1:
                longest = max(values.size(1), new.size(1))
                values, new = (nn.functional.pad(part, (0, 0, 0, longest - part.size(1))) for part in (values, new))
            return values.index_copy(0, pairs[:, 0], new[pairs[:, 1]])

        latents = {name: put(stored, others.latents[name]) for name, stored in self.latents.items()}
        return Thoughts(latents, put(self.lengths, others.lengths), put(self.has_ended, others.has_ended))


class Thinker:
    """
    Lets a causal LM think and answer.

    Args:
        config ([`ThinkingConfig`]):
            How it thinks.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, which has to know the markers.
        vocab_size (`int`):
            Tokens that it has logits for.

    Raises:
        `ValueError`: if a marker has unknown tokens, or a number of candidates is above the vocabulary.
    """

    def __init__(self, config: ThinkingConfig, processing_class: PreTrainedTokenizerBase, vocab_size: int):
        self.config = config
        self.latents = LATENT_TYPES[config.latent_type](config, vocab_size)
        self.start_ids = marker_ids(processing_class, config.start_marker, "start_marker")
        self.end_ids = marker_ids(processing_class, config.end_marker, "end_marker")
        pad, eos = processing_class.pad_token_id, processing_class.eos_token_id
        self.placeholder_id = eos if pad is None else pad  # where a list of token ids has a latent

    @torch.no_grad()
    def think(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        deterministic: bool = False,
    ) -> Thoughts:
        """
        Latents for a batch of prompts, each fed back before the next is drawn. Equal prompts are read once.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                Causal LM.
            input_ids (`torch.Tensor` of shape `(batch_size, prompt_length)`):
                Left-padded prompts, with the start marker.
            attention_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`):
                0 on padding.
            deterministic (`bool`, *optional*, defaults to `False`):
                Whether soft tokens are drawn without noise.

        Returns:
            [`Thoughts`]
        """
        config, embed_tokens = self.config, model.get_input_embeddings()
        check_positions(model.config, input_ids.size(1), config.num_latents + len(self.end_ids))
        prompts, rows = torch.stack([input_ids, attention_mask], 1).unique(dim=0, return_inverse=True)
        prompt_ids, mask = prompts.unbind(1)
        cache = DynamicCache(config=model.config.get_text_config())
        inputs, has_attention = {"input_ids": prompt_ids}, any(attention_layers(model))
        is_thinking = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        drawn, was_thinking = [], []
        while True:
            output = model(
                **inputs,
                attention_mask=mask if has_attention or not drawn else mask[:, -1:],
                position_ids=positions(mask)[:, -1:] if drawn else positions(mask),
                use_cache=True,
                logits_to_keep=1,
                output_hidden_states=self.latents.needs_hidden_states,
                **{CACHE_ARGUMENT: cache},
            )
            logits = output.logits[:, -1]
            states = output.hidden_states[-1][:, -1] if self.latents.needs_hidden_states else None
            if not drawn:
                cache.reorder_cache(rows)
                logits, mask = logits[rows], mask[rows]
                states = None if states is None else states[rows]
            if config.stop_at_end_marker:
                is_thinking = is_thinking & (logits.argmax(-1) != self.end_ids[0])
            if len(drawn) == config.num_latents or not is_thinking.any():
                break
            drawn.append(self.latents.draw(logits, states, deterministic))
            was_thinking.append(is_thinking)
            if len(drawn) == config.num_latents and not config.stop_at_end_marker:
                break
            # A row that has ended waits for the others behind its mask
            inputs = {"inputs_embeds": self.latents.embed(embed_tokens, **drawn[-1]).unsqueeze(1)}
            mask = torch.cat([mask, is_thinking.unsqueeze(1).to(mask)], dim=1)
        if not drawn:
            drawn = [self.latents.draw(logits, states, deterministic)]
            was_thinking = [is_thinking]  # nowhere
        return Thoughts(
            latents={name: torch.stack([latent[name] for latent in drawn], dim=1) for name in drawn[0]},
            lengths=torch.stack(was_thinking).sum(0),
            has_ended=~is_thinking if config.stop_at_end_marker else torch.ones_like(is_thinking),
        )

    @torch.no_grad()
    def answer(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        latent_embeds: torch.Tensor,
        lengths: torch.Tensor,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteria | None = None,
    ) -> torch.Tensor:
        """
        Tokens after given latents.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                Causal LM.
            input_ids (`torch.Tensor` of shape `(batch_size, prompt_length)`):
                Left-padded prompts, with the start marker.
            attention_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`):
                0 on padding.
            latent_embeds (`torch.Tensor` of shape `(batch_size, T, hidden_size)`):
                Embedded latents.
            lengths (`torch.Tensor` of shape `(batch_size,)`):
                How many of them each row has.
            generation_config ([`~transformers.GenerationConfig`]):
                How tokens are drawn. Nothing else is: the model's own generation configuration does not count.
            stopping_criteria ([`~transformers.StoppingCriteria`], *optional*):
                What else ends an answer.

        Returns:
            `torch.Tensor` of shape `(batch_size, answer_length)`: token ids, without the end marker.
        """
        embed_tokens = model.get_input_embeddings()
        thought, max_new_tokens = latent_embeds.size(1) + len(self.end_ids), generation_config.max_new_tokens
        check_positions(model.config, input_ids.size(1), thought, max_new_tokens)
        end = torch.tensor(self.end_ids, dtype=torch.long, device=input_ids.device).expand(len(input_ids), -1)
        prompt = embed_tokens(input_ids)
        embeds = torch.cat([prompt, latent_embeds.to(prompt.dtype)], dim=1)
        mask = nn.functional.pad(attention_mask, (0, latent_embeds.size(1)), value=1)
        mask, embeds = moved_right(latent_embeds.size(1) - lengths, mask, embeds)
        with ready_to_generate(model):
            return model.generate(
                inputs_embeds=torch.cat([embeds, embed_tokens(end)], dim=1),
                attention_mask=torch.cat([mask, torch.ones_like(end)], dim=1),
                generation_config=generation_config,
                stopping_criteria=StoppingCriteriaList([] if stopping_criteria is None else [stopping_criteria]),
            )

    def embed_prompt_and_completion(
        self,
        embed_tokens: nn.Module,
        prompt_ids: torch.Tensor,
        completion_ids: torch.Tensor,
        latents: dict[str, torch.Tensor],
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """
        `[prompt ; latents ; rest of the completion]` as embeddings, for a teacher-forced pass.

        Args:
            embed_tokens (`nn.Module`):
                Input embeddings.
            prompt_ids (`torch.Tensor` of shape `(batch_size, prompt_length)`):
                Left-padded prompts, with the start marker.
            completion_ids (`torch.Tensor` of shape `(batch_size, completion_length)`):
                Completions, right-padded, that begin with a placeholder for each latent of the row.
            latents (`dict[str, torch.Tensor]`):
                Stored latents, each of shape `(batch_size, T, ...)`.
            lengths (`torch.Tensor` of shape `(batch_size,)`):
                How many of them each row has.

        Returns:
            `torch.Tensor` of shape `(batch_size, prompt_length + completion_length, hidden_size)`.
        """
        latent_embeds = self.latents.embed(embed_tokens, **latents)
        longest = min(latent_embeds.size(1), completion_ids.size(1))
        completion = embed_tokens(completion_ids)
        first = torch.where(
            is_latent(lengths, longest).unsqueeze(2), latent_embeds[:, :longest], completion[:, :longest]
        )
        return torch.cat([embed_tokens(prompt_ids), first, completion[:, longest:]], dim=1)


def is_latent(lengths: torch.Tensor, num_positions: int) -> torch.Tensor:
    """Which of a completion's first positions are latents, shape `(batch_size, num_positions)`."""
    return torch.arange(num_positions, device=lengths.device) < lengths.unsqueeze(1)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions counted from the first real token, so that padding changes nothing."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def check_positions(
    config: PreTrainedConfig, prompt_length: int, thought_length: int, max_new_tokens: int = 0
) -> None:
    """Raise a `ValueError` if a prompt, a thought and an answer are more tokens than a model has positions for."""
    max_positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_positions is not None and prompt_length + thought_length + max_new_tokens > max_positions:
        raise ValueError(
            f"A prompt of {prompt_length} tokens, a thought of {thought_length} with its markers (`num_latents`) and "
            f"an answer of up to {max_new_tokens} (`max_completion_length`) together exceed the model's "
            f"{max_positions} positions. Shorten the prompts or the completion."
        )


def marker_ids(processing_class: PreTrainedTokenizerBase, marker: str | None, name: str) -> list[int]:
    """Tokens of a marker, which must be there."""
    if not marker:
        return []
    ids = processing_class(marker, add_special_tokens=False)["input_ids"]
    is_known = "".join(processing_class.decode(ids).split()) == "".join(marker.split())
    if not is_known or (re.fullmatch(r"<\|\S+\|>", marker) and len(ids) > 1):
        raise ValueError(
            f"`{name}` must be text that the tokenizer knows, as one token if it is a special one, got {marker!r}. "
            "Add it with `tokenizer.add_tokens` and resize the model's embeddings, or take another."
        )
    return ids

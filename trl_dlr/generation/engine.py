# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
What every decoder of the frozen main model has in common: prompts and latent embeddings in, completion tokens out.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..field_types import check_type
from ..models.architectures import embedding_device
from .text import StopStrings, decode_completions


def end_token_ids(generation_config: GenerationConfig, processing_class: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a completion, by a model's generation configuration or by its tokenizer."""
    eos, tokenizer_eos = generation_config.eos_token_id, processing_class.eos_token_id
    ids = [eos] if isinstance(eos, int) else list(eos or [])
    return ids if tokenizer_eos is None or tokenizer_eos in ids else [tokenizer_eos, *ids]


class DecodingEngine(ABC):
    """
    Decodes completions of a frozen causal LM from `[prompt embeddings ; latent embeddings]`.

    Args:
        main_model ([`~transformers.PreTrainedModel`]):
            Frozen causal LM. Of its generation configuration, only the end-of-sequence tokens count.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        max_new_tokens (`int`):
            Completion tokens at most.
        stop_strings (`str` or `list[str]`, *optional*):
            Texts that end a completion, which they are part of.

    Attributes:
        max_new_tokens (`int`):
            As given. See [`~DecodingEngine.limited_to`].
        num_decoded (`int`):
            Completions decoded since the start.
        num_completion_tokens (`int`):
            Their tokens, end of sequence included.
        num_truncated (`int`):
            Completions among them that ran into `max_new_tokens`.
        num_forward_tokens (`int`):
            Forward work since the start, in tokens of the main model.
    """

    def __init__(
        self,
        main_model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        max_new_tokens: int,
        stop_strings: str | list[str] | None = None,
    ):
        check_type("max_new_tokens", max_new_tokens, int)
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
        self.processing_class = processing_class
        self.max_new_tokens = max_new_tokens
        self.stop_strings = None if stop_strings is None else StopStrings(stop_strings, processing_class)
        self.max_positions = getattr(main_model.config.get_text_config(), "max_position_embeddings", None)
        self.max_model_len = None  # tokens that the decoder takes, if it has a limit of its own
        self.eos_token_ids = end_token_ids(main_model.generation_config, processing_class)
        if not self.eos_token_ids:
            raise ValueError(
                "`main_model` has no end-of-sequence token: neither its generation config nor `main_processing_class` "
                "sets one. Set `main_processing_class.eos_token`."
            )
        pad = processing_class.pad_token_id
        self.pad_token_id = self.eos_token_ids[0] if pad is None else pad
        self.num_decoded = 0
        self.num_completion_tokens = 0
        self.num_truncated = 0
        self.num_forward_tokens = 0

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: list[list[int]],
        latent_embeds: torch.Tensor | None = None,
        num_samples: torch.Tensor | None = None,
        num_latents: torch.Tensor | None = None,
        latent_ids: list[int] | None = None,
    ) -> list[list[int]]:
        """
        Args:
            prompt_ids (`list[list[int]]`):
                Rendered prompts in the main model's tokens.
            latent_embeds (`torch.Tensor` of shape `(num_rows, num_latents, hidden_size)`, *optional*):
                Embeddings that follow the prompts. Without them the main model answers alone.
            num_samples (`torch.Tensor` of shape `(len(prompt_ids),)`, *optional*):
                Rows per prompt, a prompt's next to each other; one each if not given. They sum to `num_rows`.
            num_latents (`torch.Tensor` of shape `(num_rows,)`, *optional*):
                Latents of each row, the first ones, if not all; at least one.
            latent_ids (`list[int]`, *optional*):
                Tokens that stand for the latents, see [`latent_token_ids`].

        Returns:
            `list[list[int]]`: completion tokens of each row, up to and with the end-of-sequence token or the one that
            completes a stop string, or `max_new_tokens` of them if neither came.
        """
        counts = [1] * len(prompt_ids) if num_samples is None else num_samples.tolist()
        rows = [index for index, count in enumerate(counts) for _ in range(count)]
        if not rows:
            return []
        if latent_embeds is not None:
            lengths = [latent_embeds.size(1)] * len(rows) if num_latents is None else num_latents.tolist()
            if min(lengths) < 1:
                raise ValueError(f"`num_latents` must be at least 1 in every row, got {lengths}.")
            latent_embeds = [embeds[:length] for embeds, length in zip(latent_embeds, lengths, strict=True)]
        num_latents = [0] if latent_embeds is None else [len(embeds) for embeds in latent_embeds]
        self.check_length(max(len(ids) for ids in prompt_ids), max(num_latents))
        completions = [self._until_end(ids) for ids in self._decode(prompt_ids, rows, latent_embeds, latent_ids)]
        read = set(rows) if self._shares_prompts(num_latents) else rows
        num_tokens = sum(map(len, completions))
        self.num_decoded += len(rows)
        self.num_completion_tokens += num_tokens
        self.num_truncated += sum(self.is_truncated(ids) for ids in completions)
        self.num_forward_tokens += sum(len(prompt_ids[index]) for index in read)
        self.num_forward_tokens += sum(num_latents) + num_tokens
        return completions

    def is_truncated(self, completion_ids: list[int]) -> bool:
        """Whether a completion was cut off after `max_new_tokens`, rather than ended."""
        return len(completion_ids) >= self.max_new_tokens and not self.is_finished(completion_ids)

    @contextmanager
    def limited_to(self, max_new_tokens: int | None) -> Iterator[None]:
        """Write at most `max_new_tokens` for the while, if they are given."""
        check_type("max_new_tokens", max_new_tokens, int | None)
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
        before = self.max_new_tokens
        self.max_new_tokens = before if max_new_tokens is None else max_new_tokens
        try:
            yield
        finally:
            self.max_new_tokens = before

    def _shares_prompts(self, num_latents: list[int]) -> bool:
        """Whether a prompt is encoded once however many trajectories, with so many latents each, follow it."""
        return False

    @abstractmethod
    def _decode(
        self,
        prompt_ids: list[list[int]],
        rows: list[int],
        latent_embeds: list[torch.Tensor] | None,
        latent_ids: list[int] | None,
    ) -> list[list[int]]:
        """
        Completion tokens of each row; `rows` names the prompt of each, and `latent_embeds` are `(num_latents,
        hidden_size)` of each. What follows an end of sequence or a stop string is cut off.
        """

    def check_length(self, prompt_length: int, num_latents: int, max_new_tokens: int | None = None) -> None:
        """Raise a `ValueError` if prompt, latents and completion together are more than can be decoded."""
        max_new_tokens = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        length = prompt_length + num_latents + max_new_tokens
        together = (
            f"A prompt of {prompt_length} tokens, `num_latents={num_latents}` and {max_new_tokens} new tokens "
            "(`max_completion_length` of a trainer, `max_new_tokens` of a reasoner) together exceed "
        )
        if self.max_positions is not None and length > self.max_positions:
            raise ValueError(
                f"{together}the main model's {self.max_positions} positions. Shorten the prompts or the completion."
            )
        if self.max_model_len is not None and length > self.max_model_len:
            raise ValueError(together + self._describe_limit(length))

    def _describe_limit(self, length: int) -> str:
        """What `max_model_len` is, and how to have it admit `length` tokens."""
        raise NotImplementedError

    def is_finished(self, ids: list[int]) -> bool:
        """Whether a completion came to its end, rather than to the limit of `max_new_tokens`."""
        return ids[-1] in self.eos_token_ids or (self.stop_strings is not None and self.stop_strings.are_in(ids))

    def decode(self, completion_ids: list[list[int]]) -> list[str]:
        """Completions as text, see [`decode_completions`]."""
        return decode_completions(completion_ids, self.processing_class, self.eos_token_ids)

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((index for index, token in enumerate(ids) if token in self.eos_token_ids), len(ids) - 1)
        return ids[: end + 1] if self.stop_strings is None else self.stop_strings.cut(ids[: end + 1])


def check_generation_kwargs(
    generation_kwargs: dict[str, Any], allowed: dict[str, Any], of: str, max_new_tokens: int
) -> None:
    """
    Refuse fields that cannot apply to completions of an engine, or hold what is not of their type.

    Args:
        generation_kwargs (`dict`):
            What a user set.
        allowed (`dict[str, Any]`):
            Fields that apply, with their types.
        of (`str`):
            What has those fields, for the message.
        max_new_tokens (`int`):
            Completion tokens at most.
    """
    if unfit := sorted(generation_kwargs.keys() - set(allowed)):
        raise ValueError(
            f"`generation_kwargs` must not set {', '.join(unfit)}: a row has one completion, which ends at an "
            "end-of-sequence token, a stop string or after `max_completion_length` tokens. Of the fields of "
            f"{of}, {', '.join(allowed)} apply."
        )
    for name, value in generation_kwargs.items():
        check_type(f"generation_kwargs[{name!r}]", value, allowed[name])
        if name in ("min_new_tokens", "min_tokens") and not 0 <= value <= max_new_tokens:
            raise ValueError(
                f"`generation_kwargs[{name!r}]` must be between 0 and the {max_new_tokens} tokens that a completion "
                f"has at most, got {value}."
            )


def check_sampling(generation_kwargs: dict[str, Any], fields: Iterable[str], remedy: str) -> None:
    """Refuse fields that only apply to sampled tokens, where decoding is greedy."""
    if unfit := [name for name in fields if name in generation_kwargs]:
        raise ValueError(
            f"`generation_kwargs` sets {', '.join(unfit)}, which {'has' if len(unfit) == 1 else 'have'} no meaning "
            f"for greedy decoding. {remedy}, or leave it out."
        )


def prompt_embeds(
    embed_tokens: nn.Module, prompt_ids: list[list[int]], rows: list[int], latent_embeds: list[torch.Tensor] | None
) -> list[torch.Tensor]:
    """
    `[prompt embeddings ; latent embeddings]` of each row, shape `(length, hidden_size)`, in the embeddings' dtype.
    """
    device = embedding_device(embed_tokens)
    embedded = {index: embed_tokens(torch.tensor(prompt_ids[index], device=device)) for index in set(rows)}
    if latent_embeds is None:
        return [embedded[index] for index in rows]
    return [
        torch.cat([embedded[index], latents.to(embedded[index])])
        for index, latents in zip(rows, latent_embeds, strict=True)
    ]

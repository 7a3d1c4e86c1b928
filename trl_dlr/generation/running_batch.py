# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Rows that a main model decodes together with transformers, while some end and others join."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..models.architectures import (
    CACHE_ARGUMENT,
    attention_layers,
    gaps_are_exact,
    ready_to_generate,
    takes_up_a_cache,
    text_backbone,
)
from .graphed_decoding import DecodingBatch, has_live_rope
from .text import StopStrings


@dataclass
class DecodingRow:
    """
    One row of a [`RunningBatch`]: when it ends, and what has been written.

    Args:
        max_new_tokens (`int`):
            Tokens at most.
        stop_strings ([`StopStrings`], *optional*):
            Texts that end it.
        temperature (`float`, *optional*, defaults to `0.0`):
            Of its tokens. With 0 they are the likeliest ones.
        generator (`torch.Generator`, *optional*):
            Where a temperature's randomness comes from.
        on_token (`Callable[[int], None]`, *optional*):
            Called with each token.
    """

    max_new_tokens: int
    stop_strings: StopStrings | None = None
    temperature: float = 0.0
    generator: torch.Generator | None = None
    on_token: Callable[[int], None] | None = None
    completion_ids: list[int] = field(default_factory=list, init=False)
    has_ended: bool = field(default=False, init=False)  # may be set from outside, for a row that nobody waits for

    def take(self, token: int, eos_token_ids: list[int]) -> None:
        """Add the next token, which may end the row."""
        self.completion_ids.append(token)
        self.has_ended = (
            self.has_ended
            or token in eos_token_ids
            or len(self.completion_ids) >= self.max_new_tokens
            or (self.stop_strings is not None and self.stop_strings.are_at_the_end(self.completion_ids))
        )
        if self.on_token is not None:
            self.on_token(token)


def rows_can_join(model: PreTrainedModel) -> bool:
    """
    Whether rows can be added to others that are being decoded: not to states that have no length, nor where a long row
    changes how the others' positions are read.
    """
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return not has_live_rope(model) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    )


class RunningBatch:
    """
    Rows that are decoded together, each from its own prompt and latents.

    All rows have the same number of positions, padding before the prompts included. `generate` writes on until half of
    them have ended, or something else is due, and goes on with those that are left, so that what has ended costs
    little.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Frozen causal LM.
        generation_kwargs (`dict`):
            Fields of [`~transformers.GenerationConfig`], end and padding tokens included.
        batch ([`DecodingBatch`]):
            Prompts and latents.
        rows (`list[DecodingRow]`):
            What is written for each row of `batch`.
    """

    def __init__(self, model: PreTrainedModel, generation_kwargs: dict, batch: DecodingBatch, rows: list[DecodingRow]):
        self.model = model
        self.generation_kwargs = generation_kwargs
        self.rows = list(rows)
        self.completion_ids = batch.prompt_ids.new_empty(len(rows), 0)
        self.cache = DynamicCache(config=model.config)
        self.token_ids, self.mask = batch.token_ids, batch.mask  # of all positions, the last one not in the cache yet
        self.embeds = model.get_input_embeddings()(batch.prompt_ids)[batch.prompt_of]
        if batch.latents is not None:
            self.embeds = torch.cat([self.embeds, batch.latents], dim=1)
        if batch.has_gaps and not gaps_are_exact(model):  # each row reads its prompt by itself
            index, self.mask = batch.without_gaps()
            self.token_ids = self.token_ids.gather(1, index)
            self.embeds = self.embeds.gather(1, index.unsqueeze(2).expand_as(self.embeds))
        elif batch.latents is not None and takes_up_a_cache(model):
            inputs = batch.prompt_inputs()
            if "position_ids" not in inspect.signature(model.forward).parameters:
                del inputs["position_ids"]  # `generate` will give it none either
            text_backbone(model)(**inputs, **{CACHE_ARGUMENT: self.cache}, use_cache=True)
            self.cache.reorder_cache(batch.prompt_of)

    def __len__(self) -> int:
        return len(self.rows)

    def advance(self, is_due: Callable[[], bool] = lambda: False) -> None:
        """
        Write at least one token of every row, until half of the rows have ended or, after any token, `is_due`. Rows
        that have ended leave.
        """
        done = self.completion_ids.size(1)
        limits = {
            "max_new_tokens": max(row.max_new_tokens - len(row.completion_ids) for row in self.rows),
            "min_new_tokens": max(self.generation_kwargs["min_new_tokens"] - done, 0),
        }
        ends = RowsEnd(self.rows, self.generation_kwargs["eos_token_id"], done, is_due)
        # `generate` wants embeddings of the full length; those in the cache are only counted
        with ready_to_generate(self.model, self.token_ids):
            self.completion_ids = self.model.generate(
                input_ids=self.completion_ids,
                inputs_embeds=self.embeds,
                attention_mask=self.mask,
                **{CACHE_ARGUMENT: self.cache},
                generation_config=GenerationConfig(**{**self.generation_kwargs, **limits}),
                stopping_criteria=StoppingCriteriaList([ends]),
                logits_processor=LogitsProcessorList([SampledRows(self.rows)]),
            )
        new_ids = self.completion_ids[:, done:]
        self.token_ids = torch.cat([self.token_ids, new_ids], dim=1)
        self.embeds = torch.cat([self.embeds, self.model.get_input_embeddings()(new_ids)], dim=1)
        self.mask = F.pad(self.mask, (0, new_ids.size(1)), value=1)
        kept = [index for index, row in enumerate(self.rows) if not row.has_ended]
        if len(kept) < len(self.rows):
            self._keep(kept)

    def _keep(self, kept: list[int]) -> None:
        self.rows = [self.rows[index] for index in kept]
        index = torch.tensor(kept, device=self.mask.device, dtype=torch.long)
        self.completion_ids, self.token_ids = self.completion_ids[index], self.token_ids[index]
        self.embeds, self.mask = self.embeds[index], self.mask[index]
        self._forget_the_gone()
        if not any(attention_layers(self.model)):  # which `generate` then reads anew
            self.cache = DynamicCache(config=self.model.config)
        elif kept:
            self.cache.reorder_cache(index)

    def join(self, other: "RunningBatch") -> None:
        """
        Take the rows of another batch of the same model, see [`rows_can_join`]. Both have some, and each has written a
        token at least.
        """
        length = max(batch.mask.size(1) - batch.num_empty for batch in (self, other))
        for batch in (self, other):
            batch._resize(length)
        self._forget_the_gone()
        num_written = max(self.completion_ids.size(1), other.completion_ids.size(1))
        pad = self.generation_kwargs["pad_token_id"]
        written = [
            F.pad(ids, (num_written - ids.size(1), 0), value=pad)
            for ids in (self.completion_ids, other.completion_ids)
        ]
        self.rows += other.rows
        self.completion_ids = torch.cat(written)
        for name in ("token_ids", "mask", "embeds"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        for layer, added in zip(self.cache.layers, other.cache.layers, strict=True):
            if layer.is_initialized:  # some read those of another layer
                layer.keys = torch.cat([layer.keys, added.keys])
                layer.values = torch.cat([layer.values, added.values])

    def _forget_the_gone(self) -> None:
        """Keep no more of what was written than the rows that are there have, in a batch that may never be empty."""
        longest = max((len(row.completion_ids) for row in self.rows), default=0)
        self.completion_ids = self.completion_ids[:, max(self.completion_ids.size(1) - longest, 0) :]

    @property
    def num_empty(self) -> int:
        """Positions before all of the prompts, which only rows that have left had needed."""
        return int(self.mask.argmax(1).min())

    def _resize(self, length: int) -> None:
        """Have so many positions, with more or less padding before the prompts."""
        more = length - self.mask.size(1)
        self.token_ids, self.mask = (F.pad(part, (more, 0)) for part in (self.token_ids, self.mask))
        self.embeds = F.pad(self.embeds, (0, 0, more, 0))
        for layer in self.cache.layers:
            if not layer.is_initialized:
                continue
            missing = more
            if layer.is_sliding:  # of the cached positions, the last ones alone
                layer.cumulative_length += more
                missing = min(layer.cumulative_length, layer.sliding_window - 1) - layer.keys.size(2)
            layer.keys, layer.values = (F.pad(part, (0, 0, missing, 0)) for part in (layer.keys, layer.values))


class RowsEnd(StoppingCriteria):
    """
    Hands tokens to their rows, and stops those that have ended: all of them, when half have or something else is due.

    Args:
        rows (`list[DecodingRow]`):
            Rows.
        eos_token_ids (`list[int]`):
            Tokens that end one.
        num_read (`int`):
            Tokens of each row that have been handed to it before.
        is_due (`Callable[[], bool]`):
            Whether decoding is to be interrupted.
    """

    def __init__(self, rows: list[DecodingRow], eos_token_ids: list[int], num_read: int, is_due: Callable[[], bool]):
        self.rows = rows
        self.eos_token_ids = eos_token_ids
        self.num_read = num_read
        self.is_due = is_due

    def __call__(self, input_ids, scores, **kwargs):
        for row, new_ids in zip(self.rows, input_ids[:, self.num_read :].tolist(), strict=True):
            for token in new_ids:
                if not row.has_ended:
                    row.take(token, self.eos_token_ids)
        self.num_read = input_ids.size(1)
        has_ended = [row.has_ended for row in self.rows]
        is_over = 2 * sum(has_ended) >= len(self.rows) or self.is_due()
        return torch.tensor([ended or is_over for ended in has_ended], device=input_ids.device)


class SampledRows(LogitsProcessor):
    """
    Has the likeliest token be a sample in the rows that have a temperature, by the Gumbel-max trick: each row draws
    with a generator of its own, whatever else is in the batch.

    Args:
        rows (`list[DecodingRow]`):
            Rows.
    """

    def __init__(self, rows: list[DecodingRow]):
        self.rows = rows

    def __call__(self, input_ids, scores):
        for index, row in enumerate(self.rows):
            if row.temperature > 0:
                uniform = torch.rand(scores.size(1), generator=row.generator, dtype=torch.float64)
                gumbel = -(-uniform.clamp(min=1e-300).log()).log()
                scores[index] += row.temperature * gumbel.to(scores)
        return scores

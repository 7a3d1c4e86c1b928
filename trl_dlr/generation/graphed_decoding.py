# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Greedy decoding on a GPU, where launching a step's many small kernels takes several times as long as running them.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from ..models.architectures import CACHE_ARGUMENT, gaps_are_exact, has_per_layer_inputs


ROUNDING = 64  # of the length, so that prompts that are a little longer do not need another graph
LIVE_ROPE = ("dynamic", "longrope")  # whose frequencies follow from the longest position, which the CPU asks for
PLAIN_FIELDS = {"do_sample", "min_new_tokens", "stop_strings"}
TOKENS_BETWEEN_CHECKS = 16  # whether all rows have ended: the GPU is waited for


def can_be_graphed(model: PreTrainedModel) -> bool:
    """Whether a decoding step of `model` is the same kernels each time, with nothing that the CPU has to know."""
    quantizer = getattr(model, "hf_quantizer", None)
    return (
        model._can_compile_fullgraph
        and model.config._attn_implementation == "sdpa"
        and len(set(getattr(model, "hf_device_map", {}).values())) <= 1
        and not has_per_layer_inputs(model)
        and (quantizer is None or quantizer.is_compileable)
        and not has_live_rope(model)
        and gaps_are_exact(model)  # not with sliding windows, which count positions on the CPU
    )


def has_live_rope(model: PreTrainedModel) -> bool:
    """Whether positions are read otherwise where a batch is long."""
    return any(kind in str(getattr(module, "rope_type", "")) for module in model.modules() for kind in LIVE_ROPE)


def is_plainly_greedy(generation_kwargs: dict[str, Any]) -> bool:
    """Whether a token is the likeliest after those before it, by nothing but the main model."""
    return not generation_kwargs.get("do_sample") and generation_kwargs.keys() <= PLAIN_FIELDS


def static_length(length: int) -> int:
    """Positions of a static cache for `length` tokens."""
    return ROUNDING * -(-length // ROUNDING)


@dataclass
class DecodingBatch:
    """
    Rows that are decoded together.

    Args:
        prompt_ids (`torch.Tensor` of shape `(num_prompts, prompt_length)`):
            Left-padded prompts, each once.
        prompt_mask (`torch.Tensor` of shape `(num_prompts, prompt_length)`):
            0 on padding.
        prompt_of (`torch.Tensor` of shape `(num_rows,)`):
            Prompt of each row.
        latents (`torch.Tensor` of shape `(num_rows, num_latents, hidden_size)`, *optional*):
            Embeddings after the prompts. Rows with fewer have them on the right, after a masked gap: the first token
            is read off the last one.
        latent_mask (`torch.Tensor` of shape `(num_rows, num_latents)`, *optional*):
            0 where a row has none.
        latent_ids (`torch.Tensor` of shape `(num_rows, num_latents)`, *optional*):
            Tokens that stand for the latents.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    prompt_of: torch.Tensor
    latents: torch.Tensor | None = None
    latent_mask: torch.Tensor | None = None
    latent_ids: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        return len(self.prompt_of)

    @property
    def mask(self) -> torch.Tensor:
        """Of each row's prompt and latents, shape `(num_rows, prompt_length + num_latents)`."""
        mask = self.prompt_mask[self.prompt_of]
        return mask if self.latents is None else torch.cat([mask, self.latent_mask], dim=1)

    @property
    def token_ids(self) -> torch.Tensor:
        """Of each row's prompt and latents, shape `(num_rows, prompt_length + num_latents)`."""
        ids = self.prompt_ids[self.prompt_of]
        return ids if self.latents is None else torch.cat([ids, self.latent_ids], dim=1)

    @property
    def length(self) -> int:
        """Positions of prompt and latents, padding included."""
        return self.prompt_ids.size(1) + (0 if self.latents is None else self.latents.size(1))

    def padded(self, num_rows: int) -> "DecodingBatch":
        """The same rows, and the last one again up to `num_rows`."""
        rows = torch.arange(num_rows, device=self.prompt_of.device).clamp(max=self.num_rows - 1)
        of_rows = self.latents, self.latent_mask, self.latent_ids
        latent_parts = (None if part is None else part[rows] for part in of_rows)
        return DecodingBatch(self.prompt_ids, self.prompt_mask, self.prompt_of[rows], *latent_parts)

    @property
    def has_gaps(self) -> bool:
        """Whether rows have different numbers of latents, so that some have nothing between prompt and latents."""
        return self.latents is not None and not bool(self.latent_mask.all())

    def without_gaps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Where each row's prompt and latents come from, in positions that include the gap, so that all padding is before
        them, and their mask; both of shape `(num_rows, prompt_length + num_latents)`.
        """
        gap = (self.latent_mask == 0).sum(1, keepdim=True)
        place = torch.arange(self.length, device=gap.device)
        index = torch.where(place < self.prompt_ids.size(1) + gap, place - gap, place)
        return index.clamp(min=0), self.mask.gather(1, index.clamp(min=0)) * (index >= 0)

    def prompt_inputs(self) -> dict[str, torch.Tensor]:
        """Inputs of the model that read the prompts, each once."""
        position_ids = (self.prompt_mask.cumsum(-1) - 1).clamp(min=0)
        return {"input_ids": self.prompt_ids, "attention_mask": self.prompt_mask, "position_ids": position_ids}


class GraphedDecoding:
    """
    Greedy decoding of a fixed number of rows with a static cache. A step is captured as a CUDA graph when rows are
    decoded for the first time, and replayed from then on. On a CPU it is called.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Frozen causal LM, see [`can_be_graphed`].
        num_rows (`int`):
            Rows that are decoded together.
        length (`int`):
            Tokens of the longest prompt, latents and completion together.
        eos_token_ids (`list[int]`):
            Tokens that end a row.
        min_new_tokens (`int`):
            Tokens before which none of them is chosen.
    """

    def __init__(
        self, model: PreTrainedModel, num_rows: int, length: int, eos_token_ids: list[int], min_new_tokens: int
    ):
        self.model = model
        self.weights_at = addresses(model)  # where a graph looks for them
        self.length = static_length(length)
        self.min_new_tokens = min_new_tokens
        self.cache = StaticCache(config=model.config, max_cache_len=self.length)
        self.graph = None
        with torch.device(model.device):
            self.eos_token_ids = torch.tensor(eos_token_ids)  # of which some may be no tokens of the model
            self.is_visible = torch.zeros(num_rows, 1, 1, self.length, dtype=torch.bool)  # of the cache's positions
            self.position = torch.zeros(1, dtype=torch.long)  # in the cache, of the token that is fed
            self.position_ids = torch.zeros(num_rows, 1, dtype=torch.long)  # of that token in each row
            self.num_new = torch.zeros(1, dtype=torch.long)
            self.token_ids = torch.zeros(num_rows, 1, dtype=torch.long)
            self.completion_ids = torch.zeros(num_rows, self.length, dtype=torch.long)
            self.has_ended = torch.zeros(num_rows, dtype=torch.bool)

    def fits(self, num_rows: int, length: int) -> bool:
        """Whether it has room for these rows, and not twice as much, and the model's weights are where they were."""
        has_room = num_rows <= len(self.token_ids) <= 2 * num_rows and length <= self.length
        return has_room and self.weights_at == addresses(self.model)

    def decode(
        self, batch: DecodingBatch, max_new_tokens: int, is_over: Callable[[torch.Tensor], bool]
    ) -> torch.Tensor:
        """
        Args:
            batch ([`DecodingBatch`]):
                Rows that fit.
            max_new_tokens (`int`):
                Tokens at most.
            is_over (`Callable[[torch.Tensor], bool]`):
                Whether the rows that no end token has ended need no more tokens, asked every few tokens with what they
                have.

        Returns:
            `torch.Tensor` of shape `(num_rows, num_new_tokens)`: tokens, any after a row's end.
        """
        with torch.cuda.device_of(self.token_ids):
            self._read(batch.padded(len(self.token_ids)))
            num_tokens = 1
            while num_tokens < max_new_tokens:
                if num_tokens % TOKENS_BETWEEN_CHECKS == 0:
                    going_on = self.completion_ids[~self.has_ended, :num_tokens]
                    if len(going_on) == 0 or is_over(going_on):
                        break
                self._advance()
                num_tokens += 1
        return self.completion_ids[: batch.num_rows, :num_tokens]

    def _read(self, batch: DecodingBatch) -> None:
        """Fill the cache with prompts, each read once, and latents, and choose the first tokens."""
        prompts = DynamicCache(config=self.model.config)
        logits = self._logits(prompts, **batch.prompt_inputs())[batch.prompt_of]
        self.cache.reset()
        for layer, prompt in zip(self.cache.layers, prompts.layers, strict=True):
            layer.update(prompt.keys[batch.prompt_of], prompt.values[batch.prompt_of])
        del prompts
        mask, num_read = batch.mask, batch.length
        self.is_visible.zero_()
        self.is_visible[:, 0, 0, :num_read] = mask.bool()
        if batch.latents is not None:
            num_latents = batch.latents.size(1)
            index = torch.arange(self.length, device=mask.device)
            is_before = index <= index[num_read - num_latents : num_read].unsqueeze(1)  # (num_latents, length)
            inputs = {"inputs_embeds": batch.latents, "attention_mask": self.is_visible & is_before}
            inputs["position_ids"] = (mask.cumsum(-1) - 1)[:, -num_latents:]
            logits = self._logits(self.cache, **inputs)
        self.position.fill_(num_read)
        self.position_ids.copy_(mask.sum(1, keepdim=True))
        self.num_new.zero_()
        self.has_ended.zero_()
        self._choose(logits)

    def _logits(self, cache: DynamicCache | StaticCache, **inputs) -> torch.Tensor:
        return self.model(**inputs, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1).logits[:, -1]

    def _choose(self, logits: torch.Tensor) -> None:
        if self.min_new_tokens > 0:
            tokens = torch.arange(logits.size(1), device=logits.device)
            is_end = (tokens == self.eos_token_ids.unsqueeze(1)).any(dim=0)
            logits = logits.masked_fill(is_end & (self.num_new < self.min_new_tokens), -torch.inf)
        self.token_ids.copy_(logits.argmax(-1, keepdim=True))
        self.completion_ids.index_copy_(1, self.num_new, self.token_ids)
        self.has_ended |= (self.token_ids == self.eos_token_ids).any(dim=1)
        self.num_new += 1

    def _step(self) -> None:
        """Feed the chosen tokens and choose the next, in tensors that stay where they are."""
        self.is_visible.index_fill_(3, self.position, True)
        inputs = {"input_ids": self.token_ids, "attention_mask": self.is_visible, "position_ids": self.position_ids}
        logits = self._logits(self.cache, **inputs)
        self.position += 1
        self.position_ids += 1
        self._choose(logits)

    def _advance(self) -> None:
        if self.model.device.type == "cpu":
            self._step()
        elif self.graph is not None:
            self.graph.replay()
        else:
            # A step on a stream of its own first, in which libraries set up what must not be captured
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = self._capture()

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step()
        except RuntimeError as error:
            raise RuntimeError(
                f"A decoding step of {type(self.model).__name__} could not be captured as a CUDA graph ({error}). "
                "Load the main model with `attn_implementation='eager'` (`main_model_init_kwargs`), which decodes "
                "without one."
            ) from error
        return graph


def addresses(model: PreTrainedModel) -> tuple[int, ...]:
    """Where the model's weights and buffers are."""
    return tuple(tensor.data_ptr() for tensor in itertools.chain(model.parameters(), model.buffers()))

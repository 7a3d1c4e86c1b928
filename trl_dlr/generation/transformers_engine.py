# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The frozen main model, decoding with transformers."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ..models.cache import CACHE_ARGUMENT
from .engine import DecodingEngine


class TransformersEngine(DecodingEngine):
    """
    Decodes with [`~transformers.GenerationMixin.generate`].

    A prompt that several trajectories share is encoded once, and its KV cache repeated for each of them. Prompts of
    similar length are decoded together, and rows that have finished leave the batch.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Frozen causal LM.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        max_new_tokens (`int`):
            Completion tokens at most.
        generation_kwargs (`dict`, *optional*):
            Further fields of [`~transformers.GenerationConfig`]. Decoding is greedy unless they say otherwise.
        batch_size (`int`, *optional*):
            Rows decoded together at most. If `None`, all.
    """

    shares_prompts = True

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        max_new_tokens: int,
        generation_kwargs: dict | None = None,
        batch_size: int | None = None,
    ):
        super().__init__(model.config, model.generation_config, processing_class, max_new_tokens)
        self.model = model
        self.processing_class = processing_class
        self.batch_size = batch_size
        fixed = {"max_new_tokens", "num_return_sequences", "num_beams", "pad_token_id", "eos_token_id"}
        if taken := sorted(fixed & (generation_kwargs or {}).keys()):
            raise ValueError(
                f"`generation_kwargs` must not set {', '.join(taken)}: a row has one completion, which ends at an "
                "end-of-sequence token or after `max_completion_length` tokens."
            )
        # `generate` would take from the model's own generation config what is not said here
        neutral = {"do_sample": False, "min_new_tokens": 0, "repetition_penalty": 1.0}
        if (generation_kwargs or {}).get("do_sample"):
            neutral |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        self.generation_kwargs = {**neutral, **(generation_kwargs or {})}
        self.generation_kwargs |= {"pad_token_id": self.pad_token_id, "eos_token_id": self.eos_token_ids}
        GenerationConfig(**self.generation_kwargs)  # which refuses what does not fit, before anything is decoded
        self._half_finished = HalfFinished(self.eos_token_ids)

    def _decode(self, prompt_ids, rows, latent_embeds):
        by_length = sorted(range(len(rows)), key=lambda place: (len(prompt_ids[rows[place]]), rows[place]))
        batch_size = self.batch_size or len(rows)
        completions = [[]] * len(rows)
        with contiguous_lm_head(self.model):
            for start in range(0, len(rows), batch_size):
                places = by_length[start : start + batch_size]
                batch_embeds = None if latent_embeds is None else [latent_embeds[place] for place in places]
                decoded = self._decode_batch(prompt_ids, [rows[place] for place in places], batch_embeds)
                for place, ids in zip(places, decoded, strict=True):
                    completions[place] = ids
        return completions

    def _decode_batch(
        self, prompt_ids: list[list[int]], rows: list[int], latent_embeds: list[torch.Tensor] | None
    ) -> list[list[int]]:
        device = self.model.device
        prompts = [prompt_ids[place] for place in dict.fromkeys(rows)]  # each once, in the order of the rows
        order = {place: i for i, place in enumerate(dict.fromkeys(rows))}
        prompt_of = torch.tensor([order[place] for place in rows], device=device)
        length = max(map(len, prompts))
        input_ids = torch.tensor([[self.pad_token_id] * (length - len(ids)) + ids for ids in prompts], device=device)
        mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        embeds = self.model.get_input_embeddings()(input_ids)
        cache = DynamicCache(config=self.model.config)
        if latent_embeds is not None:
            self.model.base_model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                **{CACHE_ARGUMENT: cache},
                use_cache=True,
            )
            cache.reorder_cache(prompt_of)
            # Rows with fewer latents have them on the right, after a masked gap: the first token is read off the last one
            is_latent = [mask.new_ones(len(latents)) for latents in latent_embeds]
            latents = pad_sequence(latent_embeds, batch_first=True, padding_side="left")
            embeds = torch.cat([embeds[prompt_of], latents.to(embeds)], dim=1)
            mask = torch.cat([mask[prompt_of], pad_sequence(is_latent, True, padding_side="left")], dim=1)
        else:
            embeds, mask = embeds[prompt_of], mask[prompt_of]

        completions = [[]] * len(rows)
        alive = torch.arange(len(rows), device=device)  # rows that have not finished
        completion_ids = input_ids.new_empty(len(rows), 0)
        eos = torch.tensor(self.eos_token_ids, device=device)
        while True:
            done = completion_ids.size(1)
            limits = {
                "max_new_tokens": self.max_new_tokens - done,
                "min_new_tokens": max(self.generation_kwargs["min_new_tokens"] - done, 0),
            }
            # `generate` wants embeddings of the full length; those in the cache are only counted
            completion_ids = self.model.generate(
                input_ids=completion_ids,
                inputs_embeds=embeds,
                attention_mask=mask,
                **{CACHE_ARGUMENT: cache},
                generation_config=GenerationConfig(**{**self.generation_kwargs, **limits}),
                stopping_criteria=StoppingCriteriaList([self._half_finished]),
            )
            is_finished = torch.isin(completion_ids, eos).any(dim=1)
            if completion_ids.size(1) >= self.max_new_tokens:
                is_finished[:] = True
            for row, ids in zip(alive[is_finished].tolist(), completion_ids[is_finished].tolist(), strict=True):
                completions[row] = ids
            if is_finished.all():
                return completions
            keep = (~is_finished).nonzero().squeeze(1)
            alive, completion_ids = alive[keep], completion_ids[keep]
            cache.reorder_cache(keep)
            new_ids = completion_ids[:, done:]
            embeds = torch.cat([embeds[keep], self.model.get_input_embeddings()(new_ids)], dim=1)
            mask = torch.cat([mask[keep], mask.new_ones(new_ids.shape)], dim=1)

    @torch.no_grad()
    def stream(
        self, prompt_ids: list[int], latent_embeds: torch.Tensor, max_new_tokens: int | None = None
    ) -> Iterator[str]:
        """
        Decode one row and yield its text piece by piece.

        Args:
            prompt_ids (`list[int]`):
                Rendered prompt in the main model's tokens.
            latent_embeds (`torch.Tensor` of shape `(1, num_latents, hidden_size)`):
                Embeddings that follow the prompt.
            max_new_tokens (`int`, *optional*):
                Tokens at most, if not as many as usual.
        """
        with self.limited_to(max_new_tokens):
            self.check_length(len(prompt_ids), latent_embeds.size(1))
            limit = self.max_new_tokens
        embeds = self.model.get_input_embeddings()(torch.tensor([prompt_ids], device=self.model.device))
        embeds = torch.cat([embeds, latent_embeds.to(embeds)], dim=1)
        pieces, failure = TextIteratorStreamer(self.processing_class, skip_special_tokens=True), []
        is_wanted = StillWanted()

        def write():
            try:
                self.model.generate(
                    inputs_embeds=embeds,
                    attention_mask=embeds.new_ones(embeds.shape[:2], dtype=torch.long),
                    generation_config=GenerationConfig(**self.generation_kwargs, max_new_tokens=limit),
                    stopping_criteria=StoppingCriteriaList([is_wanted]),
                    streamer=pieces,
                )
            except Exception as error:  # which would end unseen in the thread, with the reader waiting
                failure.append(error)
                pieces.end()

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        try:
            yield from (piece for piece in pieces if piece)
        finally:  # also when the reader has gone
            is_wanted.is_over = True
            writer.join()
        if failure:
            raise failure[0]


@contextmanager
def contiguous_lm_head(model: PreTrainedModel) -> Iterator[None]:
    """
    A slice of hidden states times a frozen head is a batched product in torch: it copies the head once per row, and
    rounds differently than the product with a head that is not frozen. Here the head is given whole tensors.
    """
    lm_head = model.get_output_embeddings()
    contiguous = lm_head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        contiguous.remove()


class StillWanted(StoppingCriteria):
    """Stops a row that nobody reads any more."""

    is_over = False

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.size(0),), self.is_over, device=input_ids.device)


class HalfFinished(StoppingCriteria):
    """Stops a batch when half of its rows have ended, so that the others go on without them."""

    def __init__(self, eos_token_ids: list[int]):
        self.eos_token_ids = eos_token_ids

    def __call__(self, input_ids, scores, **kwargs):
        eos = torch.tensor(self.eos_token_ids, device=input_ids.device)
        is_finished = torch.isin(input_ids, eos).any(dim=1)
        return torch.full_like(is_finished, 2 * int(is_finished.sum()) >= len(is_finished))

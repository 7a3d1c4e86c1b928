# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The frozen main model, decoding with transformers."""

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ..field_types import check_type
from ..models.architectures import (
    check_family,
    embedding_device,
    gaps_are_exact,
    latent_token_ids,
    ready_to_generate,
    takes_up_a_cache,
)
from ..models.main_model import contiguous_lm_head
from .engine import DecodingEngine, check_generation_kwargs, check_sampling
from .graphed_decoding import DecodingBatch, GraphedDecoding, can_be_graphed, is_plainly_greedy
from .running_batch import DecodingRow, RowsEnd, RunningBatch
from .text import control_ids


# Of `GenerationConfig`, what applies to rows that are decoded together, in several passes, one token after the other
SAMPLING_FIELDS = {
    **dict.fromkeys(("temperature", "top_p"), float | None),
    "top_k": int | None,
    **dict.fromkeys(("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"), float | None),
}
GENERATION_FIELDS = {
    "do_sample": bool | None,
    **SAMPLING_FIELDS,
    "stop_strings": Any,
    "min_new_tokens": int,
    "repetition_penalty": float | None,
    "no_repeat_ngram_size": int | None,
    "bad_words_ids": Any,
    "suppress_tokens": Any,
    "sequence_bias": Any,
    "renormalize_logits": bool | None,
    "remove_invalid_values": bool | None,
}


class TransformersEngine(DecodingEngine):
    """
    Decodes with [`~transformers.GenerationMixin.generate`].

    A prompt that several trajectories share is encoded once, and its cache repeated for each of them, where that is
    exact: with sliding windows or recurrent layers not if they have different numbers of latents. Prompts of
    similar length are decoded together, and rows that have finished leave the batch. On a GPU, greedy decoding of a
    model that allows it is a CUDA graph instead, see [`GraphedDecoding`].

    Args:
        main_model ([`~transformers.PreTrainedModel`]):
            Frozen causal LM.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        max_new_tokens (`int`):
            Completion tokens at most.
        generation_kwargs (`dict`, *optional*):
            Further fields of [`~transformers.GenerationConfig`]. Decoding is greedy unless they say otherwise: of the
            model's own generation configuration, only the end-of-sequence tokens count.
        batch_size (`int`, *optional*):
            Rows decoded together at most. If `None`, all.
    """

    def __init__(
        self,
        main_model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        max_new_tokens: int,
        generation_kwargs: dict | None = None,
        batch_size: int | None = None,
    ):
        generation_kwargs = dict(generation_kwargs or {})
        super().__init__(main_model, processing_class, max_new_tokens, generation_kwargs.get("stop_strings"))
        check_family(main_model, "main_model")
        check_generation_kwargs(generation_kwargs, GENERATION_FIELDS, "`GenerationConfig`", max_new_tokens)
        if not generation_kwargs.get("do_sample"):
            check_sampling(generation_kwargs, SAMPLING_FIELDS, "Set `do_sample=True` as well")
        self.is_plainly_greedy = is_plainly_greedy(generation_kwargs)
        generation_kwargs.pop("stop_strings", None)
        check_type("batch_size", batch_size, int | None)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1 or `None`, got {batch_size}.")
        self.model = main_model
        self.batch_size = batch_size
        neutral = {"do_sample": False, "min_new_tokens": 0}
        if generation_kwargs.get("do_sample"):
            neutral["top_k"] = 0  # `generate` has another default
        ids = {"pad_token_id": self.pad_token_id, "eos_token_id": self.eos_token_ids}
        self.generation_kwargs = {**neutral, **generation_kwargs, **ids, "bos_token_id": processing_class.bos_token_id}
        GenerationConfig(**self.generation_kwargs)  # which refuses what does not fit, before anything is decoded
        self.graphed: GraphedDecoding | None = None  # of the latest size

    @property
    def is_graphed(self) -> bool:
        """Whether decoding is a CUDA graph."""
        return self.model.device.type == "cuda" and self.is_plainly_greedy and can_be_graphed(self.model)

    def _shares_prompts(self, num_latents):
        return takes_up_a_cache(self.model) and (len(set(num_latents)) == 1 or gaps_are_exact(self.model))

    def _decode(self, prompt_ids, rows, latent_embeds, latent_ids):
        # The longest first: what they take, the others fit into
        by_length = sorted(range(len(rows)), key=lambda index: (-len(prompt_ids[rows[index]]), rows[index]))
        batch_size = self.batch_size or len(rows)
        completions = [[]] * len(rows)
        with contiguous_lm_head(self.model):
            for start in range(0, len(rows), batch_size):
                indices = by_length[start : start + batch_size]
                batch_embeds = None if latent_embeds is None else [latent_embeds[index] for index in indices]
                batch_rows = [rows[index] for index in indices]
                batch = self.batch(prompt_ids, batch_rows, batch_embeds, latent_ids)
                decoded = self._decode_graphed(batch) if self.is_graphed else self._decode_with_generate(batch)
                for index, ids in zip(indices, decoded, strict=True):
                    completions[index] = ids
        return completions

    def batch(
        self,
        prompt_ids: list[list[int]],
        rows: list[int],
        latent_embeds: list[torch.Tensor] | None = None,
        latent_ids: list[int] | None = None,
    ) -> DecodingBatch:
        """
        Rows as they are decoded.

        Args:
            prompt_ids (`list[list[int]]`):
                Rendered prompts in the main model's tokens.
            rows (`list[int]`):
                Index of each row's prompt.
            latent_embeds (`list[torch.Tensor]`, *optional*):
                Embeddings of each row, of shape `(num_latents, hidden_size)`, that follow its prompt.
            latent_ids (`list[int]`, *optional*):
                Tokens that stand for the latents, see [`latent_token_ids`].
        """
        device = embedding_device(self.model.get_input_embeddings())
        prompts = [prompt_ids[index] for index in dict.fromkeys(rows)]  # each once, in the order of the rows
        order = {index: i for i, index in enumerate(dict.fromkeys(rows))}
        length = max(map(len, prompts))
        batch = DecodingBatch(
            prompt_ids=torch.tensor(
                [[self.pad_token_id] * (length - len(ids)) + ids for ids in prompts], device=device
            ),
            prompt_mask=torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=device),
            prompt_of=torch.tensor([order[index] for index in rows], device=device),
        )
        if latent_embeds is not None:
            pad = partial(pad_sequence, batch_first=True, padding_side="left")
            batch.latents = pad(latent_embeds).to(device, self.model.get_input_embeddings().weight.dtype)
            batch.latent_mask = pad([batch.prompt_mask.new_ones(len(latents)) for latents in latent_embeds])
            stand_in = latent_token_ids(self.model, batch.latents[:1], latent_ids)[0]
            batch.latent_ids = pad([stand_in[: len(latents)] for latents in latent_embeds])
        return batch

    @torch.inference_mode(False)  # of which tensors are kept
    @torch.no_grad()
    def _decode_graphed(self, batch: DecodingBatch) -> list[list[int]]:
        """Tokens of all rows up to the end of the last: those that have ended cost nothing on a GPU."""
        length, num_rows = batch.length + self.max_new_tokens, batch.num_rows
        if self.batch_size is not None and self.graphed is not None and len(self.graphed.token_ids) == self.batch_size:
            num_rows = self.batch_size  # the last batch may have fewer
        if self.graphed is None or not self.graphed.fits(num_rows, length):
            self.graphed = None  # its memory first
            min_new_tokens = self.generation_kwargs["min_new_tokens"]
            self.graphed = GraphedDecoding(self.model, batch.num_rows, length, self.eos_token_ids, min_new_tokens)

        def is_over(completion_ids: torch.Tensor) -> bool:
            return self.stop_strings is not None and all(map(self.stop_strings.are_in, completion_ids.tolist()))

        return self.graphed.decode(batch, self.max_new_tokens, is_over).tolist()

    def _decode_with_generate(self, batch: DecodingBatch) -> list[list[int]]:
        """Tokens of each row up to its end."""
        rows = [DecodingRow(self.max_new_tokens, self.stop_strings) for _ in range(batch.num_rows)]
        running = RunningBatch(self.model, self.generation_kwargs, batch, rows)
        while len(running) > 0:
            running.advance()
        return [row.completion_ids for row in rows]

    @torch.no_grad()
    def stream(
        self,
        prompt_ids: list[int],
        latent_embeds: torch.Tensor,
        max_new_tokens: int | None = None,
        latent_ids: list[int] | None = None,
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
            latent_ids (`list[int]`, *optional*):
                Tokens that stand for the latents, see [`latent_token_ids`].
        """
        with self.limited_to(max_new_tokens):
            self.check_length(len(prompt_ids), latent_embeds.size(1))
            limit = self.max_new_tokens
        embed = self.model.get_input_embeddings()
        token_ids = torch.tensor([prompt_ids], device=embedding_device(embed))
        embeds = embed(token_ids)
        embeds = torch.cat([embeds, latent_embeds.to(embeds)], dim=1)
        stand_in = latent_token_ids(self.model, latent_embeds, latent_ids).to(token_ids.device)
        token_ids = torch.cat([token_ids, stand_in], dim=1)
        pieces, failure, is_over = CompletionStreamer(self.processing_class, self.eos_token_ids), [], threading.Event()
        row = DecodingRow(limit, self.stop_strings)
        ends = RowsEnd([row], self.eos_token_ids, num_read=0, is_due=is_over.is_set)

        def write():
            try:
                with ready_to_generate(self.model, token_ids):
                    self.model.generate(
                        inputs_embeds=embeds,
                        attention_mask=embeds.new_ones(embeds.shape[:2], dtype=torch.long),
                        generation_config=GenerationConfig(**self.generation_kwargs, max_new_tokens=limit),
                        stopping_criteria=StoppingCriteriaList([ends]),
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
            is_over.set()
            writer.join()
        if failure:
            raise failure[0]


class CompletionStreamer(TextIteratorStreamer):
    """Text of one completion, piece by piece, as [`decode_completions`] makes it."""

    def __init__(self, processing_class: PreTrainedTokenizerBase, eos_token_ids: list[int]):
        super().__init__(processing_class, skip_special_tokens=False)
        self.control = torch.tensor(sorted(control_ids(processing_class, eos_token_ids)))

    def put(self, value: torch.Tensor):
        super().put(value[~torch.isin(value, self.control)])

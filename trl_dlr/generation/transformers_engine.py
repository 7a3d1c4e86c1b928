# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The frozen main model as a decoder: prompts and latent embeddings in, completion tokens out."""

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


class TransformersEngine:
    """
    Decodes completions of a frozen causal LM from `[prompt embeddings ; latent embeddings]`.

    A prompt that several trajectories share is encoded once, and its KV cache repeated for each of them.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Frozen causal LM.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        max_new_tokens (`int`):
            Completion tokens at most.
        generation_kwargs (`dict`, *optional*):
            Further fields of [`~transformers.GenerationConfig`]. Decoding is greedy unless they say otherwise.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        max_new_tokens: int,
        generation_kwargs: dict | None = None,
    ):
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        eos = model.generation_config.eos_token_id
        self.eos_token_ids = [eos] if isinstance(eos, int) else list(eos or [])
        if processing_class.eos_token_id is not None and processing_class.eos_token_id not in self.eos_token_ids:
            self.eos_token_ids.insert(0, processing_class.eos_token_id)
        if not self.eos_token_ids:
            raise ValueError(
                "`main_model` has no end-of-sequence token: neither its generation config nor `main_processing_class` "
                "sets one. Set `main_processing_class.eos_token`."
            )
        pad = processing_class.pad_token_id
        self.pad_token_id = self.eos_token_ids[0] if pad is None else pad
        self.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_ids,
            **{"do_sample": False, **(generation_kwargs or {})},
        )
        # Forward work since the start, in tokens: a prompt counts once however many trajectories share it
        self.num_forward_tokens = 0

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: list[list[int]],
        latent_embeds: torch.Tensor | None = None,
        num_samples: torch.Tensor | None = None,
    ) -> list[list[int]]:
        """
        Args:
            prompt_ids (`list[list[int]]`):
                Rendered prompts in the main model's tokens.
            latent_embeds (`torch.Tensor` of shape `(num_rows, num_latents, hidden_size)`, *optional*):
                Embeddings that follow the prompts. Without them the main model answers alone.
            num_samples (`torch.Tensor` of shape `(len(prompt_ids),)`, *optional*):
                Rows of `latent_embeds` per prompt, one each if not given. They sum to `num_rows`.

        Returns:
            `list[list[int]]`: completion tokens of each row, up to and with the end-of-sequence token, or
            `max_new_tokens` of them if it did not come.
        """
        device = self.model.device
        if num_samples is None:
            num_samples = torch.ones(len(prompt_ids), dtype=torch.long)
        rows = torch.arange(len(prompt_ids)).repeat_interleave(num_samples.cpu()).to(device)
        num_latents = 0 if latent_embeds is None else latent_embeds.size(1)
        length = max(len(ids) for ids in prompt_ids)
        self.check_length(length, num_latents)
        input_ids = torch.tensor(
            [[self.pad_token_id] * (length - len(ids)) + ids for ids in prompt_ids], device=device
        )
        attention_mask = torch.tensor(
            [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device
        )
        inputs_embeds = self.model.get_input_embeddings()(input_ids)
        kwargs = {}
        if latent_embeds is not None:
            cache = DynamicCache(config=self.model.config)
            self.model.base_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
                past_key_values=cache,
                use_cache=True,
            )
            cache.batch_select_indices(rows)
            # `generate` wants embeddings of the full length; the prompt's are only counted, its rows are in the cache
            inputs_embeds = torch.cat([inputs_embeds[rows], latent_embeds.to(inputs_embeds)], dim=1)
            attention_mask = torch.cat([attention_mask[rows], attention_mask.new_ones(len(rows), num_latents)], dim=1)
            kwargs["past_key_values"] = cache
        # A slice of hidden states times a frozen head is a batched product in torch: it copies the head once per row
        lm_head = self.model.get_output_embeddings()
        contiguous = lm_head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
        try:
            output = self.model.generate(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                generation_config=self.generation_config,
                **kwargs,
            )
        finally:
            contiguous.remove()
        completions = [self._until_eos(row) for row in output.tolist()]
        self.num_forward_tokens += sum(map(len, prompt_ids)) + num_latents * len(rows) + sum(map(len, completions))
        return completions

    def check_length(self, prompt_length: int, num_latents: int) -> None:
        """Raise a `ValueError` if prompt, latents and completion together exceed the main model's positions."""
        if self.max_positions is not None and prompt_length + num_latents + self.max_new_tokens > self.max_positions:
            raise ValueError(
                f"A prompt of {prompt_length} tokens, `num_latents={num_latents}` and "
                f"`max_completion_length={self.max_new_tokens}` together exceed the main model's {self.max_positions} "
                "positions. Shorten the prompts or the completion."
            )

    def _until_eos(self, ids: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(ids) if token in self.eos_token_ids), len(ids) - 1)
        return ids[: end + 1]

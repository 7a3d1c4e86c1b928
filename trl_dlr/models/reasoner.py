# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A policy and its main model, put together to answer."""

import itertools

import torch
from transformers import PreTrainedTokenizerBase

from ..generation import DecodingEngine, tokenize_prompts
from .latent_policy import LatentPolicyModel


class LatentReasoner:
    """
    Answers prompts with a latent policy and a frozen main model.

    Args:
        policy ([`LatentPolicyModel`]):
            Policy that draws the latents.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of its assistant.
        engine ([`DecodingEngine`]):
            Main model that decodes.
        main_processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the main model.
    """

    def __init__(
        self,
        policy: LatentPolicyModel,
        processing_class: PreTrainedTokenizerBase,
        engine: DecodingEngine,
        main_processing_class: PreTrainedTokenizerBase,
    ):
        self.policy = policy
        self.processing_class = processing_class
        self.engine = engine
        self.main_processing_class = main_processing_class

    def tokenize(self, prompts: list) -> dict[str, torch.Tensor]:
        """Left-padded `input_ids` and `attention_mask` of prompts in the assistant's tokens."""
        ids = tokenize_prompts(prompts, self.processing_class)
        batch = self.processing_class.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        batch = batch.to(self.policy.device)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def sample_latents(self, prompts: list, num_samples: int = 1, deterministic: bool = False) -> torch.Tensor:
        """
        Latents of `num_samples` trajectories per prompt, shape `(len(prompts) * num_samples, T, latent_dim)`, a
        prompt's next to each other. `deterministic` takes the mean of every step.
        """
        inputs = self.tokenize(prompts)
        return self.policy.sample(**inputs, num_samples=num_samples, deterministic=deterministic).latents

    def decode(self, prompts: list, latents: torch.Tensor | None = None, num_anchors: int = 0) -> list[str]:
        """
        Text that the main model writes after each prompt and the latents for it, or after the prompt alone. Several
        trajectories per prompt stand next to each other in `latents`. Without latents, `num_anchors` plain tokens of the
        policy's anchor text may stand in their place.
        """
        ids = tokenize_prompts(prompts, self.main_processing_class)
        if latents is None:
            anchors = self.main_processing_class(self.policy.config.anchor_text, add_special_tokens=False)["input_ids"]
            plain = list(itertools.islice(itertools.cycle(anchors), num_anchors))
            completion_ids = self.engine.generate([prompt + plain for prompt in ids])
        else:
            num_samples = torch.full((len(prompts),), latents.size(0) // len(prompts))
            completion_ids = self.engine.generate(ids, self.policy.inject(latents), num_samples)
        return self.main_processing_class.batch_decode(completion_ids, skip_special_tokens=True)

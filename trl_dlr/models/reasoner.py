# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A policy and its main model, put together to answer."""

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

    def sample_latents(self, prompts: list, num_samples: int = 1, deterministic: bool = False) -> torch.Tensor:
        """
        Latents of `num_samples` trajectories per prompt, shape `(len(prompts) * num_samples, T, latent_dim)`, a
        prompt's next to each other. `deterministic` takes the mean of every step.
        """
        ids = tokenize_prompts(prompts, self.processing_class)
        batch = self.processing_class.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        batch = batch.to(self.policy.device)
        return self.policy.sample(batch["input_ids"], batch["attention_mask"], num_samples, deterministic).latents

    def decode(self, prompts: list, latents: torch.Tensor | None = None) -> list[str]:
        """
        Text that the main model writes after each prompt and the latents for it, or after the prompt alone. Several
        trajectories per prompt stand next to each other in `latents`.
        """
        ids = tokenize_prompts(prompts, self.main_processing_class)
        if latents is None:
            completion_ids = self.engine.generate(ids)
        else:
            num_samples = torch.full((len(prompts),), latents.size(0) // len(prompts))
            completion_ids = self.engine.generate(ids, self.policy.inject(latents), num_samples)
        return self.main_processing_class.batch_decode(completion_ids, skip_special_tokens=True)

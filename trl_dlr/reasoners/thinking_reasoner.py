# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A language model that thinks by itself, put to answer."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..generation import TransformersEngine
from ..models.architectures import check_can_think, embedding_device
from ..models.hub import DEFAULT_PROMPT, check_dtype, find_file, readable_damage
from ..models.latent_policy import LatentPolicyOutput
from ..models.thinking import Thinker, ThinkingConfig
from .latent_reasoner import LatentReasoner


class ThinkingPolicy:
    """
    A causal LM that thinks, in the place that a latent policy has in a [`LatentReasoner`].

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal LM.
        thinker ([`Thinker`]):
            How it thinks.
    """

    def __init__(self, model: PreTrainedModel, thinker: Thinker):
        self.model = model
        self.thinker = thinker
        self.config = thinker.config

    @property
    def device(self) -> torch.device:
        return embedding_device(self.model.get_input_embeddings())

    @torch.no_grad()
    def sample(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_samples: int = 1,
        deterministic: bool = False,
    ) -> LatentPolicyOutput:
        """
        Thoughts of `num_samples` rows for each of some left-padded prompts, a prompt's next to each other. `latents`
        are embeddings of start marker, latents and end marker, shape `(num_rows, length, hidden_size)`, and 0 behind
        them; `lengths` count them.
        """
        start = torch.tensor(self.thinker.start_ids, dtype=torch.long, device=input_ids.device)
        input_ids = torch.cat([input_ids, start.expand(len(input_ids), -1)], dim=1)
        attention_mask = torch.nn.functional.pad(attention_mask, (0, len(start)), value=1)
        rows = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(num_samples)
        thoughts = self.thinker.think(self.model, input_ids[rows], attention_mask[rows], deterministic)
        embeds = self.thinker.latents.embed(self.model.get_input_embeddings(), **thoughts.latents)
        return self._between_markers(embeds, thoughts.lengths)

    @torch.no_grad()
    def zero_latents(self, num_rows: int) -> LatentPolicyOutput:
        """Latents of 0 between the markers, for a control."""
        embed_tokens = self.model.get_input_embeddings()
        shape = num_rows, self.config.num_latents, embed_tokens.embedding_dim
        embeds = torch.zeros(shape, dtype=embed_tokens.weight.dtype, device=self.device)
        return self._between_markers(embeds, torch.full((num_rows,), embeds.size(1), device=embeds.device))

    def _between_markers(self, embeds: torch.Tensor, lengths: torch.Tensor) -> LatentPolicyOutput:
        start, end = (
            self.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long, device=embeds.device))
            for ids in (self.thinker.start_ids, self.thinker.end_ids)
        )
        most = len(start) + self.config.num_latents + len(end)
        whole = embeds.new_zeros(len(embeds), most, embeds.size(2))
        for row, latents, length in zip(whole, embeds, lengths.tolist(), strict=True):
            parts = torch.cat([start.to(latents), latents[:length], end.to(latents)])
            row[: len(parts)] = parts
        return LatentPolicyOutput(latents=whole, lengths=lengths + len(start) + len(end))

    def inject(self, latents: torch.Tensor) -> torch.Tensor:
        """Embeddings are what they are."""
        return latents

    def features(self, latents: torch.Tensor) -> torch.Tensor:
        """What latents are compared by: themselves."""
        return latents

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        self.model.save_pretrained(save_directory, **kwargs)
        self.config.save_pretrained(save_directory)


class ThinkingReasoner(LatentReasoner):
    """
    Answers prompts with a language model that thinks by itself: what [`SoftTokenGRPOTrainer`], [`CoconutSFTTrainer`]
    and [`LatentRLTrainer`] save. It is used as a [`LatentReasoner`] is.

    Example:

    ```python
    >>> from trl_dlr import ThinkingReasoner

    >>> reasoner = ThinkingReasoner.from_pretrained("user/thinking-model")
    >>> reasoner.generate(["What is 3 + 4?"]).texts
    ```

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal LM.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        config ([`ThinkingConfig`]):
            How it thinks.
        max_new_tokens (`int`, *optional*):
            Tokens of an answer at most. If `None`, as many as the model was trained with, or 256 if `config` names
            none.
        generation_kwargs (`dict`, *optional*):
            Further fields of [`~transformers.GenerationConfig`]. Answers are greedy unless they say otherwise.
        batch_size (`int`, *optional*):
            Rows that are answered together at most. If `None`, all.
        model_card (`str`, *optional*):
            Card that is saved and pushed with the model. If `None`, a short one is written.
    """

    controls = ("policy", "mean_latents", "no_latents", "zero_latents", "shuffled")

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        config: ThinkingConfig,
        max_new_tokens: int | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        batch_size: int | None = None,
        model_card: str | None = None,
    ):
        check_can_think(model)
        thinker = Thinker(config, processing_class, model.get_output_embeddings().weight.size(0))
        if max_new_tokens is None:
            max_new_tokens = config.max_completion_length or 256
        engine = TransformersEngine(model, processing_class, max_new_tokens, generation_kwargs, batch_size)
        policy = ThinkingPolicy(model, thinker)
        super().__init__(policy, processing_class, engine, processing_class, model_card=model_card)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *,
        max_new_tokens: int | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        batch_size: int | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        device: str | torch.device | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
    ) -> "ThinkingReasoner":
        """
        Load a model, or an adapter of one, that was trained to think.

        Args:
            pretrained_model_name_or_path (`str`):
                Hub id or folder.
            max_new_tokens, generation_kwargs, batch_size:
                As for [`ThinkingReasoner`].
            model_init_kwargs (`dict`, *optional*):
                Keyword arguments for loading the model, such as `dtype`, `quantization_config` or `device_map`. If
                `dtype` is not given, the checkpoint's own is used.
            trust_remote_code (`bool`, *optional*, defaults to `False`):
                Whether code that comes with the model may be executed.
            device (`str` or `torch.device`, *optional*):
                Where the model goes. If `None`, a GPU if there is one.
            revision (`str`, *optional*):
                Branch, tag or commit.
            token (`str` or `bool`, *optional*):
                Token for private repositories.
            cache_dir (`str`, *optional*):
                Where downloads are kept.

        Raises:
            `ValueError`: if the model was not trained to think, or is an adapter that names no base model.
        """
        name, hub = pretrained_model_name_or_path, {"revision": revision, "token": token, "cache_dir": cache_dir}
        config = ThinkingConfig.from_pretrained(name, **hub)
        kwargs = {"dtype": "auto", "trust_remote_code": trust_remote_code, **(model_init_kwargs or {}), **hub}
        check_dtype("model_init_kwargs['dtype']", kwargs["dtype"])
        with readable_damage(name):
            tokenizer = AutoTokenizer.from_pretrained(
                name, padding_side="left", trust_remote_code=trust_remote_code, **hub
            )
            if (adapter := find_file(name, "adapter_config.json", **hub)) is not None:
                if json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path") is None:
                    raise ValueError(
                        f"{name!r} is an adapter of a model that lay in a folder of another machine. Download it, and "
                        "set `base_model_name_or_path` in its `adapter_config.json` to your folder of that model."
                    )
                # With the tokenizer beside it, PEFT makes room for the tokens that the base model lacks
                model = AutoPeftModelForCausalLM.from_pretrained(name, **kwargs).merge_and_unload()
            else:
                model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
        if not hasattr(model, "hf_device_map"):
            model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        card_path = find_file(name, "README.md", **hub)
        card = None if card_path is None else Path(card_path).read_text(encoding="utf-8")
        model.requires_grad_(False).eval()
        reasoner = cls(model, tokenizer, config, max_new_tokens, generation_kwargs, batch_size, card)
        reasoner._find_file = functools.partial(find_file, name, **hub)
        return reasoner

    def check_num_latents(self, num_latents: int | None) -> None:
        if num_latents is not None:
            raise ValueError(
                f"`num_latents={num_latents}` has no meaning here: how long the model thinks is its own, as it was "
                "trained. Leave it out."
            )

    def _short_card(self, repo_id: str, tags: list[str] | None = None) -> str:
        tags = "".join(f"\n- {tag}" for tag in ["trl", "trl_dlr", "latent-reasoning", *(tags or [])])
        return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:{tags}
---

# {repo_id.split("/")[-1]}

A language model that thinks in at most {self.policy.config.num_latents} latents (`{self.policy.config.latent_type}`)
before it answers.

```python
from trl_dlr import ThinkingReasoner

reasoner = ThinkingReasoner.from_pretrained("{repo_id}")
print(reasoner.generate(["{DEFAULT_PROMPT}"]).texts)
```
"""

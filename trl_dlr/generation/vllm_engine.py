# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The frozen main model, decoding with vLLM inside the training process."""

import importlib.util
import os
import random
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .engine import DecodingEngine, check_generation_kwargs, check_sampling, prompt_embeds


# Of `vllm.SamplingParams`, what applies to a completion after embeddings. Penalties look at a prompt's tokens, which
# there are none of: they end the engine.
VLLM_SAMPLING_FIELDS = {"top_p": float, "top_k": int, "min_p": float, "seed": int | None}
VLLM_FIELDS = {
    "temperature": float | None,
    **VLLM_SAMPLING_FIELDS,
    "stop_strings": Any,
    "min_tokens": int,
    "logit_bias": Any,
    "allowed_token_ids": Any,
    "structured_outputs": Any,
}


# A main model is known by how it continues these
PROBE_TEXTS = ("The capital of France is", "1, 2, 3, 4, 5,", "Once upon a")
PROBE_CANDIDATES = 5


class VLLMEngine(DecodingEngine):
    """
    Decodes with a [`vllm.LLM`] of this process, which holds a copy of the main model of its own.

    The weights never change, so they are loaded once. Several training processes (`accelerate launch`, `torchrun`)
    hold a copy each and decode their own rows; all of them must construct the engine at the same time. Where there is
    no memory for that, one server can serve them all: see [`VLLMServerEngine`].

    Args:
        main_model ([`~transformers.PreTrainedModel`]):
            Frozen causal LM. Of its weights only the input embeddings are used, which turn prompts into
            `(length, hidden_size)`; vLLM loads it by the name that its configuration has.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        max_new_tokens (`int`):
            Completion tokens at most.
        generation_kwargs (`dict`, *optional*):
            Further fields of `vllm.SamplingParams`, such as `temperature`, and `stop_strings`. Decoding is greedy
            unless they say otherwise.
        llm_kwargs (`dict`, *optional*):
            Further arguments of `vllm.LLM`, such as `gpu_memory_utilization` and `max_model_len`.

    Raises:
        `ImportError`: vLLM is not installed.
        `ValueError`: the main model has no name, `tensor_parallel_size` is above 1, `max_model_len` leaves no room for
        `max_new_tokens`, `generation_kwargs` set what the engine sets, or vLLM reads embeddings of this main model
        differently than tokens.
    """

    def __init__(
        self,
        main_model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        max_new_tokens: int,
        generation_kwargs: dict | None = None,
        llm_kwargs: dict | None = None,
    ):
        stop_strings = (generation_kwargs or {}).get("stop_strings")
        super().__init__(main_model, processing_class, max_new_tokens, stop_strings)
        name = main_model.config.name_or_path
        if not name:
            raise ValueError(
                "`main_model` was built in memory, but vLLM in this process loads it by name. Save it with "
                "`save_pretrained`, and load it from there."
            )
        self.fields = sampling_fields(max_new_tokens, self.eos_token_ids, generation_kwargs)
        dtype = str(main_model.get_input_embeddings().weight.dtype).removeprefix("torch.")
        llm_kwargs = {"enable_prompt_embeds": True, "dtype": dtype, **(llm_kwargs or {})}
        if llm_kwargs.get("tensor_parallel_size", 1) > 1:
            raise ValueError(
                f"`tensor_parallel_size={llm_kwargs['tensor_parallel_size']}` would let training processes share a "
                "copy of the main model, but each decodes its own rows. Serve the main model with `vllm serve "
                f"{name} --enable-prompt-embeds --tensor-parallel-size "
                f"{llm_kwargs['tensor_parallel_size']}` and decode with the server."
            )
        if importlib.util.find_spec("vllm") is None:
            raise ImportError('Decoding with vLLM needs the `vllm` package. Install it: pip install "trl_dlr[vllm]"')
        # The engine lives in this process, as in TRL: a spawned one would run the training script again
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # Takes the process group that is there, and this process's device from LOCAL_RANK
            llm_kwargs.setdefault("distributed_executor_backend", "external_launcher")

        from vllm import LLM

        with _random_states_kept():
            self.llm = LLM(model=name, **llm_kwargs)
        self.embed_tokens = main_model.get_input_embeddings()
        self.max_model_len = self.llm.llm_engine.model_config.max_model_len
        self.check_length(1, 0)
        self._check_embeddings(processing_class)

    @torch.no_grad()
    def _check_embeddings(self, processing_class: PreTrainedTokenizerBase) -> None:
        """The next token after a prompt must be the same from its embeddings as from its tokens."""
        from vllm import SamplingParams

        prompts, greedy = probe_prompts(processing_class), {"temperature": 0.0, "max_tokens": 1, "detokenize": False}
        embeds = prompt_embeds(self.embed_tokens, prompts, range(len(prompts)), None)
        candidates = SamplingParams(**greedy, logprobs=PROBE_CANDIDATES)
        from_ids = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], candidates, use_tqdm=False)
        from_embeds = self.llm.generate(
            [{"prompt_embeds": row} for row in embeds], SamplingParams(**greedy), use_tqdm=False
        )
        for ids_output, embeds_output in zip(from_ids, from_embeds, strict=True):
            # Near ties may fall either way in bfloat16
            if embeds_output.outputs[0].token_ids[0] not in ids_output.outputs[0].logprobs[0]:
                raise ValueError(
                    "vLLM continues a text differently from the main model's embeddings than from its tokens. It "
                    "scales those of some architectures, such as Gemma, once more, and would decode nonsense after "
                    "latents. Use the transformers engine (`use_vllm=False`) for this main model."
                )

    def _describe_limit(self, length):
        return f"vLLM's `max_model_len={self.max_model_len}`. Set it to at least {length}."

    def _decode(self, prompt_ids, rows, latent_embeds):
        from vllm import SamplingParams

        embeds = prompt_embeds(self.embed_tokens, prompt_ids, rows, latent_embeds)
        inputs = [{"prompt_embeds": row} for row in embeds]
        fields = {**self.fields, "max_tokens": self.max_new_tokens, "detokenize": self.stop_strings is not None}
        sampling_params = SamplingParams(**fields)
        outputs = self.llm.generate(inputs, sampling_params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def probe_prompts(processing_class: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of [`PROBE_TEXTS`]."""
    return [processing_class(text, add_special_tokens=False)["input_ids"] for text in PROBE_TEXTS]


def sampling_fields(max_new_tokens: int, eos_token_ids: list[int], generation_kwargs: dict | None) -> dict:
    """
    Fields of `vllm.SamplingParams`: one greedy completion up to one of `eos_token_ids`, then `generation_kwargs`.
    """
    generation_kwargs = dict(generation_kwargs or {})
    check_generation_kwargs(generation_kwargs, VLLM_FIELDS, "`vllm.SamplingParams`", max_new_tokens)
    if not generation_kwargs.get("temperature"):
        check_sampling(generation_kwargs, VLLM_SAMPLING_FIELDS, "Set `temperature` above 0 as well")
    if (stop_strings := generation_kwargs.pop("stop_strings", None)) is not None:
        generation_kwargs |= {"stop": stop_strings, "skip_special_tokens": False}  # which may be in them
    # Only `eos_token_ids` and stop strings end a completion, whatever vLLM reads in the main model's files
    fixed = {"n": 1, "max_tokens": max_new_tokens, "stop_token_ids": eos_token_ids, "ignore_eos": True}
    return {"temperature": 0.0, **generation_kwargs, **fixed}


def vllm_hub_arguments(hub: dict) -> dict:
    """Arguments of `vllm.LLM` for those of `from_pretrained` that say where a model's files come from."""
    names = {"trust_remote_code": "trust_remote_code", "revision": "revision", "code_revision": "code_revision"}
    names |= {"token": "hf_token", "cache_dir": "download_dir"}
    llm_kwargs = {theirs: hub[name] for name, theirs in names.items() if hub.get(name) is not None}
    return llm_kwargs | ({"tokenizer_revision": hub["revision"]} if hub.get("revision") is not None else {})


@contextmanager
def _random_states_kept():
    """vLLM seeds Python, numpy and torch when it starts; training keeps its own random numbers."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The frozen main model, decoding with vLLM inside the training process."""

import importlib.util
import itertools
import math
import os
import random
import statistics
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.architectures import has_per_layer_inputs
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


# A main model is known by how it continues these, and by the likeliest tokens that it would continue them with
PROBE_TEXTS = ("The capital of France is", "1, 2, 3, 4, 5,", "7 + 5 =")
PROBE_CANDIDATES = 5
PROBE_TOLERANCE = 0.1  # of the difference between two texts: near ties may fall either way in bfloat16


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
        `max_new_tokens`, `generation_kwargs` set what the engine sets, the main model reads more of a token than its
        embedding, vLLM reads embeddings of this main model differently than tokens, or it has to be served because
        vLLM changes its class.
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
        check_embeddings_suffice(main_model)
        self.fields = sampling_fields(max_new_tokens, self.eos_token_ids, generation_kwargs)
        dtype = str(main_model.get_input_embeddings().weight.dtype).removeprefix("torch.")
        is_multimodal = main_model.config.get_text_config() is not main_model.config
        text_only = {"language_model_only": True} if is_multimodal else {}  # which needs no processor of images
        llm_kwargs = {"enable_prompt_embeds": True, "dtype": dtype, **text_only, **(llm_kwargs or {})}
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
        backbone = type(main_model.get_decoder())
        if backbone.__call__ is not nn.Module.__call__:
            raise ValueError(
                f"vLLM runs {main_model.config.model_type} models with transformers' own {backbone.__name__}, and "
                "changes that class for this whole process, where the main model and its policy may need it as it is. "
                f"Serve the main model with `vllm serve {name} --enable-prompt-embeds` and decode with the server."
            )
        self.embed_tokens = main_model.get_input_embeddings()
        self.max_model_len = self.llm.llm_engine.model_config.max_model_len
        self.check_length(1, 0)
        self.embedding_scale = find_embedding_scale(self.embed_tokens, processing_class, self._next_log_probs)
        if self.embedding_scale is None:
            raise ValueError(
                "vLLM continues a text differently from the main model's embeddings than from its tokens, and would "
                f"decode nonsense after latents. Use the transformers engine (`use_vllm=False`) for this "
                f"{main_model.config.model_type} model."
            )

    def _next_log_probs(self, prompts: list[list[int]] | list[torch.Tensor]) -> list[dict[int, float]]:
        from vllm import SamplingParams

        key = "prompt_embeds" if isinstance(prompts[0], torch.Tensor) else "prompt_token_ids"
        params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, logprobs=PROBE_CANDIDATES)
        outputs = self.llm.generate([{key: prompt} for prompt in prompts], params, use_tqdm=False)
        likeliest = [output.outputs[0].logprobs[0] for output in outputs]
        return [{token: entry.logprob for token, entry in entries.items()} for entries in likeliest]

    def _describe_limit(self, length):
        return f"vLLM's `max_model_len={self.max_model_len}`. Set it to at least {length}."

    def _decode(self, prompt_ids, rows, latent_embeds, latent_ids):
        from vllm import SamplingParams

        embeds = prompt_embeds(self.embed_tokens, prompt_ids, rows, latent_embeds)
        inputs = [{"prompt_embeds": row / self.embedding_scale} for row in embeds]
        fields = {**self.fields, "max_tokens": self.max_new_tokens, "detokenize": self.stop_strings is not None}
        sampling_params = SamplingParams(**fields)
        outputs = self.llm.generate(inputs, sampling_params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def check_embeddings_suffice(main_model: PreTrainedModel) -> None:
    """Refuse a main model that reads more of a token than its embedding, which is all that vLLM takes."""
    if has_per_layer_inputs(main_model):
        raise ValueError(
            f"`main_model` is a {main_model.config.get_text_config().model_type} model, which reads each token again "
            "in every layer, but vLLM takes embeddings alone. Use the transformers engine (`use_vllm=False`) for it."
        )


@torch.no_grad()
def find_embedding_scale(
    embed_tokens: nn.Module,
    processing_class: PreTrainedTokenizerBase,
    next_log_probs: Callable[[list[list[int]] | list[torch.Tensor]], list[dict[int, float]]],
) -> float | None:
    """
    What embeddings have to be divided by for vLLM to continue texts as it does from their tokens: 1, or the scale that
    the main model's embeddings have on the way out (Gemma), where vLLM applies it to what it is given.

    Likelihoods of the next tokens are compared, relative to how they differ from text to text, so that neither small
    models nor rounding mislead it. Another main model is noticed as far as its embeddings are others; what only shows
    between latents, which are no tokens, is not.

    Args:
        embed_tokens (`nn.Module`):
            Input embeddings of the main model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        next_log_probs (`Callable`):
            Asks vLLM for the log-probabilities of the [`PROBE_CANDIDATES`] likeliest next tokens after prompts, given
            as ids or as embeddings of shape `(length, hidden_size)`.

    Returns:
        `float`: the scale, or `None` if vLLM reads embeddings differently in either case.
    """
    prompts = [processing_class(text, add_special_tokens=False)["input_ids"] for text in PROBE_TEXTS]
    embeds = prompt_embeds(embed_tokens, prompts, range(len(prompts)), None)
    with align_module_device(embed_tokens):  # its weights, if they are offloaded
        weights = torch.cat([embed_tokens.weight[torch.tensor(ids, device=embeds[0].device)] for ids in prompts])
    weights, scaled = weights.float(), torch.cat(embeds).float()
    scales = [1.0]
    if not torch.equal(weights, scaled):
        scales.append(((scaled * weights).sum() / weights.square().sum()).item())  # least squares: both are rounded
    from_ids = next_log_probs(prompts)
    between = statistics.mean(_difference(*pair) for pair in itertools.combinations(from_ids, 2))
    if not 0 < between < math.inf:
        raise ValueError(
            f"vLLM continues {', '.join(map(repr, PROBE_TEXTS))} all alike, or with no numbers, which does not tell "
            "whether it reads the main model's embeddings as its tokens. Use the transformers engine "
            "(`use_vllm=False`)."
        )
    differences = {}
    for scale in scales:
        from_embeds = next_log_probs([row / scale for row in embeds])
        differences[scale] = max(map(_difference, from_ids, from_embeds))
    best = min(differences, key=differences.get)
    return best if differences[best] <= PROBE_TOLERANCE * between else None


def _difference(first: dict[int, float], second: dict[int, float]) -> float:
    """Largest difference of log-probabilities; a token that is not among the likeliest has at most the lowest."""
    if any(map(math.isnan, (*first.values(), *second.values()))):
        return math.inf
    lowest = min(first.values()), min(second.values())
    return max(abs(first.get(token, lowest[0]) - second.get(token, lowest[1])) for token in first | second)


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

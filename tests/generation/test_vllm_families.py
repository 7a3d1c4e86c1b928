# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Which families of models real vLLM decodes from embeddings: tiny random ones, each in a process of its own. The table of
docs/models.md is what this prints:

    .venv-vllm/bin/python -m pytest -m vllm -s tests/generation/test_vllm_families.py
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests.generation.test_vllm_engine import vllm_server, wait_until_up
from tests.generation.test_vllm_server_engine import free_port
from tests.tiny import VOCABULARY, tiny_tokenizer
from trl_dlr.generation import VLLMEngine, VLLMServerEngine


ROOT = Path(__file__).parents[2]
ENVIRONMENT = dict(os.environ)
END = 1
SIZES = {  # of heads, as vLLM's kernels for CPUs have them
    **{"vocab_size": len(VOCABULARY), "max_position_embeddings": 512, "tie_word_embeddings": True},
    **dict.fromkeys(["hidden_size", "intermediate_size", "n_embd", "n_inner"], 64),
    **dict.fromkeys(["num_attention_heads", "num_key_value_heads", "n_head"], 2),
    **dict.fromkeys(["head_dim", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_experts", "num_local_experts", "linear_num_value_heads"], 4),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["num_experts_per_tok", "linear_num_key_heads"], 2),
    **dict.fromkeys(["mamba_d_head", "mamba_d_state", "state_size"], 16),
    **{"mamba_n_heads": 8, "mamba_n_groups": 1, "linear_conv_kernel_dim": 4, "sliding_window": 8},
    **{"pad_token_id": 0, "eos_token_id": END, "bos_token_id": None},
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
# Which published configurations hold, and transformers' own lack
LFM2 = {"conv_dim": 64, "block_dim": 64}
# As it is; as it is, where vLLM does not continue this tiny model's tokens as transformers does either; not at all
AS_IT_IS, UNLIKE, REFUSED = "yes", "yes, unlike transformers", "refused"
FAMILIES = {  # what of it has to be said beside SIZES, and what becomes of it
    "llama": ({}, AS_IT_IS),
    "qwen2": ({}, AS_IT_IS),
    "qwen3": ({}, AS_IT_IS),
    "qwen3_moe": ({}, AS_IT_IS),
    "mistral": ({}, AS_IT_IS),
    "mixtral": ({}, AS_IT_IS),
    "phi3": ({}, AS_IT_IS),
    "gemma": ({}, AS_IT_IS),
    "gemma2": (WINDOWS, AS_IT_IS),
    "gemma3_text": (WINDOWS, AS_IT_IS),
    "gemma4_text": (
        {**WINDOWS, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "num_experts": None},
        AS_IT_IS,
    ),
    "gemma3n_text": ({"layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 0}, REFUSED),
    "granite": ({"embedding_multiplier": 12.0}, AS_IT_IS),
    "granitemoe": ({"embedding_multiplier": 12.0}, AS_IT_IS),
    "granitemoehybrid": ({"embedding_multiplier": 12.0, "layer_types": ["mamba", "attention"] * 2}, AS_IT_IS),
    "cohere2": (WINDOWS, UNLIKE),
    "exaone4": (WINDOWS, AS_IT_IS),
    "glm4": ({}, AS_IT_IS),
    "gpt2": ({}, AS_IT_IS),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 2, **LFM2}, UNLIKE),
    "mamba2": ({"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1}, AS_IT_IS),
    "olmo3": (WINDOWS, REFUSED),
    "starcoder2": ({}, REFUSED),
    "smollm3": ({}, REFUSED),
}


def tiny_model(family: str) -> PreTrainedModel:
    config_class = CONFIG_MAPPING[family]
    names = {*inspect.signature(config_class.__init__).parameters, *config_class.__annotations__}
    config = config_class(**{**{name: value for name, value in SIZES.items() if name in names}, **FAMILIES[family][0]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return model


@torch.no_grad()
def read_on(model: PreTrainedModel, embeds: torch.Tensor, num_tokens: int) -> list[int]:
    """The likeliest tokens but the end after embeddings of shape `(length, hidden_size)`, without a cache."""
    ids = []
    for _ in range(num_tokens):
        logits = model(inputs_embeds=embeds[None], use_cache=False).logits[0, -1]
        logits[END] = -torch.inf
        ids.append(logits.argmax().item())
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor(ids[-1:]))])
    return ids


def saved_model(family: str, folder: str) -> PreTrainedModel:
    model = tiny_model(family)
    model.generation_config.eos_token_id = END
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    model.config.name_or_path = folder
    return model


def rollout(model: PreTrainedModel) -> tuple[list[list[int]], torch.Tensor, list[list[int]]]:
    """Prompts, latents and the tokens after them."""
    prompts = [list(range(2, 22)), [20, 21, 22]]
    embeds = [model.get_input_embeddings()(torch.tensor(ids)).detach() for ids in prompts]
    latents = torch.stack([torch.randn(3, row.size(1)) * row.square().mean().sqrt() for row in embeds])
    return prompts, latents, [read_on(model, torch.cat(rows), 6) for rows in zip(embeds, latents, strict=True)]


def decode_in_this_process(family: str, folder: str) -> None:
    model = saved_model(family, folder)
    prompts, latents, expected = rollout(model)  # before vLLM may change the model's class
    with torch.no_grad():
        log_probs = [model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts]
    kwargs = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    try:
        engine = VLLMEngine(model, tiny_tokenizer(), 6, {"min_tokens": 6}, kwargs)
    except ValueError as error:
        print(f"\n| {family} | {REFUSED} | {error} |")
        return
    assert engine.embedding_scale == 1
    from_tokens = zip(engine._next_log_probs(prompts), log_probs, strict=True)
    is_alike = all(abs(value - row[token]) < 1e-3 for own, row in from_tokens for token, value in own.items())
    completions = engine.generate(prompts, latents)
    assert completions == expected or not is_alike, (completions, expected)
    print(f"\n| {family} | {AS_IT_IS if is_alike else UNLIKE} | |", flush=True)


@pytest.mark.vllm
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_decoded_from_embeddings_or_refused(family, tmp_path):
    command = [sys.executable, "-m", __spec__.name, family, str(tmp_path / family)]
    env = {**ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    row = next(line for line in result.stdout.splitlines() if line.startswith("|"))
    print(f"\n{row}")
    assert row.startswith(f"| {family} | {FAMILIES[family][1]} |")


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["gemma2", "olmo3"])  # with scaled embeddings; refused in process
def test_a_family_is_served(family, tmp_path):
    model, port = saved_model(family, str(tmp_path)), free_port()
    prompts, latents, expected = rollout(model)
    with vllm_server(str(tmp_path), port, "--enable-prompt-embeds"):
        wait_until_up(port)
        url = f"http://127.0.0.1:{port}"
        engine = VLLMServerEngine(model, tiny_tokenizer(), 6, {"min_tokens": 6}, base_url=url)
        assert engine.embedding_scale == 1
        assert engine.generate(prompts, latents) == expected


if __name__ == "__main__":
    decode_in_this_process(*sys.argv[1:])

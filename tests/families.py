# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A tiny random model of every family of decoder-only language models in transformers."""

import inspect
from unittest.mock import patch

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel


NUM_LAYERS = 4
VOCAB_SIZE = 64
NUM_WORDS = 60  # tokens after them stand for images and sound
WINDOW = 8  # smaller than prompts, so that a token or a gap too many is seen

# In transformers' list of causal language models, but no decoders of text that stand alone
OTHERS = {
    "the decoder of an encoder and a decoder": (
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper"
    ),
    "an encoder that is causal by a flag": (
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
        "roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod"
    ),
    "permutations, hashed chunks or segments instead of a text from left to right": "cpmant reformer xlnet",
    "captions of images by an encoder": "git",
    "sound": "moshi musicgen musicgen_melody",
    "drafts for another model": "gemma4_assistant gemma4_unified_assistant",
}
# Multimodal models that people use for text, beside those in the list: with their encoders of images
WITH_IMAGES = ("llama4", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl")

IMAGES = " with images"

# Fields by the names that configurations have for them
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "lru_width"], 32),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"], NUM_LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(["embedding_multiplier", "logits_scaling", "logit_scale"], 2.0),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 512),
    **dict.fromkeys(["sliding_window", "window_size", "attention_window_size", "attention_chunk_size"], WINDOW),
    # Mixtures of experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"], 1),
    "num_experts_per_tok": 2,
    # Latent attention
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"], 8),
    **dict.fromkeys(["index_head_dim", "index_topk"], 8),
    "index_n_heads": 16,  # a token that none looks at would tie with others
    # State spaces, linear attention, convolutions
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "mamba_d_head", "mamba_head_dim"], 8),
    **dict.fromkeys(["mamba_d_state", "ssm_state_size", "state_size"], 8),
    **dict.fromkeys(["mamba_n_groups", "n_groups"], 1),
    **dict.fromkeys(["mamba_d_conv", "conv_kernel", "linear_conv_kernel_dim"], 4),
    **dict.fromkeys(["mamba_dt_rank", "time_step_rank", "linear_num_value_heads"], 4),
    **dict.fromkeys(["n_mamba_heads", "linear_num_key_heads"], 2),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 8),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size"], 8),
    "mamba_d_ssm": 64,
    # Embeddings per layer
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    # Images and sound, which are only carried along
    **dict.fromkeys(
        ["adapter_in_dim", "adapter_input_size", "adapter_out_dim", "out_hidden_size", "output_proj_dims"], 32
    ),
    **dict.fromkeys(["position_embedding_size", "mm_posemb_size", "mm_embed_dim", "depth"], 4),
    **dict.fromkeys(["image_token_id", "image_token_index"], NUM_WORDS),
    **dict.fromkeys(["video_token_id", "boi_token_id", "vision_start_token_id"], NUM_WORDS + 1),
    **dict.fromkeys(["audio_token_id", "eoi_token_id", "vision_end_token_id"], NUM_WORDS + 2),
    **dict.fromkeys(["boa_token_id", "eoa_token_id", "eoa_token_index"], NUM_WORDS + 3),
}
PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")

ALTERNATING = ["full_attention", "sliding_attention"] * 2
INKLING = {
    "unpadded_vocab_size": VOCAB_SIZE,
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 16, "d_rel": 4},
}
# What configurations need beside or instead of them, by their `model_type`
OWN: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"local_attention_window_len": WINDOW, "encoder_hash_byte_group_vocab": 64, "cross_attn_k": 1},
    "blt_local_encoder": {"num_hidden_layers": 1, "cross_attn_k": 1, "hidden_size_global": 32},
    "blt_local_decoder": {"num_hidden_layers": 2, "cross_attn_k": 1, "hidden_size_global": 32},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": ALTERNATING,
        "rope_parameters": {name: {"rope_type": "default", "rope_theta": 1e4} for name in ALTERNATING},
    },
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 8,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots1": {"layer_types": ALTERNATING},
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "dots3_note_text": {
        "shared_experts_intermediate_size": 16,
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": 8 for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")},
        "swa_head_dim": 16,
    },
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2, "laurel_rank": 4, "altup_num_inputs": 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "shared_intermediate_size": 48},
    "inkling_text": INKLING,
    "inkling2_text": {**INKLING, "n_layers_per_attn_res_block": 2},
    "inkling2_loop_text": {
        **INKLING,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_gate_rank": 4,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4, "first_k_dense_replace": 1},
    "laguna": {"layer_types": ALTERNATING},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {
        "num_layers": 2,
        "num_hidden_layers": 4,  # each has two attentions
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": ALTERNATING},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "dense_intermediate_size": 48,
        "shared_intermediate_size": 16,
        "rotary_dim": 8,
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": {"layer_types": ALTERNATING},
    "modernbert-decoder": {"local_attention": 2 * WINDOW, "cls_token_id": 1, "sep_token_id": 2},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "qwen3_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "qwen4_exp_text": {
        "hc_lowrank": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "ple_embed_dim": 16,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2, "router_hidden_size": 16},
}


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A small configuration, and those in it, with layers of every kind that the default one has."""
    default = config_class()
    fields = {*inspect.signature(config_class.__init__).parameters, *getattr(config_class, "__dataclass_fields__", ())}
    sizes = {name: value for name, value in SIZES.items() if name in fields}
    if "kv_lora_rank" in fields:  # whose keys are not grouped
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for name in PER_LAYER:
        kinds = list(dict.fromkeys(getattr(default, name, None) or ()))
        if name in fields and kinds:
            sizes[name] = [kinds[i % len(kinds)] for i in range(NUM_LAYERS)]
    for name, sub_class in config_class.sub_configs.items():
        if sub_class is not AutoConfig or getattr(default, name) is not None:
            sizes[name] = tiny_config(type(getattr(default, name)) if sub_class is AutoConfig else sub_class)
    return config_class(**{**sizes, **OWN.get(config_class.model_type, {})})


@torch.no_grad()
def tiny_family(family: str) -> PreTrainedModel:
    """A model with weights large enough for what it reads to matter."""
    torch.manual_seed(0)
    model_type = family.removesuffix(IMAGES)
    config = tiny_config(CONFIG_MAPPING[model_type])
    auto_class = AutoModelForCausalLM if model_type == family else AutoModelForImageTextToText
    with patch.object(TimmWrapperModel, "__init__", PreTrainedModel.__init__):  # which would need a package for images
        model = auto_class.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if (parameter.ndim > 1 and "A_log" not in name) or not parameter.any():
            parameter.normal_(std=0.2)
    return model


NO_DECODERS = sorted(" ".join(OTHERS.values()).split())
FAMILIES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NO_DECODERS))
FAMILIES += [name + IMAGES for name in WITH_IMAGES if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
# What people use now, and a family of each kind; the others are tried with the slow tests
FAST = {
    *("llama", "llama4_text", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_text"),
    *("qwen3_5 with images", "qwen3_vl with images", "mistral", "mistral3 with images", "ministral3", "mixtral"),
    *("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "gemma4_text", "phi3", "phimoe"),
    *("gpt_oss", "olmo3", "cohere2", "lfm2", "granite", "granitemoehybrid", "nemotron_h", "bamba", "jamba", "zamba2"),
    *("falcon_h1", "mamba", "mamba2", "kimi_linear", "deepseek_v3", "deepseek_v32", "glm4", "glm4_moe", "smollm3"),
    *("gpt2", "mpt", "gpt_neo", "opt", "recurrent_gemma", "minimax", "rwkv"),
}

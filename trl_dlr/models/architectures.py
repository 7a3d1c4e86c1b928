# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What families of models do differently: where their text part is, what they read, and what they keep of it."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import (
    MODEL_MAPPING,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin


# transformers 5.24 renamed this argument of every model and of `generate`; the old name works there, with a warning,
# until 5.40
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)

OWN_CACHE = "it keeps what it has read in a cache of its own, which cannot be shared by rows or continued with latents"
NO_CACHE = "it keeps no cache of what it has read, which latents could continue"
NOT_MASKED = "it reads padding as text, so that a row alone differs from the row in a batch"
TOKEN_IDS = "it needs the ids of its tokens beside their embeddings, and latents have none"
UNFIT_FAMILIES = {
    "blt": TOKEN_IDS,
    "deepseek_v4": TOKEN_IDS,
    "falcon_h1": "it scales embeddings that it looks up, and not those that it is given",
    "minimax": OWN_CACHE,
    "minimax_m3_vl_text": NOT_MASKED,
    "openai-gpt": NO_CACHE,
    "qwen4_exp_text": TOKEN_IDS,
    "recurrent_gemma": NOT_MASKED,
    "rwkv": OWN_CACHE,
    "xlstm": OWN_CACHE,
}
# Their layers run in loops or stacks
NOT_CUT = ("hrm_text", "inkling2_loop_text")
# Their scan begins anew where it is given several positions
SCAN_FROM_ZERO = ("jamba", "zamba")


def check_family(model: PreTrainedModel, name: str) -> None:
    """
    Refuse a model of a family that transformers cannot run with latents.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        name (`str`):
            Argument that it was given as.

    Raises:
        `ValueError`: with the reason.
    """
    family, parameters = model.config.get_text_config().model_type, inspect.signature(model.forward).parameters
    reason, newer = UNFIT_FAMILIES.get(family), ""
    if "cache_params" in parameters:
        reason, newer = "its cache has a name of its own there", "transformers 5.24 or "
    elif name == "main_model" and has_per_layer_inputs(model) and model.config is not model.config.get_text_config():
        if "per_layer_inputs" not in parameters:
            reason, newer = "it takes no inputs of layers there, as its text model alone does", "transformers 5.23 or "
    elif reason is None and "position_ids" in parameters and not any(attention_layers(model)):
        reason = "none of its layers has attention, in which its positions are counted"
    if reason is not None:
        raise ValueError(
            f"`{name}` is of the family {family}, which transformers {transformers.__version__} cannot run on latents: "
            f"{reason}. Take {newer}a model of another family."
        )


def has_code_of_its_own(config: PreTrainedConfig) -> bool:
    """Whether a configuration was loaded with code that came with its model: that was admitted, and runs already."""
    return type(config).__module__.startswith("transformers_modules.")


def check_stands_alone(config: PreTrainedConfig, name: str) -> None:
    """Refuse a model whose text part transformers does not build by itself, as a policy does when it is loaded."""
    if type(config) not in MODEL_MAPPING and not has_code_of_its_own(config):
        raise ValueError(
            f"`{name}` is of the family {config.model_type}, of which no assistant can be made: transformers does not "
            "build its text part by itself. Take an assistant of another family."
        )


def check_can_think(model: PreTrainedModel) -> None:
    """As [`check_family`], for a model that reads latents of its own."""
    check_family(model, "model")
    if has_per_layer_inputs(model):
        family = model.config.get_text_config().model_type
        raise ValueError(
            f"`model` is of the family {family}, which reads each token again in every layer, and its latents are no "
            "tokens. Take a model of another family, or this one as the main model of a `LatentGRPOTrainer`."
        )


def base_model_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model below an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def text_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a causal LM or of its backbone that reads text, without head and without encoders of images."""
    backbone = model.base_model
    if backbone.config.get_text_config() is not backbone.config:
        backbone = backbone.get_decoder()
    return backbone if backbone.get_output_embeddings() is None else backbone.model  # Llama 4's is no `base_model`


@torch.no_grad()
def embedding_device(embed_tokens: nn.Module) -> torch.device:
    """
    Where embeddings come out. With a `device_map` that is where they are looked up, which need not be where their
    weights wait, nor the device of the model, which is that of its first weights.
    """
    is_offloaded = embed_tokens.weight.is_meta  # and fetched, with the indices, by accelerate
    device = torch.device("cpu") if is_offloaded else embed_tokens.weight.device
    return embed_tokens(torch.zeros(1, dtype=torch.long, device=device)).device


def embedding_table(embed_tokens: nn.Module) -> torch.Tensor:
    """What tokens are read as, shape `(vocab_size, hidden_size)`: some models scale embeddings on the way out."""
    if type(embed_tokens) is nn.Embedding and not embed_tokens.weight.is_meta:
        return embed_tokens.weight
    ids = torch.arange(embed_tokens.weight.size(0), device=embedding_device(embed_tokens))
    return torch.cat([embed_tokens(part) for part in ids.split(8192)])


def attention_layers(model: PreTrainedModel) -> list[bool]:
    """Which layers keep keys and values. Without any, a cache does not know how much has been read."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return [isinstance(layer, DynamicLayer) for layer in layers]


def takes_up_a_cache(model: PreTrainedModel) -> bool:
    """Whether several positions at once may follow what a cache holds."""
    return any(attention_layers(model)) and model.config.get_text_config().model_type not in SCAN_FROM_ZERO


def has_recurrent_state(model: PreTrainedModel) -> bool:
    """
    Whether layers keep a state that the next position overwrites, as linear attention, state spaces and convolutions
    do: a pass that is differentiated can keep no such cache.
    """
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return model._is_stateful or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def gaps_are_exact(model: PreTrainedModel) -> bool:
    """
    Whether masked positions between others change nothing, as in plain attention: they take no place in a window, a
    convolution or a recurrence, and distances are counted without them.
    """
    config = model.config.get_text_config()
    counts_places = getattr(config, "alibi", False) or hasattr(config, "window_size")
    is_told_positions = "position_ids" in inspect.signature(model.forward).parameters
    is_plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    return is_plain and is_told_positions and not counts_places


def has_per_layer_inputs(model: PreTrainedModel) -> bool:
    """Whether each token is read again in every layer, as Gemma 3n and Gemma 4 E2B and E4B do."""
    return bool(getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None))


def per_layer_inputs(model: PreTrainedModel, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    What models with [`has_per_layer_inputs`] are given beside `inputs_embeds`; nothing for the others.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal LM or its backbone.
        token_ids (`torch.Tensor` of shape `(batch_size, length)`):
            Tokens that stand at the positions of the embeddings.
    """
    if not has_per_layer_inputs(model):
        return {}
    get = text_backbone(model).get_per_layer_inputs
    others = [None] * (len(inspect.signature(get).parameters) - 1)  # embeddings, which are only read without tokens
    return {"per_layer_inputs": get(token_ids, *others)}


def latent_token_ids(
    model: PreTrainedModel, latent_embeds: torch.Tensor, latent_ids: list[int] | None = None
) -> torch.Tensor:
    """
    Tokens that stand for latents where a model reads each token again in every layer, see [`per_layer_inputs`]:
    `latent_ids`, or the padding token, which Gemma takes where an image is.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal LM or its backbone.
        latent_embeds (`torch.Tensor` of shape `(batch_size, num_latents, hidden_size)`):
            Latents.
        latent_ids (`list[int]`, *optional*):
            A token for each of them, and maybe more.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_latents)`.
    """
    batch_size, num_latents = latent_embeds.shape[:2]
    filler = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    ids = torch.tensor((latent_ids or [filler] * num_latents)[:num_latents], device=latent_embeds.device)
    return ids.long().expand(batch_size, -1)


@contextmanager
def ready_to_generate(model: PreTrainedModel, token_ids: torch.Tensor | None = None) -> Iterator[None]:
    """
    Let `generate` take embeddings, whatever the family, and fill nothing in from the model's own configuration.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal LM, or one with an adapter.
        token_ids (`torch.Tensor` of shape `(batch_size, length)`, *optional*):
            Tokens that stand at the positions of the embeddings, see [`per_layer_inputs`].
    """
    model = base_model_of(model)
    generation_config, prepare = model.generation_config, model.prepare_inputs_for_generation
    is_ready = "inputs_embeds" in inspect.signature(prepare).parameters and not has_per_layer_inputs(model)

    # `generate` looks for this name among the arguments, where some families have `**kwargs`
    def prepare_inputs_for_generation(input_ids, inputs_embeds=None, **kwargs) -> dict[str, Any]:
        inputs = prepare(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if (embeds := inputs.get("inputs_embeds")) is not None and token_ids is not None:
            inputs |= per_layer_inputs(model, token_ids[:, -embeds.size(1) :])
        return inputs

    model.generation_config = GenerationConfig()
    if hasattr(model.base_model, "rope_deltas"):  # where an image was in other rows, by Qwen's wrappers
        model.base_model.rope_deltas = None
    if not is_ready:
        model.prepare_inputs_for_generation = prepare_inputs_for_generation
    try:
        yield
    finally:
        if hasattr(model.base_model, "rope_deltas"):
            model.base_model.rope_deltas = None
        if not is_ready:
            del model.prepare_inputs_for_generation
        model.generation_config = generation_config

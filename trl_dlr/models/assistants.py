# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Assistants made from the main model itself: its first layers, or a small fresh transformer on its embeddings."""

import copy

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from .hub import has_code_of_its_own


def with_few_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A backbone of the model's architecture, newly initialized in float32."""
    total = model.config.get_text_config().num_hidden_layers
    if not 1 <= num_layers <= total:
        raise ValueError(f"`num_layers` must be between 1 and the main model's {total} layers, got {num_layers}.")
    config = copy.deepcopy(model.config.get_text_config())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = None
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):  # one entry per layer
        config.layer_types = config.layer_types[:num_layers]
    return AutoModel.from_config(config, trust_remote_code=has_code_of_its_own(config)).float()


def first_layers(main_model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """
    Backbone made of a copy of the main model's embeddings, first `num_layers` layers and final norm, in float32.

    Args:
        main_model ([`~transformers.PreTrainedModel`]):
            Causal LM to copy from, not quantized.
        num_layers (`int`):
            Number of layers to keep.
    """
    backbone = with_few_layers(main_model, num_layers)
    source = main_model.base_model.state_dict()
    backbone.load_state_dict({name: source[name] for name in backbone.state_dict()})
    return backbone


def fresh_layers(main_model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """
    Backbone of the main model's architecture with `num_layers` newly initialized layers on a copy of its input
    embeddings, in float32. Best used with `freeze_embeddings=True`.

    Args:
        main_model ([`~transformers.PreTrainedModel`]):
            Causal LM whose architecture and embeddings are used.
        num_layers (`int`):
            Number of layers.
    """
    backbone = with_few_layers(main_model, num_layers)
    embeddings: nn.Embedding = backbone.get_input_embeddings()
    with torch.no_grad():
        embeddings.weight.copy_(main_model.get_input_embeddings().weight)
    return backbone

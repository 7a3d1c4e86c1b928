# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
A causal LM reads its own last hidden states as latent thoughts, with gradient: the pass that Coconut trains with.
"""

import types

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .architectures import CACHE_ARGUMENT
from .main_model import is_checkpointed
from .thinking import positions


def read_with_thoughts(
    backbone: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    is_latent: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> BaseModelOutputWithPast:
    """
    Teacher-forced pass in which the input at a latent position is the last hidden state of the position before it, as
    in Coconut ([arXiv 2412.06769](https://huggingface.co/papers/2412.06769)).

    What lies before the first latent is read once, each latent adds a step to the KV cache, and one pass reads the
    rest together with the last latent. Columns in which no row has a latent cost no step of their own, so rows are
    best padded such that their latents share columns. Where no cache can be kept (under activation checkpointing,
    whose layers run again in the backward pass, and in models with a recurrent state, which a cache overwrites), each
    latent takes a pass over all that is before it: the same values and gradients for more compute.

    Args:
        backbone ([`~transformers.PreTrainedModel`]):
            Model without its head, whose `last_hidden_state` is taken after the final norm.
        input_ids (`torch.Tensor` of shape `(batch_size, length)`):
            Tokens, and any token at latent positions. Padding may be on both sides.
        attention_mask (`torch.Tensor` of shape `(batch_size, length)`):
            0 on padding.
        is_latent (`torch.Tensor` of shape `(batch_size, length)`):
            True at latent positions. Rows may have different ones, or none.
        position_ids (`torch.Tensor` of shape `(batch_size, length)`, *optional*):
            Positions. If `None`, counted from each row's first token.
        **kwargs:
            Further arguments of `backbone`.

    Returns:
        [`~transformers.modeling_outputs.BaseModelOutputWithPast`]: as `backbone` returns it, with a
        `last_hidden_state`, and `hidden_states` if `output_hidden_states`, of shape `(batch_size, length,
        hidden_size)`.

    Raises:
        `ValueError`: if a latent has no token before it.
    """
    before = torch.nn.functional.pad(attention_mask[:, :-1], (1, 0))
    if (is_latent & (before == 0)).any():
        raise ValueError("`is_latent` has a latent that is a row's first position: it needs a token before it.")
    if position_ids is None:
        position_ids = positions(attention_mask)
    starts = [0, *is_latent.any(0).nonzero().flatten().tolist()]
    ends = [*starts[1:], input_ids.size(1)]
    keeps_cache = len(starts) > 1 and not (is_checkpointed(backbone) or backbone._is_stateful)
    if keeps_cache:
        kwargs[CACHE_ARGUMENT] = DynamicCache(config=backbone.config.get_text_config())

    embeds = backbone.get_input_embeddings()(input_ids)
    read, hidden_states, of_layers = [], [], []
    for start, end in zip(starts, ends, strict=True):
        part = embeds[:, start:end]
        if start > 0:  # it begins with latents, of some rows at least
            thoughts = hidden_states[-1][:, -1:].to(part.dtype)
            first = torch.where(is_latent[:, start, None, None], thoughts, part[:, :1])
            part = torch.cat([first, part[:, 1:]], dim=1)
        read.append(part)
        output = backbone(
            inputs_embeds=part if keeps_cache else torch.cat(read, dim=1),
            attention_mask=attention_mask[:, :end],
            position_ids=position_ids[:, start:end] if keeps_cache else position_ids[:, :end],
            use_cache=keeps_cache,
            **kwargs,
        )
        hidden_states.append(output.last_hidden_state)
        of_layers.append(output.hidden_states or ())
    if keeps_cache:
        output.last_hidden_state = torch.cat(hidden_states, dim=1)
        if output.hidden_states is not None:
            output.hidden_states = tuple(torch.cat(parts, dim=1) for parts in zip(*of_layers, strict=True))
    return output


def add_hidden_thoughts(model: PreTrainedModel) -> None:
    """
    Let `model(..., is_latent=mask)` read with thoughts, see [`read_with_thoughts`]. Without `is_latent`, its forward
    is the original one, so generation is unchanged.

    It is the forward of the backbone that is replaced: TRL's fused LM head, PEFT and the engines of distributed
    training call it as before.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal LM, without what wraps it.
    """
    backbone = model.base_model
    original_forward = backbone.forward

    def forward(self, *args, is_latent: torch.Tensor | None = None, **kwargs):
        if is_latent is None:
            return original_forward(*args, **kwargs)
        set_kwargs = {name: value for name, value in kwargs.items() if value is not None and name != "use_cache"}
        return read_with_thoughts(self, *args, is_latent=is_latent, **set_kwargs)

    backbone.forward = types.MethodType(forward, backbone)

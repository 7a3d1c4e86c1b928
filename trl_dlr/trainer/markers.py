# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Tokens around latents, which a tokenizer and its model have to know."""

import copy

import torch
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add_markers(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    markers: dict[str, str],
    addable: dict[str, str],
) -> list[int]:
    """
    Ids of marker tokens. Missing ones that may be added are, with the mean embedding as their own.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal LM. Its embeddings grow if they have too few rows.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        markers (`dict[str, str]`):
            Tokens, by the names of the arguments that give them.
        addable (`dict[str, str]`):
            Those that may be added, by the same names.

    Returns:
        `list[int]`: an id for each marker.

    Raises:
        `ValueError`: if one is missing that may not be added. Nothing has been added then.
    """
    missing = {name: token for name, token in markers.items() if token not in processing_class.get_vocab()}
    for name, token in missing.items():
        if addable[name] != token:
            raise ValueError(
                f"`{name}` must be a token of the tokenizer, got {token!r}, which it does not have. Add it with "
                f"`tokenizer.add_tokens` and resize the model's embeddings, or leave it at {addable[name]!r}, which is "
                "added."
            )
    if missing:
        if hasattr(model, "peft_config"):
            raise ValueError(
                f"`model` has an adapter, but its tokenizer has no {', '.join(missing.values())}. Pass the model without "
                "adapter and a `peft_config`, so that the tokens can be added to it before."
            )
        processing_class.add_tokens(list(missing.values()), special_tokens=True)
        ids = processing_class.convert_tokens_to_ids(list(missing.values()))
        num_rows = model.get_input_embeddings().num_embeddings
        if max(ids) >= num_rows:
            model.resize_token_embeddings(len(processing_class), mean_resizing=False)
        known = min(num_rows, min(ids))
        with torch.no_grad():
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight[ids] = table.weight[:known].mean(0)
    return processing_class.convert_tokens_to_ids(list(markers.values()))


def train_markers(peft_config: PeftConfig, model: PreTrainedModel, ids: list[int]) -> PeftConfig:
    """
    `peft_config` with the embeddings of `ids` trained beside the adapter and saved with it.

    Raises:
        `ValueError`: if its kind of adapter cannot train them.
    """
    peft_config = copy.deepcopy(peft_config)
    embed_tokens = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embed_tokens).rpartition(".")[2]
    if name in (getattr(peft_config, "modules_to_save", None) or []):  # the whole table
        return peft_config
    if peft_config.is_prompt_learning or not hasattr(peft_config, "trainable_token_indices"):
        raise ValueError(
            f"`peft_config` must be one that can train embeddings of single tokens, such as `LoraConfig`, or name "
            f"{name!r} in `modules_to_save`, got {type(peft_config).__name__}: the model has to learn its markers."
        )
    trained = peft_config.trainable_token_indices or {}
    trained = dict(trained) if isinstance(trained, dict) else {name: trained}
    trained[name] = sorted({*trained.get(name, []), *ids})
    peft_config.trainable_token_indices = trained
    return peft_config

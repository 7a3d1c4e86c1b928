# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What the supported versions of transformers name differently about a causal LM's KV cache."""

import inspect

from transformers import GenerationMixin, PreTrainedModel


# transformers 5.24 renamed this argument of every model and of `generate`; the old name works there, with a warning,
# until 5.40
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


def is_checkpointed(model: PreTrainedModel) -> bool:
    """Whether the model's layers run again in the backward pass, and so keep no cache."""
    # transformers' property for it has another name from 5.23 on
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

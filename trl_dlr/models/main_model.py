# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The frozen main model: assistants made from it, its weights recognized, its likelihoods; and modes of any model."""

import copy
import hashlib
import itertools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

import torch
from accelerate.utils import align_module_device
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, PreTrainedModel

from .architectures import (
    NOT_CUT,
    attention_layers,
    check_family,
    check_stands_alone,
    embedding_device,
    has_code_of_its_own,
    latent_token_ids,
    per_layer_inputs,
    text_backbone,
)


def is_checkpointed(model: PreTrainedModel) -> bool:
    """Whether the model's layers run again in the backward pass, and so keep no cache."""
    # transformers' property for it has another name from 5.23 on
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put `model` in evaluation mode (no dropout, no gradient checkpointing) and back to the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def disable_dropout(model: nn.Module) -> None:
    """
    Switch off all that is random in training mode: modules of dropout, rates that other modules keep as numbers or
    read from their configuration, and the jitter of routers. What `model` is saved with stays as it is.
    """
    for module in list(model.modules()):
        if "Dropout" in type(module).__name__ and hasattr(module, "p"):
            module.p = 0.0
        for name in _rates(module):
            setattr(module, name, 0.0)
        config = vars(module).get("config")
        if not isinstance(module, PreTrainedModel) and config is not None and _rates(config):
            module.config = copy.copy(config)
            for name in _rates(config):
                setattr(module.config, name, 0.0)


def _rates(owner: Any) -> list[str]:
    """Attributes that are rates of dropout or jitter above 0."""
    numbers = {name: value for name, value in vars(owner).items() if type(value) is float and value > 0}
    return [name for name in numbers if "drop" in name or "jitter" in name]


SAMPLES_PER_TENSOR = 4096


def _digest(samples: list[tuple[str, torch.Size, torch.Tensor]], dtype: torch.dtype) -> str:
    digest = hashlib.sha256()
    for name, shape, values in sorted(samples, key=lambda sample: sample[0]):
        digest.update(f"{name}{tuple(shape)}".encode())
        digest.update(values.to("cpu", dtype).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """
    Fingerprint of a model's weights, independent of the device (offloaded weights included) and of the dtype that a
    checkpoint is loaded in: `"<vectors and embeddings>-<all weights>"`, two short SHA-256 digests over evenly spaced
    samples of every tensor, rounded to bfloat16, then two more over samples rounded to float16. A load of the same
    checkpoint shares one pair at least. Only loads of a float32 checkpoint in bfloat16 and in float16 do not recognize
    each other: each has lost what the other has kept.

    Of a multimodal model only the text part counts, under the names that it has where it is loaded by itself.

    The second of a pair is `"quantized"` for a quantized model, whose matrices are packed; the first, over the tensors
    that quantization leaves alone, still identifies it. See [`fingerprints_match`].
    """
    is_wrapper = model.config is not model.config.get_text_config()
    parts = {"model": text_backbone(model), "lm_head": model.get_output_embeddings()} if is_wrapper else {"": model}
    # Of tied weights only the first, also where they are two tensors after accelerate has fetched them once
    names = {name for part, module in parts.items() for name, _ in module.named_parameters(part)}
    tied = getattr(model, "all_tied_weights_keys", {})
    names -= {name for name, source in tied.items() if source in names or is_wrapper}
    embeddings = model.get_input_embeddings()
    kept, floating = [], []
    for prefix, module in itertools.chain(*(module.named_modules(prefix=part) for part, module in parts.items())):
        with align_module_device(module):  # what accelerate has offloaded comes one module at a time
            for name, tensor in module.named_parameters(prefix, recurse=False):
                if name in names and tensor.is_floating_point():
                    values = tensor.detach().reshape(-1)[:: max(tensor.numel() // SAMPLES_PER_TENSOR, 1)]
                    floating.append((name, tensor.shape, values.clone()))
                    if tensor.ndim == 1 or module is embeddings:
                        kept.append(floating[-1])
    is_quantized = getattr(model, "is_quantized", False) and len(floating) < len(names)
    return "-".join(
        "quantized" if is_quantized and samples is floating else _digest(samples, dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for samples in (kept, floating)
    )


def warn_of_cast(model: nn.Module) -> None:
    """
    Warn of a model that was cast as a whole after it was loaded, which rounds what every load keeps in float32: the
    frequencies of rotary embeddings. Fingerprints are of weights alone, which such a cast leaves as they are.
    """
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype in (torch.bfloat16, torch.float16):
            dtype = str(buffer.dtype).removeprefix("torch.")
            warnings.warn(
                f"`main_model` was cast to {dtype} after it was loaded, and its rotary embeddings ({name}) with it: "
                f"it does not answer as the same model does where it is loaded. Load it with `dtype={dtype!r}` "
                "instead.",
                stacklevel=2,
            )
            return


def fingerprints_match(first: str, second: str) -> bool:
    """
    Whether two fingerprints name the same weights; a quantized one is compared by the first half of its pairs. One of
    an earlier version has the bfloat16 pair alone, and is compared by that.
    """
    halves = [fingerprint.split("-") for fingerprint in (first, second)]
    pairs = [list(zip(parts[::2], parts[1::2], strict=True)) for parts in halves]
    return any(
        kept == other_kept if "quantized" in (whole, other_whole) else whole == other_whole
        for (kept, whole), (other_kept, other_whole) in zip(*pairs, strict=False)
    )


def with_few_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A backbone of the model's architecture, newly initialized in float32."""
    check_family(model, "main_model")
    config = model.config.get_text_config()
    check_stands_alone(config, "main_model")
    family, total = config.model_type, config.num_hidden_layers
    if not 1 <= num_layers <= total:
        raise ValueError(f"`num_layers` must be between 1 and the main model's {total} layers, got {num_layers}.")
    if family in NOT_CUT and num_layers < total:
        raise ValueError(
            f"`num_layers` must be {total} for this {family} model, whose layers run more than once, got {num_layers}: "
            "a few of them are no model of their own. Take another assistant."
        )
    is_attention = attention_layers(model)
    if any(is_attention) and not any(is_attention[:num_layers]):
        raise ValueError(
            f"`num_layers` must be at least {is_attention.index(True) + 1} for this {family} model, whose first layer "
            f"with attention that is, got {num_layers}: positions are counted there."
        )
    values = config.to_dict() | {"num_hidden_layers": num_layers, "dtype": None}
    values.pop("quantization_config", None)
    for name, value in values.items():
        if isinstance(value, list) and "token" not in name:
            if len(value) == total:  # one entry per layer
                values[name] = value[:num_layers]
            elif "layer" in name and all(type(index) is int for index in value):  # numbers of layers
                values[name] = [index for index in value if index < num_layers]
    if per_layer := values.get("per_layer_config"):  # what some layers have of their own
        values["per_layer_config"] = {index: own for index, own in per_layer.items() if int(index) < num_layers}
    if num_shared := values.get("num_kv_shared_layers"):  # the last layers
        values["num_kv_shared_layers"] = max(num_layers - (total - num_shared), 0)
    try:
        implementation = config._attn_implementation  # which is not in the dictionary
        config = type(config).from_dict(values, name_or_path=model.config.name_or_path)
        config._attn_implementation = implementation
        return AutoModel.from_config(config, trust_remote_code=has_code_of_its_own(config)).float()
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(
            f"`num_layers={num_layers}` of the {total} layers of this {family} model are no model that transformers "
            f"builds by itself ({shorten(str(error), 200)}). Take more of them, or another assistant."
        ) from error


def check_not_offloaded(weights: Iterable[torch.Tensor]) -> None:
    """Refuse to copy weights that are not in memory."""
    if any(weight.is_meta for weight in weights):
        raise ValueError(
            "`main_model` has weights that are offloaded, which cannot be copied. Make the assistant of another load of "
            "it, whole in memory, and save it."
        )


def first_layers(main_model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """
    Backbone made of a copy of the main model's embeddings, first `num_layers` layers and final norm, in float32.

    Args:
        main_model ([`~transformers.PreTrainedModel`]):
            Causal LM to copy from, not quantized.
        num_layers (`int`):
            Number of layers to keep.

    Raises:
        `ValueError`: if they are no model of their own.
    """
    backbone = with_few_layers(main_model, num_layers)
    kinds, kinds_of_main = (
        getattr(model.config.get_text_config(), "layer_types", None) or [] for model in (backbone, main_model)
    )
    source, copied = text_backbone(main_model).state_dict(), {}
    check_not_offloaded(source.values())
    differing = [f"layer_types: {kinds}"] if kinds != kinds_of_main[:num_layers] else []
    for name, tensor in backbone.state_dict().items():
        weight = source.get(name)
        if weight is not None and "per_layer" in name:  # tables that hold all layers, one after the other
            weight = weight[tuple(map(slice, tensor.shape))]
        if weight is None or weight.shape != tensor.shape:
            differing.append(name)
        copied[name] = weight
    if differing:
        raise ValueError(
            f"`num_layers={num_layers}` layers of this {backbone.config.model_type} model differ from the main model's "
            f"({', '.join(differing)}): the last layer of this family is of a kind of its own. Take another number, or "
            "`fresh_layers`."
        )
    backbone.load_state_dict(copied)
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
    check_not_offloaded([main_model.get_input_embeddings().weight])
    embeddings: nn.Embedding = backbone.get_input_embeddings()
    with torch.no_grad():
        embeddings.weight.copy_(main_model.get_input_embeddings().weight)
    return backbone


def moved_right(missing: torch.Tensor, mask: torch.Tensor, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """
    Rows whose last positions are missing, begun so much further right: what follows them has no gap before it, in
    which a window, a convolution or a recurrence would see something.

    Args:
        missing (`torch.Tensor` of shape `(batch_size,)`):
            Number of missing positions of each row.
        mask (`torch.Tensor` of shape `(batch_size, length)`):
            0 on padding.
        *parts (`torch.Tensor` of shape `(batch_size, length, ...)`):
            What else the rows have.

    Returns:
        `tuple[torch.Tensor, ...]`: the mask, then the parts.
    """
    index = torch.arange(mask.size(1), device=mask.device) - missing.unsqueeze(1)
    rows, place = torch.arange(len(mask), device=mask.device).unsqueeze(1), index.clamp(min=0)
    return mask[rows, place] * (index >= 0), *(part[rows, place] for part in parts)


def teacher_forced_inputs(
    main_model: PreTrainedModel,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    latent_embeds: torch.Tensor,
    completion_ids: torch.Tensor,
    num_latents: torch.Tensor | None = None,
    latent_ids: list[int] | None = None,
) -> dict[str, Any]:
    """
    `[prompt ; latents ; completion]` as inputs of the main model, with labels on the completion. Their likelihood has
    a gradient in the latents.

    Args:
        main_model ([`~transformers.PreTrainedModel`]):
            Frozen causal LM.
        prompt_ids (`torch.Tensor` of shape `(batch_size, prompt_length)`):
            Left-padded prompts.
        prompt_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`):
            0 on padding.
        latent_embeds (`torch.Tensor` of shape `(batch_size, T, hidden_size)`):
            Injected latents.
        completion_ids (`torch.Tensor` of shape `(batch_size, completion_length)`):
            Completions, padded with -100 on the right.
        num_latents (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            Latents of each row, the first ones, if not all.
        latent_ids (`list[int]`, *optional*):
            Tokens that stand for the latents, see [`latent_token_ids`].

    Returns:
        `dict[str, Any]`: keyword arguments, on the device of the main model's embeddings.
    """
    embed = main_model.get_input_embeddings()
    device = embedding_device(embed)
    prompt_ids, prompt_mask, completion_ids = (part.to(device) for part in (prompt_ids, prompt_mask, completion_ids))
    latent_embeds, size = latent_embeds.to(device), prompt_ids.size(1) + latent_embeds.size(1)
    completion_embeds = embed(completion_ids.clamp(min=0))
    before = torch.cat([embed(prompt_ids), latent_embeds.to(completion_embeds.dtype)], dim=1)
    token_ids = torch.cat([prompt_ids, latent_token_ids(main_model, latent_embeds, latent_ids)], dim=1)
    mask = torch.cat([prompt_mask.long(), torch.ones_like(token_ids[:, prompt_ids.size(1) :])], dim=1)
    if num_latents is not None:
        # The completion's first token is read off the last latent of every row
        missing = latent_embeds.size(1) - num_latents.to(device)
        mask, before, token_ids = moved_right(missing, mask, before, token_ids)
    mask = torch.cat([mask, (completion_ids != -100).long()], dim=1)
    return {
        "inputs_embeds": torch.cat([before, completion_embeds], dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": torch.cat([completion_ids.new_full((len(prompt_ids), size), -100), completion_ids], dim=1),
        **per_layer_inputs(main_model, torch.cat([token_ids, completion_ids.clamp(min=0)], dim=1)),
    }


@torch.no_grad()
def completion_log_probs(
    main_model: PreTrainedModel,
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    latent_embeds: torch.Tensor | None = None,
    num_latents: torch.Tensor | None = None,
    latent_ids: list[int] | None = None,
) -> tuple[list[torch.Tensor], list[bool]]:
    """
    Log-probabilities of given completions, without gradient.

    Args:
        main_model ([`~transformers.PreTrainedModel`]):
            Frozen causal LM.
        prompt_ids (`list[list[int]]`):
            Prompts, at least one token each.
        completion_ids (`list[list[int]]`):
            Their completions, at least one token each.
        latent_embeds (`torch.Tensor` of shape `(len(prompt_ids), T, hidden_size)`, *optional*):
            Embeddings between prompt and completion. Without them the main model is on its own.
        num_latents (`torch.Tensor` of shape `(len(prompt_ids),)`, *optional*):
            Latents of each row, the first ones, if not all.
        latent_ids (`list[int]`, *optional*):
            Tokens that stand for the latents, see [`latent_token_ids`].

    Returns:
        `tuple[list[torch.Tensor], list[bool]]`: float32 log-probability of each token of each completion, and whether
        greedy decoding would give the completion.
    """

    def padded(rows: list[list[int]], value: int, side: str) -> torch.Tensor:
        return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, value, side)

    if latent_embeds is None:
        latent_embeds = torch.empty(len(prompt_ids), 0, main_model.get_input_embeddings().embedding_dim)
    prompts, completions = padded(prompt_ids, 0, "left"), padded(completion_ids, -100, "right")
    mask = padded([[1] * len(ids) for ids in prompt_ids], 0, "left")
    inputs = teacher_forced_inputs(main_model, prompts, mask, latent_embeds, completions, num_latents, latent_ids)
    del inputs["labels"]
    # The last position before the completion gives its first token, and nothing is read off its last one
    with contiguous_lm_head(main_model):
        logits = main_model(**inputs, use_cache=False, logits_to_keep=completions.size(1) + 1).logits[:, :-1].float()
    completions = completions.to(logits.device)
    targets = completions.clamp(min=0)
    log_probs = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    is_greedy = ((logits.argmax(-1) == targets) | (completions == -100)).all(1)
    return [row[: len(ids)].cpu() for row, ids in zip(log_probs, completion_ids, strict=True)], is_greedy.tolist()


@contextmanager
def contiguous_lm_head(model: PreTrainedModel) -> Iterator[None]:
    """
    A slice of hidden states times a frozen head is a batched product in torch: it copies the head once per row, and
    rounds differently than the product with a head that is not frozen. Here the head is given whole tensors.
    """
    lm_head = model.get_output_embeddings()
    contiguous = lm_head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        contiguous.remove()

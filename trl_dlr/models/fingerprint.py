# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Recognize the main model that a policy was trained for."""

import hashlib

import torch
from torch import nn


SAMPLES_PER_TENSOR = 4096


def _digest(tensors: list[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(flat.numel() // SAMPLES_PER_TENSOR, 1)]
        # Rounded to bfloat16, so that a float32 and a bfloat16 load of the same weights agree
        digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """
    Fingerprint of a model's weights: `"<vectors and embeddings>-<all weights>"`, two short SHA-256 digests over
    evenly spaced samples of every tensor, independent of device and of float32 against bfloat16.

    The second half is `"quantized"` for a quantized model, whose matrices are packed; the first half, over the tensors
    that quantization leaves alone, still identifies it. See [`fingerprints_match`].
    """
    tensors = sorted(model.named_parameters(), key=lambda item: item[0])
    floating = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    kept = [(name, tensor) for name, tensor in floating if tensor.ndim == 1 or id(tensor) in embeddings]
    is_quantized = getattr(model, "is_quantized", False) and len(floating) < len(tensors)
    return f"{_digest(kept)}-{'quantized' if is_quantized else _digest(floating)}"


def fingerprints_match(first: str, second: str) -> bool:
    """Whether two fingerprints name the same weights; a quantized one is compared by its first half."""
    (first_kept, first_all), (second_kept, second_all) = first.split("-"), second.split("-")
    if "quantized" in (first_all, second_all):
        return first_kept == second_kept
    return first_all == second_all

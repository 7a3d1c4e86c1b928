# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Recognize the main model that a policy was trained for."""

import hashlib

import torch
from accelerate.utils import align_module_device
from torch import nn


SAMPLES_PER_TENSOR = 4096


def _digest(samples: list[tuple[str, torch.Size, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, shape, values in sorted(samples, key=lambda sample: sample[0]):
        digest.update(f"{name}{tuple(shape)}".encode())
        # Rounded to bfloat16, so that a float32 and a bfloat16 load of the same weights agree
        digest.update(values.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """
    Fingerprint of a model's weights: `"<vectors and embeddings>-<all weights>"`, two short SHA-256 digests over
    evenly spaced samples of every tensor, independent of device (offloaded weights included) and of float32 against
    bfloat16.

    The second half is `"quantized"` for a quantized model, whose matrices are packed; the first half, over the tensors
    that quantization leaves alone, still identifies it. See [`fingerprints_match`].
    """
    names = {name for name, _ in model.named_parameters()}  # of tied weights only the first
    embeddings = model.get_input_embeddings()
    kept, floating = [], []
    for prefix, module in model.named_modules():
        with align_module_device(module):  # what accelerate has offloaded comes one module at a time
            for name, tensor in module.named_parameters(prefix, recurse=False):
                if name in names and tensor.is_floating_point():
                    values = tensor.detach().reshape(-1)[:: max(tensor.numel() // SAMPLES_PER_TENSOR, 1)]
                    floating.append((name, tensor.shape, values.clone()))
                    if tensor.ndim == 1 or module is embeddings:
                        kept.append(floating[-1])
    is_quantized = getattr(model, "is_quantized", False) and len(floating) < len(names)
    return f"{_digest(kept)}-{'quantized' if is_quantized else _digest(floating)}"


def fingerprints_match(first: str, second: str) -> bool:
    """Whether two fingerprints name the same weights; a quantized one is compared by its first half."""
    (first_kept, first_all), (second_kept, second_all) = first.split("-"), second.split("-")
    if "quantized" in (first_all, second_all):
        return first_kept == second_kept
    return first_all == second_all

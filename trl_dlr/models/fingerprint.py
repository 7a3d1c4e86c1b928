# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Recognize the main model that a policy was trained for."""

import hashlib
import warnings

import torch
from accelerate.utils import align_module_device
from torch import nn


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

    The second of a pair is `"quantized"` for a quantized model, whose matrices are packed; the first, over the tensors that
    quantization leaves alone, still identifies it. See [`fingerprints_match`].
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
                f"`main_model` was cast to {dtype} after it was loaded, and its rotary embeddings ({name}) with it: it does "
                f"not answer as the same model does where it is loaded. Load it with `dtype={dtype!r}` instead.",
                stacklevel=2,
            )
            return


def fingerprints_match(first: str, second: str) -> bool:
    """
    Whether two fingerprints name the same weights; a quantized one is compared by the first half of its pairs. One of an
    earlier version has the bfloat16 pair alone, and is compared by that.
    """
    halves = [fingerprint.split("-") for fingerprint in (first, second)]
    pairs = [list(zip(parts[::2], parts[1::2], strict=True)) for parts in halves]
    return any(
        kept == other_kept if "quantized" in (whole, other_whole) else whole == other_whole
        for (kept, whole), (other_kept, other_whole) in zip(*pairs, strict=False)
    )

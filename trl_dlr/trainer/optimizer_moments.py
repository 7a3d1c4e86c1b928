# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What AdamW knows of a small head that is trained beside the model, as tensors of a checkpoint."""

import torch


PREFIX = "optimizer."


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """State of an optimizer as named tensors, for safetensors."""
    state = optimizer.state_dict()["state"]
    return {f"{PREFIX}{i}.{name}": tensor for i, moments in state.items() for name, tensor in moments.items()}


def load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Load what [`moments_of`] returned. Tensors of other names are left alone."""
    state = {}
    for name, tensor in tensors.items():
        if name.startswith(PREFIX):
            i, key = name.removeprefix(PREFIX).split(".")
            state.setdefault(int(i), {})[key] = tensor.cpu() if key == "step" else tensor  # AdamW counts on the CPU
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

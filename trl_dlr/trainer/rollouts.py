# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The rollout that is being learned from, as a safetensors file of a checkpoint: one file a process."""

import os
from collections import defaultdict
from collections.abc import Sequence

import torch
from safetensors.torch import load_file, save_file


def rollout_path(checkpoint: str, process_index: int) -> str:
    return os.path.join(checkpoint, f"rollout_{process_index}.safetensors")


def save_rollout(
    path: str, step: int, batches: Sequence[dict[str, torch.Tensor]], groups: Sequence[torch.Tensor]
) -> None:
    """
    Write a rollout.

    Args:
        path (`str`):
            File to write.
        step (`int`):
            Forward and backward passes so far, which say how much of the rollout has been used.
        batches (`Sequence[dict[str, torch.Tensor]]`):
            Micro-batches of the rollout.
        groups (`Sequence[torch.Tensor]`):
            Whole groups that the contrastive loss compares with; may be empty.
    """
    tensors = {"step": torch.tensor(step)}
    for i, batch in enumerate(batches):
        tensors.update({f"batch.{i}.{name}": tensor for name, tensor in batch.items()})
    tensors.update({f"group.{i}": tensor for i, tensor in enumerate(groups)})
    # Micro-batches are views of one tensor, which safetensors refuses
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)


def load_rollout(
    path: str, device: torch.device
) -> tuple[int, list[dict[str, torch.Tensor]], tuple[torch.Tensor, ...]]:
    """Step, micro-batches and groups of a rollout that [`save_rollout`] wrote."""
    # safetensors does not know every name of a device, `cpu:0` for one
    tensors = {name: tensor.to(device) for name, tensor in load_file(path).items()}
    step = tensors.pop("step").item()
    batches = defaultdict(dict)
    for name in [name for name in tensors if name.startswith("batch.")]:
        _, place, key = name.split(".")
        batches[int(place)][key] = tensors.pop(name)
    return step, [batches[i] for i in sorted(batches)], tuple(tensors[name] for name in sorted(tensors))


class ResumableRolloutsMixin:
    """
    For a [`~trl.GRPOTrainer`] with tensors alone in its batches: a rollout serves several steps, so a checkpoint between
    them holds it, each process its own part, beside its state of random numbers.
    """

    _groups = {}  # what the contrastive loss compares with, by mode

    def _save_rng_state(self, output_dir: str):
        super()._save_rng_state(output_dir)
        path = rollout_path(output_dir, self.accelerator.process_index)
        save_rollout(path, self._step, self._buffered_inputs, self._groups.get("train", ()))

    def _load_rng_state(self, checkpoint: str | None):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            path = rollout_path(checkpoint, self.accelerator.process_index)
            self._step, self._buffered_inputs, groups = load_rollout(path, self.accelerator.device)
            self._groups = {**self._groups, "train": groups}

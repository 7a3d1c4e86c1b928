# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Which part of a worked answer is still written, and which the latents stand for, stage by stage."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME


class CurriculumCallback(TrainerCallback):
    """
    Moves a curriculum on, in the manner of Coconut ([arXiv 2412.06769](https://huggingface.co/papers/2412.06769)).

    In stage s the first s reasoning steps are gone and latents stand for them; in the last stage all steps are gone, in
    stage 0 none. Without stages all latents are always there, and so is the whole completion.

    Args:
        num_stages (`int`):
            Number of stages S after stage 0; 0 for none.
        epochs_per_stage (`int`):
            Epochs of each stage before the last, which has the rest.
        epochs_of_stage_0 (`int`, *optional*, defaults to `0`):
            Epochs before stage 1.
    """

    def __init__(self, num_stages: int, epochs_per_stage: int, epochs_of_stage_0: int = 0):
        self.num_stages = num_stages
        self.epochs_per_stage = epochs_per_stage
        self.epochs_of_stage_0 = epochs_of_stage_0
        self.stage = self.stage_of(0)
        self.on_new_stage = []  # functions of no arguments

    def stage_of(self, epoch: float) -> int:
        if epoch < self.epochs_of_stage_0:
            return 0
        return min(1 + (int(epoch) - self.epochs_of_stage_0) // self.epochs_per_stage, self.num_stages)

    def on_train_begin(self, args, state, control, **kwargs):
        self.go_to(state)

    def go_to(self, state: TrainerState) -> None:
        """To the stage of the last step before `state`: a run that resumes where a stage begins has yet to enter it."""
        self.stage = self.stage_of(max((state.epoch or 0.0) - 1e-6, 0.0))

    def on_epoch_begin(self, args, state, control, **kwargs):
        stage = self.stage_of(state.epoch)
        if stage != self.stage:
            self.stage = stage
            for act in self.on_new_stage:
                act()


def keep_after_stage(
    completion_ids: torch.Tensor,
    step_index: torch.Tensor,
    stages: torch.Tensor,
    num_stages: int,
    tokens_per_stage: int | None = None,
) -> torch.Tensor:
    """
    What of worked answers is left to be written.

    Args:
        completion_ids (`torch.Tensor` of shape `(batch_size, length)`):
            Steps and answer, padded with -100.
        step_index (`torch.Tensor` of shape `(batch_size, length)`):
            Number of the step that a token belongs to, from 0; -1 in the answer and on padding.
        stages (`torch.Tensor` of shape `(batch_size,)`):
            Stage of each row.
        num_stages (`int`):
            Number of stages; rows in the last one have no step left.
        tokens_per_stage (`int`, *optional*):
            If given, stages take this many tokens of the steps instead of whole steps.

    Returns:
        `torch.Tensor` of shape `(batch_size, longest)`: the same ids without what is gone, padded with -100.
    """
    is_step = step_index >= 0
    place = is_step.cumsum(1) - 1 if tokens_per_stage is not None else step_index
    gone = stages.unsqueeze(1) * (tokens_per_stage or 1)
    is_gone = is_step & ((place < gone) | (stages == num_stages).unsqueeze(1))
    rows = [ids[keep] for ids, keep in zip(completion_ids, ~is_gone & (completion_ids != -100), strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


class CurriculumMixin:
    """
    For a TRL trainer whose arguments are [`CurriculumArguments`]: every batch as the present stage has it, and an
    optimizer that starts anew with each stage. The trainer adds `_at_stage`.

    Args:
        epochs_of_stage_0 (`int`, *optional*, defaults to `0`):
            Epochs before stage 1.
    """

    def __init__(self, *args, epochs_of_stage_0: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.curriculum = CurriculumCallback(self.args.num_stages, self.args.epochs_per_stage, epochs_of_stage_0)
        self.add_callback(self.curriculum)
        if self.args.reset_optimizer:
            self.curriculum.on_new_stage.append(self._reset_optimizer)

    def _at_stage(
        self, inputs: dict[str, torch.Tensor], generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        """A collated batch as its stages have it, drawn by `_draw_stages`."""
        raise NotImplementedError

    def _draw_stages(self, num_rows: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Stage of each row: the present one, mixed with others if there is a `generator` to choose them."""
        stages = torch.full((num_rows,), self.curriculum.stage)
        if generator is not None and self.args.stage_mixing > 0:
            is_mixed = torch.rand(num_rows, generator=generator) < self.args.stage_mixing
            others = torch.randint(1, self.args.num_stages + 1, (num_rows,), generator=generator)
            stages = torch.where(is_mixed, others, stages)
        return stages

    def _what_is_left(
        self, completion_ids: torch.Tensor, step_index: torch.Tensor, stages: torch.Tensor
    ) -> torch.Tensor:
        tokens_per_stage = self.args.latents_per_stage if self.args.curriculum_unit == "token" else None
        return keep_after_stage(completion_ids, step_index, stages, self.args.num_stages, tokens_per_stage)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        # Trainer counts the labels of a step here
        step = self.state.global_step * self.accelerator.num_processes + self.accelerator.process_index
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
        staged = (self._at_stage(inputs, generator) for inputs in epoch_iterator)
        return super().get_batch_samples(staged, num_batches, device)

    def _checkpoint_record(self) -> dict[str, Any]:
        record = super()._checkpoint_record()
        for name in ("num_stages", "latents_per_stage", "curriculum_unit", "epochs_per_stage"):
            record["run"][name] = getattr(self.args, name)
        return record

    def _load_best_model(self):
        super()._load_best_model()
        path = os.path.join(self.state.best_model_checkpoint, TRAINER_STATE_NAME)
        self.curriculum.go_to(TrainerState.load_from_json(path))

    def _reset_optimizer(self) -> None:
        """Moments and step counts start anew, in place: under DeepSpeed they are views of its partitions."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        optimizer = getattr(optimizer, "optimizer", optimizer)
        for state in optimizer.state.values():
            for tensor in state.values():
                if isinstance(tensor, torch.Tensor):
                    tensor.zero_()

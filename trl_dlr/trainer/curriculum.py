# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Which part of a worked answer is still written, and which the latents stand for, stage by stage."""

import torch
from transformers import TrainerCallback


class CurriculumCallback(TrainerCallback):
    """
    Moves a curriculum on, in the manner of Coconut ([arXiv 2412.06769](https://huggingface.co/papers/2412.06769)).

    In stage s the first s reasoning steps are gone and s * `latents_per_step` latents stand for them; in the last stage
    all steps are gone. Without stages all latents are always there, and so is the whole completion.

    Args:
        num_stages (`int`):
            Number of stages S; 0 for none.
        epochs_per_stage (`int`):
            Epochs of each stage before the last, which has the rest.
    """

    def __init__(self, num_stages: int, epochs_per_stage: int):
        self.num_stages = num_stages
        self.epochs_per_stage = epochs_per_stage
        self.stage = min(1, num_stages)
        self.on_new_stage = []  # functions of no arguments

    def stage_of(self, epoch: float) -> int:
        return min(1 + int(epoch) // self.epochs_per_stage, self.num_stages)

    def on_train_begin(self, args, state, control, **kwargs):
        # Of the last step before: a run that resumes where a stage begins has yet to enter it
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

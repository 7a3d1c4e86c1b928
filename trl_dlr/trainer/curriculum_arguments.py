# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from dataclasses import dataclass, field


CURRICULUM_UNITS = ("step", "token")


@dataclass
class CurriculumArguments:
    r"""
    What the configurations of trainers with a curriculum have in common: in stage s, latents stand for the first s
    reasoning steps of an answer, in the manner of Coconut
    ([arXiv 2412.06769](https://huggingface.co/papers/2412.06769)).

    Parameters:
        num_stages (`int`, *optional*, defaults to `0`):
            Number S of stages. In stage s, latents stand for the first s steps; in the last, for all of them. 0: the
            whole completion is learned with all latents from the start.
        latents_per_stage (`int`, *optional*, defaults to `2`):
            Latents c that each stage adds.
        curriculum_unit (`str`, *optional*, defaults to `"step"`):
            What a stage replaces: a whole reasoning `"step"`, or as many tokens as it adds latents (`"token"`).
        epochs_per_stage (`int`, *optional*, defaults to `1`):
            Epochs of each stage before the last, which has the rest of training.
        reset_optimizer (`bool`, *optional*, defaults to `True`):
            Whether AdamW's moments start anew with each stage.
        stage_mixing (`float`, *optional*, defaults to `0.0`):
            Probability with which an example is taken from another stage, drawn uniformly.
    """

    num_stages: int = field(default=0, metadata={"help": "Stages of the curriculum; 0 for none."})
    latents_per_stage: int = field(default=2, metadata={"help": "Latents that each stage adds."})
    curriculum_unit: str = field(
        default="step",
        metadata={"help": "What a stage replaces: 'step' or 'token'.", "choices": list(CURRICULUM_UNITS)},
    )
    epochs_per_stage: int = field(default=1, metadata={"help": "Epochs of each stage before the last."})
    reset_optimizer: bool = field(
        default=True, metadata={"help": "Whether AdamW's moments start anew with each stage."}
    )
    stage_mixing: float = field(
        default=0.0, metadata={"help": "Probability with which an example is taken from another stage."}
    )

    def check_curriculum_arguments(self) -> None:
        for name, least in (("num_stages", 0), ("latents_per_stage", 1), ("epochs_per_stage", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if not 0 <= self.stage_mixing <= 1:
            raise ValueError(f"`stage_mixing` must be between 0 and 1, got {self.stage_mixing}.")
        if self.curriculum_unit not in CURRICULUM_UNITS:
            raise ValueError(
                f"`curriculum_unit` must be one of {', '.join(CURRICULUM_UNITS)}, got {self.curriculum_unit!r}."
            )

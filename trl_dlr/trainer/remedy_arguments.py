# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from dataclasses import dataclass, field

from trl import GRPOConfig

from .advantages import INVALID_MODES


@dataclass
class RemedyArguments:
    r"""
    Remedies of the paper "Latent-GRPO" ([2604.27998](https://huggingface.co/papers/2604.27998)) for the advantages of
    latents, as options of any trainer of them. See [`group_advantages`] and [`select_first_latent`].

    Parameters:
        > Parameters of the advantages

        invalid_samples (`str`, *optional*, defaults to `"keep"`):
            What becomes of samples that were cut off by their token budget. `"keep"`: they are samples as any other.
            `"include"`: they count in their group's mean and standard deviation, and have advantage 0. `"exclude"`:
            they do not count either. A wrong answer that is complete is valid.
        first_latent_selection (`bool`, *optional*, defaults to `False`):
            Whether, in a group with a positive advantage, only the likeliest of its positive samples keeps an advantage
            at the first latent. All samples of a question have that position in common.
    """

    invalid_samples: str = field(
        default="keep",
        metadata={
            "help": "Samples cut off by their token budget: 'keep' them, 'include' them in their group's statistics with "
            "advantage 0, or 'exclude' them from both.",
            "choices": ["keep", *INVALID_MODES],
        },
    )
    first_latent_selection: bool = field(
        default=False,
        metadata={
            "help": "Whether only the likeliest positive sample of a group has an advantage at its first latent."
        },
    )

    def check_remedies(self) -> None:
        choices = self.__dataclass_fields__["invalid_samples"].metadata["choices"]
        if self.invalid_samples not in choices:
            raise ValueError(f"`invalid_samples` must be one of {', '.join(choices)}, got {self.invalid_samples!r}.")
        if self.invalid_samples != "keep":
            check_group_advantages(
                self, f"`invalid_samples={self.invalid_samples!r}` takes samples out of their own group"
            )


def check_group_advantages(args: GRPOConfig, reason: str) -> None:
    """Refuse settings under which advantages are something else than those of [`group_advantages`]."""
    needed = {"scale_rewards": ("group", "none"), "multi_objective_aggregation": ("sum_then_normalize",)}
    for name, values in needed.items():
        if getattr(args, name) not in values:
            raise ValueError(
                f"{reason}, so `{name}` must be {' or '.join(map(repr, values))}, got {getattr(args, name)!r}."
            )

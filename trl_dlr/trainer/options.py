# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Options of a training: which of TRL's have no meaning here, which were set, and what may be said of them."""

import math
import re
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any

import torch


NAMES_OF_SECRETS = r"(token|(api|access|private)[_-]?key|secret([_-]?key)?|passw(or)?d|pwd|credentials?|authorization|auth|bearer|cookie)"
SECRET_NAME = re.compile(rf"(^|[_-]){NAMES_OF_SECRETS}$", re.I)
SECRET_IN_TEXT = re.compile(  # of an URL, or a header
    rf"(?<=://)[^/\s@]+(?=@)|((?<![a-z]){NAMES_OF_SECRETS}=|\bbearer )[^&\s]+", re.I
)


def without_secrets(value: Any, name: str = "") -> Any:
    """
    `value` as it may be printed, saved or uploaded: texts with the name of a secret, at any depth, are replaced by that
    name, as in [`~transformers.TrainingArguments.to_dict`], and so are credentials in URLs and headers.

    Args:
        value (`Any`):
            Value of an option.
        name (`str`, *optional*, defaults to `""`):
            Its name.
    """
    if isinstance(value, dict):
        return {key: without_secrets(part, str(key)) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(part, name) for part in value]
    if isinstance(value, str):
        return f"<{name.upper()}>" if SECRET_NAME.search(name) else SECRET_IN_TEXT.sub(r"\1<CREDENTIALS>", value)
    return value


# What TRL would only refuse in the first loss
GROUP_CHOICES = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}


def default_of(field: Field) -> Any:
    """Default of a dataclass's field."""
    return field.default if field.default_factory is MISSING else field.default_factory()


class ReportableArguments:
    """
    For a configuration of [`~transformers.TrainingArguments`], before it in the order of bases: what is printed of it, or
    handed to trackers, has no secrets, and it knows which of its fields were set and which were derived from others.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.__repr__ = cls.__str__  # a dataclass would make one that tells everything

    def __post_init__(self):
        self._set_fields = [field.name for field in fields(self) if getattr(self, field.name) != default_of(field)]
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            # TRL's names for what newer versions of transformers call otherwise, with a warning of the old ones
            new = old.replace("gradient", "activation")
            if getattr(self, new, False) is None:
                setattr(self, new, getattr(self, old))
        self.max_grad_norm = self.max_grad_norm or 0.0  # for no limit; Trainer and DeepSpeed could not compare `None`
        super().__post_init__()
        template_kwargs = getattr(self, "chat_template_kwargs", None)
        if template_kwargs and without_secrets(template_kwargs) != template_kwargs:
            raise ValueError(
                "`chat_template_kwargs` are saved with the model and must hold no secret, got "
                f"{without_secrets(template_kwargs)}. Take it out."
            )
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # for copies to a device; torch warns where there is none

    def set_values(self) -> dict[str, Any]:
        """Fields that were given another value than their default, as they are now."""
        values = {name: getattr(self, name) for name in self._set_fields}
        return without_secrets({name: getattr(value, "value", value) for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        return without_secrets(super().to_dict())

    def __str__(self) -> str:
        lines = (f"{name}={value},\n" for name, value in sorted(without_secrets(asdict(self)).items()))
        return f"{type(self).__name__}(\n{''.join(lines)})"


@dataclass
class GroupArguments:
    r"""
    What the configurations of all trainers that compare answers to a question have in common.

    Parameters:
        per_device_eval_batch_size (`int`, *optional*):
            Answers per device in evaluation: a multiple of the answers to a question, which are `num_generations_eval`,
            or `num_generations` if that is unset. If `None`, the multiple next below `per_device_train_batch_size`, or
            the first.
    """

    per_device_eval_batch_size: int | None = field(
        default=None,
        metadata={"help": "Answers per device in evaluation. If unset, as in training, in whole groups."},
    )

    def __post_init__(self):
        if self.num_generations < 2:
            raise ValueError(
                f"`num_generations` must be at least 2, got {self.num_generations}: one answer to a question has nothing to "
                "be compared with."
            )
        if self.per_device_eval_batch_size is None:
            size = self.num_generations_eval or self.num_generations
            self.per_device_eval_batch_size = size * max(1, self.per_device_train_batch_size // size)
        super().__post_init__()
        for name in ("num_iterations", "steps_per_generation", "generation_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name, choices in GROUP_CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in ("epsilon", "epsilon_high"):
            if (value := getattr(self, name)) is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be a number of at least 0, got {value}.")
        for name in ("delta", "sapo_temperature_neg", "sapo_temperature_pos"):
            if (value := getattr(self, name)) is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be a positive number, got {value}.")

    def check_evaluation(self) -> None:
        """Refuse evaluation batches that cannot hold all answers to a question."""
        name = "num_generations_eval" if self.num_generations_eval else "num_generations"
        size = getattr(self, name)
        if self.per_device_eval_batch_size * self.world_size % size != 0:
            raise ValueError(
                f"`per_device_eval_batch_size={self.per_device_eval_batch_size}` on {self.world_size} processes must hold "
                f"whole groups of `{name}={size}` answers to a question. Set it to a multiple, or leave it unset."
            )


def refuse_options(config: Any, reasons: dict[str, str], base: type, trainer: str) -> None:
    """
    Refuse options of TRL's configuration `base` that have another value than its default.

    Args:
        config (`Any`):
            Configuration that a user made.
        reasons (`dict[str, str]`):
            Options, and why they have no meaning.
        base (`type`):
            TRL's configuration class, whose defaults count.
        trainer (`str`):
            Name of the trainer, for the message.

    Raises:
        `ValueError`: if one was set.
    """
    for name, reason in reasons.items():
        default = base.__dataclass_fields__[name].default
        value = getattr(config, name)
        if value != default and (
            value is not None or default != "auto"
        ):  # "auto" becomes `None` where nothing asks for more
            raise ValueError(
                f"`{name}={without_secrets(value, name)!r}` has no meaning for `{trainer}`: {reason}. Leave it at {default!r}."
            )

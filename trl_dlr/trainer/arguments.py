# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
What configurations of several trainers have in common: options of a policy, of groups and of a curriculum; which were
set, which of TRL's are refused, and what may be shown of them.
"""

import math
import re
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, ClassVar

import torch
from trl import GRPOConfig

from ..field_types import check_field_types
from ..models import LatentPolicyConfig
from ..models.hub import check_dtype
from ..models.latent_policy_config import LatentOptions
from ..option_docs import described
from .losses import INVALID_MODES


NAMES_OF_SECRETS = r"(token|(api|access|private)[_-]?key|secret([_-]?key)?|passw(or)?d|pwd|credentials?|authorization|auth|bearer|cookie)"
SECRET_NAME = re.compile(rf"(^|[_-]){NAMES_OF_SECRETS}$", re.I)
SECRET_IN_TEXT = re.compile(  # of an URL, or a header
    rf"(?<=://)[^/\s@]+(?=@)|((?<![a-z]){NAMES_OF_SECRETS}=|\bbearer )[^&\s]+", re.I
)


def without_secrets(value: Any, name: str = "") -> Any:
    """
    `value` as it may be printed, saved or uploaded: texts with the name of a secret, at any depth, are replaced by
    that name, as in [`~transformers.TrainingArguments.to_dict`], and so are credentials in URLs and headers.

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
    For a configuration of [`~transformers.TrainingArguments`], before it in the order of bases: what is printed of it,
    or handed to trackers, has no secrets, and it knows which of its fields were set and which were derived from
    others.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.__repr__ = cls.__str__  # a dataclass would make one that tells everything

    def __post_init__(self):
        self.max_grad_norm = self.max_grad_norm or 0.0  # for no limit; Trainer and DeepSpeed could not compare `None`
        check_field_types(self)
        self._set_fields = [field.name for field in fields(self) if getattr(self, field.name) != default_of(field)]
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            # TRL's names for what newer versions of transformers call otherwise, with a warning of the old ones
            new = old.replace("gradient", "activation")
            if getattr(self, new, False) is None:
                setattr(self, new, getattr(self, old))
        super().__post_init__()
        for name in self._VALID_DICT_FIELDS:  # of which TRL and transformers read those that are JSON
            value = getattr(self, name, None)
            if name.endswith("_kwargs") and not isinstance(value, dict | None):
                raise ValueError(f"`{name}` must be a dictionary, on the command line in JSON, got {value!r}.")
        template_kwargs = getattr(self, "chat_template_kwargs", None)
        if template_kwargs and without_secrets(template_kwargs) != template_kwargs:
            raise ValueError(
                "`chat_template_kwargs` are saved with the model and must hold no secret, got "
                f"{without_secrets(template_kwargs)}. Take it out."
            )
        if not (self.learning_rate >= 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"`learning_rate` must be a number of at least 0, got {self.learning_rate}.")
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # for copies to a device; torch warns where there is none

    def set_values(self) -> dict[str, Any]:
        """Fields that were given another value than their default, as they are now."""
        defaults = {field.name: default_of(field) for field in fields(self)}
        values = {name: getattr(self, name) for name in self._set_fields}
        # A parser makes a bool of a default that is a text, of which transformers makes a text again
        values = {name: value for name, value in values.items() if value != defaults[name]}
        return without_secrets({name: getattr(value, "value", value) for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        return without_secrets(super().to_dict())

    def __str__(self) -> str:
        lines = (f"{name}={value},\n" for name, value in sorted(without_secrets(asdict(self)).items()))
        return f"{type(self).__name__}(\n{''.join(lines)})"


@described
@dataclass
class GroupArguments:
    r"""
    What the configurations of all trainers that compare answers to a question have in common.

    Parameters:
        per_device_eval_batch_size (`int`, *optional*):
            Answers per device in evaluation: a multiple of the answers to a question, which are
            `num_generations_eval`, or `num_generations` if that is unset. If `None`, the multiple next below
            `per_device_train_batch_size`, or the first.
    """

    per_device_eval_batch_size: int | None = None

    def __post_init__(self):
        if self.num_generations < 2:
            raise ValueError(
                f"`num_generations` must be at least 2, got {self.num_generations}: one answer to a question has "
                "nothing to be compared with."
            )
        if self.per_device_eval_batch_size is None:
            size = self.num_generations_eval or self.num_generations
            self.per_device_eval_batch_size = size * max(1, self.per_device_train_batch_size // size)
        super().__post_init__()
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ValueError(f"`max_completion_length` must be at least 1, got {self.max_completion_length}.")
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
                f"`per_device_eval_batch_size={self.per_device_eval_batch_size}` on {self.world_size} processes must "
                f"hold whole groups of `{name}={size}` answers to a question. Set it to a multiple, or leave it unset."
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
                f"`{name}={without_secrets(value, name)!r}` has no meaning for `{trainer}`: {reason}. Leave it at "
                f"{default!r}."
            )


@described
@dataclass
class LatentPolicyArguments(LatentOptions):
    r"""
    What the configurations of all trainers of a [`LatentPolicyModel`] have in common: [`LatentOptions`] of the policy,
    used when `model` is an assistant rather than a [`LatentPolicyModel`], and those below.

    Parameters:
        > Parameters of the frozen main model

        main_model_init_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`], used when `main_model` is a
            string. If `dtype` is not given, the checkpoint's own is used. `revision`, `token`, `cache_dir` and the
            like are used for its tokenizer as well, as those of `model_init_kwargs` are for the assistant's.
        allow_main_model_mismatch (`bool`, *optional*, defaults to `False`):
            Whether to go on, with a warning, when the policy was built for a main model with other weights.

        > Parameters of the prompts

        chat_template_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments for both chat templates, such as `{"enable_thinking": False}`. They are kept in the
            policy's configuration, and a [`LatentReasoner`] uses them. If `None`, those that the policy has.

        > Parameters of the optimization

        projection_learning_rate (`float`, *optional*):
            Learning rate of the projection layers: all that is not the assistant. If `None`, `learning_rate`.
    """

    _DICT_FIELDS: ClassVar[list[str]] = ["main_model_init_kwargs", "chat_template_kwargs"]

    # Main model
    main_model_init_kwargs: dict[str, Any] | str | None = None
    allow_main_model_mismatch: bool = False

    # Prompts
    chat_template_kwargs: dict[str, Any] | str | None = None

    # Optimization
    projection_learning_rate: float | None = None

    def check_policy_arguments(self) -> None:
        self.check_latents()
        check_dtype("main_model_init_kwargs['dtype']", (self.main_model_init_kwargs or {}).get("dtype"))
        rate = self.projection_learning_rate
        if rate is not None and not (rate >= 0 and math.isfinite(rate)):
            raise ValueError(f"`projection_learning_rate` must be a number of at least 0, got {rate}.")

    def check_policy(self, config: LatentPolicyConfig) -> None:
        """Refuse fields that were set to other values than a given policy has: they are the policy's."""
        for name, value in self.policy_kwargs().items():
            if name in self._set_fields and value != getattr(config, name):
                raise ValueError(
                    f"`{name}={value!r}` is of a new policy, but the one given as `model` has "
                    f"{getattr(config, name)!r}. Leave `{name}` unset, or give an assistant as `model`."
                )

    def policy_kwargs(self) -> dict[str, Any]:
        """Fields of [`LatentPolicyConfig`] that this configuration sets."""
        return {field.name: getattr(self, field.name) for field in fields(LatentOptions)}


@described
@dataclass
class RemedyArguments:
    r"""
    Remedies of the paper "Latent-GRPO" ([2604.27998](https://huggingface.co/papers/2604.27998)) for the advantages of
    latents, as options of any trainer of them. See [`group_advantages`] and [`select_first_latent`].

    Parameters:
        > Parameters of the advantages

        invalid_samples (`str`, *optional*, defaults to `"keep"`):
            What becomes of samples that did not end by themselves: answers that were cut off by their token budget or,
            in soft tokens, thoughts that had to be ended. `"keep"`: they are samples as any other.
            `"include"`: they count in their group's mean and standard deviation, and have advantage 0. `"exclude"`:
            they do not count either. A wrong answer that is complete is valid.
        first_latent_selection (`bool`, *optional*, defaults to `False`):
            Whether, in a group with a positive advantage, only the likeliest of its positive samples keeps an
            advantage at the first latent. All samples of a question have that position in common.
    """

    invalid_samples: str = field(default="keep", metadata={"choices": ["keep", *INVALID_MODES]})
    first_latent_selection: bool = False

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


CURRICULUM_UNITS = ("step", "token")


@described
@dataclass
class CurriculumArguments:
    r"""
    What the configurations of trainers with a curriculum have in common: in stage s, latents stand for the first s
    reasoning steps of an answer, in the manner of Coconut
    ([arXiv 2412.06769](https://huggingface.co/papers/2412.06769)). The best checkpoint is the one with the best
    `accuracy`, unless `metric_for_best_model` says otherwise: losses of two stages are of different tokens.

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
        stage_accuracy (`float`, *optional*):
            Share of right tokens (`mean_token_accuracy`, as it is logged) at which a stage ends before its epochs are
            over. The last stage then has more of them. If `None`, every stage takes its epochs.
        reset_optimizer (`bool`, *optional*, defaults to `True`):
            Whether AdamW's moments start anew with each stage.
        stage_mixing (`float`, *optional*, defaults to `0.0`):
            Probability with which an example is taken from a stage that is drawn uniformly from those up to the
            present one.
    """

    num_stages: int = 0
    latents_per_stage: int = 2
    curriculum_unit: str = field(default="step", metadata={"choices": list(CURRICULUM_UNITS)})
    epochs_per_stage: int = 1
    stage_accuracy: float | None = None
    reset_optimizer: bool = True
    stage_mixing: float = 0.0

    def __post_init__(self):
        if self.load_best_model_at_end and self.num_stages > 0 and self.metric_for_best_model is None:
            self.metric_for_best_model = "accuracy"  # the losses of two stages are of different tokens
        super().__post_init__()

    def check_curriculum_arguments(self) -> None:
        for name, least in (("num_stages", 0), ("latents_per_stage", 1), ("epochs_per_stage", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        for name in ("stage_mixing", "stage_accuracy"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}.")
        if self.curriculum_unit not in CURRICULUM_UNITS:
            raise ValueError(
                f"`curriculum_unit` must be one of {', '.join(CURRICULUM_UNITS)}, got {self.curriculum_unit!r}."
            )
        for name in ("latents_per_stage", "curriculum_unit", "epochs_per_stage", "stage_accuracy", "stage_mixing"):
            default = self.__dataclass_fields__[name].default
            if self.num_stages == 0 and getattr(self, name) != default:
                raise ValueError(f"`{name}={getattr(self, name)!r}` needs `num_stages` above 0, got 0.")

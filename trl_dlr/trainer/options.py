# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Options of TRL's configurations that a method here has no use for."""

from typing import Any


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
        if getattr(config, name) != default:
            raise ValueError(
                f"`{name}={getattr(config, name)!r}` has no meaning for `{trainer}`: {reason}. Leave it at {default!r}."
            )

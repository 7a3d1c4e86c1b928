# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What is annotated as a number or a bool must be one: Python does not look."""

import inspect
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, get_args


def check_type(name: str, value: Any, annotation: Any) -> None:
    """Refuse a `value` that is not of its `annotation`, if that is `int`, `float` or `bool`, or such and `None`."""
    wanted = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if set(wanted) <= {bool, int, float, NoneType}:
        kinds = (*wanted, int) if float in wanted else wanted  # an int is as good as a float, a bool is no number
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join("unset" if kind is NoneType else kind.__name__ for kind in wanted)
            raise ValueError(f"`{name}` must be {names}, got {value!r} ({type(value).__name__}).")


def check_field_types(config: Any) -> None:
    """[`check_type`] for all fields of a dataclass, those that it inherits from other packages among them."""
    annotations = {}  # not those of `fields`, which an argument parser changes
    for cls in reversed(type(config).__mro__):
        annotations |= inspect.get_annotations(cls)
    for field in fields(config):
        check_type(field.name, getattr(config, field.name), annotations[field.name])

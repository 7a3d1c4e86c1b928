# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""An option is described once, in the docstring of its dataclass: completely, and with the default that it has."""

import ast
import importlib
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from trl_dlr import LatentGRPOConfig
from trl_dlr.cli.main import COMMANDS
from trl_dlr.option_docs import parse_options, read_options


MODULES = [f"trl_dlr.{module}" for module, _ in COMMANDS.values()]
CLASSES = {
    base
    for module in MODULES
    for arguments in importlib.import_module(module).ARGUMENTS
    for base in arguments.__mro__
    if base.__module__.startswith("trl_dlr.") and "__dataclass_fields__" in vars(base)
}


@pytest.mark.parametrize("cls", sorted(CLASSES, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_every_option_is_described_with_its_default(cls):
    options, own = parse_options(cls.__doc__), vars(cls).get("__annotations__", {})
    for field in fields(cls):
        if field.name not in own:
            continue
        kind, description = options[field.name]
        assert description.endswith("."), field.name
        assert field.metadata["help"] == description.replace("`", "").replace("%", "%%"), field.name
        default = field.default if field.default_factory is MISSING else field.default_factory()
        written = re.search(r"defaults to `(.+)`", kind)
        if written is None:
            assert default in (None, []), field.name
        else:
            assert ast.literal_eval(written[1]) == default, field.name
    assert set(options) <= {field.name for field in fields(cls)}


def test_options_are_read_from_the_source_as_they_are_at_run_time():
    path = Path(importlib.import_module(LatentGRPOConfig.__module__).__file__)
    options, others = read_options(path, "LatentGRPOConfig")
    own = [base for base in LatentGRPOConfig.__mro__ if base in CLASSES]
    assert options == {name: entry for base in reversed(own) for name, entry in parse_options(base.__doc__).items()}
    assert others == ["GRPOConfig"]


def test_argparse_prints_the_descriptions():
    text = HfArgumentParser(LatentGRPOConfig).format_help()
    assert "Weight γ of the contrastive loss (equation 6)." in " ".join(text.split())

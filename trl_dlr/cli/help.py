# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What `trl-dlr <command> --help` prints, read from the source: importing the trainers would take many seconds."""

import ast
import textwrap

from ..option_docs import PACKAGE, read_options


HELP_OPTIONS = {"-h", "--help"}
WIDTH = 119


def help_text(command: str, module_name: str) -> str:
    """
    Help of a command: what it is for, examples, and its own options. TRL's hundreds are named by their class.

    Args:
        command (`str`):
            Name of the command.
        module_name (`str`):
            Its module, relative to the package, with a docstring and a tuple `ARGUMENTS` of dataclasses.
    """
    path = PACKAGE / f"{module_name.replace('.', '/')}.py"
    module, options, others = ast.parse(path.read_text(encoding="utf-8")), {}, []
    for node in module.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "ARGUMENTS":
            for name in node.value.elts:
                read, foreign = read_options(path, name.id)
                options, others = {**options, **read}, [*others, *foreign]
    lines = [f"usage: trl-dlr {command} [--config FILE] [--OPTION VALUE ...]", "", ast.get_docstring(module)]
    if options:
        lines += ["", "Options (--config names a YAML file of them; those on the command line come first):", ""]
    for name, (kind, description) in options.items():
        kind = kind.replace("*optional*, ", "").replace(", *optional*", "")
        lines += [
            f"  --{name} ({kind})",
            *textwrap.wrap(description, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]
    if others := list(dict.fromkeys(name for name in others if name.endswith("Config"))):
        lines += ["", f"Every option of {' and '.join(others)} (TRL) and of `accelerate launch` can be given as well."]
    return "\n".join(lines).replace("`", "")

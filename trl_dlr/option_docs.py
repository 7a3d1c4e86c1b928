# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Options are described in one place, the docstring of their dataclass. argparse gets its help from there
([`described`]), and `trl-dlr <command> --help` is read from the source, without importing torch ([`read_options`]).
"""

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path


PACKAGE = Path(__file__).parent
ENTRY = re.compile(r"^ {4}(\w+) \((.+)\):\n((?: {8}.*\n|\n(?= {8}))+)", re.MULTILINE)


def parse_options(docstring: str) -> dict[str, tuple[str, str]]:
    """
    Options of a docstring in TRL's format.

    Args:
        docstring (`str`):
            Docstring of a dataclass.

    Returns:
        `dict[str, tuple[str, str]]`: for each name, its type with its default, and its description in one line.
    """
    plain = re.sub(r"\[(`[^`]+`)\](\([^)]*\))?", r"\1", inspect.cleandoc(docstring)) + "\n"
    return {name: (kind, " ".join(text.split())) for name, kind, text in ENTRY.findall(plain)}


def described(cls: type) -> type:
    """Give the fields of a dataclass the descriptions of its docstring as the help that argparse prints."""
    options = parse_options(cls.__doc__)
    for field in fields(cls):
        if field.name in cls.__annotations__:
            help_text = options[field.name][1].replace("`", "").replace("%", "%%")
            field.metadata = {**field.metadata, "help": help_text}
    return cls


def read_options(path: Path, class_name: str) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """
    Options of a dataclass of this package and of its bases here, read from the source.

    Args:
        path (`Path`):
            Module.
        class_name (`str`):
            Name of the dataclass, which the module defines or imports.

    Returns:
        `tuple[dict[str, tuple[str, str]], list[str]]`: options, as [`parse_options`] gives them, and the names of the
        bases that are other packages', whose options are not read.
    """
    module = ast.parse(path.read_text(encoding="utf-8"))
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and class_name in (alias.name for alias in node.names):
            if node.level == 0:
                return {}, [class_name]
            folder = path.parents[node.level - 1] / (node.module or "").replace(".", "/")
            return read_options(folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py"), class_name)
    (node,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    options, others = parse_options(ast.get_docstring(node)), []
    for base in node.bases:
        inherited, foreign = read_options(path, base.id)
        options, others = {**inherited, **options}, [*others, *foreign]
    return options, others

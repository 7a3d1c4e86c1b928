# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The parser of a command, with help that can be read."""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter

from trl import TrlParser


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults beside the arguments, and examples as they are to be typed."""


def command_parser(dataclass_types: tuple[type, ...], prog: str | None, doc: str, epilog: str) -> TrlParser:
    """
    Parser of a command.

    Args:
        dataclass_types (`tuple[type, ...]`):
            Arguments.
        prog (`str`, *optional*):
            Name of the command.
        doc (`str`):
            What it does.
        epilog (`str`):
            Examples, and what else there is to know.
    """
    return TrlParser(
        dataclass_types,
        prog=prog,
        usage="%(prog)s [--config FILE] [--ARGUMENT VALUE ...]",  # there can be hundreds; the list below has them
        description=doc.replace("`", ""),
        epilog=epilog,
        formatter_class=HelpFormatter,
    )

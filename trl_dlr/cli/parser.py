# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The parser of a command, with errors that say what was meant."""

import difflib
import sys
from argparse import Action, ArgumentError, ArgumentParser
from collections.abc import Iterable
from typing import Any

import yaml
from trl import TrlParser


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question for `name`, which is unknown, if one of those known is spelt much like it."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    close = close or [other for other in known if other.endswith(f"_{name.lstrip('-')}")]  # `--density` for one
    return f" Did you mean {close[0]!r}?" if close else ""


class Repeated(Action):
    """An option of several values that may also stand several times: all of its values count, in place of a default."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if given is self.default else [*given, *values])


class CommandParser(TrlParser):
    """A [`~trl.TrlParser`] that ends with exit code 2, and a hint, at what does not parse."""

    others: tuple[ArgumentParser, ...] = ()  # whose arguments may stand among this one's
    takes_others = True  # on the command line, and not in a YAML file alone
    unknown_hint = ""  # for what neither knows

    def __init__(self, dataclass_types: tuple[type, ...], prog: str):
        usage = "%(prog)s [--config FILE] [--OPTION VALUE ...]"  # there can be hundreds
        super().__init__(dataclass_types, prog=prog, usage=usage, add_help=False)

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        # `--config=FILE` is two, as TRL looks for them
        args = [
            part
            for argument in (sys.argv[1:] if args is None else args)
            for part in (argument.split("=", 1) if argument.startswith("--config=") else [argument])
        ]
        config, rest = self._read_config(args)
        if fail_with_unknown_args:  # before any is judged by its value: one that is missing may be misspelt
            actions = [action for parser in (self, *self.others) for action in parser._actions]
            of_config = [f"--{name}" for name in config if name not in {"env", *(action.dest for action in actions)}]
            self._check_unknown(of_config, actions)
            self._check_unknown(self.parse_known_args(rest)[1], actions if self.takes_others else self._actions)
        *parsed, of_config, of_cli = super().parse_args_and_config(args, True, separate_remaining_strings=True)
        if return_remaining_strings:
            return (*parsed, of_config, of_cli) if separate_remaining_strings else (*parsed, [*of_config, *of_cli])
        return tuple(parsed)

    def set_defaults_with_config(self, **config) -> list[str]:
        """As TRL's, with values of a YAML file read as those of the command line are: by the type of their option."""
        typed = {
            action.dest: self._typed(action, config[action.dest]) for action in self._actions if action.dest in config
        }
        return super().set_defaults_with_config(**(config | typed))

    def _typed(self, action: Action, value: Any) -> Any:
        is_list = action.nargs in ("+", "*")
        if value is None or isinstance(value, dict) or (isinstance(value, list) and not is_list):
            return value
        try:
            if is_list:
                return [self._get_value(action, str(part)) for part in (value if isinstance(value, list) else [value])]
            return self._get_value(action, str(value))
        except ArgumentError as error:
            self.error(str(error))

    def _read_config(self, args: list[str]) -> tuple[dict[str, Any], list[str]]:
        """What a YAML file holds that is named among the arguments, and the arguments without it."""
        if "--config" not in args:
            return {}, args
        index = args.index("--config")
        if index + 1 == len(args):
            self.error("--config needs the path of a YAML file")
        try:
            with open(args[index + 1], encoding="utf-8") as file:
                config = yaml.safe_load(file)
        except OSError as error:
            self.error(f"--config: the file {args[index + 1]!r} cannot be read: {error.strerror}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"{args[index + 1]} is no YAML: {' '.join(str(error).split())}")
        if not isinstance(config, dict):
            self.error(f"{args[index + 1]} must hold lines like 'learning_rate: 1e-4', but is {config!r:.80}")
        return config, args[:index] + args[index + 2 :]

    def _check_unknown(self, unknown: list[str], actions: list[Action]) -> None:
        known = [name for action in actions for name in action.option_strings]
        names = [argument.partition("=")[0] for argument in unknown if argument.startswith("--")]
        names = [name for name in names if name not in known] if names else unknown
        if names:
            hints = "".join(did_you_mean(name, known) for name in names) + self.unknown_hint
            self.error(f"unrecognized arguments: {' '.join(names)}{'.' if hints else ''}{hints}")

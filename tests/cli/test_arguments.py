# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import gzip
import importlib.util
import shutil
import sys
from pathlib import Path

import fsspec
import pytest
from datasets import Dataset

from trl_dlr.cli.arguments import file_loader, load_dataset_split, load_rows, with_prompts


ROWS = [{"question": f"What is {i} + {i}?", "answer": 2 * i} for i in range(4)]


def write(folder, kind):
    dataset, name = Dataset.from_list(ROWS), folder / f"questions.v2.{kind}"
    plain = name.with_suffix("") if kind.endswith(".gz") else name
    {"json": dataset.to_json, "jsonl": dataset.to_json, "csv": dataset.to_csv, "parquet": dataset.to_parquet}[
        plain.suffix[1:]
    ](plain)
    if kind.endswith(".gz"):
        with open(plain, "rb") as source, gzip.open(name, "wb") as target:
            shutil.copyfileobj(source, target)
    return str(name)


KINDS = ["json", "jsonl", "csv", "parquet", "json.gz", "jsonl.gz", "csv.gz"]


@pytest.mark.parametrize("kind", KINDS)
def test_local_files(tmp_path, kind, monkeypatch):
    name = write(tmp_path, kind)
    dataset = load_dataset_split(name, None, "train[:3]", "Be brief.", None)
    system = {"role": "system", "content": "Be brief."}
    assert dataset["prompt"][1] == [system, {"role": "user", "content": "What is 1 + 1?"}]
    assert list(dataset["answer"]) == [0, 2, 4]

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    found = importlib.util.find_spec("train_gsm8k")
    script = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "train_gsm8k", script)
    found.loader.exec_module(script)
    args = script.ScriptArguments(dataset_name=name, num_eval_questions=1, prompt_template="Q: {question}")
    train, test = script.load_questions(args)
    assert len(train) == 3 and len(test) == 1 and train.column_names == ["prompt", "answer"]
    assert train["prompt"][0].startswith("Q: What is ")
    args = script.ScriptArguments(dataset_name=name, eval_dataset_name=name, num_eval_questions=2)
    assert [len(split) for split in script.load_questions(args)] == [4, 2]


def test_names_on_the_hub_are_no_files():
    assert [file_loader(name) for name in ("openai/gsm8k", "org/data.v2", "folder", "a.gz")] == [None] * 4


@pytest.mark.parametrize(
    "template",
    [r"{question} Put it in \boxed{}.", '{question} As JSON: {"answer": 3}', "{{question}} {0} {", "{question}"],
)
def test_braces_in_a_template_are_text(template):
    prompts = with_prompts(Dataset.from_list([{"question": "What is {x}?"}]), None, template)["prompt"]
    assert list(prompts) == [template.replace("{question}", "What is {x}?")]


def test_a_template_without_a_question():
    with pytest.raises(ValueError, match="`prompt_template` must have {question} in it, got 'Solve {problem}'"):
        with_prompts(Dataset.from_list(ROWS), None, "Solve {problem}")


@pytest.mark.parametrize("name", ["system_prompt", "prompt_template"])
def test_prompts_that_are_there_are_not_made_anew(name):
    dataset = Dataset.from_list([{"prompt": "What is 1 + 1?", "question": "What is 2 + 2?", "answer": 2}])
    assert list(with_prompts(dataset)["prompt"]) == ["What is 1 + 1?"]
    with pytest.raises(ValueError, match=rf"`{name}` is for questions, .* column 'prompt', .*got 'A {{question}}'"):
        with_prompts(dataset, **{name: "A {question}"})


def test_a_system_message_has_no_place_in_a_template():
    dataset = Dataset.from_list([{"question": "What is 2 + 2?", "answer": 2}])
    with pytest.raises(ValueError, match="`system_prompt` is a message of a chat, but `prompt_template` makes plain"):
        with_prompts(dataset, system_prompt="Be brief.", prompt_template="{question}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": "a"}\n{"question": "b", \n{"question": "c"}\n', r"line 2, column \d+ is no JSON"),
        ("a.json", '[{"question": "a"},\n {"question": }]', r"line 2, column \d+ is no JSON"),
        ("a.jsonl.gz", '{"question": "a"}\n\n{"question" "b"}\n', r"line 3, column \d+ is no JSON"),
        ("a.jsonl", "", "it is empty"),
        ("a.csv", "\n", "it is empty"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_where(tmp_path, name, content, message):
    path = str(tmp_path / name)
    with fsspec.open(path, "wt", compression="infer") as file:
        file.write(content)
    with pytest.raises(ValueError, match=f"`dataset_name`: the file '{path}' cannot be read: {message}"):
        load_rows(path, None, "train")

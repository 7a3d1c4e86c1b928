# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import json
import os
import subprocess
import sys

import pytest
from trl import ModelConfig, TrlParser

from tests.launch import ROOT, run_python
from tests.tiny import tiny_tokenizer, trained_main_model
from trl_dlr import LatentPolicyModel, LatentSFTConfig


EXAMPLES = ROOT / "examples"
CONFIGS = sorted((EXAMPLES / "configs").glob("sft_*.yaml"))
sys.path.insert(0, str(EXAMPLES))


def test_worked_answers_become_steps_and_a_result():
    from sft_gsm8k import worked

    answer = "In April 48/2 = <<48/2=24>>24 clips.\nTogether 48+24 = <<48+24=72>>72.\n#### 72"
    steps = ["In April 48/2 = 24 clips.", "Together 48+24 = 72."]
    assert worked({"answer": answer}, ["think", "answer"]) == {"steps": steps, "completion": "<answer>72</answer>"}
    assert worked({"answer": answer}, None)["completion"] == "72"
    assert worked({"answer": "7"}, None) == {"steps": [], "completion": "7"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_preset_parses_into_valid_arguments(config, tmp_path):
    from train_gsm8k import ScriptArguments

    parser = TrlParser((ScriptArguments, LatentSFTConfig, ModelConfig))
    _, training, _ = parser.parse_args_and_config(
        ["--config", str(config), "--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true"]
    )
    assert training.num_stages == 0 or training.num_latents == training.num_stages * training.latents_per_stage


def test_answers_without_steps_are_all_kept():
    from datasets import Dataset
    from sft_gsm8k import with_targets

    worked = [{"answer": "1+1 = 2\n#### 2"}, {"answer": "7"}]
    assert with_targets(Dataset.from_list(worked), None)["steps"] == [["1+1 = 2"]]
    plain = with_targets(Dataset.from_list(worked[1:]), None)
    assert plain["completion"] == ["7"] and "steps" not in plain.column_names


@pytest.mark.slow  # about eight minutes each on two cores
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_latents_carry_the_question_on_a_real_main_model(tmp_path, seed):
    pytest.importorskip("gguf")
    given = ["--seed", seed, "--disable_tqdm", "true"]
    sft, rl = tmp_path / "sft", tmp_path / "rl"
    for arguments in (
        ["sft_gsm8k.py", "--config", EXAMPLES / "configs" / "sft_codes.yaml", "--output_dir", sft],
        ["train_gsm8k.py", "--config", EXAMPLES / "configs" / "codes.yaml", "--policy", sft, "--output_dir", rl],
    ):
        command = [sys.executable, EXAMPLES / arguments[0], *map(str, [*arguments[1:], *given])]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert result.returncode == 0, result.stderr[-3000:]
    print(result.stdout)
    results = json.loads((rl / "eval_results.json").read_text())
    assert results["trained/accuracy"] >= results["shuffled/accuracy"] + 0.3
    assert results["trained/accuracy"] >= results["no_latents/accuracy"] + 0.3


def test_two_stages_one_after_the_other(tmp_path):
    trained_main_model().save_pretrained(tmp_path / "main")
    tiny_tokenizer().save_pretrained(tmp_path / "main")
    rows = [
        {"question": f"A{i}{j}", "answer": f"{i}+{j}\n={i}\n#### {(i + j) % 10}"} for i in range(9) for j in (1, 2)
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(script, **settings):
        common = {"dataset_name": "train.jsonl", "eval_dataset_name": "test.jsonl", "prompt_template": "{question}"}
        common |= {"main_model_name_or_path": "main", "num_eval_questions": 8, "max_completion_length": 4}
        common |= {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "max_steps": 6}
        arguments = [str(part) for name, value in (common | settings).items() for part in (f"--{name}", value)]
        result = run_python(EXAMPLES / script, *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    curriculum = {"num_stages": 2, "latents_per_stage": 2, "num_latents": 4, "anchor_text": "=="}
    started = {"model_name_or_path": "fresh_layers", "assistant_num_layers": 2, "output_dir": "sft"}
    stdout = run("sft_gsm8k.py", **started, **curriculum, per_device_train_batch_size=4)
    assert "\nbefore  loss " in stdout and "\nafter   loss " in stdout and "\n  latents/mixed " in stdout
    assert LatentPolicyModel.from_pretrained(tmp_path / "sft").config.num_latents == 4
    assert "Report: sft/report/report.html" in stdout and (tmp_path / "sft" / "report" / "report.html").is_file()
    of_policy = {
        "latent_sampling": "autoregressive",
        "freeze_embeddings": False,
        "anchor_text": "==",
    }  # not the demo's
    stdout = run("train_gsm8k.py", policy="sft", output_dir="rl", per_device_train_batch_size=32, **of_policy)
    assert "\nbefore_run " in stdout and "\ntrained " in stdout and "untrained" not in stdout
    assert LatentPolicyModel.from_pretrained(tmp_path / "rl").config.num_latents == 4

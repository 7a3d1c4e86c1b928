# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import re

import pytest

from tests.launch import ROOT, run_python


CONFIGS = ROOT / "examples" / "configs"
ARCHITECTURES = CONFIGS / "architectures"
PAPER = ["--config", CONFIGS / "paper_llama2_7b.yaml"]
PAPER += ["--main_model_name_or_path", ARCHITECTURES / "llama2_7b"]
PAPER += ["--model_name_or_path", ARCHITECTURES / "llama_1.3b", "--num_processes", "8"]


def run(tmp_path, *arguments, fails=False):
    result = run_python("-m", "trl_dlr.cli.main", "plan", *arguments, cwd=tmp_path)
    assert (result.returncode != 0) == fails, result.stderr[-3000:]
    assert not list(tmp_path.iterdir())
    table = dict(re.findall(r"^([a-z ]+?) +([\d.]+)$", result.stdout, flags=re.MULTILINE))
    return result.stderr if fails else result.stdout, {name: float(value) for name, value in table.items()}


def test_the_papers_recipe_on_8_gpus(tmp_path):
    stdout, table = run(tmp_path, *PAPER, "--zero_stage", "2", "--gpu_memory", "30", "80")
    # Weights in bfloat16: the 7B model's, the 1.3B policy's, and the reference's
    assert (table["main model"], table["parameters"], table["reference"]) == (13.48, 2.57, 2.57)
    assert table["total peak"] == max(table["rollout peak"], table["update peak"])
    assert "does not fit 30 GB" in stdout and f"\nfits 80 GB ({table['total peak'] / 0.8:.0f}%)" in stdout


@pytest.mark.slow  # as long as the test above, which is a quarter of a minute
def test_what_makes_the_papers_recipe_fit_40_gb(tmp_path):
    arguments = ["--zero_stage", "2", "--gpu_memory", "40", "--decoding_batch_size", "32"]
    stdout, table = run(tmp_path, *PAPER, *arguments)
    assert "\nfits 40 GB" in stdout and table["total peak"] < 0.8 * 40


@pytest.mark.slow  # loads the demo's main model
def test_the_demo(tmp_path):
    pytest.importorskip("gguf")
    stdout, table = run(tmp_path, "--config", CONFIGS / "demo.yaml")
    assert stdout.splitlines()[-1].startswith("total peak")
    assert table["main model"] == 0.27  # 135 million weights in bfloat16, embeddings and head being one


def test_assistants_made_from_the_main_model_and_adapters(tmp_path):
    made = ["--model_name_or_path", "first_layers", "--use_peft", "true", "--freeze_embeddings", "true"]
    _, table = run(tmp_path, *PAPER, *made, "--num_latents", "4", "--bf16", "false")
    assert table["gradients"] < 0.1 * table["parameters"] and table["reference"] == 0


def test_a_stage_that_is_not_supported_is_refused(tmp_path):
    stderr, _ = run(tmp_path, *PAPER, "--zero_stage", "3", fails=True)
    assert "`zero_stage` must be one of 0, 2 to be planned, got 3" in stderr

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import json
import sys

import pytest
from transformers import AutoModelForCausalLM
from trl import ModelConfig, TrlParser

from tests.launch import ROOT, run_python
from tests.tiny import random_main_model, tiny_tokenizer
from trl_dlr import CoconutSFTConfig
from trl_dlr.models.thinking import ThinkingConfig


EXAMPLES = ROOT / "examples"
CONFIG = EXAMPLES / "configs" / "coconut_gsm8k.yaml"
sys.path.insert(0, str(EXAMPLES))


def test_the_preset_has_the_published_constants(tmp_path):
    from train_gsm8k import ScriptArguments

    parser = TrlParser((ScriptArguments, CoconutSFTConfig, ModelConfig))
    _, args, model = parser.parse_args_and_config(["--config", str(CONFIG), "--output_dir", str(tmp_path)])
    assert (args.latents_per_stage, args.epochs_per_stage, args.learning_rate) == (2, 3, 1e-4)
    assert args.reset_optimizer and args.curriculum_unit == "step"
    assert [args.latents_of(stage) for stage in range(args.num_stages + 1)] == [0, 2, 4, 6, 6]
    assert model.model_name_or_path == "openai-community/gpt2"


@pytest.mark.parametrize("adapter", [False, True])
def test_it_trains_on_worked_answers(tmp_path, adapter):
    random_main_model(max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {"question": f"A{i}{j}", "answer": f"{i}+{j}\n={i}\n#### {(i + j) % 10}"} for i in range(9) for j in (1, 2)
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model_name_or_path": "model", "dataset_name": "train.jsonl", "eval_dataset_name": "test.jsonl"}
    settings |= {"num_eval_questions": 4, "max_completion_length": 4, "max_steps": 4, "max_length": 256}
    settings |= {"cot_epochs": 0, "epochs_per_stage": 1, "num_stages": 2, "per_device_train_batch_size": 9}
    settings |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "output_dir": "out", "max_latents": 3}
    if adapter:
        settings |= {"use_peft": True, "lora_target_modules": "all-linear"}
    arguments = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    result = run_python(EXAMPLES / "coconut_gsm8k.py", "--config", CONFIG, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "\nbefore  loss " in result.stdout and "\nafter   loss " in result.stdout
    assert ThinkingConfig.from_pretrained(tmp_path / "out").num_latents == 3
    if adapter:
        assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.get_input_embeddings().num_embeddings == len(tiny_tokenizer()) + 3

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Every training script runs on tiny models, with every preset that is for it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from tests.launch import ROOT, run_python
from tests.tiny import random_main_model, tiny_tokenizer, trained_main_model
from tests.trainer.test_latent_grpo_trainer import make_trainer
from trl_dlr import LatentGRPOConfig, LatentPolicyModel, ThinkingConfig
from trl_dlr.cli.main import COMMANDS
from trl_dlr.cli.parser import CommandParser
from trl_dlr.rewards import correctness_reward
from trl_dlr.scripts.latent_grpo import LatentGRPOScriptArguments
from trl_dlr.scripts.utils import PolicyScriptArguments, Questions, ScriptArguments, load_models, train_and_evaluate


CONFIGS = ROOT / "examples" / "configs"
PRESETS = {
    "train": ("codes", "demo", "gsm8k", "gsm8k_smollm2", "math", "paper_llama2_7b"),
    "sft": ("sft_codes", "sft_gsm8k", "sft_gsm8k_smollm2"),
    "soft-token": ("latent_grpo", "latent_grpo_centred", "lepo"),
    "coconut": ("coconut_gsm8k",),
    "latent-rl": ("latent_rl",),
}
COMMAND_OF = {preset: command for command, presets in PRESETS.items() for preset in presets}


def module_of(command):
    return f"trl_dlr.{COMMANDS[command][0]}"


def test_every_preset_has_a_command():
    assert sorted(COMMAND_OF) == sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A main model that reads chats, a random one, and worked answers."""
    folder = tmp_path_factory.mktemp("scripts")
    tokenizer = tiny_tokenizer()
    trained_main_model().save_pretrained(folder / "main")
    tokenizer.save_pretrained(folder / "main")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    random_main_model(max_position_embeddings=2048).save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    rows = [
        {"question": f"A{i}{j}", "answer": f"{i}+{j}\n={i}\n#### {(i + j) % 10}"} for i in range(9) for j in (1, 2, 3)
    ]
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(folder, command, *arguments, **settings):
    common = {"dataset_name": "train.jsonl", "eval_dataset_name": "test.jsonl", "num_eval_questions": 4}
    common |= {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "max_completion_length": 4}
    settings = [str(part) for name, value in (common | settings).items() for part in (f"--{name}", value)]
    result = run_python("-m", module_of(command), *arguments, *settings, cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("preset", COMMAND_OF)
def test_a_preset_trains(folder, preset):
    command = COMMAND_OF[preset]
    settings = {"output_dir": f"out_{preset}", "max_steps": 2, "num_eval_samples": 2, "eval_batch_questions": 4}
    if command in ("train", "sft"):
        settings |= {
            "main_model_name_or_path": "chat",
            "model_name_or_path": "fresh_layers",
            "assistant_num_layers": 1,
        }
        settings |= {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 1}
        settings |= {"main_model_init_kwargs": '{"dtype": "float32"}'}
    else:
        settings |= {"model_name_or_path": "chat", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    if command == "train":
        settings |= {"exploration_check_prompts": 0}
    if command in ("sft", "coconut"):
        settings |= {"max_length": 512, "per_device_train_batch_size": 9}
    if command in ("soft-token", "latent-rl"):
        settings |= {"num_latents": 4}
    own = {
        "math": {"dataset_train_split": "train"},
        "paper_llama2_7b": {"latent_dim": 16},
        "latent_grpo": {"end_marker": "=", "mixture_size": 4, "min_candidates": 4},
        "latent_grpo_centred": {"end_marker": "=", "mixture_size": 4, "min_candidates": 4},
        "lepo": {"latent_top_k": 4},
        "latent_rl": {"start_marker": "+", "end_marker": "="},
    }
    settings |= own.get(preset, {})
    stdout = run(folder, command, "--config", CONFIGS / f"{preset}.yaml", **settings)
    for row in ("no_latents", "before_training", "policy", "mean_latents", "shuffled"):
        assert f"\n{row} " in stdout
    assert f"Saved to out_{preset}." in stdout
    results = json.loads((folder / f"out_{preset}" / "eval_results.json").read_text())
    assert ("policy/format" in results) == (command == "train")


@pytest.mark.parametrize("preset", COMMAND_OF)
def test_a_preset_parses_as_it_is(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(module_of(COMMAND_OF[preset]))
    arguments = ["--config", str(CONFIGS / f"{preset}.yaml"), "--bf16", "false"]
    _, training, _ = CommandParser(module.ARGUMENTS, prog="").parse_args_and_config(arguments)
    written = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text())
    for name in (written.keys() & vars(training).keys()) - {"bf16", "report_to", "optim"}:
        assert getattr(training, name) == written[name], name


def test_the_coconut_preset_has_the_published_constants(tmp_path):
    module = importlib.import_module(module_of("coconut"))
    arguments = ["--config", str(CONFIGS / "coconut_gsm8k.yaml"), "--output_dir", str(tmp_path)]
    _, args, model = CommandParser(module.ARGUMENTS, prog="").parse_args_and_config(arguments)
    assert (args.latents_per_stage, args.epochs_per_stage, args.learning_rate) == (2, 3, 1e-4)
    assert args.reset_optimizer and args.curriculum_unit == "step"
    assert [args.latents_of(stage) for stage in range(args.num_stages + 1)] == [0, 2, 4, 6, 6]
    assert model.model_name_or_path == "openai-community/gpt2"


def test_a_supervised_start_and_what_goes_on_from_it(folder):
    common = {"main_model_name_or_path": "main", "prompt_template": "{question}", "max_steps": 6, "report": True}
    common |= {"anchor_text": "==", "num_eval_questions": 8}
    curriculum = {"num_stages": 2, "latents_per_stage": 2, "num_latents": 4}
    started = {"model_name_or_path": "fresh_layers", "assistant_num_layers": 2, "output_dir": "sft"}
    stdout = run(folder, "sft", **common, **started, **curriculum, per_device_train_batch_size=4)
    assert "\nbefore_training " in stdout and "\n  policy/mixed " in stdout
    assert LatentPolicyModel.from_pretrained(folder / "sft").config.num_latents == 4
    assert "Report: sft/report/report.html" in stdout and (folder / "sft" / "report" / "report.html").is_file()
    stdout = run(folder, "train", **common, policy="sft", output_dir="rl", per_device_train_batch_size=32)
    assert "\nbefore_training " in stdout and "\npolicy " in stdout
    assert LatentPolicyModel.from_pretrained(folder / "rl").config.num_latents == 4


@pytest.mark.parametrize("adapter", [False, True])
def test_coconut_then_latent_rl(folder, adapter):
    settings = {"prompt_template": "{question}", "num_eval_questions": 4}
    stages = {"model_name_or_path": "chat", "max_steps": 4, "max_length": 256, "cot_epochs": 0, "epochs_per_stage": 1}
    stages |= {"num_stages": 2, "per_device_train_batch_size": 9, "max_latents": 3, "output_dir": f"coconut_{adapter}"}
    if adapter:
        stages |= {"use_peft": True, "lora_target_modules": "all-linear"}
    run(folder, "coconut", "--config", CONFIGS / "coconut_gsm8k.yaml", **settings, **stages)
    saved = folder / f"coconut_{adapter}"
    assert ThinkingConfig.from_pretrained(saved).num_latents == 3
    card = (saved / "README.md").read_text()
    assert "fine-tuned version of a local model.\n" in card and "None" not in card
    if adapter:
        assert (saved / "adapter_model.safetensors").exists()
        return
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.get_input_embeddings().num_embeddings == len(tiny_tokenizer()) + 3
    value = {"model_name_or_path": saved.name, "num_latents": 3, "value_warmup_steps": 2, "max_steps": 4}
    value |= {"per_device_train_batch_size": 4, "output_dir": "latent_rl", "learning_rate": 1e-4}
    run(folder, "latent-rl", "--config", CONFIGS / "latent_rl.yaml", **settings, **value)
    assert (folder / "latent_rl" / "value_head.safetensors").exists()


def test_what_cannot_be_resumed_is_refused_first_and_a_trained_model_is_saved_at_once(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=1)
    evaluated = []

    def evaluate(reasoner, *args, control, **kwargs):
        evaluated.append(control)
        if trainer.state.global_step == 1:
            raise RuntimeError("after training")

    monkeypatch.setattr("trl_dlr.scripts.utils.evaluate_latents", evaluate)
    questions = Questions(trainer.train_dataset, None, trainer.train_dataset, correctness_reward)
    for absent, match in (("absent", "is no whole checkpoint"), ("True", "has no checkpoint")):
        trainer.args.resume_from_checkpoint = absent
        with pytest.raises(ValueError, match=match):
            train_and_evaluate(trainer, ScriptArguments("data"), questions)
    assert not evaluated
    trainer.args.resume_from_checkpoint = "false"
    stale = [Path(trainer.args.output_dir, name) for name in ("eval_results.json", "report/rewards.png")]
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    with pytest.raises(RuntimeError, match="after training"):
        train_and_evaluate(trainer, ScriptArguments("data"), questions)
    assert len(evaluated) == 3 and LatentPolicyModel.from_pretrained(trainer.args.output_dir)
    assert not any(path.exists() for path in stale)  # of an earlier run, and no figures of this one


def test_rewards_of_the_table_have_the_weights_of_training():
    args = LatentGRPOScriptArguments(
        "data", main_model_name_or_path="main", reward_funcs=["format_reward", "correctness_reward"]
    )
    assert args.format_weight([0.5, 2.0]) == 0.25 and args.format_weight(None) == 1.0
    with pytest.raises(ValueError, match="`reward_weights` must be above 0 for correctness, got 0.0"):
        args.format_weight([1.0, 0.0])


@pytest.mark.parametrize(
    ("model", "option", "value"),
    [
        ("first_layers", "dtype", "bfloat16"),
        ("fresh_layers", "attn_implementation", "eager"),
        ("first_layers", "model_revision", "v2"),
        ("assistant", "dtype", "bfloat16"),
    ],
)
def test_options_of_loading_that_an_assistant_does_not_have_are_refused(folder, model, option, value):
    args = LatentGRPOScriptArguments("data", main_model_name_or_path=str(folder / "main"), assistant_num_layers=1)
    model_args = ModelConfig(model_name_or_path=model, **{option: value})
    with pytest.raises(ValueError, match=f"`{option}='{value}'` has no meaning for this `model_name_or_path`"):
        load_models(args, LatentGRPOConfig("run", bf16=False, use_cpu=True), model_args)


@pytest.mark.parametrize("command", ["train", "sft"])
def test_evaluation_sets_are_loaded_when_they_are_evaluated_on(folder, command):
    settings = {"main_model_name_or_path": "main", "model_name_or_path": "fresh_layers", "assistant_num_layers": 1}
    settings |= {"prompt_template": "{question}", "anchor_text": "==", "max_steps": 2, "output_dir": f"eval_{command}"}
    settings |= {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_train_batch_size": 16,
        "num_eval_questions": 16,
    }
    assert "'eval_" in run(folder, command, **settings)


def test_fresh_layers_are_those_of_the_seed(folder):
    script_args = PolicyScriptArguments("data", main_model_name_or_path=str(folder / "main"), assistant_num_layers=1)
    drawn = []
    for seed in (0, 0, 1):
        args = LatentGRPOConfig(str(folder / "none"), seed=seed, bf16=False, use_cpu=True)
        drawn.append(load_models(script_args, args, ModelConfig(model_name_or_path="fresh_layers"))["model"])
    weights = [next(p for name, p in model.named_parameters() if "q_proj" in name) for model in drawn]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.slow  # about eight minutes each on two cores
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_latents_carry_the_question_on_a_real_main_model(tmp_path, seed):
    pytest.importorskip("gguf")
    sft, rl = tmp_path / "sft", tmp_path / "rl"
    for arguments in (
        ["sft", "--config", CONFIGS / "sft_codes.yaml", "--output_dir", sft],
        ["train", "--config", CONFIGS / "codes.yaml", "--policy", sft, "--output_dir", rl],
    ):
        command = [sys.executable, "-m", "trl_dlr.cli.main", *map(str, arguments), "--seed", str(seed)]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert result.returncode == 0, result.stderr[-3000:]
    print(result.stdout)
    results = json.loads((rl / "eval_results.json").read_text())
    assert results["policy/accuracy"] >= results["shuffled/accuracy"] + 0.3
    assert results["policy/accuracy"] >= results["no_latents/accuracy"] + 0.3

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import logging
import re
import warnings
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset

from tests.tiny import random_main_model, tiny_tokenizer
from trl_dlr import (
    CoconutSFTConfig,
    CoconutSFTTrainer,
    LatentGRPOConfig,
    LatentGRPOTrainer,
    LatentPolicyConfig,
    LatentSFTConfig,
    LatentSFTTrainer,
    SoftTokenGRPOConfig,
    SoftTokenGRPOTrainer,
)
from trl_dlr.experimental.latent_rl import LatentRLConfig, LatentRLTrainer
from trl_dlr.models.thinking import ThinkingConfig
from trl_dlr.trainer.arguments import without_secrets


OF_ALL = [
    ("max_completion_length", 3.5, "int"),
    ("gradient_checkpointing", 1, "bool"),
    ("learning_rate", "1e-4", "float"),
]
OF_POLICIES = [
    *(("num_latents", value, "int") for value in (2.5, True, "4", None)),
    ("latent_top_k", 2.5, "int or unset"),
    ("learn_stop", "yes", "bool"),
    ("freeze_embeddings", "no", "bool"),
    ("sigma", "1", "float"),
    ("sigma", True, "float"),
]
OF_THINKING = [("num_latents", True, "int"), ("noise_scale", "1", "float"), ("stop_at_end_marker", "no", "bool")]
OF_GRPO = [("decoding_batch_size", 2.5, "int or unset"), ("exploration_check_prompts", 1.5, "int")]
OF_GRPO += [("beta", "1", "float"), ("num_iterations", 1.5, "int"), ("logging_steps", "4", "float")]  # TRL's
OF_GRPO += [
    ("gamma", "0.1", "float"),
    ("first_latent_selection", 1, "bool"),
    ("projection_learning_rate", True, "float"),
]
WRONG_TYPES = {
    LatentGRPOConfig: [*OF_ALL, *OF_POLICIES, *OF_GRPO],
    LatentSFTConfig: [*OF_ALL, *OF_POLICIES, ("mean_bound", "1", "float"), ("num_stages", 1.5, "int")],
    SoftTokenGRPOConfig: [*OF_ALL, *OF_THINKING],
    CoconutSFTConfig: [*OF_ALL, ("max_latents", 2.5, "int or unset"), ("reset_optimizer", "no", "bool")],
    LatentRLConfig: [*OF_ALL, OF_THINKING[0], ("pos_weight", "20", "float"), ("hacking_window", 1.5, "int")],
    LatentPolicyConfig: [*OF_POLICIES, ("main_hidden_size", 2.5, "int or unset")],
    ThinkingConfig: [*OF_THINKING, ("max_completion_length", 3.5, "int or unset")],
}


@pytest.mark.parametrize("config_class", WRONG_TYPES)
def test_a_number_or_a_bool_must_be_one(config_class, tmp_path):
    on_cpu = {} if config_class in (LatentPolicyConfig, ThinkingConfig) else {"output_dir": str(tmp_path), **ON_CPU}
    for name, value, wanted in WRONG_TYPES[config_class]:
        seen = re.escape(f"got {value!r} ({type(value).__name__}).")
        with pytest.raises(ValueError, match=f"^`{name}` must be {wanted}( or unset)?, {seen}$"):
            config_class(**{name: value}, **on_cpu)


def test_an_int_is_as_good_as_a_float(tmp_path):
    assert LatentGRPOConfig(str(tmp_path), sigma=1, gamma=0, learning_rate=1, **ON_CPU).policy_kwargs()["sigma"] == 1


SECRET = "hf_" + "S" * 34
POLICY_CONFIGS = [LatentGRPOConfig, LatentSFTConfig]
CONFIGS = [*POLICY_CONFIGS, SoftTokenGRPOConfig, CoconutSFTConfig, LatentRLConfig]
ON_CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"token": SECRET, "revision": "main"}, {"token": "<TOKEN>", "revision": "main"}),
        (
            {"use_auth_token": SECRET, "HF_TOKEN": SECRET},
            {"use_auth_token": "<USE_AUTH_TOKEN>", "HF_TOKEN": "<HF_TOKEN>"},
        ),
        ({"a": [{"x-api-key": SECRET}]}, {"a": [{"x-api-key": "<X-API-KEY>"}]}),
        ({"auth": ("me", SECRET)}, {"auth": ["<AUTH>", "<AUTH>"]}),
        (
            {"proxies": {"https": f"http://me:{SECRET}@proxy:80"}},
            {"proxies": {"https": "http://<CREDENTIALS>@proxy:80"}},
        ),
        (
            {"url": f"http://h/?a=1&api_key={SECRET}&b=2", "run_name": f"t?token={SECRET}"},
            {"url": "http://h/?a=1&api_key=<CREDENTIALS>&b=2", "run_name": "t?token=<CREDENTIALS>"},
        ),
        ({"headers": {"x": f"Bearer {SECRET}"}}, {"headers": {"x": "Bearer <CREDENTIALS>"}}),
        ({"private_key": SECRET, "pwd": SECRET}, {"private_key": "<PRIVATE_KEY>", "pwd": "<PWD>"}),
        ({"token": True, "password": None}, {"token": True, "password": None}),
        (
            {"max_new_tokens": 5, "bos_token_id": 3, "name": "a@b"},
            {"max_new_tokens": 5, "bos_token_id": 3, "name": "a@b"},
        ),
    ],
)
def test_what_is_called_a_secret_is_not_shown(value, shown):
    assert without_secrets(value) == shown


@pytest.mark.parametrize("config_class", [*POLICY_CONFIGS, SoftTokenGRPOConfig, LatentRLConfig])
def test_what_is_saved_with_the_model_must_hold_no_secret(config_class, tmp_path):
    with pytest.raises(ValueError, match=r"`chat_template_kwargs` .* must hold no secret, got .*<API_KEY>") as raised:
        config_class(str(tmp_path), chat_template_kwargs={"api_key": SECRET}, **ON_CPU)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_configuration_shows_no_secret(config_class, tmp_path):
    secret = {"model_init_kwargs": {"token": SECRET}}
    if config_class in POLICY_CONFIGS:
        secret["main_model_init_kwargs"] = {"token": SECRET, "proxies": {"http": f"http://me:{SECRET}@proxy"}}

    @dataclass
    class Derived(config_class):
        mine: int = 0

    for cls in (config_class, Derived):
        args = cls(str(tmp_path), hub_token=SECRET, **secret, **ON_CPU)
        for shown in (repr(args), str(args), f"{args}", str(args.to_dict()), args.to_json_string()):
            assert SECRET not in shown and "<TOKEN>" in shown
        assert SECRET not in str(args.to_sanitized_dict()) + str(args.set_values())
        assert args.model_init_kwargs == {"token": SECRET} and args.hub_token == SECRET  # for those who need it


ROWS = [{"prompt": "A12", "answer": "3", "steps": ["1", "2"], "completion": "=3"}] * 8
TRAINERS = {
    LatentGRPOTrainer: (LatentGRPOConfig, {"num_generations": 2, "exploration_check_prompts": 0}),
    LatentSFTTrainer: (LatentSFTConfig, {}),
    SoftTokenGRPOTrainer: (SoftTokenGRPOConfig, {"num_generations": 2, "num_latents": 2}),
    CoconutSFTTrainer: (CoconutSFTConfig, {"max_length": 32, "num_stages": 1}),
    LatentRLTrainer: (LatentRLConfig, {"num_latents": 2, "value_warmup_steps": 1}),
}


@pytest.mark.filterwarnings("ignore:`LatentRLTrainer` is experimental")
@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_no_secret_in_a_card_a_checkpoint_or_a_log(trainer_class, tmp_path, monkeypatch, caplog, capfd):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "run" / "tensorboard"))
    random_main_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config_class, settings = TRAINERS[trainer_class]
    models = {"model": str(tmp_path / "model")}
    settings = {**settings, "model_init_kwargs": {"token": SECRET}, "hub_token": SECRET}
    if config_class in POLICY_CONFIGS:
        models["main_model"] = models["model"]
        settings["main_model_init_kwargs"] = {"token": SECRET}
    if "SFT" not in trainer_class.__name__:
        models["reward_funcs"] = lambda completions, **kwargs: [float(len(text)) for text in completions]
    args = config_class(
        str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=4,
        max_completion_length=4,
        save_steps=1,
        logging_steps=1,
        **settings,
        **{**ON_CPU, "report_to": "tensorboard"},
    )
    with caplog.at_level(logging.DEBUG, logger="trl_dlr"):
        trainer = trainer_class(**models, args=args, train_dataset=Dataset.from_list(ROWS))
        print(trainer.args)
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
    written = {path for path in (tmp_path / "run").rglob("*") if path.is_file()}
    names = {path.name for path in written}
    assert {"README.md", "trainer_state.json", "checkpoint.json"} <= names and any(
        "tfevents" in name for name in names
    )
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    printed = capfd.readouterr()
    assert SECRET not in caplog.text + printed.out + printed.err


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("value", [False, True])
def test_the_configuration_itself_is_warned_of_nothing(tmp_path, config_class, value, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = config_class(str(tmp_path), gradient_checkpointing=value, **ON_CPU)
    assert args.gradient_checkpointing is getattr(args, "activation_checkpointing", value) is value
    assert not args.dataloader_pin_memory  # which torch warns of where there is no device to copy to
    assert args.set_values().get("gradient_checkpointing") == (None if value is default_checkpointing(args) else value)


def default_checkpointing(args):
    return type(args).__dataclass_fields__["gradient_checkpointing"].default

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What a push makes ready; tests/test_hub.py pushes it."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests.tiny import random_main_model
from tests.trainer.test_latent_grpo_trainer import make_policy, make_trainer
from trl_dlr.models.reasoner import BASE_POLICY, load_policy


@pytest.mark.parametrize("origin", ["memory", "folder"])
def test_an_adapter_that_was_given_gets_its_base_policy_beside_it(tmp_path, origin):
    policy = make_policy(random_main_model())
    if origin == "folder":
        policy.save_pretrained(tmp_path / "policy")
        policy = type(policy).from_pretrained(tmp_path / "policy")
    base = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["latent_head", "latent_in"])
    stale = tmp_path / "run" / BASE_POLICY
    make_policy(random_main_model(), latent_dim=2).save_pretrained(stale)  # another run was here
    trainer = make_trainer(tmp_path, model=get_peft_model(policy, lora), max_steps=2)
    trainer.train()
    trainer.save_model()
    trainer._save_base_policy()

    saved = load_file(stale / "model.safetensors")
    assert set(saved) == set(base) and all(torch.equal(tensor, base[name]) for name, tensor in saved.items())
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE_POLICY
    trained = trainer.model.state_dict()
    loaded = load_policy(str(tmp_path / "run")).state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in loaded.items())
    assert not torch.equal(trainer.policy.latent_head.mean.weight, base["latent_head.mean.weight"])

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Main models that do not fit a device as they are: quantized, or partly on disk. By vLLM's server: test_vllm.py."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.tiny import random_main_model, tiny_tokenizer
from tests.trainer.test_latent_grpo_trainer import history, make_policy, make_trainer
from tests.trainer.test_latent_sft_trainer import make_sft_trainer
from trl_dlr.models.main_model import fingerprints_match, weights_fingerprint


ON_DISK = ("model.layers.1", "lm_head")
OFFLOADED = {
    "device_map": {
        **dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"], "cpu"),
        **dict.fromkeys(ON_DISK, "disk"),
    }
}
QUANTIZED = {
    "4 bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "8 bit": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture
def folder(tmp_path):
    random_main_model().save_pretrained(tmp_path / "main")
    tiny_tokenizer().save_pretrained(tmp_path / "main")
    return tmp_path


@torch.no_grad()
def logits(main_model):
    return main_model(torch.arange(2, 14).unsqueeze(0)).logits


def train(folder, name, quantization_config=None, resume=None, max_steps=4, **kwargs):
    trainer = make_trainer(
        folder / name,
        main_model=str(folder / "main"),
        model=make_policy(random_main_model()),
        max_steps=max_steps,
        save_strategy="steps",
        save_steps=2,
        trainer_kwargs={"quantization_config": quantization_config},
        **kwargs,
    )
    before = logits(trainer.main_model)  # not its state dict: bitsandbytes repacks 4-bit weights for a CPU
    trainer.train(resume_from_checkpoint=resume)
    assert torch.equal(logits(trainer.main_model), before)
    return trainer


@pytest.mark.parametrize("bits", QUANTIZED)
def test_a_quantized_main_model_decodes_and_stays_as_it_is(folder, bits):
    trainer = train(folder, bits, QUANTIZED[bits])
    assert trainer.main_model.is_quantized
    layer = trainer.main_model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == {"4 bit": torch.uint8, "8 bit": torch.int8}[bits]
    assert not any(parameter.requires_grad for parameter in trainer.main_model.parameters())
    assert len(history(trainer, "reward")) == 2 and history(trainer, "grad_norm")[-1] > 0
    resumed = train(folder, bits, QUANTIZED[bits], resume=True, max_steps=6)
    assert resumed.state.global_step == 6
    # The policy knows its main model, however that is loaded
    plain = AutoModelForCausalLM.from_pretrained(folder / "main")
    assert fingerprints_match(weights_fingerprint(trainer.main_model), weights_fingerprint(plain))
    assert not fingerprints_match(weights_fingerprint(trainer.main_model), weights_fingerprint(random_main_model(1)))


def test_a_main_model_that_is_partly_on_disk_trains_the_same_policy(folder):
    plain = train(folder, "plain")
    offloaded = train(
        folder, "offloaded", main_model_init_kwargs={**OFFLOADED, "offload_folder": str(folder / "offload")}
    )
    assert offloaded.main_model.model.layers[1].mlp.up_proj.weight.is_meta
    assert weights_fingerprint(offloaded.main_model) == weights_fingerprint(plain.main_model)
    assert history(offloaded, "reward") == history(plain, "reward")
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(offloaded.model.state_dict()[name], tensor), name


def test_a_main_model_without_gradients_decodes_and_is_refused_where_they_are_needed(tmp_path):
    int8 = torch.ao.quantization.quantize_dynamic(random_main_model(), {torch.nn.Linear})
    main_model = {"main_model": int8, "model": make_policy(random_main_model()), "allow_main_model_mismatch": True}
    trainer = make_trainer(tmp_path / "decodes", **main_model, max_steps=1)
    trainer.train()
    assert history(trainer, "grad_norm")[0] > 0
    refusal = "`main_model` has layers of type torch.ao.*quantized.*Linear, through which no gradient passes"
    with pytest.raises(ValueError, match=refusal):
        make_trainer(tmp_path / "hybrid", **main_model, hybrid_coef=0.1)
    with pytest.raises(ValueError, match=refusal):
        make_sft_trainer(tmp_path / "sft", **main_model)

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Multimodal models, hybrids and per-layer embeddings trained and used for text. All families: test_families.py."""

import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.families import tiny_family
from tests.tiny import tiny_tokenizer
from tests.trainer.test_latent_grpo_trainer import history, make_trainer
from tests.trainer.test_soft_token_grpo_trainer import EXACT
from tests.trainer.test_soft_token_grpo_trainer import make_trainer as make_thinking_trainer
from trl_dlr import LatentReasoner, first_layers


@pytest.mark.parametrize(
    ("family", "given"),
    # Qwen3.5 is loaded by its name without the part that reads images
    [("qwen3_5 with images", "name"), ("qwen3_5 with images", "model"), ("gemma3", "name"), ("gemma4", "name")],
)
def test_a_wrapper_trains_and_answers_as_a_text_model(tmp_path, family, given):
    """Main model and, cut, its own assistant; a resumed run is the uninterrupted one."""
    folder = tmp_path / "main"
    tiny_family(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)

    def train(**kwargs):
        wrapper = AutoModelForImageTextToText.from_pretrained(folder)
        trainer = make_trainer(
            tmp_path,
            model=first_layers(wrapper, 4),
            main_model=str(folder) if given == "name" else wrapper,
            trainer_kwargs={"processing_class": None, "main_processing_class": None},
            learn_stop=True,
            latent_dim=4,
            num_latents=3,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
        )
        before = {name: tensor.clone() for name, tensor in trainer.main_model.state_dict().items()}
        trainer.train(**kwargs)
        for name, tensor in trainer.main_model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        return trainer

    trainer = train()
    assert all(value > 0 for value in history(trainer, "grad_norm"))
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = train(resume_from_checkpoint=True)
    for name, tensor in trainer.policy.state_dict().items():
        assert torch.equal(resumed.policy.state_dict()[name], tensor), name

    resumed.save_model(str(tmp_path / "policy"))
    reasoner = LatentReasoner.from_pretrained(str(tmp_path / "policy"))
    texts = reasoner.generate(["A12", "B345"]).texts
    assert texts == [reasoner.generate([prompt]).texts[0] for prompt in ("A12", "B345")]
    assert "".join(reasoner.stream("A12")) == texts[0]


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoehybrid"])
@pytest.mark.parametrize("trains", ["a policy", "a model that thinks"])
def test_a_resumed_run_has_the_experts_that_were_trained(tmp_path, family, trains):
    """They are saved one by one, under other names than they have in the model."""

    def train(**kwargs):
        torch.manual_seed(0)
        model, options = tiny_family(family), {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        if trains == "a policy":
            trainer = make_trainer(tmp_path, model=first_layers(model, 2), main_model=model, latent_dim=4, **options)
        else:
            options["router_aux_loss_coef"] = 0.0  # transformers 5.17 computes none for Granite
            trainer = make_thinking_trainer(tmp_path, model=model, **EXACT, **options)
        trainer.train(**kwargs)
        return trainer

    trainer = train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = train(resume_from_checkpoint=True)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name

    at_end = {name: tensor.clone() for name, tensor in resumed.model.state_dict().items()}
    resumed.state.best_model_checkpoint = str(tmp_path / "run" / "checkpoint-2")
    resumed._load_best_model()
    best = resumed.model.state_dict()
    resumed.state.best_model_checkpoint = str(tmp_path / "run" / "checkpoint-4")
    experts = [name for name in at_end if name.endswith(".experts.down_proj") or "input_linear" in name]
    assert experts and not any(torch.equal(best[name], at_end[name]) for name in experts)
    resumed._load_best_model()
    for name, tensor in at_end.items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name

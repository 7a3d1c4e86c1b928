# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Latents learn what only they can bring: the main model can calculate, but not know with which operation."""

import pytest
import torch

from tests.tiny import tiny_dataset, tiny_reward, tiny_tokenizer, trained_main_model
from trl_dlr import LatentGRPOConfig, LatentGRPOTrainer, fresh_layers
from trl_dlr.evaluation import evaluate_latents
from trl_dlr.reasoners.latent_reasoner import LatentReasoner


def accuracy(trainer, control):
    reasoner = LatentReasoner(trainer.model, trainer.processing_class, trainer.engine, trainer.main_processing_class)
    held_out = tiny_dataset(200, seed=1, held_out=True)
    figures = evaluate_latents(reasoner, held_out, tiny_reward, tiny_reward, control=control, batch_size=50)
    return figures["accuracy"]


def make_learner(folder, model_seed=0, model=None, num_hints=(2,), **kwargs):
    """A trainer on the task of tests/tiny.py, on the CPU, that saves nothing."""
    main_model = trained_main_model(num_hints=num_hints)
    torch.manual_seed(model_seed)
    defaults = {"num_latents": 2, "injection": "components", "injection_scale": 1.0, "max_completion_length": 3}
    defaults |= {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return LatentGRPOTrainer(
        model=fresh_layers(main_model, 2) if model is None else model,
        main_model=main_model,
        main_processing_class=tiny_tokenizer(),
        processing_class=tiny_tokenizer(),
        reward_funcs=tiny_reward,
        args=LatentGRPOConfig(str(folder), logging_steps=100, **{**defaults, **kwargs}),
        train_dataset=tiny_dataset(2000, seed=0),
    )


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_latents_learn_to_carry_the_question(tmp_path, sampling):
    trainer = make_learner(
        tmp_path / "run",
        max_steps=240,
        num_iterations=4,
        learning_rate=1e-3,
        latent_sampling=sampling,
        per_device_train_batch_size=256,
        lr_scheduler_type="constant",
    )
    before = {name: tensor.clone() for name, tensor in trainer.main_model.state_dict().items()}
    alone, untrained = accuracy(trainer, "no_latents"), accuracy(trainer, "policy")
    trainer.train()
    trained, shuffled = accuracy(trainer, "policy"), accuracy(trainer, "shuffled")
    print(f"{sampling}: alone {alone:.3f}, untrained {untrained:.3f}, trained {trained:.3f}, shuffled {shuffled:.3f}")
    assert trained >= untrained + 0.4
    assert shuffled <= trained - 0.3
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.main_model.state_dict().items())

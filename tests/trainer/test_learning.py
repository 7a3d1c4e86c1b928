# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Latents learn what only they can bring: the main model can calculate, but not know with which operation."""

import pytest
import torch

from tests.learners import LARGE, accuracy, make_learner, make_thinker, make_warm_start


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
    untrained = accuracy(trainer)
    trainer.train()
    trained = accuracy(trainer)
    assert trained >= untrained + 0.4
    assert accuracy(trainer, "shuffled") <= trained - 0.3
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.main_model.state_dict().items())


def test_a_warm_start_and_then_rl_learn_latents_that_are_too_large_for_rl_alone(tmp_path):
    warm = make_warm_start(tmp_path / "sft", latent_dim=512, max_steps=200)
    warm.train()
    warm.save_model()
    policy = str(tmp_path / "sft")
    learner = make_learner(tmp_path / "rl", model=policy, max_steps=30, per_device_train_batch_size=256, **LARGE)
    learner.train()
    after = accuracy(learner)
    assert after >= 0.9 and after >= warm.evaluate()["eval_accuracy"] - 0.03
    assert accuracy(learner, "shuffled") < 0.5


def test_a_model_that_thinks_in_soft_tokens_learns_what_to_think_of(tmp_path):
    exact = {"soft_token_score": "exact", "soft_token_temperature": 0.5}
    trainer = make_thinker(tmp_path, max_steps=60, num_latents=2, **exact)
    before = accuracy(trainer)
    trainer.train()
    after = accuracy(trainer)
    assert after >= before + 0.15
    assert accuracy(trainer, "shuffled") <= after - 0.3

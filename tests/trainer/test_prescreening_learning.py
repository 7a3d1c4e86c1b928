# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What is learned from a part of the decoded trajectories, on the tiny main model."""

import statistics

import pytest

from tests.trainer.test_learning import accuracy, make_learner


QUESTIONS = 8


def train(folder, seed, num_generations, **kwargs):
    """Held-out accuracy after training, and how many trajectories were decoded for it."""
    trainer = make_learner(
        folder,
        model_seed=seed,
        seed=seed,
        latent_sampling="parallel",
        num_generations=num_generations,
        per_device_train_batch_size=QUESTIONS * num_generations,
        exploration_check_prompts=0,
        **kwargs,
    )
    trainer.train()
    num_decoded = trainer.engine.num_decoded
    return accuracy(trainer, "policy"), num_decoded


def compare(folder, arms, seeds):
    """Mean accuracy and decoded trajectories of each arm, printed."""
    figures = {}
    for arm, kwargs in arms.items():
        runs = [train(folder / f"{arm}_{seed}", seed, **kwargs) for seed in range(seeds)]
        accuracies, decoded = [accuracy for accuracy, _ in runs], runs[0][1]
        figures[arm] = statistics.mean(accuracies), decoded
        print(f"\n{arm:<14} decoded {decoded:>6}, accuracy {figures[arm][0]:.3f} {[round(a, 3) for a in accuracies]}")
    return figures


@pytest.mark.slow
def test_half_the_decodes_or_fewer_learn_what_all_do(tmp_path):
    # 375 rollouts, of which 120 are decoded whole
    screened = {"num_generations": 32, "prescreening_fraction": 0.18, "prescreening_warmup_rollouts": 120}
    arms = {"all of 32": {"num_generations": 32}, "groups of 6": {"num_generations": 6}}
    arms |= {name: {**screened, "prescreening_selection": name} for name in ("top_bottom", "top_random", "random")}
    figures = compare(tmp_path, {arm: {**kwargs, "max_steps": 1500} for arm, kwargs in arms.items()}, seeds=5)
    accuracy, decoded = figures["top_bottom"]
    assert decoded <= figures["all of 32"][1] / 2
    assert accuracy >= figures["all of 32"][0] - 0.03
    assert accuracy >= figures["groups of 6"][0] + 0.1


@pytest.mark.slow
def test_the_value_head_finds_what_few_random_ones_miss(tmp_path):
    # 500 rollouts, of which 20 are decoded whole; then 3 of 16
    screened = {"num_generations": 16, "prescreening_fraction": 0.18, "lr_scheduler_type": "constant"}
    arms = {name: {**screened, "prescreening_selection": name} for name in ("top_random", "top_bottom", "random")}
    figures = compare(tmp_path, {arm: {**kwargs, "max_steps": 2000} for arm, kwargs in arms.items()}, seeds=3)
    assert figures["top_random"][0] >= figures["random"][0] + 0.1

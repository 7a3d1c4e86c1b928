# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Decoding 18% after a warm-up, half at most in all, learns what decoding everything does."""

import statistics

import pytest
import torch

from tests.tiny import tiny_dataset, tiny_reward, tiny_tokenizer, trained_main_model
from tests.trainer.test_learning import accuracy
from trl_dlr import LatentGRPOConfig, LatentGRPOTrainer, fresh_layers


QUESTIONS, GENERATIONS, SEEDS = 8, 32, range(5)
SCREENED = {"prescreening_fraction": 0.18, "prescreening_warmup_rollouts": 120}  # of 375 rollouts
ARMS = {
    "all of 32": {},
    "6 alone": {"num_generations": 6, "per_device_train_batch_size": QUESTIONS * 6},
    "6 of 32, top_bottom": {**SCREENED, "prescreening_selection": "top_bottom"},
    "6 of 32, top_random": {**SCREENED, "prescreening_selection": "top_random"},
    "6 of 32, random": {**SCREENED, "prescreening_selection": "random"},
}


def train(folder, seed, **kwargs):
    main_model = trained_main_model()
    torch.manual_seed(seed)
    defaults = {"num_generations": GENERATIONS, "per_device_train_batch_size": QUESTIONS * GENERATIONS}
    trainer = LatentGRPOTrainer(
        model=fresh_layers(main_model, 2),
        main_model=main_model,
        main_processing_class=tiny_tokenizer(),
        processing_class=tiny_tokenizer(),
        reward_funcs=tiny_reward,
        args=LatentGRPOConfig(
            str(folder),
            seed=seed,
            max_steps=1500,
            num_latents=2,
            latent_sampling="parallel",
            injection="components",
            injection_scale=1.0,
            max_completion_length=3,
            exploration_check_prompts=0,
            logging_steps=100,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **{**defaults, **kwargs},
        ),
        train_dataset=tiny_dataset(2000, seed=0),
    )
    trainer.train()
    num_decoded = trainer.engine.num_decoded
    return accuracy(trainer, "own"), num_decoded


@pytest.mark.slow
def test_screened_runs_learn_as_well_as_those_that_decode_everything(tmp_path):
    figures = {
        arm: [train(tmp_path / f"{arm}{seed}", seed, **kwargs) for seed in SEEDS] for arm, kwargs in ARMS.items()
    }
    accuracies = {arm: [accuracy for accuracy, _ in runs] for arm, runs in figures.items()}
    decoded = {arm: runs[0][1] for arm, runs in figures.items()}
    for arm, values in accuracies.items():
        print(
            f"{arm:<22} decoded {decoded[arm]:>6}  mean {statistics.mean(values):.3f}  {[round(v, 3) for v in values]}"
        )
    mean = {arm: statistics.mean(values) for arm, values in accuracies.items()}
    assert decoded["6 of 32, top_bottom"] <= decoded["all of 32"] / 2
    assert mean["6 of 32, top_bottom"] >= mean["all of 32"] - 0.03
    assert mean["6 of 32, top_bottom"] >= mean["6 alone"] + 0.1

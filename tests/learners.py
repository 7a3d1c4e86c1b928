# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Trainers in the world of tests/tiny.py, on a CPU, of the tests and of examples/benchmarks/small_world.py."""

import copy

import torch

from tests.tiny import tiny_dataset, tiny_reward, tiny_tokenizer, trained_main_model
from trl_dlr import (
    LatentGRPOConfig,
    LatentGRPOTrainer,
    LatentSFTConfig,
    LatentSFTTrainer,
    SoftTokenGRPOConfig,
    SoftTokenGRPOTrainer,
    ThinkingReasoner,
    fresh_layers,
)
from trl_dlr.evaluation import evaluate_latents
from trl_dlr.reasoners.latent_reasoner import LatentReasoner


ON_A_CPU = {"max_completion_length": 3, "bf16": False, "use_cpu": True, "logging_steps": 100}
ON_A_CPU |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
LARGE = {
    "injection": "anchors",
    "anchor_text": "++",
    "lr_scheduler_type": "constant",
}  # latents too large for RL alone


def digit_reward(completions, answer, **kwargs) -> list[float]:
    return [1.0 if c.replace("=", "").strip() == a else -1.0 for c, a in zip(completions, answer, strict=True)]


def accuracy(trainer: LatentGRPOTrainer | SoftTokenGRPOTrainer, control: str = "policy") -> float:
    """Share of right answers to held-out questions."""
    if isinstance(trainer, SoftTokenGRPOTrainer):
        reasoner, reward = ThinkingReasoner(trainer.model, tiny_tokenizer(), trainer.thinking_config, 3), digit_reward
    else:
        reasoner, reward = (
            LatentReasoner(trainer.model, tiny_tokenizer(), trainer.engine, tiny_tokenizer()),
            tiny_reward,
        )
    held_out = tiny_dataset(200, seed=1, held_out=True)
    return evaluate_latents(reasoner, held_out, reward, control=control, batch_size=50)["accuracy"]


def make_learner(
    folder,
    model_seed=0,
    main_model_steps=600,
    num_hints=(2,),
    model=None,
    main_model=None,
    reward=tiny_reward,
    dataset=None,
    trainer_class=LatentGRPOTrainer,
    **kwargs,
):
    """An assistant that knows nothing, or the policy `model`, beside a main model that calculates."""
    if main_model is None:
        main_model = trained_main_model(steps=main_model_steps, num_hints=num_hints)
    torch.manual_seed(model_seed)
    defaults = {**ON_A_CPU, "num_latents": 2, "injection": "components", "injection_scale": 1.0}
    return trainer_class(
        fresh_layers(main_model, 2) if model is None else model,
        reward,
        LatentGRPOConfig(str(folder), **{**defaults, **kwargs}),
        tiny_dataset(2000, seed=0) if dataset is None else dataset,
        processing_class=tiny_tokenizer(),
        main_model=main_model,
        main_processing_class=tiny_tokenizer(),
    )


def make_warm_start(folder, seed=0, main_model_steps=600, **kwargs):
    """Such an assistant, and right answers to imitate."""
    main_model = trained_main_model(steps=main_model_steps)
    rows = tiny_dataset(2000, seed=0), tiny_dataset(200, seed=1, held_out=True)
    train, held_out = (split.map(lambda row: {"completion": f"={row['answer']}"}) for split in rows)
    defaults = {**ON_A_CPU, **LARGE, "num_latents": 2, "injection_scale": 1.0}
    defaults |= {"per_device_train_batch_size": 64, "per_device_eval_batch_size": 50}
    torch.manual_seed(seed)
    return LatentSFTTrainer(
        fresh_layers(main_model, 2),
        LatentSFTConfig(str(folder), seed=seed, **{**defaults, **kwargs}),
        train,
        held_out,
        tiny_tokenizer(),
        main_model=main_model,
        main_processing_class=tiny_tokenizer(),
        reward_func=tiny_reward,
    )


def make_thinker(folder, seed=0, main_model_steps=1200, **kwargs):
    """A model that has learned to write operations and results, and in part which operation is whose."""
    # After the 600 steps that the learner's main model has, the one of seed 1 has not learned to subtract
    defaults = {**ON_A_CPU, "per_device_train_batch_size": 256, "num_generations": 16, "num_iterations": 2}
    defaults |= {"learning_rate": 3e-4, "lr_scheduler_type": "constant", "gradient_checkpointing": False}
    return SoftTokenGRPOTrainer(
        copy.deepcopy(trained_main_model(seed, main_model_steps, batch_size=64, hint=0.5)),
        digit_reward,
        SoftTokenGRPOConfig(str(folder), seed=seed, **{**defaults, **kwargs}),
        tiny_dataset(2000, seed=0),
        processing_class=tiny_tokenizer(),
    )

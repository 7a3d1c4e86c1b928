# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
What latent RL does to a tiny model that thinks in hidden states: the figures of docs/latent_rl.md.

    python -m pytest -s -m slow tests/trainer/test_latent_rl_learning.py
"""

import copy
import json

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from tests.tiny import LETTERS, OPERATION_OF, VOCABULARY, random_main_model, result, tiny_reward, tiny_tokenizer
from trl_dlr.experimental.latent_rl import LatentRLConfig, LatentRLTrainer
from trl_dlr.models.hidden_thoughts import read_with_thoughts


NUM_LATENTS = 2


def questions(shares: tuple[int, ...]) -> list[tuple[str, int, int]]:
    """All `[letter][a][b]` whose pairs are in some of five equal shares."""
    pairs = [(a, b) for a in range(10) for b in range(10) if (a + 3 * b) % 5 in shares]
    return [(letter, a, b) for letter in LETTERS for a, b in pairs]


def dataset(*shares: int) -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"{i}{a}{b}", "answer": str(result(OPERATION_OF[i], a, b))} for i, a, b in questions(shares)]
    )


def thinking_model(seed: int, steps: int = 600, batch_size: int = 128):
    """
    A model trained as Coconut's are: `[letter][a][b]`, then `[op][op]`, one after the other replaced by latents, then
    `=result`, on three fifths of the pairs.
    """
    model = random_main_model(seed).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    known = [(i, a, b, OPERATION_OF[i]) for i, a, b in questions((2, 3, 4))]
    texts = [f"{i}{a}{b}{op}{op}={result(op, a, b)}" for i, a, b, op in known]
    rows = torch.tensor([[VOCABULARY[c] for c in text] + [1] for text in texts])
    for step in range(steps):
        num_latents = [0, 0, 1, 2, 2][step * 5 // steps]
        ids = rows[torch.randint(len(rows), (batch_size,), generator=generator)]
        is_latent = torch.zeros_like(ids).bool()
        is_latent[:, 3 : 3 + num_latents] = True
        states = read_with_thoughts(model.base_model, ids, torch.ones_like(ids), is_latent).last_hidden_state
        logits = model.lm_head(states[:, 2 + num_latents : -1])
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 3 + num_latents :].flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


ARMS = {
    "no stop": {"hacking_window": 0},
    "stop": {},
    "a tenth of the learning rate": {"learning_rate": 1e-5},
}


def run(folder, model, seed, **kwargs) -> list[dict[str, float]]:
    """Figures on held-out questions: after the value head's phase, and at the end."""
    defaults = {"num_latents": NUM_LATENTS, "value_warmup_steps": 100, "max_steps": 300, "learning_rate": 1e-4}
    defaults |= {"per_device_train_batch_size": 64, "per_device_eval_batch_size": 320, "max_completion_length": 3}
    defaults |= {"generation_kwargs": {"do_sample": False}, "use_cpu": True, "bf16": False, "report_to": "none"}
    defaults |= {"save_strategy": "no", "logging_steps": 10, "disable_tqdm": True, "seed": seed}
    defaults |= {"eval_strategy": "steps", "eval_steps": 100}
    args = LatentRLConfig(str(folder), **{**defaults, **kwargs})
    datasets = dataset(1, 2), dataset(0, 3)  # half of the pairs of each are known from the supervised training
    trainer = LatentRLTrainer(copy.deepcopy(model), tiny_reward, args, *datasets, tiny_tokenizer())
    trainer.train()
    trainer.evaluate()
    names = ("auc", "f1", "score", "predicted_accuracy", "accuracy")
    evaluated = [entry for entry in trainer.state.log_history if "eval_value/auc" in entry]
    figures = [
        {"step": entry["step"], **{name: round(entry[f"eval_value/{name}"], 3) for name in names}}
        for entry in (evaluated[0], evaluated[-1])
    ]
    return figures


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_policy_learns_to_please_the_head_and_is_stopped(tmp_path, seed):
    model, figures = thinking_model(seed), {}
    for arm, kwargs in ARMS.items():
        figures[arm] = run(tmp_path / arm, model, seed, **kwargs)
        print(f"\nseed {seed}, {arm}", *map(json.dumps, figures[arm]), sep="\n")
    for before, _ in figures.values():
        assert before["step"] == 100 and before["auc"] > 0.5
        assert before["predicted_accuracy"] == pytest.approx(before["accuracy"], abs=0.15)
    before, end = figures["no stop"]
    assert end["step"] == 300
    assert end["predicted_accuracy"] > before["predicted_accuracy"] + 0.1 and end["accuracy"] < before["accuracy"]
    _, stopped = figures["stop"]
    assert stopped["step"] < 300 and stopped["accuracy"] >= end["accuracy"]

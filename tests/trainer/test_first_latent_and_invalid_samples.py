# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The remedies as options of `LatentGRPOTrainer`: advantages that reach the loss are those of the pure functions."""

import pytest
import torch

from tests.tiny import random_main_model, tiny_dataset
from tests.trainer.test_latent_grpo_trainer import history, make_trainer
from trl_dlr import LatentGRPOConfig
from trl_dlr.trainer.losses import group_advantages, select_first_latent


def rollout_of(trainer, num_questions=2):
    trainer.model.train()
    rows = [row for row in tiny_dataset(num_questions, 0) for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions(rows)


def make_remedied(tmp_path, **kwargs):
    """A main model of which some completions run into the budget."""
    return make_trainer(tmp_path, main_model=random_main_model(seed=3), num_generations=8, **kwargs)


@pytest.mark.parametrize("invalid_samples", ["include", "exclude"])
def test_truncated_samples_have_no_advantage(tmp_path, invalid_samples):
    trainer = make_remedied(tmp_path, invalid_samples=invalid_samples)
    torch.manual_seed(0)
    ended = torch.rand(16) < 0.5
    sampled = trainer._generate_single_turn

    def some_end(*args, **kwargs):
        output = sampled(*args, **kwargs)
        trainer._rollout.is_truncated = ~ended
        return output

    trainer._generate_single_turn = some_end
    output = rollout_of(trainer)
    rewards = trainer._rollout.rewards.view(2, 8)
    expected = group_advantages(rewards, ended.view(2, 8), invalid_samples).flatten()
    assert torch.equal(output["advantages"], expected) and (expected[ended] != 0).any()
    assert (output["advantages"][~ended] == 0).all()
    assert list(trainer._logs["advantages"]) == expected.tolist()[-8:]  # it holds as many as a rollout of the run


def test_unscaled_advantages_stay_unscaled(tmp_path):
    trainer = make_remedied(tmp_path, invalid_samples="exclude", scale_rewards="none")
    output = rollout_of(trainer)
    is_valid = ~trainer._rollout.is_truncated.view(2, 8)
    expected = group_advantages(trainer._rollout.rewards.view(2, 8), is_valid, "exclude", scale=False)
    assert torch.equal(output["advantages"], expected.flatten())


def test_with_nothing_truncated_the_remedy_is_without_effect(tmp_path):
    results = []
    for mode in ("keep", "include", "exclude"):
        trainer = make_trainer(tmp_path, invalid_samples=mode)
        generate = trainer._generate_single_turn

        def all_end(*args, generate=generate, trainer=trainer, **kwargs):
            output = generate(*args, **kwargs)
            trainer._rollout.is_truncated = torch.zeros_like(trainer._rollout.is_truncated)
            return output

        trainer._generate_single_turn = all_end
        torch.manual_seed(0)
        results.append(rollout_of(trainer)["advantages"])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_the_first_latent_has_one_positive_sample_per_group(tmp_path):
    trainer = make_trainer(tmp_path, first_latent_selection=True)
    output = rollout_of(trainer)
    rollout, of_samples = trainer._rollout.drawn, output["completion_advantages"]
    log_probs = rollout.density.log_prob(rollout.latents)
    expected = select_first_latent(of_samples.view(2, 4), log_probs.view(2, 4, 3))
    assert torch.equal(output["advantages"], expected.flatten(0, 1))
    assert ((output["advantages"][:, 0].view(2, 4) != 0).sum(1) == 1).all()
    assert torch.equal(output["advantages"][:, 1:], of_samples.unsqueeze(1).expand(-1, 2))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_advantages_of_positions_work_with_every_loss_type(tmp_path, loss_type, level):
    kwargs = {"loss_type": loss_type, "importance_sampling_level": level, "off_policy_mask_threshold": 0.5}
    trainer = make_trainer(tmp_path, first_latent_selection=True, max_steps=2, **kwargs)
    trainer.train()
    assert history(trainer, "skipped_steps") == [0.0, 0.0]
    assert all(torch.isfinite(torch.tensor(history(trainer, "loss"))))


def test_the_loss_of_the_first_pass_is_minus_the_mean_advantage_of_the_positions(tmp_path):
    trainer = make_trainer(tmp_path, first_latent_selection=True, loss_type="grpo", max_steps=1)
    inputs = rollout_of(trainer)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, inputs)  # ratios are 1
    torch.testing.assert_close(loss, -inputs["advantages"].mean())


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    kwargs = {"first_latent_selection": True, "invalid_samples": "include", "hybrid_coef": 0.1}
    straight = make_trainer(tmp_path / "a", **kwargs)
    straight.train()
    make_trainer(tmp_path / "b", save_strategy="steps", save_steps=5, **kwargs).train()
    resumed = make_trainer(tmp_path / "b", **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "run" / "checkpoint-5"))
    assert history(resumed, "loss") == history(straight, "loss")
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"invalid_samples": "drop"}, "`invalid_samples` must be one of keep, include, exclude, got 'drop'"),
        (
            {"invalid_samples": "exclude", "scale_rewards": "batch"},
            "`invalid_samples='exclude'`.*`scale_rewards` must be 'group' or 'none', got 'batch'",
        ),
        (
            {"invalid_samples": "include", "multi_objective_aggregation": "normalize_then_sum"},
            "`multi_objective_aggregation` must be 'sum_then_normalize', got 'normalize_then_sum'",
        ),
    ],
)
def test_bad_input(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        LatentGRPOConfig(str(tmp_path / "run"), bf16=False, **kwargs)

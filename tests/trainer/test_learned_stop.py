# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Trajectories of different lengths: what `LatentGRPOTrainer` and `LatentSFTTrainer` make of a learned stop."""

import pytest
import torch
from datasets import Dataset
from torch.distributions import Bernoulli, Normal

from tests.tiny import random_main_model, tiny_dataset, tiny_tokenizer
from tests.trainer.test_latent_grpo_trainer import history, length_reward, make_policy, make_trainer, weights
from trl_dlr import LatentGRPOConfig, LatentPolicyModel, LatentSFTConfig, LatentSFTTrainer


STOP = {"learn_stop": True, "num_latents": 4, "initial_stop_prob": 0.4}


def make_stopping_trainer(tmp_path, policy_kwargs=None, **kwargs):
    return make_trainer(tmp_path, policy_kwargs={**STOP, **(policy_kwargs or {})}, **kwargs)


def record(trainer):
    """Every (batch, log-densities, old log-densities) that a loss was computed from."""
    seen, compute = [], trainer._compute_loss

    def recording(model, inputs):
        loss = compute(model, inputs)
        seen.append((inputs, trainer._scoring.logps, trainer._scoring.old_logps))
        return loss

    trainer._compute_loss = recording
    return seen


def rollout_of(trainer, num_questions=2):
    trainer.model.train()
    rows = [row for row in tiny_dataset(num_questions, 0) for _ in range(4)]
    return trainer._generate_and_score_completions(rows)


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_unchanged_weights_give_a_ratio_of_exactly_one(tmp_path, sampling):
    trainer = make_stopping_trainer(
        tmp_path,
        {"latent_sampling": sampling},
        learning_rate=0.0,
        num_iterations=3,
        gradient_accumulation_steps=2,
        max_steps=6,
    )
    trainer.train_dataset = trainer.train_dataset.map(
        lambda row, i: {"prompt": row["prompt"] * (1 + i % 3)}, with_indices=True
    )
    seen = record(trainer)
    trainer.train()
    assert {length for inputs, *_ in seen for length in inputs["lengths"].tolist()} == {1, 2, 3, 4}
    for inputs, logps, old in seen:
        assert torch.equal((logps - old).exp(), torch.ones_like(logps))
        assert torch.equal(inputs["completion_mask"].sum(1), inputs["lengths"])


def test_the_score_is_the_exact_joint_density_of_latents_and_decisions(tmp_path):
    trainer = make_stopping_trainer(tmp_path, {"min_latents": 2, "learn_sigma": True, "sigma": 0.5})
    torch.nn.init.normal_(trainer.model.stop_head.weight, std=0.1)
    inputs = rollout_of(trainer, 4)
    policy, lengths = trainer.model, inputs["lengths"].tolist()
    assert set(lengths) == {2, 3, 4}
    scored = policy(inputs["prompt_ids"], inputs["prompt_mask"], inputs["latents"], lengths=inputs["lengths"])
    logps = scored.density.log_prob(inputs["latents"])
    for row, length in enumerate(lengths):
        alone = inputs["prompt_ids"][row, inputs["prompt_mask"][row] > 0].unsqueeze(0)
        of_row = policy(alone, torch.ones_like(alone), inputs["latents"][row : row + 1])
        steps = Normal(of_row.mean[0], of_row.steps.log_std.exp()).log_prob(inputs["latents"][row]).sum(-1)
        for step in range(4):
            expected = steps[step] if step < length else torch.zeros(())
            if step in (1, 2) and step < length:  # after the first step none may stop, after the fourth all must
                decision = torch.tensor(float(step == length - 1))
                expected = expected + Bernoulli(logits=of_row.stop_logits[0, step]).log_prob(decision)
            torch.testing.assert_close(logps[row, step], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_what_stands_after_a_stop_has_no_effect(tmp_path, sampling):
    results = []
    for filler in (0.0, 50.0):
        trainer = make_stopping_trainer(
            tmp_path,
            {"latent_sampling": sampling},
            beta=0.1,
            gamma=0.1,
            hybrid_coef=0.1,
            max_steps=4,
            learning_rate=1e-2,
        )
        compute = trainer._compute_loss

        def filled(model, inputs, compute=compute, filler=filler):
            is_missing = torch.arange(4) >= inputs["lengths"].unsqueeze(1)
            assert is_missing.any()
            for name in ("latents", "noise", "ref_mean"):
                inputs[name] = inputs[name].masked_fill(is_missing.unsqueeze(-1), filler)
            return compute(model, inputs)

        trainer._compute_loss = filled
        trainer.train()
        results.append((weights(trainer.model), history(trainer, "loss")))
    assert results[0][1] == results[1][1]
    for name, tensor in results[0][0].items():
        assert torch.equal(results[1][0][name], tensor), name


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_stop_is_trained(tmp_path, sampling, gradient_checkpointing):
    trainer = make_stopping_trainer(
        tmp_path, {"latent_sampling": sampling}, gradient_checkpointing=gradient_checkpointing, beta=0.1, max_steps=4
    )
    before, reference = weights(trainer.model), weights(trainer.ref_model)
    trainer.train()
    for name in ("stop_head.weight", "stop_head.bias"):
        assert not torch.equal(trainer.model.state_dict()[name], before[name])
        assert torch.equal(trainer.ref_model.state_dict()[name], reference[name])
    assert history(trainer, "latent/kl")[0] == 0.0 and history(trainer, "latent/kl")[-1] > 0


def test_soft_tokens_stop_too(tmp_path):
    kwargs = {"latent_density": "soft_tokens", "injection": "anchors", "injection_scale": 0.3}
    trainer = make_stopping_trainer(
        tmp_path, kwargs, latent_cost=0.1, beta=0.1, gamma=0.1, prescreening_fraction=0.5, max_steps=4
    )
    before, seen = weights(trainer.model), record(trainer)
    trainer.train()
    for _, logps, old in seen[::2]:
        assert torch.equal(logps, old)
    is_missing = torch.arange(4) >= seen[0][0]["lengths"].unsqueeze(1)
    features = trainer.policy.features(seen[0][0]["latents"], seen[0][0]["lengths"])
    assert is_missing.any() and (features[is_missing] == 0).all() and (features[~is_missing] != 0).all()
    assert not torch.equal(trainer.model.state_dict()["stop_head.bias"], before["stop_head.bias"])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_gradient_accumulation_equals_one_large_batch(tmp_path, loss_type):
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make_stopping_trainer(
            tmp_path,
            loss_type=loss_type,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            num_iterations=1,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        results.append(weights(trainer.model))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_the_cost_is_in_the_advantages_and_not_in_the_rewards(tmp_path, scale_rewards):
    trainer = make_stopping_trainer(tmp_path, latent_cost=0.25, scale_rewards=scale_rewards)
    inputs = rollout_of(trainer)
    rewards = trainer._rollout.rewards.view(2, 4)
    shaped = rewards - 0.25 * inputs["lengths"].view(2, 4)
    expected = shaped - shaped.mean(1, keepdim=True)
    if scale_rewards == "group":
        expected = expected / (shaped.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(inputs["advantages"], expected.flatten())
    assert list(trainer._logs["advantages"]) == pytest.approx(expected.flatten().tolist())
    completions = list(trainer._logs["completion"])
    assert list(trainer._logs["rewards"]["length_reward"]) == length_reward(completions) == rewards.flatten().tolist()
    assert trainer._metrics["train"]["reward"] == [pytest.approx(rewards.mean().item())]
    lengths = inputs["lengths"].float()
    for name in ("mean", "min", "max"):
        assert trainer._metrics["train"][f"latent/{name}_length"] == [getattr(lengths, name)().item()]


def test_a_cost_without_rewards_that_differ_prefers_the_shorter(tmp_path):
    trainer = make_stopping_trainer(
        tmp_path,
        {"initial_stop_prob": 0.1},
        latent_cost=0.1,
        reward_funcs=lambda completions, **kwargs: [1.0] * len(completions),
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        max_steps=40,
    )
    trainer.train()
    lengths = history(trainer, "latent/mean_length")
    assert lengths[0] > 3 and lengths[-1] < 2


def test_the_cost_of_trajectories_that_were_not_decoded_is_not_counted(tmp_path):
    trainer = make_stopping_trainer(
        tmp_path, latent_cost=0.25, prescreening_fraction=0.5, prescreening_warmup_rollouts=0
    )
    inputs = rollout_of(trainer)
    is_decoded = inputs["completion_mask"].any(1)
    assert is_decoded.sum() == 4 and (inputs["advantages"][~is_decoded] == 0).all()
    shaped = trainer._rollout.rewards - 0.25 * inputs["lengths"]
    for rows in (slice(0, 4), slice(4, 8)):
        two = shaped[rows][is_decoded[rows]]
        expected = (two - two.mean()) / (two.std() + 1e-4)
        torch.testing.assert_close(inputs["advantages"][rows][is_decoded[rows]], expected)


def test_the_main_model_is_given_the_latents_that_are_there(tmp_path):
    trainer = make_stopping_trainer(tmp_path, hybrid_coef=1.0)
    inputs = rollout_of(trainer)
    embed, before = trainer.main_model.get_input_embeddings(), trainer.engine.num_forward_tokens
    names = "prompt_ids", "prompt_mask", "latents", "lengths"
    everything = torch.ones(8, dtype=torch.bool), 8, inputs["noise"]
    _, embeds = trainer._score(trainer.model, *(inputs[name] for name in names), *everything)
    terms = trainer._hybrid_terms(embeds, inputs, torch.ones(8, dtype=torch.bool))
    num_tokens = 0
    for row, length in enumerate(inputs["lengths"].tolist()):
        prompt = inputs["main_prompt_ids"][row, inputs["main_prompt_mask"][row] > 0]
        decoded = inputs["decoded_ids"][row, inputs["decoded_ids"][row] != -100]
        latents = trainer.model.inject(inputs["latents"][row : row + 1, :length])[0]
        embeds = torch.cat([embed(prompt), latents, embed(decoded)]).unsqueeze(0)
        logps = trainer.main_model(inputs_embeds=embeds).logits[0, -len(decoded) - 1 : -1].log_softmax(-1)
        assert logps.argmax(-1).tolist() == decoded.tolist()  # greedy
        mean = logps.gather(1, decoded.unsqueeze(1)).mean()
        torch.testing.assert_close(terms[row], -inputs["advantages"][row] * mean, atol=1e-5, rtol=1e-4)
        num_tokens += length + len(decoded) + (len(prompt) if row % 4 == 0 else 0)
    assert before == num_tokens


@pytest.mark.parametrize("stop", [4, 5])  # between two rollouts, and in the middle of one
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, stop):
    kwargs = {"latent_cost": 0.1, "beta": 0.1, "gamma": 0.01, "max_steps": 8}
    straight = make_stopping_trainer(tmp_path / "a", **kwargs)
    straight.train()
    make_stopping_trainer(tmp_path / "b", save_strategy="steps", save_steps=stop, **kwargs).train()
    resumed = make_stopping_trainer(tmp_path / "b", **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "run" / f"checkpoint-{stop}"))
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert history(resumed, "loss") == history(straight, "loss")
    assert history(resumed, "latent/mean_length") == history(straight, "latent/mean_length")
    with pytest.raises(ValueError, match="`min_latents` was 1 in its policy, and is 2 now"):
        other = make_stopping_trainer(tmp_path / "b", {"min_latents": 2}, **kwargs)
        other.train(resume_from_checkpoint=str(tmp_path / "b" / "run" / f"checkpoint-{stop}"))


def test_a_new_policy_has_the_stop_that_the_configuration_says(tmp_path):
    fields = {"learn_stop": True, "min_latents": 2, "num_latents": 5, "initial_stop_prob": 0.2}
    trainer = make_trainer(tmp_path, model=make_policy(random_main_model()).assistant, latent_dim=4, **fields)
    config = trainer.policy.config
    assert {name: getattr(config, name) for name in fields} == fields
    torch.testing.assert_close(trainer.policy.stop_head.bias.sigmoid().item(), 0.2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"learn_stop": True, "num_latents": 3, "min_latents": 4}, "`min_latents=4` must be below `num_latents=3`"),
        ({"learn_stop": True, "min_latents": 0}, "`min_latents` must be at least 1, got 0"),
        ({"min_latents": 2}, "`min_latents=2` needs `learn_stop=True`"),
        ({"latent_cost": -0.1}, "`latent_cost` must be a number of at least 0, got -0.1"),
        ({"latent_cost": float("nan")}, "`latent_cost` must be a number of at least 0, got nan"),
        (
            {"latent_cost": 0.1, "scale_rewards": "batch"},
            "`latent_cost=0.1`.*`scale_rewards` must be 'group' or 'none'",
        ),
        (
            {"latent_cost": 0.1, "multi_objective_aggregation": "normalize_then_sum"},
            "`latent_cost=0.1`.*`multi_objective_aggregation` must be 'sum_then_normalize'",
        ),
    ],
)
def test_bad_fields(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        LatentGRPOConfig(str(tmp_path / "run"), bf16=False, use_cpu=True, **kwargs)


def test_options_that_do_not_fit_the_policy_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`latent_cost=0.1` needs a policy with `learn_stop=True`.*`num_latents=3`"):
        make_trainer(tmp_path, latent_cost=0.1)
    assert not (tmp_path / "run").exists()


def test_a_supervised_start_takes_all_steps_and_leaves_the_stop_as_it_is(tmp_path):
    main_model = random_main_model()
    policy, rows = make_policy(main_model, **STOP), [{"prompt": f"A{i}2", "completion": f"={i}"} for i in range(8)]
    before, injected, inject = weights(policy), [], policy.inject
    policy.inject = lambda latents: injected.append(latents) or inject(latents)
    defaults = {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    trainer = LatentSFTTrainer(
        model=policy,
        main_model=main_model,
        args=LatentSFTConfig(str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, **defaults),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        main_processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert len(injected) == 2 and all((latents != 0).all() and latents.size(1) == 4 for latents in injected)
    after = weights(trainer.model)
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("stop_head."))
    assert not torch.equal(after["latent_head.mean.weight"], before["latent_head.mean.weight"])
    del policy.inject
    trainer.save_model()
    make_trainer(tmp_path, model=LatentPolicyModel.from_pretrained(tmp_path / "run"), max_steps=1).train()

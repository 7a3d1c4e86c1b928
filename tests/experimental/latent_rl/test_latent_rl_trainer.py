# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import copy
import itertools
import logging
import warnings

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import TrainerCallback

from tests.tiny import random_main_model, tiny_dataset, tiny_tokenizer
from tests.trainer.test_latent_grpo_trainer import history, weights
from trl_dlr.experimental.latent_rl import LatentRLConfig, LatentRLTrainer
from trl_dlr.models.thinking import ThinkingConfig
from trl_dlr.models.value_head import VALUE_HEAD_FILE
from trl_dlr.trainer.prescreening import area_under_curve, f1_score
from trl_dlr.trainer.soft_token_grpo_config import SoftTokenGRPOConfig


def parity_reward(completions, **kwargs):
    """Right and wrong answers even of a random model."""
    return [float(sum(map(ord, completion)) % 2) - 0.5 for completion in completions]


def make_trainer(tmp_path, model=None, reward_funcs=parity_reward, trainer_kwargs=None, train_dataset=None, **kwargs):
    defaults = {"num_latents": 3, "value_warmup_steps": 3, "max_steps": 6, "per_device_train_batch_size": 8}
    defaults |= {"per_device_eval_batch_size": 8, "max_completion_length": 4, "learning_rate": 1e-3}
    defaults |= {"logging_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    defaults |= {"disable_tqdm": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LatentRLTrainer(
            model=random_main_model() if model is None else model,
            reward_funcs=reward_funcs,
            args=LatentRLConfig(str(tmp_path / "run"), **{**defaults, **kwargs}),
            train_dataset=tiny_dataset(40, 0) if train_dataset is None else train_dataset,
            processing_class=tiny_tokenizer(),
            **(trainer_kwargs or {}),
        )


class Recorder(TrainerCallback):
    """Weights of the language model and of the head after each step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append((weights(model), weights(self.trainer.value_head)))


def record(trainer):
    recorder = Recorder()
    recorder.trainer = trainer
    recorder.seen = [(weights(trainer.model), weights(trainer.value_head))]
    trainer.add_callback(recorder)
    return recorder.seen


def are_equal(some, others):
    assert some.keys() == others.keys()
    return all(torch.equal(some[name], others[name]) for name in some)


def first_batch(trainer):
    """What the first loss of the policy's phase is computed from."""
    trainer.train()
    trainer.state.global_step = trainer.args.value_warmup_steps
    trainer.model.zero_grad()
    return trainer._buffered_inputs[0]


# ---- Two phases ----


@pytest.mark.parametrize("kwargs", [{}, {"num_iterations": 2, "gradient_accumulation_steps": 2, "weight_decay": 0.1}])
def test_one_learns_at_a_time(tmp_path, kwargs):
    trainer = make_trainer(tmp_path, **kwargs)
    seen = record(trainer)
    trainer.train()
    assert len(seen) == 7
    for step, ((model, head), (next_model, next_head)) in enumerate(itertools.pairwise(seen)):
        assert are_equal(model, next_model) is (step < 3), step
        assert are_equal(head, next_head) is (step >= 3), step
    assert history(trainer, "grad_norm")[:3] == [0.0] * 3 and min(history(trainer, "grad_norm")[3:]) > 0


def test_only_an_adapter_is_trained(tmp_path):
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, trainer_kwargs={"peft_config": adapter})
    seen = record(trainer)
    trainer.train()
    for (model, _), (next_model, _) in itertools.pairwise(seen[:4]):
        assert are_equal(model, next_model)
    changed = {name for name, tensor in seen[3][0].items() if not torch.equal(tensor, seen[-1][0][name])}
    assert changed and all("lora" in name for name in changed)


# ---- Losses ----


def naive_states(model, prompt_ids, prompt_mask, num_latents):
    """Latents of each row on its own, without padding and cache: a whole forward for each."""
    rows = []
    for ids, is_there in zip(prompt_ids, prompt_mask.bool(), strict=True):
        embeds = list(model.get_input_embeddings()(ids[is_there]))
        states = []
        for _ in range(num_latents):
            output = model(inputs_embeds=torch.stack(embeds)[None], output_hidden_states=True, use_cache=False)
            states.append(output.hidden_states[-1][0, -1])
            embeds.append(states[-1])
        rows.append(torch.stack(states))
    return torch.stack(rows)


@pytest.mark.parametrize("num_latents", [1, 3])
def test_the_gradient_passes_through_the_latents_into_the_language_model_alone(tmp_path, num_latents):
    trainer = make_trainer(tmp_path, num_latents=num_latents, max_steps=1, per_device_train_batch_size=16)
    trainer.train_dataset = trainer.train_dataset.map(
        lambda row, i: {"prompt": row["prompt"] * (1 + i % 3)}, with_indices=True
    )
    inputs, model = first_batch(trainer), trainer.model
    assert len(set(inputs["prompt_mask"].sum(1).tolist())) > 1  # padded
    trainer._compute_loss(model, inputs).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(p.grad is None for p in trainer.value_head.parameters())

    model.zero_grad()
    states = naive_states(model, inputs["prompt_ids"], inputs["prompt_mask"], num_latents)
    torch.testing.assert_close(states, inputs["latent_states"], atol=1e-5, rtol=1e-4)  # the rollout's
    (-trainer.value_head(states).sigmoid().mean()).backward()
    for name, p in model.named_parameters():
        if name == "lm_head.weight":
            assert (ours[name] == 0).all() and p.grad is None
        else:
            torch.testing.assert_close(ours[name], p.grad, atol=1e-7, rtol=1e-3)
            assert p.grad.abs().sum() > 0

    model.zero_grad()  # and through latents into those before them: a different gradient where it stops
    if num_latents > 1:
        detached = naive_states(model, inputs["prompt_ids"], inputs["prompt_mask"], 1)
        (-trainer.value_head(detached).sigmoid().mean()).backward()
        name = "model.layers.0.mlp.up_proj.weight"
        assert not torch.allclose(ours[name], model.get_parameter(name).grad, rtol=0.1)


def test_the_head_learns_by_weighted_cross_entropy_on_rows_with_a_reward(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, pos_weight=5.0)
    trainer.train()
    trainer.state.global_step = 0
    inputs = dict(trainer._buffered_inputs[0])
    inputs["rewards"] = torch.tensor([1.0, -1.0, 0.0, torch.nan, 0.5, torch.nan, -0.5, 2.0])
    loss = trainer._compute_loss(trainer.model, inputs)
    rows, labels = [0, 1, 2, 4, 6, 7], torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    logits = trainer.value_head(inputs["latent_states"][rows])
    per_latent = [
        binary_cross_entropy_with_logits(logits[:, t], labels, pos_weight=torch.tensor(5.0)) for t in range(3)
    ]
    torch.testing.assert_close(loss, sum(per_latent) / 3)
    loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in trainer.model.parameters())

    inputs["rewards"] = torch.full((8,), torch.nan)
    assert trainer._compute_loss(trainer.model, inputs) == 0.0


def test_figures_are_of_the_head_before_it_has_learned_from_the_rollout(tmp_path):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=16, max_steps=1)
    head = copy.deepcopy(trainer.value_head)
    trainer.train()
    inputs = trainer._buffered_inputs[0]
    log_odds, is_correct = head(inputs["latent_states"]), inputs["rewards"] > 0
    scores, predicted = log_odds.sigmoid().mean(1), (log_odds - torch.tensor(20.0).log()).sigmoid()
    figures = {"auc": area_under_curve(scores, is_correct), "f1": f1_score(scores > 0.5, is_correct)}
    figures |= {"score": scores.mean().item(), "accuracy": is_correct.float().mean().item()}
    figures["predicted_accuracy"] = predicted.mean().item()
    assert 0 < figures["accuracy"] < 1
    for name, value in figures.items():
        assert history(trainer, f"value/{name}") == [pytest.approx(value)], name


def test_f1_score():
    labels = torch.tensor([True, True, False, False, False])
    assert f1_score(torch.tensor([True, False, True, False, False]), labels) == pytest.approx(0.5)
    assert f1_score(labels, labels) == 1.0 and f1_score(~labels, labels) == 0.0
    nothing = torch.zeros(5, dtype=torch.bool)
    assert f1_score(nothing, nothing) is None and f1_score(nothing, labels) == 0.0


def test_evaluation_is_over_the_whole_set(tmp_path):
    trainer = make_trainer(tmp_path, trainer_kwargs={"eval_dataset": tiny_dataset(20, 1)})
    batches, log_value = [], trainer._log_value
    trainer._log_value = lambda *args: (batches.append(args), log_value(*args))
    figures = trainer.evaluate()
    ((mode, scores, predicted, rewards),) = batches
    assert mode == "eval" and scores.shape == predicted.shape == rewards.shape == (40,)
    assert figures["eval_value/auc"] == area_under_curve(scores, rewards > 0)
    assert figures["eval_value/accuracy"] == pytest.approx(figures["eval_rewards/parity_reward/mean"] + 0.5)


# ---- Reward hacking ----


def test_a_run_stops_when_the_policy_hacks_the_head(tmp_path, caplog):
    settings = {"value_warmup_steps": 4, "max_steps": 60, "hacking_window": 3, "hacking_threshold": 0.05}
    settings |= {"learning_rate": 1e-2, "pos_weight": 1.0}
    trainer = make_trainer(tmp_path, reward_funcs=hopeless, **settings)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    step = trainer.state.global_step
    assert 4 < step < 60 and (tmp_path / "run" / f"checkpoint-{step}" / VALUE_HEAD_FILE).exists()
    assert "Reward hacking" in caplog.text and f"stops after step {step}" in caplog.text
    assert history(trainer, "value/predicted_accuracy_rise")[-1] > 0.05 >= history(trainer, "value/accuracy_rise")[-1]

    trainer = make_trainer(
        tmp_path / "on", reward_funcs=hopeless, **{**settings, "hacking_window": 0, "max_steps": 20}
    )
    trainer.train()
    assert trainer.state.global_step == 20 and not history(trainer, "value/predicted_accuracy_rise")


def hopeless(completions, **kwargs):
    """Half of the answers are right, whatever they are."""
    return [float(row % 2) for row in range(len(completions))]


# ---- Construction, checkpoints ----


def test_it_warns_that_it_is_experimental(tmp_path):
    with pytest.warns(UserWarning, match="`LatentRLTrainer` is experimental"):
        LatentRLTrainer(
            random_main_model(max_position_embeddings=1024),
            parity_reward,
            LatentRLConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
            tiny_dataset(8, 0),
            processing_class=tiny_tokenizer(),
        )


def test_another_trainers_configuration_is_refused(tmp_path):
    args = SoftTokenGRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match="`args` must be a `LatentRLConfig`, got SoftToken"),
    ):
        warnings.simplefilter("ignore")
        LatentRLTrainer(random_main_model(), parity_reward, args, tiny_dataset(8, 0))


@pytest.mark.parametrize("saved_at", [2, 3, 4])
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, saved_at, num_iterations):
    kwargs = {"save_strategy": "steps", "save_steps": saved_at, "hacking_window": 2, "hacking_threshold": 10.0}
    kwargs["num_iterations"] = num_iterations
    whole = make_trainer(tmp_path / "a", **kwargs)
    whole.train()
    checkpoint = tmp_path / "a" / "run" / f"checkpoint-{saved_at}"
    assert load_file(checkpoint / VALUE_HEAD_FILE).keys() == whole.value_head.state_dict().keys()
    assert ThinkingConfig.from_pretrained(str(checkpoint)).latent_type == "hidden_states"

    resumed = make_trainer(tmp_path / "b", **kwargs)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert are_equal(weights(resumed.model), weights(whole.model))
    assert are_equal(weights(resumed.value_head), weights(whole.value_head))
    assert resumed._hacking.state_tensors().keys() == whole._hacking.state_tensors().keys()
    assert (resumed._hacking.before, resumed._hacking.since) == (whole._hacking.before, whole._hacking.since)
    for key in ("loss", "value/score", "value/accuracy"):
        assert history(resumed, key)[-2:] == history(whole, key)[-2:], key
    # The best model comes back with its head
    resumed.state.best_model_checkpoint = str(checkpoint)
    torch.nn.init.zeros_(next(resumed.value_head.parameters()))
    resumed._load_best_model()
    assert are_equal(weights(resumed.value_head), load_file(checkpoint / VALUE_HEAD_FILE))


def test_a_checkpoint_of_other_phases_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    other = make_trainer(tmp_path, value_warmup_steps=2)
    with pytest.raises(ValueError, match="`value_warmup_steps` was 3 in its run, and is 2 now"):
        other.train(resume_from_checkpoint=True)

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import functools
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig

from tests.tiny import LETTERS, VOCABULARY, random_main_model, tiny_dataset, tiny_tokenizer
from trl_dlr import LatentGRPOConfig, LatentGRPOTrainer, LatentPolicyModel, fresh_layers
from trl_dlr.models import DiagonalGaussian
from trl_dlr.trainer.callbacks import ExplorationCheckCallback
from trl_dlr.trainer.losses import contrastive_loss


def length_reward(completions, **kwargs):
    """Rewards that differ within a group even for a random main model."""
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


def make_policy(main_model, assistant=None, seed=5, **kwargs):
    torch.manual_seed(seed)
    kwargs = {"latent_dim": 4, "num_latents": 3, "injection": "components", "injection_scale": 1.0, **kwargs}
    assistant = fresh_layers(main_model, 1) if assistant is None else assistant
    return LatentPolicyModel.from_assistant(assistant, main_model, tiny_tokenizer(), **kwargs)


def gpt2(**kwargs):
    """An assistant with absolute positions."""
    return GPT2LMHeadModel(GPT2Config(**{"vocab_size": 30, "n_embd": 32, "n_layer": 1, "n_head": 2, **kwargs}))


def make_trainer(
    tmp_path,
    reward_funcs=length_reward,
    policy_kwargs=None,
    trainer_kwargs=None,
    main_model=None,
    model=None,
    train_dataset=None,
    **kwargs,
):
    main_model = random_main_model() if main_model is None else main_model
    defaults = {
        "max_steps": 8,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "num_iterations": 2,
        "max_completion_length": 4,
        "learning_rate": 1e-3,
        "exploration_check_prompts": 0,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return LatentGRPOTrainer(
        model=make_policy(main_model, **(policy_kwargs or {})) if model is None else model,
        main_model=main_model,
        reward_funcs=reward_funcs,
        args=LatentGRPOConfig(str(tmp_path / "run"), **{**defaults, **kwargs}),
        train_dataset=tiny_dataset(40, 0) if train_dataset is None else train_dataset,
        **{
            "processing_class": tiny_tokenizer(),
            "main_processing_class": tiny_tokenizer(),
            **(trainer_kwargs or {}),
        },
    )


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def record_losses(trainer):
    """Every (density, log-density, old log-density) that a loss was computed from."""
    seen, compute = [], trainer._compute_loss

    def recording(model, inputs):
        loss = compute(model, inputs)
        scoring = trainer._scoring
        drawn = scoring.density
        density = DiagonalGaussian(drawn.mean.detach().clone(), drawn.log_std.detach().clone())
        seen.append((trainer.state.global_step, density, scoring.logps, scoring.old_logps))
        return loss

    trainer._compute_loss = recording
    return seen


# ---- The method ----


def test_the_default_batch_sizes_train_and_evaluate(tmp_path):
    trainer = LatentGRPOTrainer(
        model=make_policy(random_main_model()),
        main_model=random_main_model(),
        reward_funcs=length_reward,
        args=LatentGRPOConfig(
            str(tmp_path),
            max_steps=1,
            max_completion_length=2,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="no",
            exploration_check_prompts=0,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=tiny_dataset(8, 0),
        eval_dataset=tiny_dataset(5, 0, held_out=True),
        processing_class=tiny_tokenizer(),
        main_processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert "eval_reward" in trainer.evaluate() and len(history(trainer, "eval_reward")) == 2


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_unchanged_weights_give_a_ratio_of_exactly_one(tmp_path, sampling):
    # Several micro-batches, rows shuffled between them, prompts of different lengths, weights that stay as they are.
    # The assistant, whose layers are configured as the main model's, has a dropout that is no module.
    trainer = make_trainer(
        tmp_path,
        main_model=random_main_model(attention_dropout=0.5),
        policy_kwargs={"latent_sampling": sampling},
        learning_rate=0.0,
        num_iterations=3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=6,
    )
    trainer.train_dataset = trainer.train_dataset.map(
        lambda row, i: {"prompt": row["prompt"] * (1 + i % 3)}, with_indices=True
    )
    seen = record_losses(trainer)
    trainer.train()
    assert len(seen) == 12
    for _, _, logps, old in seen:
        assert torch.equal((logps - old).exp(), torch.ones_like(logps))
    assert history(trainer, "latent/log_ratio_std") == [0.0] * 6


def test_ratios_move_once_the_weights_do(tmp_path):
    trainer = make_trainer(tmp_path)
    seen = record_losses(trainer)
    trainer.train()
    first_passes = [(logps - old).abs().max() for step, _, logps, old in seen if step % 2 == 0]
    later_passes = [(logps - old).abs().max() for step, _, logps, old in seen if step % 2 == 1]
    assert max(first_passes) == 0 and min(later_passes) > 0


@pytest.mark.parametrize("sigma", ["learn_sigma", "state_sigma"])
def test_the_score_is_the_exact_density_of_the_stored_latents(tmp_path, sigma):
    trainer = make_trainer(tmp_path, policy_kwargs={sigma: True, "sigma": 0.5}, max_steps=2, beta=0.1)
    batches, compute = [], trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: (compute(model, inputs), batches.append(inputs))[0]
    seen = record_losses(trainer)
    trainer.train()
    _, density, logps, _ = seen[0]
    normal = torch.distributions.Normal(density.mean, density.log_std.exp())
    torch.testing.assert_close(logps, normal.log_prob(batches[0]["latents"]).sum(-1).detach())


def test_log_ratios_are_clamped_before_exp(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=10.0, max_steps=6, num_iterations=3)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(history(trainer, "loss"))))
    assert history(trainer, "skipped_steps") == [0.0] * 6


def test_the_frozen_main_model_is_bit_identical_and_has_no_gradient(tmp_path):
    main_model = random_main_model()
    before = weights(main_model)
    trainer = make_trainer(tmp_path, main_model=main_model, beta=0.01, gamma=0.01)
    trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in main_model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in main_model.parameters())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in main_model.parameters()}


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
@pytest.mark.parametrize(
    ("gradient_checkpointing", "sigma", "of_sigma"),
    [
        (False, "learn_sigma", "latent_head.log_std"),
        (True, "learn_sigma", "latent_head.log_std"),
        (False, "state_sigma", "latent_head.log_std_shift.weight"),
    ],
)
def test_every_trainable_weight_gets_a_gradient(tmp_path, sampling, gradient_checkpointing, sigma, of_sigma):
    trainer = make_trainer(
        tmp_path,
        policy_kwargs={"latent_sampling": sampling, sigma: True},
        gradient_checkpointing=gradient_checkpointing,
        max_steps=1,
    )
    gradients = {}

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.update({n: p.grad.abs().sum().item() for n, p in model.named_parameters() if p.requires_grad})

    trainer.add_callback(Recorder())
    trainer.train()
    assert any(name.startswith("assistant.layers") for name in gradients)
    assert {"latent_head.mean.weight", of_sigma} <= set(gradients)
    assert ("latent_in.weight" if sampling == "autoregressive" else "queries.weight") in gradients
    assert all(value > 0 for value in gradients.values()), gradients


def test_the_kl_is_the_closed_form_to_the_initial_policy(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.5, max_steps=4)
    initial = weights(trainer.model)
    trainer.train()
    assert history(trainer, "latent/kl")[0] == 0.0  # the reference is the policy it starts from, to the bit
    assert history(trainer, "latent/kl")[-1] > 0
    assert all(torch.equal(initial[name], tensor) for name, tensor in trainer.ref_model.state_dict().items())


def test_the_reference_of_a_second_round_does_not_move_with_the_policy(tmp_path):
    first = make_trainer(tmp_path, max_steps=1)
    first.train()
    trainer = make_trainer(tmp_path, model=first.policy, main_model=first.main_model, beta=0.5, max_steps=4)
    trainer.train()
    assert history(trainer, "latent/kl")[0] == 0.0 and history(trainer, "latent/kl")[-1] > 0


def test_beta_holds_the_policy_back(tmp_path):
    final = []
    for beta in (0.001, 10.0):
        trainer = make_trainer(tmp_path, beta=beta, max_steps=30)
        trainer.train()
        final.append(history(trainer, "latent/kl")[-1])
    assert final[1] < 0.2 * final[0]


@pytest.mark.parametrize("similarity", ["dot", "cosine", "infonce", "margin"])
def test_contrastive_term_does_not_depend_on_how_groups_are_split(tmp_path, similarity, monkeypatch):
    any_margin = functools.partial(contrastive_loss, margin=-1.0)  # which no pair satisfies
    monkeypatch.setattr("trl_dlr.trainer.latent_grpo_trainer.contrastive_loss", any_margin)
    gradients = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path,
            policy_kwargs={"learn_sigma": True},
            gamma=1.0,
            contrastive_similarity=similarity,
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),  # nothing but the contrastive term
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            num_iterations=1,
            max_steps=1,
            max_grad_norm=1e9,
        )
        trainer.create_optimizer()
        trainer._clip_grad_norm = lambda model: gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        trainer.train()
    assert any(g.abs().sum() > 0 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_gradient_accumulation_equals_one_large_batch(tmp_path, loss_type):
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path,
            loss_type=loss_type,
            beta=0.1,
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


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_every_loss_type_and_importance_sampling_level(tmp_path, loss_type, level):
    trainer = make_trainer(tmp_path, loss_type=loss_type, importance_sampling_level=level, max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    assert history(trainer, "skipped_steps") == [0.0, 0.0]
    assert any(not torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


# ---- Optimization ----


def test_the_projection_has_its_own_learning_rate(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=1e-3, projection_learning_rate=2e-3, lr_scheduler_type="constant")
    trainer.create_optimizer()
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert set(rates) == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(rate == (1e-3 if name.startswith("assistant.") else 2e-3) for name, rate in rates.items())
    assert {g["weight_decay"] for g in trainer.optimizer.param_groups} == {0.0}
    frozen = make_trainer(tmp_path, projection_learning_rate=0.0, max_steps=2)
    before = weights(frozen.model)
    frozen.train()
    moved = {name for name, tensor in frozen.model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved and all(name.startswith("assistant.") for name in moved)


@pytest.mark.parametrize("stop", [4, 5])  # between two rollouts, and in the middle of one
@pytest.mark.parametrize(
    "kwargs", [{}, {"beta": 0.1, "gamma": 0.01}, {"gradient_accumulation_steps": 2}, {"hybrid_coef": 0.1}]
)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, kwargs, stop):
    straight = make_trainer(tmp_path / "a", max_steps=8, **kwargs)
    straight.train()
    interrupted = make_trainer(tmp_path / "b", max_steps=8, save_strategy="steps", save_steps=stop, **kwargs)
    interrupted.train()
    resumed = make_trainer(tmp_path / "b", max_steps=8, **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "run" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 8
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert history(resumed, "loss") == history(straight, "loss")


@pytest.mark.parametrize("stop", [11, 12, 13, 15])  # an epoch of 6 questions is 6 steps: within and between epochs
def test_a_run_resumed_in_a_later_epoch_goes_on_with_the_same_rows(tmp_path, stop):
    kwargs = {"train_dataset": tiny_dataset(6, 0), "max_steps": 20}
    straight = make_trainer(tmp_path / "a", **kwargs)
    straight.train()
    make_trainer(tmp_path / "b", save_strategy="steps", save_steps=stop, **kwargs).train()
    resumed = make_trainer(tmp_path / "b", **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "run" / f"checkpoint-{stop}"))
    assert history(resumed, "loss") == history(straight, "loss")
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["beta", "gamma", "hybrid_coef"])
def test_a_term_that_the_stored_rollout_knows_nothing_of_is_refused(tmp_path, name):
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    trainer = make_trainer(tmp_path, **{name: 0.1})
    with pytest.raises(ValueError, match=rf"`loss_terms` was \[\] in its run, and is \['{name}'\] now"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_policy_is_refused(tmp_path):
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    trainer = make_trainer(tmp_path, policy_kwargs={"sigma": 3.0})
    with pytest.raises(ValueError, match=r"`sigma` was 1.0 in its policy, and is 3.0 now"):
        trainer.train(resume_from_checkpoint=True)


# ---- The hybrid term ----


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_the_hybrid_terms_gradient_is_that_of_finite_differences(tmp_path, sampling):
    kwargs = {"policy_kwargs": {"latent_sampling": sampling, "injection": "trained", "learn_sigma": True}}
    trainer = make_trainer(tmp_path, hybrid_coef=1.0, prescreening_fraction=0.5, **kwargs)
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([row for row in tiny_dataset(2, 0) for _ in range(4)])
    inputs["advantages"] = torch.randn(8)
    is_decoded = inputs["completion_mask"].any(dim=1)
    is_decoded[3] = False
    prompt = inputs["prompt_ids"], inputs["prompt_mask"], inputs["latents"], inputs["lengths"]

    def value():
        _, embeds = trainer._score(trainer.model, *prompt, is_decoded, 8, inputs["noise"])
        return trainer._hybrid_terms(embeds, inputs, is_decoded)

    terms = value()
    assert terms[3] == 0 and (terms[is_decoded] != 0).all()
    terms.sum().backward()
    assert all(parameter.grad is None for parameter in trainer.main_model.parameters())
    policy, eps = trainer.model, 2e-2
    for parameter in (policy.injector.weight, policy.latent_head.mean.bias, policy.latent_head.log_std):
        direction = torch.randn_like(parameter)
        direction /= direction.norm()
        values = []
        with torch.no_grad():
            for step in (eps, -2 * eps):
                parameter += step * direction
                values.append(value().double().sum())
            parameter += eps * direction
        slope = (values[0] - values[1]) / (2 * eps)
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope.item(), rel=0.02, abs=2e-4)


def test_the_hybrid_term_is_the_likelihood_of_what_was_decoded(tmp_path):
    trainer = make_trainer(tmp_path, hybrid_coef=1.0)
    inputs = trainer._generate_and_score_completions([row for row in tiny_dataset(2, 0) for _ in range(4)])
    names = "prompt_ids", "prompt_mask", "latents", "lengths"
    _, embeds = trainer._score(trainer.model, *(inputs[k] for k in names), *all_rows(8), inputs["noise"])
    terms = trainer._hybrid_terms(embeds, inputs, torch.ones(8, dtype=torch.bool))
    embed = trainer.main_model.get_input_embeddings()
    for row in range(8):
        ids = [inputs[f"{name}_ids"][row] for name in ("main_prompt", "decoded")]
        prompt, decoded = ids[0][inputs["main_prompt_mask"][row] > 0], ids[1][ids[1] != -100]
        latents = trainer.model.inject(inputs["latents"][row : row + 1])[0]
        embeds = torch.cat([embed(prompt), latents, embed(decoded)]).unsqueeze(0)
        logps = trainer.main_model(inputs_embeds=embeds).logits[0, -len(decoded) - 1 : -1].log_softmax(-1)
        mean = logps.gather(1, decoded.unsqueeze(1)).mean()
        torch.testing.assert_close(terms[row], -inputs["advantages"][row] * mean, atol=1e-5, rtol=1e-4)
        assert logps.argmax(-1).tolist() == decoded.tolist()  # greedy


def all_rows(size):
    return torch.ones(size, dtype=torch.bool), size


def test_the_hybrid_term_trains_the_up_projection(tmp_path):
    trainer = make_trainer(tmp_path, hybrid_coef=0.5, policy_kwargs={"injection": "trained"}, max_steps=4)
    before, main_before = weights(trainer.model), weights(trainer.main_model)
    trainer.train()
    assert not torch.equal(trainer.model.injector.weight, before["injector.weight"])
    assert all(torch.equal(main_before[n], tensor) for n, tensor in trainer.main_model.state_dict().items())
    assert len(history(trainer, "latent/hybrid")) == len(history(trainer, "time/hybrid")) == 4


# ---- TRL around it ----


def test_adapter_trains_saves_and_loads(tmp_path):
    main_model = random_main_model()
    peft_config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = make_policy(main_model)
    trainer = make_trainer(
        tmp_path, model=policy, main_model=main_model, beta=0.1, trainer_kwargs={"peft_config": peft_config}
    )
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)
    assert any("latent_head.modules_to_save" in name for name in moved) and any("lora_B" in name for name in moved)
    assert history(trainer, "latent/kl")[0] == 0.0 and history(trainer, "latent/kl")[-1] > 0
    assert peft_config.modules_to_save is None  # the caller's object is left alone

    trainer.save_model(tmp_path / "adapter")
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    loaded = PeftModel.from_pretrained(LatentPolicyModel.from_pretrained(base), tmp_path / "adapter").eval()
    batch = tiny_tokenizer()(["A12", "B3"], return_tensors="pt", padding=True)
    latents = torch.randn(2, 3, 4)
    ours, theirs = (
        m.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask, latents=latents).mean
        for m in (trainer.model, loaded)
    )
    torch.testing.assert_close(ours, theirs)


def test_saved_policy_is_the_trained_one_and_names_its_tokenizer(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    loaded = LatentPolicyModel.from_pretrained(tmp_path / "run")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    again = make_trainer(tmp_path, model=str(tmp_path / "run"), trainer_kwargs={"processing_class": None})
    assert again.processing_class.get_vocab() == tiny_tokenizer().get_vocab()


def test_assistant_and_main_model_may_have_different_tokenizers(tmp_path):
    vocabulary = {c: i for i, c in enumerate(["<eos>", *LETTERS, *"0123456789"][::-1])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    seen = []

    def reward(prompts, completions, completion_ids, **kwargs):
        seen.append((completions, tiny_tokenizer().batch_decode(completion_ids, skip_special_tokens=True)))
        return length_reward(completions)

    trainer = make_trainer(tmp_path, reward_funcs=reward, trainer_kwargs={"processing_class": own}, max_steps=2)
    batches, compute = [], trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: (compute(model, inputs), batches.append(inputs))[0]
    trainer.train()
    assert all(completions == decoded for completions, decoded in seen)
    prompts = own.batch_decode(batches[0]["prompt_ids"])
    assert all(prompt.replace(" ", "") in set(trainer.train_dataset["prompt"]) for prompt in prompts)


def test_conversational_prompts_are_rendered_for_each_model_by_its_own_template(tmp_path):
    own, main = tiny_tokenizer(), tiny_tokenizer()
    own.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}={% endif %}"
    main.chat_template = "H{{ messages[0]['content'] }}{% if add_generation_prompt %}G{% endif %}"
    main_model = random_main_model()
    trainer = make_trainer(
        tmp_path,
        reward_funcs=lambda completions, **kwargs: length_reward([c[0]["content"] for c in completions]),
        trainer_kwargs={"processing_class": own, "main_processing_class": main},
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "A12"}]}] * 2),
        main_model=main_model,
        max_steps=1,
    )
    seen, generate, batches, compute = [], trainer.engine.generate, [], trainer._compute_loss
    trainer.engine.generate = lambda ids, *args: (seen.append(ids), generate(ids, *args))[1]
    trainer._compute_loss = lambda model, inputs: (compute(model, inputs), batches.append(inputs))[0]
    trainer.train()
    assert seen == [[main("HA12G")["input_ids"]]]
    assert own.batch_decode(batches[0]["prompt_ids"]) == ["A 1 2 ="] * 8


def test_evaluation_logs_everything_that_training_does(tmp_path):
    trainer = make_trainer(
        tmp_path, beta=0.1, gamma=0.1, max_steps=2, trainer_kwargs={"eval_dataset": tiny_dataset(4, 1, True)}
    )
    trainer.train()
    metrics = trainer.evaluate()
    logged = set().union(*trainer.state.log_history)
    own = {"latent/kl", "latent/log_ratio_std", "latent/mean_norm", "latent/sigma", "latent/diversity"}
    own |= {"latent/contrastive", "frac_reward_mixed", "main_model/decoded_fraction", "main_model/forward_tokens"}
    own |= {"time/sample", "time/decode", "time/reward"}
    assert {"reward", "time/optimize", "skipped_steps", *own} <= logged
    assert {f"eval_{name}" for name in own} <= logged and "eval_loss" in metrics
    assert history(trainer, "main_model/decoded_fraction")[0] == 1.0


def test_any_causal_lm_by_path_becomes_the_assistant(tmp_path):
    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=32, n_layer=1, n_head=2, n_positions=64)).save_pretrained(
        tmp_path / "gpt2"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    trainer = make_trainer(
        tmp_path,
        model=str(tmp_path / "gpt2"),
        trainer_kwargs={"processing_class": None},
        injection="components",
        injection_scale=1.0,
        latent_dim=5,
        num_latents=2,
        max_steps=2,
    )
    assert trainer.model.config.assistant_config.model_type == "gpt2"
    assert (trainer.model.config.latent_dim, trainer.num_latents) == (5, 2)
    trainer.train()
    assert history(trainer, "skipped_steps") == [0.0, 0.0]


def test_streaming_datasets(tmp_path):
    trainer = make_trainer(
        tmp_path,
        train_dataset=tiny_dataset(40, 0).to_iterable_dataset(),
        exploration_check_prompts=3,
        max_steps=4,
    )
    trainer.train()
    assert trainer.state.global_step == 4


def test_checkpoints_have_a_model_card(tmp_path):
    for name, kwargs in (("full", {}), ("adapter", {"peft_config": LoraConfig(r=2, target_modules="all-linear")})):
        trainer = make_trainer(
            tmp_path / name, save_strategy="steps", save_steps=2, max_steps=2, trainer_kwargs=kwargs
        )
        trainer.train()
        card = (tmp_path / name / "run" / "README.md").read_text()
        assert "2601.17275" in card and "deeplatent-reasoning" in card
        assert "base_model" not in card  # neither policy is known outside this run


def test_logs_of_trl_work(tmp_path):
    trainer = make_trainer(
        tmp_path, log_completions=True, report_to="tensorboard", max_steps=2, num_completions_to_print=1
    )
    trainer.train()
    assert list((tmp_path / "run" / "completions").glob("*.parquet"))


def test_truncated_completions_can_be_masked(tmp_path):
    trainer = make_trainer(tmp_path, mask_truncated_completions=True, max_steps=1)
    masks, compute = [], trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: (compute(model, inputs), masks.append(inputs["completion_mask"]))[0]
    ended = iter(range(1000))
    generate = trainer.engine.generate
    trainer.engine.generate = lambda *a: [[5, 1] if next(ended) % 2 else [5] * 4 for _ in generate(*a)]
    trainer.train()
    assert masks[0].sum(1).sort().values.tolist() == [0] * 4 + [3] * 4


# ---- What goes wrong ----


def test_a_reward_function_that_raises_is_named_and_keeps_its_traceback(tmp_path):
    def picky_reward(completions, **kwargs):
        raise KeyError("gold")

    trainer = make_trainer(tmp_path, reward_funcs=[length_reward, functools.partial(picky_reward)])
    assert trainer.reward_func_names == ["length_reward", "picky_reward"]
    with pytest.raises(RuntimeError, match="'picky_reward' raised KeyError: 'gold'") as raised:
        trainer.train()
    assert raised.value.__cause__.__traceback__.tb_next.tb_frame.f_code.co_name == "picky_reward"


@pytest.mark.parametrize("bad", [float("inf"), -float("inf")])
def test_an_infinite_reward_is_refused(tmp_path, bad):
    def endless_reward(completions, **kwargs):
        return [0.0] * (len(completions) - 1) + [bad]

    with pytest.raises(ValueError, match=f"'endless_reward' returned {bad}, which leaves no mean"):
        make_trainer(tmp_path, reward_funcs=endless_reward).train()


def test_an_async_reward_function_that_raises_is_named(tmp_path):
    async def slow_reward(completions, **kwargs):
        raise OSError("no answer")

    with pytest.raises(RuntimeError, match="'slow_reward' raised OSError: no answer"):
        make_trainer(tmp_path, reward_funcs=slow_reward).train()


@pytest.mark.parametrize("scaled", [False, True])  # as with fp16
@pytest.mark.parametrize("bad", [None, float("nan")])
def test_steps_without_any_reward_are_skipped_and_training_goes_on(tmp_path, bad, scaled):
    calls = iter(range(100))

    def reward(completions, **kwargs):
        return [bad] * len(completions) if next(calls) == 1 else length_reward(completions)

    trainer = make_trainer(tmp_path, reward_funcs=reward, weight_decay=0.1, max_steps=6)
    if scaled:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    at = {}

    class Recorder(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            at[state.global_step] = weights(model)

    trainer.add_callback(Recorder())
    trainer.train()
    assert history(trainer, "skipped_steps") == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    for name in at[2]:
        assert torch.equal(at[2][name], at[4][name])
    assert any(not torch.equal(at[4][name], at[5][name]) for name in at[4])


def test_steps_with_a_loss_that_is_not_finite_are_skipped(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4)
    score, calls = trainer._get_per_token_logps_and_entropies, iter(range(100))

    def broken(model, *args, compute_entropy=False, **kwargs):
        logps, entropies, aux = score(model, *args, compute_entropy=compute_entropy, **kwargs)
        return logps * (float("nan") if compute_entropy and next(calls) == 1 else 1.0), entropies, aux

    trainer._get_per_token_logps_and_entropies = broken
    trainer.train()
    assert history(trainer, "skipped_steps") == [0.0, 1.0, 0.0, 0.0]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_too_many_skipped_steps_stop_the_run_with_a_checkpoint(tmp_path):
    seen = []

    def judge(prompts, completions, **kwargs):
        seen.append(prompts)
        return length_reward(completions) if is_there[0] else [None] * len(completions)

    is_there = [False]
    trainer = make_trainer(tmp_path, reward_funcs=judge)
    before = weights(trainer.model)
    with pytest.raises(RuntimeError, match="5 optimizer steps in a row.*reward functions return"):
        trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-5"
    saved = LatentPolicyModel.from_pretrained(checkpoint)
    assert all(torch.equal(before[name], tensor) for name, tensor in saved.state_dict().items())
    is_there[0] = True  # from the next rollout on
    resumed = make_trainer(tmp_path, reward_funcs=judge)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    straight = make_trainer(
        tmp_path, reward_funcs=lambda prompts, completions, **kw: seen.append(prompts) or [1.0] * 8
    )
    straight.train()
    assert seen[:3] + seen[3:4] == seen[4:8]  # two passes over each of four rollouts
    assert history(resumed, "skipped_steps")[4:] == [1.0, 1.0, 0.0, 0.0]


def test_one_rollout_without_rewards_does_not_end_a_run_of_many_passes(tmp_path):
    is_there = iter([True, False, True])
    trainer = make_trainer(
        tmp_path,
        reward_funcs=lambda completions, **kw: length_reward(completions) if next(is_there) else [None] * 8,
        num_iterations=6,
        max_steps=18,
    )
    trainer.train()
    assert history(trainer, "skipped_steps") == [0.0] * 6 + [1.0] * 6 + [0.0] * 6


def test_the_hybrid_term_is_of_rows_that_a_stop_string_ended(tmp_path):
    terms = []
    for masks_truncated in (False, True):
        trainer = make_trainer(
            tmp_path,
            hybrid_coef=0.1,
            max_steps=1,
            mask_truncated_completions=masks_truncated,
            generation_kwargs={"stop_strings": list(VOCABULARY)},
        )
        trainer.train()
        terms.append(history(trainer, "latent/hybrid"))
    assert terms[0] == terms[1] and terms[0][0] != 0


class _Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.mark.parametrize(("constant", "warns"), [(True, True), (False, False)])
def test_exploration_is_measured_before_training(tmp_path, constant, warns, capsys):
    reward = (lambda completions, **kw: [1.0] * len(completions)) if constant else length_reward
    kwargs = {"exploration_check_prompts": 3, "max_steps": 1, "num_generations_eval": 8}
    trainer = make_trainer(tmp_path, reward_funcs=reward, disable_tqdm=constant, **kwargs)
    trainer.model.eval()  # as it is when loaded, or after an evaluation
    records = _Records()
    logging.getLogger("trl_dlr.trainer.callbacks").addHandler(records)
    before = torch.get_rng_state()
    assert trainer.measure_exploration(3) == (0.0 if constant else 1.0)
    assert ("Exploration check" in capsys.readouterr().err) != trainer.args.disable_tqdm
    assert not trainer.model.training
    assert torch.equal(before, torch.get_rng_state())
    assert trainer.state.num_input_tokens_seen == 0
    trainer.train()
    assert any("0% of the groups" in message for message in records.messages) == warns


def test_the_exploration_check_decodes_what_a_rollout_holds_at_a_time(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, exploration_check_prompts=0)
    sizes, generate = [], trainer._generate
    monkeypatch.setattr(trainer, "_generate", lambda prompts: sizes.append(len(prompts)) or generate(prompts))
    groups = trainer._explore(7)
    per_rollout = max(trainer.args.generation_batch_size, trainer.num_generations)
    assert max(sizes) <= per_rollout and sum(sizes) == 7 * trainer.num_generations and len(sizes) > 1
    assert groups.shape == (7, trainer.num_generations)


@pytest.mark.parametrize("is_dense", [False, True])
def test_a_dense_reward_is_described_by_its_spread(is_dense, caplog):
    # What differs between questions is 100 times what differs among the answers to one
    groups = 100.0 * torch.arange(4)[:, None] + torch.arange(8) / 8
    if not is_dense:
        groups = (groups > 50.0).float() * (torch.arange(8) % 2)
    check = ExplorationCheckCallback(lambda num_prompts: groups)
    with caplog.at_level(logging.INFO, "trl_dlr"):
        check.on_train_begin(SimpleNamespace(exploration_check_prompts=4), SimpleNamespace(global_step=0), None)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert f"before training: {1.0 if is_dense else 0.75:.2f}" in said
    assert ("a standard deviation of 0.306 among the answers to a question" in said) == is_dense


def test_the_exploration_check_changes_nothing(tmp_path):
    results = []
    for prompts in (0, 3):
        trainer = make_trainer(tmp_path, exploration_check_prompts=prompts, max_steps=2)
        trainer.train()
        results.append(weights(trainer.model))
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())


def test_a_policy_is_trained_on_with_the_tokenizer_that_it_was_saved_with(tmp_path):
    # The tokenizer is the main model's, with another template, of which only the folder knows
    tokenizer, main_model = tiny_tokenizer(), random_main_model()
    tokenizer.chat_template = "{{ messages[0]['content'] }}+"
    trainer = make_trainer(tmp_path, main_model=main_model, trainer_kwargs={"processing_class": tokenizer})
    trainer.save_model(tmp_path / "saved")
    for model in (str(tmp_path / "saved"), LatentPolicyModel.from_pretrained(tmp_path / "saved")):
        kwargs = {"main_model": main_model, "model": model, "trainer_kwargs": {"processing_class": None}}
        assert make_trainer(tmp_path, **kwargs).processing_class.chat_template == tokenizer.chat_template
    # Saved without one, it is read as its assistant was made
    trainer.policy.save_pretrained(tmp_path / "bare")
    trainer = make_trainer(tmp_path, **{**kwargs, "model": str(tmp_path / "bare")})
    assert trainer.processing_class.get_vocab() == tiny_tokenizer().get_vocab()


# ---- Bad input at construction ----


def with_adapter(main_model):
    from peft import get_peft_model

    return get_peft_model(main_model, LoraConfig(target_modules=["q_proj"]))


def shared(main_model):
    policy = make_policy(main_model)
    policy.assistant.embed_tokens.weight = main_model.model.embed_tokens.weight
    return policy


BAD_INPUT = {
    "fields of a policy": (
        lambda main: {"main_model": main, "model": make_policy(main), "sigma": 2.0, "num_latents": 3},
        "`sigma=2.0` is of a new policy, but the one given as `model` has 1.0",
    ),
    "vocabulary of the assistant": (
        lambda main: {"main_model": main, "model": make_policy(main, assistant=gpt2(vocab_size=20))},
        "`processing_class` has 25 tokens, but GPT2Model has embeddings for 20",
    ),
    "vocabulary of the main model": (
        lambda main: {"main_model": random_main_model(vocab_size=20), "model": gpt2()},
        "`main_processing_class` has 25 tokens, but LlamaForCausalLM has embeddings for 20",
    ),
    "sizes": (
        lambda main: {"main_model": random_main_model(hidden_size=32), "model": make_policy(main)},
        "size 32.*size 64",
    ),
    "fingerprint": (
        lambda main: {"main_model": random_main_model(1), "model": make_policy(main)},
        "allow_main_model_mismatch",
    ),
    "same object": (lambda main: {"main_model": main, "model": main}, "same object"),
    "shared weights": (lambda main: {"main_model": main, "model": shared(main)}, "shares weights"),
    "trainable main": (
        lambda main: {"main_model": with_adapter(main), "model": make_policy(random_main_model())},
        "main_model.*merge_and_unload",
    ),
    "policy as main": (
        lambda main: {"main_model": make_policy(main), "model": make_policy(main)},
        "main_model.*LatentPolicyModel",
    ),
    "backbone as main": (
        lambda main: {"main_model": main.model, "model": make_policy(main)},
        "causal LM that can decode",
    ),
    "anchors": (
        lambda main: {"model": fresh_layers(main, 1), "main_model": main, "anchor_text": ""},
        "anchor_text.*tokenizes to nothing",
    ),
    "positions": (
        lambda main: {"max_completion_length": 60},
        "3 tokens.*num_latents=3.*60 new tokens.*64 positions",
    ),
    "positions of held-out questions": (
        lambda main: {
            "trainer_kwargs": {"eval_dataset": Dataset.from_list([{"prompt": "A" * 60}]).to_iterable_dataset()}
        },
        "60 tokens.*num_latents=3.*64 positions",
    ),
    "assistant's positions": (
        lambda main: {"main_model": main, "model": make_policy(main, assistant=gpt2(n_positions=4))},
        "prompt of 3 tokens and `num_latents=3` together exceed the assistant's 4 positions",
    ),
    "optimizer": (
        lambda main: {
            "main_model": main,
            "trainer_kwargs": {"optimizers": (torch.optim.SGD(main.parameters(), 0.1), None)},
        },
        "optimizers.*main_model",
    ),
    "quantization": (
        lambda main: {"trainer_kwargs": {"quantization_config": object()}},
        "quantization_config.*loaded by name.*LlamaForCausalLM",
    ),
    "tools": (lambda main: {"trainer_kwargs": {"tools": [print]}}, "tools.*no meaning"),
    "rollout_func": (lambda main: {"trainer_kwargs": {"rollout_func": print}}, "rollout_func.*no meaning"),
    "environment": (lambda main: {"trainer_kwargs": {"environment_factory": dict}}, "environment_factory.*no meaning"),
    "entropy of a constant": (lambda main: {"entropy_coef": 0.1}, "entropy_coef=0.1.*fixed σ is a constant"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, case):
    arguments, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **arguments(random_main_model()))
    assert not (tmp_path / "run").exists()


def test_unfit_datasets_and_foreign_configurations_are_refused(tmp_path):
    main_model = random_main_model()
    common = {"model": make_policy(main_model), "main_model": main_model, "reward_funcs": length_reward}
    args = LatentGRPOConfig(str(tmp_path / "run"), bf16=False)
    with pytest.raises(ValueError, match="train_dataset.*'image'"):
        LatentGRPOTrainer(
            **common, args=args, train_dataset=Dataset.from_dict({"prompt": ["A12"], "image": ["x.png"]})
        )
    with pytest.raises(ValueError, match="args.*LatentGRPOConfig.*GRPOConfig"):
        LatentGRPOTrainer(**common, args=GRPOConfig(str(tmp_path), bf16=False), train_dataset=tiny_dataset(4, 0))
    tokenizers = {"processing_class": tiny_tokenizer(), "main_processing_class": tiny_tokenizer()}
    chat = Dataset.from_list([{"prompt": [{"role": "user", "content": "A12"}]}] * 4)
    with pytest.raises(ValueError, match="processing_class.*no chat template.*conversational"):
        LatentGRPOTrainer(**common, **tokenizers, args=args, train_dataset=chat)
    with pytest.raises(ValueError, match="main_processing_class.*must be given"):
        LatentGRPOTrainer(**common, args=args, train_dataset=tiny_dataset(4, 0))


def test_a_mismatched_main_model_may_be_allowed(tmp_path):
    with pytest.warns(UserWarning, match="fingerprint"):
        trainer = make_trainer(
            tmp_path,
            model=make_policy(random_main_model(0)),
            main_model=random_main_model(1),
            allow_main_model_mismatch=True,
            max_steps=1,
        )
    trainer.train()


def test_quantization_applies_to_the_main_model_that_is_loaded_by_name(tmp_path, monkeypatch):
    random_main_model().save_pretrained(tmp_path / "main")
    tiny_tokenizer().save_pretrained(tmp_path / "main")
    given = {}
    from trl_dlr.trainer import policy_training

    load = policy_training.AutoModelForCausalLM.from_pretrained

    def recording(name, quantization_config=None, **kwargs):
        given.update(name=name, quantization_config=quantization_config, **kwargs)
        return load(name, **kwargs)

    monkeypatch.setattr(policy_training.AutoModelForCausalLM, "from_pretrained", recording)
    marker = object()
    trainer = make_trainer(
        tmp_path,
        main_model=str(tmp_path / "main"),
        model=make_policy(random_main_model()),
        max_steps=1,
        main_model_init_kwargs={"dtype": "bfloat16"},
        trainer_kwargs={"quantization_config": marker},
    )
    assert given["quantization_config"] is marker and trainer.main_model.dtype == torch.bfloat16
    trainer.train()

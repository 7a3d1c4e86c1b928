# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import json

import pytest
import torch
from torch.distributions import Normal
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    OPTConfig,
    PersimmonConfig,
)

from tests.tiny import random_main_model, tiny_tokenizer
from trl_dlr import LatentPolicyConfig, LatentPolicyModel, first_layers, fresh_layers
from trl_dlr.models import DiagonalGaussian
from trl_dlr.models.main_model import disable_dropout


def make_policy(assistant=None, **kwargs):
    main_model = random_main_model()
    assistant = fresh_layers(main_model, 1) if assistant is None else assistant
    return LatentPolicyModel.from_assistant(
        assistant, main_model, tiny_tokenizer(), **{"latent_dim": 6, **kwargs}
    ).eval()


def absolute_position_assistant():
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=32, n_layer=2, n_head=2, n_positions=64))


def questions():
    return tiny_tokenizer()(["A12", "B1", "C123456"], return_tensors="pt", padding=True)


@pytest.mark.parametrize("assistant", [None, "absolute"])
@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_sampling_equals_the_teacher_forced_densities(sampling, assistant):
    policy = make_policy(absolute_position_assistant() if assistant else None, latent_sampling=sampling)
    batch = questions()
    num_samples = torch.tensor([2, 1, 3])
    rollout = policy.sample(batch.input_ids, batch.attention_mask, num_samples)
    rows = torch.arange(3).repeat_interleave(num_samples)
    scored = policy(batch.input_ids[rows], batch.attention_mask[rows], rollout.latents)
    assert rollout.latents.shape == (6, 4, 6)
    torch.testing.assert_close(rollout.mean, scored.mean, atol=1e-5, rtol=1e-5)
    greedy = policy.sample(batch.input_ids, batch.attention_mask, deterministic=True).latents
    torch.testing.assert_close(
        greedy, policy(batch.input_ids, batch.attention_mask, greedy).mean, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("assistant", [None, "absolute"])
@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_a_row_in_a_padded_batch_equals_the_row_alone(sampling, assistant):
    policy = make_policy(absolute_position_assistant() if assistant else None, latent_sampling=sampling)
    batch = questions()
    latents = torch.randn(3, 4, 6)
    together = policy(batch.input_ids, batch.attention_mask, latents).mean
    sampled = policy.sample(batch.input_ids, batch.attention_mask, deterministic=True).latents
    for row, text in enumerate(["A12", "B1", "C123456"]):
        alone = tiny_tokenizer()(text, return_tensors="pt")
        mean = policy(alone.input_ids, alone.attention_mask, latents[row : row + 1]).mean[0]
        torch.testing.assert_close(mean, together[row], atol=1e-5, rtol=1e-5)
        own = policy.sample(alone.input_ids, alone.attention_mask, deterministic=True).latents[0]
        torch.testing.assert_close(own, sampled[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("assistant", [None, "absolute"])
def test_sharing_a_question_between_rows_changes_neither_densities_nor_gradients(assistant):
    policy = make_policy(absolute_position_assistant() if assistant else None).train()
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch, rows = questions(), torch.tensor([0, 1, 0, 2, 1])
    latents = torch.randn(5, 4, 6)
    results = []
    for checkpointing in (False, True):  # under checkpointing every row reads its question itself
        policy.zero_grad()
        policy.gradient_checkpointing_enable() if checkpointing else policy.gradient_checkpointing_disable()
        mean = policy(batch.input_ids[rows], batch.attention_mask[rows], latents).mean
        (mean * torch.linspace(-1, 1, mean.numel()).view_as(mean)).sum().backward()
        results.append((mean, {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*(mean for mean, _ in results), atol=1e-5, rtol=1e-5)
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=2e-5, rtol=1e-4)


def test_a_later_latent_depends_on_the_ones_before_it_only():
    policy = make_policy()
    batch = questions()
    latents = torch.randn(3, 4, 6)
    changed = latents.clone()
    changed[:, 1] += 1
    before, after = (policy(batch.input_ids, batch.attention_mask, z).mean for z in (latents, changed))
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2:], after[:, 2:])


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_sigma_of_a_state_begins_as_given_and_moves_with_the_state(sampling):
    policy, batch, latents = (
        make_policy(latent_sampling=sampling, sigma=0.5, state_sigma=True),
        questions(),
        torch.randn(3, 4, 6),
    )
    plain = make_policy(latent_sampling=sampling, sigma=0.5)
    plain.load_state_dict(policy.state_dict(), strict=False)
    before = [each(batch.input_ids, batch.attention_mask, latents).density for each in (policy, plain)]
    assert torch.equal(before[0].log_prob(latents), before[1].log_prob(latents))
    torch.nn.init.normal_(policy.latent_head.log_std_shift.weight, std=0.1)
    density = policy(batch.input_ids, batch.attention_mask, latents).density
    assert density.log_std.shape == density.mean.shape and density.log_std.std(dim=0).min() > 0
    torch.testing.assert_close(
        density.log_prob(latents), Normal(density.mean, density.log_std.exp()).log_prob(latents).sum(-1)
    )
    for row in range(3):  # a row alone is the row of a batch
        alone = policy(
            batch.input_ids[row : row + 1], batch.attention_mask[row : row + 1], latents[row : row + 1]
        ).density
        torch.testing.assert_close(alone.log_std, density.log_std[row : row + 1])


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
@pytest.mark.parametrize("injection", ["anchors", "components", "trained"])
@pytest.mark.parametrize("sigma", ["learn_sigma", "state_sigma"])
def test_save_and_load_give_identical_outputs(tmp_path, sampling, injection, sigma):
    policy = make_policy(
        latent_sampling=sampling,
        injection=injection,
        sigma=0.7,
        freeze_embeddings=True,
        learn_stop=True,
        **{sigma: True},
    )
    torch.nn.init.normal_(policy.stop_head.weight)
    if sigma == "state_sigma":
        torch.nn.init.normal_(policy.latent_head.log_std_shift.weight, std=0.1)
    policy.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    for loaded in (LatentPolicyModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        loaded.eval()
        batch, latents = questions(), torch.randn(3, 4, 6)
        ours, theirs = (each(batch.input_ids, batch.attention_mask, latents) for each in (policy, loaded))
        assert torch.equal(ours.mean, theirs.mean) and torch.equal(ours.question_states, theirs.question_states)
        assert torch.equal(ours.density.log_prob(latents), theirs.density.log_prob(latents))
        assert torch.equal(policy.inject(latents), loaded.inject(latents))
        assert not loaded.get_input_embeddings().weight.requires_grad
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LatentPolicyConfig)
    assert config.main_model_fingerprint == policy.config.main_model_fingerprint is not None
    assert config.main_hidden_size == 64


def test_assistant_by_path_and_from_the_main_models_first_layers(tmp_path):
    main_model = random_main_model()
    first = first_layers(main_model, 1)
    assert torch.equal(first.layers[0].mlp.up_proj.weight, main_model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(fresh_layers(main_model, 1).embed_tokens.weight, main_model.model.embed_tokens.weight)
    absolute_position_assistant().save_pretrained(tmp_path)
    policy = make_policy(str(tmp_path))
    assert policy.config.hidden_size == 32 and policy.injector.anchors.size(1) == 64
    source = AutoModelForCausalLM.from_pretrained(tmp_path).transformer
    assert torch.equal(policy.assistant.h[0].attn.c_attn.weight, source.h[0].attn.c_attn.weight)


def test_policy_shares_no_memory_with_its_sources():
    main_model = random_main_model()
    assistant = first_layers(main_model, 1)
    policy = LatentPolicyModel.from_assistant(assistant, main_model, tiny_tokenizer())
    sources = {p.data_ptr() for model in (main_model, assistant) for p in model.parameters()}
    assert not sources & {p.data_ptr() for p in policy.parameters()}


# ---- Learned stop ----


def make_stopping_policy(assistant=None, **kwargs):
    kwargs = {"learn_stop": True, "num_latents": 5, "min_latents": 2, "initial_stop_prob": 0.4, **kwargs}
    policy = make_policy(absolute_position_assistant() if assistant else None, **kwargs)
    torch.nn.init.normal_(policy.stop_head.weight, std=0.1)  # so that decisions depend on the state
    return policy


@pytest.mark.parametrize("assistant", [None, "absolute"])
@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_sampled_decisions_equal_the_teacher_forced_ones(sampling, assistant):
    policy = make_stopping_policy(assistant, latent_sampling=sampling)
    batch, num_samples = questions(), torch.tensor([12, 9, 14])
    rollout = policy.sample(batch.input_ids, batch.attention_mask, num_samples)
    assert set(rollout.lengths.tolist()) == {2, 3, 4, 5}
    is_missing = torch.arange(5) >= rollout.lengths.unsqueeze(1)
    assert (rollout.latents[is_missing] == 0).all() and (rollout.latents[~is_missing] != 0).all()
    rows = torch.arange(3).repeat_interleave(num_samples)
    inputs = batch.input_ids[rows], batch.attention_mask[rows]
    scored = policy(*inputs, rollout.latents, lengths=rollout.lengths)
    log_probs = rollout.density.log_prob(rollout.latents)
    torch.testing.assert_close(scored.density.log_prob(rollout.latents), log_probs, atol=1e-5, rtol=1e-5)
    assert (log_probs[is_missing] == 0).all()
    # What stands after the stop has no effect
    other = rollout.latents.masked_fill(is_missing.unsqueeze(-1), 7.0)
    again = policy(*inputs, other, lengths=rollout.lengths).density
    assert torch.equal(again.log_prob(other), scored.density.log_prob(rollout.latents))
    for row, length in enumerate(rollout.lengths.tolist()):
        text = ["A12", "B1", "C123456"][rows[row]]
        alone = tiny_tokenizer()(text, return_tensors="pt")
        own = policy(
            alone.input_ids,
            alone.attention_mask,
            rollout.latents[row : row + 1],
            lengths=rollout.lengths[row : row + 1],
        ).density.log_prob(rollout.latents[row : row + 1])
        torch.testing.assert_close(own[0, :length], log_probs[row, :length], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_trajectories_stop_as_often_as_their_probabilities_say(sampling):
    policy = make_stopping_policy(latent_sampling=sampling, num_latents=4, initial_stop_prob=0.3)
    torch.nn.init.zeros_(policy.stop_head.weight)
    batch = questions()
    lengths = policy.sample(batch.input_ids[:1], batch.attention_mask[:1], 20_000).lengths
    shares = lengths.bincount(minlength=5) / len(lengths)
    torch.testing.assert_close(shares, torch.tensor([0, 0, 0.3, 0.21, 0.49]), atol=0.015, rtol=0)


def test_a_deterministic_trajectory_stops_where_that_is_likelier_than_not():
    policy = make_stopping_policy(initial_stop_prob=0.5)
    batch = questions()
    torch.nn.init.normal_(policy.stop_head.weight, std=1.0)
    greedy = policy.sample(batch.input_ids, batch.attention_mask, deterministic=True)
    for logits, length in zip(greedy.stop_logits, greedy.lengths.tolist(), strict=True):
        assert logits[length - 1] > 0 and (logits[: length - 1] <= 0).all()
    for bias, length in ((-0.1, 5), (0.1, 2)):
        torch.nn.init.zeros_(policy.stop_head.weight)
        torch.nn.init.constant_(policy.stop_head.bias, bias)
        greedy = policy.sample(batch.input_ids, batch.attention_mask, deterministic=True)
        assert greedy.lengths.tolist() == [length] * 3 and greedy.latents.shape == (3, 5, 6)


def test_sampling_ends_when_every_trajectory_has():
    policy = make_stopping_policy(initial_stop_prob=1 - 1e-6)
    torch.nn.init.zeros_(policy.stop_head.weight)
    batch, passes = questions(), []
    policy.latent_head.register_forward_hook(lambda *_: passes.append(1))
    assert policy.sample(batch.input_ids, batch.attention_mask, 4).lengths.tolist() == [2] * 12
    assert len(passes) == 2


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_latents_drawn_with_given_noise_do_not_stop(sampling):
    policy, batch = make_stopping_policy(latent_sampling=sampling, initial_stop_prob=0.99), questions()
    drawn = policy(batch.input_ids, batch.attention_mask, noise=torch.randn(3, 4, 6))
    assert drawn.lengths.tolist() == [4] * 3 and drawn.stop_logits is None
    assert isinstance(drawn.density, DiagonalGaussian)


def test_a_stop_takes_nothing_from_the_latents_random_numbers():
    batch, latents = questions(), []
    for kwargs in ({}, {"learn_stop": False, "min_latents": 1}):
        policy = make_stopping_policy(**kwargs) if not kwargs else make_policy(num_latents=5, **kwargs)
        policy.load_state_dict(make_policy(num_latents=5).state_dict(), strict=False)
        torch.manual_seed(3)
        latents.append(policy.sample(batch.input_ids, batch.attention_mask, 4))
    is_taken = torch.arange(5) < latents[0].lengths.unsqueeze(1)
    assert latents[1].lengths.tolist() == [5] * 12
    assert torch.equal(latents[0].latents[is_taken], latents[1].latents[is_taken])


def test_untrained_means_are_small_against_sigma():
    policy = make_policy(latent_dim=16)
    batch = questions()
    mean = policy(batch.input_ids, batch.attention_mask, torch.randn(3, 4, 16)).mean
    assert mean.square().mean().sqrt() < 0.5


def test_a_policy_of_another_main_model_is_refused_unless_allowed():
    policy = make_policy()
    policy.check_main_model(random_main_model(seed=0))
    policy.check_main_model(random_main_model(seed=0).bfloat16())
    with pytest.raises(ValueError, match="allow_main_model_mismatch"):
        policy.check_main_model(random_main_model(seed=1))
    with pytest.warns(UserWarning, match="fingerprint"):
        policy.check_main_model(random_main_model(seed=1), allow_mismatch=True)
    with pytest.raises(ValueError, match="size 32.*size 64"):
        policy.check_main_model(random_main_model(hidden_size=32))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"latent_dim": 0}, "latent_dim.*at least 1.*0"),
        ({"num_latents": 0}, "num_latents.*at least 1.*0"),
        ({"learn_stop": True, "min_latents": 0}, "min_latents.*at least 1.*0"),
        ({"learn_stop": True, "min_latents": 4}, "min_latents=4.*below `num_latents=4`"),
        ({"learn_stop": True, "initial_stop_prob": 1.0}, "initial_stop_prob.*between 0 and 1.*1.0"),
        ({"min_latents": 2}, "min_latents=2.*learn_stop=True"),
        ({"sigma": 0.0}, "sigma.*positive.*0"),
        ({"injection_scale": float("nan")}, "injection_scale.*positive.*nan"),
        ({"latent_sampling": "sideways"}, "latent_sampling.*autoregressive, parallel.*sideways"),
        ({"injection": "magic"}, "injection.*anchors, components, trained.*magic"),
        ({"anchor_text": None}, "`anchor_text` must be a text, got None"),
        (
            {"density": "gaussian", "latent_density": "soft_tokens"},
            "`density='gaussian'` is the former name of `latent_d",
        ),
    ],
)
def test_bad_configuration(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LatentPolicyConfig(**kwargs)


@pytest.mark.parametrize("name", ["latnet_dim", "sampling"])
def test_fields_that_there_are_not(name):
    main_model = random_main_model()
    with pytest.raises(ValueError, match=f"`LatentPolicyConfig` has no field {name}"):
        LatentPolicyModel.from_assistant(main_model, main_model, tiny_tokenizer(), **{name: 3})


@pytest.mark.parametrize("num_layers", [0, 3])
def test_more_layers_than_the_main_model_has(num_layers):
    with pytest.raises(ValueError, match=f"num_layers.*between 1 and.*2.*{num_layers}"):
        first_layers(random_main_model(), num_layers)


SMALL = {
    "vocab_size": 30,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=30, n_embd=32, n_layer=2, n_head=2, attn_pdrop=0.5),  # modules
        OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=32, attention_dropout=0.5, layerdrop=0.5),  # numbers
        PersimmonConfig(**SMALL, attention_dropout=0.5),  # read from the configuration in each pass
        MixtralConfig(**SMALL, num_key_value_heads=2, router_jitter_noise=0.5),
    ],
    ids=lambda config: config.model_type,
)
def test_without_dropout_training_mode_is_as_certain_as_evaluation(config):
    torch.manual_seed(0)
    model, ids = AutoModel.from_config(config).train(), torch.randint(3, 30, (2, 8))
    before = model.config.to_dict()
    assert not torch.equal(*(model(ids).last_hidden_state for _ in range(2)))
    disable_dropout(model)
    assert torch.equal(*(model(ids).last_hidden_state for _ in range(2)))
    assert model.config.to_dict() == before


def test_policies_of_version_0_1_0_load_unless_they_have_what_is_gone(tmp_path):
    policy = make_policy()
    policy.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    names = {"latent_sampling": "sampling", "latent_density": "density"}  # as version 0.1.0 wrote them
    config = {names.get(name, name): value for name, value in config.items()}
    path.write_text(json.dumps({**config, "normalize_mean": False}))
    loaded = LatentPolicyModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in policy.state_dict().items())
    path.write_text(json.dumps({**config, "normalize_mean": True}))
    with pytest.raises(ValueError, match="`normalize_mean=True` is an option of version 0.1.0"):
        LatentPolicyModel.from_pretrained(tmp_path)

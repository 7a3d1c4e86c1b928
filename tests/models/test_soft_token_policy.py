# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Categorical, RelaxedOneHotCategorical, kl_divergence
from transformers import AutoModel

from tests.models.test_latent_policy import absolute_position_assistant, questions
from tests.tiny import VOCABULARY, random_main_model, tiny_tokenizer
from trl_dlr import LatentPolicyConfig, LatentPolicyModel, LatentReasoner, first_layers, fresh_layers
from trl_dlr.generation import TransformersEngine
from trl_dlr.models import SoftTokens
from trl_dlr.models.soft_tokens import SOFT_TOKEN_SCORES


SIZE = len(VOCABULARY)
SURROGATE = {"soft_token_score": "latent_grpo", "one_sided_noise": True}


def make_policy(assistant=None, **kwargs):
    main_model = random_main_model()
    assistant = fresh_layers(main_model, 1) if assistant is None else assistant
    kwargs = {"latent_density": "soft_tokens", "soft_token_score": "exact", "num_latents": 3, **kwargs}
    policy = LatentPolicyModel.from_assistant(assistant, main_model, tiny_tokenizer(), **kwargs).eval()
    torch.nn.init.normal_(policy.latent_head.weight, std=2.0)  # distributions that differ between questions
    return policy


# ---- The density ----


def test_the_exact_score_is_torchs_density_in_value_and_gradient():
    logits = torch.randn(2, 3, 6, requires_grad=True)
    density = SoftTokens(logits.log_softmax(-1), 1.5)
    latents = density.rsample().detach()
    theirs = RelaxedOneHotCategorical(torch.tensor(1.5), logits=logits).log_prob((latents / 1.5).softmax(-1))
    ours = density.log_prob(latents)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    (gradient,), (expected,) = (torch.autograd.grad(value.sum(), logits) for value in (ours, theirs))
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def test_the_exact_scores_gradient_has_mean_zero_and_gives_the_gradient_of_an_expectation():
    # REINFORCE: the mean of f times the score's gradient is the gradient of the mean of f, here f = the first weight
    logits = torch.tensor([0.5, -0.3, 0.1], requires_grad=True)
    noise = SoftTokens(torch.zeros(400_000, 1, 3)).rsample()

    def value():
        return (SoftTokens(logits.log_softmax(-1).expand(400_000, 1, 3)).rsample(noise) / 1.0).softmax(-1)[..., 0]

    (expected,) = torch.autograd.grad(value().mean(), logits)
    density = SoftTokens(logits.log_softmax(-1).expand(400_000, 1, 3))
    latents = density.rsample(noise).detach()
    (scores,) = torch.autograd.grad(density.log_prob(latents).mean(), logits, retain_graph=True)
    (found,) = torch.autograd.grad((density.log_prob(latents) * value().detach()).mean(), logits)
    torch.testing.assert_close(scores, torch.zeros(3), atol=0.01, rtol=0)
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_entropy_and_kl_are_those_of_the_tokens():
    first, second = torch.randn(2, 2, 3, 6).log_softmax(-1)
    density, other = SoftTokens(first), SoftTokens(second)
    torch.testing.assert_close(density.entropy(), Categorical(logits=first).entropy())
    torch.testing.assert_close(density.kl(other), kl_divergence(Categorical(logits=first), Categorical(logits=second)))
    assert torch.equal(density.kl(density), torch.zeros(2, 3))


def test_the_kl_is_a_lower_bound_of_the_mixtures():
    first, second = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]]).log()
    density, other = (SoftTokens(log_probs.expand(200_000, 1, 3), 0.7) for log_probs in (first, second))
    latents = density.rsample()
    of_mixtures = (density.log_prob(latents) - other.log_prob(latents)).mean()
    assert 0 < density.kl(other)[0, 0] < of_mixtures


@pytest.mark.parametrize("score", SOFT_TOKEN_SCORES)
def test_noise_of_inverts_rsample_and_cut_tokens_are_no_hazard(score):
    density = SoftTokens(torch.randn(2, 3, 6).log_softmax(-1).requires_grad_(), 0.5, SOFT_TOKEN_SCORES[score])
    noise = torch.randn(2, 3, 6)
    if score != "exact":
        noise[..., 2] = -torch.inf
    latents = density.rsample(noise)
    torch.testing.assert_close(density.noise_of(latents), noise)
    (gradient,) = torch.autograd.grad(density.log_prob(latents.detach()).sum(), density.log_probs)
    assert gradient.isfinite().all()
    if score != "exact":
        assert torch.equal(gradient[..., 2], torch.zeros(2, 3))


# ---- The policy ----


@pytest.mark.parametrize("assistant", [None, "absolute"])
@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
@pytest.mark.parametrize("kwargs", [{}, SURROGATE, {**SURROGATE, "latent_top_p": 0.9, "mixture_size": 4}])
def test_sampling_equals_the_teacher_forced_scores(sampling, assistant, kwargs):
    policy = make_policy(absolute_position_assistant() if assistant else None, latent_sampling=sampling, **kwargs)
    batch, num_samples = questions(), torch.tensor([2, 1, 3])
    rollout = policy.sample(batch.input_ids, batch.attention_mask, num_samples)
    rows = torch.arange(3).repeat_interleave(num_samples)
    scored = policy(batch.input_ids[rows], batch.attention_mask[rows], rollout.latents)
    assert rollout.latents.shape == (6, 3, SIZE)
    torch.testing.assert_close(rollout.mean, scored.mean, atol=1e-4, rtol=1e-4)
    own = rollout.density.log_prob(rollout.latents)
    torch.testing.assert_close(own, scored.density.log_prob(rollout.latents), atol=1e-3, rtol=1e-3)
    assert torch.equal((own - rollout.density.log_prob(rollout.latents)).exp(), torch.ones(6, 3))


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_a_row_in_a_padded_batch_equals_the_row_alone(sampling):
    policy, batch = make_policy(latent_sampling=sampling), questions()
    latents = policy.sample(batch.input_ids, batch.attention_mask).latents
    together = policy(batch.input_ids, batch.attention_mask, latents)
    greedy = policy.sample(batch.input_ids, batch.attention_mask, deterministic=True).latents
    for row, text in enumerate(["A12", "B1", "C123456"]):
        alone = tiny_tokenizer()(text, return_tensors="pt")
        found = policy(alone.input_ids, alone.attention_mask, latents[row : row + 1])
        torch.testing.assert_close(found.mean[0], together.mean[row], atol=1e-4, rtol=1e-4)
        own = policy.sample(alone.input_ids, alone.attention_mask, deterministic=True).latents[0]
        torch.testing.assert_close(own, greedy[row], atol=1e-4, rtol=1e-4)


def test_injected_embeddings_are_mixtures_of_the_main_models():
    policy, table = make_policy(soft_token_temperature=0.5), random_main_model().get_input_embeddings().weight
    latents = torch.randn(2, 3, SIZE)
    latents[..., 4] = -torch.inf
    torch.testing.assert_close(policy.inject(latents), (latents / 0.5).softmax(-1) @ table)
    one = torch.full((1, 1, SIZE), -torch.inf)
    one[..., 7] = 0.3
    torch.testing.assert_close(policy.inject(one)[0, 0], table[7])


def test_an_assistant_of_all_the_main_models_layers_starts_with_what_the_main_model_says_next():
    main_model = random_main_model()
    kwargs = {"latent_density": "soft_tokens", "num_latents": 2, "soft_token_temperature": 0.1}
    policy = LatentPolicyModel.from_assistant(first_layers(main_model, 2), main_model, tiny_tokenizer(), **kwargs)
    batch = tiny_tokenizer()(["A12"], return_tensors="pt")
    latents = policy.sample(batch.input_ids, batch.attention_mask).latents
    prompt = main_model.get_input_embeddings()(batch.input_ids)
    embeds = torch.cat([prompt, policy.inject(latents)[:, :1]], dim=1)
    expected = main_model(inputs_embeds=embeds).logits[:, -2:].log_softmax(-1)
    torch.testing.assert_close(policy(**batch, latents=latents).density.log_probs, expected, atol=1e-5, rtol=1e-5)


def test_candidates_and_mixtures_are_cut_as_asked():
    batch = questions()
    for kwargs, number in (
        ({"latent_top_k": 5}, 5),
        ({"mixture_size": 3}, 3),
        ({"latent_top_k": 6, "mixture_size": 2}, 2),
    ):
        policy = make_policy(soft_token_score="lepo", **kwargs)
        rollout = policy.sample(batch.input_ids, batch.attention_mask, 4)
        assert (rollout.latents.isfinite().sum(-1) == number).all()
    one_sided = make_policy(**SURROGATE).sample(batch.input_ids, batch.attention_mask, 4)
    noise = one_sided.density.noise_of(one_sided.latents)
    assert noise.min() > -1e-5 and noise.max() < 4.5 + 1e-5


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_save_and_load(tmp_path, sampling):
    policy, batch = make_policy(latent_sampling=sampling, **SURROGATE), questions()
    latents = policy.sample(batch.input_ids, batch.attention_mask).latents
    policy.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert not any("embeddings" in name and "assistant" not in name for name in saved)  # those of the main model
    assert json.loads((tmp_path / "config.json").read_text())["latent_density"] == "soft_tokens"
    for loaded in (LatentPolicyModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        loaded.eval()
        with pytest.raises(ValueError, match="attach_main_model"):
            loaded.sample(batch.input_ids, batch.attention_mask)
        loaded.attach_main_model(random_main_model())
        ours, theirs = (each(batch.input_ids, batch.attention_mask, latents) for each in (policy, loaded))
        assert torch.equal(ours.density.log_prob(latents), theirs.density.log_prob(latents))
        assert torch.equal(policy.inject(latents), loaded.inject(latents))


def test_another_main_model_is_refused(tmp_path):
    policy = make_policy()
    with pytest.raises(ValueError, match="fingerprint"):
        policy.attach_main_model(random_main_model(seed=1))
    with pytest.raises(ValueError, match="has 30 tokens, but the policy mixes 25"):
        policy.attach_main_model(random_main_model(vocab_size=30))


def test_a_reasoner_answers_and_is_the_same_after_loading(tmp_path):
    main_model, tokenizer = random_main_model(), tiny_tokenizer()
    reasoner = LatentReasoner(make_policy(), tokenizer, TransformersEngine(main_model, tokenizer, 4), tokenizer)
    reasoner.save_pretrained(tmp_path)
    loaded = LatentReasoner.from_pretrained(
        str(tmp_path), main_model=main_model, main_processing_class=tokenizer, max_new_tokens=4, device="cpu"
    )
    for kwargs in ({}, {"num_samples": 3, "seed": 1}):
        ours, theirs = (each.generate(["A12", "B1"], **kwargs) for each in (reasoner, loaded))
        assert ours.candidates == theirs.candidates and torch.equal(ours.latents, theirs.latents)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"soft_token_temperature": 0.0}, "`soft_token_temperature` must be a positive number, got 0.0"),
        ({"soft_token_score": "best"}, "`soft_token_score` must be one of exact, lepo, latent_grpo, got 'best'"),
        (
            {"latent_top_k": 5},
            "'exact'.*`latent_top_k` and `mixture_size` must be unset.*with tokens cut off it is none",
        ),
        ({"latent_top_p": 0.9}, "'exact'.*`latent_top_p` 1.0"),
        ({"mixture_size": 4}, "'exact'.*`mixture_size` must be unset"),
        ({"latent_top_p": 0.0}, "`latent_top_p` must be above 0 and at most 1, got 0.0"),
        ({"latent_top_k": 0}, "`latent_top_k` must be at least 1 or unset, got 0"),
        ({"one_sided_noise": True}, "`one_sided_noise=True` is for `soft_token_score='latent_grpo'`.*got 'exact'"),
        ({"sigma": 0.5}, "`sigma=0.5` belongs to `latent_density='gaussian'`.*`latent_density='soft_tokens'`"),
        (
            {"latent_density": "gaussian", "one_sided_noise": True},
            "`one_sided_noise=True` is for soft tokens alone.*direction",
        ),
        (
            {"latent_density": "gaussian", "latent_top_k": 3},
            "`latent_top_k=3` belongs to `latent_density='soft_tokens'`",
        ),
        ({"latent_density": "cauchy"}, "`latent_density` must be one of gaussian, soft_tokens, got 'cauchy'"),
        (
            {"soft_token_score": "lepo", "latent_top_k": 3, "mixture_size": 4},
            "`mixture_size=4` must be at most `latent_top_k=3`",
        ),
    ],
)
def test_bad_configuration(kwargs, message):
    with pytest.raises(ValueError, match=message):
        exact = {} if "latent_density" in kwargs else {"latent_density": "soft_tokens", "soft_token_score": "exact"}
        LatentPolicyConfig(**{**exact, **kwargs})


@pytest.mark.parametrize("name", ["latent_top_k", "mixture_size"])
def test_more_candidates_than_tokens(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at most the main model's {SIZE} tokens, got 99"):
        make_policy(soft_token_score="lepo", **{name: 99})

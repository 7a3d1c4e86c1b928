# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import math

import pytest
import torch
from torch.distributions import Gumbel, RelaxedOneHotCategorical
from transformers import TopKLogitsWarper, TopPLogitsWarper

from trl_dlr.models.soft_tokens import (
    CLAMPED_GUMBEL,
    gumbel_noise,
    gumbel_softmax,
    gumbel_softmax_log_prob,
    keep_candidates,
    latent_grpo_score,
    lepo_score,
)


CPU = torch.device("cpu")


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_the_exact_density_matches_torch_in_value_and_gradient(temperature):
    logits = torch.randn(3, 4, 6, requires_grad=True)
    weights = gumbel_softmax(logits.detach().log_softmax(-1), gumbel_noise((3, 4, 6), CPU), max(temperature, 1.0))
    ours = gumbel_softmax_log_prob(weights.log(), logits.log_softmax(-1), temperature)
    theirs = RelaxedOneHotCategorical(torch.tensor(temperature), logits=logits).log_prob(weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    (gradient,), (expected,) = (torch.autograd.grad(value.sum(), logits) for value in (ours, theirs))
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.8])
def test_the_exact_density_integrates_to_one(temperature):
    # On the simplex of two candidates, a line; in the logit u of w, where dw = w (1 - w) du
    u = torch.linspace(-60, 60, 60_001)
    log_weights = torch.stack([torch.nn.functional.logsigmoid(u), torch.nn.functional.logsigmoid(-u)], -1)
    log_probs = torch.tensor([0.2, 0.8]).log().expand_as(log_weights)
    density = gumbel_softmax_log_prob(log_weights, log_probs, temperature) + log_weights.sum(-1)
    assert torch.trapezoid(density.double().exp(), u.double()).item() == pytest.approx(1, abs=1e-4)


def test_the_exact_density_is_that_of_the_samples():
    # Share of samples with w_1 > 0.5, which is π_1 whatever the temperature, and the density's integral over them
    log_probs = torch.tensor([0.3, 0.7]).log()
    weights = gumbel_softmax(log_probs, gumbel_noise((200_000, 2), CPU), 1.5)
    assert (weights[:, 0] > 0.5).float().mean().item() == pytest.approx(0.3, abs=0.005)
    u = torch.linspace(0, 60, 60_001)
    log_weights = torch.stack([torch.nn.functional.logsigmoid(u), torch.nn.functional.logsigmoid(-u)], -1)
    density = gumbel_softmax_log_prob(log_weights, log_probs.expand_as(log_weights), 1.5) + log_weights.sum(-1)
    assert torch.trapezoid(density.double().exp(), u.double()).item() == pytest.approx(0.3, abs=1e-4)


def test_noise_has_gumbels_distribution_and_its_one_sided_form_is_clamped_and_shifted():
    noise = gumbel_noise((200_000,), CPU)
    for point in (-1.0, 0.0, 2.0):
        expected = Gumbel(0.0, 1.0).cdf(torch.tensor(point)).item()
        assert (noise < point).float().mean().item() == pytest.approx(expected, abs=0.005)
    one_sided = gumbel_noise((200_000,), CPU, is_one_sided=True)
    assert one_sided.min() == 0 and one_sided.max() == 4.5
    # The share below -1.5, which is clamped
    assert (one_sided == 0).float().mean().item() == pytest.approx(math.exp(-math.exp(1.5)), abs=0.003)


def test_lepos_score_by_hand_and_its_limit():
    log_probs = torch.tensor([[0.5, 0.25, 0.25]]).log()
    weights = torch.tensor([[0.5, 0.5, 0.0]])
    assert lepo_score(weights, log_probs).item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.25))
    weights = gumbel_softmax(log_probs, torch.tensor([[0.0, 3.0, 0.0]]), 0.01)
    assert lepo_score(weights, log_probs).item() == pytest.approx(math.log(0.25), abs=1e-5)
    # What was cut off has weight 0 and log-probability -inf, and does not count
    cut = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert lepo_score(torch.tensor([[1.0, 0.0, 0.0]]), cut).item() == 0


def test_latent_grpos_score_by_hand_and_the_sign_of_its_gradient():
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    perturbed = torch.tensor([[-1.0, 0.0]])
    score = latent_grpo_score(perturbed, log_probs)
    assert score.item() == pytest.approx(((-0 - 1) + (-2 - math.exp(-2))) / 2)
    (gradient,) = torch.autograd.grad(score.sum(), log_probs)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, (1 - math.exp(-2)) / 2]]))
    drawn = log_probs.detach() + gumbel_noise((1000, 2), CPU, is_one_sided=True)
    (gradient,) = torch.autograd.grad(latent_grpo_score(drawn, log_probs).sum(), log_probs)
    assert (gradient >= 0).all()


def test_one_sided_noise_moves_the_mean_of_latent_grpos_gradient_away_from_zero():
    # docs/soft_token_grpo.md derives it: a score whose gradient has a mean follows it, whatever the rewards are
    torch.manual_seed(0)
    log_probs, size = torch.randn(6).log_softmax(-1).expand(200_000, 6).requires_grad_(), 6

    def mean_gradient(is_one_sided, shift=0.0):
        drawn = log_probs.detach() + gumbel_noise(log_probs.shape, CPU, is_one_sided) - shift
        (gradient,) = torch.autograd.grad(latent_grpo_score(drawn, log_probs).sum(), log_probs)
        return gradient.mean(0) * size

    lowest, highest = CLAMPED_GUMBEL
    clamped = gumbel_noise((1_000_000,), CPU).clamp(lowest, highest)
    expected = 1 - (lowest - clamped).exp().mean()
    assert expected == pytest.approx(0.78, abs=0.005)
    torch.testing.assert_close(mean_gradient(True), expected.expand(size), atol=0.01, rtol=0)
    torch.testing.assert_close(mean_gradient(False), torch.zeros(size), atol=0.02, rtol=0)
    assert mean_gradient(True, shift=-lowest).abs().max() < 0.04  # what clamping leaves


def test_scores_of_unchanged_weights_are_equal_bit_for_bit():
    log_probs = torch.randn(2, 3, 8).log_softmax(-1)
    weights = gumbel_softmax(log_probs, gumbel_noise((2, 3, 8), CPU), 0.5)
    for score in (lepo_score, latent_grpo_score):
        assert torch.equal((score(weights, log_probs) - score(weights, log_probs)).exp(), torch.ones(2, 3))


def test_candidates_by_mass_number_and_minimum():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = [
        keep_candidates(logits, *given).exp().tolist()
        for given in ((None, 1.0), (2, 1.0), (None, 0.7), (None, 0.2), (None, 0.2, 2))
    ]
    expected = [[0.5, 0.3, 0.15, 0.05], [0.625, 0.375, 0, 0], [0.625, 0.375, 0, 0], [1, 0, 0, 0], [0.625, 0.375, 0, 0]]
    for got, wanted in zip(kept, expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-6)


def test_candidates_are_those_of_the_samplers_of_transformers():
    logits, ids = 3 * torch.randn(64, 50, generator=torch.Generator().manual_seed(0)), torch.zeros(64, 1).long()
    for top_k, top_p, least in ((10, 0.8, 1), (10, 0.8, 4), (None, 0.8, 1), (10, 1.0, 1)):
        expected = logits if top_k is None else TopKLogitsWarper(top_k)(ids, logits)
        expected = TopPLogitsWarper(top_p, min_tokens_to_keep=least)(ids, expected)
        torch.testing.assert_close(keep_candidates(logits, top_k, top_p, least), expected.log_softmax(-1))


def test_the_order_of_candidates_does_not_matter():
    logits = torch.randn(5, 9)
    order = torch.randperm(9)
    torch.testing.assert_close(keep_candidates(logits[:, order], 4, 0.9), keep_candidates(logits, 4, 0.9)[:, order])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: gumbel_softmax(torch.zeros(2), torch.zeros(2), 0.0),
            "`temperature` must be a number above 0, got 0.0",
        ),
        (
            lambda: gumbel_softmax_log_prob(torch.zeros(2), torch.zeros(2), -1.0),
            "`temperature` must be a number above",
        ),
        (lambda: keep_candidates(torch.zeros(4), 5, 1.0), "`top_k` must be between 1 and the vocabulary's 4 tokens"),
        (lambda: keep_candidates(torch.zeros(4), 0, 1.0), "`top_k` must be between 1"),
        (lambda: keep_candidates(torch.zeros(4), None, 1.0, 9), "`min_candidates` must be between 1"),
        (lambda: keep_candidates(torch.zeros(4), None, 0.0), "`top_p` must be above 0 and at most 1, got 0.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_all_tokens_remain_at_a_top_p_of_one_however_peaked():
    logits = torch.tensor([30.0, 0.0, -5.0, -10.0])
    assert keep_candidates(logits, None, 1.0).isfinite().all()
    assert keep_candidates(logits, None, 0.999).isfinite().sum() == 1

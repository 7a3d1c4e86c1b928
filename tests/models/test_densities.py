# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import math

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from trl_dlr.models import DiagonalGaussian, StoppedDensity


@pytest.fixture(params=[(5,), (3, 4, 5)], ids=["one sigma", "sigma of each step"])
def parameters(request):
    mean = torch.randn(3, 4, 5, requires_grad=True)
    log_std = (0.3 * torch.randn(request.param)).requires_grad_()
    return mean, log_std


def reference(mean, log_std):
    return Independent(Normal(mean, log_std.exp().expand_as(mean)), 1)


def gradients(value, parameters):
    return torch.autograd.grad(
        value.square().sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def test_log_prob_and_entropy_match_torch_in_value_and_gradient(parameters):
    latents = torch.randn(3, 4, 5)
    ours, theirs = DiagonalGaussian(*parameters), reference(*parameters)
    for value, expected in (
        (ours.log_prob(latents), theirs.log_prob(latents)),
        (ours.entropy(), theirs.entropy()),
    ):
        assert value.shape == (3, 4)
        torch.testing.assert_close(value, expected)
        for got, wanted in zip(gradients(value, parameters), gradients(expected, parameters), strict=True):
            torch.testing.assert_close(got, wanted)


def test_kl_matches_torch_in_value_and_gradient(parameters):
    other = torch.randn(3, 4, 5), 0.2 * torch.randn(5)
    value = DiagonalGaussian(*parameters).kl(DiagonalGaussian(*other))
    expected = kl_divergence(reference(*parameters), reference(*other))
    torch.testing.assert_close(value, expected)
    for got, wanted in zip(gradients(value, parameters), gradients(expected, parameters), strict=True):
        torch.testing.assert_close(got, wanted)


def test_kl_to_itself_is_exactly_zero(parameters):
    assert torch.equal(DiagonalGaussian(*parameters).kl(DiagonalGaussian(*parameters)), torch.zeros(3, 4))


def test_rsample_has_the_moments_of_the_density_and_noise_of_inverts_it():
    mean, log_std = torch.tensor([[[1.0, -2.0]]]).expand(200_000, 1, 2), torch.tensor([0.5, -1.0])
    density = DiagonalGaussian(mean, log_std)
    sample = density.rsample()
    torch.testing.assert_close(sample.mean(0), mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(sample.std(0)[0], log_std.exp(), atol=0.02, rtol=0)
    noise = torch.randn(200_000, 1, 2)
    torch.testing.assert_close(density.noise_of(density.rsample(noise)), noise, atol=1e-5, rtol=1e-4)


def test_density_is_float32_whatever_it_is_given():
    density = DiagonalGaussian(torch.zeros(1, 1, 2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16))
    assert density.log_prob(torch.zeros(1, 1, 2, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.fixture
def stopped(parameters):
    """Trajectories of 1, 2 and all 4 steps, which must go on after the first and stop after the fourth."""
    logits = (
        torch.randn(3, 4).masked_fill(torch.arange(4) < 1, -torch.inf).masked_fill(torch.arange(4) == 3, torch.inf)
    )
    return logits.requires_grad_(), torch.tensor([2, 3, 4])


def of_decisions(logits, lengths, compute):
    """`compute` of torch's Bernoulli and the decision, at steps 2 and 3 where they were reached; 0 elsewhere."""
    expected = torch.zeros(3, 4)
    for row, length in enumerate(lengths.tolist()):
        for step in range(1, min(length, 3)):
            decision = torch.tensor(float(step == length - 1))
            expected[row, step] = compute(Bernoulli(logits=logits[row, step]), decision, row, step)
    return expected, torch.arange(4) < lengths.unsqueeze(1)


def test_the_joint_density_matches_torch_in_value_and_gradient(parameters, stopped):
    logits, lengths = stopped
    latents, other_logits = torch.randn(3, 4, 5), torch.randn(3, 4)
    other = torch.randn(3, 4, 5), 0.2 * torch.randn(5)
    joint = StoppedDensity(DiagonalGaussian(*parameters), logits, lengths)
    is_forced = logits.isinf().detach()
    reference_joint = StoppedDensity(
        DiagonalGaussian(*other), torch.where(is_forced, logits.detach(), other_logits), lengths
    )
    gaussian = reference(*parameters)
    computed = {
        joint.log_prob(latents): (gaussian.log_prob(latents), lambda b, decision, *_: b.log_prob(decision)),
        joint.entropy(): (gaussian.entropy(), lambda b, *_: b.entropy()),
        joint.kl(reference_joint): (
            kl_divergence(gaussian, reference(*other)),
            lambda b, _, row, step: kl_divergence(b, Bernoulli(logits=other_logits[row, step])),
        ),
    }
    for value, (of_steps, compute) in computed.items():
        decisions, is_taken = of_decisions(logits, lengths, compute)
        expected = torch.where(is_taken, of_steps + decisions, 0.0)
        torch.testing.assert_close(value, expected)
        for got, wanted in zip(
            gradients(value, (*parameters, logits)), gradients(expected, (*parameters, logits)), strict=True
        ):
            assert got.isfinite().all()
            torch.testing.assert_close(got, wanted)
    assert torch.equal(joint.kl(joint), torch.zeros(3, 4))


def test_probabilities_of_all_lengths_sum_to_one(stopped):
    logits, _ = stopped
    total = torch.zeros(3)
    for length in (2, 3, 4):  # at the mean, the latents' own density is that of the mean
        joint = StoppedDensity(
            DiagonalGaussian(torch.zeros(3, 4, 1), torch.zeros(1)), logits, torch.full((3,), length)
        )
        of_steps = -0.5 * math.log(2 * math.pi) * length
        total += (joint.log_prob(torch.zeros(3, 4, 1)).sum(1) - of_steps).exp()
    torch.testing.assert_close(total, torch.ones(3))


def test_steps_that_were_not_taken_have_neither_value_nor_gradient(parameters, stopped):
    logits, lengths = stopped
    joint = StoppedDensity(DiagonalGaussian(*parameters), logits, lengths)
    noise, missing = torch.randn(3, 4, 5), torch.arange(4) >= lengths.unsqueeze(1)
    sample = joint.rsample(noise)
    assert (sample[missing] == 0).all() and (joint.mean[missing] == 0).all()
    torch.testing.assert_close(joint.noise_of(sample)[~missing], noise[~missing], atol=1e-5, rtol=1e-4)
    total = joint.log_prob(torch.randn(3, 4, 5)).sum() + joint.entropy().sum() + sample.sum() + joint.mean.sum()
    of_mean, of_logits = torch.autograd.grad(total, (parameters[0], logits))
    assert (of_mean[missing] == 0).all() and (of_logits[missing | logits.isinf()] == 0).all()
    assert (of_logits[~(missing | logits.isinf())] != 0).all()

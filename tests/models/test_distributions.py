# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from trl_dlr.models import DiagonalGaussian


@pytest.fixture
def parameters():
    mean = torch.randn(3, 4, 5, requires_grad=True)
    log_std = (0.3 * torch.randn(5)).requires_grad_()
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

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import math

import pytest
import torch

from trl_dlr.trainer import contrastive_loss


GROUP, STEPS, DIM = 5, 2, 3


def by_the_formula(latents, means, similarity, temperature, margin):
    """Equation 8 and its alternatives, one number at a time."""

    def dot(a, b):
        return (a.flatten() * b.flatten()).sum()

    def cosine(a, b):
        return dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt())

    total = 0.0
    for k in range(GROUP):
        if similarity == "margin":
            for j in range(GROUP):
                if j != k:
                    total = total + torch.relu(cosine(latents[k], latents[j]) - margin) / (GROUP - 1)
            continue
        scores = []
        for j in range(GROUP):
            if similarity == "dot":
                scores.append(dot(latents[k], latents[j]))
            elif similarity == "infonce" and j == k:
                scores.append(cosine(latents[k], means[k]) / temperature)
            else:
                scores.append(cosine(latents[k], latents[j]) / temperature)
        total = total - scores[k] + torch.logsumexp(torch.stack(scores), dim=0)
    return total


@pytest.mark.parametrize("similarity", ["dot", "cosine", "infonce", "margin"])
def test_value_and_gradient_equal_the_formula_however_the_group_is_split(similarity):
    latents = torch.randn(GROUP, STEPS, DIM, dtype=torch.float64, requires_grad=True)
    means = torch.randn(GROUP, STEPS, DIM, dtype=torch.float64, requires_grad=True)
    expected = by_the_formula(latents, means, similarity, 0.7, 0.2)
    wanted = torch.autograd.grad(expected, [latents, means], allow_unused=True, materialize_grads=True)

    got = [torch.zeros_like(latents), torch.zeros_like(means)]
    for rows in torch.randperm(GROUP).split(2):  # micro-batches that tear the group apart
        terms = contrastive_loss(
            latents[rows],
            means[rows],
            latents.detach().expand(len(rows), -1, -1, -1),
            means.detach().expand(len(rows), -1, -1, -1),
            rows,
            similarity=similarity,
            temperature=0.7,
            margin=0.2,
        )
        torch.testing.assert_close(terms.sum(1), expected.float().expand(len(rows)), atol=1e-4, rtol=1e-5)
        for total, part in zip(
            got,
            torch.autograd.grad(terms.sum(), [latents, means], allow_unused=True, materialize_grads=True),
            strict=True,
        ):
            total += part
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_alike_trajectories_cost_most_and_far_apart_ones_nothing():
    alike = torch.ones(4, 1, 2)
    index = torch.arange(4)

    def loss(latents):
        stored = latents.expand(4, -1, -1, -1)
        return contrastive_loss(latents, latents, stored, stored, index, similarity="cosine").sum(1)

    torch.testing.assert_close(loss(alike), torch.full((4,), 4 * math.log(4)))
    assert (loss(torch.eye(4)[:, None]) < 0.01).all()

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import pytest
import torch

from tests.tiny import tiny_dataset, tiny_reward, tiny_tokenizer, trained_main_model
from tests.trainer.test_latent_grpo_trainer import make_policy
from trl_dlr.evaluation import preflight
from trl_dlr.generation import TransformersEngine
from trl_dlr.reasoners.latent_reasoner import LatentReasoner


def make_reasoner(**kwargs):
    """
    Of an untrained policy, whose mean latents say little more than "add": its answers are right where the letter says
    so, whatever the processor makes of a training, and its samples are wrong now and then.
    """
    main_model, tokenizer = trained_main_model(), tiny_tokenizer()
    anchors = {"num_latents": 2, "injection": "anchors", "anchor_text": "++", "injection_scale": 2.0}
    policy = make_policy(main_model, **{**anchors, **kwargs})
    return LatentReasoner(policy, tokenizer, TransformersEngine(main_model, tokenizer, 3), tokenizer)


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_it_says_what_there_is_to_learn_from_and_what_it_reaches(sampling):
    reasoner = make_reasoner(latent_sampling=sampling, injection="trained")
    before = {name: tensor.clone() for name, tensor in reasoner.policy.state_dict().items()}
    state = torch.random.get_rng_state()
    figures = preflight(reasoner, tiny_dataset(64, 0), tiny_reward, num_samples=4)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in reasoner.policy.state_dict().items())
    assert all(parameter.grad is None for parameter in reasoner.policy.parameters())
    # "++" tells the main model to add, which is right for letters A and E and where the results agree
    additions = {"A": 1.0, "E": 1.0}
    rows = tiny_dataset(64, 0)
    is_right = [
        additions.get(p[0], float(int(a) == (int(p[1]) + int(p[2])) % 10))
        for p, a in zip(rows["prompt"], rows["answer"], strict=True)
    ]
    assert figures["plain_anchors/accuracy"] == pytest.approx(sum(is_right) / len(is_right), abs=0.05)
    assert figures["plain_anchors/accuracy"] > figures["no_latents/accuracy"]
    assert 0 < figures["policy/mixed"] < 1 and figures["plain_anchors/mixed"] == 0
    assert 0 < figures["mean_size"] < 1
    fed = "latent_in" if sampling == "autoregressive" else "queries"
    for part in ("assistant", "latent_head", fed):
        assert figures[f"gradient/{part}"] > 0, part
    assert figures["gradient/injector"] == 0  # it lies after the sample


def test_means_that_leave_nothing_to_explore_are_seen():
    reasoner = make_reasoner()
    with torch.no_grad():
        reasoner.policy.latent_head.mean.bias.fill_(100.0)
    figures = preflight(reasoner, tiny_dataset(16, 0), tiny_reward, num_samples=4)
    assert figures["mean_size"] == pytest.approx(100.0, rel=0.01)
    assert figures["policy/mixed"] < 0.2

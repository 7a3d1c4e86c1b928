# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A main model whose parts are on several devices, or on disk: the same as in one place."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import dispatch_model

from tests.pretend_devices import PretendDevices
from tests.tiny import random_main_model, tiny_tokenizer
from tests.trainer.test_latent_grpo_trainer import make_policy, make_trainer
from tests.trainer.test_latent_sft_trainer import make_sft_trainer
from trl_dlr import LatentReasoner, ThinkingConfig, ThinkingReasoner
from trl_dlr.generation import TransformersEngine
from trl_dlr.generation.engine import prompt_embeds
from trl_dlr.models.main_model import (
    completion_log_probs,
    fingerprints_match,
    teacher_forced_inputs,
    weights_fingerprint,
)
from trl_dlr.report.probe import nearest_tokens


PROMPTS = [[5, 6, 7], [8, 4], [5, 9, 10, 11, 12]]
NUM_SAMPLES = torch.tensor([2, 1, 4])
NUM_LATENTS = torch.tensor([3, 1, 2, 2, 3, 1, 1])
PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
LAYOUTS = {  # where each of them is; what is no main model is on the CPU
    "layers on two devices": ["lazy:0"] * 3 + ["lazy:1"] * 3,
    "tied weights apart from the layers": ["lazy:1"] + ["lazy:0"] * 4 + ["lazy:1"],
    "all elsewhere": ["lazy:1"] * 6,
    "tied weights on disk": ["disk"] * 3 + ["cpu"] * 2 + ["disk"],
}


@pytest.fixture(params=LAYOUTS)
def models(request, tmp_path):
    """A main model in one place, and the same distributed."""
    devices = LAYOUTS[request.param]
    is_on_disk = "disk" in devices
    with nullcontext() if is_on_disk else PretendDevices():
        plain, distributed = (
            random_main_model(tie_word_embeddings="tied" in request.param).requires_grad_(False) for _ in range(2)
        )
        if len(set(devices)) == 1:  # without hooks, as `from_pretrained` does it
            distributed.hf_device_map = {"": devices[0]}
            yield plain, distributed.to(devices[0])
        else:
            device_map = dict(zip(PARTS, devices, strict=True))
            yield plain, dispatch_model(distributed, device_map, "cpu" if is_on_disk else None, offload_dir=tmp_path)


def draw_latents(num_rows):
    return 0.3 * torch.randn(num_rows, 3, 64, generator=torch.Generator().manual_seed(0))


def test_it_decodes_the_same(models):
    def decode(main_model):
        engine, latents = TransformersEngine(main_model, tiny_tokenizer(), 8), draw_latents(7)
        stopping = TransformersEngine(main_model, tiny_tokenizer(), 8, {"stop_strings": ["5"]})
        return [
            stopping.generate(PROMPTS),
            engine.generate(PROMPTS, latents, NUM_SAMPLES),
            engine.generate(PROMPTS, latents, NUM_SAMPLES, NUM_LATENTS),
        ]

    plain, distributed = models
    assert decode(distributed) == decode(plain)
    if distributed.device.type != "lazy":  # which another thread knows nothing of
        engines = [TransformersEngine(model, tiny_tokenizer(), 8) for model in models]
        expected, mine = (list(engine.stream(PROMPTS[0], draw_latents(1))) for engine in engines)
        assert mine == expected


def test_likelihoods_and_their_gradients_are_the_same(models):
    def log_probs(main_model):
        completions = [[3, 4], [5], [6, 7, 1]]
        after_latents, _ = completion_log_probs(main_model, PROMPTS, completions, draw_latents(3), NUM_LATENTS[:3])
        alone, _ = completion_log_probs(main_model, PROMPTS, completions)
        latents = draw_latents(2).requires_grad_()
        prompts, mask = torch.tensor([[5, 6, 7], [0, 6, 7]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
        inputs = teacher_forced_inputs(main_model, prompts, mask, latents, torch.tensor([[3, 4], [5, -100]]))
        main_model(**inputs).loss.backward()
        return [*after_latents, *alone, latents.grad]

    plain, distributed = models
    for mine, expected in zip(log_probs(distributed), log_probs(plain), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_a_policy_is_fitted_to_it_and_answers_with_it(models):
    policies = [make_policy(model, random_main_model(3), injection="anchors") for model in models]
    for name, tensor in policies[0].state_dict().items():
        torch.testing.assert_close(policies[1].state_dict()[name], tensor, msg=name)

    def answer(main_model, policy):
        engine = TransformersEngine(main_model, tiny_tokenizer(), 6)
        reasoner = LatentReasoner(policy, tiny_tokenizer(), engine, tiny_tokenizer())
        embeds = policy.inject(policy.sample(**reasoner.tokenize(["A12"]), deterministic=True).latents)
        tokens = [[token["id"] for token in row] for row in nearest_tokens(reasoner, embeds[0])]
        return reasoner.generate(["A12", "B3"], do_sample=False).texts, tokens

    plain, distributed = models
    assert answer(distributed, policies[1]) == answer(plain, policies[0])
    for_vllm = [prompt_embeds(model.get_input_embeddings(), PROMPTS, [0, 2], draw_latents(2)) for model in models]
    for expected, mine in zip(*for_vllm, strict=True):
        assert torch.equal(mine.cpu(), expected)


@pytest.mark.parametrize("latent_type", ["soft_tokens", "hidden_states"])
def test_a_model_that_thinks_by_itself_answers_the_same(models, latent_type):
    def answer(model):
        config = ThinkingConfig(latent_type=latent_type, num_latents=2)
        reasoner = ThinkingReasoner(model, tiny_tokenizer(), config, max_new_tokens=5)
        without = reasoner.decode(["A12"], reasoner.policy.zero_latents(1).latents)
        return reasoner.generate(["A12", "B3"], do_sample=False).texts, without

    plain, distributed = models
    assert answer(distributed) == answer(plain)


def test_its_weights_are_known_again_after_it_has_run(models):
    plain, distributed = models
    for _ in range(2):
        assert fingerprints_match(weights_fingerprint(distributed), weights_fingerprint(plain))
        distributed(torch.tensor([[5, 6]]).to("cpu" if distributed.device.type == "meta" else distributed.device))


def test_a_policy_is_trained_the_same(models, tmp_path):
    trained = []
    for name, main_model in zip(("plain", "distributed"), models, strict=True):
        policy = make_policy(models[0], random_main_model(3), injection="trained")
        before = policy.injector.weight.detach().clone()
        # Without Adam, which makes a step of what gradients round to
        kwargs = {"main_model": main_model, "model": policy, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0}
        make_sft_trainer(tmp_path / name, **kwargs, mean_bound=0.1).train()
        after_sft = policy.injector.weight.detach().clone()
        make_trainer(tmp_path / name, **kwargs, hybrid_coef=0.5).train()
        assert (after_sft - before).abs().max() > 1e-4 and (policy.injector.weight - after_sft).abs().max() > 1e-4
        trained.append(policy.state_dict())
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from tests.tiny import random_main_model, tiny_tokenizer
from trl_dlr.models.main_model import completion_log_probs, teacher_forced_inputs


PROMPTS = [[3, 4, 5, 6], [7, 8], [9]]
COMPLETIONS = [[10, 11], [12, 13, 14, 1], [15]]


@pytest.mark.parametrize("num_latents", [None, [2, 1, 1]])
def test_rows_are_those_of_one_pass_each(num_latents):
    main_model, latents = random_main_model(), torch.randn(3, 2, 64)
    embed = main_model.get_input_embeddings()
    given = None if num_latents is None else torch.tensor(num_latents)
    log_probs, is_greedy = completion_log_probs(main_model, PROMPTS, COMPLETIONS, latents, given)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        own = latents[row, : 2 if num_latents is None else num_latents[row]]
        parts = [embed(torch.tensor(prompt)), own, embed(torch.tensor(completion))]
        logits = main_model(inputs_embeds=torch.cat(parts).unsqueeze(0)).logits[0, -len(completion) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(len(completion)), completion]
        torch.testing.assert_close(log_probs[row], expected.detach(), atol=1e-5, rtol=1e-5)
        assert is_greedy[row] == (logits.argmax(-1).tolist() == completion)


def test_greedy_completions_are_greedy_and_others_not():
    main_model, latents = random_main_model(), torch.randn(1, 2, 64)
    embeds = torch.cat([main_model.get_input_embeddings()(torch.tensor([[3, 4]])), latents], dim=1)
    greedy = main_model.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False)[0].tolist()
    other = [*greedy[:-1], (greedy[-1] + 1) % 20]
    assert completion_log_probs(main_model, [[3, 4]] * 2, [greedy, other], latents.repeat(2, 1, 1))[1] == [True, False]


def test_without_latents_it_is_what_the_harness_finds_for_the_main_model():
    main_model, tokenizer = random_main_model(), tiny_tokenizer()
    pairs = [("A12", "=3"), ("B9", "=12++"), ("C", "4")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    expected = HFLM(main_model, tokenizer=tokenizer, batch_size=3).loglikelihood(requests, disable_tqdm=True)
    ids = [[tokenizer(text)["input_ids"] for text in texts] for texts in zip(*pairs, strict=True)]
    log_probs, is_greedy = completion_log_probs(main_model, *ids)
    assert [row.sum().item() for row in log_probs] == pytest.approx([value for value, _ in expected], abs=1e-5)
    assert is_greedy == [flag for _, flag in expected]


def test_the_mean_of_given_latents_loss_is_theirs():
    main_model, latents = random_main_model(), torch.randn(2, 2, 64)
    log_probs, _ = completion_log_probs(main_model, [[3, 4], [5, 6]], [[10, 11, 12], [13]], latents)
    completions = torch.tensor([[10, 11, 12], [13, -100, -100]])
    prompts = torch.tensor([[3, 4], [5, 6]])
    loss = main_model(
        **teacher_forced_inputs(main_model, prompts, torch.ones_like(prompts), latents, completions)
    ).loss
    assert loss.item() == pytest.approx(-torch.cat(log_probs).mean().item(), abs=1e-6)

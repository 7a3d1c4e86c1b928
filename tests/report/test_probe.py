# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from tests.tiny import random_main_model, tiny_dataset, tiny_reward, tiny_tokenizer
from tests.trainer.test_latent_grpo_trainer import make_policy
from trl_dlr.generation import TransformersEngine
from trl_dlr.reasoners.latent_reasoner import LatentReasoner
from trl_dlr.report import probe as probe_module
from trl_dlr.report import take_probe
from trl_dlr.report.probe import embed_tokens_of, nearest_tokens, principal_components


def make_reasoner(tokenizer=None, **kwargs):
    main_model, tokenizer = random_main_model(), tokenizer or tiny_tokenizer()
    policy = make_policy(main_model, anchor_text="+=", **kwargs)
    return LatentReasoner(policy, tokenizer, TransformersEngine(main_model, tokenizer, 4), tokenizer)


def by_brute_force(reasoner, embedding, number):
    table = reasoner.engine.model.get_input_embeddings().weight
    cosines = torch.cosine_similarity(embedding.float().unsqueeze(0), table.float())
    order = cosines.argsort(descending=True)[:number]
    return order.tolist(), cosines[order].tolist()


# ---- The map ----


def test_principal_components_are_those_of_the_covariance():
    vectors = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 8)
    coordinates, shares = principal_components(vectors)
    variances, directions = torch.linalg.eigh(torch.cov(vectors.T.double()))
    expected = (vectors - vectors.mean(0)).double() @ directions.flip(1)[:, :2]
    torch.testing.assert_close(coordinates.abs(), expected.abs(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shares, variances.flip(0)[:2] / variances.sum(), atol=1e-6, rtol=1e-5)
    again, _ = principal_components(vectors)
    assert torch.equal(coordinates, again)
    assert torch.allclose(principal_components(-vectors)[0], -coordinates)  # the axes stay, the points move


def test_what_has_fewer_dimensions_gets_an_axis_of_zeros():
    coordinates, shares = principal_components(torch.tensor([[1.0], [3.0], [5.0]]))
    torch.testing.assert_close(coordinates, torch.tensor([[-2.0, 0], [0, 0], [2, 0]]).double())
    assert shares.tolist() == [1.0, 0.0]
    assert principal_components(torch.ones(4, 3))[1].tolist() == [0.0, 0.0]  # no variance, no division by it


# ---- The words ----


@pytest.mark.parametrize("chunk", [4, 8192])
def test_nearest_tokens_are_those_of_the_whole_table(monkeypatch, chunk):
    monkeypatch.setattr(probe_module, "VOCABULARY_CHUNK", chunk)
    reasoner = make_reasoner()
    embeddings = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    found = nearest_tokens(reasoner, embeddings, number=5)
    for embedding, tokens in zip(embeddings, found, strict=True):
        ids, cosines = by_brute_force(reasoner, embedding, 5)
        assert [token["id"] for token in tokens] == ids
        assert [token["cosine"] for token in tokens] == pytest.approx(cosines, abs=1e-4)
        assert [token["text"] for token in tokens] == [reasoner.main_processing_class.decode([i]) for i in ids]


def test_rows_beyond_the_vocabulary_are_no_tokens():
    reasoner = make_reasoner()
    reasoner.engine.model.resize_token_embeddings(40)
    extra = reasoner.engine.model.get_input_embeddings().weight[30].detach()
    tokens = nearest_tokens(reasoner, extra.unsqueeze(0), number=50)[0]
    assert sorted(token["id"] for token in tokens) == list(range(len(tiny_tokenizer())))


def test_the_embeddings_are_found_whatever_decodes():
    reasoner = make_reasoner()
    embed_tokens = reasoner.engine.model.get_input_embeddings()
    assert embed_tokens_of(reasoner.engine) is embed_tokens
    assert embed_tokens_of(SimpleNamespace(embed_tokens=embed_tokens, model="served/name")) is embed_tokens


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
@pytest.mark.parametrize("injection", ["anchors", "components"])
def test_words_are_of_mean_latents(sampling, injection):
    reasoner, rows = make_reasoner(latent_sampling=sampling, injection=injection), tiny_dataset(5, 0)
    probe = take_probe(reasoner, rows, tiny_reward, num_samples=2, num_tokens=3, batch_size=2)
    means = reasoner.policy.sample(**reasoner.tokenize(list(rows["prompt"])), deterministic=True).latents
    injector = reasoner.policy.injector
    for question, latents in zip(probe["questions"], means, strict=True):
        embeddings = injector(latents.unsqueeze(0))[0]
        assert len(question["tokens"]) == 3
        for step, tokens in enumerate(question["tokens"]):
            assert [token["id"] for token in tokens] == by_brute_force(reasoner, embeddings[step], 3)[0]
        assert ("offset_tokens" in question) == (injection == "anchors")
        if injection == "anchors":
            for step, tokens in enumerate(question["offset_tokens"]):
                offset = embeddings[step] - injector.anchors[step]
                assert [token["id"] for token in tokens] == by_brute_force(reasoner, offset, 3)[0]


def test_words_end_at_a_learned_stop():
    reasoner = make_reasoner(learn_stop=True, initial_stop_prob=0.5, injection="anchors")
    rows = tiny_dataset(8, 0)
    torch.nn.init.normal_(reasoner.policy.stop_head.weight)
    probe = take_probe(reasoner, rows, tiny_reward, num_samples=2, num_tokens=3, batch_size=3)
    _, lengths = reasoner.sample_latents(list(rows["prompt"]), deterministic=True)
    assert len(set(lengths.tolist())) > 1
    for name in ("tokens", "offset_tokens"):
        assert [len(question[name]) for question in probe["questions"]] == lengths.tolist()


# ---- The whole ----


def test_a_probe_says_what_was_decoded_and_what_it_was_worth():
    reasoner, rows = make_reasoner(), tiny_dataset(5, 0)
    probe = take_probe(reasoner, rows, tiny_reward, num_samples=3, batch_size=2)
    assert json.loads(json.dumps(probe)) == probe
    alone = reasoner.decode(list(rows["prompt"]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        latents = [reasoner.sample_latents(list(rows["prompt"])[start : start + 2], 3)[0] for start in (0, 2, 4)]
    completions = reasoner.decode(list(rows["prompt"]), torch.cat(latents))
    coordinates, shares = principal_components(torch.cat(latents).flatten(1))
    assert probe["variance_shares"] == pytest.approx(shares.tolist(), abs=1e-4)
    for place, (question, row) in enumerate(zip(probe["questions"], rows, strict=True)):
        assert (question["prompt"], question["answer"]) == (row["prompt"], row["answer"])
        assert question["alone"]["completion"] == alone[place]
        samples = question["samples"]
        assert [s["completion"] for s in samples] == completions[3 * place : 3 * place + 3]
        texts = [s["completion"] for s in [*samples, question["alone"]]]
        rewards = [s["reward"] for s in [*samples, question["alone"]]]
        assert rewards == tiny_reward(texts, [row["answer"]] * 4)
        assert [[s["x"], s["y"]] for s in samples] == coordinates[3 * place : 3 * place + 3].round(decimals=4).tolist()


def test_a_probe_leaves_everything_as_it_was():
    reasoner = make_reasoner()
    reasoner.policy.train()
    before = {name: tensor.clone() for name, tensor in reasoner.policy.state_dict().items()}
    state = torch.random.get_rng_state()
    probes = [take_probe(reasoner, tiny_dataset(3, 0), tiny_reward, num_samples=4, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert reasoner.policy.training
    assert all(torch.equal(before[name], tensor) for name, tensor in reasoner.policy.state_dict().items())
    assert probes[0] == probes[1] != probes[2]


def test_conversations_and_rewards_without_an_opinion():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": f"A{i}{i}"}], "solution": str(i)} for i in range(3)]

    def reward(prompts, completions, solution, **kwargs):
        assert all(prompt[0]["content"][1] == gold for prompt, gold in zip(prompts, solution, strict=True))
        assert all(completion[0]["role"] == "assistant" for completion in completions)
        return [None if gold == "0" else float("nan") if gold == "1" else 0.5 for gold in solution]

    probe = take_probe(make_reasoner(tokenizer), Dataset.from_list(rows), reward, num_samples=2)
    assert [question["prompt"] for question in probe["questions"]] == ["A00", "A11", "A22"]
    assert [question["answer"] for question in probe["questions"]] == ["0", "1", "2"]
    assert [[s["reward"] for s in question["samples"]] for question in probe["questions"]] == [
        [None, None],
        [None, None],
        [0.5, 0.5],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": Dataset.from_list([{"text": "A12"}])}, "`questions` must have rows and a column 'prompt'"),
        ({"questions": tiny_dataset(2, 0).select([])}, "`questions` must have rows"),
        ({"num_samples": 1}, "`num_samples` must be at least 2, to make a map, got 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"questions": tiny_dataset(2, 0), "reward_func": tiny_reward, **change}
    with pytest.raises(ValueError, match=message):
        take_probe(make_reasoner(), **arguments)

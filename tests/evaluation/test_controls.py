# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import contextlib
from types import SimpleNamespace

import pytest
import torch

from tests.tiny import random_main_model, tiny_dataset, tiny_tokenizer
from trl_dlr import LatentPolicyModel, fresh_layers
from trl_dlr.evaluation import answer_questions, controls, evaluate_latents, preflight, score_answers
from trl_dlr.evaluation.table import evaluate_row
from trl_dlr.generation import TransformersEngine
from trl_dlr.reasoners.latent_reasoner import LatentReasoner


class EchoReasoner:
    """Writes down whose latents it was given."""

    controls = LatentReasoner.controls
    engine = SimpleNamespace(num_truncated=0)

    def sample_latents(self, prompts, num_samples, deterministic):
        own = torch.tensor([float(int.from_bytes(prompt.encode(), "big")) for prompt in prompts], dtype=torch.float64)
        return own.repeat_interleave(num_samples).view(-1, 1, 1), torch.ones(num_samples * len(prompts))

    def decode(self, prompts, latents=None, lengths=None, num_anchors=0):
        if latents is None:
            return ["alone"] * len(prompts)
        return [int(value).to_bytes(3, "big").decode() for value in latents.flatten()]


def is_own(completions, prompts, **kwargs):
    return [1.0 if c == p else -1.0 for c, p in zip(completions, prompts, strict=True)]


def distinct(num_rows):
    dataset = tiny_dataset(3 * num_rows, 0)
    first = {prompt: i for i, prompt in reversed(list(enumerate(dataset["prompt"])))}
    return dataset.select(sorted(first.values())[:num_rows])


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_own_latents_reach_their_question_and_shuffled_ones_never_do(batch_size):
    kwargs = {"correctness_reward": is_own, "format_reward": is_own, "batch_size": batch_size, "num_samples": 2}
    dataset = distinct(20)
    assert evaluate_latents(EchoReasoner(), dataset, control="policy", **kwargs)["accuracy"] == 1.0
    assert evaluate_latents(EchoReasoner(), dataset, control="shuffled", **kwargs)["accuracy"] == 0.0
    assert evaluate_latents(EchoReasoner(), dataset, control="no_latents", **kwargs)["accuracy"] == 0.0


def test_figures_are_what_they_say():
    answers = iter([1.0, -1.0, -1.0, -1.0])
    figures = evaluate_latents(
        EchoReasoner(),
        distinct(2),
        correctness_reward=lambda completions, **kwargs: [next(answers) for _ in completions],
        format_reward=lambda completions, **kwargs: [1.0] * len(completions),
        format_weight=0.5,
        num_samples=2,
    )
    assert figures == {"reward": 0.0, "accuracy": 0.25, "format": 1.0, "pass_at_k": 0.5, "mixed": 0.5}


def test_answers_without_a_reward_are_left_out():
    def judge(
        completions, prompts, **kwargs
    ):  # of the first question one answer, of the second none, of the third all
        return [1.0, None, None, None, -1.0, 1.0]

    figures = evaluate_latents(EchoReasoner(), distinct(3), judge, num_samples=2)
    expected = {"reward": 1 / 3, "accuracy": 2 / 3, "pass_at_k": 1.0, "mixed": 0.5}
    assert figures == pytest.approx(expected)
    figures = evaluate_latents(
        EchoReasoner(),
        distinct(3),
        judge,
        lambda completions, **kwargs: [None, -1.0, None, None, 1.0, 1.0],
        num_samples=2,
    )
    expected = {"reward": (1 - 1 + 0 + 2) / 4, "accuracy": 2 / 3, "format": 2 / 3, "pass_at_k": 1.0, "mixed": 1.0}
    assert figures == pytest.approx(expected)


def test_a_table_leaves_out_questions_without_a_reward():
    class CountingReasoner(EchoReasoner):
        engine = SimpleNamespace(num_decoded=0, num_completion_tokens=0, num_truncated=0, num_forward_tokens=0)

        def decode(self, prompts, *args, **kwargs):
            self.engine.num_decoded += len(prompts)
            return super().decode(prompts, *args, **kwargs)

    def judge(completions, prompts, **kwargs):
        return [1.0, -1.0, 1.0, None, None, None]

    figures = evaluate_row(CountingReasoner(), distinct(3), judge, "policy", [0], 2, 2, 8)
    assert figures["pass@1"]["mean"] == 0.5 and figures["pass@2"]["mean"] == 1.0
    with pytest.raises(ValueError, match="`reward` must judge"):
        evaluate_row(CountingReasoner(), distinct(3), lambda **kwargs: [None] * 6, "policy", [0], 2, 2, 8)


def test_same_seed_gives_the_same_figures_and_leaves_random_numbers_alone():
    main_model, tokenizer = random_main_model(), tiny_tokenizer()
    policy = LatentPolicyModel.from_assistant(fresh_layers(main_model, 1), main_model, tokenizer)
    engine = TransformersEngine(main_model, tokenizer, max_new_tokens=4)
    reasoner = LatentReasoner(policy, tokenizer, engine, tokenizer)
    seen = []

    def record(completions, **kwargs):
        seen[-1].extend(completions)
        return [1.0] * len(completions)

    for seed in (0, 0, 1):
        seen.append([])
        before = torch.get_rng_state()
        evaluate_latents(reasoner, distinct(6), record, record, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
    assert seen[0] == seen[1] != seen[2]


def test_unknown_control():
    with pytest.raises(ValueError, match="control.*policy, mean_latents, no_latents.*shuffled, got 'twin'"):
        evaluate_latents(EchoReasoner(), distinct(2), is_own, is_own, control="twin")


@pytest.mark.parametrize(
    ("dataset", "kwargs", "message"),
    [
        ([{"prompt": "A12"}], {}, "`dataset` must be a `datasets.Dataset` with a column 'prompt', got list"),
        (distinct(2).rename_column("prompt", "question"), {}, r"with a column 'prompt', got \['question'"),
        (distinct(2), {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        (distinct(1), {"control": "shuffled"}, "must hold at least two questions for `shuffled`"),
        (distinct(2), {"num_samples": 0}, "`num_samples` must be at least 1, got 0"),
    ],
)
def test_what_are_no_questions(dataset, kwargs, message):
    for function in (evaluate_latents, preflight) if "control" not in kwargs else (evaluate_latents,):
        with pytest.raises(ValueError, match=message):
            function(EchoReasoner(), dataset, is_own, **kwargs)


def make_reasoner(**config_kwargs):
    main_model, tokenizer = random_main_model(), tiny_tokenizer()
    policy = LatentPolicyModel.from_assistant(fresh_layers(main_model, 1), main_model, tokenizer, **config_kwargs)
    with torch.no_grad():
        policy.latent_head.mean.weight.normal_()
    return LatentReasoner(policy, tokenizer, TransformersEngine(main_model, tokenizer, max_new_tokens=4), tokenizer)


def test_latents_of_zero_are_the_anchors():
    reasoner, dataset = make_reasoner(anchor_text="+-"), distinct(12)
    zero = answer_questions(reasoner, dataset, "zero_latents")
    anchors, alone = (answer_questions(reasoner, dataset, name) for name in ("plain_anchors", "no_latents"))
    assert zero == anchors != alone
    assert [len(answers) for answers in zero] == [1] * 12


@pytest.mark.parametrize("control", ["policy", "shuffled", "mean_latents"])
def test_latents_keep_their_number_wherever_they_go(control):
    reasoner, dataset = make_reasoner(learn_stop=True, initial_stop_prob=0.5), distinct(12)
    torch.nn.init.normal_(reasoner.policy.stop_head.weight, std=0.5)
    given = []
    reasoner.decode = lambda prompts, *latents, num_anchors: given.append(latents) or ["0"] * len(latents[0])
    answer_questions(reasoner, dataset, control, num_samples=2, batch_size=5)
    found, lengths = (torch.cat(parts) for parts in zip(*given, strict=True))
    assert len(lengths.unique()) > 1
    assert torch.equal((found != 0).all(-1).sum(1), lengths)


def test_means_are_those_of_the_policy_once_whatever_the_seed():
    reasoner, dataset = make_reasoner(), distinct(12)
    means = [answer_questions(reasoner, dataset, "mean_latents", num_samples=3, seed=seed) for seed in (0, 1)]
    expected = reasoner.generate(dataset["prompt"][:], do_sample=False).candidates
    assert means[0] == means[1] == expected


def test_a_fresh_head_has_not_been_trained_and_leaves_the_trained_one():
    reasoner = make_reasoner(sigma=0.01)  # next to no noise: latents are means
    trained = reasoner.policy.latent_head
    seen = []
    reasoner.decode = lambda prompts, latents, lengths, num_anchors: seen.append(latents) or ["0"] * len(latents)
    for control in ("policy", "fresh_head"):
        answer_questions(reasoner, distinct(6), control, num_samples=2)
    own, fresh = (latents.square().mean().sqrt() for latents in seen)
    assert own > 2 and fresh < 0.3
    assert reasoner.policy.latent_head is trained
    assert reasoner.policy.latent_head.mean.weight.std() > 0.5


@pytest.mark.parametrize("control", LatentReasoner.controls)
def test_answers_do_not_depend_on_the_number_of_processes(monkeypatch, control):
    reasoner, dataset = make_reasoner(), distinct(7)
    alone = answer_questions(reasoner, dataset, control, num_samples=2, batch_size=2, seed=3)
    found = []
    for rank in range(3):  # each with its share, as accelerate deals it out

        def share(rows, rank=rank):
            return contextlib.nullcontext(rows[(0, 3, 5)[rank] : (3, 5, 7)[rank]])

        state = SimpleNamespace(is_main_process=rank == 0, split_between_processes=share)
        monkeypatch.setattr(controls, "PartialState", lambda state=state: state)
        found += answer_questions(reasoner, dataset, control, num_samples=2, batch_size=2, seed=3)
    assert found == alone and len({str(answers) for answers in found}) > 1


def test_scores_stand_beside_their_answers():
    dataset = distinct(3)
    answers = [[prompt, "other"] for prompt in dataset["prompt"]]
    assert score_answers(dataset, answers, is_own).tolist() == [[1.0, -1.0]] * 3

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from tests.families import tiny_family
from tests.tiny import VOCABULARY, random_main_model, tiny_dataset, tiny_reward, tiny_tokenizer
from tests.trainer.test_latent_grpo_trainer import history, length_reward, weights
from trl_dlr import LatentReportCallback, SoftTokenGRPOConfig, SoftTokenGRPOTrainer, ThinkingReasoner
from trl_dlr.models.hidden_thoughts import add_hidden_thoughts
from trl_dlr.models.soft_tokens import SOFT_TOKEN_SCORES, gumbel_softmax_log_prob, latent_grpo_score, lepo_score
from trl_dlr.models.thinking import ThinkingConfig, Thoughts
from trl_dlr.trainer.losses import group_advantages, select_first_latent


EXACT = {"soft_token_score": "exact", "soft_token_temperature": 0.5}
LEPO = {"soft_token_score": "lepo", "soft_token_temperature": 0.3, "latent_top_k": 8, "latent_top_p": 0.95}
LATENT_GRPO = {
    "soft_token_score": "latent_grpo",
    "one_sided_noise": True,
    "latent_top_p": 0.95,
    "min_candidates": 6,
    "mixture_size": 6,
    "soft_token_temperature": 0.5,
    "stop_at_end_marker": True,
    "end_marker": list(VOCABULARY)[16],
    "first_latent_selection": True,
}
HIDDEN = {"latent_type": "hidden_states", "end_marker": "=="}
LONG = Dataset.from_list([{"prompt": "A" * 60, "answer": "1"}] * 8)  # the model has 64 positions
METHODS = {"exact": EXACT, "lepo": LEPO, "latent_grpo": LATENT_GRPO, "hidden states": HIDDEN}


def undecided_model(**kwargs):
    """Of its thoughts, some end by themselves with the marker above, and some do not."""
    model = random_main_model(2, **kwargs)
    with torch.no_grad():
        model.lm_head.weight *= 20
    return model


def make_trainer(tmp_path, model=None, reward_funcs=length_reward, trainer_kwargs=None, train_dataset=None, **kwargs):
    defaults = {
        "max_steps": 4,
        "num_latents": 3,
        "num_generations": 8,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 8,
        "num_iterations": 2,
        "max_completion_length": 4,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return SoftTokenGRPOTrainer(
        model=undecided_model() if model is None else model,
        reward_funcs=reward_funcs,
        args=SoftTokenGRPOConfig(str(tmp_path / "run"), **{**defaults, **kwargs}),
        train_dataset=tiny_dataset(32, 0) if train_dataset is None else train_dataset,
        processing_class=tiny_tokenizer(),
        **(trainer_kwargs or {}),
    )


def rollout_of(trainer, prompts=("A12", "B3")):
    """A rollout whose questions are of different lengths."""
    trainer.model.train()
    rows = [{"prompt": prompt, "answer": "0"} for prompt in prompts for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions(rows)


def loss_of(trainer, inputs):
    trainer.current_gradient_accumulation_steps = 1
    return trainer._compute_loss(trainer.model, inputs)


@pytest.mark.parametrize("method", METHODS)
def test_unchanged_weights_give_a_ratio_of_exactly_one(tmp_path, method):
    trainer = make_trainer(tmp_path, undecided_model(attention_dropout=0.5), **METHODS[method], loss_type="grpo")
    inputs = rollout_of(trainer)
    loss = loss_of(trainer, inputs)  # the old score is this very one
    inputs["rollout_step"] += 1
    again = loss_of(trainer, inputs)  # and stays it after an update, which changed nothing here
    assert torch.equal(trainer._scoring.old_logps, trainer._scoring.logps)
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    advantages = inputs["advantages"] if inputs["advantages"].dim() == 2 else inputs["advantages"].unsqueeze(1)
    expected = -((advantages * mask).sum(1) / mask.sum(1)).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_completion_is_latents_end_marker_and_answer(tmp_path, method):
    seen = []

    def reward(completions, completion_ids, **kwargs):
        seen.append((completions, completion_ids))
        return length_reward(completions)

    trainer = make_trainer(tmp_path, reward_funcs=reward, start_marker="+", **METHODS[method])
    inputs = rollout_of(trainer)
    (completions, answer_ids), end = seen[0], trainer.thinker.end_ids
    is_scored = int(method != "hidden states")
    assert (inputs["prompt_ids"][:, -1] == VOCABULARY["+"]).all()
    for row, n in enumerate(inputs["latent_lengths"].tolist()):
        length = n + len(end) + len(answer_ids[row])
        assert inputs["completion_ids"][row, :length].tolist() == [0] * n + end + answer_ids[row]
        assert inputs["completion_mask"][row].tolist() == [1] * length + [0] * (
            inputs["completion_mask"].size(1) - length
        )
        actions = [is_scored] * n + [0] * len(end) + [1] * len(answer_ids[row])
        assert inputs["tool_mask"][row, :length].tolist() == actions
        assert completions[row] == tiny_tokenizer().decode(answer_ids[row], skip_special_tokens=True)
    assert history(trainer, "latent/mean_length") == []  # logged with the step
    assert trainer._metrics["train"]["latent/mean_length"] == [inputs["latent_lengths"].float().mean().item()]


@pytest.mark.parametrize("method", ["exact", "lepo", "latent_grpo"])
def test_latent_positions_have_the_scores_functions_and_tokens_their_log_probabilities(tmp_path, method):
    trainer = make_trainer(tmp_path, **METHODS[method])
    inputs = rollout_of(trainer)
    loss_of(trainer, inputs)
    scores, tau = inputs["old_per_token_logps"], trainer.args.soft_token_temperature
    embed = trainer.model.get_input_embeddings()
    for row, n in enumerate(inputs["latent_lengths"].tolist()):
        is_real = inputs["prompt_mask"][row].bool()
        completion = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()]
        perturbed, ids = inputs["latent_perturbed"][row, :n], inputs["latent_token_ids"][row, :n]
        weights = (perturbed / tau).softmax(-1)
        latents = (weights.unsqueeze(-1) * embed(ids)).sum(1)
        embeds = torch.cat([embed(inputs["prompt_ids"][row][is_real]), latents, embed(completion[n:])])
        with torch.no_grad():
            logits = trainer.model(inputs_embeds=embeds[None]).logits[0, is_real.sum() - 1 : -1]
        log_probs = logits.log_softmax(-1)
        tokens = log_probs[n:].gather(1, completion[n:, None]).squeeze(1)
        torch.testing.assert_close(scores[row, n : len(completion)], tokens, atol=1e-4, rtol=1e-4)
        candidates = log_probs[:n].gather(1, ids)
        expected = {
            "exact": lambda p, c, w: gumbel_softmax_log_prob(w.log(), c, tau),
            "lepo": lambda p, c, w: lepo_score(w, c),
            "latent_grpo": lambda p, c, w: latent_grpo_score(p, c),
        }[method](perturbed, candidates, weights)
        torch.testing.assert_close(scores[row, :n], expected, atol=1e-3, rtol=1e-4)


def test_lepos_latents_have_the_gradient_of_the_score_and_no_ratio(tmp_path):
    trainer = make_trainer(tmp_path, **LEPO, loss_type="grpo")
    inputs = rollout_of(trainer)
    loss_of(trainer, inputs)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    inputs["rollout_step"] += 1  # an update has been
    inputs["tool_mask"] = inputs["tool_mask"] * (torch.arange(inputs["tool_mask"].size(1)) < 3)  # of latents alone
    loss = loss_of(trainer, inputs)
    torch.testing.assert_close(loss, -inputs["advantages"].mean())  # as if the ratio were 1
    names, parameters = zip(*trainer.model.named_parameters(), strict=True)
    gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
    trainer._scoring = None
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    scores, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, inputs["completion_ids"].size(1))
    reinforce = -(inputs["advantages"] * scores[:, :3].mean(1)).mean()
    for name, own, expected in zip(
        names, gradient, torch.autograd.grad(reinforce, parameters, allow_unused=True), strict=True
    ):
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-3, msg=name)


def test_hidden_states_are_no_part_of_the_loss_but_are_read(tmp_path):
    trainer = make_trainer(tmp_path, **HIDDEN)
    inputs = rollout_of(trainer)
    loss_of(trainer, inputs)
    before = inputs["old_per_token_logps"].clone()
    inputs["latent_states"] = inputs["latent_states"] + 1.0
    loss_of(trainer, inputs)
    changed = (trainer._scoring.logps - before).abs() > 1e-4
    assert changed[:, 3:][inputs["completion_mask"][:, 3:].bool()].any()  # what follows them is read off them
    assert not inputs["tool_mask"][:, :5].any()


@pytest.mark.parametrize("mode", ["include", "exclude"])
def test_invalid_samples_are_those_that_had_to_be_ended(tmp_path, mode):
    kwargs = {"invalid_samples": mode, "first_latent_selection": False}
    trainer = make_trainer(tmp_path, **{**LATENT_GRPO, **kwargs})
    inputs = rollout_of(trainer, ("A12", "C123456"))
    is_valid = trainer._thoughts.has_ended.view(2, 8)
    assert is_valid.any() and not is_valid.all()
    expected = group_advantages(trainer._rewards.view(2, 8), is_valid, mode).flatten()
    assert torch.equal(inputs["advantages"], expected)
    assert list(trainer._logs["advantages"])[-8:] == expected.tolist()[-8:]
    fraction = is_valid.float().mean().item()
    assert trainer._metrics["train"]["latent/ended_fraction"] == [pytest.approx(fraction)]


@pytest.mark.parametrize("method", METHODS)
def test_groups_whose_rewards_are_alike_are_drawn_anew(tmp_path, method):
    calls, alike = [], {"A1": 1, "B3": 0, "C12": 2}  # how often the rewards of a question are

    def reward(prompts, completion_ids, **kwargs):
        calls.append((sorted(set(prompts)), completion_ids))
        kwargs["log_extra"]("ids", completion_ids)
        return [float(i % 2) if len(calls) > alike[prompt] else 0.0 for i, prompt in enumerate(prompts)]

    kwargs = {"max_redraws": 5, "per_device_train_batch_size": 24, **METHODS[method]}
    trainer = make_trainer(tmp_path, reward_funcs=reward, **kwargs)
    inputs = rollout_of(trainer, tuple(alike))
    assert [prompts for prompts, _ in calls] == [["A1", "B3", "C12"], ["A1", "C12"], ["C12"]]
    answers = [*calls[1][1][:8], *calls[0][1][8:16], *calls[2][1]]
    lengths, end = inputs["latent_lengths"].tolist(), trainer.thinker.end_ids
    completions = [[0] * n + end + answer for n, answer in zip(lengths, answers, strict=True)]
    masks = inputs["completion_mask"].bool()
    assert [row[mask].tolist() for row, mask in zip(inputs["completion_ids"], masks, strict=True)] == completions
    assert trainer._rewards.tolist() == [0.0, 1.0] * 12
    assert list(trainer._logs["extra"]["ids"]) == answers
    assert trainer._metrics["train"]["redrawn_groups"] == [1.0]
    assert torch.isfinite(loss_of(trainer, inputs))
    inputs["rollout_step"] += 1
    loss_of(trainer, inputs)
    assert torch.equal(trainer._scoring.old_logps, trainer._scoring.logps)  # of the latents that were drawn last
    if "old_per_token_logps" in inputs:
        torch.testing.assert_close(trainer._scoring.logps * masks, inputs["old_per_token_logps"] * masks)


def test_an_end_marker_of_the_models_own_may_count_in_the_loss(tmp_path):
    of_markers = {}
    for counts in (False, True):
        trainer = make_trainer(tmp_path, **LATENT_GRPO, end_marker_in_loss=counts)
        inputs = rollout_of(trainer)
        own = trainer._thoughts.has_ended
        assert 0 < own.sum() < len(own)
        places = inputs["latent_lengths"].unsqueeze(1)
        of_markers[counts] = inputs["tool_mask"].gather(1, places).squeeze(1)
        assert of_markers[counts].tolist() == (own.long() * counts).tolist()
        assert inputs["completion_ids"].gather(1, places).unique().tolist() == trainer.thinker.end_ids
        assert torch.isfinite(loss_of(trainer, inputs))


def test_embeddings_and_head_may_stay_as_they_are(tmp_path):
    trainer = make_trainer(tmp_path, **LATENT_GRPO, freeze_embeddings=True)
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and not moved & {"model.embed_tokens.weight", "lm_head.weight"}


def test_groups_that_span_processes_cannot_be_drawn_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(SoftTokenGRPOConfig, "world_size", 2)
    kwargs = {"per_device_train_batch_size": 4, "num_generations": 8, "bf16": False, "use_cpu": True}
    SoftTokenGRPOConfig(str(tmp_path), **kwargs)
    with pytest.raises(
        ValueError, match=r"`max_redraws=1` draws whole groups anew, so .* got 4, must be a multiple of"
    ):
        SoftTokenGRPOConfig(str(tmp_path), max_redraws=1, **kwargs)


def test_thoughts_with_other_rows():
    thoughts, others = (
        Thoughts({"states": torch.full((2, n, 3), float(n))}, torch.tensor([n, n]), torch.tensor([n > 2] * 2))
        for n in (2, 3)
    )
    both = thoughts.with_rows(others, [(1, 0)])
    assert both.lengths.tolist() == [2, 3] and both.has_ended.tolist() == [False, True]
    assert both.latents["states"][:, :, 0].tolist() == [[2.0, 2.0, 0.0], [3.0, 3.0, 3.0]]
    assert thoughts.latents["states"].shape == (2, 2, 3) and torch.equal(
        thoughts.with_rows(others, []).lengths, thoughts.lengths
    )


@pytest.mark.parametrize("num_iterations", [1, 2])  # with and without old scores of TRL's own
def test_the_first_latent_has_one_positive_sample_per_group(tmp_path, num_iterations):
    trainer = make_trainer(tmp_path, **LEPO, first_latent_selection=True, num_iterations=num_iterations)
    inputs = rollout_of(trainer)
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).view(2, 8, -1)
    scores = inputs["old_per_token_logps"].view(2, 8, -1)
    expected = select_first_latent(inputs["completion_advantages"].view(2, 8), scores, mask)
    torch.testing.assert_close(inputs["advantages"], expected.flatten(0, 1))
    assert ((inputs["advantages"][:, 0].view(2, 8) > 0).sum(1) == 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_training_changes_the_model_and_saves_how_it_thinks(tmp_path, method):
    trainer = make_trainer(tmp_path, **METHODS[method])
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert all(torch.isfinite(torch.tensor(history(trainer, "loss"))))
    assert any(not torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert all(torch.equal(saved.state_dict()[n], t) for n, t in trainer.model.state_dict().items())
    assert ThinkingConfig.from_pretrained(str(tmp_path / "run")) == trainer.args.thinking_config()
    assert ThinkingReasoner.from_pretrained(str(tmp_path / "run")).engine.max_new_tokens == 4  # as it was trained with


@pytest.mark.parametrize("method", ["latent_grpo", "hidden states"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, method):
    kwargs = {**METHODS[method], "max_steps": 6}
    straight = make_trainer(tmp_path / "a", **kwargs)
    straight.train()
    make_trainer(tmp_path / "b", save_strategy="steps", save_steps=3, **kwargs).train()  # in the middle of a rollout
    resumed = make_trainer(tmp_path / "b", **kwargs)
    checkpoint = tmp_path / "b" / "run" / "checkpoint-3"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert history(resumed, "loss") == history(straight, "loss")
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    (checkpoint / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="is damaged: `model.safetensors` has 3 bytes"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"])
def test_every_loss_type_of_trl_works(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, **LEPO, loss_type=loss_type, max_steps=2, first_latent_selection=True)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(history(trainer, "loss"))))
    assert max(history(trainer, "grad_norm")) > 0


def test_a_model_in_memory_is_its_own_reference(tmp_path):
    model = undecided_model()
    model.save_pretrained(tmp_path / "before")
    for name in ("", str(tmp_path / "before")):  # whose weights are others by now
        model.config.name_or_path = name
        with torch.no_grad():
            model.model.norm.weight += 0.5
        start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        trainer = make_trainer(tmp_path, model, **EXACT, beta=0.04)
        trainer.train()
        assert history(trainer, "kl")[0] == pytest.approx(0, abs=1e-6) and history(trainer, "kl")[-1] > 1e-6
        assert all(torch.equal(start[key], tensor) for key, tensor in trainer.ref_model.state_dict().items())


@pytest.mark.parametrize("first_method", ["exact", "hidden states"])
def test_the_reference_of_a_second_round_does_not_move_with_the_model(tmp_path, first_method):
    model = undecided_model()
    add_hidden_thoughts(model)  # as after `CoconutSFTTrainer`
    make_trainer(tmp_path, model, **METHODS[first_method], max_steps=1).train()
    trainer = make_trainer(tmp_path, model, **EXACT, beta=0.04)
    trainer.train()
    assert history(trainer, "kl")[0] == pytest.approx(0, abs=1e-6) and history(trainer, "kl")[-1] > 1e-6


def test_an_entropy_bonus_has_a_gradient(tmp_path):
    gradients = []
    for entropy_coef in (0.0, 5.0):
        trainer = make_trainer(tmp_path, **EXACT, entropy_coef=entropy_coef)
        torch.manual_seed(0)
        loss_of(trainer, rollout_of(trainer)).backward()
        gradients.append(trainer.model.model.norm.weight.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_iterations": 4}, "num_iterations"),
        ({"num_generations": 4}, "num_generations"),
        ({"steps_per_generation": 2}, "steps_per_generation"),
        ({"soft_token_temperature": 0.4}, "soft_token_temperature"),
        ({"num_latents": 2}, "num_latents"),
        ({"beta": 0.1}, "loss_terms"),
        ({"soft_token_score": "latent_grpo"}, "soft_token_score"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, change, named):
    make_trainer(tmp_path, **EXACT, max_steps=1, save_strategy="steps", save_steps=1).train()
    trainer = make_trainer(tmp_path, **{**EXACT, **change})
    with pytest.raises(ValueError, match=f"was written by another run: `{named}` was"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


@pytest.mark.parametrize("method", ["exact", "latent_grpo", "hidden states"])
def test_an_adapter_learns_and_is_its_own_reference(tmp_path, method):
    kwargs = {"trainer_kwargs": {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"])}, "beta": 0.04}
    trainer = make_trainer(tmp_path, **METHODS[method], **kwargs)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert history(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(frozen[n], p) for n, p in trainer.model.named_parameters() if n in frozen)
    trainer.save_model()
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert (tmp_path / "run" / "thinking_config.json").exists()


def test_an_adapter_finds_its_base_model_from_anywhere(tmp_path, monkeypatch):
    random_main_model().save_pretrained(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    peft_config = LoraConfig(target_modules=["q_proj"])
    trainer = make_trainer(tmp_path, "base", trainer_kwargs={"peft_config": peft_config})
    trainer.save_model()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(ThinkingReasoner.from_pretrained(str(tmp_path / "run")).generate(["A12"]).texts) == 1


def test_gradient_checkpointing_changes_nothing(tmp_path):
    losses = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, **EXACT, gradient_checkpointing=checkpointing)
        trainer.train()
        losses.append(history(trainer, "loss") + history(trainer, "grad_norm"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_evaluation_reports_the_held_out_reward(tmp_path):
    trainer = make_trainer(tmp_path, **LEPO, trainer_kwargs={"eval_dataset": tiny_dataset(8, 1, held_out=True)})
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_reward"]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model": random_main_model(vocab_size=20)}, "`processing_class` has 25 tokens, but LlamaForCausalLM has"),
        ({"num_latents": 0}, "`num_latents` must be at least 1, got 0"),
        (
            {"num_latents": 30, "max_completion_length": 32},
            "A prompt of 3 tokens, a thought of 30 with its markers (`num_latents`) and an answer of up to 32 "
            "(`max_completion_length`) together exceed the model's 64 positions",
        ),
        ({"train_dataset": LONG}, "A prompt of 60 tokens"),
        ({"train_dataset": LONG.to_iterable_dataset()}, "A prompt of 60 tokens"),
        ({"trainer_kwargs": {"eval_dataset": {"long": LONG}}}, "A prompt of 60 tokens"),
        ({"generation_kwargs": {"num_beams": 2}}, "`generation_kwargs` must not set num_beams"),
        (
            {"generation_kwargs": {"temperature": 0.5}},
            "`generation_kwargs` must not set temperature",
        ),
        ({"generation_kwargs": {"repetition_penalty": 2}}, "`generation_kwargs` must not set repetition_penalty"),
        ({"soft_token_temperature": 0.0}, "`soft_token_temperature` must be a positive number, got 0.0"),
        ({"latent_top_k": 100}, "`latent_top_k` must be at most the vocabulary's 25 tokens, got 100"),
        ({"soft_token_score": "mine"}, "`soft_token_score` must be one of exact, lepo, latent_grpo, got 'mine'"),
        ({**EXACT, "latent_top_k": 5}, "so `latent_top_k` must be None, got 5"),
        ({**EXACT, "one_sided_noise": True}, "so `one_sided_noise` must be False, got True"),
        ({"end_marker_in_loss": True}, "`end_marker_in_loss=True` needs `stop_at_end_marker=True`, got False"),
        ({"max_redraws": -1}, "`max_redraws` must be at least 0, got -1"),
        ({**LEPO, "beta": 0.1}, "`beta=0.1` with `soft_token_score='lepo'`: its latents have no ratio"),
        (
            {**HIDDEN, "one_sided_noise": True},
            "`one_sided_noise=True` has no meaning for `latent_type='hidden_states'`",
        ),
        ({**HIDDEN, "first_latent_selection": True}, "`first_latent_selection=True` has no meaning for"),
        ({"stop_at_end_marker": True}, "`stop_at_end_marker=True` needs an `end_marker`"),
        ({"end_marker": "<|end-latent|>"}, "`end_marker` must be text that the tokenizer knows"),
        ({"use_vllm": True}, "`use_vllm=True` has no meaning for `SoftTokenGRPOTrainer`"),
        ({**EXACT, "invalid_samples": "exclude"}, "`invalid_samples='exclude'` needs `stop_at_end_marker=True`"),
        ({**LEPO, "one_sided_noise": True}, "`one_sided_noise=True` is Latent-GRPO's"),
        ({**HIDDEN, "soft_token_score": "exact"}, "`soft_token_score='exact'` has no meaning for"),
        ({"invalid_samples": "drop"}, "`invalid_samples` must be one of keep, include, exclude, got 'drop'"),
        ({"trainer_kwargs": {"tools": [print]}}, "`tools` has no meaning for `SoftTokenGRPOTrainer`"),
        ({"train_dataset": tiny_dataset(4, 0).add_column("image", ["x"] * 4)}, "`train_dataset` has a column 'image'"),
    ],
)
def test_bad_input_is_named(tmp_path, kwargs, message):
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, **kwargs)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_model_in_memory_needs_its_tokenizer_and_trls_configuration_is_not_ours(tmp_path):
    with pytest.raises(ValueError, match="`processing_class` must be given"):
        SoftTokenGRPOTrainer(
            random_main_model(), length_reward, SoftTokenGRPOConfig(str(tmp_path), bf16=False), tiny_dataset(4, 0)
        )
    with pytest.raises(ValueError, match="`args` must be a `SoftTokenGRPOConfig`, got GRPOConfig"):
        SoftTokenGRPOTrainer(
            random_main_model(), length_reward, GRPOConfig(str(tmp_path), bf16=False), tiny_dataset(4, 0)
        )


def test_scores_are_the_ones_that_are_offered():
    assert list(SOFT_TOKEN_SCORES) == ["exact", "lepo", "latent_grpo"]


@pytest.mark.parametrize("method", ["lepo", "hidden states"])
def test_a_report_is_written(tmp_path, method):
    trainer = make_trainer(tmp_path, **METHODS[method], gradient_checkpointing=True)
    trainer.add_callback(LatentReportCallback(trainer, tiny_dataset(2, 1), tiny_reward, num_samples=2))
    trainer.train()
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert "SoftTokenGRPOTrainer" in page and f"3 {trainer.args.latent_type.replace('_', ' ')}" in page
    assert {"rewards.png", "latent_map.png"} <= {path.name for path in (tmp_path / "run" / "report").iterdir()}


def test_a_mixture_of_experts_without_a_balancing_loss_is_refused_one(tmp_path):
    with pytest.raises(ValueError, match="`router_aux_loss_coef` must be 0 for a model of the family llama4_text"):
        make_trainer(tmp_path, model=tiny_family("llama4_text"))
    assert not make_trainer(tmp_path, model=tiny_family("llama4_text"), router_aux_loss_coef=0.0).aux_loss_enabled

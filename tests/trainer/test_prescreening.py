# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import copy

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import tiny_dataset
from tests.trainer.test_latent_grpo_trainer import history, length_reward, make_trainer, weights
from trl_dlr import LatentGRPOConfig
from trl_dlr.models.value_head import VALUE_HEAD_FILE, ValueHead
from trl_dlr.trainer.prescreening import Prescreener, area_under_curve, select_trajectories


# ---- Selection ----


@pytest.mark.parametrize(("selection", "num_random"), [("top", 0), ("top_random", 3), ("random", 12)])
def test_as_many_as_asked_are_chosen_and_the_best_are_among_them(selection, num_random):
    scores = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    is_decoded, is_random = select_trajectories(scores, 12, selection, seed=0)
    assert is_decoded.sum(1).tolist() == [12] * 5 and is_random.sum(1).tolist() == [num_random] * 5
    assert not (is_random & ~is_decoded).any()
    for row in range(5):  # the rest are the best of those that were not drawn
        others = scores[row][~is_random[row]].sort(descending=True).values[: 12 - num_random]
        assert torch.equal(scores[row][is_decoded[row] & ~is_random[row]].sort(descending=True).values, others)


def test_best_and_worst_are_chosen_in_equal_parts():
    scores = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    is_decoded, is_random = select_trajectories(scores, 12, "top_bottom", seed=0)
    assert is_decoded.sum(1).tolist() == [12] * 5 and is_random.sum(1).tolist() == [3] * 5
    for row in range(5):
        others = scores[row][~is_random[row]].sort(descending=True).values
        chosen = scores[row][is_decoded[row] & ~is_random[row]].sort(descending=True).values
        assert torch.equal(chosen, torch.cat([others[:5], others[-4:]]))


def test_random_places_are_uniform_over_all_trajectories():
    scores = torch.arange(8.0).expand(4, 8)
    drawn = sum(select_trajectories(scores, 4, "top_random", seed)[1].float() for seed in range(2000))
    torch.testing.assert_close(drawn / 2000, torch.full((4, 8), 1 / 8), atol=0.04, rtol=0)
    first, again, other = (select_trajectories(scores, 4, "top_random", seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_at_least_one_place_is_random_unless_only_the_best_are_wanted():
    _, is_random = select_trajectories(torch.randn(3, 8), 2, "top_random", seed=0)
    assert is_random.sum(1).tolist() == [1, 1, 1]


def test_area_under_curve():
    scores = torch.tensor([0.1, 0.4, 0.35, 0.8])
    assert area_under_curve(scores, torch.tensor([False, False, True, True])) == 0.75
    assert area_under_curve(torch.ones(4), torch.tensor([True, False, True, False])) == 0.5
    assert area_under_curve(scores, torch.ones(4, dtype=torch.bool)) is None


# ---- Value head ----


def make_prescreener():
    torch.manual_seed(0)
    return Prescreener(ValueHead(latent_size=6, state_size=8))


def rows(seed, num_rows=64):
    """Rewarded if the latents point where the question says: neither alone tells."""
    generator = torch.Generator().manual_seed(seed)
    latents, states = torch.randn(num_rows, 2, 3, generator=generator), torch.randn(num_rows, 8, generator=generator)
    return latents, states, (latents[:, 0, 0] * states[:, 0] > 0).float() * 2 - 1


def test_the_head_learns_what_is_rewarded_from_trajectory_and_question():
    prescreener = make_prescreener()
    losses = [prescreener.learn(*rows(seed), seed=seed) for seed in range(60)]
    assert losses[-1] < losses[0] - 0.3
    latents, states, rewards = rows(1000, 500)
    scores, is_rewarded = prescreener.score(latents, states), prescreener.is_rewarded(rewards)
    assert torch.equal(is_rewarded, rewards > 0)
    assert area_under_curve(scores, is_rewarded) > 0.9
    assert abs(area_under_curve(prescreener.score(latents, states.roll(1, 0)), is_rewarded) - 0.5) < 0.1


def test_rewards_of_any_range_are_scaled():
    plain, shifted = make_prescreener(), make_prescreener()
    latents, states, rewards = rows(0)
    assert plain.learn(latents, states, rewards, seed=0) == shifted.learn(latents, states, 10 + 2 * rewards, seed=0)
    assert shifted.reward_range.tolist() == [8, 12]


def test_nothing_is_learned_from_rewards_that_are_all_alike():
    prescreener = make_prescreener()
    before = weights(prescreener.head)
    latents, states, rewards = rows(0)
    assert prescreener.learn(latents, states, torch.ones_like(rewards), seed=0) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in prescreener.head.state_dict().items())


def test_a_loaded_head_goes_on_as_if_nothing_had_happened():
    straight, stopped, resumed = make_prescreener(), make_prescreener(), make_prescreener()
    for seed in range(3):
        straight.learn(*rows(seed), seed=seed)
        stopped.learn(*rows(seed), seed=seed)
    resumed.load_state_tensors({name: tensor.clone() for name, tensor in stopped.state_tensors().items()})
    global_state = torch.get_rng_state()
    assert straight.learn(*rows(3), seed=3) == resumed.learn(*rows(3), seed=3)
    assert torch.equal(global_state, torch.get_rng_state())
    for name, tensor in straight.head.state_dict().items():
        assert torch.equal(resumed.head.state_dict()[name], tensor), name


# ---- In the trainer ----


def make_screened(tmp_path, **kwargs):
    defaults = {"num_generations": 16, "per_device_train_batch_size": 32, "max_steps": 6, "num_iterations": 2}
    defaults |= {"prescreening_fraction": 0.18, "prescreening_warmup_rollouts": 1}
    return make_trainer(tmp_path, **{**defaults, **kwargs})


def test_eighteen_percent_are_decoded_after_the_warm_up(tmp_path):
    trainer = make_screened(tmp_path, num_generations=64, per_device_train_batch_size=128, max_steps=10)
    counts, decode = [], trainer.engine._decode
    trainer.engine._decode = lambda *args: counts.append(len(decoded := decode(*args))) or decoded
    trainer.train()
    assert counts == [128, 24, 24, 24, 24]  # 12 of 64
    assert abs(counts[-1] / 128 - 0.18) <= 0.01
    assert trainer.engine.num_decoded == sum(counts)
    assert history(trainer, "main_model/decoded_fraction") == [1.0] + 4 * [24 / 128]


def test_reward_functions_see_decoded_trajectories_only(tmp_path):
    seen = []

    def reward(prompts, completions, completion_ids, answer, log_extra, **kwargs):
        seen.append(list(zip(prompts, answer, strict=True)))
        assert len(completions) == len(completion_ids) == len(prompts)
        log_extra("answer", answer)
        return length_reward(completions)

    async def other_reward(completions, **kwargs):
        return [0.0 for _ in completions]

    trainer = make_screened(tmp_path, reward_funcs=[reward, other_reward], log_completions=True)
    trainer.train()
    assert [len(rows) for rows in seen] == [32, 6, 6]
    answers = {row["prompt"]: row["answer"] for row in tiny_dataset(40, 0)}
    assert all(answers[prompt] == answer for rows in seen for prompt, answer in rows)
    # The table has a row for every trajectory; those that were not decoded have no reward and no extra column
    rewards, logged = torch.tensor(trainer._logs["rewards"]["reward"])[-32:], list(trainer._logs["extra"]["answer"])
    assert (~rewards.isnan()).sum() == 6
    assert [value is None for value in logged[-32:]] == rewards.isnan().tolist()


def test_group_statistics_are_of_decoded_trajectories(tmp_path):
    trainer = make_screened(tmp_path, prescreening_warmup_rollouts=0)
    trainer.model.train()
    rows = [row for row in trainer.train_dataset.select(range(2)) for _ in range(16)]
    output = trainer._generate_and_score_completions(rows)
    rewards, is_decoded = trainer._rollout.rewards.view(2, 16), output["completion_mask"].bool().all(1).view(2, 16)
    assert torch.equal(~rewards.isnan(), is_decoded) and is_decoded.sum(1).tolist() == [3, 3]
    for group, chosen, advantages in zip(rewards, is_decoded, output["advantages"].view(2, 16), strict=True):
        expected = (group[chosen] - group[chosen].mean()) / (group[chosen].std() + 1e-4)
        torch.testing.assert_close(advantages[chosen], expected)
        assert (advantages[~chosen] == 0).all()


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_the_loss_is_a_mean_over_decoded_rows_whatever_its_type_and_wherever_they_are(tmp_path, sampling):
    settings = {"beta": 0.1, "hybrid_coef": 0.1, "prescreening_warmup_rollouts": 0}
    trainer = make_screened(tmp_path, policy_kwargs={"latent_sampling": sampling}, **settings)
    trainer.model.train()
    rows = [row for row in trainer.train_dataset.select(range(2)) for _ in range(16)]
    output = trainer._generate_and_score_completions(rows)
    trainer.state.global_step += 1  # so that the old densities are those of the rollout
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    output["old_per_token_logps"] = torch.full_like(output["completion_mask"], -5.0, dtype=torch.float)
    is_decoded = output["completion_mask"].bool().all(1)
    output["latents"] = output["latents"].masked_fill(~is_decoded[:, None, None], 100.0)

    def of(rows):
        return {name: tensor if tensor.dim() == 0 else tensor[rows] for name, tensor in output.items()}

    order = is_decoded.int().argsort(descending=True)  # the second half has nothing that was decoded
    batches = {"all": [of(order)], "decoded": [of(is_decoded)], "halves": [of(part) for part in order.split(16)]}
    for trainer.loss_type in ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"):
        gradients = {}
        for name, parts in batches.items():
            trainer.model.zero_grad()
            trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = len(parts)
            for part in parts:
                trainer._compute_loss(trainer.model, copy.copy(part)).backward()
            gradients[name] = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        if trainer.loss_type == "bnpo":  # which is, by its definition, a mean over a micro-batch
            del gradients["halves"]
        assert all(gradient.abs().max() > 0 for gradient in gradients["all"].values())
        for name, gradient in gradients["all"].items():
            for other in gradients.values():
                torch.testing.assert_close(other[name], gradient, msg=f"{trainer.loss_type}, {name}")


def test_a_batch_without_decoded_rows_has_zero_gradients_rather_than_none(tmp_path):
    # Pieces of 4 rows of groups of 16, of which 3 are decoded
    trainer = make_screened(
        tmp_path, per_device_train_batch_size=4, steps_per_generation=8, prescreening_warmup_rollouts=0, max_steps=8
    )
    trainer.train()
    assert trainer.state.global_step == 8 and history(trainer, "skipped_steps") == [0.0] * 8


def test_the_contrastive_loss_is_of_all_trajectories(tmp_path):
    trainer = make_screened(tmp_path, gamma=0.1, prescreening_warmup_rollouts=0)
    scored, score = [], trainer._score
    trainer._score = lambda *args: scored.append(int(args[5].sum())) or score(*args)
    trainer.train()
    assert set(scored) == {32, 6}  # every trajectory in a loss, the decoded ones before it
    assert all(value > 0 for value in history(trainer, "latent/contrastive"))


def test_metrics_tell_random_from_chosen_and_lengths_are_of_decoded_completions(tmp_path):
    trainer = make_screened(tmp_path, max_steps=12)
    lengths, decode = [], trainer.engine.generate
    trainer.engine.generate = lambda *args: lengths.append(list(map(len, out := decode(*args)))) or out
    trainer.train()
    for name, figure in (("min", min), ("mean", lambda rows: sum(rows) / len(rows)), ("max", max)):
        assert history(trainer, f"completions/{name}_length") == pytest.approx([figure(rows) for rows in lengths])
    for name in ("auc_random", "auc_selected"):
        assert all(0 <= value <= 1 for value in history(trainer, f"prescreening/{name}")), name
    assert len(history(trainer, "prescreening/reward_random")) == 6
    assert len(history(trainer, "prescreening/reward_selected")) == 5  # none during the warm-up
    assert len(history(trainer, "prescreening/loss")) >= 5


def test_evaluation_decodes_everything(tmp_path):
    trainer = make_screened(
        tmp_path, trainer_kwargs={"eval_dataset": tiny_dataset(4, 1)}, per_device_eval_batch_size=32, max_steps=4
    )
    trainer.train()
    before = trainer.engine.num_decoded
    metrics = trainer.evaluate()
    assert trainer.engine.num_decoded - before == 4 * 16
    assert metrics["eval_main_model/decoded_fraction"] == 1.0


@pytest.mark.parametrize("stop", [4, 5])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, stop):
    straight = make_screened(tmp_path / "a", max_steps=8)
    straight.train()
    interrupted = make_screened(tmp_path / "b", max_steps=8, save_strategy="steps", save_steps=stop)
    interrupted.train()
    resumed = make_screened(tmp_path / "b", max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "run" / f"checkpoint-{stop}"))
    for model in ("model", "prescreener.head"):
        expected, actual = (
            weights(trainer.model if model == "model" else trainer.prescreener.head) for trainer in (straight, resumed)
        )
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items()), model
    assert history(resumed, "loss") == history(straight, "loss")
    assert history(resumed, "prescreening/loss")
    assert history(resumed, "prescreening/loss") == history(straight, "prescreening/loss")


def test_the_best_policy_comes_back_with_its_value_head(tmp_path):
    rewards = iter([2.0, 1.0])  # of two evaluations, after two and four steps
    trainer = make_screened(
        tmp_path,
        trainer_kwargs={"eval_dataset": tiny_dataset(2, 1)},
        per_device_eval_batch_size=32,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="reward",
    )
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_reward": next(rewards)}
    trainer.train()
    best = tmp_path / "run" / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    for folder, is_best in ((best, True), (tmp_path / "run" / "checkpoint-4", False)):
        saved = load_file(folder / VALUE_HEAD_FILE)
        assert all(torch.equal(saved[n], t) for n, t in weights(trainer.prescreener.head).items()) == is_best


def test_a_checkpoint_without_a_value_head_is_refused(tmp_path):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer = make_trainer(tmp_path, max_steps=4, prescreening_fraction=0.5)
    with pytest.raises(
        ValueError,
        match="checkpoint-2` was written by another run: `prescreening` was False in its run, and is True now",
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_the_saved_policy_has_its_value_head_beside_it(tmp_path):
    trainer = make_screened(tmp_path)
    trainer.save_model(tmp_path / "policy")
    assert (tmp_path / "policy" / VALUE_HEAD_FILE).is_file()
    assert not (tmp_path / "policy" / "extra_state_0.safetensors").exists()


@pytest.mark.parametrize(
    ("fraction", "num_generations", "expected"), [(0.18, 64, 12), (0.18, 32, 6), (0.07, 100, 7), (1.0, 8, 8)]
)
def test_the_number_that_is_decoded(tmp_path, fraction, num_generations, expected):
    args = LatentGRPOConfig(
        str(tmp_path),
        prescreening_fraction=fraction,
        num_generations=num_generations,
        per_device_train_batch_size=num_generations,
        bf16=False,
    )
    assert args.num_decoded == expected

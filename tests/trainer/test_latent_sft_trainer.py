# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import copy
import json
import logging

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from transformers import EarlyStoppingCallback
from trl import TrlParser

from tests.tiny import random_main_model, tiny_dataset, tiny_reward, tiny_tokenizer
from tests.trainer.test_latent_grpo_trainer import gpt2, history, make_policy, make_trainer, weights
from trl_dlr import LatentPolicyModel, LatentSFTConfig, LatentSFTTrainer
from trl_dlr.models.loading import load_policy
from trl_dlr.trainer.curriculum import keep_after_stage


def with_completions(dataset):
    return dataset.map(lambda row: {"completion": f"={row['answer']}"})


def with_steps(num_rows=8):
    rows = [
        {"prompt": f"A{i}{i}", "steps": [f"{i}+{i}", f"{i}-1", "12"][: 2 + i % 2], "completion": f"={i}"}
        for i in range(num_rows)
    ]
    return Dataset.from_list(rows)


def make_sft_trainer(folder, model=None, main_model=None, train_dataset=None, trainer_kwargs=None, **kwargs):
    main_model = random_main_model() if main_model is None else main_model
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "max_completion_length": 3, "logging_steps": 1}
    defaults |= {"num_latents": 3, "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    return LatentSFTTrainer(
        model=make_policy(main_model) if model is None else model,
        main_model=main_model,
        args=LatentSFTConfig(str(folder / "run"), **{**defaults, "disable_tqdm": True, **kwargs}),
        train_dataset=with_completions(tiny_dataset(16, 0)) if train_dataset is None else train_dataset,
        **{
            "processing_class": tiny_tokenizer(),
            "main_processing_class": tiny_tokenizer(),
            "reward_func": tiny_reward,
            **(trainer_kwargs or {}),
        },
    )


def batch_of(trainer, rows):
    dataset = trainer.train_dataset
    return trainer.data_collator([dataset[row] for row in rows])


# ---- Prompts ----


def test_templates_are_given_what_the_policy_was_trained_with(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ ending }}"
    chats = {"processing_class": tokenizer, "main_processing_class": tokenizer}
    rows = [{"prompt": [{"role": "user", "content": "A12"}], "completion": "=3"}] * 2
    kwargs = {"train_dataset": Dataset.from_list(rows), "trainer_kwargs": chats}
    trainer = make_sft_trainer(tmp_path, chat_template_kwargs='{"ending": "++"}', **kwargs)
    row = trainer.train_dataset[0]
    assert row["assistant_ids"] == row["prompt_ids"] == tokenizer("A12++")["input_ids"]
    trainer.save_model()
    policy = LatentPolicyModel.from_pretrained(tmp_path / "run")
    assert policy.config.chat_template_kwargs == {"ending": "++"}
    # Reinforcement learning goes on with them, unless it is told otherwise
    going_on = {"model": policy, "train_dataset": kwargs["train_dataset"], "trainer_kwargs": chats}
    assert make_trainer(tmp_path, **going_on)._tokenize_prompts([rows[0]["prompt"]])[0] == [row["prompt_ids"]]
    make_trainer(tmp_path, chat_template_kwargs={"ending": "-"}, **going_on)
    assert policy.config.chat_template_kwargs == {"ending": "-"}


# ---- Rows ----

LONG = [{"prompt": "A" * n, "completion": "=1"} for n in (3, 4, 5, 58, 59, 70)]  # and 3 latents, "=", "1" and an end


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("kwargs", "lengths", "limit"),
    [
        ({"max_length": 10}, [3, 4], "`max_length=10` tokens or the main model's positions"),
        ({"max_length": None}, [3, 4, 5, 58], "the main model's positions or the assistant's positions"),
        ({"n_positions": 6}, [3, 4], "the assistant's positions"),
    ],
)
def test_rows_longer_than_a_limit_are_left_out(tmp_path, caplog, kwargs, lengths, limit, streamed):
    kwargs, main_model = dict(kwargs), random_main_model()
    if "n_positions" in kwargs:  # of which the last latent takes none
        kwargs["model"] = make_policy(main_model, assistant=gpt2(n_positions=kwargs.pop("n_positions")))
    rows = Dataset.from_list(LONG)
    logger = logging.getLogger("trl_dlr.trainer.curriculum")
    logger.addHandler(caplog.handler)
    trainer = make_sft_trainer(
        tmp_path, main_model=main_model, train_dataset=rows.to_iterable_dataset() if streamed else rows, **kwargs
    )
    logger.removeHandler(caplog.handler)
    assert [len(row["prompt"]) for row in trainer.train_dataset] == lengths
    if not streamed:
        number = len(LONG) - len(lengths)
        assert any(f"{number} of 6 rows of `train_dataset`" in text and limit in text for text in caplog.messages)
        with pytest.raises(ValueError, match="Every row of `train_dataset` is longer than .*positions"):
            make_sft_trainer(tmp_path, main_model=main_model, train_dataset=rows.select([5]))
        with pytest.raises(ValueError, match="A prompt of 58 tokens.*8 new tokens.*64 positions"):
            held_out = {"trainer_kwargs": {"eval_dataset": rows}, "max_completion_length": 8}
            make_sft_trainer(tmp_path, main_model=main_model, train_dataset=rows, max_length=None, **held_out)


def test_a_stream_is_trained_on_in_its_order(tmp_path):
    rows = [{"question": row["prompt"], "answer": f"={row['answer']}"} for row in tiny_dataset(16, 0)]
    stream = IterableDataset.from_generator(lambda: iter(rows))  # whose columns only its rows show
    trainer = make_sft_trainer(tmp_path, train_dataset=stream, max_steps=6)  # of 4 rows: more than it has
    renamed = [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    expected = batch_of(make_sft_trainer(tmp_path, train_dataset=Dataset.from_list(renamed)), range(4))
    first = next(iter(trainer.get_train_dataloader()))
    assert first.keys() == expected.keys() and all(torch.equal(first[name], expected[name]) for name in first)
    trainer.train()
    assert len(history(trainer, "loss")) == 6


def test_a_stream_has_no_stages_and_is_not_answered(tmp_path):
    stream = with_steps().to_iterable_dataset()
    with pytest.raises(
        ValueError, match="`train_dataset` must be a `datasets.Dataset`, got IterableDataset. Stages co"
    ):
        make_sft_trainer(tmp_path, train_dataset=stream, num_stages=3, latents_per_stage=1)
    with pytest.raises(
        ValueError, match="`eval_dataset` must be a `datasets.Dataset`, got IterableDataset. All of it"
    ):
        make_sft_trainer(tmp_path, trainer_kwargs={"eval_dataset": stream})


# ---- Loss ----


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_the_loss_is_the_main_models_likelihood_of_the_completion(tmp_path, sampling):
    rows = [{"prompt": "A12", "completion": "=3"}, {"prompt": "B1", "completion": "=12+4"}]
    policy = make_policy(random_main_model(), latent_sampling=sampling)
    kwargs = {"train_dataset": Dataset.from_list(rows), "mean_bound": 0.0}
    trainer = make_sft_trainer(tmp_path, model=policy, **kwargs)
    policy.draw_noise = torch.zeros
    trainer.model.eval()
    tokenizer, main_model = tiny_tokenizer(), trainer.main_model
    total, num_tokens = 0.0, 0
    for row in rows:  # each on its own, without padding
        prompt = tokenizer(row["prompt"], return_tensors="pt")
        latents = policy.sample(**prompt, deterministic=True).latents
        target = tokenizer(row["completion"], return_tensors="pt")["input_ids"]
        target = torch.cat([target, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
        embed = main_model.get_input_embeddings()
        parts = [embed(prompt["input_ids"]), policy.inject(latents), embed(target)]
        logits = main_model(inputs_embeds=torch.cat(parts, dim=1)).logits[0, -target.size(1) - 1 : -1]
        total += cross_entropy(logits, target[0], reduction="sum").item()
        num_tokens += target.size(1)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, [0, 1]))
    assert loss.item() == pytest.approx(total / num_tokens, rel=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"gradient_checkpointing": True}, {"policy": {"latent_sampling": "parallel"}}])
def test_gradients_reach_every_part_of_the_policy_and_none_the_main_model(tmp_path, kwargs):
    kwargs = dict(kwargs)
    main_model = random_main_model()
    policy = make_policy(main_model, injection="trained", learn_sigma=True, **kwargs.pop("policy", {}))
    trainer = make_sft_trainer(tmp_path, model=policy, main_model=main_model, **kwargs)
    trainer.model.train()
    if kwargs:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.compute_loss(trainer.model, batch_of(trainer, range(4))).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in main_model.parameters())


def test_checkpointing_changes_no_gradient(tmp_path):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        # Checkpointing puts the main model into training mode
        main_model = random_main_model(attention_dropout=0.5)
        models = {"model": make_policy(random_main_model()), "main_model": main_model}
        trainer = make_sft_trainer(tmp_path, gradient_checkpointing=checkpointing, **models)
        trainer.model.train()
        if checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        trainer.compute_loss(trainer.model, batch_of(trainer, range(4))).backward()
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_the_main_model_stays_as_it_is_and_only_the_policy_is_saved(tmp_path):
    main_model = random_main_model()
    before = weights(main_model)
    trainer = make_sft_trainer(tmp_path, main_model=main_model, save_strategy="steps", save_steps=2)
    policy_before = weights(trainer.model)
    trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in main_model.state_dict().items())
    assert not main_model.training
    assert any(not torch.equal(policy_before[n], tensor) for n, tensor in trainer.model.state_dict().items())
    loaded = LatentPolicyModel.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert all(torch.equal(tensor, loaded.state_dict()[n]) for n, tensor in trainer.model.state_dict().items())


def test_means_beyond_the_bound_cost(tmp_path):
    policy = make_policy(random_main_model())
    with torch.no_grad():
        policy.latent_head.mean.bias.fill_(3.0)
        policy.latent_head.mean.weight.zero_()
    losses = {}
    for bound in (0.0, 1.0, 4.0):
        trainer = make_sft_trainer(tmp_path, model=copy.deepcopy(policy), mean_bound=bound)
        trainer.policy.draw_noise = torch.zeros
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        losses[bound] = trainer.compute_loss(trainer.model, batch_of(trainer, range(4))).item()
    assert losses[1.0] == pytest.approx(losses[0.0] + 4.0, rel=1e-5)  # (3 - 1)²
    assert losses[4.0] == losses[0.0]


def test_lora_trains_and_is_saved_with_its_policy(tmp_path):
    trainer = make_sft_trainer(tmp_path, trainer_kwargs={"peft_config": LoraConfig(r=2)})
    trainer.train()
    assert len(history(trainer, "loss")) == 4
    trainer.save_model(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert LatentPolicyModel.from_pretrained(config["base_model_name_or_path"])

    # Which goes on training as it is, with the trainer that comes next
    first = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer = make_trainer(tmp_path, model=str(tmp_path / "adapter"), main_model=trainer.main_model, max_steps=1)
    assert all(torch.equal(tensor, first[name]) for name, tensor in trainer.model.state_dict().items())
    trainer.train()
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, first[name])}
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)
    trainer.save_model()
    trained = trainer.model.state_dict()
    loaded = load_policy(trainer.args.output_dir).state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in loaded.items())


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, stop):
    curriculum = {"num_stages": 3, "latents_per_stage": 1, "stage_mixing": 0.5, "train_dataset": with_steps()}
    kwargs = {"max_steps": 8, "per_device_train_batch_size": 4, **curriculum}
    straight = make_sft_trainer(tmp_path / "a", **kwargs)
    straight.train()
    make_sft_trainer(tmp_path / "b", save_strategy="steps", save_steps=stop, **kwargs).train()
    resumed = make_sft_trainer(tmp_path / "b", **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "run" / f"checkpoint-{stop}"))
    assert history(resumed, "loss") == history(straight, "loss")
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


# ---- Curriculum ----


def test_stages_remove_steps_or_tokens():
    ids = torch.tensor([[5, 6, 7, 8, 9, 1], [5, 8, 9, 1, -100, -100]])
    steps = torch.tensor([[0, 0, 1, 1, -1, -1], [0, 1, -1, -1, -1, -1]])

    def kept(stages, num_stages=3, tokens=None):
        rows = keep_after_stage(ids, steps, torch.tensor(stages), num_stages, tokens)
        return [[token for token in row if token != -100] for row in rows.tolist()]

    assert kept([1, 1]) == [[7, 8, 9, 1], [8, 9, 1]]
    assert kept([2, 1]) == [[9, 1], [8, 9, 1]]
    assert kept([3, 3]) == [[9, 1], [9, 1]]
    assert kept([1, 1], num_stages=1) == [[9, 1], [9, 1]]  # the last stage leaves no step
    assert kept([1, 1], tokens=1) == [[6, 7, 8, 9, 1], [8, 9, 1]]
    assert kept([2, 2], tokens=1) == [[7, 8, 9, 1], [9, 1]]
    assert kept([1, 2], tokens=3) == [[8, 9, 1], [9, 1]]


def test_stages_switch_where_configured(tmp_path):
    seen = []
    trainer = make_sft_trainer(
        tmp_path, train_dataset=with_steps(8), num_stages=3, latents_per_stage=1, epochs_per_stage=2, max_steps=14
    )
    compute_loss = trainer.compute_loss

    def recorded(model, inputs, *args, **kwargs):
        seen.append((trainer.curriculum.stage, inputs["num_latents"].unique().tolist(), inputs["labels"].size(1)))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recorded
    trainer.train()
    assert [stage for stage, *_ in seen] == [1] * 4 + [2] * 4 + [3] * 6  # 2 steps an epoch
    assert all(latents == [stage] for stage, latents, _ in seen)
    lengths = {stage: max(length for s, _, length in seen if s == stage) for stage in (1, 2, 3)}
    assert lengths[1] > lengths[2] > lengths[3] == 1 + 3  # "=", digit, end


def test_moments_start_anew_with_a_stage(tmp_path):
    for reset in (True, False):
        trainer = make_sft_trainer(
            tmp_path,
            train_dataset=with_steps(8),
            num_stages=3,
            latents_per_stage=1,
            max_steps=3,
            reset_optimizer=reset,
        )
        trainer.train()  # two steps of stage 1, one of stage 2
        steps = [int(state["step"]) for state in trainer.optimizer.state.values()]
        assert max(steps) == (1 if reset else 3)


def test_rows_of_another_stage_have_its_latents(tmp_path):
    kwargs = {"train_dataset": with_steps(8), "num_stages": 3, "latents_per_stage": 1}
    trainer = make_sft_trainer(tmp_path, mean_bound=0.0, **kwargs)
    trainer.policy.draw_noise = torch.zeros
    trainer.model.eval()
    raw = batch_of(trainer, [0, 1])
    alone = []
    for row, stage in ((0, 1), (1, 3)):
        trainer.curriculum.stage = stage
        staged = trainer._at_stage({name: tensor[row : row + 1] for name, tensor in raw.items()})
        alone.append((trainer.compute_loss(trainer.model, dict(staged)), (staged["labels"] != -100).sum()))
    # The same two rows in one batch
    trainer.curriculum.stage = 1
    first = trainer._at_stage(raw)
    trainer.curriculum.stage = 3
    second = trainer._at_stage(raw)
    labels = torch.nn.utils.rnn.pad_sequence([first["labels"][0], second["labels"][1]], True, -100)
    mixed = {**first, "labels": labels, "num_latents": torch.tensor([1, 3])}
    expected = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, mixed), expected, atol=1e-5, rtol=1e-5)


def test_it_stops_early_on_the_accuracy_of_sampled_latents(tmp_path):
    trainer = make_sft_trainer(
        tmp_path,
        trainer_kwargs={
            "eval_dataset": with_completions(tiny_dataset(8, 1)),
            "callbacks": [EarlyStoppingCallback(early_stopping_patience=2)],
        },
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="accuracy",
        load_best_model_at_end=True,
        learning_rate=1e-8,
        max_steps=20,
    )
    trainer.train()
    assert trainer.state.global_step == 3  # the first is the best, and two after it are not better
    assert len(history(trainer, "eval_accuracy")) == 3


# ---- Bad input ----


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        ([{"text": "A1"}], {}, "`train_dataset` must have a column 'prompt' or 'question', has \\['text'\\]"),
        ([{"prompt": "A1"}], {}, "`train_dataset` must have a column 'completion' or 'answer'"),
        ([{"prompt": "A1", "completion": "1"}], {"num_stages": 3}, "must have a column 'steps', a list of texts"),
        (
            [{"prompt": "A1", "completion": "1", "steps": ["1"]}, {"prompt": "A1", "completion": "1", "steps": []}],
            {"num_stages": 3},
            "`train_dataset` has no 'steps' in 1 rows, the first is 1",
        ),
        (None, {"num_stages": 2, "num_latents": 4}, "needs a policy of 4 latents, but `model` has 3"),
    ],
)
def test_bad_data_is_refused(tmp_path, rows, kwargs, message):
    if "num_stages" in kwargs:
        kwargs = {"latents_per_stage": kwargs.get("num_latents", 3) // kwargs["num_stages"], **kwargs}
    with pytest.raises(ValueError, match=message):
        make_sft_trainer(tmp_path, train_dataset=None if rows is None else Dataset.from_list(rows), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"packing": True}, "`packing=True` has no meaning for `LatentSFTTrainer`"),
        ({"truncation_mode": "keep_end"}, "`truncation_mode='keep_end'` has no meaning.*Leave it at 'keep_start'"),
        ({"pad_to_multiple_of": 8}, "`pad_to_multiple_of=8` has no meaning.*Leave it at 'auto'"),
        ({"latent_dim": 0}, "latent_dim.*at least 1.*0"),
        ({"mean_bound": float("nan")}, "mean_bound.*at least 0.*nan"),
        ({"stage_mixing": 1.5}, "stage_mixing.*between 0 and 1.*1.5"),
        ({"curriculum_unit": "word"}, "curriculum_unit.*step, token.*word"),
        ({"epochs_per_stage": 0}, "epochs_per_stage.*at least 1.*0"),
        ({"num_stages": 3}, "`num_latents=4` must be `num_stages \\* latents_per_stage` = 3 \\* 2 = 6"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        LatentSFTConfig(str(tmp_path / "run"), bf16=False, use_cpu=True, **kwargs)


def test_command_line_reaches_the_main_models_options(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true"]
    (args,) = TrlParser(LatentSFTConfig).parse_args_and_config(
        [*arguments, "--main_model_init_kwargs", '{"dtype": "float32"}', "--mean_bound", "2"]
    )
    assert (args.main_model_init_kwargs, args.mean_bound) == ({"dtype": "float32"}, 2.0)

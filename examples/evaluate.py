# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Evaluate a saved policy over several seeds, beside the controls that say what its latents do.

    python examples/evaluate.py --policy outputs/demo --dataset_name addition
    python examples/evaluate.py --policy user/policy --dataset_name test.jsonl --num_eval_questions 1319 --num_eval_samples 16
    python examples/evaluate.py --policy user/policy --dataset_name reasoning_gym/chain_sum --untrained_policy user/start

The questions are those of `train_gsm8k.py`, and the arguments that choose them: a local file is evaluated as it is,
of anything else the held-out part. Answers to tasks of reasoning-gym, also to entries of it in a file, are judged by their
task's own `score_answer`, others by `correctness_reward`. `<output_dir>/evaluation.json` holds all figures.

That training has left the main model as it was, bit for bit: record it before, and compare after.

    python examples/evaluate.py --reference_file main_model.safetensors --dataset_name test.jsonl
    python examples/evaluate.py --reference_file main_model.safetensors --dataset_name test.jsonl --policy outputs/policy
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from train_gsm8k import ScriptArguments, load_questions, load_smollm2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_dlr import LatentPolicyConfig, LatentReasoner
from trl_dlr.cli.arguments import file_loader, load_rows, read_json
from trl_dlr.cli.parser import CommandParser
from trl_dlr.evaluation import check_main_model
from trl_dlr.evaluation.table import ROWS, evaluate_row, print_table
from trl_dlr.generation import TransformersEngine
from trl_dlr.reasoners.latent_reasoner import load_main_model, load_policy
from trl_dlr.rewards import correctness_reward, extract_answer, get_reasoning_gym_reward


@dataclass
class EvaluationArguments:
    """
    Arguments of this script.

    Args:
        untrained_policy (`str`, *optional*):
            The policy before training, for a row of its own. Without it, the row `fresh_head` stands for it: the same
            policy with a latent head drawn anew.
        output_dir (`str`, *optional*, defaults to `"outputs/evaluation"`):
            Folder of `evaluation.json`.
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2]`):
            Seeds of the latents, a run each. What does not depend on them runs once.
        k (`int`, *optional*):
            k of pass@k and majority@k. If `None`, `num_eval_samples`.
        max_new_tokens (`int`, *optional*):
            Tokens of an answer at most. If `None`, as many as the policy was trained with.
        engine (`str`, *optional*, defaults to `"transformers"`):
            What decodes: `"transformers"`, `"vllm"` or the URL of a vLLM server.
        dtype (`str`, *optional*):
            Dtype of the main model. If `None`, the one that the policy was trained with.
        reference_file (`str`, *optional*):
            Safetensors file with the main model's own answers and log-probabilities. The first run writes it, later ones
            stop if a bit differs.
    """

    untrained_policy: str | None = field(default=None, metadata={"help": "The policy before training."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder of evaluation.json."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the latents."})
    k: int | None = field(default=None, metadata={"help": "k of pass@k and majority@k; by default all samples."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of an answer at most; by default as in training."}
    )
    engine: str = field(default="transformers", metadata={"help": "transformers, vllm or the URL of a vLLM server."})
    dtype: str | None = field(default=None, metadata={"help": "Dtype of the main model; by default as in training."})
    reference_file: str | None = field(
        default=None,
        metadata={"help": "Record of the main model alone: written if missing, else compared bit for bit."},
    )

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must be at least one number, none of them twice, got {self.seeds}.")


def find_main_model(
    policy: str | None, name: str | None, dtype: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The main model that a policy was trained for, and its tokenizer; SmolLM2, as in training, if there is neither."""
    if policy is None and name is None:
        return load_smollm2(getattr(torch, dtype) if dtype else None)[:2]
    config = LatentPolicyConfig()
    if policy is not None:
        loaded = load_policy(policy)
        config = (loaded.get_base_model() if isinstance(loaded, PeftModel) else loaded).config
    return load_main_model(config, name, init_kwargs={"dtype": dtype} if dtype else None)


def load_test_questions(script_args: ScriptArguments) -> tuple[Dataset, Callable[..., list[float]]]:
    """Held-out questions, and the reward that judges answers to them."""
    is_file = file_loader(script_args.dataset_name) is not None
    if is_file and script_args.eval_dataset_name is None:
        script_args.eval_dataset_name = script_args.dataset_name
    dataset = load_questions(script_args)[1]
    entries = None
    if script_args.dataset_name.startswith("reasoning_gym/"):
        import reasoning_gym

        task = script_args.dataset_name.removeprefix("reasoning_gym/")
        size = script_args.num_train_questions + script_args.num_eval_questions
        entries = reasoning_gym.create_dataset(task, size=size, seed=0)  # whose first entries the questions are
    elif script_args.eval_dataset_name is not None:
        name = script_args.eval_dataset_name
        is_json = file_loader(name) == "json"
        rows = read_json(name) if is_json else load_rows(name, None, "train")
        if all("source_dataset" in (row.get("metadata") or ()) for row in rows):
            if not is_json:  # where all metadata have the same keys, or are texts
                raise ValueError(f"`dataset_name`: entries of reasoning-gym must be a file of JSON, got {name!r}.")
            entries = rows
    if entries is None:
        return dataset, correctness_reward
    return dataset.add_column("index", range(len(dataset))), get_reasoning_gym_reward(entries)


def main(args: EvaluationArguments, script_args: ScriptArguments) -> None:
    policy = script_args.policy
    if policy is None and args.reference_file is None:
        raise ValueError("`policy` must be set, or `reference_file` to record the main model alone.")
    accelerator = Accelerator()  # knows of processes on CPUs, which `PartialState` by itself would not
    num_samples, is_main = script_args.num_eval_samples, accelerator.is_main_process
    k = num_samples if args.k is None else args.k
    if not 1 <= k <= num_samples:
        raise ValueError(f"`k` must be between 1 and `num_eval_samples={num_samples}`, got {args.k}.")
    dataset, reward = load_test_questions(script_args)
    main_model, tokenizer = find_main_model(policy, script_args.main_model_name_or_path, args.dtype)
    main_model.to(accelerator.device)

    if args.reference_file is not None and is_main:
        alone = TransformersEngine(main_model, tokenizer, 256 if args.max_new_tokens is None else args.max_new_tokens)
        texts = [extract_answer(str(answer)) for answer in dataset["answer"]]
        is_met = check_main_model(
            alone, tokenizer, list(dataset["prompt"]), texts, args.reference_file, script_args.eval_batch_questions
        )
        print(f"Main model: {'bit-identical to' if is_met else 'recorded in'} {args.reference_file}", flush=True)

    if policy is None:
        return
    rows = [(row, policy, latents) for row, latents in ROWS.items()]
    if args.untrained_policy is not None:
        rows = [row for row in rows if row[0] != "fresh_head"] + [("untrained", args.untrained_policy, "own")]
    loaded, results = {}, {}
    for row, name_of_policy, latents in rows:
        if name_of_policy not in loaded:
            loaded[name_of_policy] = LatentReasoner.from_pretrained(
                name_of_policy,
                main_model,
                tokenizer,
                engine=args.engine,
                max_new_tokens=args.max_new_tokens,
                device=accelerator.device,
            )
        settings = args.seeds, num_samples, k, script_args.eval_batch_questions
        results[row] = evaluate_row(loaded[name_of_policy], dataset, reward, latents, row, *settings)
    if is_main:
        print_table(results)
        config = loaded[policy].policy.config
        fingerprint = {
            "main_model": main_model.config.name_or_path,
            "main_model_fingerprint": config.main_model_fingerprint,
        }
        path = Path(args.output_dir) / "evaluation.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = {**asdict(args), **asdict(script_args), **fingerprint, "num_questions": len(dataset)}
        path.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    main(*CommandParser((EvaluationArguments, ScriptArguments)).parse_args_and_config())

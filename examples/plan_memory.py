# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Say what a run of `train_gsm8k.py` takes of each GPU's memory, without a GPU and without loading a model.

The same YAML file and arguments as for training, and how many GPUs of which size:

    python examples/plan_memory.py --config examples/configs/gsm8k.yaml --gpu_memory 24

A model is built from its `config.json` alone, from the Hub or from a folder. The paper's recipe, offline:

    python examples/plan_memory.py --config examples/configs/paper_llama2_7b.yaml \
        --main_model_name_or_path examples/configs/architectures/llama2_7b \
        --model_name_or_path examples/configs/architectures/llama_1.3b \
        --num_processes 8 --zero_stage 2 --gpu_memory 40 80

Any argument of the run can be changed to see what it does, `--decoding_batch_size 16` for one. docs/memory.md has the
formula, and the plan beside measurements.
"""

import sys
from dataclasses import dataclass, field, fields

import torch
from peft import get_peft_model
from train_gsm8k import ASSISTANTS, DEMO_CONFIG, ScriptArguments, load_smollm2
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig, TrlParser, get_peft_config

from trl_dlr import LatentGRPOConfig
from trl_dlr.models import LatentPolicyConfig, LatentPolicyModel
from trl_dlr.trainer.construction import adapter_for_policy
from trl_dlr.trainer.memory_plan import MemoryPlan, plan_memory


@dataclass
class PlanArguments:
    """
    Arguments of this script.

    Args:
        zero_stage (`int`, *optional*, defaults to `0`):
            0 for one GPU or plain data parallelism, 2 for DeepSpeed ZeRO-2.
        prompt_length (`int`, *optional*, defaults to `256`):
            Tokens of the longest prompts.
        gpu_memory (`list[float]`, *optional*):
            Sizes of GPUs, in GB, to check the plan against.
    """

    zero_stage: int = field(default=0, metadata={"help": "0 for one GPU or plain data parallelism, 2 for ZeRO-2."})
    prompt_length: int = field(default=256, metadata={"help": "Tokens of the longest prompts."})
    gpu_memory: list[float] = field(default_factory=list, metadata={"help": "Sizes of GPUs, in GB, to check against."})


@dataclass
class PlannedConfig(LatentGRPOConfig):
    """
    The run's configuration, as it is on its GPUs rather than here.

    Args:
        num_processes (`int`, *optional*, defaults to `1`):
            Number of GPUs.
    """

    num_processes: int = field(default=1, metadata={"help": "Number of GPUs."})

    def __post_init__(self):
        self.use_cpu = True  # else bfloat16 would be refused where there is no GPU
        super().__post_init__()

    @property
    def world_size(self) -> int:  # which a group's size is checked against
        return self.num_processes


def build_models(
    script_args: ScriptArguments, training_args: LatentGRPOConfig, model_args: ModelConfig
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Policy and main model with the shapes that the run's have, on the meta device."""
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError(f"`model_name_or_path` must be set: {', '.join(ASSISTANTS)}, a Hub id or a path.")
    kwargs = {"dtype": "auto", **(training_args.main_model_init_kwargs or {})}
    if script_args.main_model_name_or_path is None:
        main_model = load_smollm2()[0]  # small enough to be real
    with torch.device("meta"):
        if script_args.main_model_name_or_path is not None:
            main_config = AutoConfig.from_pretrained(script_args.main_model_name_or_path)
            dtype = main_config.dtype if kwargs["dtype"] == "auto" else kwargs["dtype"]
            main_model = AutoModelForCausalLM.from_config(main_config, dtype=dtype or torch.float32)
        if name in ASSISTANTS:
            config = ASSISTANTS[name](main_model, script_args.assistant_num_layers).config
        else:
            config = AutoConfig.from_pretrained(name, revision=model_args.model_revision)
        if not isinstance(config, LatentPolicyConfig):
            hidden_size = main_model.get_input_embeddings().embedding_dim
            policy_kwargs = {"main_hidden_size": hidden_size, **training_args.policy_kwargs()}
            config = LatentPolicyConfig(assistant_config=config, **policy_kwargs)
        policy = LatentPolicyModel(config).float()
        if (peft_config := get_peft_config(model_args)) is not None:
            policy = get_peft_model(policy, adapter_for_policy(policy, peft_config))
    return policy, main_model


def print_plan(plan: MemoryPlan, gpu_memory: list[float]) -> None:
    for part in fields(plan):
        print(f"{part.name.replace('_', ' '):<20}{getattr(plan, part.name) / 1e9:>10.2f}")
    print(f"{'total peak':<20}{plan.total / 1e9:>10.2f}")
    for size in gpu_memory:
        verdict = "fits" if plan.fits(size) else "does not fit"
        print(f"{verdict} {size:g} GB ({plan.total / size / 1e7:.0f}%)")


def main(
    plan_args: PlanArguments, script_args: ScriptArguments, training_args: PlannedConfig, model_args: ModelConfig
) -> None:
    policy, main_model = build_models(script_args, training_args, model_args)
    plan = plan_memory(
        policy,
        main_model,
        training_args,
        prompt_length=plan_args.prompt_length,
        num_processes=training_args.num_processes,
        zero_stage=plan_args.zero_stage,
        main_model_bits=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None,
    )
    print(f"GB (10^9 bytes) on each of {training_args.num_processes} GPUs, ZeRO stage {plan_args.zero_stage}:")
    print_plan(plan, plan_args.gpu_memory)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not any(argument.split("=")[0] == "--config" for argument in arguments):
        arguments = ["--config", str(DEMO_CONFIG), *arguments]
    parser = TrlParser((PlanArguments, ScriptArguments, PlannedConfig, ModelConfig))
    main(*parser.parse_args_and_config(arguments))

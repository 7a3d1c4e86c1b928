# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Say what a run of `trl-dlr train` takes of each GPU's memory, from the same file and arguments, without a GPU and
without loading weights: a model is built from its `config.json` alone. Runs of other commands are not planned.

Examples:

    trl-dlr plan --config examples/configs/gsm8k.yaml --gpu_memory 24
    trl-dlr plan --config examples/configs/paper_llama2_7b.yaml --num_processes 8 --zero_stage 2 --gpu_memory 40 80

Any argument of the run can be changed to see what it does, `--decoding_batch_size 16` for one. The exit code is 1 if
the run fits none of the sizes that are given.
"""

import sys
from dataclasses import dataclass, field, fields

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig, get_peft_config

from ..memory_plan import plan_memory
from ..models import LatentPolicyConfig, LatentPolicyModel
from ..models.architectures import has_code_of_its_own
from ..models.hub import hub_arguments
from ..models.main_model import with_few_layers
from ..option_docs import described
from ..scripts.latent_grpo import LatentGRPOScriptArguments
from ..scripts.utils import ASSISTANTS, SMOLLM2, find_smollm2
from ..trainer import LatentGRPOConfig
from ..trainer.policy_training import adapter_for_policy


@described
@dataclass
class PlanArguments(LatentGRPOScriptArguments):
    """
    Arguments of the run, and what it is planned for. Of its data, nothing is needed.

    Args:
        zero_stage (`int`, *optional*, defaults to `0`):
            0 for one GPU or plain data parallelism, 2 for DeepSpeed ZeRO-2.
        prompt_length (`int`, *optional*, defaults to `256`):
            Tokens of the longest prompts.
        gpu_memory (`list[float]`, *optional*):
            Sizes of GPUs, in GB, to check the plan against.
    """

    zero_stage: int = 0
    prompt_length: int = 256
    gpu_memory: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.dataset_name = self.dataset_name or "none"
        super().__post_init__()
        if not all(size > 0 for size in self.gpu_memory):
            raise ValueError(f"`gpu_memory` must be sizes in GB above 0, got {self.gpu_memory}.")


@described
@dataclass
class PlannedConfig(LatentGRPOConfig):
    """
    The run's configuration, as it is on its GPUs rather than here.

    Args:
        num_processes (`int`, *optional*, defaults to `1`):
            Number of GPUs.
    """

    num_processes: int = 1

    def __post_init__(self):
        self.use_cpu = True  # else bfloat16 would be refused where there is no GPU
        super().__post_init__()

    @property
    def world_size(self) -> int:  # which a group's size is checked against
        return self.num_processes


ARGUMENTS = (PlanArguments, PlannedConfig, ModelConfig)
UNKNOWN_HINT = " Runs of `trl-dlr train` are planned, without arguments of accelerate but --num_processes."


def main(args: PlanArguments, training_args: PlannedConfig, model_args: ModelConfig) -> None:
    policy, main_model = shapes_of(args, training_args, model_args)
    plan = plan_memory(
        policy,
        main_model,
        training_args,
        prompt_length=args.prompt_length,
        num_processes=training_args.num_processes,
        zero_stage=args.zero_stage,
        main_model_bits=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None,
    )
    print(f"GB (10^9 bytes) on each of {training_args.num_processes} GPUs, ZeRO stage {args.zero_stage}:")
    for part in fields(plan):
        print(f"{part.name.replace('_', ' '):<20}{getattr(plan, part.name) / 1e9:>10.2f}")
    print(f"{'total peak':<20}{plan.total / 1e9:>10.2f}")
    for size in args.gpu_memory:
        # A GPU sold with N GB has about N * 2^30 bytes: 7% are left to CUDA, NCCL and the allocator's fragmentation
        verdict = "fits" if plan.total <= size * 1e9 else "does not fit"
        print(f"{verdict} {size:g} GB ({plan.total / size / 1e7:.0f}%)")
    if args.gpu_memory and plan.total > max(args.gpu_memory) * 1e9:
        sys.exit(1)


def shapes_of(
    args: PlanArguments, training_args: LatentGRPOConfig, model_args: ModelConfig
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Policy and main model with the shapes that the run's have, on the meta device."""
    model, main_model = args.policy or model_args.model_name_or_path, args.main_model_name_or_path
    if model is None:
        raise ValueError(
            f"`model_name_or_path` must be set: {', '.join(ASSISTANTS)}, a Hub id or a path. Or set `policy`."
        )
    kwargs = {"dtype": "auto", **(training_args.main_model_init_kwargs or {})}
    main_model = find_smollm2() if main_model == SMOLLM2 else main_model  # which may have to be unpacked
    with torch.device("meta"):
        hub = hub_arguments(training_args.main_model_init_kwargs, training_args.trust_remote_code)
        main_config = AutoConfig.from_pretrained(main_model, **hub)
        dtype = main_config.dtype if kwargs["dtype"] == "auto" else kwargs["dtype"]
        main_model = AutoModelForCausalLM.from_config(
            main_config, dtype=dtype or torch.float32, trust_remote_code=has_code_of_its_own(main_config)
        )
        if model in ASSISTANTS:
            config = with_few_layers(main_model, args.assistant_num_layers).config  # shapes alone: nothing is copied
        else:
            hub = hub_arguments(training_args.model_init_kwargs, training_args.trust_remote_code)
            config = AutoConfig.from_pretrained(model, **{"revision": model_args.model_revision, **hub})
        if not isinstance(config, LatentPolicyConfig):
            hidden_size = main_model.get_input_embeddings().embedding_dim
            policy_kwargs = {"main_hidden_size": hidden_size, **training_args.policy_kwargs()}
            config = LatentPolicyConfig(assistant_config=config, **policy_kwargs)
        policy = LatentPolicyModel(config).float()
        if (peft_config := get_peft_config(model_args)) is not None:
            policy = get_peft_model(policy, adapter_for_policy(policy, peft_config))
    return policy, main_model

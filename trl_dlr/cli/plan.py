# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""`trl-dlr plan`: what a run takes of each GPU's memory, without a GPU and without loading weights."""

from dataclasses import dataclass, field, fields

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig, get_peft_config

from ..memory_plan import MemoryPlan, plan_memory
from ..models import LatentPolicyConfig, LatentPolicyModel
from ..models.hub import has_code_of_its_own, hub_arguments
from ..models.main_model import with_few_layers
from ..trainer import LatentGRPOConfig
from ..trainer.policy_training import adapter_for_policy
from .arguments import ASSISTANTS
from .parser import command_parser
from .train import TrainArguments


EPILOG = """example:
  trl-dlr plan --config run.yaml --num_processes 8 --zero_stage 2 --gpu_memory 40 80

It takes the file and the arguments of `trl-dlr train`, and says how many GPUs of which size the run needs."""


@dataclass
class PlanArguments:
    """
    What the run is planned for.

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


@dataclass
class PlannedRun(TrainArguments):
    """Arguments of the run. Of its data, nothing is needed."""

    def __post_init__(self):
        self.dataset_name = self.dataset_name or "none"
        super().__post_init__()


def shapes_of(
    model: str | None,
    main_model: str | PreTrainedModel,
    assistant_num_layers: int,
    training_args: LatentGRPOConfig,
    model_args: ModelConfig,
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Policy and main model with the shapes that the run's have, on the meta device."""
    if model is None:
        raise ValueError(
            f"`model_name_or_path` must be set: {', '.join(ASSISTANTS)}, a Hub id or a path. Or `policy`."
        )
    kwargs = {"dtype": "auto", **(training_args.main_model_init_kwargs or {})}
    with torch.device("meta"):
        if isinstance(main_model, str):
            hub = hub_arguments(training_args.main_model_init_kwargs, training_args.trust_remote_code)
            main_config = AutoConfig.from_pretrained(main_model, **hub)
            dtype = main_config.dtype if kwargs["dtype"] == "auto" else kwargs["dtype"]
            main_model = AutoModelForCausalLM.from_config(
                main_config, dtype=dtype or torch.float32, trust_remote_code=has_code_of_its_own(main_config)
            )
        if model in ASSISTANTS:
            config = with_few_layers(main_model, assistant_num_layers).config  # shapes alone: nothing is copied
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


def plan_and_print(
    plan_args: PlanArguments,
    policy: PreTrainedModel,
    main_model: PreTrainedModel,
    training_args: PlannedConfig,
    model_args: ModelConfig,
) -> None:
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


def print_plan(plan: MemoryPlan, gpu_memory: list[float]) -> None:
    for part in fields(plan):
        print(f"{part.name.replace('_', ' '):<20}{getattr(plan, part.name) / 1e9:>10.2f}")
    print(f"{'total peak':<20}{plan.total / 1e9:>10.2f}")
    for size in gpu_memory:
        verdict = "fits" if plan.fits(size) else "does not fit"
        print(f"{verdict} {size:g} GB ({plan.total / size / 1e7:.0f}%)")


def run(argv: list[str], prog: str) -> None:
    parser = command_parser((PlanArguments, PlannedRun, PlannedConfig, ModelConfig), prog, __doc__, EPILOG)
    plan_args, args, training_args, model_args = parser.parse_args_and_config(argv)
    policy, main_model = shapes_of(
        args.policy or model_args.model_name_or_path,
        args.main_model_name_or_path,
        args.assistant_num_layers,
        training_args,
        model_args,
    )
    plan_and_print(plan_args, policy, main_model, training_args, model_args)

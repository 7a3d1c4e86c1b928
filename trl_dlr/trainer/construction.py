# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What a latent trainer is made of: main model, policy, tokenizers and adapters, resolved and checked before training."""

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model, parse_flag_from_env, set_seed
from datasets import Dataset
from peft import PeftConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl.data_utils import is_conversational
from trl.trainer import grpo_trainer
from trl.trainer.utils import create_model_from_path, get_callable_name, is_async_callable

from ..generation import DecodingEngine, TransformersEngine, VLLMEngine, VLLMServerEngine
from ..generation.vllm_engine import vllm_hub_arguments
from ..models import LatentPolicyConfig, LatentPolicyModel
from ..models.hub import check_location, find_file, hub_arguments
from .latent_grpo_config import LatentGRPOConfig
from .policy_arguments import LatentPolicyArguments


def assemble(
    model: str | PreTrainedModel,
    main_model: str | PreTrainedModel,
    main_processing_class: PreTrainedTokenizerBase | None,
    processing_class: PreTrainedTokenizerBase | None,
    args: LatentPolicyArguments,
    quantization_config: Any = None,
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Policy, main model, the main model's tokenizer and the assistant's, from what a user gave of them."""
    refuse_fsdp(args)
    if args.deepspeed_plugin is not None:
        from .zero2 import check_deepspeed  # imports DeepSpeed, which takes seconds

        check_deepspeed(args)
    set_seed(args.seed)  # a new policy's projection layers are random
    main_model = load_main_model(main_model, args, quantization_config)
    if main_processing_class is None:
        hub = hub_arguments(args.main_model_init_kwargs, args.trust_remote_code)
        main_processing_class = load_tokenizer(main_model, "main_processing_class", **hub)
    model = build_policy(model, main_model, main_processing_class, args)
    policy = model.get_base_model() if is_peft_model(model) else model
    if args.chat_template_kwargs is None:
        args.chat_template_kwargs = policy.config.chat_template_kwargs
    policy.config.chat_template_kwargs = args.chat_template_kwargs
    policy.config.main_model_dtype = str(main_model.dtype).removeprefix("torch.")
    policy.config.max_completion_length = args.max_completion_length
    if processing_class is None:
        hub = hub_arguments(args.model_init_kwargs, args.trust_remote_code)
        processing_class = assistant_tokenizer(policy, main_model, main_processing_class, **hub)
    return model, main_model, main_processing_class, processing_class


def refuse_fsdp(args: TrainingArguments) -> None:
    """Refuse to be sharded by FSDP, before anything is built."""
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(
            f"FSDP (`fsdp={args.fsdp!r}`, or `ACCELERATE_USE_FSDP` in the environment) is not supported: rollouts, "
            "references and checkpoints here are of a model that is whole on every process. Use DDP, or DeepSpeed ZeRO-2 "
            "(accelerate_configs/deepspeed_zero2.yaml)."
        )


def load_main_model(
    main_model: str | PreTrainedModel, args: LatentPolicyArguments, quantization_config: Any = None
) -> PreTrainedModel:
    """The main model, loaded if it is given by name. Its weights are not touched yet."""
    if isinstance(main_model, str):
        kwargs = {"dtype": "auto", "trust_remote_code": args.trust_remote_code, **(args.main_model_init_kwargs or {})}
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        check_location(main_model)
        main_model = AutoModelForCausalLM.from_pretrained(main_model, **kwargs)
        main_model.config._commit_hash = kwargs.get("revision")  # which transformers no longer notes down
        return main_model
    if quantization_config is not None:
        raise ValueError(
            "`quantization_config` applies to a main model that is loaded by name, but `main_model` is a "
            f"{type(main_model).__name__} already. Pass its name, or load it quantized yourself."
        )
    if isinstance(main_model, LatentPolicyModel) or not isinstance(main_model, PreTrainedModel):
        hint = " Merge its adapter first (`merge_and_unload`)." if is_peft_model(main_model) else ""
        raise ValueError(
            "`main_model` must be a Hub id, a path or a transformers causal LM that is frozen here, got "
            f"{type(main_model).__name__}, which is trainable or no causal LM.{hint}"
        )
    if main_model.get_output_embeddings() is None:
        raise ValueError(f"`main_model` must be a causal LM that can decode answers, got {type(main_model).__name__}.")
    return main_model


def load_causal_lm(model: str, args: TrainingArguments, quantization_config: Any = None) -> PreTrainedModel:
    """A causal LM to train, loaded with TRL's defaults. TRL itself would read its configuration from elsewhere."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.num_processes > 1:
        kwargs["device_map"] = None
    return create_model_from_path(model, AutoModelForCausalLM, **kwargs)


@contextmanager
def init_kwargs_were_used() -> Iterator[None]:
    """For a model of [`load_causal_lm`]: TRL would warn that it ignores `model_init_kwargs`."""
    logger = logging.getLogger("trl.trainer.grpo_trainer")

    def is_true(record: logging.LogRecord) -> bool:
        return "`model_init_kwargs` will be ignored" not in record.getMessage()

    logger.addFilter(is_true)
    try:
        yield
    finally:
        logger.removeFilter(is_true)


@contextmanager
def reference_is_a_copy(model: PreTrainedModel) -> Iterator[None]:
    """
    While a [`~trl.GRPOTrainer`] is built: its reference is `model` as it is. TRL would load one by the model's name, which
    one that was built in memory does not have, and which names other weights than those of one that was trained since.
    """
    load = grpo_trainer.create_model_from_path
    grpo_trainer.create_model_from_path = lambda *args, **kwargs: copy.deepcopy(model)
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = load


def load_tokenizer(model: str | PreTrainedModel, name: str, **kwargs) -> PreTrainedTokenizerBase:
    """Tokenizer saved with `model`; `name` is the argument to blame if there is none."""
    path = model if isinstance(model, str) else model.config.name_or_path
    if not path:
        raise ValueError(f"`{name}` must be given: the model was built in memory and names no tokenizer.")
    return AutoTokenizer.from_pretrained(path, padding_side="left", truncation_side="left", **kwargs)


def build_policy(
    model: str | PreTrainedModel,
    main_model: PreTrainedModel,
    main_processing_class: PreTrainedTokenizerBase,
    args: LatentPolicyArguments,
) -> PreTrainedModel:
    """The policy to train: a saved or given [`LatentPolicyModel`], or a new one around an assistant."""
    if model is main_model:
        raise ValueError(
            "`model` and `main_model` are the same object, but one is trained and the other frozen. Pass an assistant "
            "of its own, for instance `first_layers(main_model, 4)`."
        )
    init_kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if isinstance(model, str):
        check_location(model)
        config = AutoConfig.from_pretrained(model, **hub_arguments(init_kwargs))
        if config.model_type == LatentPolicyConfig.model_type:
            model = LatentPolicyModel.from_pretrained(model, **{"dtype": torch.float32, **init_kwargs})
    policy = model.get_base_model() if not isinstance(model, str) and is_peft_model(model) else model
    if not isinstance(policy, LatentPolicyModel):
        return LatentPolicyModel.from_assistant(
            model, main_model, main_processing_class, init_kwargs, **args.policy_kwargs()
        )
    policy.attach_main_model(main_model, allow_mismatch=args.allow_main_model_mismatch)
    main_storages = {parameter.data_ptr() for parameter in main_model.parameters()}
    if any(parameter.data_ptr() in main_storages for parameter in model.parameters()):
        raise ValueError(
            "`model` shares weights with `main_model`, but one is trained and the other frozen. Build the policy with "
            "`LatentPolicyModel.from_assistant`, which copies."
        )
    return model


def build_engine(
    main_model: PreTrainedModel, main_processing_class: PreTrainedTokenizerBase, args: LatentGRPOConfig
) -> DecodingEngine:
    """What decodes the answers: the main model itself, or vLLM for it (TRL's `use_vllm` and `vllm_mode`)."""
    limits = args.max_completion_length, args.generation_kwargs
    if not args.use_vllm:
        return TransformersEngine(main_model, main_processing_class, *limits, args.decoding_batch_size)
    name = main_model.config.name_or_path
    embed_tokens = main_model.get_input_embeddings()
    parts = embed_tokens, main_model.config, main_model.generation_config, main_processing_class
    if args.vllm_mode == "server":
        base_url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        return VLLMServerEngine(base_url, *parts, *limits, timeout=args.vllm_server_timeout)
    if not name:
        raise ValueError(
            "`use_vllm=True` with `vllm_mode='colocate'` loads the main model by name, but `main_model` was built in "
            "memory. Save it with `save_pretrained` and pass the path."
        )
    llm_kwargs = {
        "dtype": str(embed_tokens.weight.dtype).removeprefix("torch."),
        "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
        "tensor_parallel_size": args.vllm_tensor_parallel_size,
        "max_model_len": args.vllm_max_model_length,
        "model_impl": args.vllm_model_impl,
        "seed": args.seed,
        **vllm_hub_arguments(hub_arguments(args.main_model_init_kwargs, args.trust_remote_code)),
    }
    return VLLMEngine(name, *parts, *limits, llm_kwargs=llm_kwargs)


def assistant_tokenizer(
    policy: LatentPolicyModel, main_model: PreTrainedModel, main_processing_class: PreTrainedTokenizerBase, **hub
) -> PreTrainedTokenizerBase:
    """
    Tokenizer of the assistant if none was given: the one saved with the policy, as a [`LatentReasoner`] has it. Without one,
    its assistant's own, or the main model's for an assistant made from it.
    """
    name = policy.config.name_or_path
    source = {key: hub[key] for key in ("revision", "token", "cache_dir") if key in hub}
    if name and find_file(name, "tokenizer_config.json", **source) is not None:
        return load_tokenizer(policy, "processing_class", **hub)
    assistant_config = policy.config.assistant_config
    made_from_main = assistant_config.name_or_path == main_model.config.name_or_path
    if made_from_main and assistant_config.vocab_size == main_model.config.get_text_config().vocab_size:
        return copy.deepcopy(main_processing_class)
    return load_tokenizer(policy.assistant, "processing_class", **hub)


def adapter_for_policy(policy: LatentPolicyModel, peft_config: PeftConfig) -> PeftConfig:
    """`peft_config` aimed at the assistant, with the projection layers trained in full and saved with the adapter."""
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = None  # a latent policy is none of PEFT's tasks
    projection = [
        name
        for name, module in policy.named_children()
        if name != "assistant" and any(parameter.requires_grad for parameter in module.parameters())
    ]
    peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), *projection})
    if peft_config.target_modules is None:
        model_type = policy.config.assistant_config.model_type
        if model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
            raise ValueError(
                f"`peft_config.target_modules` must be set: PEFT knows no default for an assistant of type {model_type!r}."
            )
        peft_config.target_modules = set(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type])
    elif peft_config.target_modules == "all-linear":  # of the assistant
        linear = {name.split(".")[-1] for name, m in policy.assistant.named_modules() if isinstance(m, nn.Linear)}
        peft_config.target_modules = linear
    return peft_config


def naming_itself(reward_func: Callable) -> Callable:
    """`reward_func`, with its name in the error if it raises; the original traceback stays."""
    name = get_callable_name(reward_func)

    def error(cause: Exception) -> RuntimeError:
        return RuntimeError(f"The reward function '{name}' raised {type(cause).__name__}: {cause}")

    if is_async_callable(reward_func):

        async def wrapped(*args, **kwargs):
            try:
                return await reward_func(*args, **kwargs)
            except Exception as cause:
                raise error(cause) from cause

    else:

        def wrapped(*args, **kwargs):
            try:
                return reward_func(*args, **kwargs)
            except Exception as cause:
                raise error(cause) from cause

    functools.update_wrapper(wrapped, reward_func)
    wrapped.__name__ = name
    return wrapped


def check_optimizer(optimizer: torch.optim.Optimizer | None, main_model: PreTrainedModel) -> None:
    """Refuse an optimizer of the frozen main model's weights."""
    main_parameters = {id(parameter) for parameter in main_model.parameters()}
    groups = [] if optimizer is None else optimizer.param_groups
    if any(id(parameter) in main_parameters for group in groups for parameter in group["params"]):
        raise ValueError("`optimizers` holds weights of `main_model`, which is frozen. Give it the policy's only.")


def check_stop(policy: LatentPolicyModel, args: LatentGRPOConfig) -> None:
    """Refuse options that a learned stop, or a policy without one, has no use for."""
    if args.latent_cost > 0 and not policy.config.learn_stop:
        raise ValueError(
            f"`latent_cost={args.latent_cost}` needs a policy with `learn_stop=True`: all trajectories of `model` have "
            f"`num_latents={policy.config.num_latents}` steps, which cost the same."
        )
    if args.latent_logp_reduction == "mean" and policy.config.learn_stop:
        raise ValueError(
            "`latent_logp_reduction='mean'` would divide the log-probability of a stop by the latents' dimensions too. Use "
            "'sum' with `learn_stop=True`."
        )


def check_reduction(config: LatentPolicyConfig, latent_logp_reduction: str) -> None:
    """Refuse to divide a score that is no sum over the dimensions of a latent."""
    if latent_logp_reduction == "mean" and config.density == "soft_tokens" and config.soft_token_score != "exact":
        raise ValueError(
            "`latent_logp_reduction='mean'` divides a log-density by the size of a latent, but "
            f"`soft_token_score={config.soft_token_score!r}` is no sum over the vocabulary. Leave it at 'sum'."
        )


def check_dataset(dataset: Any, name: str) -> None:
    """Refuse columns that a text-only trainer would ignore."""
    for split in dataset.values() if isinstance(dataset, dict) else [dataset]:
        columns = getattr(split, "column_names", None) or []
        if found := {"image", "images", "environment"} & set(columns):
            raise ValueError(
                f"`{name}` has a column {sorted(found)[0]!r}, but this trainer reads text prompts alone. "
                "Remove the column."
            )


def check_chat_templates(dataset: Any, **processing_classes: PreTrainedTokenizerBase) -> None:
    """Refuse conversational prompts for a tokenizer that has no chat template."""
    first = next(iter(dataset), {}) if dataset is not None else {}
    for name, processing_class in processing_classes.items():
        if is_conversational(first) and processing_class.chat_template is None:
            raise ValueError(
                f"`{name}` has no chat template, but the prompts are conversational. Set its `chat_template`, or give "
                "prompts as text."
            )


def longest_prompts(dataset: Any, num_rows: int = 16) -> Iterable:
    """The longest prompts of a map-style dataset by characters, without tokenizing all of it."""
    if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
        return []
    return sorted(dataset["prompt"], key=lambda prompt: len(str(prompt)), reverse=True)[:num_rows]

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What a latent trainer is made of: main model, policy, tokenizers and adapters, resolved and checked before training."""

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model, parse_flag_from_env, set_seed
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftType
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from trl.trainer import grpo_trainer
from trl.trainer.utils import create_model_from_path, get_callable_name, is_async_callable

from ..generation import DecodingEngine, TransformersEngine, VLLMEngine, VLLMServerEngine
from ..generation.vllm_engine import vllm_hub_arguments
from ..models import LatentPolicyConfig, LatentPolicyModel
from ..models.hub import check_location, find_file, hub_arguments, readable_damage
from ..models.reasoner import load_policy
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
    check_adapter(model, None)
    policy = model.get_base_model() if is_peft_model(model) else model
    args.check_policy(policy.config)
    if args.chat_template_kwargs is None:
        args.chat_template_kwargs = policy.config.chat_template_kwargs
    policy.config.chat_template_kwargs = args.chat_template_kwargs
    policy.config.main_model_dtype = str(main_model.dtype).removeprefix("torch.")
    policy.config.max_completion_length = args.max_completion_length
    if processing_class is None:
        hub = hub_arguments(args.model_init_kwargs, args.trust_remote_code)
        processing_class = assistant_tokenizer(policy, main_model, main_processing_class, **hub)
    check_vocabulary(policy.assistant, processing_class, "processing_class")
    check_vocabulary(main_model, main_processing_class, "main_processing_class")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # which Trainer would align with a warning
        token = getattr(processing_class, name)
        for config in (policy.config, policy.generation_config):
            setattr(config, name, getattr(config, name, None) if token is None else token)
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
        with readable_damage(main_model):
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
    check_location(model)
    with readable_damage(model):
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
    check_location(path)
    with readable_damage(path):
        return AutoTokenizer.from_pretrained(path, padding_side="left", truncation_side="left", **kwargs)


def check_vocabulary(model: PreTrainedModel, processing_class: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer with tokens that a model has no embeddings for; `name` is the argument to blame."""
    num_embeddings = model.get_input_embeddings().weight.size(0)
    if len(processing_class) > num_embeddings:
        raise ValueError(
            f"`{name}` has {len(processing_class)} tokens, but {type(model).__name__} has embeddings for {num_embeddings}. "
            "Give the tokenizer that belongs to it, or resize the embeddings (`resize_token_embeddings`)."
        )


def build_policy(
    model: str | PreTrainedModel,
    main_model: PreTrainedModel,
    main_processing_class: PreTrainedTokenizerBase,
    args: LatentPolicyArguments,
) -> PreTrainedModel:
    """The policy to train: a saved or given [`LatentPolicyModel`] or adapter of one, or a new one around an assistant."""
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
            hub = {name: init_kwargs[name] for name in ("revision", "token", "cache_dir") if name in init_kwargs}
            if find_file(model, "adapter_config.json", **hub) is not None:
                model = load_policy(model, is_trainable=True, **hub)
            else:
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


def check_adapter(model: Any, peft_config: PeftConfig | None) -> None:
    """Refuse what is no adapter of a model's modules, or needs more than the input."""
    if peft_config is None and not isinstance(model, str) and is_peft_model(model):
        peft_config = model.active_peft_config
    if peft_config is None:
        return
    if not isinstance(peft_config, PeftConfig):
        raise ValueError(
            f"`peft_config` must be a `PeftConfig`, such as `LoraConfig`, got {type(peft_config).__name__}."
        )
    needs_more = peft_config.is_prompt_learning or peft_config.peft_type == PeftType.POLY
    if needs_more or not hasattr(peft_config, "target_modules"):
        raise ValueError(
            f"`peft_config` must be of an adapter of modules, such as `LoraConfig`, got {type(peft_config).__name__}: what "
            "is read are questions and latents, without virtual tokens, numbers of tasks or other adapters."
        )


def adapter_for_policy(policy: LatentPolicyModel, peft_config: PeftConfig) -> PeftConfig:
    """`peft_config` aimed at the assistant, with the projection layers trained in full and saved with the adapter."""
    check_adapter(policy, peft_config)
    if not hasattr(peft_config, "modules_to_save"):
        raise ValueError(
            "`peft_config` must be of an adapter that can save whole modules beside it (`modules_to_save`), such as "
            f"`LoraConfig`, got {type(peft_config).__name__}: the projection layers are trained in full."
        )
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = None  # a latent policy is none of PEFT's tasks
    projection = [
        name
        for name, module in policy.named_children()
        if name != "assistant" and any(parameter.requires_grad for parameter in module.parameters())
    ]
    peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), *projection})
    if peft_config.target_modules is None:
        model_type, tuner = (
            policy.config.assistant_config.model_type,
            PEFT_TYPE_TO_TUNER_MAPPING[peft_config.peft_type],
        )
        defaults = getattr(tuner, "target_module_mapping", {})
        if model_type not in defaults:
            raise ValueError(
                f"`peft_config.target_modules` must be set: PEFT knows no default of {type(peft_config).__name__} for an "
                f"assistant of type {model_type!r}."
            )
        peft_config.target_modules = set(defaults[model_type])
    elif peft_config.target_modules == "all-linear":  # of the assistant
        modules = policy.assistant.named_modules()
        peft_config.target_modules = {name.split(".")[-1] for name, m in modules if isinstance(m, (nn.Linear, Conv1D))}
    return peft_config


def as_reward_funcs(reward_funcs: Any) -> Any:
    """What was given as `reward_funcs`, as TRL takes it, each with its name in the error if it fails."""
    if isinstance(reward_funcs, tuple):
        reward_funcs = list(reward_funcs)
    several = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    if not several:
        raise ValueError("`reward_funcs` must hold at least one reward function, got [].")
    for reward_func in several:
        if not isinstance(reward_func, str) and not callable(reward_func):
            raise ValueError(
                "`reward_funcs` must be functions, models or names of models, one or a list of them, got "
                f"{type(reward_func).__name__}."
            )
    named = [f if isinstance(f, (str, nn.Module)) else naming_itself(f) for f in several]
    return named if isinstance(reward_funcs, list) else named[0]


def naming_itself(reward_func: Callable) -> Callable:
    """`reward_func`, with its name in the error if it raises, with its traceback, or if a reward is infinite."""
    name = get_callable_name(reward_func)

    def error(cause: Exception) -> RuntimeError:
        return RuntimeError(f"The reward function '{name}' raised {type(cause).__name__}: {cause}")

    def finite(rewards: list[float | None]) -> list[float | None]:
        if infinite := [reward for reward in rewards if reward is not None and math.isinf(reward)]:
            raise ValueError(
                f"The reward function '{name}' returned {infinite[0]}, which leaves no mean to compare with. Return a number, "
                "or None where there is no reward."
            )
        return rewards

    if is_async_callable(reward_func):

        async def wrapped(*args, **kwargs):
            try:
                rewards = await reward_func(*args, **kwargs)
            except Exception as cause:
                raise error(cause) from cause
            return finite(rewards)

    else:

        def wrapped(*args, **kwargs):
            try:
                rewards = reward_func(*args, **kwargs)
            except Exception as cause:
                raise error(cause) from cause
            return finite(rewards)

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

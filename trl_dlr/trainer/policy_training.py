# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
What all trainers of a latent policy do alike: how policy, main model and engine are built, the policy's optimizer, and
how it is saved.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.trainer import TRAINING_ARGS_NAME

from ..generation import DecodingEngine, create_engine, tokenize_prompts
from ..generation.text import check_tokenizers
from ..generation.vllm_engine import vllm_hub_arguments
from ..models import LatentPolicyConfig, LatentPolicyModel
from ..models.architectures import base_model_of
from ..models.hub import (
    DEFAULT_PROMPT,
    check_location,
    find_file,
    hub_arguments,
    location_of,
    name_or_model,
    readable_damage,
)
from ..models.loading import BASE_POLICY, load_policy, name_base_policy_beside, policy_below, reference_copy
from ..reasoners.latent_reasoner import LatentReasoner
from .arguments import LatentPolicyArguments
from .callbacks import EngineCheckCallback
from .checkpoints import whole_files
from .hub import PushesMixin, training_card
from .inputs import (
    check_adapter,
    check_chat_templates,
    check_vocabulary,
    load_tokenizer,
    longest_prompts,
    refuse_fsdp,
)
from .latent_grpo_config import LatentGRPOConfig


logger = get_logger(__name__)


class PolicyTrainingMixin(PushesMixin):
    """
    For a TRL trainer with [`CheckpointsMixin`] of a [`LatentPolicyModel`] beside a frozen `main_model`: checks the
    engine at the start, gives the projection layers their own learning rate and clipping, and saves adapters with the
    policy that they belong to.
    """

    ref_model = None
    _base_policy_state = None
    _base_policy_is_saved = False
    _dataset_name = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(EngineCheckCallback(self._check_engine))

    @property
    def policy(self) -> LatentPolicyModel:
        """The policy itself, without what wraps it for training, and without its adapter."""
        policy = self.accelerator.unwrap_model(self.model)
        return base_model_of(policy)

    @contextmanager
    def answering(self) -> Iterator[LatentReasoner]:
        """The policy and its main model as a reasoner, for as long as it answers."""
        yield LatentReasoner(self.policy, self.processing_class, self.engine, self.main_processing_class)

    @property
    def run_summary(self) -> dict[str, str]:
        """What a report says of the models."""
        config = self.policy.config
        main_model = config.main_model_name_or_path or "built in memory"
        return {"Main model": main_model, "Latents": f"{config.latents_in_words}, {config.latent_sampling}"}

    def _name_base_policy(self, policy: LatentPolicyModel, output_dir: str) -> None:
        """An adapter names its base model. If this one exists nowhere yet, `_save` writes it beside the run."""
        if not policy.config.name_or_path:
            policy.name_or_path = os.path.abspath(os.path.join(output_dir, BASE_POLICY))
            self._base_policy_state = policy.state_dict()
        else:
            policy.name_or_path = location_of(policy)

    def _check_engine(self) -> None:
        """Say in what the policy is trained, and make sure of it."""
        engine = self.model_wrapped
        if not self.is_deepspeed_enabled:
            logger.info(f"{type(engine).__name__}, {self.accelerator.num_processes} processes")
            return
        from .deepspeed import cast_like_engine, check_engine

        logger.info(check_engine(engine, self.model, self.main_model), main_process_only=False)
        if self.ref_model is not None:
            cast_like_engine(self.ref_model, engine.optimizer)

    @staticmethod
    def _is_projection(name: str) -> bool:
        return "assistant" not in name.split(".")

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        is_given, rate = self.optimizer is not None, self.args.projection_learning_rate
        optimizer = super().create_optimizer(model)
        if not is_given and rate is not None:
            named = (model or self.model).named_parameters()
            projection, groups = {id(p) for name, p in named if self._is_projection(name)}, []
            for group in optimizer.param_groups:
                for is_projection, changes in ((False, {}), (True, {"lr": rate})):
                    part = [p for p in group["params"] if (id(p) in projection) is is_projection]
                    if part:
                        groups.append({**group, "params": part, **changes})
            optimizer.param_groups = groups
        return optimizer

    def _checkpoint_record(self) -> dict[str, Any]:
        record, config = super()._checkpoint_record(), self.policy.config
        record["main_model_fingerprint"] = config.main_model_fingerprint
        of_config = {name: getattr(config, name) for name in self.args.policy_kwargs()}
        record["policy"] = {**of_config, **record["policy"]}
        return record

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        if self._base_policy_state is not None:
            with whole_files(self.policy.name_or_path) as folder:
                self.policy.save_pretrained(folder, state_dict=self._base_policy_state)
                self.processing_class.save_pretrained(folder)
            self._base_policy_state, self._base_policy_is_saved = None, True
        with whole_files(output_dir or self.args.output_dir) as folder:
            super()._save(folder, state_dict)
            os.remove(os.path.join(folder, TRAINING_ARGS_NAME))  # a pickle; the card names what it held
            if isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
                self.policy.config.save_pretrained(folder)  # for what reads a model by its configuration
            self._save_beside_policy(folder)
            self._write_card(folder)
            self._saved_names = os.listdir(folder)

    def _save_beside_policy(self, folder: str) -> None:
        """For what else a trainer has trained."""

    def _write_card(self, folder: str, tags: list[str] | None = None) -> None:
        policy, prompt = self.policy, DEFAULT_PROMPT  # not one of the dataset's, which may be private
        if isinstance(self.train_dataset, Dataset) and not isinstance(self.train_dataset[0]["prompt"], str):
            prompt = [{"role": "user", "content": DEFAULT_PROMPT}]
        card = training_card(
            self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            policy.config,
            self.args,
            self._name,
            self._paper,
            [*self._tag_names, *(tags or [])],
            is_adapter=isinstance(self.accelerator.unwrap_model(self.model), PeftModel),
            dataset_name=self._dataset_name,
            prompt=prompt,
        )
        Path(folder, "README.md").write_text(card, encoding="utf-8")

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write the card of the policy to `args.output_dir`.

        Args:
            model_name (`str`, *optional*):
                Part of TRL's signature; the card bears the name of the repository.
            dataset_name (`str`, *optional*):
                Dataset that the policy was trained on. If `None`, the one that was named before.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        if not self.is_world_process_zero():
            return
        self._dataset_name = dataset_name or self._dataset_name
        os.makedirs(self.args.output_dir, exist_ok=True)
        self._write_card(self.args.output_dir, [tags] if isinstance(tags, str) else tags)

    def _complete_for_push(self) -> None:
        """Beside an adapter that is pushed lies the policy that it belongs to, wherever that came from."""
        model, folder = self.accelerator.unwrap_model(self.model), os.path.join(self.args.output_dir, BASE_POLICY)
        if isinstance(model, PeftModel):
            if not self._base_policy_is_saved:
                with whole_files(folder) as staged:
                    policy_below(model).save_pretrained(staged)
                self._base_policy_is_saved = True
            name_base_policy_beside(self.args.output_dir, self.hub_model_id or BASE_POLICY)


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
    check_tokenizers(processing_class=processing_class, main_processing_class=main_processing_class)
    if args.deepspeed_plugin is not None:
        from .deepspeed import check_deepspeed  # imports DeepSpeed, which takes seconds

        check_deepspeed(args)
    set_seed(args.seed)  # a new policy's projection layers are random
    main_model = load_main_model(main_model, args, quantization_config)
    if main_processing_class is None:
        hub = hub_arguments(args.main_model_init_kwargs, args.trust_remote_code)
        main_processing_class = load_tokenizer(main_model, "main_processing_class", **hub)
    model = build_policy(model, main_model, main_processing_class, args)
    check_adapter(model, None)
    policy = base_model_of(model)
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


def load_main_model(
    main_model: str | PreTrainedModel, args: LatentPolicyArguments, quantization_config: Any = None
) -> PreTrainedModel:
    """The main model, loaded if it is given by name. Its weights are not touched yet."""
    main_model = name_or_model(main_model, "main_model")
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
    if isinstance(main_model, (LatentPolicyModel, PeftModel)):
        hint = " Merge its adapter first (`merge_and_unload`)." if isinstance(main_model, PeftModel) else ""
        raise ValueError(
            "`main_model` must be a Hub id, a path or a transformers causal LM that is frozen here, got "
            f"{type(main_model).__name__}, which is trainable.{hint}"
        )
    if main_model.get_output_embeddings() is None:
        raise ValueError(f"`main_model` must be a causal LM that can decode answers, got {type(main_model).__name__}.")
    return main_model


def build_policy(
    model: str | PreTrainedModel,
    main_model: PreTrainedModel,
    main_processing_class: PreTrainedTokenizerBase,
    args: LatentPolicyArguments,
) -> PreTrainedModel:
    """
    The policy to train: a saved or given [`LatentPolicyModel`] or adapter of one, or a new one around an assistant.
    """
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
    policy = base_model_of(model)
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
    parts = main_model, main_processing_class, args.max_completion_length, args.generation_kwargs
    if not args.use_vllm:
        return create_engine("transformers", *parts, batch_size=args.decoding_batch_size)
    if args.vllm_mode == "server":
        base_url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        return create_engine(base_url, *parts, timeout=args.vllm_server_timeout)
    llm_kwargs = {
        "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
        "tensor_parallel_size": args.vllm_tensor_parallel_size,
        "max_model_len": args.vllm_max_model_length,
        "model_impl": args.vllm_model_impl,
        "seed": args.seed,
        **vllm_hub_arguments(hub_arguments(args.main_model_init_kwargs, args.trust_remote_code)),
    }
    return create_engine("vllm", *parts, llm_kwargs=llm_kwargs)


def build_reference(
    model: PreTrainedModel, args: LatentGRPOConfig, peft_config: PeftConfig | None
) -> PreTrainedModel | None:
    """A frozen copy of the policy, if the KL term needs one: a new adapter is its own reference when switched off."""
    if args.beta != 0.0 and peft_config is None:
        return reference_copy(model)
    return None


def assistant_tokenizer(
    policy: LatentPolicyModel, main_model: PreTrainedModel, main_processing_class: PreTrainedTokenizerBase, **hub
) -> PreTrainedTokenizerBase:
    """
    Tokenizer of the assistant if none was given: the one saved with the policy, as a [`LatentReasoner`] has it.
    Without one, its assistant's own, or the main model's for an assistant made from it.
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
                f"`peft_config.target_modules` must be set: PEFT knows no default of {type(peft_config).__name__} for "
                f"an assistant of type {model_type!r}."
            )
        peft_config.target_modules = set(defaults[model_type])
    elif peft_config.target_modules == "all-linear":  # of the assistant
        modules = dict(policy.assistant.named_modules())
        linear = {name for name, module in modules.items() if type(module) in (nn.Linear, Conv1D)}  # no routers
        others = {name.split(".")[-1] for name in modules.keys() - linear}  # the number of a layer may be a name, too
        endings = {name: name.split(".")[-1] for name in linear}
        peft_config.target_modules = {
            f"assistant.{name}" if ending in others else ending for name, ending in endings.items()
        }
    return peft_config


def check_optimizer(
    optimizer: torch.optim.Optimizer | None, main_model: PreTrainedModel, args: LatentPolicyArguments
) -> None:
    """Refuse an optimizer of the frozen main model's weights, and a rate that one that was given would not have."""
    if optimizer is not None and args.projection_learning_rate is not None:
        raise ValueError(
            f"`projection_learning_rate={args.projection_learning_rate}` has no meaning beside `optimizers`, whose "
            "parameter groups have rates of their own. Leave either unset."
        )
    main_parameters = {id(parameter) for parameter in main_model.parameters()}
    groups = [] if optimizer is None else optimizer.param_groups
    if any(id(parameter) in main_parameters for group in groups for parameter in group["params"]):
        raise ValueError("`optimizers` holds weights of `main_model`, which is frozen. Give it the policy's only.")


def check_prompts_fit(
    policy: LatentPolicyModel,
    engine: DecodingEngine,
    processing_class: PreTrainedTokenizerBase,
    datasets: dict[str, Any],
    chat_template_kwargs: dict | None,
) -> None:
    """Refuse prompts that a tokenizer cannot render, or that leave no room for latents and completion."""
    tokenizers = {"processing_class": processing_class, "main_processing_class": engine.processing_class}
    for name, dataset in datasets.items():
        check_chat_templates(dataset, name, chat_template_kwargs, **tokenizers)
    for prompts in longest_prompts(*datasets.values()):
        length, main_length = (
            max(map(len, tokenize_prompts(prompts, tokenizer, chat_template_kwargs)))
            for tokenizer in tokenizers.values()
        )
        policy.check_length(length)
        engine.check_length(main_length, policy.config.num_latents)


def freeze_what_no_loss_reaches(policy: LatentPolicyModel, args: LatentGRPOConfig) -> None:
    """Freeze an up-projection that only the hybrid term would train: DDP would wait for its gradient."""
    is_trainable = policy.config.injection == "trained" and policy.injector.weight.requires_grad
    if is_trainable and args.hybrid_coef == 0:
        logger.warning(
            "`injection='trained'`: the up-projection lies after the sample, so this loss does not reach it. It "
            "stays as it is; `hybrid_coef` above 0 would train it."
        )
        policy.injector.requires_grad_(False)


def check_use_of_policy(policy: LatentPolicyModel, args: LatentGRPOConfig) -> None:
    """Refuse options that this policy has no use for: without a learned stop, or with a σ that stays as it is."""
    if args.latent_cost > 0 and not policy.config.learn_stop:
        raise ValueError(
            f"`latent_cost={args.latent_cost}` needs a policy with `learn_stop=True`: all trajectories of `model` "
            f"have `num_latents={policy.config.num_latents}` steps, which cost the same."
        )
    if args.entropy_coef == 0.0 and not args.use_adaptive_entropy:
        return
    config = policy.config
    if config.latent_density == "gaussian" and not (config.learn_sigma or config.state_sigma or config.learn_stop):
        raise ValueError(
            f"`entropy_coef={args.entropy_coef}`, `use_adaptive_entropy={args.use_adaptive_entropy}`: the entropy of "
            "a Gaussian with a fixed σ is a constant, which teaches nothing. Train σ (`learn_sigma` or `state_sigma`), "
            "or leave both unset."
        )

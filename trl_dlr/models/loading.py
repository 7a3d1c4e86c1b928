# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A saved policy or an adapter of one, and the main model that it names."""

import copy
import json
import os
import types
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .hub import check_dtype, find_file, hub_arguments, readable_damage
from .latent_policy import LatentPolicyModel
from .latent_policy_config import LatentPolicyConfig
from .thinking import THINKING_FILE


BASE_POLICY = "base_policy"  # folder beside an adapter whose base policy is saved nowhere else


def load_policy(
    pretrained_model_name_or_path: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    is_trainable: bool = False,
) -> LatentPolicyModel | PeftModel:
    """
    A saved policy in float32, or an adapter on the policy that it was trained on, which lies beside it or where the
    adapter's configuration says. `is_trainable` is PEFT's: whether the adapter is loaded to go on training it.
    """
    name, hub = pretrained_model_name_or_path, {"token": token, "cache_dir": cache_dir}
    here = {"revision": revision, **hub}
    kwargs = {"dtype": torch.float32, "use_safetensors": True}
    with readable_damage(name):
        if not holds_adapter(name, **here):
            return LatentPolicyModel.from_pretrained(name, **kwargs, **here)
        if find_file(name, f"{BASE_POLICY}/config.json", **here) is not None:
            # In a local folder, transformers below 5.23 would take the adapter for what `subfolder` holds
            base_name, subfolder = (
                (os.path.join(name, BASE_POLICY), "") if Path(name).is_dir() else (name, BASE_POLICY)
            )
            base = LatentPolicyModel.from_pretrained(base_name, subfolder=subfolder, **kwargs, **here)
        else:
            config = PeftConfig.from_pretrained(name, **here)
            if config.base_model_name_or_path is None:
                raise ValueError(
                    f"{name!r} is an adapter that names no base model (`base_model_name_or_path` in its "
                    "`adapter_config.json`): it was built in memory. Save that policy, and set the name to its folder."
                )
            if os.path.exists(config.base_model_name_or_path) and not os.path.isdir(name):
                raise ValueError(
                    f"{name!r} is an adapter of {config.base_model_name_or_path!r}, which is a path on this machine. "
                    "Download it, and set `base_model_name_or_path` in its `adapter_config.json` to your folder of "
                    "that policy."
                )
            there = {"revision": config.revision, **hub}
            found = _model_type(config.base_model_name_or_path, **there)
            if found != LatentPolicyConfig.model_type:
                raise ValueError(
                    f"{name!r} is an adapter of {config.base_model_name_or_path!r}, a model of type {found!r}, and "
                    "not of a latent policy: another trainer, such as TRL's `GRPOTrainer`, has trained it. Load it "
                    "with PEFT's `AutoPeftModelForCausalLM`, or if it thinks by itself with `ThinkingReasoner`."
                )
            base = LatentPolicyModel.from_pretrained(config.base_model_name_or_path, **kwargs, **there)
        if find_file(name, "adapter_model.safetensors", **here) is None:  # PEFT would take a pickle
            raise ValueError(f"{name!r} has no adapter_model.safetensors: its weights are not there, or a pickle.")
        return PeftModel.from_pretrained(base, name, is_trainable=is_trainable, **here)


def holds_adapter(name: str, **hub) -> bool:
    """Whether a folder or repository holds an adapter rather than a policy. What holds neither is refused."""
    if find_file(name, "adapter_config.json", **hub) is not None:
        return True
    if (found := _model_type(name, **hub)) != LatentPolicyConfig.model_type:
        hint = (
            f" Nor does it think by itself (it has no `{THINKING_FILE}`): a Coconut model does from its first stage "
            "with latents on, and is an ordinary one before."
        )
        if find_file(name, THINKING_FILE, **hub) is not None:
            hint = " It is a model that thinks by itself: load it with `ThinkingReasoner`."
        raise ValueError(
            f"{name!r} holds neither a policy (a `config.json` of type {LatentPolicyConfig.model_type!r}, found "
            f"{found!r}) nor an adapter of one (`adapter_config.json`).{hint}"
        )
    return False


def _model_type(name: str, **hub) -> str | None:
    """What the configuration of a folder or repository says that it is."""
    path = find_file(name, "config.json", **hub)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")


def load_main_model_of(
    config: LatentPolicyConfig,
    main_model: str | PreTrainedModel | None = None,
    main_processing_class: PreTrainedTokenizerBase | None = None,
    init_kwargs: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The main model of a policy, frozen, and its tokenizer.

    Args:
        config ([`LatentPolicyConfig`]):
            Configuration of the policy, which names main model, revision and dtype.
        main_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Main model, or another place for it.
        main_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer. If `None`, the one saved with it.
        init_kwargs (`dict`, *optional*):
            Keyword arguments for loading both.

    Raises:
        `ValueError`: no main model is known, or it is not where it should be.
    """
    init_kwargs = dict(init_kwargs or {})
    if main_model is None:
        main_model = config.main_model_name_or_path
        if main_model is None:
            raise ValueError(
                f"`main_model` must be given: the policy {config.name_or_path!r} was trained for one that was built "
                "in memory or, if it is from the Hub, lies in a folder of another machine."
            )
        init_kwargs = {"revision": config.main_model_revision, **init_kwargs}
    hub = hub_arguments(init_kwargs)
    if isinstance(main_model, str):
        where = {name: hub.get(name) for name in ("revision", "token", "cache_dir")}
        try:
            find_file(main_model, "config.json", **where)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"The policy's main model cannot be loaded: {error} Say where it is with `main_model` (on the command "
                "line, `--main_model_name_or_path`)."
            ) from error
        kwargs = {"dtype": config.main_model_dtype or "auto", **init_kwargs}
        check_dtype("main_model_init_kwargs['dtype']", kwargs["dtype"])
        with readable_damage(main_model):
            main_model = AutoModelForCausalLM.from_pretrained(main_model, **kwargs)
        main_model.config._commit_hash = hub.get("revision")  # which transformers no longer notes down
    if main_processing_class is None:
        name = main_model.config.name_or_path
        if not name:
            raise ValueError(
                "`main_processing_class` must be given: `main_model` was built in memory and names no tokenizer."
            )
        with readable_damage(name):
            main_processing_class = AutoTokenizer.from_pretrained(name, padding_side="left", **hub)
    return main_model.requires_grad_(False).eval(), main_processing_class


def reference_copy(model: PreTrainedModel) -> PreTrainedModel:
    """
    A frozen copy, which nothing that becomes of `model` changes. What a trainer has put in the place of a forward would
    still run the original's, so the copy has its classes' own.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(vars(module).get("forward"), types.MethodType):
            del module.forward
    return model.eval().requires_grad_(False)


def policy_below(model: PeftModel) -> LatentPolicyModel:
    """A copy of the policy that an adapter was put on, as it was."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):  # `unload` would keep what was trained
            for name in module.modules_to_save:
                module.modules_to_save[name] = module.original_module
    return model.unload()


def name_base_policy_beside(folder: str, repo_id: str = BASE_POLICY) -> None:
    """
    Have a saved adapter name the base policy in its folder, not where on this machine it came from. On the Hub that is
    its own repository, which has the policy's configuration.
    """
    path = Path(folder, "adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": repo_id}, indent=2))

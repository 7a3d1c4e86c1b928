# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What a policy on the Hub is described by, how its files are found, and what is said when a push fails."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from .latent_policy_config import LatentPolicyConfig


TAGS = ["trl", "trl_dlr", "latent-reasoning"]
DEFAULT_PROMPT = "What is 3 + 4?"


def check_location(name: str) -> None:
    """Refuse a path to nothing, before the Hub is asked for it as if it were a name there."""
    if not os.path.isdir(name) and hub_name(str(name)) is None:
        raise ValueError(f"The folder {str(name)!r} does not exist (working directory: {os.getcwd()}).")


def name_or_model(value: Any, argument: str) -> "str | PreTrainedModel | PeftModel":
    """A model, or the name or path of one as text; what is neither is refused as `argument`."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, (str, PreTrainedModel, PeftModel)):
        raise ValueError(
            f"`{argument}` must be a Hub id, a path or a transformers model, got {value!r} ({type(value).__name__})."
        )
    return value


@contextmanager
def readable_damage(name: str) -> Iterator[None]:
    """Say of a file of `name` that cannot be read that it is damaged."""
    try:
        yield
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{str(name)!r} has a file that is damaged or cut off ({error}). Save, copy or download it again; a run's "
            "last checkpoint has the policy too."
        ) from error


def check_dtype(argument: str, dtype: Any) -> None:
    """Refuse the name of what is no dtype."""
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(
            f"`{argument}` must be 'auto' or a dtype of torch such as 'bfloat16' or 'float32', got {dtype!r}."
        )


def location_of(model: PreTrainedModel) -> str | None:
    """
    Where a model was loaded from: its name on the Hub, or its folder by a path that holds anywhere on this machine.
    """
    name = model.config.name_or_path
    return os.path.abspath(name) if os.path.isdir(name) else name or None


def find_file(
    name: str, file: str, revision: str | None = None, token: str | bool | None = None, cache_dir: str | None = None
) -> str | None:
    """Path of a file of a folder or repository; `None` if it has none of that name, an error if that is not known."""
    check_location(name)
    if os.path.isdir(name):
        path = os.path.join(name, file)
        return path if os.path.isfile(path) else None
    hub = {"revision": revision, "cache_dir": cache_dir}
    is_cached = try_to_load_from_cache(name, file, **hub) is not None
    try:
        if not is_cached and os.path.isdir(os.path.dirname(name)):
            # Likely a folder, misspelt: without a connection a download would try for half a minute, and this tries
            # once
            HfApi(token=token).file_exists(name, file, revision=revision)
        return hf_hub_download(name, file, token=token, **hub)
    except RemoteEntryNotFoundError:
        return None
    except HfHubHTTPError:
        raise
    except (LocalEntryNotFoundError, HTTPError, ConnectionError) as error:
        # No connection: the cache knows which files there are, if it was asked before
        if not is_cached:
            raise FileNotFoundError(
                f"{name!r} is no folder here, it is not in the cache, and the Hub cannot be reached. Check the name "
                "and the connection."
            ) from error
        return None


# Keyword arguments of `from_pretrained` that say where files come from, rather than what becomes of them
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "code_revision")


def leave_out_folders(folder: str) -> None:
    """Have the configurations of what is to be uploaded name no model that is a folder of this machine."""
    for file in ("config.json", "adapter_config.json"):
        for path in Path(folder).rglob(file):
            config = json.loads(path.read_text(encoding="utf-8"))
            changed = False
            for part in (config, config.get("assistant_config") or {}):
                for field in ("main_model_name_or_path", "base_model_name_or_path", "_name_or_path"):
                    if part.get(field) and hub_name(part[field]) is None:
                        part[field], changed = None, True
            if changed:
                path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def hub_arguments(init_kwargs: dict[str, Any] | None, trust_remote_code: bool = False) -> dict[str, Any]:
    """
    What of the keyword arguments of a model is for its configuration and its tokenizer as well.

    Args:
        init_kwargs (`dict`, *optional*):
            Keyword arguments of the model's `from_pretrained`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with it may be executed, if they do not say.
    """
    init_kwargs = init_kwargs or {}
    shared = {name: init_kwargs[name] for name in HUB_ARGUMENTS if name in init_kwargs}
    return {"trust_remote_code": init_kwargs.get("trust_remote_code", trust_remote_code), **shared}


# ---- The card ----


def hub_name(name: str | None) -> str | None:
    """`name` if it is that of a repository on the Hub rather than of a folder."""
    is_name = name and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not os.path.exists(name)
    return name if is_name else None


def card_data(config: LatentPolicyConfig, is_adapter: bool, tags: list[str], **further: Any) -> ModelCardData:
    """Metadata of a policy's card: what it was made from, and the main model that it speaks to."""
    made_from = hub_name(config.name_or_path) or hub_name(config.assistant_config.name_or_path)
    bases = [base for base in (made_from, hub_name(config.main_model_name_or_path)) if base]
    return ModelCardData(
        base_model=list(dict.fromkeys(bases)) or None,
        base_model_relation=("adapter" if is_adapter else "finetune") if bases else None,
        library_name="trl_dlr",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*TAGS, *tags])),
        **further,
    )


def usage(repo_id: str, config: LatentPolicyConfig, prompt: str | list[dict[str, str]] = DEFAULT_PROMPT) -> str:
    """Lines that load a policy and answer `prompt`; they run as printed if its main model is on the Hub."""
    lines, main_model = [], ""
    if hub_name(config.main_model_name_or_path) is None:
        lines.append(
            'main_model = "..."  # folder of the model that this policy was trained for: it is not on the Hub'
        )
        main_model = ", main_model"
    lines.append(f'reasoner = LatentReasoner.from_pretrained("{repo_id}"{main_model})')
    if not isinstance(prompt, str):
        prompt = [{"role": message["role"], "content": message["content"]} for message in prompt]
    lines.append(f"print(reasoner.generate([{json.dumps(prompt, ensure_ascii=False)}]).texts)")
    return "\n".join(["```python", "from trl_dlr import LatentReasoner", "", *lines, "```"])


def main_model_link(config: LatentPolicyConfig) -> str:
    name = hub_name(config.main_model_name_or_path)
    return "a local model" if name is None else f"[{name}](https://huggingface.co/{name})"


def short_card(repo_id: str, config: LatentPolicyConfig, is_adapter: bool, tags: list[str]) -> str:
    """A card for a policy that has none of its trainer."""
    return f"""\
---
{card_data(config, is_adapter, tags)}
---

# {repo_id.split("/")[-1]}

A latent policy of [DeepLatent Reasoning](https://huggingface.co/papers/2601.17275): {config.latents_in_words}
per question, which the frozen main model, {main_model_link(config)}, decodes.

{usage(repo_id, config)}
"""


def renamed_card(content: str, repo_id: str) -> ModelCard:
    """A card whose usage, and the title and name that it has from there, are those of another repository."""
    usage = re.compile(r'(?<=Reasoner\.from_pretrained\(")[^"]*(?=")')
    found, name = usage.search(content), repo_id.split("/")[-1]
    card = ModelCard(usage.sub(repo_id, content))
    if found is not None:
        old = found[0].rstrip("/").split("/")[-1]
        title = re.compile(rf"^(# (?:Model Card for )?){re.escape(old)}$", re.MULTILINE)
        card.text = title.sub(rf"\g<1>{name}", card.text, count=1)
        if card.data.model_name == old:
            card.data.model_name = name
    return card


# ---- Failures ----


@contextmanager
def readable_push_errors(repo_id: str, afterwards: str = "") -> Iterator[None]:
    """
    Raise what goes wrong in a push as one message.

    Args:
        repo_id (`str`):
            Repository that is pushed to.
        afterwards (`str`, *optional*):
            Sentence on what is left on this machine.
    """
    try:
        yield
    except Exception as error:
        raise RuntimeError(describe_push_failure(error, repo_id, afterwards)) from error


def describe_push_failure(error: BaseException, repo_id: str, afterwards: str = "") -> str:
    """What happened in a push, in which the client raised `error`, and what to do."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    answered = next((cause for cause in chain if isinstance(cause, HfHubHTTPError)), None)
    broken = next((cause for cause in chain if isinstance(cause, (HTTPError, ConnectionError))), None)
    if answered is not None:
        status = answered.response.status_code
        said = " ".join((answered.server_message or "").split()).rstrip(".")
        reason = f"the Hub answered {status}{f' ({said})' if said else ''}"
        advice = _advice(status, said)
    elif broken is not None:
        reason = f"the connection failed ({str(broken).rstrip('.')})"
        advice = "Check the network and push again: what has arrived is not sent twice."
    else:
        reason = " ".join(str(chain[0]).split()).rstrip(".") or type(chain[0]).__name__
        advice = _advice(None, reason)
    return " ".join(filter(None, [f"{repo_id!r} could not be pushed: {reason}. {advice}", afterwards]))


def _advice(status: int | None, said: str) -> str:
    if status in (402, 413) or re.search(r"storage.*(limit|quota|exceed)|(limit|quota|exceed).*storage", said, re.I):
        return "The account's storage is used up, or a file is too large: free some, or push to another account."
    if status == 401:
        return "The token is missing or not valid: log in with `hf auth login`, or set `HF_TOKEN`."
    if status == 403:
        return "The token may not write there: take one with write access, or a repository of your own."
    if status == 404:
        return "The repository or revision does not exist, or the token may not see it: check both names."
    if status in (409, 412):
        return "Somebody else changes the repository at the same time: push again."
    if status == 429:
        return "Wait some minutes and push again."
    if status is not None and status >= 500:
        return "The Hub has a problem of its own: push again later."
    return "Correct that and push again."

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Proof that the main model is what it was: its own answers and log-probabilities, bit for bit."""

import hashlib
import json
import os

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..generation import DecodingEngine, TransformersEngine, tokenize_prompts
from ..models.main_model import completion_log_probs


def check_main_model(
    engine: DecodingEngine,
    processing_class: PreTrainedTokenizerBase,
    prompts: list,
    completions: list[str],
    path: str,
    batch_size: int = 8,
) -> bool:
    """
    Compare the main model on its own, without latents, with what was recorded of it, bit for bit. If nothing was, record
    it: call this before training and after.

    Args:
        engine ([`TransformersEngine`]):
            Main model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`list[str]` or `list[list[dict[str, str]]]`):
            Prompts, plain or conversational, that it answers.
        completions (`list[str]`):
            A text for each prompt, the tokens of which get log-probabilities.
        path (`str`):
            Safetensors file of the record.
        batch_size (`int`, *optional*, defaults to `8`):
            Prompts in a batch. Sums are rounded differently in others, so it is part of the record.

    Returns:
        `bool`: whether there was a record, which was met. If not, it has been written.

    Raises:
        `ValueError`: an answer or a log-probability is another, or the record is of other questions or settings.
    """
    if not isinstance(engine, TransformersEngine):
        raise ValueError(
            f"`engine` must be a `TransformersEngine`, which has the weights at hand, got {type(engine).__name__}. "
            "Load the main model with `engine='transformers'`."
        )
    if len(prompts) != len(completions) or not prompts:
        raise ValueError(
            f"`completions` must have one text for each of at least one prompt, got {len(completions)} for {len(prompts)}."
        )
    settings = {
        "questions": hashlib.sha256(json.dumps([prompts, completions]).encode()).hexdigest()[:16],
        "max_new_tokens": engine.max_new_tokens,
        "batch_size": batch_size,
        "dtype": str(engine.model.dtype),
        "device": engine.model.device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    recorded = None
    if os.path.exists(path):
        recorded = _load(path)
        for name, value in settings.items():
            if recorded["settings"].get(name) != value:
                raise ValueError(
                    f"{path!r} was recorded with {name} {recorded['settings'].get(name)!r}, and now it is {value!r}: "
                    "bits can only be compared under the same. Use those, or record to another file."
                )
    answers, log_probs = [], []
    prompt_ids = tokenize_prompts(prompts, processing_class)
    completion_ids = [processing_class(text, add_special_tokens=False)["input_ids"] for text in completions]
    for start in tqdm(range(0, len(prompts), batch_size), "Main model alone"):
        chunk = slice(start, start + batch_size)
        answer_ids = engine.generate(prompt_ids[chunk])
        answers += engine.decode(answer_ids)
        log_probs += completion_log_probs(engine.model, prompt_ids[chunk], completion_ids[chunk])[0]
    log_probs = torch.cat(log_probs)
    if recorded is None:
        record = {"answers": json.dumps(answers), "settings": json.dumps(settings)}
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        save_file({"log_probs": log_probs}, path, metadata=record)
        return False
    num_answers = sum(old != new for old, new in zip(recorded["answers"], answers, strict=True))
    # As integers: bits, of which those of a NaN are equal to themselves
    is_other = recorded["log_probs"].view(torch.int32) != log_probs.view(torch.int32)
    if num_answers or is_other.any():
        raise ValueError(
            f"The main model is not the one recorded in {path!r}: {num_answers} of {len(answers)} answers and "
            f"{int(is_other.sum())} of {len(log_probs)} log-probabilities are others."
        )
    return True


def _load(path: str) -> dict:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if not {"answers", "settings"} <= metadata.keys():
            raise ValueError(f"{path!r} is no record of a main model. Name another file.")
        names = {name: json.loads(metadata[name]) for name in ("answers", "settings")}
        return {**names, "log_probs": file.get_tensor("log_probs")}

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
What test_hub.py does with a Hub, in a process whose client knows that one only: `hub_worker.py push|pull|demo
<folder>`
"""

import hashlib
import json
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.utils._http
from peft import LoraConfig

from tests.hub_server import inject
from tests.tiny import random_main_model, tiny_tokenizer
from tests.trainer.test_latent_grpo_trainer import make_trainer
from tests.trainer.test_soft_token_grpo_trainer import LEPO
from tests.trainer.test_soft_token_grpo_trainer import make_trainer as make_thinking_trainer
from trl_dlr import LatentReasoner, ThinkingReasoner
from trl_dlr.cli.parser import CommandParser
from trl_dlr.scripts import latent_grpo, utils


ENDPOINT = huggingface_hub.constants.ENDPOINT
MAIN_MODEL = "user/main"
DEMO_QUESTIONS = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in ((3, 4), (12, 7), (9, 9))]
QUESTIONS = ["A12", "B34", "C56", "D7"]
RESULTS = {"no_latents/accuracy": 0.25, "policy/accuracy": 0.75, "policy/pass_at_k": 0.875}
# Where a push can fail: method, path, status or "cut", what the Hub says, how often
FAULTS = {
    "token": ("POST", "preupload", 401, "Invalid username or password.", 1),
    "rights": ("POST", "preupload", 403, "You need write access to this repository.", 1),
    "quota": ("POST", "objects/batch", 403, "Private repository storage limit reached, please upgrade your plan.", 1),
    "payment": ("POST", "objects/batch", 402, "Payment required", 1),
    "too_large": ("PUT", "_lfs", 413, "Request Entity Too Large", 1),
    "conflict": ("POST", "commit", 409, "Conflicting update", 1),
    "moved_on": ("POST", "commit", 412, "A commit has happened since. Please refresh and try again.", 1),
    "rate": ("POST", "commit", 429, "Too many requests", 1),
    "gone": ("POST", "preupload", 404, "Repository not found", 1),
    "commit_500": ("POST", "commit", 500, "Internal Error", 1),
    "upload_503": ("PUT", "_lfs", 503, "Service Unavailable", 6),  # the client tries 6 times
    "upload_cut": ("PUT", "_lfs", "cut", "", 6),
    "commit_cut": ("POST", "commit", "cut", "", 1),
    "card": ("POST", "validate-yaml", 400, "Invalid metadata", 1),
}


def message_of(action: Callable) -> str | None:
    """What a user reads if `action` fails."""
    try:
        action()
    except Exception as error:
        return "".join(traceback.format_exception_only(error)).strip()
    return None


def digests(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def answers(reasoner: LatentReasoner) -> dict[str, list]:
    """What a policy says by its means, with their numbers, and by seeded samples, with its head's scores."""
    means, samples = reasoner.generate(QUESTIONS), reasoner.generate(QUESTIONS, num_samples=3, seed=4)
    texts = {"texts": means.texts, "candidates": samples.candidates}
    scores = [] if samples.scores is None else samples.scores.flatten().tolist()
    return {**texts, "latents": means.latents.flatten().tolist(), "scores": scores}


def reasoner_of(trainer) -> LatentReasoner:
    head = None if trainer.prescreener is None else trainer.prescreener.head
    parts = trainer.processing_class, trainer.engine, trainer.main_processing_class
    trainer.engine.max_new_tokens = 8
    return LatentReasoner(trainer.model.eval(), *parts, head)


def main_model_of_hub():
    main_model = random_main_model()
    main_model.config.name_or_path = MAIN_MODEL
    return main_model


def make(folder: Path, name: str, lora: bool = False, **kwargs):
    trainer_kwargs = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if lora else {}
    defaults = {"max_steps": 2, "push_to_hub": True, "hub_model_id": f"user/{name}", "hub_strategy": "end"}
    return make_trainer(
        folder / name,
        main_model=main_model_of_hub(),
        trainer_kwargs=trainer_kwargs,
        prescreening_fraction=0.5,
        prescreening_warmup_rollouts=0,
        **{**defaults, **kwargs},
    )


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        logging.getLogger("trl_dlr").addHandler(self)

    def emit(self, record):
        self.messages.append(record.getMessage())


def push(folder: Path) -> dict:
    seen, warned = {}, Warnings()
    main_model_of_hub().push_to_hub(MAIN_MODEL)
    tiny_tokenizer().push_to_hub(MAIN_MODEL)

    # The end of a run, as examples/train_gsm8k.py has it
    trainer = make(folder, "policy")
    trainer.train()
    trainer.save_metrics("eval", RESULTS)
    report = Path(trainer.args.output_dir, "report")
    report.mkdir()
    (report / "rewards.png").write_bytes(b"\x89PNG\r\n")
    trainer.save_model(trainer.args.output_dir)
    trainer.push_to_hub(dataset_name="user/letters")

    adapter = make(folder, "adapter", lora=True, hub_private_repo=True)
    adapter.train()
    adapter.push_to_hub(revision="first", commit_message="Adapter")
    seen["adapter"] = answers(reasoner_of(adapter))

    # A model that thinks by itself, in the middle and at the end of a run
    to_hub = {"push_to_hub": True, "hub_model_id": "user/thinking", "hub_always_push": True}
    thinking = make_thinking_trainer(folder / "thinking", **LEPO, **to_hub, save_strategy="steps", save_steps=1)
    page = Path(thinking.args.output_dir, "report", "report.html")
    page.parent.mkdir(parents=True)
    page.write_text("questions of a dataset, which may be private")
    thinking.train()
    thinking.push_to_hub()
    with thinking.answering() as reasoner:
        reasoner.engine.max_new_tokens = 8
        seen["thinking"] = answers(reasoner)

    # In the middle of a run, one upload of which fails
    every = {"save_strategy": "steps", "save_steps": 1, "hub_always_push": True, "hub_strategy": "checkpoint"}
    inject(ENDPOINT, "POST", "steps/commit", 500, "Internal Error")
    during = make(folder, "steps", max_steps=3, hub_revision="dev", **every)
    during.train()
    seen["during"] = list(warned.messages)

    # Reasoners
    reasoner = LatentReasoner.from_pretrained("user/policy")
    reasoner.push_to_hub("user/copy", tags=["mine"], revision="v1", private=True)
    bare = reasoner_of(adapter)
    bare.push_to_hub("user/bare")
    seen["reasoner"] = answers(bare)

    # Failures. The client waits between its tries
    huggingface_hub.utils._http.time.sleep = lambda seconds: None
    output_dir = Path(trainer.args.output_dir)
    seen["faults"], seen["whole"] = {}, {}
    for name, (method, path, fault, said, times) in FAULTS.items():
        trainer.model.latent_head.mean.bias.data += 1e-4  # something to upload
        trainer.save_model(_internal_call=True)
        before = digests(output_dir)
        inject(ENDPOINT, method, path, fault, said, times)
        seen["faults"][name] = message_of(trainer.push_to_hub)
        inject(ENDPOINT, "", "", 0, times=0)
        seen["whole"][name] = digests(output_dir) == before
    trainer.push_to_hub()
    seen["policy"] = answers(reasoner_of(trainer))
    inject(ENDPOINT, "POST", "commit", 403, "You need write access to this repository.")
    seen["faults"]["reasoner"] = message_of(lambda: reasoner.push_to_hub("user/copy", tags=["other"]))
    inject(ENDPOINT, "", "", 0, times=0)
    seen["faults"]["namespace"] = message_of(lambda: reasoner.push_to_hub("other/copy"))
    seen["faults"]["no_rights_at_start"] = message_of(lambda: make(folder, "start", hub_token="hf_read"))
    seen["faults"]["bad_token_at_start"] = message_of(lambda: make(folder, "start", hub_token="hf_wrong"))
    return seen


def pull(folder: Path) -> dict:
    seen = {}
    load = {"max_new_tokens": 8, "main_model": MAIN_MODEL}
    seen["policy"] = answers(LatentReasoner.from_pretrained("user/policy", max_new_tokens=8))
    adapter = LatentReasoner.from_pretrained("user/adapter", revision="first", **load)
    seen["adapter"] = answers(adapter)
    seen["reasoner"] = answers(LatentReasoner.from_pretrained("user/bare", **load))
    seen["head"] = adapter.value_head is not None
    seen["thinking"] = answers(ThinkingReasoner.from_pretrained("user/thinking", max_new_tokens=8))
    copy = LatentReasoner.from_pretrained("user/copy", revision="v1", max_new_tokens=8)
    seen["card"] = copy.model_card
    seen["no_such_revision"] = message_of(lambda: LatentReasoner.from_pretrained("user/policy", revision="v9"))
    seen["private"] = message_of(lambda: LatentReasoner.from_pretrained("user/adapter", token=False))
    seen["missing"] = message_of(lambda: LatentReasoner.from_pretrained("user/nothing"))
    seen["no_policy"] = message_of(lambda: LatentReasoner.from_pretrained(MAIN_MODEL))
    inject(ENDPOINT, "GET", "_lfs", "cut", times=1)
    huggingface_hub.utils._http.time.sleep = lambda seconds: None
    cut = LatentReasoner.from_pretrained("user/policy", max_new_tokens=8, cache_dir=str(folder / "another_cache"))
    seen["after_cut"] = answers(cut)
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # all is in the cache by now
    seen["offline"] = answers(LatentReasoner.from_pretrained("user/policy", max_new_tokens=8))
    seen["offline_adapter"] = answers(LatentReasoner.from_pretrained("user/adapter", revision="first", **load))
    return seen


def demo(folder: Path) -> dict:
    """The demo, 4 steps of it, and what its policy answers then."""
    utils.SMOLLM2_WHEEL = "no_wheel"  # its main model is the Hub's
    trainers, save_and_push = [], latent_grpo.save_and_push
    latent_grpo.save_and_push = lambda trainer, *args: (trainers.append(trainer), save_and_push(trainer, *args))
    arguments = ["--config", "examples/configs/demo.yaml", "--output_dir", str(folder / "run"), "--max_steps", "4"]
    arguments += ["--num_eval_questions", "4", "--num_eval_samples", "2", "--per_device_train_batch_size", "32"]
    arguments += ["--exploration_check_prompts", "0", "--push_to_hub", "true", "--hub_model_id", "user/demo"]
    latent_grpo.main(*CommandParser(latent_grpo.ARGUMENTS, prog="").parse_args_and_config(arguments))
    with trainers[0].answering() as reasoner:
        return {"texts": reasoner.generate(DEMO_QUESTIONS).texts}


if __name__ == "__main__":
    action, folder = sys.argv[1:]
    result = {"push": push, "pull": pull, "demo": demo}[action](Path(folder))
    Path(folder, f"{action}.json").write_text(json.dumps(result))

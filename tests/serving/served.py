# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A server of two tiny policies, in a thread of the test's process."""

import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn
from transformers import AutoModelForCausalLM

from tests.tiny import random_main_model, tiny_tokenizer
from trl_dlr import LatentPolicyModel, LatentReasoner, fresh_layers
from trl_dlr.models.value_head import ValueHead
from trl_dlr.serving import Server, ServerSettings, create_app


KEY = "a-key"
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    "{% if more is defined %}{{ more }}{% endif %}"
)
NEW_TOKENS = 12


def tokenizer():
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


def save_models(folder: Path) -> None:
    """A main model and two policies for it, of which one has a value head and fewer tokens to answer with."""
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }  # of 32 dimensions, as vLLM's kernels for CPUs have them
    random_main_model(max_position_embeddings=128, initializer_range=0.2, **heads).save_pretrained(folder / "main")
    tokenizer().save_pretrained(folder / "main")
    main_model = AutoModelForCausalLM.from_pretrained(folder / "main")
    for seed, (name, sampling) in enumerate({"sums": "parallel", "codes": "autoregressive"}.items()):
        torch.manual_seed(seed)
        policy = LatentPolicyModel.from_assistant(
            fresh_layers(main_model, 1),
            main_model,
            tokenizer(),
            latent_sampling=sampling,
            num_latents=4,
            latent_dim=8,
            max_completion_length=NEW_TOKENS if name == "sums" else NEW_TOKENS - 2,
        )
        policy.injector.scale = 2.0
        head = ValueHead(4 * policy.config.feature_size, policy.config.hidden_size) if name == "codes" else None
        if head is not None:
            for parameter in head.parameters():
                torch.nn.init.normal_(parameter)
        LatentReasoner(policy, tokenizer(), None, None, head).save_pretrained(str(folder / name))


@contextmanager
def running(folder: Path, engine: str = "transformers", **settings):
    """The server, its address and the reasoners that it answers as."""
    reasoner = LatentReasoner.from_pretrained(str(folder / "sums"), engine=engine, max_new_tokens=NEW_TOKENS)
    server = Server(reasoner, "sums", ServerSettings(**{"api_key": KEY, "timeout": 60.0, **settings}))
    server.add_policy("codes", str(folder / "codes"))
    config = uvicorn.Config(create_app(server), port=0, log_config=None, access_log=False, lifespan="on")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.01)
        server.url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
        yield server
    finally:
        running.should_exit = True
        thread.join()

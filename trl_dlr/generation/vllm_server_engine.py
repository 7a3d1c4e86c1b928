# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The frozen main model, decoding on a stock vLLM server."""

import base64
import http.client
import io
import itertools
import json
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .engine import DecodingEngine, prompt_embeds
from .vllm_engine import PROBE_CANDIDATES, check_embeddings_suffice, find_embedding_scale, sampling_fields


logger = logging.getLogger(__name__)

PASSING_STATUS = (500, 502, 503, 504)  # an engine that has died answers 500 until its server is started again
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between tries
HEARTBEAT = 5.0  # seconds between looks at a server that has not answered yet
API_KEY = "VLLM_API_KEY"  # variable of the environment that a server takes its key from
# What a server's `generation_config.json` would decide otherwise
NEUTRAL = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class VLLMServerEngine(DecodingEngine):
    """
    Decodes on a vLLM server that is started with `vllm serve <main model> --enable-prompt-embeds`.

    The weights never change, so nothing is synchronized: any stock server will do, and it can serve any number of
    trainers. Construction waits until the server answers and checks that it serves this main model. A server that goes
    away and comes back within `timeout` seconds is waited for, in the middle of a rollout too. The key of a server that
    wants one is read from the environment variable `VLLM_API_KEY`, as the server itself reads it.

    Args:
        main_model ([`~transformers.PreTrainedModel`]):
            Frozen causal LM. Of its weights only the input embeddings are used, which turn prompts into
            `(length, hidden_size)`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        max_new_tokens (`int`):
            Completion tokens at most.
        generation_kwargs (`dict`, *optional*):
            Further fields of `vllm.SamplingParams`, such as `temperature`, and `stop_strings`. Decoding is greedy
            unless they say otherwise.
        base_url (`str`, *optional*, defaults to `"http://localhost:8000"`):
            Address of the server.
        timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for a server that is away, and for the answer to one request.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows of one request at most.
        num_concurrent (`int`, *optional*, defaults to `8`):
            Requests under way at most.

    Attributes:
        num_retries (`int`):
            Requests sent again since the start because the server was away.

    Raises:
        `ConnectionError`: the server stays away for `timeout` seconds, at construction or later.
        `TimeoutError`: the server is there, but a request is not answered within `timeout` seconds.
        `RuntimeError`: the server refuses a request, lacks `--enable-prompt-embeds`, or its reply is malformed.
        `ValueError`: bad arguments, or a server with another main model or too small a `--max-model-len`.
    """

    def __init__(
        self,
        main_model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        max_new_tokens: int,
        generation_kwargs: dict | None = None,
        base_url: str = "http://localhost:8000",
        timeout: float = 240.0,
        batch_size: int = 16,
        num_concurrent: int = 8,
    ):
        stop_strings = (generation_kwargs or {}).get("stop_strings")
        super().__init__(main_model, processing_class, max_new_tokens, stop_strings)
        for name, value in {"timeout": timeout, "batch_size": batch_size, "num_concurrent": num_concurrent}.items():
            if value <= 0:
                raise ValueError(f"`{name}` must be positive, but is {value}.")
        url = urlsplit(base_url)
        if url.username or url.password:
            raise ValueError("`base_url` must not hold a user name or a password: neither would be sent.")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"`base_url` must look like 'http://localhost:8000', but is {base_url!r}.")
        check_embeddings_suffice(main_model)
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.embed_tokens = main_model.get_input_embeddings()
        self.timeout = timeout
        self.patience: float | None = None  # seconds to wait for a server that is away, if not `timeout`
        self.batch_size = batch_size
        self.num_concurrent = num_concurrent
        self.num_retries = 0
        self.headers = {"Authorization": f"Bearer {os.environ[API_KEY]}"} if os.environ.get(API_KEY) else {}
        self.fields = {**NEUTRAL, **sampling_fields(max_new_tokens, self.eos_token_ids, generation_kwargs)}
        self._hint = (
            f"Start it with `vllm serve {main_model.config.name_or_path or '<main model>'} --enable-prompt-embeds`"
        )

        self._send("/health", parse=lambda reply: None)
        self.model, self.max_model_len = self._send("/v1/models", parse=self._read_served_model)
        self.check_length(1, 0)
        self.embedding_scale = self._check_main_model(main_model, processing_class)

    def _describe_limit(self, length):
        return (
            f"the {self.max_model_len} tokens that the vLLM server at {self.base_url} takes. Start it with "
            f"`--max-model-len {length}` or more."
        )

    def _decode(self, prompt_ids, rows, latent_embeds, latent_ids):
        embeds = prompt_embeds(self.embed_tokens, prompt_ids, rows, latent_embeds)
        embeds = [(row / self.embedding_scale).cpu() for row in embeds]
        batches = [embeds[start : start + self.batch_size] for start in range(0, len(embeds), self.batch_size)]
        fields = {**self.fields, "max_tokens": self.max_new_tokens}
        with ThreadPoolExecutor(self.num_concurrent) as pool:
            decoded = list(pool.map(lambda batch: self._complete(batch, fields), batches))
        return [choice["token_ids"] for choices in decoded for choice in choices]

    def _check_main_model(self, main_model: PreTrainedModel, processing_class: PreTrainedTokenizerBase) -> float:
        """The server must continue texts from embeddings as it does from tokens. Returns the embeddings' scale."""
        try:
            scale = find_embedding_scale(self.embed_tokens, processing_class, self._next_log_probs)
        except RuntimeError as error:
            if "--enable-prompt-embeds" in str(error):
                raise RuntimeError(
                    f"The vLLM server at {self.base_url} does not take embeddings. {self._hint}. It said: {error}"
                ) from error
            if "hidden_size" in str(error) or "out of vocabulary" in str(error):
                raise ValueError(self._describe_other_model(str(error))) from error
            raise
        if scale is None:
            raise ValueError(
                self._describe_other_model(
                    "it continues a text differently from this main model's embeddings than from its tokens"
                )
                + f" If it does serve it, vLLM cannot decode after latents of a {main_model.config.model_type} model: "
                "use the transformers engine (`use_vllm=False`)."
            )
        return scale

    def _next_log_probs(self, prompts: list[list[int]] | list[torch.Tensor]) -> list[dict[int, float]]:
        fields = {**NEUTRAL, "temperature": 0.0, "max_tokens": 1, "logprobs": PROBE_CANDIDATES}
        fields["return_tokens_as_token_ids"] = True
        if isinstance(prompts[0], torch.Tensor):
            choices = self._complete([row.cpu() for row in prompts], fields)
        else:
            choices = self._complete(prompts, fields, "prompt")
        likeliest = [choice["logprobs"]["top_logprobs"][0] for choice in choices]
        return [{int(name.removeprefix("token_id:")): value for name, value in row.items()} for row in likeliest]

    def _describe_other_model(self, seen: str) -> str:
        return (
            f"The vLLM server at {self.base_url} serves {self.model!r}, which is not this main model: {seen}. "
            f"{self._hint}, or change `base_url`."
        )

    def _complete(self, prompts: list, fields: dict[str, Any], key: str = "prompt_embeds") -> list[dict]:
        """Choices of the server, one for each prompt, given as embeddings of shape `(length, hidden_size)` or ids."""
        if key == "prompt_embeds":
            prompts = [to_base64(embeds) for embeds in prompts]
        body = {**fields, "model": self.model, key: prompts, "return_token_ids": True}
        return self._send("/v1/completions", body, parse=lambda reply: self._read_choices(reply, len(prompts)))

    def _read_served_model(self, reply: dict) -> tuple[str, int]:
        base = next(model for model in reply["data"] if not model.get("parent"))  # the others are adapters
        return base["id"], int(base["max_model_len"])

    def _read_choices(self, reply: dict, num_prompts: int) -> list[dict]:
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(num_prompts)):
            raise ValueError(f"{len(choices)} choices for {num_prompts} prompts")
        for choice in choices:
            if not isinstance(choice.get("token_ids"), list):
                raise ValueError("a choice without `token_ids`, which vLLM returns from version 0.10.2 on")
            if choice["finish_reason"] not in ("stop", "length"):
                raise _Away(f"it broke off a completion ({choice['finish_reason']})")
        return choices

    def _send(self, path: str, body: dict | None = None, *, parse: Callable[[dict], Any]) -> Any:
        """What `parse` makes of the server's reply. While the server is away, asks again, with growing pauses."""
        start, patience = time.monotonic(), self.timeout if self.patience is None else self.patience
        data = None if body is None else json.dumps(body).encode()
        for tries in itertools.count(1):
            try:
                return self._send_once(path, data, parse)
            except _Away as error:
                pause = min(FIRST_PAUSE * 2 ** (tries - 1), LONGEST_PAUSE)
                if time.monotonic() + pause > start + patience:
                    raise ConnectionError(
                        f"The vLLM server at {self.base_url} was away for {patience:g} seconds ({tries} tries of "
                        f"{path}); the last time, {error}. {self._hint}, check `base_url`, or raise `timeout` if it "
                        "needs longer to start."
                    ) from error
                if tries == 1:
                    logger.warning(f"Waiting for the vLLM server at {self.base_url}: {error}.")
                self.num_retries += 1
                time.sleep(pause)

    def is_healthy(self) -> bool:
        """Whether it says so within seconds."""
        try:
            return self._exchange("/health", None, HEARTBEAT)[0] == 200
        except (_Away, TimeoutError):
            return False

    def _send_once(self, path: str, data: bytes | None, parse: Callable[[dict], Any]) -> Any:
        status, reason, reply = self._exchange(path, data, self.timeout)
        if status in PASSING_STATUS:
            raise _Away(f"it answered {status} {reason}: {_read_error(reply)}")
        if status != 200:
            hint = f". Is its key in the environment variable {API_KEY}?" if status == 401 else ""
            raise RuntimeError(
                f"The vLLM server at {self.base_url} refuses {path}: {status} {reason}: {_read_error(reply)}{hint}"
            )
        try:
            return parse(json.loads(reply or b"{}"))
        except (KeyError, TypeError, ValueError, StopIteration, AttributeError) as error:
            raise RuntimeError(
                f"The vLLM server at {self.base_url} gave a malformed reply to {path}: "
                f"{error if isinstance(error, ValueError) else repr(error)}. It said: {_shorten(reply)}. Is it a vLLM "
                "server of version 0.11.1 or later?"
            ) from error

    def _exchange(self, path: str, data: bytes | None, timeout: float) -> tuple[int, str, bytes]:
        """Status, reason and body of one reply."""
        url = urlsplit(self.base_url)
        connection_class = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = connection_class(url.hostname, url.port, timeout=timeout)
        try:
            connection.connect()
        except OSError as error:
            raise _Away(f"the connection failed ({type(error).__name__}: {error})") from error
        try:
            headers = self.headers if data is None else {**self.headers, "Content-Type": "application/json"}
            connection.request("GET" if data is None else "POST", url.path + path, data, headers)
            if data is not None:
                self._wait_for_reply(connection.sock, timeout)
            response = connection.getresponse()
            return response.status, response.reason, response.read()
        except TimeoutError as error:
            raise TimeoutError(
                f"The vLLM server at {self.base_url} has not answered {path} within {timeout:g} seconds. Raise "
                "`timeout`, or lower `batch_size` or `max_completion_length`, or give the server more capacity."
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Away(f"the connection broke ({type(error).__name__}: {error})") from error
        finally:
            connection.close()

    def _wait_for_reply(self, connected: socket.socket, timeout: float) -> None:
        # A vLLM server that is told to stop keeps the connections of its requests, but never answers them
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(connected, selectors.EVENT_READ)
            while not selector.select(min(HEARTBEAT, max(deadline - time.monotonic(), 0))):
                if time.monotonic() >= deadline:
                    raise TimeoutError
                try:
                    status, reason, _ = self._exchange("/health", None, HEARTBEAT)
                except TimeoutError:
                    continue  # busy, but there
                if status in PASSING_STATUS:
                    raise _Away(f"it answered {status} {reason} to /health while a request waited")


class _Away(Exception):
    """The server is not there now, but may come back."""


def to_base64(tensor: torch.Tensor) -> str:
    file = io.BytesIO()
    torch.save(tensor, file)
    return base64.b64encode(file.getvalue()).decode()


def _read_error(reply: bytes) -> str:
    """The server's own words."""
    try:
        return json.loads(reply)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return _shorten(reply)


def _shorten(reply: bytes) -> str:
    text = reply.decode(errors="replace")
    return text if len(text) <= 300 else text[:300] + "…"

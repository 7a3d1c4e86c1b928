# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The frozen main model, decoding on several vLLM servers."""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .engine import DecodingEngine
from .vllm_server_engine import FIRST_PAUSE, LONGEST_PAUSE, VLLMServerEngine


logger = logging.getLogger(__name__)


class VLLMServersEngine(DecodingEngine):
    """
    Decodes on several vLLM servers of the same main model, each as [`VLLMServerEngine`] has it.

    The rows of a rollout are divided among them, and each request goes to the server with the fewest of this process
    under way. A server that goes away is left out until it is healthy again, and another one does its work; one that
    has not answered within `timeout` is left out for as long at least.

    Args:
        main_model ([`~transformers.PreTrainedModel`]):
            Frozen causal LM.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        max_new_tokens (`int`):
            Completion tokens at most.
        generation_kwargs (`dict`, *optional*):
            As for [`VLLMServerEngine`].
        base_urls (`Sequence[str]`):
            Addresses of the servers.
        timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait while all servers are away, and for the answer to one request.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows of one request at most.
        num_concurrent (`int`, *optional*, defaults to `8`):
            Requests under way at each server at most.

    Raises:
        `ConnectionError`: a server is away at construction, or all of them later, for `timeout` seconds.
        `RuntimeError`: a server refuses a request.
        `ValueError`: bad arguments, or a server with another main model or too small a `--max-model-len`.
    """

    def __init__(
        self,
        main_model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        max_new_tokens: int,
        generation_kwargs: dict[str, Any] | None = None,
        *,
        base_urls: Sequence[str],
        timeout: float = 240.0,
        batch_size: int = 16,
        num_concurrent: int = 8,
    ):
        super().__init__(main_model, processing_class, max_new_tokens, (generation_kwargs or {}).get("stop_strings"))
        parts = main_model, processing_class, max_new_tokens, generation_kwargs
        engines = [VLLMServerEngine(*parts, url, timeout, batch_size, num_concurrent) for url in base_urls]
        if len({engine.base_url for engine in engines}) < len(engines):
            raise ValueError(f"`base_urls` must be different servers, got {list(base_urls)}.")
        # Processes that train together do not all begin with the same one
        first = PartialState().process_index % len(engines)
        self.servers = [_Server(engine) for engine in (*engines[first:], *engines[:first])]
        self.max_model_len = min(engine.max_model_len for engine in engines)
        self.embed_tokens = main_model.get_input_embeddings()
        self.timeout, self.batch_size, self.num_concurrent = timeout, batch_size, num_concurrent
        self._last_answer = time.monotonic()
        self._change = threading.Condition()  # of a server, or of an error that ends a rollout

    @property
    def num_retries(self) -> int:
        """Requests sent again since the start because a server was away."""
        return sum(server.num_failures for server in self.servers)

    def _describe_limit(self, length):
        engines = [server.engine for server in self.servers]
        return min(engines, key=lambda engine: engine.max_model_len)._describe_limit(length)

    def _decode(self, prompt_ids, rows, latent_embeds, latent_ids):
        for server in self.servers:
            server.engine.max_new_tokens = self.max_new_tokens
        size = min(self.batch_size, -(-len(rows) // len(self.servers)))
        errors = []  # the first ends the rollout

        @torch.no_grad()  # which is each thread's own
        def decode(start: int) -> list[list[int]]:
            part = slice(start, start + size)
            embeds = None if latent_embeds is None else latent_embeds[part]
            try:
                return self._decode_anywhere(prompt_ids, rows[part], embeds, latent_ids, errors)
            except Exception as error:
                with self._change:
                    errors.append(error)
                    self._change.notify_all()
                return []

        with ThreadPoolExecutor(self.num_concurrent * len(self.servers)) as pool:
            decoded = list(pool.map(decode, range(0, len(rows), size)))
        if errors:
            raise errors[0]
        return [ids for part in decoded for ids in part]

    def _decode_anywhere(self, prompt_ids, rows, latent_embeds, latent_ids, errors: list[Exception]):
        """Decode a batch on whichever server has least to do, and on another if that one goes away."""
        start = time.monotonic()
        while True:
            server = self._take(errors)
            try:
                decoded = server.engine._decode(prompt_ids, rows, latent_embeds, latent_ids)
                server.num_in_a_row, self._last_answer = 0, time.monotonic()
                return decoded
            except (ConnectionError, TimeoutError) as error:
                if time.monotonic() - max(start, self._last_answer) > self.timeout:  # healthy, but of no use
                    raise
                self._leave_out(server, error)
            finally:
                with self._change:
                    server.num_running -= 1
                    self._change.notify_all()

    def _take(self, errors: list[Exception]) -> "_Server":
        with self._change:
            while True:
                if errors:
                    raise errors[0]
                there = [server for server in self.servers if server.away_since is None]
                free = [server for server in there if server.num_running < self.num_concurrent]
                if free:
                    server = min(free, key=lambda server: server.num_running)
                    server.num_running += 1
                    return server
                left = None
                if not there:
                    left = max(server.away_since for server in self.servers) + self.timeout - time.monotonic()
                    if left <= 0:
                        raise ConnectionError(
                            f"All vLLM servers were away for {self.timeout:g} seconds. "
                            + " ".join(server.reason for server in self.servers)
                        )
                self._change.wait(left)

    def _leave_out(self, server: "_Server", error: Exception) -> None:
        with self._change:
            server.num_failures += 1
            if server.away_since is not None:  # another of its requests was first
                return
            server.away_since, server.reason = time.monotonic(), str(error)
            server.num_in_a_row += 1
        logger.warning(f"Going on without the vLLM server at {server.engine.base_url}: {error}")
        pause = min(FIRST_PAUSE * 2**server.num_in_a_row, LONGEST_PAUSE)
        if isinstance(error, TimeoutError):
            pause = self.timeout
        threading.Thread(target=self._wait_for, args=(server, pause), daemon=True).start()

    def _wait_for(self, server: "_Server", pause: float) -> None:
        time.sleep(pause)
        while not server.engine.is_healthy():
            pause = min(2 * pause, LONGEST_PAUSE)
            time.sleep(pause)
        logger.warning(f"The vLLM server at {server.engine.base_url} is back.")
        with self._change:
            server.away_since = None
            self._change.notify_all()


class _Server:
    """One of them, and how it fares."""

    def __init__(self, engine: VLLMServerEngine):
        self.engine = engine
        engine.patience = 0.0  # from now on another one is asked instead
        self.num_running = 0
        self.num_failures = 0
        self.num_in_a_row = 0
        self.away_since: float | None = None
        self.reason = ""

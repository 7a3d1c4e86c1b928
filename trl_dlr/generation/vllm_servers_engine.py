# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The frozen main model, decoding on several vLLM servers."""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .engine import DecodingEngine
from .vllm_server_engine import FIRST_PAUSE, LONGEST_PAUSE, VLLMServerEngine


logger = logging.getLogger(__name__)


class VLLMServersEngine(DecodingEngine):
    """
    Decodes on several vLLM servers of the same main model, each as [`VLLMServerEngine`] has it.

    The rows of a rollout are divided among them, and each request goes to the server with the fewest of this process
    under way. A server that goes away is left out until it answers again, and another one does its work.

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
        base_urls: Sequence[str] = ("http://localhost:8000",),
        timeout: float = 240.0,
        batch_size: int = 16,
        num_concurrent: int = 8,
    ):
        super().__init__(main_model, processing_class, max_new_tokens, (generation_kwargs or {}).get("stop_strings"))
        if len(set(base_urls)) < len(base_urls):
            raise ValueError(f"`base_urls` must be different servers, got {list(base_urls)}.")
        parts = main_model, processing_class, max_new_tokens, generation_kwargs
        engines = [VLLMServerEngine(*parts, url, timeout, batch_size, num_concurrent) for url in base_urls]
        # Processes that train together do not all begin with the same one
        first = PartialState().process_index % len(engines)
        self.servers = [_Server(engine) for engine in (*engines[first:], *engines[:first])]
        self.max_model_len = min(engine.max_model_len for engine in engines)
        self.embed_tokens = main_model.get_input_embeddings()
        self.timeout, self.batch_size, self.num_concurrent = timeout, batch_size, num_concurrent
        self._change = threading.Condition()

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

        def decode(start: int) -> list[list[int]]:
            part = slice(start, start + size)
            embeds = None if latent_embeds is None else latent_embeds[part]
            return self._decode_anywhere(prompt_ids, rows[part], embeds, latent_ids)

        with ThreadPoolExecutor(self.num_concurrent * len(self.servers)) as pool:
            return [ids for part in pool.map(decode, range(0, len(rows), size)) for ids in part]

    def _decode_anywhere(self, *batch) -> list[list[int]]:
        """Decode a batch on whichever server has least to do, and on another if that one goes away."""
        while True:
            server = self._take()
            try:
                decoded = server.engine._decode(*batch)
            except (ConnectionError, TimeoutError) as error:
                self._leave_out(server, error)
            else:
                server.away_since, server.num_tries = None, 0
                return decoded
            finally:
                with self._change:
                    server.num_running -= 1
                    self._change.notify_all()

    def _take(self) -> "_Server":
        with self._change:
            while True:
                now = time.monotonic()
                # One that was away gets one request, to see whether it is back
                free = [
                    server
                    for server in self.servers
                    if server.away_since is None or (server.next_try <= now and server.num_running == 0)
                ]
                if free:
                    server = min(free, key=lambda server: server.num_running)
                    server.num_running += 1
                    return server
                self._change.wait(FIRST_PAUSE)

    def _leave_out(self, server: "_Server", error: Exception) -> None:
        with self._change:
            now = time.monotonic()
            if server.away_since is None:
                logger.warning(
                    f"Going on without the vLLM server at {server.engine.base_url}: {error.__cause__ or error}"
                )
                server.away_since = now
            server.next_try = now + min(FIRST_PAUSE * 2**server.num_tries, LONGEST_PAUSE)
            server.num_tries += 1
            server.num_failures += 1
            away = [each.away_since for each in self.servers]
        if None not in away and now - max(away) > self.timeout:
            urls = [each.engine.base_url for each in self.servers]
            raise ConnectionError(
                f"All vLLM servers ({', '.join(urls)}) were away for {self.timeout:g} seconds."
            ) from error


class _Server:
    """One of them, and how it fares."""

    def __init__(self, engine: VLLMServerEngine):
        self.engine = engine
        engine.patience = 0.0  # from now on another one is asked instead
        self.num_running = 0
        self.num_tries = 0  # since it went away
        self.num_failures = 0
        self.away_since: float | None = None
        self.next_try = 0.0

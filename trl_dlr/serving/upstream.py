# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A stock vLLM server that writes the answers."""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import torch

from ..generation import VLLMServerEngine
from ..generation.engine import prompt_embeds
from ..generation.vllm_server_engine import to_base64
from .protocol import ApiError
from .scheduler import Job


logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
RETRY_SECONDS = 5  # that a client is told to wait


class UpstreamDecoder:
    """
    A [`Decoder`] that has a vLLM server write the answers, a request for each job: vLLM makes batches of them itself.

    Args:
        engine ([`VLLMServerEngine`]):
            The server, which has been checked to serve the main model.
        loop (`asyncio.AbstractEventLoop`):
            Where requests wait.
        on_change (`Callable[[], None]`):
            Called when there is room for other jobs.
    """

    is_busy = False  # itself
    can_join = True

    def __init__(self, engine: VLLMServerEngine, loop: asyncio.AbstractEventLoop, on_change: Callable[[], None]):
        self.engine = engine
        self.loop = loop
        self.on_change = on_change
        self.num_errors = 0
        # vLLM closes connections that are idle for 5 seconds, maybe just when a request is sent
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        self.client = httpx.AsyncClient(
            base_url=engine.base_url, headers=engine.headers, limits=limits, timeout=timeout
        )
        self._tasks: dict[int, tuple[Job, Any, object]] = {}  # by job, the latest try
        self._lock = threading.Lock()

    @property
    def num_rows(self) -> int:
        with self._lock:
            return sum(job.num_rows for job, *_ in self._tasks.values())

    def begin(self, jobs: list[Job], latent_embeds: list[torch.Tensor] | None) -> None:
        start = 0
        for job in jobs:
            body = self._sampling(job)
            if latent_embeds is None:
                body["prompt"] = [job.prompt_ids] * (job.num_rows if job.temperature == 0 else 1)
            else:
                own = latent_embeds[start : start + job.num_rows]
                start += job.num_rows
                embeds = prompt_embeds(self.engine.embed_tokens, [job.prompt_ids], [0] * job.num_rows, own)
                body["prompt_embeds"] = [to_base64((row / self.engine.embedding_scale).cpu()) for row in embeds]
            attempt = object()
            with self._lock:
                future = asyncio.run_coroutine_threadsafe(self._complete(job, body, attempt), self.loop)
                self._tasks[id(job)] = job, future, attempt

    def _sampling(self, job: Job) -> dict[str, Any]:
        fields = {**self.engine.fields, "max_tokens": job.max_new_tokens, "model": self.engine.model}
        fields |= {"stream": True, "return_token_ids": True}
        if job.stop_strings:
            fields |= {"stop": job.stop_strings, "include_stop_str_in_output": True, "skip_special_tokens": False}
        if job.temperature > 0:
            fields |= {"temperature": job.temperature, "seed": job.seed, "n": job.num_rows}
        return fields

    async def _complete(self, job: Job, body: dict[str, Any], attempt: object) -> None:
        try:
            await self._stream(job, body)
        except ApiError as error:
            self.num_errors += 1
            job.on_error(error)
        except (httpx.HTTPError, httpx.StreamError) as error:
            self.num_errors += 1
            job.on_error(self._away(f"{type(error).__name__}: {error}".rstrip(": ")))
        except Exception as error:  # of a reply that is none
            self.num_errors += 1
            logger.exception("upstream")
            message = f"The vLLM server gave a reply that cannot be read: {type(error).__name__}: {error}"
            job.on_error(ApiError(message, 502, "upstream_malformed"))
        finally:
            with self._lock:
                if id(job) in self._tasks and self._tasks[id(job)][2] is attempt:
                    del self._tasks[id(job)]
            self.on_change()

    async def _stream(self, job: Job, body: dict[str, Any]) -> None:
        open_rows = set(range(job.num_rows))
        async with self.client.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != 200:
                raise self._refused(reply.status_code, await reply.aread())
            async for data in events_of(reply):
                if data == b"[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise self._away(f"it broke off: {chunk['error'].get('message', chunk['error'])}")
                for choice in chunk["choices"]:
                    is_last = choice["finish_reason"] is not None
                    if choice["finish_reason"] not in (None, "stop", "length"):
                        raise self._away(f"it broke off an answer ({choice['finish_reason']})")
                    if is_last:
                        open_rows.discard(choice["index"])
                    job.on_tokens(choice["index"], choice.get("token_ids") or [], is_last)
        if open_rows:
            raise self._away("it closed the connection in the middle of an answer")

    def _refused(self, status: int, body: bytes) -> ApiError:
        try:
            said = json.loads(body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            said = body[:300].decode(errors="replace")
        if status >= 500 or status == 429:
            return self._away(f"it answered {status}: {said}")
        return ApiError(f"The vLLM server refuses the request: {status}: {said}", 502, "upstream_refused")

    def _away(self, reason: str) -> ApiError:
        message = f"The vLLM server that decodes is away: {reason}. Try again later."
        return ApiError(message, 503, "upstream_unavailable", retry_after=RETRY_SECONDS)

    async def check_health(self) -> None:
        """
        Raises:
            [`ApiError`]: if the server does not answer.
        """
        try:
            reply = await self.client.get("/health", timeout=CONNECT_SECONDS)
        except httpx.HTTPError as error:
            raise self._away(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        if reply.status_code != 200:
            raise self._away(f"it answered {reply.status_code} to /health")

    def advance(self, is_due: Callable[[], bool]) -> None:
        pass

    def cancel(self, job: Job) -> None:
        with self._lock:
            found = self._tasks.get(id(job))
        if found is not None:
            found[1].cancel()

    def fail(self, error: ApiError) -> None:
        with self._lock:
            tasks = list(self._tasks.values())
        for job, task, _ in tasks:
            task.cancel()
            job.on_error(error)


async def events_of(reply: httpx.Response) -> AsyncIterator[bytes]:
    """Data of server-sent events. Within a line there may be what httpx's own lines would end at, as U+2028."""
    rest = b""
    async for part in reply.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()

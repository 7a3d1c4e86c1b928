# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A request on its way to its reply."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from fastapi import Request

from ..rewards import majority_vote
from .protocol import ApiError, ChatCompletionRequest, GenerationRequest, too_late
from .scheduler import Job
from .server import Server
from .text import AnswerText


logger = logging.getLogger(__name__)


class Exchange:
    """
    One request on its way: its jobs are submitted, and what comes of them is handed on in the event loop.

    Args:
        server ([`Server`]):
            Server.
        request ([`GenerationRequest`]):
            What is asked for.
        jobs (`list[Job]`):
            One for each of its prompts, see [`~Server.jobs`].
        begun (`float`):
            When it came, by `time.monotonic()`.
    """

    def __init__(self, server: Server, request: GenerationRequest, jobs: list[Job], begun: float):
        self.server, self.request, self.jobs, self.begun = server, request, jobs, begun
        self.is_chat = isinstance(request, ChatCompletionRequest)
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.answers = [AnswerText(server.engine, request.stop_strings) for job in jobs for _ in range(job.num_rows)]
        self._events: asyncio.Queue = asyncio.Queue()
        loop, first = asyncio.get_running_loop(), 0
        for job in jobs:
            job.listen(loop, self._events.put_nowait, first, is_streamed=bool(request.stream))
            first += job.num_rows

    async def pieces(self) -> AsyncIterator[tuple[int, str]]:
        """
        Index and text of each piece of an answer, as it comes.

        Raises:
            [`ApiError`]: if it cannot be had, or not in time.
        """
        self.server.scheduler.submit(self.jobs)
        num_open, deadline = len(self.answers), self.begun + self.server.settings.timeout
        try:
            while num_open > 0:
                try:
                    async with asyncio.timeout(deadline - time.monotonic()):
                        event = await self._events.get()
                except TimeoutError as error:
                    raise too_late(self.server.settings.timeout) from error
                if isinstance(event, ApiError):
                    raise event
                index, token_ids, is_last = event
                piece = self.answers[index].add(token_ids, is_last)
                num_open -= is_last
                if piece or is_last:
                    yield index, piece
        finally:  # also when the client has gone
            if num_open > 0:
                self.server.scheduler.cancel(self.jobs)

    def chosen(self) -> list[int]:
        """Answers that are returned: all of them, or of each prompt the one that is selected."""
        if self.request.selection != "majority":
            return list(range(len(self.answers)))
        found, first = [], 0
        for job in self.jobs:
            texts = [answer.text for answer in self.answers[first : first + job.num_rows]]
            found.append(first + majority_vote(texts))
            first += job.num_rows
        return found

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(len(job.prompt_ids) for job in self.jobs)
        completion = sum(answer.num_tokens for answer in self.answers)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def choice(self, index: int, text: str | None, finish_reason: str | None, is_piece: bool) -> dict:
        """One of the choices of a reply, or a piece of one."""
        row = {"index": index, "logprobs": None, "finish_reason": finish_reason}
        if not self.is_chat:
            return {**row, "text": text or ""}
        if is_piece:
            return {**row, "delta": {} if text is None else {"content": text}}
        return {**row, "message": {"role": "assistant", "content": text, "refusal": None}}

    def reply(self, choices: list[dict], is_piece: bool = False, **others) -> dict:
        kind = ("chat.completion.chunk" if is_piece else "chat.completion") if self.is_chat else "text_completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.request.model,
            "choices": choices,
            **others,
        }

    async def whole(self) -> dict:
        """The reply to a request that is not streamed."""
        async for _ in self.pieces():
            pass
        choices = [
            self.choice(place, self.answers[index].text, self.answers[index].finish_reason, is_piece=False)
            for place, index in enumerate(self.chosen())
        ]
        return self.reply(choices, usage=self.usage)

    async def chunks(self) -> AsyncIterator[dict]:
        """Replies to a request that is streamed, in the order in which they are sent."""
        wants_usage = self.request.stream_options is not None and self.request.stream_options.include_usage
        usage, seen = {"usage": None} if wants_usage else {}, set()

        def chunk(index: int, text: str | None, reason: str | None) -> dict:
            choice = self.choice(index, text, reason, is_piece=True)
            if self.is_chat and index not in seen:
                choice["delta"] = {"role": "assistant", "content": "", **choice["delta"]}
            seen.add(index)
            return self.reply([choice], is_piece=True, **usage)

        if self.request.selection == "majority":  # of which nothing is known before all have ended
            async for _ in self.pieces():
                pass
            for place, index in enumerate(self.chosen()):
                yield chunk(place, self.answers[index].text, None)
                yield chunk(place, None, self.answers[index].finish_reason)
        else:
            async for index, piece in self.pieces():
                if piece:
                    yield chunk(index, piece, None)
                if self.answers[index].finish_reason is not None:
                    yield chunk(index, None, self.answers[index].finish_reason)
        if wants_usage:
            yield self.reply([], is_piece=True, usage=self.usage)

    def note(self, status: int, error: ApiError | None = None) -> None:
        """Count and log how it ended."""
        seconds, usage = time.monotonic() - self.begun, self.usage
        started = [job.started for job in self.jobs if job.started is not None]
        waited = min(started) - self.begun if started else None
        self.server.metrics.note(self.request.model, status, seconds, waited, usage)
        fields = {"id": self.id, "model": self.request.model, "status": status, "seconds": round(seconds, 4)}
        fields |= {
            "waited": None if waited is None else round(waited, 4),
            **usage,
            "stream": bool(self.request.stream),
        }
        if error is not None:
            fields["error"], error.is_counted = error.code, True
        if self.server.settings.logs_contents:
            fields |= {"prompts": self.request.prompts, "answers": [answer.text for answer in self.answers]}
        logger.info("request", extra={"fields": fields})


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(request: Request, answer: Coroutine) -> Any:
    """
    What comes of an answer, which is given up when the client closes the connection.

    Raises:
        [`ClientGone`]: if it has.
    """

    async def until_gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    found, gone = asyncio.ensure_future(answer), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait((found, gone), return_when=asyncio.FIRST_COMPLETED)
        if not found.done():
            raise ClientGone
        return found.result()
    finally:
        gone.cancel()
        found.cancel()

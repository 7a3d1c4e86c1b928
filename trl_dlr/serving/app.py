# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Endpoints of `trl-dlr serve`: OpenAI's API, and what operations need."""

import asyncio
import hmac
import inspect
import json
import logging
import os
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from transformers import PreTrainedTokenizerBase

from ..generation import TransformersEngine, tokenize_prompts
from ..models.hub import find_file
from ..models.latent_policy import LatentPolicyModel
from ..models.main_model import fingerprints_match
from ..models.thinking import THINKING_FILE
from ..reasoners import LatentReasoner
from ..rewards import majority_vote
from .metrics import Metrics
from .protocol import (
    ApiError,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    PolicyRequest,
    error_of_validation,
)
from .scheduler import Job, Scheduler, TransformersDecoder, derived_seed
from .text import AnswerText
from .upstream import UpstreamDecoder


logger = logging.getLogger(__name__)

# What a request may not decide: its arguments for a template are variables of the template
APPLY_CHAT_TEMPLATE = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
CLIENT_GONE = 499  # nginx's status for it
CHARACTERS_PER_TOKEN = 64  # at most, for prompts that are refused unread


@dataclass
class ServerSettings:
    """
    Limits of a server.

    Args:
        api_key (`str`, *optional*):
            Key that requests must have.
        max_rows (`int`, *optional*, defaults to 32):
            Answers that are decoded together at most, and `n` of a request.
        max_waiting (`int`, *optional*, defaults to 256):
            Requests that wait at most.
        timeout (`float`, *optional*, defaults to 300.0):
            Seconds of a request, waiting included.
        max_body_bytes (`int`, *optional*, defaults to 1,000,000):
            Size of a request.
        logs_contents (`bool`, *optional*, defaults to `False`):
            Whether prompts and answers are logged.
    """

    api_key: str | None = None
    max_rows: int = 32
    max_waiting: int = 256
    timeout: float = 300.0
    max_body_bytes: int = 1_000_000
    logs_contents: bool = False


class Server:
    """
    What a process serves: one main model, and policies of it.

    Args:
        reasoner ([`LatentReasoner`]):
            The first policy, with the main model and what decodes for all of them.
        name (`str`):
            Name that it is served under.
        settings ([`ServerSettings`]):
            Limits.
        allow_main_model_mismatch (`bool`, *optional*, defaults to `False`):
            Whether policies of a main model of other weights are served.

    Attributes:
        policies (`dict[str, LatentReasoner]`):
            Policies by the names that they are served under.
        main_model_name (`str`):
            Name that the main model answers under, without latents.
    """

    def __init__(
        self, reasoner: LatentReasoner, name: str, settings: ServerSettings, allow_main_model_mismatch: bool = False
    ):
        self.engine, self.main_processing_class = reasoner.engine, reasoner.main_processing_class
        self.policies = {name: reasoner}
        self.settings = settings
        self.device = reasoner.policy.device
        self.fingerprint = reasoner.policy.config.main_model_fingerprint
        self.allow_main_model_mismatch = allow_main_model_mismatch
        location = reasoner.policy.config.main_model_name_or_path
        self.main_model_name = (
            Path(location).name if location and os.path.isdir(location) else location or "main-model"
        )
        if name == self.main_model_name:
            raise ValueError(f"The name {name!r} is the main model's. Serve the policy as `other_name=policy`.")
        self.metrics = Metrics()
        self.created = int(time.time())
        self.scheduler: Scheduler | None = None  # from `start` on
        self.upstream: UpstreamDecoder | None = None

    def add_policy(self, name: str, location: str) -> None:
        """
        Load a policy and serve it under `name`.

        Raises:
            `ValueError`: if there is none at `location`, it was trained for another main model, or the name is taken.
        """
        if name == self.main_model_name or name in self.policies:
            raise ValueError(f"The name {name!r} is taken. Unload that policy first, or give another `name`.")
        if find_file(location, THINKING_FILE) is not None:
            raise ValueError(f"{location!r} thinks by itself: it has no main model that could be shared.")
        reasoner = LatentReasoner.without_main_model(location)
        self._attach(reasoner.policy)
        for module in filter(None, (reasoner.model, reasoner.value_head)):
            module.to(self.device)
        reasoner.engine, reasoner.main_processing_class = self.engine, self.main_processing_class
        self.policies[name] = reasoner

    def _attach(self, policy: LatentPolicyModel) -> None:
        """Check that a policy is one of this main model."""
        if isinstance(self.engine, TransformersEngine):
            policy.attach_main_model(self.engine.model, allow_mismatch=self.allow_main_model_mismatch)
            return
        # Of a main model on a server only the embeddings are here: its weights were compared with the first policy's
        # fingerprint
        if policy.config.latent_density == "soft_tokens":
            raise ValueError("It has soft tokens, which need the main model's vocabulary: name it first at the start.")
        hidden_size = self.engine.embed_tokens.embedding_dim
        if (policy.config.main_hidden_size or policy.config.hidden_size) != hidden_size:
            raise ValueError(f"It is of a main model of another size than {hidden_size}.")
        fingerprints = self.fingerprint, policy.config.main_model_fingerprint
        if None not in fingerprints and not fingerprints_match(*fingerprints) and not self.allow_main_model_mismatch:
            raise ValueError(f"It was built for {policy.config.main_model_name_or_path!r}, which has other weights.")

    def start(self) -> None:
        """Begin to work, in the running event loop."""
        if isinstance(self.engine, TransformersEngine):
            decoder = TransformersDecoder(self.engine)
        else:
            loop = asyncio.get_running_loop()
            decoder = self.upstream = UpstreamDecoder(self.engine, loop, lambda: self.scheduler.wake())
        self.scheduler = Scheduler(decoder, self.settings.max_rows, self.settings.max_waiting)

    # ---- Requests ----

    def jobs(self, request: GenerationRequest) -> list[Job]:
        """What a request asks for, a job for each of its prompts. What cannot be done is refused before any work."""
        name, reasoner = request.model, self.policies.get(request.model)
        if reasoner is None and name != self.main_model_name:
            known = ", ".join([*self.policies, self.main_model_name])
            message = f"The model {name!r:.200} does not exist here. There are: {known}."
            raise ApiError(message, 404, "model_not_found", "model")
        num_samples = request.n or 1
        if num_samples * len(request.prompts) > self.settings.max_rows:
            raise invalid("n", f"with all prompts it asks for {num_samples * len(request.prompts)} answers, of at most "
                          f"{self.settings.max_rows}")  # fmt: skip
        temperature = (1.0 if num_samples > 1 else 0.0) if request.temperature is None else request.temperature
        if reasoner is None:
            for field_name in ("num_latents", "selection"):
                if getattr(request, field_name) is not None:
                    raise invalid(field_name, "the main model alone has no latents; ask a policy")
        if request.selection == "best" and reasoner.value_head is None:
            raise invalid("selection", "this policy has no value head, so 'best' is unknown; 'majority' is there")
        if request.num_latents is not None:
            try:
                reasoner.check_num_latents(request.num_latents)
            except ValueError as error:
                raise invalid("num_latents", str(error)) from error
        if taken := APPLY_CHAT_TEMPLATE & (request.chat_template_kwargs or {}).keys():
            raise invalid("chat_template_kwargs", f"{', '.join(sorted(taken))} cannot be set by a request")
        chat_kwargs = {**({} if reasoner is None else reasoner.policy.config.chat_template_kwargs or {})}
        chat_kwargs |= request.chat_template_kwargs or {}
        most = CHARACTERS_PER_TOKEN * (self.engine.max_positions or 2**20)
        if any(len(str(prompt)) > most for prompt in request.prompts):
            raise ApiError(f"A prompt has more than {most} characters.", 400, "context_length_exceeded")
        try:
            prompt_ids = tokenize_prompts(request.prompts, self.main_processing_class, chat_kwargs)
            question_ids = [[] for _ in prompt_ids]
            if reasoner is not None:
                question_ids = tokenize_prompts(request.prompts, reasoner.processing_class, chat_kwargs)
        except Exception as error:  # templates raise what they like
            param = "messages" if isinstance(request, ChatCompletionRequest) else "prompt"
            raise invalid(param, f"it cannot be rendered: {error}") from error
        limit = request.limit or self.default_limit(reasoner)
        most_latents = 0 if reasoner is None else (request.num_latents or reasoner.policy.config.num_latents)
        if not all(prompt_ids):
            raise invalid("messages" if isinstance(request, ChatCompletionRequest) else "prompt", "it has no tokens")
        for ids, question in zip(prompt_ids, question_ids, strict=True):
            try:
                self.engine.check_length(len(ids), most_latents, limit)
                if reasoner is not None:
                    reasoner.policy.check_length(len(question))
            except ValueError as error:
                raise ApiError(str(error), 400, "context_length_exceeded") from error
        seed = secrets.randbits(62) if request.seed is None else request.seed
        return [
            Job(
                model=name,
                reasoner=reasoner,
                question_ids=question,
                prompt_ids=ids,
                num_samples=num_samples,
                seed=derived_seed(seed, index),
                is_sampled=reasoner is not None and temperature > 0,
                temperature=temperature if reasoner is None else 0.0,
                num_latents=request.num_latents,
                max_new_tokens=limit,
                stop_strings=request.stop_strings,
                decodes_best=request.selection == "best",
            )
            for index, (ids, question) in enumerate(zip(prompt_ids, question_ids, strict=True))
        ]

    def default_limit(self, reasoner: LatentReasoner | None) -> int:
        trained = None if reasoner is None else reasoner.policy.config.max_completion_length
        return trained or self.engine.max_new_tokens


def invalid(param: str, message: str) -> ApiError:
    return ApiError(f"Invalid value for '{param}': {message}.", code="invalid_value", param=param)


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
    """

    def __init__(self, server: Server, request: GenerationRequest, jobs: list[Job]):
        self.server, self.request, self.jobs = server, request, jobs
        self.is_chat = isinstance(request, ChatCompletionRequest)
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created, self.begun = int(time.time()), time.monotonic()
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
                    event = await asyncio.wait_for(self._events.get(), deadline - time.monotonic())
                except TimeoutError as error:
                    message = f"The answer took longer than the {self.server.settings.timeout:g} seconds of a request."
                    raise ApiError(message, 504, "timeout") from error
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
        waited = (min(started) if started else time.monotonic()) - self.begun
        self.server.metrics.note(self.request.model, status, seconds, waited, usage)
        fields = {"id": self.id, "model": self.request.model, "status": status, "seconds": round(seconds, 4)}
        fields |= {"waited": round(waited, 4), **usage, "stream": bool(self.request.stream)}
        if error is not None:
            fields["error"], error.is_counted = error.code, True
        if self.server.settings.logs_contents:
            fields |= {"prompts": self.request.prompts, "answers": [answer.text for answer in self.answers]}
        logger.info("request", extra={"fields": fields})


class LimitBody:
    """
    Middleware that refuses a body that is too large, before it is read as JSON.

    Args:
        app (`Callable`):
            ASGI application.
        max_bytes (`int`):
            Bytes at most.
    """

    def __init__(self, app, max_bytes: int):
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        error = ApiError(f"The body is larger than {self.max_bytes:,} bytes.", 413, "body_too_large")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_bytes:
            return await error_response(error)(scope, receive, send)
        parts, size, more = [], 0, scope["method"] in ("POST", "PUT", "PATCH", "DELETE")
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None  # the client has gone
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self.max_bytes:
                return await error_response(error)(scope, receive, send)
        body = iter([{"type": "http.request", "body": b"".join(parts), "more_body": False}])

        async def again():
            return next(body, None) or await receive()

        return await self.app(scope, again, send)


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


def create_app(server: Server) -> FastAPI:
    """
    The application that serves policies.

    Args:
        server ([`Server`]):
            Main model, policies and limits.
    """
    settings = server.settings

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        server.start()
        logger.info("ready", extra={"fields": {"models": [*server.policies, server.main_model_name]}})
        try:
            yield
        finally:
            await asyncio.to_thread(server.scheduler.close)

    reading, loading = asyncio.Lock(), asyncio.Lock()
    app = FastAPI(title="trl-dlr", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(LimitBody, max_bytes=settings.max_body_bytes)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError):
        if not error.is_counted:  # as a request of a model
            server.metrics.refused(error.status)
        return error_response(error)

    @app.exception_handler(ValidationError)
    async def validation_error(request: Request, error: ValidationError):
        return await api_error(request, error_of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException):
        where = f"{request.method} {request.url.path:.200}"
        return error_response(ApiError(f"{where}: {error.detail}", error.status_code))

    @app.exception_handler(Exception)
    async def other_error(request: Request, error: Exception):
        logger.error("request failed", exc_info=error)
        return error_response(ApiError("The server had an error. Its log says more.", 500, "internal_error"))

    def check_key(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Bytes of a header come as Latin-1
        is_right = settings.api_key is None or (
            scheme.lower() == "bearer" and hmac.compare_digest(given.encode("latin-1"), settings.api_key.encode())
        )
        if not is_right:
            raise ApiError("Incorrect API key provided.", 401, "invalid_api_key")

    def check_admin(request: Request) -> None:
        if settings.api_key is None:
            message = "Policies can only be loaded and unloaded on a server that was started with an API key."
            raise ApiError(message, 403, "no_api_key")
        check_key(request)

    with_key = [Depends(check_key)]

    def card(name: str) -> dict:
        parent = None if name == server.main_model_name else server.main_model_name
        return {"id": name, "object": "model", "created": server.created, "owned_by": "trl-dlr", "parent": parent}

    @app.get("/v1/models", dependencies=with_key)
    async def list_models():
        return {"object": "list", "data": [card(name) for name in [*server.policies, server.main_model_name]]}

    @app.get("/v1/models/{name:path}", dependencies=with_key)
    async def get_model(name: str):
        if name not in server.policies and name != server.main_model_name:
            raise ApiError(f"The model {name!r:.200} does not exist here.", 404, "model_not_found", "model")
        return card(name)

    @app.post("/v1/chat/completions", dependencies=with_key)
    async def chat(request: Request):
        return await answer(request, ChatCompletionRequest)

    @app.post("/v1/completions", dependencies=with_key)
    async def complete(request: Request):
        return await answer(request, CompletionRequest)

    async def answer(request: Request, kind: type[GenerationRequest]) -> Response:
        body = kind.model_validate_json(await request.body())
        async with reading:  # tokenizers are no friends of several threads
            jobs = await asyncio.to_thread(server.jobs, body)
        exchange = Exchange(server, body, jobs)
        try:
            if not body.stream:
                reply = await unless_gone(request, exchange.whole())
                exchange.note(200)
                return JSONResponse(reply)
            chunks = exchange.chunks()
            first = await unless_gone(request, anext(chunks))  # what fails before it has a status of its own
        except ClientGone:
            exchange.note(CLIENT_GONE)
            return Response(status_code=CLIENT_GONE)
        except ApiError as error:
            exchange.note(error.status, error)
            raise

        async def events():
            status, failure = CLIENT_GONE, None  # unless it comes to an end
            try:
                yield f"data: {json.dumps(first, ensure_ascii=False)}\n\n"
                async for chunk in chunks:
                    yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
                yield "data: [DONE]\n\n"
                status = 200
            except ApiError as error:
                status, failure = error.status, error
                yield f"data: {json.dumps(error.body, ensure_ascii=False)}\n\n"
            finally:
                await chunks.aclose()
                exchange.note(status, failure)

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @app.post("/v1/policies", dependencies=[Depends(check_admin)], status_code=201)
    async def load(request: Request):
        body = PolicyRequest.model_validate_json(await request.body())
        if os.path.exists(body.policy):
            raise invalid("policy", "it is a path on this machine; only repositories on the Hub are loaded")
        name = body.name or body.policy
        async with loading:
            try:
                await asyncio.to_thread(server.add_policy, name, body.policy)
            except Exception as error:  # of any file of it
                raise ApiError(f"The policy cannot be loaded: {error}", 400, "policy_not_loaded", "policy") from error
        logger.info("policy loaded", extra={"fields": {"model": name, "policy": body.policy}})
        return card(name)

    @app.delete("/v1/policies/{name:path}", dependencies=[Depends(check_admin)])
    async def unload(name: str):
        if server.policies.pop(name, None) is None:
            raise ApiError(f"There is no policy {name!r:.200}.", 404, "model_not_found", "name")
        logger.info("policy unloaded", extra={"fields": {"model": name}})
        return {"id": name, "object": "model", "deleted": True}

    @app.get("/health")
    async def health():
        if not server.scheduler.is_alive:
            raise ApiError("The thread that decodes has ended.", 503, "decoding_ended")
        if server.upstream is not None:
            await server.upstream.check_health()
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics():
        server.metrics.observe(server)
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


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

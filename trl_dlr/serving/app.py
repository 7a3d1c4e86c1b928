# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Endpoints of `trl-dlr serve`: OpenAI's API, and what operations need."""

import asyncio
import hmac
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from .exchange import ClientGone, Exchange, unless_gone
from .protocol import (
    ApiError,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    PolicyRequest,
    error_of_validation,
    invalid,
)
from .server import Server, ServerSettings


logger = logging.getLogger(__name__)

CLIENT_GONE = 499  # nginx's status for it
BODY_SECONDS = 30.0  # in which a request has to come, whole


class Gate:
    """
    Middleware that lets in whoever has the key, with a body that is JSON, not too large, and comes in time: before any
    of it is kept for long or read.

    Args:
        app (`Callable`):
            ASGI application.
        settings ([`ServerSettings`]):
            Key and size.
        refuse (`Callable[[ApiError], Response]`):
            Makes the reply.
    """

    def __init__(self, app, settings: ServerSettings, refuse: Callable[[ApiError], Response]):
        self.app = app
        self.settings = settings
        self.refuse = refuse

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] in ("/health", "/metrics"):
            return await self.app(scope, receive, send)
        try:
            headers = Headers(scope=scope)
            self._check(headers, has_body := scope["method"] in ("POST", "PUT", "PATCH"))
            body = b""
            if has_body or headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
                async with asyncio.timeout(BODY_SECONDS):
                    body = await self._body(receive)
        except TimeoutError:
            error = ApiError(f"The body took longer than {BODY_SECONDS:g} seconds.", 408, "body_too_slow")
            return await self.refuse(error)(scope, receive, send)
        except ApiError as error:
            return await self.refuse(error)(scope, receive, send)
        except ClientGone:
            return None
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again():
            return next(messages, None) or await receive()

        return await self.app(scope, again, send)

    def _check(self, headers: Headers, has_body: bool) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Bytes of a header come as Latin-1
        is_right = self.settings.api_key is None or (
            scheme.lower() == "bearer" and hmac.compare_digest(given.encode("latin-1"), self.settings.api_key.encode())
        )
        if not is_right:
            raise ApiError("Incorrect API key provided.", 401, "invalid_api_key")
        # Which a page in a browser cannot send to another server without asking it first
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if has_body and kind != "application/json":
            raise ApiError(f"The body must be 'application/json', got {kind!r:.100}.", 415, "not_json")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.settings.max_body_bytes:
            raise self._too_large

    async def _body(self, receive) -> bytes:
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientGone
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self.settings.max_body_bytes:
                raise self._too_large
        return b"".join(parts)

    @property
    def _too_large(self) -> ApiError:
        return ApiError(f"The body is larger than {self.settings.max_body_bytes:,} bytes.", 413, "body_too_large")


class EventStream(StreamingResponse):
    """
    Server-sent events, which end when their time is over, also where the client does not read them.

    Args:
        events (`AsyncIterator[str]`):
            The events.
        deadline (`float`):
            When, by `time.monotonic()`.
    """

    def __init__(self, events: AsyncIterator[str], deadline: float):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.deadline = deadline

    async def stream_response(self, send):
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                await super().stream_response(send)
        except TimeoutError:  # the reply is not whole, so that its connection is closed
            pass
        finally:
            await self.body_iterator.aclose()


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
            await server.close()

    def refuse(error: ApiError) -> JSONResponse:
        if not error.is_counted:  # as a request of a model
            server.metrics.refused(error.status)
            logger.info("refused", extra={"fields": {"status": error.status, "error": error.code}})
        return JSONResponse(error.body, error.status, error.headers)

    loading = asyncio.Lock()
    hidden = dict.fromkeys(("docs_url", "redoc_url", "openapi_url"))
    app = FastAPI(title="trl-dlr", lifespan=lifespan, redirect_slashes=False, **hidden)
    app.add_middleware(Gate, settings=settings, refuse=refuse)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError):
        return refuse(error)

    @app.exception_handler(ValidationError)
    async def validation_error(request: Request, error: ValidationError):
        return refuse(error_of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException):
        refusal = ApiError(f"{request.method} {request.url.path:.200}: {error.detail}", error.status_code)
        refusal.headers |= error.headers or {}
        return refuse(refusal)

    @app.exception_handler(Exception)
    async def other_error(request: Request, error: Exception):
        logger.error("request failed", exc_info=error)
        return refuse(ApiError("The server had an error. Its log says more.", 500, "internal_error"))

    def check_admin() -> None:
        if settings.api_key is None:
            message = "Policies can only be loaded and unloaded on a server that was started with an API key."
            raise ApiError(message, 403, "no_api_key")

    def card(name: str) -> dict:
        parent = None if name == server.main_model_name else server.main_model_name
        return {"id": name, "object": "model", "created": server.created, "owned_by": "trl-dlr", "parent": parent}

    @app.get("/v1/models")
    async def list_models():
        return {"object": "list", "data": [card(name) for name in [*server.policies, server.main_model_name]]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str):
        if name not in server.policies and name != server.main_model_name:
            raise ApiError(f"The model {name!r:.200} does not exist here.", 404, "model_not_found", "model")
        return card(name)

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        return await answer(request, ChatCompletionRequest)

    @app.post("/v1/completions")
    async def complete(request: Request):
        return await answer(request, CompletionRequest)

    async def answer(request: Request, kind: type[GenerationRequest]) -> Response:
        begun = time.monotonic()
        try:
            body, jobs = await unless_gone(request, server.read(kind, await request.body(), begun))
        except ClientGone:
            server.metrics.refused(CLIENT_GONE)
            return Response(status_code=CLIENT_GONE)
        exchange = Exchange(server, body, jobs, begun)
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
        except Exception as error:
            logger.error("request failed", exc_info=error)
            refusal = ApiError("The server had an error. Its log says more.", 500, "internal_error")
            exchange.note(500, refusal)
            raise refusal from error

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
            except Exception:
                status = 500
                raise
            finally:
                await chunks.aclose()
                exchange.note(status, failure)

        # What is late by its own account says so in an event
        return EventStream(events(), begun + settings.timeout + 1)

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

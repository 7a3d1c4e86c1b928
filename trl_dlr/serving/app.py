# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Endpoints of `trl-dlr serve`: OpenAI's API, and what operations need."""

import asyncio
import hmac
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
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
from .server import Server


logger = logging.getLogger(__name__)

CLIENT_GONE = 499  # nginx's status for it


class LimitBody:
    """
    Middleware that refuses a body that is too large, before it is read as JSON.

    Args:
        app (`Callable`):
            ASGI application.
        max_bytes (`int`):
            Bytes at most.
        refuse (`Callable[[ApiError], Response]`):
            Makes the reply.
    """

    def __init__(self, app, max_bytes: int, refuse: Callable[[ApiError], Response]):
        self.app = app
        self.max_bytes = max_bytes
        self.refuse = refuse

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        error = ApiError(f"The body is larger than {self.max_bytes:,} bytes.", 413, "body_too_large")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_bytes:
            return await self.refuse(error)(scope, receive, send)
        parts, size, more = [], 0, scope["method"] in ("POST", "PUT", "PATCH", "DELETE")
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None  # the client has gone
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self.max_bytes:
                return await self.refuse(error)(scope, receive, send)
        body = iter([{"type": "http.request", "body": b"".join(parts), "more_body": False}])

        async def again():
            return next(body, None) or await receive()

        return await self.app(scope, again, send)


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
        return JSONResponse(error.body, error.status, error.headers)

    reading, loading = asyncio.Lock(), asyncio.Lock()
    app = FastAPI(title="trl-dlr", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(LimitBody, max_bytes=settings.max_body_bytes, refuse=refuse)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError):
        return refuse(error)

    @app.exception_handler(ValidationError)
    async def validation_error(request: Request, error: ValidationError):
        return refuse(error_of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException):
        return refuse(ApiError(f"{request.method} {request.url.path:.200}: {error.detail}", error.status_code))

    @app.exception_handler(Exception)
    async def other_error(request: Request, error: Exception):
        logger.error("request failed", exc_info=error)
        return refuse(ApiError("The server had an error. Its log says more.", 500, "internal_error"))

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
        begun, body = time.monotonic(), kind.model_validate_json(await request.body())
        async with reading:  # tokenizers are no friends of several threads
            jobs = await asyncio.to_thread(server.jobs, body)
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

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Serve policies of one main model with OpenAI's API.

Examples:

    trl-dlr serve --policy user/a other/b
    trl-dlr serve --policy sums=runs/sums codes=runs/codes --engine http://localhost:8001 --port 8000
    TRL_DLR_API_KEY=... trl-dlr serve --policy user/a --host 0.0.0.0
"""

import ipaddress
import json
import logging
import math
import os
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..models.hub import check_dtype
from ..option_docs import described
from ..reasoners import LatentReasoner
from .parser import Repeated


KEY = "TRL_DLR_API_KEY"


@described
@dataclass
class ServeArguments:
    """
    Arguments of `trl-dlr serve`.

    Args:
        policy (`list[str]`, *optional*):
            Hub ids or folders of policies of one main model, each as `name=policy` if it is to be served under another
            name. Several follow one `--policy`, or each has its own.
        main_model_name_or_path (`str`, *optional*):
            Main model, also as `--main_model`. If `None`, the one that the first policy was trained for.
        main_model_dtype (`str`, *optional*):
            Precision of its weights. If `None`, the one that the first policy was trained with.
        engine (`str`, *optional*, defaults to `"transformers"`):
            What decodes: `transformers`, or the URL of a vLLM server that was started with `--enable-prompt-embeds`.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen at.
        port (`int`, *optional*, defaults to `8000`):
            Port to listen at.
        api_key (`str`, *optional*):
            Key that clients have to give. If `None`, that in the environment variable TRL_DLR_API_KEY, which other
            users of the machine cannot read. Without any, everybody is served, and no policy is loaded or unloaded.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Tokens of an answer at most, where neither the request nor the policy says.
        max_rows (`int`, *optional*, defaults to `32`):
            Answers that are decoded together at most, and `n` of a request.
        max_waiting (`int`, *optional*, defaults to `256`):
            Requests of a model that wait at most; more get status 429.
        timeout (`float`, *optional*, defaults to `300.0`):
            Seconds of a request at most, waiting included.
        device (`str`, *optional*):
            Where the models go. If `None`, a GPU if there is one.
        logs_contents (`bool`, *optional*, defaults to `False`):
            Whether prompts and answers are logged.
        allow_main_model_mismatch (`bool`, *optional*, defaults to `False`):
            Whether to go on with a main model of other weights.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the main model may be executed.
    """

    policy: list[str] = field(default_factory=list, metadata={"action": Repeated})
    main_model_name_or_path: str | None = field(default=None, metadata={"aliases": ["--main_model"]})
    main_model_dtype: str | None = None
    engine: str = "transformers"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    max_new_tokens: int = 256
    max_rows: int = 32
    max_waiting: int = 256
    timeout: float = 300.0
    device: str | None = None
    logs_contents: bool = False
    allow_main_model_mismatch: bool = False
    trust_remote_code: bool = False

    def __post_init__(self):
        if not self.policy:
            raise ValueError("`policy` must name at least one policy: pass --policy with a Hub id or a folder.")
        if len(self.policies) < len(self.policy):
            raise ValueError(f"`policy` must have different names, got {', '.join(self.policy)}. Give `name=policy`.")
        if self.engine != "transformers" and (
            not self.engine.startswith(("http://", "https://")) or "," in self.engine
        ):
            raise ValueError(f"`engine` must be 'transformers' or the URL of one vLLM server, got {self.engine!r}.")
        for name in ("max_new_tokens", "max_rows", "max_waiting", "timeout"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"`{name}` must be a positive number, got {getattr(self, name)}.")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"`port` must be between 0 and 65535, got {self.port}.")
        check_dtype("main_model_dtype", self.main_model_dtype)
        # A file that holds a key ends with a line break
        self.api_key = (self.api_key or os.environ.get(KEY) or "").strip() or None

    @property
    def policies(self) -> dict[str, str]:
        """Where each policy is, by its name: a folder's own, or the Hub id."""
        named = {}
        for policy in self.policy:
            name, is_named, location = policy.partition("=")
            if os.path.isdir(policy):
                name, location = Path(policy).resolve().name, policy
            elif not is_named:
                name, location = policy, policy
            if not name or not location:
                raise ValueError(f"`policy` must be `policy` or `name=policy`, got {policy!r}.")
            named[name] = location
        return named


ARGUMENTS = (ServeArguments,)


class JsonFormatter(logging.Formatter):
    """A line of JSON for each record."""

    def format(self, record: logging.LogRecord) -> str:
        row = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)), "level": record.levelname}
        row |= {"event": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            row["exception"] = self.formatException(record.exc_info)
        return json.dumps(row, ensure_ascii=False)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(args: ServeArguments) -> None:
    try:
        import uvicorn

        from ..serving import Server, ServerSettings, create_app
    except ImportError as error:
        raise ImportError(f"`trl-dlr serve` needs {error.name}: pip install 'trl_dlr[serve]'.") from error

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("trl_dlr", "uvicorn"):
        logging.getLogger(name).handlers = [handler]
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).propagate = False
    if args.api_key is None and not is_loopback(args.host):
        logging.getLogger("trl_dlr").warning(f"everybody who reaches {args.host} is served: there is no API key")

    if args.port:  # before anything is loaded
        with socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((args.host, args.port))
            except OSError as error:
                raise ValueError(
                    f"`host={args.host}` and `port={args.port}` cannot be listened at: {error}."
                ) from error

    (name, location), *others = args.policies.items()
    reasoner = LatentReasoner.from_pretrained(
        location,
        args.main_model_name_or_path,
        engine=args.engine,
        max_new_tokens=args.max_new_tokens,
        main_model_init_kwargs={} if args.main_model_dtype is None else {"dtype": args.main_model_dtype},
        allow_main_model_mismatch=args.allow_main_model_mismatch,
        trust_remote_code=args.trust_remote_code,
        device=args.device,
    )
    settings = ServerSettings(
        api_key=args.api_key,
        max_rows=args.max_rows,
        max_waiting=args.max_waiting,
        timeout=args.timeout,
        logs_contents=args.logs_contents,
    )
    server = Server(reasoner, name, settings, args.allow_main_model_mismatch)
    for other, place in others:
        server.add_policy(other, place)
    # Answers under way are finished after SIGTERM, as long as a request may take
    drain = int(args.timeout) + 1
    uvicorn.run(
        create_app(server),
        host=args.host,
        port=args.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=drain,
        server_header=False,
    )

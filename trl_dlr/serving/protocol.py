# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Requests and replies in the format of OpenAI's API, and what is refused of it by name."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


MAX_STOP_STRINGS = 4  # as OpenAI has it
MAX_STOP_LENGTH = 1000  # characters, which are looked for after every token
# Fields of OpenAI's API that mean nothing here: they are accepted with the value that asks for nothing
NEUTRAL: dict[str, tuple] = {
    "top_p": (None, 1, 1.0),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None,),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "echo": (None, False),
    "suffix": (None,),
    "best_of": (None, 1),
}
PART = r"\w[\w.-]*"  # of a name, never one of a path that leads elsewhere
UNREAD = ("user", "metadata", "safety_identifier", "prompt_cache_key")


class ApiError(Exception):
    """
    An error as OpenAI's API reports it.

    Args:
        message (`str`):
            What is wrong, and what would be right.
        status (`int`, *optional*, defaults to 400):
            HTTP status.
        code (`str`, *optional*):
            Name of the error, for programs.
        param (`str`, *optional*):
            Field of the request.
        retry_after (`int`, *optional*):
            Seconds after which trying again may help.
    """

    is_counted = False  # in the metrics

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str, message: str) -> ApiError:
    return ApiError(f"Invalid value for '{param}': {message}.", code="invalid_value", param=param)


def busy(num_waiting: int, most: int) -> ApiError:
    message = f"The server is busy: {num_waiting} requests wait, and at most {most} may. Try again later."
    return ApiError(message, 429, "queue_full", retry_after=1)


def too_late(seconds: float) -> ApiError:
    return ApiError(f"The answer took longer than the {seconds:g} seconds of a request.", 504, "timeout")


class Message(BaseModel):
    """A message of a conversation, whose content is text."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list["TextPart"]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def leave_out_what_is_empty(cls, values: Any) -> Any:
        """What this server's and others' replies have beside a text may come back with the next request."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name in cls.model_fields or value not in (None, [])}

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """
    What both kinds of requests have in common.

    Args:
        model (`str`):
            Name of a policy, or of the main model, which then answers without latents.
        n (`int`, *optional*, defaults to 1):
            Answers, or with `selection` the trajectories that the answer is selected from.
        max_tokens (`int`, *optional*):
            Tokens of an answer at most. If `None`, as many as the policy was trained with.
        stop (`str` or `list[str]`, *optional*):
            Texts that end an answer, which they are not part of.
        seed (`int`, *optional*):
            Seed of the latents, or of the main model's tokens if it is asked by its own name.
        temperature (`float`, *optional*):
            0 takes the means of the latents. Above, latents are sampled from the policy's density, as it was trained:
            that is this model's randomness, and it is the same for every number above 0. The main model writes its
            likeliest tokens in either case. Asked by its own name, it samples tokens with this temperature. If `None`, latents are sampled where there are several answers.
        stream (`bool`, *optional*, defaults to `False`):
            Whether the answer comes in pieces.
        num_latents (`int`, *optional*):
            Latents of a trajectory at most, fewer than the policy was trained with.
        selection (`str`, *optional*):
            Returns one answer: one that gives the `"majority"`'s answer, or the `"best"` by the policy's value head.
        chat_template_kwargs (`dict`, *optional*):
            Arguments for the chat templates, beside those that the policy was trained with.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    n: Annotated[int, Field(ge=1, strict=True)] | None = None
    max_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False, strict=True)] | None = None
    stream: Annotated[bool, Field(strict=True)] | None = None
    stream_options: StreamOptions | None = None
    num_latents: Annotated[int, Field(ge=1, strict=True)] | None = None
    selection: Literal["majority", "best"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_by_name(cls, values: Any) -> Any:
        """Refuse what the API has and this server does not, and what nobody has, as OpenAI does."""
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in NEUTRAL:
                if not any(value == allowed and type(value) is type(allowed) for allowed in NEUTRAL[name]):
                    allowed = " or ".join(repr(each) for each in NEUTRAL[name] if each is not None)
                    remedy = f"Leave it out{f', or give {allowed}' if allowed else ''}."
                    raise ApiError(
                        f"Unsupported parameter: '{name}' is not supported by this server, got {value!r:.100}. {remedy}",
                        code="unsupported_parameter",
                        param=name,
                    )
            elif name not in UNREAD:
                raise ApiError(f"Unknown parameter: '{name:.100}'.", code="unknown_parameter", param=name[:100])
        return kept

    @model_validator(mode="after")
    def check(self) -> "GenerationRequest":
        stops = self.stop_strings
        if len(stops) > MAX_STOP_STRINGS or not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
            raise ValueError(f"stop: must be at most {MAX_STOP_STRINGS} texts of 1 to {MAX_STOP_LENGTH} characters")
        if self.selection is not None and (self.n or 1) == 1:
            raise ValueError("selection: needs several answers to select from, 'n' above 1")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: is only allowed with 'stream'")
        return self

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most."""
        return self.max_tokens


class ChatCompletionRequest(GenerationRequest):
    """A request to `/v1/chat/completions`, see [`GenerationRequest`]."""

    prompt_field: ClassVar[str] = "messages"
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None

    @model_validator(mode="after")
    def check_messages(self) -> "ChatCompletionRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: is the older name of 'max_completion_tokens'; give one of them")
        if not any(message.text.strip() for message in self.messages):
            raise ValueError("messages: must have a text")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def prompts(self) -> list[list[dict[str, str]]]:
        # Templates know the developer's role by its older name
        roles = [message.role.replace("developer", "system") for message in self.messages]
        return [[{"role": role, "content": m.text} for role, m in zip(roles, self.messages, strict=True)]]


class CompletionRequest(GenerationRequest):
    """A request to `/v1/completions`, see [`GenerationRequest`]: prompts as they stand, without a chat template."""

    prompt_field: ClassVar[str] = "prompt"
    prompt: str | Annotated[list[str], Field(min_length=1)]

    @model_validator(mode="after")
    def check_prompts(self) -> "CompletionRequest":
        if not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("prompt: must not be empty")
        if self.chat_template_kwargs:
            raise ValueError("chat_template_kwargs: has no meaning here, where no template is rendered")
        return self

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class PolicyRequest(BaseModel):
    """A request to load a policy: its repository on the Hub, and the name that it is served under."""

    model_config = ConfigDict(extra="forbid")

    policy: Annotated[str, Field(pattern=f"^{PART}/{PART}$", max_length=200)]
    name: Annotated[str, Field(pattern=f"^{PART}(/{PART})*$", max_length=200)] | None = None


# What fields of several types are to be, and what pydantic calls these
UNIONS = {
    "content": ("a text, or parts of type 'text' alone", ("str", "list[TextPart]")),
    "prompt": ("a text or a list of texts; tokens are not read", ("str", "list[str]", "constrained-list")),
    "stop": ("a text or a list of texts", ("str", "list[str]")),
}


def error_of_validation(errors: list[dict[str, Any]]) -> ApiError:
    """The first of pydantic's errors, in OpenAI's format."""
    first = errors[0]
    where, message = list(first.get("loc", ())), first["msg"].removeprefix("Value error, ")
    for name, (right, branches) in UNIONS.items():
        if name in where:
            where = [part for part in where if part not in branches]
            message = f"it must be {right}" if first["type"] != "missing" else message
    where = [str(part) for part in where]
    if first["type"] == "json_invalid":
        return ApiError(f"The body is no JSON: {first.get('ctx', {}).get('error', message)}.", code="invalid_json")
    if first["type"] == "value_error" and ": " in message:  # of our own, which names the field
        name, _, message = message.partition(": ")
        where = [name]
    param = ".".join(where) or None
    if first["type"] == "missing" and param is not None:
        return ApiError(f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)
    if param is None:
        return ApiError(f"The body must be a JSON object with the request: {message}.", code="invalid_value")
    seen = "" if not isinstance(first.get("input"), (str, int, float, bool)) else f", got {first['input']!r:.100}"
    return ApiError(f"Invalid value for '{param}': {message}{seen}.", code="invalid_value", param=param)

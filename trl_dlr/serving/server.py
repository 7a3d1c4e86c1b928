# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What a process serves, and what its requests ask for."""

import asyncio
import inspect
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..generation import TransformersEngine, tokenize_prompts
from ..models.hub import find_file
from ..models.latent_policy import LatentPolicyModel
from ..models.main_model import fingerprints_match
from ..models.thinking import THINKING_FILE
from ..reasoners import LatentReasoner
from .metrics import Metrics
from .protocol import ApiError, GenerationRequest, busy, invalid, too_late
from .scheduler import Job, Scheduler, TransformersDecoder, derived_seed
from .upstream import UpstreamDecoder


# What a request may not decide: its arguments for a template are variables of the template
APPLY_CHAT_TEMPLATE = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
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
            Requests of a model that wait at most, and requests that wait to be read.
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
        self._reader, self._num_unread = ThreadPoolExecutor(1), 0

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

    async def close(self) -> None:
        """End the work. Requests under way have been waited for."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.scheduler.close)
        if self.upstream is not None:
            await self.upstream.client.aclose()

    # ---- Requests ----

    async def read(
        self, kind: type[GenerationRequest], body: bytes, begun: float
    ) -> tuple[GenerationRequest, list[Job]]:
        """
        A request and its jobs, see [`~Server.jobs`]: one after the other, since tokenizers are no friends of several
        threads.

        Raises:
            [`ApiError`]: if it cannot be done, too many wait for it, or its time is over before its turn.
        """
        if self._num_unread >= self.settings.max_waiting:
            raise busy(self._num_unread, self.settings.max_waiting)

        def read() -> tuple[GenerationRequest, list[Job]]:
            request = kind.model_validate_json(body)
            return request, self.jobs(request)

        self._num_unread += 1
        try:
            async with asyncio.timeout(begun + self.settings.timeout - time.monotonic()):
                return await asyncio.get_running_loop().run_in_executor(self._reader, read)
        except TimeoutError as error:
            raise too_late(self.settings.timeout) from error
        finally:
            self._num_unread -= 1

    def jobs(self, request: GenerationRequest) -> list[Job]:
        """What a request asks for, a job for each of its prompts. What cannot be done is refused before any work."""
        reasoner = self.policies.get(request.model)
        if reasoner is None and request.model != self.main_model_name:
            known = ", ".join([*self.policies, self.main_model_name])
            message = f"The model {request.model!r:.200} does not exist here. There are: {known}."
            raise ApiError(message, 404, "model_not_found", "model")
        self._check(request, reasoner)
        num_samples, num_latents = request.n or 1, self._num_latents(request, reasoner)
        temperature = (1.0 if num_samples > 1 else 0.0) if request.temperature is None else request.temperature
        seed = secrets.randbits(32) if request.seed is None else request.seed
        if not 0 <= seed < 2**32:
            seed = derived_seed(seed)
        return [
            Job(
                model=request.model,
                reasoner=reasoner,
                question_ids=question_ids,
                prompt_ids=prompt_ids,
                num_samples=num_samples,
                seed=seed if index == 0 else derived_seed(seed, "prompt", index),
                is_sampled=reasoner is not None and temperature > 0,
                temperature=temperature if reasoner is None else 0.0,
                num_latents=request.num_latents,
                max_new_tokens=request.limit or self._default_limit(reasoner, len(prompt_ids) + num_latents),
                stop_strings=request.stop_strings,
                decodes_best=request.selection == "best",
            )
            for index, (prompt_ids, question_ids) in enumerate(self._tokenize(request, reasoner, num_latents))
        ]

    def _check(self, request: GenerationRequest, reasoner: LatentReasoner | None) -> None:
        """Refuse what this server, the policy or the main model alone cannot do."""
        num_answers = (request.n or 1) * len(request.prompts)
        if num_answers > self.settings.max_rows:
            at_most = f"of at most {self.settings.max_rows}"
            raise invalid("n", f"with all prompts it asks for {num_answers} answers, {at_most}")
        if reasoner is None:
            for name in ("num_latents", "selection"):
                if getattr(request, name) is not None:
                    raise invalid(name, "the main model alone has no latents; ask a policy")
        if request.selection == "best" and reasoner.value_head is None:
            raise invalid("selection", "this policy has no value head, so 'best' is unknown; 'majority' is there")
        if request.num_latents is not None:
            try:
                reasoner.check_num_latents(request.num_latents)
            except ValueError as error:
                raise invalid("num_latents", str(error)) from error
        if taken := APPLY_CHAT_TEMPLATE & (request.chat_template_kwargs or {}).keys():
            raise invalid("chat_template_kwargs", f"{', '.join(sorted(taken))} cannot be set by a request")
        most = CHARACTERS_PER_TOKEN * (self.engine.max_positions or 2**20)
        variables = len(str(request.chat_template_kwargs or ""))
        if any(len(str(prompt)) + variables > most for prompt in request.prompts):
            raise ApiError(f"A prompt has more than {most} characters.", 400, "context_length_exceeded")

    def _tokenize(
        self, request: GenerationRequest, reasoner: LatentReasoner | None, num_latents: int
    ) -> list[tuple[list[int], list[int]]]:
        """Tokens of each prompt for the main model, and for the policy if there is one."""
        own_kwargs = None if reasoner is None else reasoner.policy.config.chat_template_kwargs
        kwargs = {**(own_kwargs or {}), **(request.chat_template_kwargs or {})}
        try:
            prompts = tokenize_prompts(request.prompts, self.main_processing_class, kwargs)
            questions = [[] for _ in prompts]
            if reasoner is not None:
                questions = tokenize_prompts(request.prompts, reasoner.processing_class, kwargs)
        except Exception as error:  # templates raise what they like
            raise invalid(request.prompt_field, f"it cannot be rendered: {error}") from error
        if not all(prompts):
            raise invalid(request.prompt_field, "it has no tokens")
        tokens = list(zip(prompts, questions, strict=True))
        try:
            for prompt_ids, question_ids in tokens:
                self.engine.check_length(len(prompt_ids), num_latents, request.limit or 1)
                if reasoner is not None:
                    reasoner.policy.check_length(len(question_ids))
        except ValueError as error:
            raise ApiError(str(error), 400, "context_length_exceeded") from error
        return tokens

    @staticmethod
    def _num_latents(request: GenerationRequest, reasoner: LatentReasoner | None) -> int:
        return 0 if reasoner is None else (request.num_latents or reasoner.policy.config.num_latents)

    def _default_limit(self, reasoner: LatentReasoner | None, num_read: int) -> int:
        """Tokens of an answer to a request that does not say: as many as in training, and as there is room for."""
        trained = None if reasoner is None else reasoner.policy.config.max_completion_length
        most = [each for each in (self.engine.max_positions, self.engine.max_model_len) if each is not None]
        return min([trained or self.engine.max_new_tokens, *(each - num_read for each in most)])

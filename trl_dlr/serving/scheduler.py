# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What waits, what is drawn together, and what is decoded together: one thread does all of a server's work."""

import asyncio
import hashlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..generation import TransformersEngine
from ..generation.running_batch import DecodingRow, RunningBatch, rows_can_join
from ..generation.text import StopStrings
from ..reasoners import LatentReasoner
from .protocol import ApiError, busy


logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """
    Answers to one prompt.

    Args:
        model (`str`):
            Name that was asked for.
        reasoner ([`LatentReasoner`], *optional*):
            Policy that draws the latents. If `None`, the main model answers without any.
        question_ids (`list[int]`):
            Prompt in the assistant's tokens; empty without a policy.
        prompt_ids (`list[int]`):
            Prompt in the main model's tokens.
        num_samples (`int`):
            Trajectories.
        seed (`int`):
            Of the latents, or of the main model's tokens.
        is_sampled (`bool`):
            Whether latents are sampled rather than means.
        temperature (`float`):
            Of the main model's tokens, which are the likeliest ones with a policy.
        num_latents (`int`, *optional*):
            Latents at most.
        max_new_tokens (`int`):
            Tokens of an answer at most.
        stop_strings (`list[str]`):
            Texts that end one.
        decodes_best (`bool`):
            Whether only the trajectory is decoded that the value head takes for the best.
    """

    model: str
    reasoner: LatentReasoner | None
    question_ids: list[int]
    prompt_ids: list[int]
    num_samples: int
    seed: int
    is_sampled: bool
    temperature: float
    num_latents: int | None
    max_new_tokens: int
    stop_strings: list[str]
    decodes_best: bool
    started: float | None = field(default=None, init=False)
    is_alone: bool = field(default=False, init=False)  # begins with no other, with which it has failed
    is_answered: bool = field(default=False, init=False)  # in part at least

    @property
    def num_rows(self) -> int:
        """Answers that are decoded."""
        return 1 if self.decodes_best else self.num_samples

    @property
    def group(self) -> tuple:
        """What jobs have in common whose latents are drawn together: the policy, and whether they are sampled."""
        return id(self.reasoner), self.is_sampled

    def listen(
        self, loop: asyncio.AbstractEventLoop, put: Callable[[Any], None], first: int, is_streamed: bool
    ) -> None:
        """
        Say who waits for the answers.

        Args:
            loop (`asyncio.AbstractEventLoop`):
                Where `put` is called.
            put (`Callable[[Any], None]`):
                Called with `(index, token_ids, is_last)` for tokens of an answer, or with an [`ApiError`].
            first (`int`):
                Index of the first answer.
            is_streamed (`bool`):
                Whether tokens are wanted as they come. If not, an answer's are put at once.
        """
        self._loop, self._put, self._first, self._is_streamed = loop, put, first, is_streamed
        self._kept: list[list[int]] = [[] for _ in range(self.num_rows)]

    def on_tokens(self, number: int, token_ids: list[int], is_last: bool) -> None:
        """Hand on tokens of an answer, from any thread."""
        self.is_answered = True
        self._kept[number] += token_ids
        if is_last or (self._is_streamed and self._kept[number]):
            kept, self._kept[number] = self._kept[number], []
            self._send((self._first + number, kept, is_last))

    def on_error(self, error: ApiError) -> None:
        """Say, from any thread, that the answers cannot be had."""
        self._send(error)

    def _send(self, event: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, event)


class Decoder(Protocol):
    """
    Writes the answers to jobs.

    Attributes:
        num_rows (`int`):
            Answers under way.
        is_busy (`bool`):
            Whether [`~Decoder.advance`] has something to do.
        can_join (`bool`):
            Whether jobs can be begun beside those under way.
    """

    num_rows: int
    is_busy: bool
    can_join: bool

    def begin(self, jobs: list[Job], latent_embeds: list[torch.Tensor] | None) -> None:
        """Begin the answers to jobs of one model, each after its prompt and its `(num_latents, hidden_size)`."""

    def advance(self, is_due: Callable[[], bool]) -> None:
        """Write on until some answers have ended or `is_due`."""

    def cancel(self, job: Job) -> None:
        """Give up a job."""

    def fail(self, error: ApiError) -> None:
        """Give up all jobs, and tell them why."""


class TransformersDecoder:
    """
    A [`Decoder`] in this process, whose answers are one batch that grows and shrinks. Where rows cannot join others
    (recurrent layers), a batch is finished before the next one begins.

    Args:
        engine ([`TransformersEngine`]):
            Main model.
    """

    def __init__(self, engine: TransformersEngine):
        self.engine = engine
        self.running: RunningBatch | None = None
        self.jobs: dict[int, tuple[Job, list[DecodingRow]]] = {}
        self.can_join = rows_can_join(engine.model)

    @property
    def num_rows(self) -> int:
        return 0 if self.running is None else sum(not row.has_ended for row in self.running.rows)

    @property
    def is_busy(self) -> bool:
        return self.running is not None

    def begin(self, jobs: list[Job], latent_embeds: list[torch.Tensor] | None) -> None:
        rows, prompt_of = [], []
        for index, job in enumerate(jobs):
            own = [self._row(job, number) for number in range(job.num_rows)]
            self.jobs[id(job)] = job, own
            rows += own
            prompt_of += [index] * len(own)
        anchor_ids = None if latent_embeds is None else jobs[0].reasoner.policy.config.anchor_ids
        batch = self.engine.batch([job.prompt_ids for job in jobs], prompt_of, latent_embeds, anchor_ids)
        added = RunningBatch(self.engine.model, self.engine.generation_kwargs, batch, rows)
        added.advance(is_due=lambda: True)  # one token, without which rows cannot join others
        if len(added) > 0 and self.running is not None:
            try:
                self.running.join(added)
            except Exception as error:  # half done, which no row could go on from
                self.fail(failed(error))
                raise
        elif len(added) > 0:
            self.running = added
        self._forget_ended()

    def _row(self, job: Job, number: int) -> DecodingRow:
        stops = StopStrings(job.stop_strings, self.engine.processing_class) if job.stop_strings else None
        generator = None
        if job.temperature > 0:
            generator = torch.Generator().manual_seed(derived_seed(job.seed, "row", number))
        row = DecodingRow(job.max_new_tokens, stops, job.temperature, generator)
        row.on_token = lambda token: job.on_tokens(number, [token], row.has_ended)
        return row

    def advance(self, is_due: Callable[[], bool]) -> None:
        self.running.advance(is_due)
        if len(self.running) == 0:
            self.running = None
        self._forget_ended()

    def _forget_ended(self) -> None:
        self.jobs = {
            key: (job, rows) for key, (job, rows) in self.jobs.items() if not all(row.has_ended for row in rows)
        }

    def cancel(self, job: Job) -> None:
        for row in self.jobs.pop(id(job), (job, []))[1]:
            row.has_ended = True

    def fail(self, error: ApiError) -> None:
        jobs, self.jobs, self.running = self.jobs, {}, None
        for job, _ in jobs.values():
            job.on_error(error)


class Scheduler:
    """
    Takes jobs from each model's queue, so that models which have some waiting get as many answers each; has the latents
    of a policy's jobs drawn together, and all of them decoded together, in a thread of its own.

    Args:
        decoder ([`Decoder`]):
            What writes the answers.
        max_rows (`int`):
            Answers under way at most.
        max_waiting (`int`):
            Jobs of each model that wait at most. More are refused.
    """

    def __init__(self, decoder: Decoder, max_rows: int, max_waiting: int):
        self.decoder = decoder
        self.max_rows = max_rows
        self.max_waiting = max_waiting
        self.queues: dict[str, deque[Job]] = {}  # of equals, the first one's turn is next
        self._num_given: dict[str, int] = {}  # answers that each model was given
        self._level = 0  # that of the latest turn, at which a model that comes begins
        self._is_changed = threading.Condition()
        self._is_closed = False
        self._is_due = False
        self._cancelled: list[Job] = []
        self._thread = threading.Thread(target=self._work, name="trl-dlr-scheduler", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self.queues.values()))

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, jobs: list[Job]) -> None:
        """Have jobs wait for their turn, all of them or none."""
        with self._is_changed:
            if self._is_closed:
                raise ApiError("The server is shutting down.", 503, "shutting_down", retry_after=10)
            name = jobs[0].model
            num_waiting = len(self.queues.get(name, ()))
            if num_waiting > 0 and num_waiting + len(jobs) > self.max_waiting:
                raise busy(num_waiting, self.max_waiting)
            if num_waiting == 0:  # what it left to others before is not made up for
                self._num_given[name] = max(self._num_given.get(name, 0), self._level)
            self.queues.setdefault(name, deque()).extend(jobs)
            self.wake()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Give up jobs that nobody waits for any more."""
        with self._is_changed:
            for job in jobs:
                if job.started is None:
                    self.queues[job.model].remove(job)
                else:
                    self._cancelled.append(job)
            self.wake()

    def wake(self) -> None:
        """Look at the queues again: something has changed."""
        with self._is_changed:
            self._is_due = True
            self._is_changed.notify_all()

    def close(self) -> None:
        """End the thread. What has not been answered gets an error."""
        with self._is_changed:
            self._is_closed = True
            self.wake()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._is_changed:
                while not (self._is_due or self.decoder.is_busy or self._next_name() is not None):
                    self._is_changed.wait()
                self._is_due = False
                if self._is_closed:
                    break
                jobs, cancelled, self._cancelled = self._next_jobs(), self._cancelled, []
            for job in cancelled:
                self.decoder.cancel(job)
            for together in batches(jobs):
                error = self._try_to_begin(together)
                if error is not None:
                    self._try_again(together, error)
            try:
                if self.decoder.is_busy:
                    self.decoder.advance(lambda: self._is_due or self._next_name() is not None)
            except Exception as error:
                self.decoder.fail(failed(error))
        error = ApiError("The server was shut down.", 503, "shutting_down")
        self.decoder.fail(error)
        with self._is_changed:
            for job in itertools.chain(*self.queues.values()):
                job.on_error(error)

    def _try_to_begin(self, jobs: list[Job]) -> ApiError | None:
        try:
            self._begin(jobs)
        except Exception as error:  # of the machine or of a model: the thread has to go on
            return failed(error)
        return None

    def _try_again(self, jobs: list[Job], error: ApiError) -> None:
        """What has failed may be one of several jobs, or their number: each gets its turn by itself."""
        for job in jobs:
            self.decoder.cancel(job)
        with self._is_changed:
            for job in reversed(jobs):
                if len(jobs) == 1 or job.is_answered:
                    job.on_error(error)
                elif job not in self._cancelled:
                    job.is_alone, job.started = True, None
                    self._num_given[job.model] -= job.num_rows
                    self.queues[job.model] = deque([job, *self.queues.get(job.model, ())])

    def _next_name(self, taken: Sequence[Job] = ()) -> str | None:
        """Model whose turn it is, if there is room for its next job beside those taken; if not, all wait for it."""
        with self._is_changed:
            names = (name for name, queue in self.queues.items() if queue)
            name = min(names, key=self._num_given.__getitem__, default=None)
            if name is None:
                return None
            job = self.queues[name][0]
            if taken and (job.is_alone or taken[0].is_alone):
                return None
            if not self.decoder.can_join and (self.decoder.is_busy or (taken and job.group != taken[0].group)):
                return None
            # `best` draws many trajectories for one answer
            if taken and sum(each.num_samples for each in (*taken, job)) > self.max_rows:
                return None
            # Where it is crowded, several begin at once: each time costs a copy of what is there
            room = max(job.num_rows, 0 if taken else self.max_rows // 8)
            num_rows = self.decoder.num_rows + sum(job.num_rows for job in taken)
            return name if num_rows + room <= self.max_rows else None

    def _next_jobs(self) -> list[Job]:
        """Jobs that there is room for, the next always of the model that was given the fewest answers."""
        jobs = []
        while (name := self._next_name(jobs)) is not None:
            queue = self.queues.pop(name)
            jobs.append(queue.popleft())
            self._level = self._num_given[name]
            self._num_given[name] += jobs[-1].num_rows
            if queue:
                self.queues[name] = queue  # behind the others
            jobs[-1].started = time.monotonic()
        return jobs

    @torch.no_grad()
    def _begin(self, jobs: list[Job]) -> None:
        reasoner = jobs[0].reasoner
        if reasoner is None:
            self.decoder.begin(jobs, None)
            return
        policy = reasoner.policy
        questions = reasoner.processing_class.pad(
            {"input_ids": [job.question_ids for job in jobs]}, padding_side="left", return_tensors="pt"
        ).to(policy.device)
        counts = torch.tensor([job.num_samples for job in jobs], device=policy.device)
        drawn = policy.sample(
            questions["input_ids"],
            questions["attention_mask"],
            num_samples=counts,
            deterministic=not jobs[0].is_sampled,
            seeds=[job.seed for job in jobs],
        )
        most = [policy.config.num_latents if job.num_latents is None else job.num_latents for job in jobs]
        drawn.limit(torch.tensor(most, device=policy.device).repeat_interleave(counts))
        scores = reasoner.score(drawn) if any(job.decodes_best for job in jobs) else None
        kept, start = [], 0
        for job in jobs:
            rows = range(start, start + job.num_samples)
            kept += [start + int(scores[rows.start : rows.stop].argmax())] if job.decodes_best else rows
            start = rows.stop
        latent_embeds = policy.inject(drawn.latents[kept])
        lengths = drawn.lengths[kept].tolist()
        self.decoder.begin(jobs, [row[:length] for row, length in zip(latent_embeds, lengths, strict=True)])


def derived_seed(*parts: int | str) -> int:
    """A seed of 32 bits, which is what torch's generators read, for whatever is named by `parts`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())


def failed(error: Exception) -> ApiError:
    logger.error("decoding failed", exc_info=error)
    return ApiError(f"Decoding failed: {type(error).__name__}: {error}", 500, "decoding_failed")


def batches(jobs: list[Job]) -> list[list[Job]]:
    """Jobs that begin together, see [`Job`]."""
    together: dict[tuple, list[Job]] = {}
    for job in jobs:
        together.setdefault(job.group, []).append(job)
    return list(together.values())

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Judgements that compute what a model has written: bounded in time and memory, in every thread and process.

math-verify bounds itself by signals, which only a main thread may set, and which wait until a power of large integers
is done; reasoning-gym's tasks do not bound themselves. So they work in a process of its own, which runs this file, and
which the kernel ends at its limits. It is started when there is first something to judge, and not by a fork: who asks
may hold a GPU and run threads.
"""

import atexit
import functools
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


logger = logging.getLogger(__name__)

BATCH_SECONDS, ANSWER_SECONDS = 2.0, 0.05  # processor time for the judgements of a call, and more for each answer
SECONDS = 1  # of processor time, for one question: usually it takes some milliseconds
MEMORY = 2 * 1024**3  # bytes
INTRACTABLE = re.compile(
    r"\^[\s{]*-?\d+[\s}]*\^|\^\s*[{(][^{}()a-zA-Z]*\^"  # towers of powers
    r"|\^[\s{(]*-?\d{4}|[)}\]]\s*\^[\s{(]*-?(?:[2-9]\d|1\d\d)|\d{3}\s*!|[)}\]!]\s*!|\d{60}|binom\{\d{4}"  # large powers
)

spent = 0.0  # processor seconds so far, and those of a start for every process that was ended
_process: subprocess.Popen | None = None
_lock = threading.Lock()  # one thread asks at a time


def _forget() -> None:
    global _process, _lock
    _process, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)  # the parent goes on asking


@atexit.register
def _stop() -> None:
    global _process
    if _process is not None:
        _process.kill()
        _process.communicate()
        _process = None


def _start() -> None:
    global _process
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    variables = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OPENBLAS_NUM_THREADS": "1",
    }  # threads take memory
    _process = subprocess.Popen([sys.executable, "-P", __file__, str(SECONDS)], env=os.environ | variables, **pipes)
    if "ready\n" not in _process.stdout:
        _stop()
        raise RuntimeError("math-verify could not be started in a process of its own, which has printed why.")


def ask(judge: str, *question: Any) -> Any | None:
    """
    What a judge, `"math_verify"` or a task of reasoning-gym, says to a question; `None` if that is not decided within
    the limits.
    """
    global spent
    with _lock:
        reply = ""
        try:
            if _process is None:
                _start()
            print(pickle.dumps((judge, question)).hex(), file=_process.stdin, flush=True)
            reply = _process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            if not reply:  # it has ended, or the question was interrupted: its next reply would be to this one
                _stop()
        verdict, seconds = json.loads(reply) if reply else (None, 2 * SECONDS)
        spent += seconds
        return verdict


@functools.lru_cache(maxsize=4096)  # the completions of a question give the same answers again and again
def same_expression(gold: str, answer: str) -> bool | None:
    """
    Whether two expressions are equal; `None` if they are too large to try, or it is not decided within the limits.
    """
    sides = (gold, answer)
    if any(len(side) > 300 or sum(map(side.count, "([{")) > 50 or INTRACTABLE.search(side) for side in sides):
        return None
    return ask("math_verify", gold, answer)


class InTime:
    """
    A judgement, as long as the processor time for those of a call lasts.

    Args:
        judge (`Callable`):
            Judgement that asks the process; `None` if it is not decided.
        num_answers (`int`):
            Answers of the call.
    """

    def __init__(self, judge: Callable[..., Any | None], num_answers: int):
        self.judge, self.num_answers, self.num_undecided = judge, num_answers, 0
        self.seconds = BATCH_SECONDS + ANSWER_SECONDS * num_answers

    def __call__(self, *question: Any) -> Any | None:
        before = spent
        verdict = self.judge(*question) if self.seconds > 0 else None
        self.seconds -= spent - before
        self.num_undecided += verdict is None
        return verdict

    def warn(self) -> None:
        """Say how many were not decided, if any."""
        if self.num_undecided:
            logger.warning(
                f"{self.num_undecided} of {self.num_answers} answers were too large or took too long to judge, and "
                "count as wrong."
            )


# ---- In the process of its own ----


def _math_verify() -> Callable[[str, str], bool]:
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=-1)]

    def judge(*expressions: str) -> bool:
        texts = [f"${' '.join(expression.split())}$" for expression in expressions]
        sides = [parse(text, config, fallback_mode="no_fallback", parsing_timeout=None) for text in texts]
        return all(sides) and verify(*sides, timeout_seconds=None)

    judge("x + 1", r"\frac{2x + 2}{2}")  # builds the parser's tables
    return judge


def _reasoning_gym(task: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym.factory import get_score_answer_fn

    score = get_score_answer_fn(task)
    return lambda answer, entry: float(score(answer, entry))


def _serve(seconds: float) -> None:
    import resource
    import signal

    logging.disable()
    replies, sys.stdout = sys.stdout, sys.stderr
    judges = {"math_verify": _math_verify()}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        name, question = pickle.loads(bytes.fromhex(line))
        if name not in judges:
            judges[name] = _reasoning_gym(name)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # whose signal ends the process
        start = time.process_time()
        try:
            verdict = judges[name](*question)
        except Exception:
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([verdict, time.process_time() - start]), file=replies, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))

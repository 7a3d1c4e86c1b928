# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Equality of mathematical expressions by math-verify, bounded in time and memory in every thread and process.

math-verify bounds itself by signals, which only a main thread may set, and which wait until a power of large integers is
done. So it works in a process of its own, which runs this file, and which the kernel ends at its limits. It is started
when there is first something to judge, and not by a fork: who asks may hold a GPU and run threads.
"""

import atexit
import functools
import json
import os
import re
import subprocess
import sys
import threading
import time


SECONDS = 1  # of processor time, for one pair: usually it takes some milliseconds
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
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    _process = subprocess.Popen([sys.executable, __file__, str(SECONDS)], env=paths, **pipes)
    if "ready\n" not in _process.stdout:
        _stop()
        raise RuntimeError("math-verify could not be started in a process of its own, which has printed why.")


@functools.lru_cache(maxsize=4096)  # the completions of a question give the same answers again and again
def same_expression(gold: str, answer: str) -> bool | None:
    """Whether two expressions are equal; `None` if they are too large to try, or it is not decided within the limits."""
    global spent
    sides = (gold, answer)
    if any(len(side) > 300 or sum(map(side.count, "([{")) > 50 or INTRACTABLE.search(side) for side in sides):
        return None
    with _lock:
        reply = ""
        try:
            if _process is None:
                _start()
            print(json.dumps(sides), file=_process.stdin, flush=True)
            reply = _process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            if not reply:  # it has ended, or the question was interrupted: its next reply would be to this one
                _stop()
        is_same, seconds = json.loads(reply) if reply else (None, 2 * SECONDS)
        spent += seconds
        return is_same


def _serve(seconds: float) -> None:
    import logging
    import resource
    import signal

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    replies, sys.stdout = sys.stdout, sys.stderr
    config = [LatexExtractionConfig(boxed_match_priority=-1)]

    def judge(*expressions: str) -> bool:
        texts = [f"${' '.join(expression.split())}$" for expression in expressions]
        sides = [parse(text, config, fallback_mode="no_fallback", parsing_timeout=None) for text in texts]
        return all(sides) and verify(*sides, timeout_seconds=None)

    judge("x + 1", r"\frac{2x + 2}{2}")  # builds the parser's tables
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # whose signal ends the process
        start = time.process_time()
        try:
            is_same = judge(*json.loads(line))
        except Exception:
            is_same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([is_same, time.process_time() - start]), file=replies, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))

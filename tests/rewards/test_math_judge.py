# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import os
import pickle
import threading
import time

import pytest

from trl_dlr.rewards import correctness_reward, math_judge


HOSTILE = [
    "10^{10^{10}}",
    "9^{9^{9^{9}}}",
    "9**9**9",
    "99999999!",
    "((9)!)!",
    "2^{100000}",
    "x^{99999}",
    "(x+y+z)^{200}",
    "((x+1)^{99}-(x-1)^{99})^{99}",
    "\\binom{1000000}{500000}",
    "9" * 70 + "x",
    "(" * 60 + "x" + ")" * 60,
    "x^2+" * 100 + "1",
    "1+" * 5000 + "x",
]


@pytest.fixture(autouse=True)
def forget():
    math_judge.same_expression.cache_clear()


def test_hard_expressions_are_refused_before_anything_computes(monkeypatch, caplog):
    monkeypatch.setattr(math_judge, "_process", None)
    monkeypatch.setattr(math_judge, "_start", lambda: pytest.fail("math-verify was asked"))
    completions = [f"<answer>{expression}</answer>" for expression in HOSTILE] * 5
    start = time.thread_time()
    for gold in ("x+2", "16"):
        assert correctness_reward(completions, answer=[gold] * len(completions)) == [-1.0] * len(completions)
    assert time.thread_time() - start < 2.0  # 140 of them, of which 0.1 is used
    assert [record.message.split(" answers")[0] for record in caplog.records] == ["70 of 70"]


def test_what_is_not_refused_ends_in_every_thread(monkeypatch):
    monkeypatch.setattr(math_judge, "SECONDS", 0.2)
    math_judge._stop()  # so that the next one knows of it
    found, spent = [], math_judge.spent

    def ask():
        found.append(math_judge.same_expression("x+2", "(a+b+c+d+e+f)^{19}"))
        found.append(math_judge.same_expression("x+2", "2+x"))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(60)
    assert found == [None, True]
    assert math_judge.spent - spent >= 0.4  # the one that was ended and a start, of which a rollout is granted so many
    math_judge._stop()


def test_wrong_answers_are_asked_of_one_process_and_once(monkeypatch):
    assert math_judge.same_expression("x+1", "1+x")
    process, asked = math_judge._process, []
    monkeypatch.setattr(math_judge, "_start", lambda: pytest.fail("another process was started"))
    dumps = pickle.dumps
    monkeypatch.setattr(math_judge.pickle, "dumps", lambda question: asked.append(question) or dumps(question))
    answers = [f"x+{number}" for number in range(2, 22)]
    completions = [f"<answer>{answer}</answer>" for answer in answers] * 5
    assert correctness_reward(completions, answer=["x+1"] * len(completions)) == [-1.0] * len(completions)
    assert len(asked) == len(answers) and math_judge._process is process


def test_an_interrupted_question_does_not_answer_the_next(monkeypatch):
    assert math_judge.same_expression("x+1", "1+x")

    class Interrupted:
        def dumps(self, question):
            math_judge._process.stdin.write(pickle.dumps(("math_verify", ("x", "x"))).hex() + "\n")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(math_judge, "pickle", Interrupted())
        math_judge.same_expression("x", "y")
    assert math_judge.same_expression("x", "y + 1") is False


def test_a_forked_process_asks_its_own():
    assert math_judge.same_expression("x+1", "1+x")
    child = os.fork()
    if child == 0:
        os._exit(0 if math_judge._process is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert math_judge.same_expression("x+2", "2+x")

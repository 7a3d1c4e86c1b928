# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Several small servers of vLLM's speech, which share the rows of a rollout."""

import threading
import time

import pytest
import torch

from tests.fake_vllm import serve
from tests.generation.test_vllm_server_engine import answer_503, expected_tokens, main_model, rollout
from tests.tiny import random_main_model, tiny_tokenizer
from trl_dlr.generation import VLLMServersEngine, create_engine


pytestmark = pytest.mark.usefixtures("one_thread")
__all__ = ["main_model"]  # a fixture


@pytest.fixture
def servers(main_model):
    with serve(main_model) as first, serve(main_model) as second:
        yield first, second


def connect(servers, main_model, timeout=30.0, **kwargs):
    urls = ", ".join(server.url for server in servers)
    return create_engine(urls, main_model, tiny_tokenizer(), 12, timeout=timeout, **kwargs)


def num_rows(server):
    return sum(len(body.get("prompt_embeds", ())) for body in server.bodies if body["max_tokens"] > 1)


def test_servers_share_the_rows_of_a_rollout(servers, main_model):
    engine = connect(servers, main_model)
    assert isinstance(engine, VLLMServersEngine)
    assert engine.generate(*rollout()) == expected_tokens(main_model)
    assert sorted(map(num_rows, servers)) == [3, 4]
    assert engine.num_decoded == 7 and engine.num_retries == 0
    with engine.limited_to(2):
        assert engine.generate(*rollout()) == [ids[:2] for ids in expected_tokens(main_model)]


def test_two_take_half_the_time_of_one(servers, main_model):
    seconds = {}
    for server in servers:
        server.seconds_per_row = 0.05
    for number in (1, 2, 1, 2):
        engine = connect(servers[:number], main_model, batch_size=1)
        start = time.monotonic()
        engine.generate(*rollout())
        seconds[number] = min(time.monotonic() - start, seconds.get(number, 60.0))
    print(f"\nOne server {seconds[1]:.2f} s, two {seconds[2]:.2f} s: {seconds[1] / seconds[2]:.2f} times")
    assert seconds[2] < 0.8 * seconds[1]


def test_one_that_fails_is_left_out_and_comes_back(servers, main_model, caplog):
    engine = connect(servers, main_model, batch_size=1)
    servers[0].faults = [answer_503] * 3
    for _ in range(2):
        assert engine.generate(*rollout()) == expected_tokens(main_model)
    assert 1 <= engine.num_retries <= 7
    assert f"Going on without the vLLM server at {servers[0].url}: " in caplog.text and "503" in caplog.text
    deadline = time.monotonic() + 30
    while servers[0].faults or engine.servers[0].away_since is not None:
        engine.generate(*rollout())
        assert time.monotonic() < deadline
    assert f"The vLLM server at {servers[0].url} is back." in caplog.text
    before = num_rows(servers[0])
    engine.generate(*rollout())
    assert num_rows(servers[0]) > before


def test_one_that_has_gone_for_good_costs_nothing_but_its_share(main_model):
    with serve(main_model) as stays:
        with serve(main_model) as goes:
            engine = connect((goes, stays), main_model)
        assert engine.generate(*rollout()) == expected_tokens(main_model)
        assert num_rows(stays) == 7


def test_servers_that_are_all_away_are_given_up_together(main_model):
    with serve(main_model) as first, serve(main_model) as second:
        engine = connect((first, second), main_model, timeout=0.5, batch_size=1)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="All vLLM servers were away for 0.5 seconds.*refused.*refused"):
        engine.generate(*rollout())
    assert time.monotonic() - start < 10


def test_servers_that_are_healthy_and_answer_nothing_are_given_up(servers, main_model):
    engine = connect(servers, main_model, timeout=0.5)
    for server in servers:
        server.faults = [answer_503] * 1000
    with pytest.raises(ConnectionError, match="503"):
        engine.generate(*rollout())


def test_one_that_hangs_is_waited_for_once(servers, main_model):
    engine = connect(servers, main_model, timeout=1.0)
    servers[0].faults = [lambda handler: time.sleep(5)]
    start = time.monotonic()
    assert engine.generate(*rollout()) == expected_tokens(main_model)
    assert time.monotonic() - start > 1.0 and engine.servers[0].away_since is not None
    before = len(servers[0].bodies)
    assert engine.generate(*rollout()) == expected_tokens(main_model)  # by the other one
    assert len(servers[0].bodies) == before


def test_no_server_has_more_requests_than_it_may(servers, main_model):
    engine, most, lock = connect(servers, main_model, batch_size=1, num_concurrent=2), [0], threading.Lock()
    for server in engine.servers:
        decode = server.engine._decode

        def counted(*args, server=server, decode=decode):
            with lock:
                most[0] = max(most[0], server.num_running)
            return decode(*args)

        server.engine._decode = counted
    servers[1].faults = [answer_503]
    assert engine.generate(*rollout()) == expected_tokens(main_model)
    assert most[0] <= 2


def test_a_refusal_is_told(servers, main_model):
    engine = connect(servers, main_model)
    for server in servers:
        server.faults = [lambda handler: handler.refuse("top_p must be in (0, 1], got 7.0.")]
    with pytest.raises(RuntimeError, match="refuses /v1/completions: 400 .*top_p must be in"):
        engine.generate(*rollout())


def test_what_cannot_share_is_refused(servers, main_model):
    for same in (servers[0].url, f"{servers[0].url}/", f"{servers[0].url}/v1"):
        with pytest.raises(ValueError, match="`base_urls` must be different servers"):
            create_engine(f"{servers[0].url},{same}", main_model, tiny_tokenizer(), 12)
    with serve(random_main_model(seed=3)) as other, pytest.raises(ValueError, match="is not this main model"):
        connect((servers[0], other), main_model)
    with serve(main_model, max_model_len=20) as small:
        engine = connect((servers[0], small), main_model)
        with pytest.raises(ValueError, match=f"the 20 tokens that the vLLM server at {small.url} takes"):
            engine.generate([[5] * 8], torch.zeros(1, 3, 64))

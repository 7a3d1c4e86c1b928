# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What a push makes ready; tests/test_hub.py pushes it."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests.tiny import random_main_model
from tests.trainer.test_latent_grpo_trainer import make_policy, make_trainer
from trl_dlr.models.loading import BASE_POLICY, load_policy
from trl_dlr.trainer.hub import SNAPSHOTS, take_snapshot


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("has_links", [True, False])
def test_a_snapshot_stays_as_it_was(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *args: os.stat(tmp_path / "nowhere"))  # an `OSError`
    run = tmp_path / "run"
    (run / "report").mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "README.md", "report/rewards.png"):
        (run / name).write_text(f"first {name}")
    before = contents(run)
    for name in ("checkpoint-3", "_unfinished"):
        (run / name).mkdir()
        (run / name / "model.safetensors").write_text("not of this push")
    (run / "completions").mkdir()
    for name in ("report.html", "run.json", "probe_before.json", "probe_after.json"):
        (run / "report" / name).write_text("questions of a dataset, which may be private")
    (run / "runs").mkdir()
    (run / "runs" / "events.out.tfevents.1.host").write_text("paths of this machine")
    (run / "report" / ".report.html").write_text("of a run that was killed")
    (run / "completions" / "completions_00001.parquet").write_text("questions of a dataset, which may be private")

    snapshot = take_snapshot(str(run), str(run / SNAPSHOTS))
    assert os.path.samefile(run / "model.safetensors", Path(snapshot, "model.safetensors")) == has_links
    with open(run / "README.md", "a") as file:
        file.write("more")
    (run / "new.safetensors").write_text("second")
    os.replace(run / "new.safetensors", run / "model.safetensors")
    (run / "optimizer.pt").unlink()
    (run / "report" / "rewards.png").unlink()
    assert contents(snapshot) == before


def test_a_model_in_a_folder_of_this_machine_is_not_named(tmp_path):
    fields = {"config.json": "main_model_name_or_path", "adapter_config.json": "base_model_name_or_path"}
    folders = {"here": str(tmp_path / "main"), BASE_POLICY: "user/main"}
    for name, model in folders.items():
        (tmp_path / "run" / name).mkdir(parents=True)
        for file, field in fields.items():
            (tmp_path / "run" / name / file).write_text(json.dumps({"kept": 1, field: model}))
    snapshot = Path(take_snapshot(str(tmp_path / "run"), str(tmp_path / "snapshots")))
    for file, field in fields.items():
        assert json.loads((snapshot / "here" / file).read_text()) == {"kept": 1, field: None}
        assert json.loads((snapshot / BASE_POLICY / file).read_text())[field] == "user/main"
        kept = json.loads((tmp_path / "run" / "here" / file).read_text())
        assert kept[field] == folders["here"]  # of the run itself


@pytest.mark.parametrize("fails", [False, True])
def test_what_training_writes_meanwhile_is_not_in_an_upload(tmp_path, monkeypatch, fails):
    trainer = make_trainer(tmp_path)
    trainer.hub_model_id = "user/policy"
    plot = Path(trainer.args.output_dir, "report", "rewards.png")
    plot.parent.mkdir(parents=True)
    plot.write_text("first")
    is_written, arrived = threading.Event(), []

    def upload_folder(folder_path, **kwargs):
        assert is_written.wait(60)
        arrived.append(contents(folder_path))
        if fails:
            raise ConnectionError("cut")

    monkeypatch.setattr(trainer._hub, "upload_folder", upload_folder)
    first = trainer._upload(trainer.args.output_dir, None, "first")
    plot.write_text("second")
    last = trainer._upload(trainer.args.output_dir, None, "last")
    plot.unlink()
    is_written.set()
    assert [type(job.exception()) for job in (first, last)] == [ConnectionError if fails else type(None)] * 2
    assert arrived == [{"report/rewards.png": "first"}, {"report/rewards.png": "second"}]
    assert os.listdir(Path(trainer.args.output_dir, SNAPSHOTS)) == []


@pytest.mark.parametrize("origin", ["memory", "folder"])
def test_an_adapter_that_was_given_gets_its_base_policy_beside_it(tmp_path, origin):
    policy = make_policy(random_main_model())
    if origin == "folder":
        policy.save_pretrained(tmp_path / "policy")
        policy = type(policy).from_pretrained(tmp_path / "policy")
    base = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["latent_head", "latent_in"])
    stale = tmp_path / "run" / BASE_POLICY
    make_policy(random_main_model(), latent_dim=2).save_pretrained(stale)  # another run was here
    trainer = make_trainer(tmp_path, model=get_peft_model(policy, lora), max_steps=2)
    trainer.train()
    trainer.save_model()
    trainer._complete_for_push()

    saved = load_file(stale / "model.safetensors")
    assert set(saved) == set(base) and all(torch.equal(tensor, base[name]) for name, tensor in saved.items())
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE_POLICY
    trained = trainer.model.state_dict()
    loaded = load_policy(str(tmp_path / "run")).state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in loaded.items())
    assert not torch.equal(trainer.policy.latent_head.mean.weight, base["latent_head.mean.weight"])

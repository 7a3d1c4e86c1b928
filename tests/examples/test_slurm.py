# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""The batch scripts for Slurm, with stand-ins for its commands: what each node is told."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.launch import ROOT
from trl_dlr.cli import main as cli


SCONTROL = 'for i in $(seq "$NODES"); do echo node$i; done'
# Runs a step's command on each of its nodes, one after the other
SRUN = """
nodes=${NODES}
while [[ "$1" == --* ]]; do
    case "$1" in --nodes=*) nodes=${1#*=};; --nodelist=*) echo "${1#*=}" >> "$TOLD/nodelists";; esac
    shift
done
for node in $(seq 0 $((nodes - 2))); do SLURM_NODEID=$node "$@"; done
SLURM_NODEID=$((nodes - 1)) exec "$@"
"""
# A training step ends as it is told to
TELL = 'mkdir -p "$TOLD"; printf "%s\\n" "${0##*/}" "$@" > "$(mktemp "$TOLD/${0##*/}.XXXXXX")"'
TRAIN = TELL + '; eval "${TRAINING:-}"'


def start(tmp_path, script, num_nodes, *arguments, **environment):
    commands, folder = tmp_path / "bin", tmp_path / "told"
    commands.mkdir()
    folder.mkdir()
    for name, text in {"scontrol": SCONTROL, "srun": SRUN, "trl-dlr": TRAIN, "vllm": TELL}.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    environment |= {"PATH": f"{commands}:{os.environ['PATH']}", "NODES": str(num_nodes), "TOLD": str(folder)}
    environment |= {"SLURM_JOB_ID": "1234", "SLURM_NNODES": str(num_nodes), "SLURM_JOB_NODELIST": "nodes"}
    path = ROOT / "examples" / "slurm" / script
    return subprocess.Popen(["bash", path, *arguments], env=environment, cwd=ROOT)


def told(tmp_path, script, *arguments, **environment):
    """Argument lists that `trl-dlr` and `vllm` were called with."""
    job = start(tmp_path, script, *arguments, **environment)
    if status := job.wait(60):
        raise subprocess.CalledProcessError(status, script)
    folder = tmp_path / "told"
    calls = sorted(path.read_text().splitlines() for path in folder.iterdir() if "." in path.name)
    return [call[1:] for call in calls if call[0] == "trl-dlr"], [call[1:] for call in calls if call[0] == "vllm"]


def value_of(arguments, name):
    return arguments[arguments.index(f"--{name}") + 1]


def launched(arguments, monkeypatch):
    """What `accelerate launch` would be given, once the arguments have been checked."""
    calls = []
    monkeypatch.setattr("trl_dlr.cli.launch.launch_command", calls.append)
    monkeypatch.chdir(ROOT)
    assert cli.main([*arguments, "--use_cpu", "true", "--bf16", "false"]) == 0  # there is no GPU here
    return calls[0]


def test_each_node_is_told_its_rank_and_where_the_first_is(tmp_path, monkeypatch):
    nodes, servers = told(tmp_path, "train.sbatch", 2, "--learning_rate", "1e-4")
    assert servers == [] and len(nodes) == 2
    assert sorted(value_of(node, "machine_rank") for node in nodes) == ["0", "1"]
    for node in nodes:
        assert node[0] == "train" and "--resume_from_checkpoint" not in node
        call = launched(node, monkeypatch)
        assert (call.num_machines, call.num_processes, call.main_process_ip) == (2, 16, "node1")
        assert call.main_process_port == 21234 and call.machine_rank == int(value_of(node, "machine_rank"))
        config = load_config_from_file(call.config_file)
        assert (config.num_machines, config.num_processes) == (2, 16)
        assert config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"
        assert "--learning_rate 1e-4" in " ".join(call.training_script_args)


def test_a_job_goes_on_from_the_last_checkpoint_in_its_folder(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoint-4").mkdir(parents=True)
    settings = {"OUTPUT_DIR": str(folder), "LAUNCH": "accelerate_configs/multi_node.yaml"}
    nodes, _ = told(tmp_path, "train.sbatch", 4, **settings)
    assert len(nodes) == 4
    for node in nodes:
        assert value_of(node, "resume_from_checkpoint") == "true"
        assert (value_of(node, "num_processes"), value_of(node, "output_dir")) == ("32", str(folder))


@pytest.mark.parametrize("status", [0, 3])
def test_the_status_of_the_training_is_that_of_the_job(tmp_path, status):
    if status == 0:
        told(tmp_path, "train.sbatch", 2, TRAINING="exit 0")
    else:
        with pytest.raises(subprocess.CalledProcessError) as error:
            told(tmp_path, "train_with_vllm.sbatch", 3, MAIN_MODEL="org/main", TRAINING=f"exit {status}")
        assert error.value.returncode == status


def test_the_training_and_it_alone_is_told_that_the_time_is_over(tmp_path):
    wait = 'touch "$TOLD/started"; trap \'echo TERM > "$TOLD/signal"; exit 143\' TERM; while :; do sleep 0.05; done'
    job = start(tmp_path, "train_with_vllm.sbatch", 2, MAIN_MODEL="org/main", TRAINING=wait)
    while not (tmp_path / "told" / "started").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.terminate()
    assert job.wait(30) == 143
    assert (tmp_path / "told" / "signal").read_text() == "TERM\n"


def test_servers_have_nodes_of_their_own(tmp_path, monkeypatch):
    until_all_serve = 'while [ "$(find "$TOLD" -name "vllm*" -size +0 | wc -l)" -lt 2 ]; do sleep 0.05; done'
    settings = {"MAIN_MODEL": "org/main", "SERVER_NODES": "2", "TRAINING": until_all_serve}
    nodes, servers = told(tmp_path, "train_with_vllm.sbatch", 4, **settings)
    assert len(nodes) == len(servers) == 2
    assert sorted((tmp_path / "told" / "nodelists").read_text().split()) == ["node1,node2", "node3,node4"]
    for server in servers:
        assert server[:3] == ["serve", "org/main", "--enable-prompt-embeds"]
        assert value_of(server, "tensor-parallel-size") == "8"
    for node in nodes:
        assert value_of(node, "vllm_server_base_url") == "http://node3:8000,http://node4:8000"
        call = launched(node, monkeypatch)
        assert (call.num_machines, call.num_processes, call.main_process_ip) == (2, 16, "node1")


def test_a_main_model_has_to_be_named(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        told(tmp_path, "train_with_vllm.sbatch", 3)


@pytest.mark.parametrize("number", ["0", "3"])
def test_servers_leave_nodes_for_the_training(tmp_path, number):
    with pytest.raises(subprocess.CalledProcessError, match="status 2"):
        told(tmp_path, "train_with_vllm.sbatch", 3, MAIN_MODEL="org/main", SERVER_NODES=number)


@pytest.mark.parametrize("path", sorted(Path(ROOT, "examples", "slurm").iterdir()), ids=lambda path: path.name)
def test_what_a_script_names_is_there(path):
    words = path.read_text().replace("}", " ").replace("-examples", " examples").split()
    named = [word.split("=")[-1] for word in words if word.endswith((".yaml", ".sbatch"))]
    assert named
    for name in named:
        name = name.split(":-")[-1]
        assert (ROOT / name).is_file() or (path.parent / name).is_file(), name

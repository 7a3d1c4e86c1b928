# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Programs of the tests, each in processes of its own: forked from one that has imported what they need, so that a launch
takes a second and not ten, and without a launcher where none is tested.
"""

import gc
import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


ROOT = Path(__file__).parents[1]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["deepspeed", "tests.trainer.fault_worker", "tests.trainer.distributed_worker"])


def main(program: list[str], folder: str, cwd: str, environment: dict[str, str]) -> None:
    """
    What a process does: it runs `program`, a script or `-m` and a module, with their arguments, as `python` would.
    """
    gc.freeze()  # what was imported before is no garbage
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(f"{folder}/{name}.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.insert(0, str(Path(program[0]).parent))
        runpy.run_path(program[0], run_name="__main__")


def environment_of(launcher: str) -> dict[str, str]:
    """What a launcher tells its processes: nothing to `one`, and to `zero2` what deepspeed_zero2_cpu.yaml has."""
    own = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if launcher == "ddp":
        own["ACCELERATE_USE_CPU"] = "true"
    if launcher.startswith("zero2"):
        own |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
        own |= dict.fromkeys(
            (f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE" for part in ("OPTIMIZER", "PARAM")), "none"
        )
        own["ACCELERATE_MIXED_PRECISION"] = "bf16" if launcher == "zero2_bf16" else "no"
    return own


class Job:
    """
    Processes that run one program.

    Args:
        program (`list`):
            A script, or `-m` and a module, and its arguments.
        folder (`Path`):
            Where what they print goes, `stdout.txt` and `stderr.txt`.
        launcher (`str`, *optional*, defaults to `"one"`):
            `"one"` process without a launcher, or as many as asked of plain DDP, `"ddp"`, or DeepSpeed, `"zero2"` and
            `"zero2_bf16"`.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes.
        num_nodes (`int`, *optional*, defaults to `1`):
            Nodes that they are told to be on, as many on each.
        cwd (`Path`, *optional*):
            Working directory. If `None`, the repository.
        env (`dict`, *optional*):
            Variables beside those of this process.
    """

    def __init__(self, program, folder, launcher="one", num_processes=1, num_nodes=1, cwd=None, env=None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("stdout", "stderr"):
            (self.folder / f"{name}.txt").unlink(missing_ok=True)
        environment, self.store = environment_of(launcher), None
        if launcher != "one":  # the ranks meet at a store, as torchrun's do
            self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
            environment |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes // num_nodes)}
        self.processes = []
        for rank in range(num_processes):
            ranks = {}
            if self.store is not None:
                node, local_rank = divmod(rank, num_processes // num_nodes)
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "GROUP_RANK": str(node)}
            arguments = list(map(str, program)), str(self.folder), str(cwd or ROOT), environment | ranks | (env or {})
            self.processes.append(context.Process(target=main, args=arguments))
            self.processes[-1].start()

    def wait(self, timeout: float = 600) -> subprocess.CompletedProcess:
        """Exit status, negative for a signal, and what was printed. One that fails ends the others."""
        deadline, running, status = time.monotonic() + timeout, self.processes, 0
        while running:
            ended = multiprocessing.connection.wait(
                [process.sentinel for process in running], max(0.0, deadline - time.monotonic())
            )
            status = status or next((p.exitcode for p in running if p.exitcode), 0)
            running = [process for process in running if process.sentinel not in ended]
            if status or not ended:
                for process in running:
                    process.kill()
            if not ended:
                raise TimeoutError(f"Still running after {timeout} seconds. {self.read('stderr')[-3000:]}")
        return subprocess.CompletedProcess([], status, self.read("stdout"), self.read("stderr"))

    def read(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()


def run_python(*program, **kwargs) -> subprocess.CompletedProcess:
    """Run a script, or `-m` and a module, to its end, see [`Job`]."""
    with tempfile.TemporaryDirectory() as folder:
        return Job(program, folder, **kwargs).wait()

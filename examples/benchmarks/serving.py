# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
`trl-dlr serve` under load: two policies of SmolLM2-135M-Instruct, and clients that all ask at once.

    python examples/benchmarks/serving.py                                    # transformers in the server's process
    python examples/benchmarks/serving.py --engine http://localhost:8001     # a vLLM server that serves `--main_model`

- `one client` asks a request after the other, `64 clients` 500 of them. Every answer has to be the one that was given
  to the one client, with the same seed; requests and policies are mixed.
- `1,000 connections` at once: what does not fit into the queue is refused with status 429, the rest is answered.
- `clients that leave` close half of the streams after the first piece. The others are answered, and nothing is left.
- `2,000 short requests`: memory of the server before, after 1,000 and after 2,000.

The policies are untrained. Weights are float32, where batches of other sizes do not change a token.
"""

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from common import load_smollm2
from transformers import AutoModelForCausalLM, HfArgumentParser

from trl_dlr import LatentPolicyModel, first_layers
from trl_dlr.reasoners import LatentReasoner


KEY = "benchmark"


@dataclass
class ServingArguments:
    """Arguments of this script."""

    engine: str = field(default="transformers", metadata={"help": "What decodes, as `trl-dlr serve` has it."})
    main_model: str | None = field(default=None, metadata={"help": "Folder for the main model, kept for a server."})
    num_clients: int = field(default=64, metadata={"help": "Clients."})
    num_requests: int = field(default=500, metadata={"help": "Their requests."})
    num_different: int = field(default=50, metadata={"help": "Different ones among them, which one client asks."})
    num_connections: int = field(default=1000, metadata={"help": "Connections at once."})
    num_short: int = field(default=2000, metadata={"help": "Short requests."})
    max_tokens: int = field(default=64, metadata={"help": "Tokens of an answer."})
    output_json: str | None = field(default=None, metadata={"help": "File for the figures."})


def save_models(folder: Path, args: ServingArguments) -> list[Path]:
    """The main model, and two policies for it."""
    model, tokenizer = load_smollm2(torch.float32)
    main = Path(args.main_model) if args.main_model else folder / "smollm2"
    model.save_pretrained(main)
    tokenizer.save_pretrained(main)
    model = AutoModelForCausalLM.from_pretrained(main)
    policies = []
    for seed, text in enumerate(("Answer: ", " briefly")):
        torch.manual_seed(seed)
        policy = LatentPolicyModel.from_assistant(
            first_layers(model, 2), model, tokenizer, anchor_text=text, num_latents=4, latent_dim=16
        )
        policies.append(folder / f"policy{seed}")
        LatentReasoner(policy, tokenizer, None, None).save_pretrained(str(policies[-1]))
    return policies


def start(args: ServingArguments, policies: list[Path], log: Path) -> tuple[subprocess.Popen, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "trl_dlr.cli.main", "serve", "--policy", *map(str, policies)]
    command += ["--engine", args.engine, "--port", str(port), "--max_waiting", "600", "--timeout", "1200"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, env={**os.environ, "TRL_DLR_API_KEY": KEY})
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return process, url
        except httpx.TransportError:
            if process.poll() is not None:
                raise RuntimeError(f"The server has ended:\n{log.read_text()[-3000:]}") from None
        time.sleep(0.2)


def requests_of(args: ServingArguments) -> list[dict[str, Any]]:
    """Different requests of both policies and of the main model, with means and with samples."""
    found = []
    for i in range(args.num_different):
        question = f"What is {i % 9 + 1} + {i // 9 + 1}?"
        body = {"model": ("policy0", "policy1", "smollm2")[i % 3], "max_tokens": args.max_tokens, "seed": i}
        body |= {"messages": [{"role": "user", "content": question}], "temperature": float(i % 2 and i % 3 < 2)}
        found.append(body)
    return found


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, str | None, float]:
    """Status, text and seconds of a request."""
    begun = time.monotonic()
    reply = await client.post("/v1/chat/completions", json=body)
    text = reply.json()["choices"][0]["message"]["content"] if reply.status_code == 200 else None
    return reply.status_code, text, time.monotonic() - begun


async def ask_all(client: httpx.AsyncClient, bodies: list[dict[str, Any]], num_clients: int) -> tuple[list, float]:
    """What clients that share requests get, in the order of these, and the seconds of all."""
    replies, rest, begun = [None] * len(bodies), iter(enumerate(bodies)), time.monotonic()

    async def work():
        for index, body in rest:
            replies[index] = await ask(client, body)

    await asyncio.gather(*(work() for _ in range(num_clients)))
    return replies, time.monotonic() - begun


async def leave(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
        async for _ in reply.aiter_lines():
            return


def memory(pid: int) -> float:
    """MiB of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


async def gauge(client: httpx.AsyncClient, name: str) -> float:
    text = (await client.get("/metrics")).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"trl_dlr_{name} "))


async def measure(args: ServingArguments, url: str, pid: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    headers, limits = {"Authorization": f"Bearer {KEY}"}, httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=1200, limits=limits) as client:
        different = requests_of(args)
        await ask(client, different[0])  # which warms up
        replies, seconds = await ask_all(client, different, 1)
        expected = [text for _, text, _ in replies]
        found["one client, requests per second"] = len(different) / seconds
        print(f"one client: {len(different)} requests in {seconds:.1f} s", flush=True)

        order = [i * 7 % len(different) for i in range(args.num_requests)]
        replies, seconds = await ask_all(client, [different[i] for i in order], args.num_clients)
        times = sorted(each for _, _, each in replies)
        found["clients"] = {
            "requests per second": len(order) / seconds,
            "times one client's": len(order) / seconds / found["one client, requests per second"],
            "p50": statistics.median(times),
            "p99": times[int(0.99 * len(times))],
            "lost": sum(status != 200 for status, _, _ in replies),
            "other answers": sum(text != expected[i] for (_, text, _), i in zip(replies, order, strict=True)),
        }
        print(f"{args.num_clients} clients: {found['clients']}", flush=True)

        order = [i % len(different) for i in range(args.num_connections)]
        replies, _ = await ask_all(client, [different[i] | {"max_tokens": 4} for i in order], len(order))
        short, _ = await ask_all(client, [body | {"max_tokens": 4} for body in different], 1)
        statuses = {status: sum(reply[0] == status for reply in replies) for status in {reply[0] for reply in replies}}
        wrong = sum(text not in (None, short[i][1]) for (_, text, _), i in zip(replies, order, strict=True))
        found["connections"] = {"statuses": statuses, "other answers": wrong}
        print(f"{args.num_connections} connections: {found['connections']}", flush=True)

        stays = [ask(client, body) for body in different[: args.num_clients // 2]]
        goes = [leave(client, body) for body in different[: args.num_clients // 2]]
        replies, _ = await asyncio.gather(asyncio.gather(*stays), asyncio.gather(*goes))
        wrong = sum(text != expected[i] for i, (_, text, _) in enumerate(replies))
        await asyncio.sleep(2)
        left = [await gauge(client, name) for name in ("running_answers", "waiting_requests")]
        found["clients that leave"] = {"other answers of those that stay": wrong, "left over": sum(left)}
        print(f"clients that leave: {found['clients that leave']}", flush=True)

        bodies = [different[i % len(different)] | {"max_tokens": 2} for i in range(args.num_short // 2)]
        memories = [memory(pid)]
        for _ in range(2):
            await ask_all(client, bodies, args.num_clients)
            memories.append(memory(pid))
        found["MiB before, after half and all of the short requests"] = memories
        print(f"{args.num_short} short requests: {', '.join(f'{each:.0f}' for each in memories)} MiB", flush=True)
    return found


def main() -> None:
    (args,) = HfArgumentParser(ServingArguments).parse_args_into_dataclasses()
    with tempfile.TemporaryDirectory() as folder:
        policies = save_models(Path(folder), args)
        process, url = start(args, policies, Path(folder, "log"))
        try:
            found = asyncio.run(measure(args, url, process.pid))
        finally:
            process.terminate()
            process.wait()
    if args.output_json is not None:
        Path(args.output_json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

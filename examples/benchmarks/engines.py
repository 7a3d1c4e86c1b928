# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Engines that decode the frozen main model, on the same rows: K trajectories of one prompt, completions of full length.

- `transformers`: `TransformersEngine`, which reads the prompt once for all its rows, and on a GPU decodes with a
  graph.
- `transformers_no_graph`: the same on a GPU without the graph, as with sampling or a sliding window.
- `transformers_8bit`, `transformers_4bit`: `TransformersEngine` with a main model that bitsandbytes has quantized.
- `transformers_int8`: the same on a CPU with torch's dynamic quantization, matrices and what they are multiplied with.
- `compiled`: `plain` with the static cache of transformers, whose step `generate` compiles on a GPU.
- `plain`: `model.generate(inputs_embeds=...)` with the prompt repeated in every row.
- `vllm`: `VLLMEngine`, where vLLM is installed.
- `vllm_server`: `VLLMServerEngine`, where `--vllm_server_base_url` is given.

Each lives in a process of its own and they take turns. Every round has another prompt and other latents, the same for
all engines. CPU seconds are those of the engine's process and its children; a server's are counted if its process id
is given, and left out, as the table says, if not. `agreement` is the share of rows with exactly the completion of
`transformers` (in bfloat16, near ties fall either way), `tokens_alike` the number of a row's tokens before the first
that is another.

The claims: `transformers` at least 1.5 times as fast as `plain`; vLLM at least 2.5 times the tokens of `transformers`
per CPU-second.

    python examples/benchmarks/engines.py                                      # CPU or GPU, SmolLM2-135M-Instruct
    python examples/benchmarks/engines.py --dtype float32 --output_json engines.json --output_png engines.png
    python examples/benchmarks/engines.py --num_rows 6 --engines transformers plain transformers_8bit \
        transformers_4bit transformers_int8
    python examples/benchmarks/engines.py --shape llama2-7b --max_completion_length 256     # GPU, random weights

With vLLM in this process on a CPU (two cores, a CPU build of vLLM), and with a server:

    VLLM_CPU_OMP_THREADS_BIND=0-1 VLLM_CPU_KVCACHE_SPACE=2 python examples/benchmarks/engines.py --dtype float32

    python examples/benchmarks/engines.py --save_main_model smollm2            # a folder that vLLM can load
    vllm serve smollm2 --dtype float32 --enable-prompt-embeds --port 8000
    python examples/benchmarks/engines.py --dtype float32 --vllm_server_base_url http://localhost:8000 \
        --vllm_server_pid <its process id>
"""

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import common
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_dlr.generation import create_engine, tokenize_prompts


QUANTIZED = {
    "transformers_8bit": {"load_in_8bit": True},
    "transformers_4bit": {"load_in_4bit": True},
    "transformers_int8": None,
}
ENGINES = ["transformers", "transformers_no_graph", *QUANTIZED, "compiled", "plain", "vllm", "vllm_server"]


@dataclass
class EnginesArguments(common.BenchmarkArguments):
    """Arguments of this script."""

    prompt_tokens: int | None = 150
    num_latents: int = 8
    num_rows: int = field(default=16, metadata={"help": "Number K of rows, all of one prompt."})
    engines: list[str] | None = field(
        default=None,
        metadata={
            "help": "Engines to compare. If unset, all that can run, but not with a quantized main model.",
            "choices": ENGINES,
        },
    )
    vllm_gpu_memory_utilization: float = field(default=0.4, metadata={"help": "Share of the GPU that vLLM takes."})
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "Address of a vLLM server."})
    vllm_server_pid: int | None = field(
        default=None, metadata={"help": "Process id of the server, to count its CPU time."}
    )
    save_main_model: str | None = field(
        default=None, metadata={"help": "Save the main model to this folder, for `vllm serve`, and do nothing else."}
    )


def plain_route(
    model: PreTrainedModel, prompt_ids: list[int], latent_embeds: torch.Tensor, max_new_tokens: int, **options
) -> list[list[int]]:
    """What transformers documents for embeddings: whole rows, each with the prompt."""
    prompt = model.get_input_embeddings()(torch.tensor([prompt_ids], device=model.device))
    embeds = torch.cat([prompt.expand(latent_embeds.size(0), -1, -1), latent_embeds.to(prompt)], dim=1)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=model.device)
    limits = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens}
    return model.generate(inputs_embeds=embeds, attention_mask=mask, do_sample=False, **limits, **options).tolist()


def quantized(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, engine: str) -> PreTrainedModel:
    if QUANTIZED[engine] is None:
        return torch.ao.quantization.quantize_dynamic(model.float(), {torch.nn.Linear})
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=model.dtype,
            quantization_config=BitsAndBytesConfig(**QUANTIZED[engine]),
            device_map=model.device,
        ).eval()


def make_decode(
    engine: str, args: EnginesArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Callable[[list[int], torch.Tensor], list[list[int]]]:
    """What decodes the rows of one prompt: prompt tokens and latent embeddings to completion tokens."""
    num_tokens = args.max_completion_length
    if engine == "plain":
        return lambda prompt_ids, latent_embeds: plain_route(model, prompt_ids, latent_embeds, num_tokens)
    if engine == "compiled":
        static = {"cache_implementation": "static"}
        return lambda prompt_ids, latent_embeds: plain_route(model, prompt_ids, latent_embeds, num_tokens, **static)
    if engine in QUANTIZED:
        model = quantized(model, tokenizer, engine)
    if engine.startswith("transformers"):
        decoder = create_engine("transformers", model, tokenizer, num_tokens, {"min_new_tokens": num_tokens})
        decoder.is_plainly_greedy = engine != "transformers_no_graph"
    elif engine == "vllm_server":
        decoder = create_engine(args.vllm_server_base_url, model, tokenizer, num_tokens, {"min_tokens": num_tokens})
    else:
        llm_kwargs = {
            "dtype": args.dtype,
            "max_model_len": (args.prompt_tokens or 0) + args.num_latents + num_tokens + 64,
            "enforce_eager": not torch.cuda.is_available(),
        }
        if torch.cuda.is_available():
            llm_kwargs["gpu_memory_utilization"] = args.vllm_gpu_memory_utilization
        with tempfile.TemporaryDirectory() as folder:  # it reads the weights once
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            model.config.name_or_path = folder
            options = {"min_tokens": num_tokens}
            decoder = create_engine(engine, model, tokenizer, num_tokens, options, llm_kwargs=llm_kwargs)
    counts = torch.tensor([args.num_rows])
    return lambda prompt_ids, latent_embeds: decoder.generate([prompt_ids], latent_embeds, counts)


def work(connection: Connection, engine: str, args: EnginesArguments) -> None:
    """Decode another prompt's rows whenever told to."""
    model, tokenizer, name = common.load_main_model(args)
    model.requires_grad_(False)  # frozen, as in training
    num_rounds = args.warmup + args.repeats
    prompts = list(common.make_prompts(tokenizer, num_rounds, args.prompt_tokens)["prompt"])
    decode = make_decode(engine, args, model, tokenizer)
    table = model.get_input_embeddings().weight
    connection.send("ready")
    for place, prompt_ids in enumerate(tokenize_prompts(prompts, tokenizer)):
        # Near real tokens, where a policy's latents lie; drawn on the CPU, so that all engines get the same
        generator = torch.Generator().manual_seed(args.seed + place)
        ids = torch.randint(table.size(0), (args.num_rows, args.num_latents), generator=generator)
        noise = torch.randn(*ids.shape, table.size(1), generator=generator).to(table.device)
        latent_embeds = table[ids.to(table.device)].float() + 0.3 * table.float().square().mean().sqrt() * noise
        connection.recv()
        server_cpu = common.cpu_seconds(args.vllm_server_pid) if args.vllm_server_pid else 0.0
        cpu, start = common.cpu_seconds(), common.now()
        with torch.no_grad():
            completions = decode(prompt_ids, latent_embeds)
        seconds, cpu = common.now() - start, common.cpu_seconds() - cpu
        if engine == "vllm_server":
            server_cpu = common.cpu_seconds(args.vllm_server_pid) - server_cpu if args.vllm_server_pid else None
            cpu = None if server_cpu is None else cpu + server_cpu
        connection.send({"seconds": seconds, "cpu_seconds": cpu, "completions": completions})
    connection.send({"main_model": name, "prompt_tokens": len(prompt_ids)})


def tokens_alike(ids: list[int], others: list[int]) -> int:
    return next((i for i, (one, other) in enumerate(zip(ids, others, strict=True)) if one != other), len(ids))


def main(args: EnginesArguments) -> None:
    engines = args.engines
    if engines is None:
        can_run = {"vllm": importlib.util.find_spec("vllm"), "vllm_server": args.vllm_server_base_url}
        can_run |= dict.fromkeys(("transformers_no_graph", "compiled"), torch.cuda.is_available())
        can_run |= dict.fromkeys(QUANTIZED, False)
        engines = [engine for engine in ENGINES if can_run.get(engine, True)]
    reports, results = common.take_turns(work, engines, args)
    model_name = results[engines[0]]["main_model"]

    figures = {}
    for engine in engines:
        figures[engine] = of_one = {"seconds": common.summary([report["seconds"] for report in reports[engine]])}
        num_tokens = [sum(map(len, report["completions"])) for report in reports[engine]]
        of_one["new_tokens"] = common.summary(num_tokens)
        per_second = [tokens / report["seconds"] for tokens, report in zip(num_tokens, reports[engine], strict=True)]
        of_one["tokens_per_second"] = common.summary(per_second)
        cpu = [report["cpu_seconds"] for report in reports[engine]]
        if None not in cpu:
            of_one["cpu_seconds"] = common.summary(cpu)
            # CPU clocks tick in hundredths of a second
            per_cpu = [tokens / max(value, 0.01) for tokens, value in zip(num_tokens, cpu, strict=True)]
            of_one["tokens_per_cpu_second"] = common.summary(per_cpu)
    for engine in engines:
        for base in ("plain", "transformers"):
            if base in engines and engine != base:
                for name in ("seconds", "cpu_seconds"):
                    if name in figures[engine]:
                        times = [[max(report[name], 0.01) for report in reports[which]] for which in (base, engine)]
                        figures[engine][f"speedup_{name}_over_{base}"] = common.ratios(*times)
        if "transformers" in engines:
            pairs = zip(reports[engine], reports["transformers"], strict=True)
            agreements = [
                sum(map(list.__eq__, mine["completions"], theirs["completions"])) / args.num_rows
                for mine, theirs in pairs
            ]
            figures[engine]["agreement"] = common.summary(agreements)
            alike = [
                sum(map(tokens_alike, mine["completions"], theirs["completions"])) / args.num_rows
                for mine, theirs in zip(reports[engine], reports["transformers"], strict=True)
            ]
            figures[engine]["tokens_alike"] = common.summary(alike)

    names = list(dict.fromkeys(name for engine in engines for name in figures[engine]))
    rows = [
        [name, *(common.spread(figures[engine][name]) if name in figures[engine] else "-" for engine in engines)]
        for name in names
    ]
    setting = (
        f"{args.num_rows} rows, prompt of {results[engines[0]]['prompt_tokens']} tokens, {args.num_latents} latents, "
        f"{args.max_completion_length} new tokens"
    )
    common.print_table(f"{common.describe(args, model_name)}\n{setting}", ["", *engines], rows)
    if "vllm_server" in engines and args.vllm_server_pid is None:
        print("The server's CPU time is not counted: give its --vllm_server_pid.")
    common.write_json(args, "engines", model_name, figures)
    panels = {"seconds": {engine: figures[engine]["seconds"] for engine in engines}}
    counted = [engine for engine in engines if "cpu_seconds" in figures[engine]]
    panels["tokens per CPU-second"] = {engine: figures[engine]["tokens_per_cpu_second"] for engine in counted}
    common.bar_plot(args, f"{model_name}: {setting}", panels)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(EnginesArguments).parse_args_into_dataclasses()
    if arguments.save_main_model is not None:
        main_model, main_tokenizer, _ = common.load_main_model(arguments)
        main_model.save_pretrained(arguments.save_main_model)
        main_tokenizer.save_pretrained(arguments.save_main_model)
    else:
        main(arguments)

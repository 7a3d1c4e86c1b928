# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What the benchmarks share: models, prompts, trainers, clocks, tables, JSON and plots. Not a script."""

import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
import trl
import trl.trainer.utils
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from trl_dlr import LatentGRPOConfig, LatentGRPOTrainer, first_layers
from trl_dlr.evaluation import wilson_interval
from trl_dlr.generation import tokenize_prompts
from trl_dlr.scripts.utils import fastest_dtype, find_smollm2


sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, whose tests have a small world

# Random weights of these shapes take as long as trained ones: nothing needs to be downloaded
SHAPES = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
    },
    "hybrid": {  # three layers of linear attention to one of attention, as Qwen3.5 has them
        "model_type": "qwen3_5_text",
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "max_position_embeddings": 2048,
    },
    "llama-1.3b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
    },
    "llama2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
    },
    "llama2-70b": {
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
}
SCRATCH = tempfile.TemporaryDirectory(prefix="trl-dlr-benchmark-")
FILLER = (
    "A farm sells apples and pears at the market in town, and every week the owner writes down how many of each were "
    "sold, what was left over, and how much money came in, so that the next harvest can be planned with some care."
).split()


@dataclass
class BenchmarkArguments:
    """Arguments of every benchmark."""

    main_model: str | None = field(
        default=None, metadata={"help": "Hub id or path of the main model. If unset, SmolLM2-135M-Instruct."}
    )
    shape: str | None = field(
        default=None,
        metadata={"help": "Random weights of this shape as the main model.", "choices": list(SHAPES)},
    )
    num_layers: int | None = field(
        default=None,
        metadata={"help": "Layers of `shape`, if not all: a large model's time grows by as much per layer."},
    )
    dtype: str = field(
        default="bfloat16",
        metadata={"help": "Precision of the main model's weights.", "choices": ["float32", "bfloat16"]},
    )
    prompt_tokens: int | None = field(
        default=None, metadata={"help": "Length of the prompts. If unset, that of 'What is a + b?' in a chat."}
    )
    max_completion_length: int = field(default=64, metadata={"help": "Completion tokens, always all of them."})
    num_latents: int = field(default=4, metadata={"help": "Number T of latent steps."})
    repeats: int = field(default=5, metadata={"help": "Measured repetitions."})
    warmup: int = field(default=1, metadata={"help": "Repetitions before them that are not counted."})
    seed: int = field(default=0, metadata={"help": "Seed of random weights and latents."})
    output_json: str | None = field(default=None, metadata={"help": "File for the figures."})
    output_png: str | None = field(default=None, metadata={"help": "File for a plot of them."})

    def __post_init__(self):
        check_output(self.output_json)
        check_output(self.output_png)
        if self.output_png is not None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError(f"`output_png={self.output_png}` needs matplotlib. Install it: pip install matplotlib")


@dataclass
class TrainingBenchmarkArguments(BenchmarkArguments):
    """Arguments of the benchmarks that train a latent policy."""

    assistant_shape: str | None = field(
        default=None,
        metadata={"help": "Random weights of this shape as the assistant, with `shape`.", "choices": list(SHAPES)},
    )
    assistant_num_layers: int = field(
        default=4, metadata={"help": "Layers of the assistant that is made from the main model otherwise."}
    )
    latent_dim: int = field(default=16, metadata={"help": "Size d of a latent."})
    latent_sampling: str = field(
        default="parallel", metadata={"help": "How latents are drawn.", "choices": ["parallel", "autoregressive"]}
    )
    num_generations: int = field(default=32, metadata={"help": "Number G of trajectories per question."})
    num_questions: int = field(default=1, metadata={"help": "Questions per step."})
    prescreening_fraction: float = field(
        default=0.18, metadata={"help": "Share of the trajectories that is decoded; 1.0 for all."}
    )


def check_output(path: str | None) -> None:
    """Refuse a file that could not be written after hours of measuring."""
    if path is not None and not Path(path).parent.is_dir():
        raise ValueError(f"The folder of {path!r} does not exist. Make it first: mkdir -p {Path(path).parent}")


# ---- Models and prompts ----


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_model(shape: str, dtype: torch.dtype, seed: int, num_layers: int | None = None) -> PreTrainedModel:
    torch.manual_seed(seed)
    fields = {"model_type": "llama", **SHAPES[shape], "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    if num_layers is not None:
        fields["num_hidden_layers"] = num_layers
    config = AutoConfig.for_model(**fields)
    with device():  # where drawing billions of weights takes seconds
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Numbers are their own tokens, every other word is unknown: enough to give prompts a length."""
    words = ["<pad>", "<eos>", "<unk>", *map(str, range(vocab_size - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def load_smollm2(dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer, in the dtype that is fastest here if none is given."""
    name = find_smollm2()
    # In its dtype from the start: a cast would take buffers along that the model keeps in float32
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype or fastest_dtype()), AutoTokenizer.from_pretrained(
        name
    )


def load_main_model(args: BenchmarkArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Main model on the device, its tokenizer and a name for tables."""
    dtype = getattr(torch, args.dtype)
    if args.shape is not None:
        model = random_model(args.shape, dtype, args.seed, args.num_layers)
        name = args.shape if args.num_layers is None else f"{args.num_layers} layers of {args.shape}"
        return model, word_tokenizer(model.config.vocab_size), f"{name} (random weights)"
    if args.main_model is not None:
        model = AutoModelForCausalLM.from_pretrained(args.main_model, dtype=dtype)
        tokenizer, name = AutoTokenizer.from_pretrained(args.main_model, padding_side="left"), args.main_model
    else:
        model, tokenizer = load_smollm2(dtype)
        tokenizer.padding_side, name = "left", "SmolLM2-135M-Instruct"
    return model.to(device()).eval(), tokenizer, name


def make_prompts(tokenizer: PreTrainedTokenizerBase, num_prompts: int, prompt_tokens: int | None) -> Dataset:
    """Different sums, with columns `prompt` and `answer`, before a text that brings all to about `prompt_tokens`."""

    def prompt(a: int, b: int, num_words: int) -> Any:
        filler = "".join(f" {FILLER[i % len(FILLER)]}" for i in range(num_words))
        question = (
            f"What is {a} + {b}?{filler}"  # first, so that engines which cache prefixes find none but the system's
        )
        return question if tokenizer.chat_template is None else [{"role": "user", "content": question}]

    num_words = 0
    while len(tokenize_prompts([prompt(10, 10, num_words)], tokenizer)[0]) < (prompt_tokens or 0):
        num_words += 1
    # Two digits each, so that all prompts have one length and nothing is padded
    sums = [(10 + i % 90, 10 + i // 90 % 90) for i in range(num_prompts)]
    return Dataset.from_list([{"prompt": prompt(a, b, num_words), "answer": str(a + b)} for a, b in sums])


# ---- Trainers ----


def spare_waste(model: PreTrainedModel) -> None:
    """
    Spare TRL's trainers what they need not pay for on a CPU. Without Triton, TRL scores prompts as well
    as completions. transformers hands the head a slice of the states, for which its weights are copied for every row.
    """
    if not torch.cuda.is_available():
        trl.trainer.utils._use_triton = lambda device: True  # where positions are chosen, not where kernels are
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))


def shared_config(args: TrainingBenchmarkArguments, num_steps: int) -> dict[str, Any]:
    """What both trainers are told: one pass over each rollout, completions of full length, no files."""
    return {
        "output_dir": SCRATCH.name,  # nothing is saved there
        "max_steps": num_steps,
        "per_device_train_batch_size": args.num_questions * args.num_generations,
        "num_generations": args.num_generations,
        "num_iterations": 1,
        "steps_per_generation": 1,
        "gradient_accumulation_steps": 1,
        "max_completion_length": args.max_completion_length,
        "generation_kwargs": {"min_new_tokens": args.max_completion_length},
        # Autocast saves time on GPUs; on CPUs it only costs, whatever the weights' precision
        "bf16": args.dtype == "bfloat16" and device().type == "cuda",
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": args.seed,
    }


def latent_trainer(
    args: TrainingBenchmarkArguments,
    main_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward_func: Callable,
    num_steps: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> LatentGRPOTrainer:
    """`LatentGRPOTrainer` with the demo's policy, or one around `assistant_shape`."""
    if args.assistant_shape is not None:
        assistant = random_model(args.assistant_shape, torch.float32, args.seed)
    else:
        assistant = first_layers(main_model, min(args.assistant_num_layers, main_model.config.num_hidden_layers))
    config = LatentGRPOConfig(
        **shared_config(args, num_steps),
        latent_dim=args.latent_dim,
        latent_sampling=args.latent_sampling,
        num_latents=args.num_latents,
        freeze_embeddings=True,
        prescreening_fraction=args.prescreening_fraction,
        prescreening_warmup_rollouts=0,
        exploration_check_prompts=0,
    )
    trainer = LatentGRPOTrainer(
        model=assistant,
        main_model=main_model,
        main_processing_class=tokenizer,
        processing_class=tokenizer,
        reward_funcs=reward_func,
        args=config,
        train_dataset=make_prompts(tokenizer, num_steps * args.num_questions, args.prompt_tokens),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def digit_reward(completions: list, **kwargs) -> list[float]:
    """Share of digits: takes no time, and tells trajectories apart whatever the model is."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in texts]


class StepClock(TrainerCallback):
    """
    Wall time of every optimizer step from the end of the one before to its own end, so that fetching data, logging and
    callbacks count as well.

    Args:
        between (`Callable[[], Any]`, *optional*):
            Called after each step, outside the measured time.
    """

    def __init__(self, between: Callable[[], Any] | None = None):
        self.between = between
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(now() - self.start)
        if self.between is not None:
            self.between()
        self.start = now()


# ---- Clocks and memory ----


def now() -> float:
    """Wall clock in seconds, after all that was handed to the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def cpu_seconds(pid: int | None = None) -> float:
    """CPU time that a process (this one by default) and its children, living or ended, have taken so far."""
    process = psutil.Process(pid)
    total = sum(process.cpu_times()[:4])  # its own and that of ended children, user and system each
    for child in process.children(recursive=True):
        try:
            total += sum(child.cpu_times()[:4])
        except psutil.NoSuchProcess:  # it ended in the meantime
            pass
    return total


def reset_peak_memory() -> float:
    """Forget what loading took at its highest; returns the memory in use now, in MiB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak then includes loading, for both sides alike
        pass
    return psutil.Process().memory_info().rss / 2**20


def peak_memory() -> float:
    """Most memory in use since then, in MiB: allocated on the GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copying a large tensor: what memory can do here."""
    source = torch.empty(2**30 if torch.cuda.is_available() else 2**28, dtype=torch.uint8, device=device()).fill_(1)
    target = source.clone()
    seconds = []
    for _ in range(5):
        start = now()
        target.copy_(source)
        seconds.append(now() - start)
    return 2 * source.numel() / min(seconds)


# ---- Contenders, each in a process of its own ----


def take_turns(
    work: Callable[[Connection, str, Any], None], contenders: Sequence[str], args: BenchmarkArguments
) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """
    Let contenders take turns, so that they never run together, and what slows the machine down slows all.

    Args:
        work (`Callable`):
            Called in each process with a connection, the contender's name and `args`. It sends `"ready"`, then a
            report (a dictionary) each time it has received something, and a last dictionary when it is done.
        contenders (`Sequence[str]`):
            Their names.
        args ([`BenchmarkArguments`]):
            Says for how many rounds.

    Returns:
        `tuple[dict[str, list[dict]], dict[str, dict]]`: the reports after warm-up, and what was sent last.
    """
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, {}
    num_rounds = args.warmup + args.repeats
    reports, results = {contender: [] for contender in contenders}, {}

    def receive(contender: str) -> Any:
        try:
            return connections[contender].recv()
        except EOFError:
            raise SystemExit(f"{contender!r} has died: its error is above.") from None

    try:
        for contender in contenders:
            connections[contender], theirs = context.Pipe()
            processes[contender] = context.Process(target=work, args=(theirs, contender, args))
            processes[contender].start()
            theirs.close()  # else one that died would be waited for
        for contender in contenders:
            receive(contender)  # all have loaded before any is measured
        for place in range(num_rounds):
            for contender in contenders if place % 2 == 0 else contenders[::-1]:
                connections[contender].send("go")
                report = receive(contender)
                reports[contender].append(report)
                print(f"round {place}, {contender}: {report['seconds']:.2f} s", file=sys.stderr, flush=True)
                if place == num_rounds - 1:  # it ends now, before another's turn
                    results[contender] = receive(contender)
                    processes[contender].join()
    finally:
        for process in processes.values():
            process.terminate()
    return {contender: of_one[args.warmup :] for contender, of_one in reports.items()}, results


# ---- Runs of hours, which can be interrupted ----


def run_missing(
    run: Callable[..., dict[str, Any]], settings: Sequence[dict[str, Any]], path: str | Path, num_workers: int
) -> list[dict[str, Any]]:
    """
    Figures `{**settings, **run(**settings)}` of each run, in the order of their settings.

    A run is known by its settings, which are JSON. What the file has is taken from there. The others are made, each in
    a fresh process with one thread, `num_workers` side by side, and appended to the file as they end.
    """
    path = Path(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {run_key(line["settings"]): line["figures"] for line in lines}
    missing = [each for each in settings if run_key(each) not in done]
    if not missing:
        return [{**each, **done[run_key(each)]} for each in settings]
    os.environ["OMP_NUM_THREADS"] = "1"
    # A server that has imported once what takes seconds: a run starts soon, and has its memory to itself
    context = multiprocessing.get_context("forkserver")
    slow = ("trl_dlr.trainer.latent_grpo_trainer", "trl_dlr.reasoners", "trl.trainer.grpo_trainer", "deepspeed")
    context.set_forkserver_preload(list(slow))
    with context.Pool(num_workers, maxtasksperchild=1) as pool:
        for i, (each, figures) in enumerate(pool.imap_unordered(_make_run, [(run, one) for one in missing])):
            with path.open("a") as file:
                file.write(json.dumps({"settings": each, "figures": figures}) + "\n")
            done[run_key(each)] = figures
            print(f"{i + 1} of {len(missing)}: {each}", flush=True)
    return [{**each, **done[run_key(each)]} for each in settings]


def run_key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _make_run(task: tuple[Callable[..., dict[str, Any]], dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    run, settings = task
    torch.set_num_threads(1)
    return settings, run(**settings)


# ---- Figures ----


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Ratio of each pair, measured one after the other: what slows the machine down slows both."""
    return summary([a / b for a, b in zip(numerators, denominators, strict=True)])


def spread(figures: dict[str, float]) -> str:
    """Median and, if it varies, the range."""

    def number(value: float) -> str:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

    if figures["min"] == figures["max"]:
        return number(figures["median"])
    return f"{number(figures['median'])} ({number(figures['min'])}..{number(figures['max'])})"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, *rows]:
        first, *others = (text.rjust(width) for text, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(len(first)), *others]))
    print(flush=True)


def print_accuracies(results: Sequence[dict[str, float]], num_questions: int, note: str) -> None:
    """Each arm's mean over seeds, with Wilson's 95% interval over the questions, and that of each seed."""
    print(f"\n{'held-out accuracy':<26}{'mean':>8}   {'95%':<16} {note}")
    for arm in results[0]:
        values = [accuracy[arm] for accuracy in results]
        low, high = wilson_interval(mean := statistics.fmean(values), num_questions)
        print(f"{arm:<26}{mean:>8.3f}   [{low:.3f}, {high:.3f}]   " + " ".join(f"{value:.3f}" for value in values))


def describe(args: BenchmarkArguments, name: str) -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, {args.dtype}, {where}, median (min..max) of {args.repeats}"


def write_json(args: Any, benchmark: str, model_name: str, figures: dict[str, Any]) -> None:
    if args.output_json is None:
        return
    machine = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cpu_cores": psutil.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": list(psutil.getloadavg()),
    }
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    content = {
        "benchmark": benchmark,
        "main_model": model_name,
        "settings": asdict(args),
        "machine": machine,
        "versions": {"python": platform.python_version(), **versions},
        "figures": figures,
    }
    Path(args.output_json).write_text(json.dumps(content, indent=2) + "\n")


def bar_plot(args: BenchmarkArguments, title: str, panels: dict[str, dict[str, dict[str, float]]]) -> None:
    """One panel per figure; in each, one bar per contender with its range."""
    if args.output_png is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.4), squeeze=False)
    for axis, (label, bars) in zip(axes[0], panels.items(), strict=True):
        medians = [bar["median"] for bar in bars.values()]
        below = [bar["median"] - bar["min"] for bar in bars.values()]
        above = [bar["max"] - bar["median"] for bar in bars.values()]
        axis.bar(list(bars), medians, yerr=[below, above], capsize=4, color=[f"C{i}" for i in range(len(bars))])
        axis.set_title(label)
        axis.tick_params(axis="x", rotation=20)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(args.output_png, dpi=120)

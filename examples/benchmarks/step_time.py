# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
What an optimizer step of `LatentGRPOTrainer` costs beside one of TRL's `GRPOTrainer`.

Both have the same main model (which TRL trains and ours only decodes with), prompts, number G of completions,
completion length (always all of it) and reward, and pass over each rollout once. Each trains in a process of its own,
so that peak memory is its own, and the two take turns step by step, so that they never run together and a machine that
slows down slows both. All through `trainer.train()`; a step's time includes fetching data and logging.

    python examples/benchmarks/step_time.py                                   # CPU, SmolLM2-135M-Instruct
    python examples/benchmarks/step_time.py --dtype float32 --prompt_tokens 150
    python examples/benchmarks/step_time.py --prescreening_fraction 1.0       # ours decodes all of the G
    python examples/benchmarks/step_time.py --trl trl trl_no_checkpointing    # TRL also without its default
    python examples/benchmarks/step_time.py --trl trl trl_as_shipped          # with what a CPU need not pay
    python examples/benchmarks/step_time.py --output_json step_time.json --output_png step_time.png

On a GPU, a LLaMA-2-7B with a 1.3B assistant, random weights, nothing downloaded:

    python examples/benchmarks/step_time.py --shape llama2-7b --assistant_shape llama-1.3b --num_generations 64 \
        --num_latents 32 --latent_dim 512 --latent_sampling autoregressive --max_completion_length 256 \
        --prompt_tokens 150 --skip_trl

Reported per step: wall and CPU seconds, the rollout's share (until the last reward is there), tokens through the main
model, decoded completions; per run: peak memory (of the process on a CPU, allocated on a GPU), in all and above what
the loaded main model took; how the time of ours divides; and what decoding reaches of the memory's bandwidth (bytes of
the main model's weights per new token / measured copy bandwidth).
"""

from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import common
import torch
from transformers import HfArgumentParser, PreTrainedModel, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_dlr.generation import tokenize_prompts
from trl_dlr.memory_plan import plan_memory
from trl_dlr.rewards import correctness_reward


TRL_VARIANTS = ["trl", "trl_no_checkpointing", "trl_as_shipped"]


@dataclass
class StepTimeArguments(common.TrainingBenchmarkArguments):
    """Arguments of this script."""

    trl: list[str] = field(
        default_factory=lambda: ["trl"],
        metadata={
            "help": "TRL's trainer with its default, gradient checkpointing, or without: more memory, less time. "
            "Both are spared what a CPU need not pay; `trl_as_shipped` is the first of them as it is.",
            "choices": TRL_VARIANTS,
        },
    )
    skip_trl: bool = field(default=False, metadata={"help": "Measure ours alone."})


# ---- In each process: one trainer ----


class Reward:
    """The reward of both trainers; remembers when it was last done, which is when a rollout is complete."""

    __name__ = "reward"

    def __init__(self):
        self.end = 0.0

    def __call__(self, completions: list, answer: list[str], **kwargs) -> list[float]:
        rewards = correctness_reward(completions, answer)
        self.end = common.now()
        return rewards


class TrlCounter:
    """Tokens through the main model and completions, read off the trainer's own model."""

    def __init__(self, model: PreTrainedModel):
        self.num_forward_tokens = 0
        # In generation, cached tokens do not pass again. Layers that checkpointing computes anew are not counted.
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module, args):
        self.num_forward_tokens += args[0].numel()


class TakeTurns(TrainerCallback):
    """Waits for its turn before each step, and reports after it."""

    def __init__(self, connection: Connection, reward: Reward):
        self.connection, self.reward = connection, reward
        self.counter = None  # of tokens and completions, known once the trainer is

    def _wait(self):
        self.connection.recv()
        self.tokens = self.counter.num_forward_tokens
        self.cpu, self.start = common.cpu_seconds(), common.now()

    def on_train_begin(self, args, state, control, **kwargs):
        self.connection.send("ready")
        self._wait()

    def on_step_end(self, args, state, control, **kwargs):
        end = common.now()
        report = {
            "seconds": end - self.start,
            "cpu_seconds": common.cpu_seconds() - self.cpu,
            "rollout_seconds": self.reward.end - self.start,
            "update_seconds": end - self.reward.end,
            "main_model_tokens": self.counter.num_forward_tokens - self.tokens,
        }
        self.connection.send(report)
        if state.global_step < state.max_steps:
            self._wait()


def trl_trainer(
    args: StepTimeArguments, main_model, tokenizer, reward: Reward, num_steps: int, callback: TakeTurns, variant: str
) -> GRPOTrainer:
    if variant != "trl_as_shipped":
        common.spare_waste(main_model)
    trainer = GRPOTrainer(
        model=main_model,
        processing_class=tokenizer,
        reward_funcs=reward,
        args=GRPOConfig(
            **common.shared_config(args, num_steps), gradient_checkpointing=variant != "trl_no_checkpointing"
        ),
        train_dataset=common.make_prompts(tokenizer, num_steps * args.num_questions, args.prompt_tokens),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def work(connection: Connection, contender: str, args: StepTimeArguments) -> None:
    """Train with one trainer, a step whenever told to."""
    num_steps = args.warmup + args.repeats
    main_model, tokenizer, name = common.load_main_model(args)
    weight_bytes = sum(p.numel() * p.element_size() for p in main_model.parameters())
    if not main_model.config.tie_word_embeddings:  # then a table from which decoding reads single rows
        embeddings = main_model.get_input_embeddings().weight
        weight_bytes -= embeddings.numel() * embeddings.element_size()
    memory_before = common.reset_peak_memory()
    reward = Reward()
    callback = TakeTurns(connection, reward)
    if contender == "ours":
        trainer = common.latent_trainer(args, main_model, tokenizer, reward, num_steps, [callback])
        callback.counter = trainer.engine
    else:
        trainer = trl_trainer(args, main_model, tokenizer, reward, num_steps, callback, contender)
        callback.counter = TrlCounter(main_model)
    trainer.train()
    peak = common.peak_memory()
    result = {
        "main_model": name,
        "weight_bytes": weight_bytes,
        "peak_memory_mib": peak,
        "peak_memory_above_model_mib": peak - memory_before,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "num_decoded": args.num_questions * args.num_generations,
        "log_history": [logs for logs in trainer.state.log_history if "loss" in logs],
    }
    if contender == "ours":
        prompts = list(trainer.train_dataset["prompt"])
        plan = plan_memory(
            trainer.policy,
            main_model,
            trainer.args,
            prompt_length=max(map(len, tokenize_prompts(prompts, tokenizer))),
            on_gpu=torch.cuda.is_available(),
        )
        result["planned_memory_mib"] = plan.total / 2**20
        result["num_decoded"] = trainer.engine.num_decoded / num_steps
        result["copy_bandwidth"] = common.copy_bandwidth()  # its buffers come after the peak was read
    connection.send(result)


# ---- What came out ----


def main(args: StepTimeArguments) -> None:
    contenders = ["ours"] if args.skip_trl else ["ours", *args.trl]
    reports, results = common.take_turns(work, contenders, args)
    model_name = results["ours"]["main_model"]

    figures = {}
    for contender in contenders:
        steps, result = reports[contender], results[contender]
        figures[contender] = {name: common.summary([step[name] for step in steps]) for name in steps[0]}
        names = ["num_decoded", "peak_memory_mib", "peak_memory_above_model_mib", "trainable_parameters"]
        for name in [*names, "planned_memory_mib"] if contender == "ours" else names:
            figures[contender][name] = common.summary([result[name]])
    for contender in contenders[1:]:
        compared = {
            name: common.ratios([step[name] for step in reports[contender]], [step[name] for step in reports["ours"]])
            for name in reports["ours"][0]
        }
        for name in ("num_decoded", "peak_memory_mib", "peak_memory_above_model_mib"):
            compared[name] = common.summary([results[contender][name] / results["ours"][name]])
        figures[f"{contender}/ours"] = compared

    logs = results["ours"]["log_history"][args.warmup :]
    times = [name for name in logs[0] if name.startswith("time/")]
    figures["ours_breakdown_seconds"] = {name: common.summary([log[name] for log in logs]) for name in times}
    passes = (
        args.max_completion_length
    )  # over the weights: one per new token (one more, of few rows, reads the prompt)
    decode = [log["time/decode"] for log in logs]
    new_tokens = results["ours"]["num_decoded"] * args.max_completion_length
    bandwidth = [results["ours"]["weight_bytes"] / (seconds / passes) for seconds in decode]
    figures["ours_decoding"] = {
        "tokens_per_second": common.summary([new_tokens / seconds for seconds in decode]),
        "weight_gb_per_second": common.summary([value / 1e9 for value in bandwidth]),
        "copy_gb_per_second": common.summary([results["ours"]["copy_bandwidth"] / 1e9]),
        "share_of_copy_bandwidth": common.summary([v / results["ours"]["copy_bandwidth"] for v in bandwidth]),
    }

    columns = list(figures)[: 2 * len(contenders) - 1]
    rows = [
        [name, *(common.spread(figures[column][name]) if name in figures[column] else "" for column in columns)]
        for name in figures["ours"]
    ]
    setting = f"G {args.num_generations}, {args.num_questions} question(s), {args.max_completion_length} new tokens"
    common.print_table(
        f"One optimizer step: {common.describe(args, model_name)}\n{setting}", ["per step", *columns], rows
    )
    for title in ("ours_breakdown_seconds", "ours_decoding"):
        rows = [[name, common.spread(value)] for name, value in figures[title].items()]
        common.print_table(title.replace("_", " "), ["", "median (min..max)"], rows)
    common.write_json(args, "step_time", model_name, {**figures, "steps": reports})
    panels = {
        label: {contender: figures[contender][name] for contender in contenders}
        for name, label in {
            "seconds": "step, seconds",
            "rollout_seconds": "rollout, seconds",
            "main_model_tokens": "tokens through the main model",
            "peak_memory_mib": "peak memory, MiB",
        }.items()
    }
    common.bar_plot(args, f"{model_name}: {setting}", panels)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(StepTimeArguments).parse_args_into_dataclasses()
    if unknown := set(arguments.trl) - set(TRL_VARIANTS):
        raise SystemExit(f"--trl must be among {TRL_VARIANTS}, got {sorted(unknown)}")
    main(arguments)

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Arms and runs of paper_tables.py: three small worlds, DLR and its rivals in them, and the figures of one run. Not a script.

All arms have the same questions, and are judged alike. A rival of DLR trains all weights of the main model. Seconds are
CPU seconds of training alone. A run goes on until it has spent both of its budgets, decodes and CPU seconds.
"""

import copy
import io
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import Any

import torch
from common import peak_memory, reset_peak_memory, spare_waste
from datasets import Dataset
from small_world import questions
from transformers import LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from tests.learners import ON_A_CPU, make_learner
from tests.tiny import OPERATION_OF, OPERATIONS, answer_of, result, tiny_tokenizer, trained_main_model
from trl_dlr import LatentGRPOTrainer
from trl_dlr.evaluation import answer_questions, majority_at_k, pass_at_k
from trl_dlr.generation import TransformersEngine, tokenize_prompts


# ---- Arms ----

CONSTANT = {"per_device_train_batch_size": 256, "num_generations": 16, "lr_scheduler_type": "constant"}
# What decodes.py found, without the hybrid term, which is none of the paper's
DLR = {**CONSTANT, "latent_sampling": "parallel", "num_generations": 8, "num_iterations": 8}
DLR |= {"learning_rate": 1e-3, "epsilon": 0.4}
# 192 decodes a rollout: as few as 48 teach no more and cost four times as much CPU time
PRESCREENED = {"prescreening_fraction": 0.18, "prescreening_warmup_rollouts": 2}
PRESCREENED |= {"num_generations": 32, "per_device_train_batch_size": 1024}
CONTRAST = {"gamma": 0.1}
HYBRID = {"hybrid_coef": 0.1}

RIVALS = {"GRPO": {}, "GSPO": {"importance_sampling_level": "sequence", "loss_type": "grpo"}, "GMPO": {}}

# What the main model was trained to write, its results, and tokens of a completion at most
WORLDS = {
    "told": ({"steps": 600}, 1, 3),
    "thinks": ({"steps": 1200, "batch_size": 64, "hint": 0.0}, 1, 6),
    "steps": ({"steps": 2000, "batch_size": 64, "hint": 0.0, "num_results": 2}, 2, 8),
    # So briefly that each of its tokens is uncertain; told the operation in none to eight tokens, as latents may be
    "chain": ({"steps": 300, "batch_size": 64, "num_hints": (0, 1, 2, 4, 8), "num_results": 16}, 16, 32),
}
AT_18 = "with 18% of the decodes"
NUM_POINTS = 11  # of a curve, for either budget: two are 18% of it

# ---- The world ----


def world_of(name: str) -> tuple[LlamaForCausalLM, list[dict], list[dict], int]:
    """A main model of its own, questions to train on, held-out ones, and tokens of a completion."""
    settings, num_results, num_tokens = WORLDS[name]
    train, held_out = questions(1, 2, 3, 4), questions(0)
    for row in train + held_out:
        a, b = int(row["prompt"][1]), int(row["prompt"][2])
        row["answer"] = answer_of(row["op"], a, b, num_results)
    return copy.deepcopy(trained_main_model(**settings)), train, held_out, num_tokens


def judged(completion: str, answer: str) -> tuple[bool, bool]:
    """
    Whether the final result is right, and whether those on the way to it are. Operations are not judged: DLR's answers
    need not write any.
    """
    text = re.fullmatch(r"([-+*^]*)((?:=\d)+)", completion.replace(" ", ""))
    if text is None:
        return False, False
    return text[2][-2:] == answer[-2:], text[2][:-2] == answer[:-2]


class FinalAnswer:
    """Reward of a final result, 1 or -1, and what it has seen."""

    __name__ = "final_answer"

    def __init__(self):
        self.num_decoded, self.rewards = 0, []

    def __call__(self, completions, answer, **kwargs) -> list[float]:
        rewards = [1.0 if judged(*row)[0] else -1.0 for row in zip(completions, answer, strict=True)]
        self.num_decoded += len(rewards)
        self.rewards.append((len(rewards), statistics.fmean(rewards)))
        return rewards


def right_digits(completions, answer, **kwargs) -> list[float]:
    """Share of right tokens at their places: its scale does not depend on how many there are."""
    texts = [completion.replace(" ", "") for completion in completions]
    return [
        sum(x == y for x, y in zip(text[1::2], right[1::2], strict=False)) / len(text[1::2] or "-")
        for text, right in zip(texts, answer, strict=True)
    ]


def skill_of(main_model: LlamaForCausalLM) -> dict[str, float]:
    """
    Share of right results where the operation is given, what the main model was trained for: with a letter that stands
    for that operation, and with one that stands for another.
    """
    rows = [(op, a, b) for op in OPERATIONS for a in range(10) for b in range(10)]
    skill = {}
    for name, agrees in (("skill", True), ("skill against the letter", False)):
        letters = {op: [x for x, own in OPERATION_OF.items() if (own == op) == agrees] for op in OPERATIONS}
        prompts = [f"{letters[op][i % len(letters[op])]}{a}{b}{op}{op}" for i, (op, a, b) in enumerate(rows)]
        texts = [text.replace(" ", "") for text in write(main_model, prompts, 2)]
        skill[name] = statistics.fmean(text == f"={result(*row)}" for text, row in zip(texts, rows, strict=True))
    return skill


@torch.no_grad()
def write(model: LlamaForCausalLM, prompts: Sequence[str], num_tokens: int, sampled: bool = False) -> list[str]:
    was_training = model.training
    engine = TransformersEngine(model.eval(), tiny_tokenizer(), num_tokens, {"do_sample": True} if sampled else None)
    texts = engine.decode(engine.generate(tokenize_prompts(list(prompts), tiny_tokenizer())))
    model.train(was_training)
    return texts


# ---- Trainers ----


class TrainableMainLatentGRPOTrainer(LatentGRPOTrainer):
    """The arm of the paper's Table 4 whose main model is trained too, by the gradient of the hybrid term."""

    main_model_rate: float

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        weights = list(self.main_model.requires_grad_(True).parameters())
        optimizer.add_param_group({"params": weights, "lr": self.main_model_rate, "weight_decay": 0.0})
        optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(weights, 1.0) and None)
        # Trainer clears the gradients of the policy alone
        optimizer.register_step_post_hook(lambda *_: self.main_model.zero_grad())
        return optimizer


def make_trainer(arm: str, config: dict, main_model, rows: list[dict], reward, folder: str, seed: int) -> Trainer:
    shared = {"max_steps": 1_000_000, "logging_steps": 1, "seed": seed}
    if arm.startswith("DLR"):
        shared |= {"exploration_check_prompts": 0, "main_model": main_model, "reward": reward, **config}
        rate = shared.pop("main_model_rate", None)
        trainer_class = LatentGRPOTrainer if rate is None else TrainableMainLatentGRPOTrainer
        trainer = make_learner(folder, seed, dataset=Dataset.from_list(rows), trainer_class=trainer_class, **shared)
        trainer.main_model_rate = rate
    else:
        # TRL loads the reference model of its KL from where the model was
        main_model.save_pretrained(f"{folder}/main")
        model = LlamaForCausalLM.from_pretrained(f"{folder}/main")
        spare_waste(model)
        trainer_class, config_class = (
            (GMPOTrainer, GMPOConfig) if arm.startswith("GMPO") else (GRPOTrainer, GRPOConfig)
        )
        args = config_class(folder, **{**ON_A_CPU, **CONSTANT, "gradient_checkpointing": False, **shared, **config})
        data = {"train_dataset": Dataset.from_list(rows), "processing_class": tiny_tokenizer()}
        trainer = trainer_class(model, reward, args, **data)
    trainer.remove_callback(PrinterCallback)
    return trainer


class Watch(TrainerCallback):
    """Held-out accuracy along the way, against decodes and CPU seconds, until both budgets are spent."""

    def __init__(self, reward: FinalAnswer, tokens: list[int], evaluate: Callable[[], float], decodes, seconds):
        self.reward, self.tokens, self.evaluate, self.budgets = reward, tokens, evaluate, (decodes, seconds)
        self.curve, self.grad_norms, self.diversity, self.peak = [], [], [], 0.0
        self.taken, self.reached = 0.0, None

    def keep(self) -> None:
        self.peak = max(self.peak, peak_memory())
        tokens = self.tokens[0]
        point = {"seconds": self.taken, "decodes": self.reward.num_decoded, "tokens": tokens}
        self.curve.append({**point, "accuracy": self.evaluate()})
        self.tokens[0] = tokens  # those of evaluations do not count
        reset_peak_memory()
        self.start = time.process_time() - self.taken

    def on_train_begin(self, args, state, control, **kwargs):
        self.keep()
        self.before = self.peak = reset_peak_memory()  # after an evaluation, whose memory is not training's

    def on_step_end(self, args, state, control, **kwargs):
        self.taken = time.process_time() - self.start
        spent = zip((self.reward.num_decoded, self.taken), self.budgets, strict=True)
        reached = [
            NUM_POINTS if not budget else min(NUM_POINTS, int(NUM_POINTS * used / budget)) for used, budget in spent
        ]
        if reached != self.reached:
            self.reached = reached
            self.keep()
        control.should_training_stop = min(reached) == NUM_POINTS

    def on_log(self, args, state, control, logs, **kwargs):
        if "grad_norm" in logs and self.reward.num_decoded <= self.budgets[0]:
            self.grad_norms.append(float(logs["grad_norm"]))
        if "latent/diversity" in logs:
            self.diversity.append(logs["latent/diversity"])


# ---- Runs: figures of one arm and one seed ----


def run(kind: str, **settings) -> dict[str, Any]:
    start = time.process_time()
    figures = {"learn": learn, "variance": estimate_gradient}[kind](**settings)
    return {**figures, "CPU seconds of all": time.process_time() - start}


def learn(world: str, arm: str, config: dict, seed: int, decodes: int, seconds: float, samples: int) -> dict[str, Any]:
    """
    Train until both budgets are spent, and answer the held-out questions along the way. What is not of the curve is of
    the end: skill, steps, samples, and latents of other questions.
    """
    main_model, train, held_out, num_tokens = world_of(world)
    is_dlr, reward, tokens = arm.startswith("DLR"), FinalAnswer(), [0]
    figures = {"parameters": 0, "tokens": 0, "peak memory": 0.0}
    weights = copy.deepcopy(main_model.state_dict())
    test, prompts = Dataset.from_list(held_out), [row["prompt"] for row in held_out]

    def answers(control: str = "mean_latents", num_samples: int = 1) -> list[list[str]]:
        if is_dlr:
            with trainer.answering() as reasoner, redirect_stderr(io.StringIO()):  # which shows its progress
                return answer_questions(reasoner, test, control, num_samples, batch_size=len(test), seed=seed)
        repeated = [prompt for prompt in prompts for _ in range(num_samples)]
        texts = write(main_model, repeated, num_tokens, sampled=control == "policy")
        return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]

    def verdicts(texts: list[list[str]]) -> list[list[tuple[bool, bool]]]:
        return [[judged(text, row["answer"]) for text in own] for own, row in zip(texts, held_out, strict=True)]

    def share(texts: list[list[str]]) -> float:
        return statistics.fmean(is_right for own in verdicts(texts) for is_right, _ in own)

    with tempfile.TemporaryDirectory() as folder:
        if arm == "untrained":
            curve = [{"seconds": 0.0, "decodes": 0, "tokens": 0, "accuracy": share(answers())}]
        else:
            config = {**config, "max_completion_length": num_tokens}
            trainer = make_trainer(arm, config, main_model, train, reward, folder, seed)
            if not is_dlr:
                main_model = trainer.model

            def count(module, args, kwargs):
                read = kwargs.get("inputs_embeds")
                tokens[0] += math.prod((kwargs["input_ids"] if read is None else read).shape[:2])

            main_model.base_model.register_forward_pre_hook(count, with_kwargs=True)  # prompts are read without head
            watch = Watch(reward, tokens, lambda: share(answers()), decodes, seconds)
            trainer.add_callback(watch)
            trainer.train()
            curve = watch.curve
            trained = [trainer.model, *([main_model] if "main_model_rate" in config else [])]
            trained += [trainer.prescreener.head] if is_dlr and trainer.prescreener is not None else []
            figures["parameters"] = sum(p.numel() for m in trained for p in m.parameters() if p.requires_grad)
            figures["peak memory"] = watch.peak - watch.before
            figures |= stability(curve, reward.rewards, watch.grad_norms, decodes, decoded_per_question(config))
            if watch.diversity:
                figures["diversity"] = statistics.fmean(watch.diversity[-50:])
        if is_dlr:  # whose main model has not a bit changed where it is frozen
            is_same = all(torch.equal(value, weights[name]) for name, value in main_model.state_dict().items())
            assert is_same == ("main_model_rate" not in config), "the main model is not as it should be"
        figures |= {name: at(curve, "decodes", decodes)[name] for name in ("accuracy", "tokens", "seconds")}
        figures["at equal seconds"] = at(curve, "seconds", seconds or figures["seconds"])["accuracy"]
        figures[AT_18] = at(curve, "decodes", decodes * 2 / NUM_POINTS)["accuracy"]
        figures |= skill_of(main_model)
        if is_dlr:
            figures["shuffled"] = share(answers("shuffled"))
        last = [pair for own in verdicts(answers()) for pair in own]
        figures["right"] = statistics.fmean(is_right for is_right, _ in last)
        figures["invalid steps"] = statistics.fmean(not is_valid for _, is_valid in last)
        valid = [is_valid for is_right, is_valid in last if is_right]
        figures["invalid where right"] = 1 - statistics.fmean(valid) if valid else math.nan
        if samples:
            figures |= at_k(answers("policy", samples), verdicts)
    return {**figures, "curve": curve}


def at(curve: list[dict], name: str, budget: float) -> dict[str, float]:
    """The first point at which as much was spent, or the last."""
    return next((point for point in curve if point[name] >= budget), curve[-1])


def decoded_per_question(config: dict[str, Any]) -> int:
    """Of a rollout, after the warm-up of a prescreener."""
    num_generations = config.get("num_generations", CONSTANT["num_generations"])
    return round(num_generations * config.get("prescreening_fraction", 1.0))


def stability(
    curve: list[dict], rewards: list[tuple[int, float]], grad_norms: list[float], decodes: int, per_question: int
) -> dict[str, float]:
    """
    Of training up to the budget of decodes. Rewards are means of at least 256 decodes: fewer would be noisier. Beside
    their standard deviation is the one that drawing other questions gives at the same mean, if all answers to a question
    are alike.
    """
    means, sizes, seen, count, total = [], [], 0, 0, 0.0
    for size, mean in rewards:
        seen, count, total = seen + size, count + size, total + size * mean
        if count >= 256 and seen <= decodes + 256:
            means.append(total / count)
            sizes.append(count / per_question)
            count, total = 0, 0.0
    last = max(2, len(means) // 5)
    share = (statistics.fmean(means[-last:]) + 1) / 2
    reached = [point["accuracy"] for point in curve if point["decodes"] <= decodes + 256]
    return {
        "reward std": statistics.pstdev(means[-last:]),
        "by drawing questions": 2 * math.sqrt(share * (1 - share) / statistics.fmean(sizes[-last:])),
        "gradient norm cv": statistics.pstdev(grad_norms) / max(statistics.fmean(grad_norms), 1e-12),
        "collapsed": float(reached[-1] < max(reached) / 2),
    }


def at_k(texts: list[list[str]], verdicts: Callable) -> dict[str, float]:
    """pass@k and majority@k of the samples; what is no answer is a vote of its own."""
    right = [[is_right for is_right, _ in own] for own in verdicts(texts)]
    votes = [[(re.findall(r"=\s*(\d)$", text) or ["none"])[0] for text in own] for own in texts]
    figures = {}
    for k in (2**i for i in range(len(texts[0]).bit_length())):
        figures[f"pass@{k}"] = statistics.fmean(pass_at_k(len(own), sum(own), k) for own in right)
        pairs = zip(votes, right, strict=True)
        figures[f"majority@{k}"] = statistics.fmean(majority_at_k(own, is_right, k) for own, is_right in pairs)
    return figures


def estimate_gradient(arm: str, num_tokens: int, num_latents: int, seed: int, estimates: int) -> dict[str, float]:
    """
    Normalized variance E|g - mean|^2 / |mean|^2 of the gradient of one rollout, 16 answers to each of the same 16
    questions, at unchanged weights. Answers have as many tokens as `num_tokens` says, and the reward is the share of
    right digits, normalized in each group.
    """
    main_model, train, *_ = world_of("chain")
    rows = train[:: len(train) // 16][:16]
    config = {"learning_rate": 0.0, "max_grad_norm": 0.0, "num_iterations": 1, "max_steps": estimates}
    config |= {"max_completion_length": num_tokens, "generation_kwargs": {"min_new_tokens": num_tokens}}
    if arm == "DLR":
        config = {**DLR, **CONSTANT, **config, "num_latents": num_latents}
    gradients = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            gradients.append(torch.cat(parts).double())

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(arm, config, main_model, rows, right_digits, folder, seed)
        trainer.add_callback(Keep())
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return {"variance": normalized_variance(torch.stack(gradients)), "reward": statistics.fmean(rewards)}


def normalized_variance(gradients: torch.Tensor) -> float:
    """E|g - mean|^2 / |mean|^2 of estimates of a gradient, shape `(num_estimates, num_parameters)`."""
    variance = gradients.var(0).sum()
    signal = gradients.mean(0).square().sum() - variance / len(gradients)  # the mean of few has noise of its own
    return (variance / signal).item() if signal > 0 else math.inf

"""A tiny world in which latents are needed: a main model that can calculate, once it is told with which operation."""

import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from filelock import FileLock
from safetensors.torch import load_model, save_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


LETTERS = "ABCDEFGH"
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "^": lambda a, b: a}
OPERATION_OF = {letter: "+-*^"[i % 4] for i, letter in enumerate(LETTERS)}
SPECIAL = ["<pad>", "<eos>"]
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL, "=", *"0123456789", *OPERATIONS, *LETTERS])}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def result(operation: str, a: int, b: int) -> int:
    return OPERATIONS[operation](a, b) % 10


def answer_of(operation: str, a: int, b: int, num_results: int = 1) -> str:
    """The answer as it is written, `=x=y` of two results."""
    results = itertools.accumulate(range(num_results), lambda last, _: result(operation, last, b), initial=a)
    return "".join(f"={digit}" for digit in list(results)[1:])


def tiny_config(**kwargs) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(
        **{**sizes, "vocab_size": len(VOCABULARY), "max_position_embeddings": 64, "num_key_value_heads": 4, **kwargs},
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def random_main_model(seed: int = 0, **kwargs) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**kwargs)).eval()


@functools.lru_cache
def trained_main_model(
    seed: int = 0,
    steps: int = 600,
    batch_size: int = 256,
    hint: float | None = None,
    num_hints: tuple[int, ...] = (2,),
    num_results: int = 1,
) -> LlamaForCausalLM:
    """
    A main model that continues `[letter][a][b][op][op]` with `=result`, or after as many [op] as `num_hints` says, in
    turn. The letter is noise to it. With a `hint`, it learns to write `[op][op]` too, in that share of examples the
    letter's own and else any: a start for a model that thinks by itself. Of more results, each is of the one before
    and b: `=x=y`. It is trained once a session.
    """
    main_model = random_main_model(seed)
    path = Path(
        os.environ["TRAINED_MODELS"], f"{seed}_{steps}_{batch_size}_{hint}_{num_hints}_{num_results}.safetensors"
    )
    with FileLock(f"{path}.lock"):
        if not path.exists():
            train_main_model(main_model.train(), seed, steps, batch_size, hint, num_hints, num_results)
            save_model(main_model, path)
    load_model(main_model, path)
    return main_model.eval()


def train_main_model(main_model, seed, steps, batch_size, hint, num_hints, num_results) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = list(OPERATIONS)

    def loss_of_step(step):
        hints = num_hints[step % len(num_hints)]
        letter, a, b, op = (
            torch.randint(high, (batch_size,), generator=generator).tolist() for high in (len(LETTERS), 10, 10, 4)
        )
        if hint is not None:
            is_own = (torch.rand(batch_size, generator=generator) < hint).tolist()
            own = [names.index(OPERATION_OF[LETTERS[i]]) for i in letter]
            op = [known if hit else o for known, hit, o in zip(own, is_own, op, strict=True)]
        texts = [
            f"{LETTERS[i]}{x}{y}{names[o] * hints}{answer_of(names[o], x, y, num_results)}"
            for i, x, y, o in zip(letter, a, b, op, strict=True)
        ]
        ids = ids_of(texts)
        first = 3 + hints if hint is None else 3
        logits = main_model(ids[:, :-1]).logits[:, first - 1 :]
        return cross_entropy(logits.reshape(-1, logits.size(-1)), ids[:, first:].reshape(-1))

    fit(main_model, steps, loss_of_step)


def ids_of(texts: list[str]) -> torch.Tensor:
    """Tokens of texts of one length, and their end, shape `(len(texts), length + 1)`."""
    return torch.tensor([[VOCABULARY[c] for c in text] + [1] for text in texts])


def fit(model, steps: int, loss_of_step: Callable[[int], torch.Tensor]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for step in range(steps):
        loss_of_step(step).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def tiny_dataset(num_rows: int, seed: int, held_out: bool = False) -> Dataset:
    """Questions `[letter][a][b]`: the letter decides the operation. Pairs with (a + 3 * b) % 5 == 0 are held out."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    while len(rows) < num_rows:
        i, a, b = (torch.randint(high, (), generator=generator).item() for high in (len(LETTERS), 10, 10))
        if ((a + 3 * b) % 5 == 0) == held_out:
            rows.append({"prompt": f"{LETTERS[i]}{a}{b}", "answer": str(result(OPERATION_OF[LETTERS[i]], a, b))})
    return Dataset.from_list(rows)


def tiny_reward(completions, answer, **kwargs) -> list[float]:
    return [1.0 if c.strip() == f"= {a}" or c == f"={a}" else -1.0 for c, a in zip(completions, answer, strict=True)]

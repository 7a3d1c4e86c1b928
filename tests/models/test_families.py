# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Every family of language models in every role, and the table of docs/models.md.

`python -m tests.models.test_families` tries all of them and writes the table; `make models` does it.
"""

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from tests.families import FAMILIES, FAST, NO_DECODERS, NUM_LAYERS, NUM_WORDS, OTHERS, VOCAB_SIZE, tiny_family
from trl_dlr import LatentPolicyModel, ThinkingConfig, ThinkingReasoner, first_layers, fresh_layers
from trl_dlr.generation import TransformersEngine
from trl_dlr.models.architectures import text_backbone
from trl_dlr.models.hidden_thoughts import read_with_thoughts
from trl_dlr.models.main_model import completion_log_probs, disable_dropout, teacher_forced_inputs
from trl_dlr.trainer.losses import add_likelihoods


PAGE = Path(__file__).parents[2] / "docs" / "models.md"
EOS = 2
NUM_TOKENS = 8
NO_WORDS = list(range(NUM_WORDS, VOCAB_SIZE))
PROMPTS = [list(range(5, 17)), [20, 21, 22, 23, 24]]
TWO_EACH = torch.tensor([2, 2])
# Latents that are embeddings of tokens: what follows them is what follows the tokens
LATENT_IDS = torch.tensor([[40, 41, 42, 43, 44, 45], [30, 51, 9, 56, 33, 17], [47, 8, 52, 19, 36, 55], [53, 18] * 3])
NUM_LATENTS = torch.tensor([6, 1, 4, 6])
COMPLETIONS = [[30, 31, 32], [33, 34, 35, 36, 37], [38, 39], [40, 41, 42, 43]]


class Refused(Exception):
    """A role that a family does not have, said where it is given it."""


@contextmanager
def refusal(model: PreTrainedModel) -> Iterator[None]:
    """What is built here may be refused, in a sentence that names the family."""
    try:
        yield
    except ValueError as error:
        if any(name in str(error) for name in (model.config.model_type, model.config.get_text_config().model_type)):
            raise Refused(str(error)) from error
        raise


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", *map(str, range(3, VOCAB_SIZE))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


@cache
def llama() -> PreTrainedModel:
    return tiny_family("llama")


def engine_of(model: PreTrainedModel, min_new_tokens: int = NUM_TOKENS) -> TransformersEngine:
    # No token twice: a random model would repeat one, which says little of what it has read
    generation_kwargs = {"min_new_tokens": min_new_tokens, "no_repeat_ngram_size": 1, "suppress_tokens": NO_WORDS}
    with refusal(model):
        return TransformersEngine(model, tokenizer(), NUM_TOKENS, generation_kwargs)


def latents_of(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their embeddings, for two rows of each prompt. Latents are no tokens: their last bit differs."""
    ids = LATENT_IDS
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None):
        ids = ids[:1].expand(4, -1)  # a token for each latent, the same in all rows, is read in every layer
    embeds = model.get_input_embeddings()(ids)
    return ids, embeds.nextafter(torch.zeros_like(embeds))


def read_alone(model: PreTrainedModel, ids: list[int] | None = None, embeds: torch.Tensor | None = None, **kwargs):
    """What the model makes of one row of tokens, or of embeddings `(length, hidden_size)`, in one pass."""
    if ids is not None:
        return model(input_ids=torch.tensor([ids]), use_cache=False, **kwargs)
    if "position_ids" in inspect.signature(model.forward).parameters:  # where the last batch may have left others
        kwargs["position_ids"] = torch.arange(len(embeds)).unsqueeze(0)
    return model(inputs_embeds=embeds.unsqueeze(0), use_cache=False, **kwargs)


def logits_after(model: PreTrainedModel, start: int, **row) -> torch.Tensor:
    """What a row alone says from the place before `start` on."""
    return read_alone(model, **row).logits[0, start - 1 : -1].float()


def assert_greedy(logits: torch.Tensor, completion: list[int], may_end: bool = False) -> None:
    """Every token is the best one that is new, but for what rounding does."""
    for place, row in enumerate(logits):
        row[completion[:place] + NO_WORDS + [EOS] * (not may_end)] = -torch.inf
    behind = logits.max(1).values - logits.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
    worst = (behind / logits[logits.isfinite()].std()).max().item()
    assert worst < 1e-3, f"a token is {worst:.2g} standard deviations behind the one of the row alone"


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(
        actual.float(),
        expected.float(),
        atol=1e-3,
        rtol=1e-3,
        msg=lambda message: f"{what}: {message.splitlines()[2]}",
    )


def prompts_batch() -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in PROMPTS])
    return ids, (ids > 0).long()


def check_main_model(model: PreTrainedModel) -> None:
    """Tokens after a prompt, and after as many latents in each row, are those of the row alone."""
    engine = engine_of(model)
    ids, embeds = latents_of(model)
    alone = engine.generate(PROMPTS)
    for prompt, completion in zip(PROMPTS, alone, strict=True):
        assert_greedy(logits_after(model, len(prompt), ids=prompt + completion), completion)
    completions = engine.generate(PROMPTS, embeds, TWO_EACH, latent_ids=ids[0].tolist())
    rows = [PROMPTS[i // 2] + latents for i, latents in enumerate(ids.tolist())]
    for row, completion in zip(rows, completions, strict=True):
        assert_greedy(logits_after(model, len(row), ids=row + completion), completion)
    streamed = "".join(engine.stream(PROMPTS[1], embeds[2:3], latent_ids=ids[0].tolist()))
    assert streamed.split() == engine.decode(completions[2:3])[0].split()
    assert alone[0] != alone[1] and completions[0] != alone[0] and completions[0] != completions[2]
    # Rows that end early leave the batch
    end = max(
        itertools.chain(*completions), key=lambda token: len({[*row, token].index(token) for row in completions})
    )
    model.generation_config.eos_token_id, before = end, model.generation_config.eos_token_id
    try:
        shorter = engine_of(model, min_new_tokens=0).generate(PROMPTS, embeds, TWO_EACH, latent_ids=ids[0].tolist())
    finally:
        model.generation_config.eos_token_id = before
    for row, completion in zip(rows, shorter, strict=True):
        assert len(completion) == NUM_TOKENS or completion[-1] in (end, EOS)
        assert_greedy(logits_after(model, len(row), ids=row + completion), completion, may_end=True)


def check_learned_stop(model: PreTrainedModel) -> None:
    """Rows with fewer latents go on as they do alone."""
    ids, embeds = latents_of(model)
    completions = engine_of(model).generate(PROMPTS, embeds, TWO_EACH, NUM_LATENTS, ids[0].tolist())
    for i, completion in enumerate(completions):
        row = PROMPTS[i // 2] + ids[i, : NUM_LATENTS[i]].tolist()
        assert_greedy(logits_after(model, len(row), ids=row + completion), completion)
    assert completions[0] != completions[1]


def check_soft_tokens(model: PreTrainedModel) -> None:
    """A mixture of one token is that token."""
    with refusal(model):
        options = {"latent_density": "soft_tokens", "num_latents": LATENT_IDS.size(1), "latent_top_k": 5}
        policy = LatentPolicyModel.from_assistant(llama(), model, tokenizer(), **options).eval()
    ids, embeds = latents_of(model)
    latents = torch.full((*ids.shape, policy.config.latent_dim), -torch.inf).scatter(2, ids.unsqueeze(2), 0.0)
    assert_close(policy.inject(latents), embeds, "the embedding of a token")
    drawn = policy.sample(*prompts_batch(), num_samples=2)
    assert drawn.density.log_prob(drawn.latents).isfinite().all()
    completions = engine_of(model).generate(PROMPTS, policy.inject(drawn.latents), TWO_EACH)
    assert [len(completion) for completion in completions] == [NUM_TOKENS] * 4


def check_supervised(model: PreTrainedModel) -> None:
    """Likelihoods in a batch are those of the row alone, and their gradients in the latents."""
    engine_of(model)  # which a family is refused by
    ids, embeds = latents_of(model)
    prompts = [PROMPTS[i // 2] for i in range(4)]
    log_probs, _ = completion_log_probs(model, prompts, COMPLETIONS, embeds, NUM_LATENTS, ids[0].tolist())
    for i, completion in enumerate(COMPLETIONS):
        row = prompts[i] + ids[i, : NUM_LATENTS[i]].tolist()
        expected = logits_after(model, len(row), ids=row + completion).log_softmax(1)
        expected = expected.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
        assert_close(log_probs[i], expected, f"log-likelihood of row {i}")

    def gradient(rows: list[int], num_latents: torch.Tensor | None, size: int) -> torch.Tensor:
        length = max(len(prompts[i]) for i in rows)
        prompt_ids = torch.tensor([[0] * (length - len(prompts[i])) + prompts[i] for i in rows])
        latents = embeds[rows, :size].detach().clone().requires_grad_(True)
        completion_ids = torch.tensor([(COMPLETIONS[i] + [-100] * 9)[:5] for i in rows])
        inputs = teacher_forced_inputs(
            model, prompt_ids, (prompt_ids > 0).long(), latents, completion_ids, num_latents, ids[0].tolist()
        )
        labels = inputs.pop("labels")
        embeds_again = inputs["inputs_embeds"].clone()  # which CTRL scales in place
        trained_with = model(**{**inputs, "inputs_embeds": embeds_again}, labels=labels, fused_lm_head=True).log_probs
        log_probs = model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        log_probs = log_probs.gather(2, labels[:, 1:, None].clamp(min=0)).squeeze(2)
        is_target = labels[:, 1:] != -100
        assert_close(trained_with[is_target], log_probs[is_target], "log-likelihood that trainers use")
        (log_probs * (labels[:, 1:] != -100)).sum().backward()
        return latents.grad

    add_likelihoods(model)
    together = gradient([0, 2], NUM_LATENTS[[0, 2]], 6)
    assert together.abs().amax(2)[0].min() > 1e-6 and (together[1, 4:] == 0).all()
    for place, i in enumerate((0, 2)):
        alone = gradient([i], None, NUM_LATENTS[i])[0]
        assert_close(together[place, : NUM_LATENTS[i]] / alone.abs().max(), alone / alone.abs().max(), "gradient")


def check_assistant(model: PreTrainedModel, sampling: str) -> None:
    """What is sampled is what a teacher-forced pass says, padding changes nothing, and there is a gradient."""
    with refusal(model):
        options = {"num_latents": 3, "latent_dim": 4, "latent_sampling": sampling, "anchor_text": "5 6"}
        policy = LatentPolicyModel.from_assistant(model, llama(), tokenizer(), **options).eval()
    policy.latent_head.mean.weight.data *= 10  # so that means differ by as much as latents do
    (ids, mask), rows = prompts_batch(), torch.tensor([0, 0, 1, 1])
    drawn = policy.sample(ids, mask, num_samples=2)
    with torch.no_grad():
        forced = policy(ids[rows], mask[rows], latents=drawn.latents)
        assert_close(forced.density.mean, drawn.density.mean, "means of a teacher-forced pass")
        assert drawn.density.mean[0].std(0).max() > 0.01  # steps differ
        for i, prompt in enumerate(PROMPTS):
            prompt_ids = torch.tensor([prompt])
            state = policy.assistant(input_ids=prompt_ids, use_cache=False).last_hidden_state[0, -1]
            assert_close(drawn.question_states[2 * i], state, "reading of a question alone")
            own = drawn.latents[2 * i : 2 * i + 2]
            alone = policy(prompt_ids.expand(2, -1), torch.ones(2, len(prompt), dtype=torch.long), latents=own)
            assert_close(forced.density.mean[2 * i : 2 * i + 2], alone.density.mean, "means of a row alone")
    policy.train()
    disable_dropout(policy)
    means = policy.sample(ids, mask, deterministic=True).latents
    output = policy(ids, mask, noise=torch.zeros_like(means))
    assert_close(output.latents, means, "latents drawn with gradient")
    score = policy(ids[rows], mask[rows], latents=drawn.latents).density.log_prob(drawn.latents)
    (output.latent_embeds.square().sum() + score.sum()).backward()
    gradients = [p.grad for p in policy.assistant.parameters() if p.grad is not None]
    assert len(gradients) > 4 and all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)


def check_autoregressive(model: PreTrainedModel) -> None:
    check_assistant(model, "autoregressive")


def check_parallel(model: PreTrainedModel) -> None:
    check_assistant(model, "parallel")


def check_layers(model: PreTrainedModel) -> str | None:
    """All layers are the model, and the first ones an assistant."""
    ids = torch.tensor([PROMPTS[0]])
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", NUM_LAYERS)
    with refusal(model):
        whole = first_layers(model, num_layers).eval()
    expected = text_backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    assert_close(whole(input_ids=ids, use_cache=False).last_hidden_state, expected, "all layers")
    for fewest in range(2, num_layers + 1):
        try:
            with refusal(model):
                backbones = first_layers(model, fewest), fresh_layers(model, fewest)
            break
        except Refused:
            assert fewest < num_layers
    for backbone in backbones:
        assert torch.equal(backbone.get_input_embeddings()(ids), model.get_input_embeddings()(ids))
        assert backbone.eval()(input_ids=ids, use_cache=False).last_hidden_state.isfinite().all()
        with refusal(model):
            policy = LatentPolicyModel.from_assistant(backbone, llama(), tokenizer(), anchor_text="5 6").eval()
    with TemporaryDirectory() as folder:
        policy.save_pretrained(folder)
        loaded = LatentPolicyModel.from_pretrained(folder)
    buffers = dict(loaded.named_buffers())  # not all of which are saved
    assert not [name for name, buffer in policy.named_buffers() if not torch.equal(buffers[name], buffer)]
    means, again = (each.sample(*prompts_batch(), deterministic=True).latents for each in (policy, loaded))
    assert_close(again, means, "a policy that was saved")
    return None if fewest == 2 else "all" if fewest == num_layers else f"from {fewest}"


def check_thinking(model: PreTrainedModel, latent_type: str) -> None:
    """Thoughts and answers in a batch are those of the row alone."""
    with refusal(model):
        options = {"soft_token_temperature": 0.5} if latent_type == "soft_tokens" else {}
        config = ThinkingConfig(latent_type=latent_type, num_latents=3, **options)
        thinker = ThinkingReasoner(model, tokenizer(), config, NUM_TOKENS).policy.thinker
    ids, mask = (part[[0, 1, 0]] for part in prompts_batch())  # a prompt twice is read once
    thoughts = thinker.think(model, ids, mask, deterministic=True)
    embed_tokens, lengths = model.get_input_embeddings(), torch.tensor([3, 1, 2])
    latents = thinker.latents.embed(embed_tokens, **thoughts.latents)
    length = {"min_new_tokens": NUM_TOKENS, "max_new_tokens": NUM_TOKENS}
    new = {"no_repeat_ngram_size": 1, "suppress_tokens": NO_WORDS}
    greedy = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=EOS, **length, **new)
    answers = thinker.answer(model, ids, mask, latents, lengths, greedy).tolist()
    for row, (prompt_ids, is_token, answer) in enumerate(zip(ids, mask, answers, strict=True)):
        prompt = embed_tokens(prompt_ids[is_token.bool()])
        output = read_alone(model, embeds=torch.cat([prompt, latents[row]]), output_hidden_states=True)
        if latent_type == "soft_tokens":
            expected = output.logits[0, len(prompt) - 1 : -1].float().log_softmax(1)
            assert_close(thoughts.latents["perturbed"][row], expected, "log-probabilities of soft tokens")
        else:
            expected = output.hidden_states[-1][0, len(prompt) - 1 : -1]
            assert_close(thoughts.latents["states"][row], expected, "hidden states")
        row_alone = torch.cat([prompt, latents[row, : lengths[row]], embed_tokens(torch.tensor(answer))])
        logits = logits_after(model, len(row_alone) - len(answer), embeds=row_alone)
        assert_greedy(logits, answer)
    if latent_type == "soft_tokens":
        one_hot = torch.full((1, VOCAB_SIZE), -torch.inf).index_fill(1, torch.tensor([7]), 0.0)
        token_ids = torch.arange(VOCAB_SIZE).unsqueeze(0)
        mixed = thinker.latents.embed(embed_tokens, token_ids=token_ids, perturbed=one_hot)
        assert_close(mixed[0], embed_tokens(torch.tensor(7)), "the embedding of a token")
        return
    # The pass that Coconut trains with
    ids, mask = (torch.nn.functional.pad(part, (0, 3), value=1) for part in (ids, mask))
    is_latent = torch.arange(ids.size(1)) >= ids.size(1) - 3
    backbone = text_backbone(model)
    output = read_with_thoughts(backbone, ids, mask, is_latent.expand_as(ids))
    assert_close(output.last_hidden_state[:, -4:-1], thoughts.latents["states"], "states of the pass with gradient")
    embed_tokens.requires_grad_(True)
    try:
        read_with_thoughts(backbone, ids, mask, is_latent.expand_as(ids)).last_hidden_state.square().sum().backward()
        assert embed_tokens.weight.grad.isfinite().all() and embed_tokens.weight.grad.any()
    finally:
        embed_tokens.requires_grad_(False).weight.grad = None


def check_thinking_in_soft_tokens(model: PreTrainedModel) -> None:
    check_thinking(model, "soft_tokens")


def check_thinking_in_hidden_states(model: PreTrainedModel) -> None:
    check_thinking(model, "hidden_states")


def check_shared_prompt(model: PreTrainedModel) -> str:
    """For how many rows a prompt of several is read: once, or for each."""
    engine = engine_of(model)
    ids, embeds = latents_of(model)
    read = {}
    for name, num_latents in (("equal", None), ("mixed", NUM_LATENTS)):
        sizes = []

        def note(module, args, kwargs):
            inputs = kwargs.get("input_ids", args[0] if args else None)
            inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
            sizes.append(len(inputs))

        hook = text_backbone(model).register_forward_pre_hook(note, with_kwargs=True)
        before = engine.num_forward_tokens
        engine.generate(PROMPTS, embeds, TWO_EACH, num_latents, ids[0].tolist())
        hook.remove()
        read[name] = sizes[0] == len(PROMPTS)
        tokens = 2 ** (not read[name]) * sum(map(len, PROMPTS)) + 4 * NUM_TOKENS
        tokens += int(NUM_LATENTS.sum()) if name == "mixed" else LATENT_IDS.numel()
        assert engine.num_forward_tokens - before == tokens, "`num_forward_tokens` counts another number of prompts"
    return "yes" if all(read.values()) else "equal lengths" if read["equal"] else "no"


CHECKS: dict[str, Callable[[PreTrainedModel], str | None]] = {
    "main model": check_main_model,
    "learned stop": check_learned_stop,
    "soft tokens": check_soft_tokens,
    "supervised": check_supervised,
    "assistant, autoregressive": check_autoregressive,
    "assistant, parallel": check_parallel,
    "its first layers": check_layers,
    "thinks in soft tokens": check_thinking_in_soft_tokens,
    "thinks in hidden states": check_thinking_in_hidden_states,
    "shared prompt": check_shared_prompt,
}


# Columns of the table, and the checks of which each is made
COLUMNS = {
    **{name: [name] for name in ("main model", "learned stop", "soft tokens", "supervised")},
    "assistant": ["assistant, autoregressive", "assistant, parallel"],
    "first layers": ["its first layers"],
    "thinks by itself": ["thinks in soft tokens", "thinks in hidden states"],
    "shared prompt": ["shared prompt"],
}


class NotTried(Exception):
    """A family that transformers itself does not run on text, or that no tiny model could be built of."""


def try_family(family: str) -> tuple[dict[str, str], dict[str, Exception]]:
    """The outcome of each check, and what has failed."""
    try:
        model = tiny_family(family).requires_grad_(False)
        model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False)
    except Exception as error:
        raise NotTried(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    outcomes, failures = {}, {}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            outcomes[name] = check(model) or "yes"
        except Refused as refused:
            outcomes[name] = f"no: {refused}"
        except Exception as error:
            outcomes[name], failures[name] = "fails", error
    return outcomes, failures


def table_row(family: str, outcomes: dict[str, str]) -> str:
    cells = []
    for names in COLUMNS.values():
        found = {name.split()[-1]: outcomes[name].partition(":")[0] for name in names}
        if len(set(found.values())) == 1:
            cells.append(next(iter(found.values())))
        else:
            cells.append(", ".join(f"{name}: {outcome}" for name, outcome in found.items()))
    return f"| {family} | {' | '.join(cells)} |"


def refusals(family: str, outcomes: dict[str, str]) -> list[str]:
    """What the family is refused with: once, if it is for everything."""
    said = {}
    for column, names in COLUMNS.items():
        for sentence in dict.fromkeys(outcomes[name] for name in names if outcomes[name].startswith("no: ")):
            said[column] = sentence.removeprefix("no: ").splitlines()[0]
    if {"main model", "assistant"} <= said.keys():
        return [f"- **{family}**: {said['main model']}"]
    return [f"- **{family}**, {column}: {sentence}" for column, sentence in said.items()]


def documented() -> tuple[str, dict[str, str]]:
    """The version of transformers that docs/models.md was written with, and its rows by their family."""
    text = PAGE.read_text(encoding="utf-8")
    rows = {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith("| ")}
    return re.search(r"transformers (\d[\w.]*\w)", text).group(1), rows


@pytest.mark.parametrize(
    "family", [family if family in FAST else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_a_family_works_or_is_refused(family):
    version, rows = documented()
    try:
        outcomes, failures = try_family(family)
    except NotTried as reason:
        assert family not in rows or version != transformers.__version__, reason
        pytest.skip(f"not tried: {reason}")
    if failures:
        said = "\n".join(f"{name}: {type(error).__name__}: {error}" for name, error in failures.items())
        pytest.fail(said, pytrace=False)
    if version == transformers.__version__:
        assert rows.get(family) == table_row(family, outcomes), "run `make models`"


def test_every_family_has_a_row_or_was_not_tried():
    version, rows = documented()
    text = PAGE.read_text(encoding="utf-8")
    assert not any(f"| {family} |" in text for family in NO_DECODERS)
    if version == transformers.__version__:
        not_tried = re.findall(r"^- `([^`]+)`: ", text.partition("<!-- not tried -->")[2].partition("<!--")[0], re.M)
        assert [family for family in FAMILIES if family not in rows] == not_tried
        assert all(f"`{family}`" in text for family in NO_DECODERS)


def write_page() -> None:
    """Try all families, and put what was found into docs/models.md."""
    rows, refused, not_tried, num_working = [], [], [], 0
    for family in FAMILIES:
        try:
            outcomes, failures = try_family(family)
        except NotTried as reason:
            not_tried.append(f"- `{family}`: {reason}")
            print(not_tried[-1], flush=True)
            continue
        rows.append(table_row(family, outcomes))
        refused += refusals(family, outcomes)
        num_working += not failures and not any(outcome.startswith("no: ") for outcome in outcomes.values())
        print(rows[-1], *(f"    {name}: {error!r}" for name, error in failures.items()), sep="\n", flush=True)
    header = ["family", *COLUMNS]
    table = [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *rows]
    others = [f"- {', '.join(f'`{name}`' for name in names.split())}: {why}" for why, names in OTHERS.items()]
    parts = {
        "version": [
            f"Made with transformers {transformers.__version__}: {len(rows)} families, {num_working} of them "
            "in every role."
        ],
        "table": table,
        "refused": refused,
        "not tried": not_tried or ["None."],
        "others": others,
    }
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, after = text.split(begin)[0], text.split(end)[1]
        text = "\n".join([before + begin, *lines, "", end + after])
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    write_page()

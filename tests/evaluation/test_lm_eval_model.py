# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import json
import math

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from tests.evaluation.test_preflight import make_reasoner
from tests.launch import ROOT, run_python
from tests.tiny import tiny_dataset
from trl_dlr.evaluation.lm_eval_model import LatentReasonerLM
from trl_dlr.generation import VLLMServerEngine
from trl_dlr.models.main_model import completion_log_probs
from trl_dlr.reasoners.latent_reasoner import LatentReasoner
from trl_dlr.rewards import correctness_reward


TASKS = ROOT / "examples" / "lm_eval"
GREEDY = {"do_sample": False, "until": []}


@pytest.fixture(scope="module")
def reasoner():
    return make_reasoner()


def requests_of(kind, arguments):
    return [Instance(kind, {}, args, 0, metadata=("task", i, 1)) for i, args in enumerate(arguments)]


def answers_of(lm, contexts, **kwargs):
    requests = requests_of("generate_until", [(context, {**GREEDY, **kwargs}) for context in contexts])
    return lm.generate_until(requests, disable_tqdm=True)


CONTEXTS = ["A12", "B34", "C56", "D78", "E90"]


def test_answers_are_the_reasoners_in_the_order_asked(reasoner):
    assert answers_of(LatentReasonerLM(reasoner, batch_size=2), CONTEXTS) == reasoner.generate(CONTEXTS).texts
    sampled = reasoner.generate(CONTEXTS, do_sample=True, seed=3).texts
    lm = LatentReasonerLM(reasoner, batch_size=5, do_sample=True, seed=3)
    state = torch.random.get_rng_state()
    assert answers_of(lm, CONTEXTS) == answers_of(lm, CONTEXTS) == sampled
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_vote_is_on_what_stands_before_the_stop_strings(reasoner, monkeypatch):
    texts = ["5|7", "6|7", "6|8", "9|7"]
    monkeypatch.setattr(LatentReasoner, "decode", lambda self, prompts, *latents: texts * len(prompts))
    kwargs = {"do_sample": True, "num_samples": 4, "batch_size": 2}
    lm = LatentReasonerLM(reasoner, selection="majority", **kwargs)
    assert answers_of(lm, CONTEXTS[:3], until=["|"]) == ["6"] * 3
    assert answers_of(lm, CONTEXTS[:1], until="|") == ["6"]
    assert answers_of(LatentReasonerLM(reasoner, **kwargs), CONTEXTS[:1], until=["|"]) == ["5"]


def test_the_length_of_answers_is_the_tasks_or_else_the_models(reasoner):
    lm = LatentReasonerLM(reasoner, batch_size=5)
    whole, short = answers_of(lm, CONTEXTS), answers_of(lm, CONTEXTS, max_gen_toks=1)
    assert short == [text.split()[0] for text in whole] != whole
    assert answers_of(lm, CONTEXTS) == whole
    assert reasoner.engine.max_new_tokens == 3


@pytest.mark.parametrize("num_samples", [1, 3])
def test_likelihoods_are_given_the_latents_of_the_context(reasoner, num_samples):
    sampling = {"do_sample": num_samples > 1, "num_samples": num_samples, "seed": 5}
    pairs = [("A12", "=3"), ("B345", "=-++"), ("A12", "=4"), ("C", "=7")]
    found = LatentReasonerLM(reasoner, batch_size=4, **sampling).loglikelihood(requests_of("loglikelihood", pairs))
    contexts, tokenizer = ["A12", "B345", "C"], reasoner.main_processing_class
    torch.manual_seed(5)
    latents, _ = reasoner.sample_latents(contexts, num_samples, not sampling["do_sample"])
    latents = dict(zip(contexts, latents.unflatten(0, (3, -1)), strict=True))
    for (context, answer), (log_prob, _) in zip(pairs, found, strict=True):
        likelihoods = []
        for z in latents[context]:
            ids = [tokenizer(context)["input_ids"]], [tokenizer(answer)["input_ids"]]
            rows, _ = completion_log_probs(reasoner.engine.model, *ids, reasoner.policy.inject(z.unsqueeze(0)))
            likelihoods.append(math.exp(rows[0].sum()))
        assert log_prob == pytest.approx(math.log(sum(likelihoods) / num_samples), abs=1e-4)
    if num_samples == 1:  # means do not depend on who stands beside whom
        alone = LatentReasonerLM(reasoner).loglikelihood(requests_of("loglikelihood", pairs))
        assert [value for value, _ in alone] == pytest.approx([value for value, _ in found], abs=1e-4)


def test_what_the_model_answers_is_greedy_and_nothing_else(reasoner):
    lm = LatentReasonerLM(reasoner, batch_size=3)
    answers = [text.replace(" ", "") for text in answers_of(lm, CONTEXTS, max_gen_toks=2)]
    others = [text[0] + ("8" if text[1] == "7" else "7") for text in answers]
    pairs = list(zip(CONTEXTS * 2, answers + others, strict=True))
    found = lm.loglikelihood(requests_of("loglikelihood", pairs))
    assert [is_greedy for _, is_greedy in found] == [True] * 5 + [False] * 5
    assert all(right > wrong for (right, _), (wrong, _) in zip(found[:5], found[5:], strict=True))


def test_assistant_and_main_model_each_render_a_conversation_their_own_way():
    reasoner = make_reasoner()
    reasoner.processing_class.chat_template = "{{ messages[-1]['content'] }}"
    main_tokenizer = reasoner.main_processing_class = make_reasoner().main_processing_class
    main_tokenizer.chat_template = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}+{% endif %}"
    lm = LatentReasonerLM(reasoner, batch_size=5)
    contexts = [lm.apply_chat_template([{"role": "user", "content": text}]) for text in CONTEXTS]
    chats = [[{"role": "user", "content": text}] for text in CONTEXTS]
    expected = reasoner.generate(chats).texts
    assert answers_of(lm, contexts) == expected
    assert lm.chat_template(True) == main_tokenizer.chat_template
    pairs = [(contexts[0], "=3"), (CONTEXTS[0], "=3")]
    chat, plain = (lm.loglikelihood(requests_of("loglikelihood", [pair]))[0] for pair in pairs)
    embeds = reasoner.policy.inject(reasoner.sample_latents(chats[:1], deterministic=True)[0])
    ids = main_tokenizer("A12+")["input_ids"], main_tokenizer("=3")["input_ids"]
    rows, _ = completion_log_probs(reasoner.engine.model, [ids[0]], [ids[1]], embeds)
    assert chat[0] == pytest.approx(rows[0].sum().item(), abs=1e-5) != pytest.approx(plain[0], abs=1e-5)
    with pytest.raises(ValueError, match="`gen_prefix` cannot be given a chat template"):
        lm.apply_chat_template(chats[0], add_generation_prompt=False)


def write_files(folder, num_rows=20):
    rows = tiny_dataset(num_rows, 1, held_out=True).rename_column("prompt", "question")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reasoner = make_reasoner()
    reasoner.save_pretrained(folder / "policy")
    reasoner.engine.model.save_pretrained(folder / "main")
    reasoner.main_processing_class.save_pretrained(folder / "main")


def test_the_harness_runs_it_by_name(tmp_path):
    write_files(tmp_path)
    model_args = {"pretrained": str(tmp_path / "policy"), "main_model": str(tmp_path / "main"), "max_gen_toks": 3}
    choices = [{"question": f"A{a}{b}", "choices": ["3", "7"], "gold": 0} for a, b in [(1, 2), (2, 1)]]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    multiple_choice = {
        "task": "choices",
        "output_type": "multiple_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "choices.jsonl")}},
        "test_split": "test",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "=",
    }
    manager = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"data_file": str(tmp_path / "questions.jsonl")}
    )
    found = lm_eval.simple_evaluate(
        "trl_dlr",
        model_args,
        ["questions_file", multiple_choice],
        batch_size=8,
        task_manager=manager,
        bootstrap_iters=0,
    )
    reasoner = LatentReasoner.from_pretrained(model_args["pretrained"], model_args["main_model"], max_new_tokens=3)
    rows = tiny_dataset(20, 1, held_out=True)
    texts = reasoner.generate(rows["prompt"][:]).texts
    num_right = correctness_reward(texts, answer=rows["answer"]).count(1.0)
    assert 0 < num_right < 20
    assert found["results"]["questions_file"]["accuracy,none"] == num_right / 20
    assert found["config"]["main_model_fingerprint"] == reasoner.policy.config.main_model_fingerprint
    greedy = LatentReasonerLM(reasoner).loglikelihood(
        requests_of("loglikelihood", [(row["question"], f"={c}") for row in choices for c in row["choices"]])
    )
    right = [first[0] > second[0] for first, second in zip(greedy[::2], greedy[1::2], strict=True)]
    assert found["results"]["choices"]["acc,none"] == sum(right) / 2


def test_its_own_command_is_that_of_the_harness(tmp_path):
    write_files(tmp_path, num_rows=6)
    model_args = (
        f"pretrained={tmp_path / 'policy'},main_model={tmp_path / 'main'},max_gen_toks=3,do_sample=true,seed=1"
    )
    command = ["-m", "trl_dlr.evaluation.lm_eval_model", "--model", "trl_dlr", "--batch_size", "4"]
    command += ["--model_args", model_args, "--include_path", TASKS, "--tasks", "questions_file"]
    command += ["--metadata", f"data_file={tmp_path / 'questions.jsonl'}", "--output_path", tmp_path / "out"]
    result = run_python(*command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "|questions_file|" in result.stdout
    found = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())
    assert found["config"]["model"] == "trl_dlr" and found["n-samples"]["questions_file"]["effective"] == 6


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": "auto"}, "`batch_size` must be a number of questions, at least 1, got 'auto'"),
        ({"batch_size": 0}, "`batch_size` must be a number"),
        ({"num_samples": 4}, "`num_samples` must be 1 without `do_sample=true`.* got 4"),
        ({"max_gen_toks": 9}, "`max_gen_toks` has no meaning for a `pretrained` that is a reasoner"),
        ({"revison": "v1"}, "`revison` has no meaning"),
        ({"engine": "vllm"}, "`engine` has no meaning"),
        ({"selection": "worst"}, "`selection` must be one of first, majority, best, got 'worst'"),
    ],
)
def test_arguments_that_make_no_sense(reasoner, kwargs, message):
    with pytest.raises(ValueError, match=message):
        LatentReasonerLM(reasoner, **kwargs)


def test_requests_that_it_cannot_answer(reasoner, monkeypatch):
    lm = LatentReasonerLM(reasoner)
    with pytest.raises(ValueError, match="ask for sampled tokens, but the main model decodes greedily"):
        answers_of(lm, CONTEXTS, do_sample=True, temperature=0.7)
    with pytest.raises(ValueError, match=r"set \['num_beams'\]"):
        answers_of(lm, CONTEXTS, num_beams=2)
    for call in (lm.generate_until, lm.loglikelihood):
        kind, arguments = call.__name__, ("", GREEDY if call == lm.generate_until else "=3")
        with pytest.raises(ValueError, match="`trl_dlr` needs a context.*`--model hf`"):
            call(requests_of(kind, [arguments]))
    with pytest.raises(ValueError, match="Context, latents and answer have 66 tokens, more than the main model's 64"):
        lm.loglikelihood(requests_of("loglikelihood", [("A" * 60, "=123")]))
    with pytest.raises(ValueError, match="does not score whole documents.*`--model hf`"):
        lm.loglikelihood_rolling(requests_of("loglikelihood_rolling", [("A12=3",)]))
    server = object.__new__(VLLMServerEngine)
    server.max_new_tokens = 3
    monkeypatch.setattr(reasoner, "engine", server)
    with pytest.raises(ValueError, match="need `engine=transformers`; VLLMServerEngine only writes answers"):
        lm.loglikelihood(requests_of("loglikelihood", [("A12", "=3")]))

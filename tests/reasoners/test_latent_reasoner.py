# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests.tiny import random_main_model, tiny_tokenizer
from trl_dlr import (
    LatentPolicyConfig,
    LatentPolicyModel,
    LatentReasoner,
    ThinkingConfig,
    ThinkingReasoner,
    fresh_layers,
)
from trl_dlr.generation import TransformersEngine, VLLMServerEngine
from trl_dlr.models import hub
from trl_dlr.models.loading import BASE_POLICY, load_policy, policy_below
from trl_dlr.models.value_head import ValueHead
from trl_dlr.rewards import majority_vote


PROMPTS = ["A12", "B3", "C5678"]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


def tokenizer():
    made = tiny_tokenizer()
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture(scope="module")
def main_folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("models") / "main")
    random_main_model(initializer_range=0.2).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def make_reasoner(main_folder, adapter=False, head=True, latent_sampling="autoregressive", max_new_tokens=6, **kwargs):
    main_model = type(random_main_model()).from_pretrained(main_folder)
    torch.manual_seed(7)
    policy = LatentPolicyModel.from_assistant(
        fresh_layers(main_model, 1),
        main_model,
        tokenizer(),
        **{
            "latent_dim": 4,
            "num_latents": 3,
            "injection": "components",
            "injection_scale": 1.0,
            "latent_sampling": latent_sampling,
        },
        **kwargs,
    ).eval()
    torch.nn.init.normal_(policy.latent_head.mean.weight, std=0.2)  # means that differ between questions
    if adapter:
        lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["latent_head", "latent_in"])
        policy = get_peft_model(policy, lora).eval()
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:  # as if it had been trained
                torch.nn.init.normal_(parameter, std=0.1 if "lora" in name else 0.3)
    value_head = ValueHead(12, 64) if head else None
    engine = TransformersEngine(main_model, tokenizer(), max_new_tokens)
    return LatentReasoner(policy, tokenizer(), engine, tokenizer(), value_head)


@pytest.fixture(scope="module")
def reasoner(main_folder):
    return make_reasoner(main_folder)


def assert_same(first, second):
    for kwargs in ({}, {"num_samples": 3, "seed": 1}):
        one, other = first.generate(PROMPTS, **kwargs), second.generate(PROMPTS, **kwargs)
        assert one.candidates == other.candidates
        assert torch.equal(one.latents, other.latents)
        assert (one.scores is None) == (other.scores is None)
        if one.scores is not None:
            assert torch.equal(one.scores, other.scores)


# ---- Answers ----


def test_shapes_of_an_answer(reasoner):
    output = reasoner.generate(PROMPTS, num_samples=4, seed=0)
    assert output.latents.shape == (3, 4, 3, 4) and output.scores.shape == (3, 4)
    assert [len(texts) for texts in output.candidates] == [4, 4, 4]
    assert output.texts == [texts[0] for texts in output.candidates]
    assert len({text for texts in output.candidates for text in texts}) > 3  # latents make a difference


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_a_batch_gives_what_batches_of_one_give(main_folder, sampling):
    reasoner = make_reasoner(main_folder, latent_sampling=sampling)
    together = reasoner.generate(PROMPTS)
    alone = [reasoner.generate([prompt]) for prompt in PROMPTS]
    assert together.texts == [output.texts[0] for output in alone]
    torch.testing.assert_close(together.latents, torch.cat([output.latents for output in alone]))
    assert len(set(together.texts)) == 3


@pytest.mark.parametrize("sampling", ["autoregressive", "parallel"])
def test_trajectories_of_different_lengths(main_folder, sampling):
    reasoner = make_reasoner(main_folder, latent_sampling=sampling, learn_stop=True, initial_stop_prob=0.5)
    torch.nn.init.normal_(reasoner.policy.stop_head.weight, std=0.1)
    drawn = reasoner.generate(PROMPTS, num_samples=8, seed=0)
    lengths = drawn.lengths.flatten().tolist()
    assert set(lengths) == {1, 2, 3}
    texts = [text for candidates in drawn.candidates for text in candidates]
    for row, (length, text) in enumerate(zip(lengths, texts, strict=True)):
        latents = drawn.latents.flatten(0, 1)[row : row + 1]
        assert (latents[:, length:] == 0).all() and (latents[:, :length] != 0).all()
        assert reasoner.decode([PROMPTS[row // 8]], latents[:, :length]) == [text]
    together = reasoner.generate(PROMPTS)
    for place, prompt in enumerate(PROMPTS):
        alone = reasoner.generate([prompt])
        assert alone.texts == [together.texts[place]] == ["".join(reasoner.stream(prompt))]
        assert torch.equal(alone.lengths[0], together.lengths[place])
    best = reasoner.generate(PROMPTS, num_samples=8, seed=0, selection="best")
    assert best.texts == [texts[i] for texts, i in zip(drawn.candidates, drawn.scores.argmax(1), strict=True)]


def test_one_answer_is_deterministic_and_several_are_drawn(reasoner):
    assert reasoner.generate(PROMPTS).texts == reasoner.generate(PROMPTS).texts
    means = reasoner.generate(PROMPTS).latents
    sampled = reasoner.generate(PROMPTS, do_sample=True)
    assert not torch.equal(means, sampled.latents)
    two = reasoner.generate(PROMPTS, num_samples=2).latents
    assert not torch.equal(two[:, 0], two[:, 1])


def test_seeds(reasoner):
    state = torch.get_rng_state()
    first = reasoner.generate(PROMPTS, num_samples=2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # which a seed of its own leaves alone
    assert torch.equal(first.latents, reasoner.generate(PROMPTS, num_samples=2, seed=3).latents)
    assert not torch.equal(first.latents, reasoner.generate(PROMPTS, num_samples=2, seed=4).latents)
    assert not torch.equal(
        reasoner.generate(PROMPTS, do_sample=True).latents, reasoner.generate(PROMPTS, do_sample=True).latents
    )


def test_the_best_by_the_value_head_is_all_that_is_decoded(reasoner):
    all_of_them = reasoner.generate(PROMPTS, num_samples=5, seed=2)
    before = reasoner.engine.num_decoded
    best = reasoner.generate(PROMPTS, num_samples=5, seed=2, selection="best")
    assert reasoner.engine.num_decoded - before == len(PROMPTS)
    places = all_of_them.scores.argmax(1).tolist()
    assert len(set(places)) > 1
    assert best.texts == [texts[i] for texts, i in zip(all_of_them.candidates, places, strict=True)]
    assert best.candidates == [[text] for text in best.texts]
    assert torch.equal(best.latents, all_of_them.latents)


def test_the_majority(reasoner, monkeypatch):
    drawn = reasoner.generate(PROMPTS, num_samples=5, seed=2, selection="majority")
    assert drawn.texts == [texts[majority_vote(texts)] for texts in drawn.candidates]
    said = ["5", "7", "7.0", "7", "7", "3"]
    monkeypatch.setattr(reasoner, "decode", lambda *args: said)
    assert reasoner.generate(["A1", "B2"], num_samples=3, selection="majority").texts == ["7", "7"]


def test_the_length_of_an_answer_can_be_said_in_a_call(main_folder):
    reasoner = make_reasoner(main_folder)
    whole = reasoner.generate(PROMPTS).texts
    short = reasoner.generate(PROMPTS, max_new_tokens=2)
    assert [len(text.split()) for text in short.texts] == [2, 2, 2]
    assert all(text.startswith(start) for text, start in zip(whole, short.texts, strict=True))
    assert "".join(reasoner.stream(PROMPTS[0], max_new_tokens=2)) == short.texts[0]
    best = reasoner.generate(PROMPTS, num_samples=4, selection="best", seed=0, max_new_tokens=2)
    assert [len(text.split()) for text in best.texts] == [2, 2, 2]
    assert reasoner.generate(PROMPTS).texts == whole  # it was for those calls alone
    for answer in (reasoner.generate, lambda prompts, **kwargs: list(reasoner.stream(prompts[0], **kwargs))):
        with pytest.raises(ValueError, match="`max_new_tokens` must be at least 1, got 0"):
            answer(PROMPTS, max_new_tokens=0)
        with pytest.raises(ValueError, match="exceed the main model's 64 positions"):
            answer(PROMPTS, max_new_tokens=64)
    assert reasoner.engine.max_new_tokens == 6


def test_chat_prompts_are_rendered_for_both_models(reasoner):
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    as_text = reasoner.generate([f"{prompt}=" for prompt in PROMPTS])
    assert reasoner.generate(chats).texts == as_text.texts
    assert torch.equal(reasoner.generate(chats).latents, as_text.latents)
    assert "".join(reasoner.stream(chats[0])) == as_text.texts[0]


CHAT = [{"role": "user", "content": "A12"}]
NO_PROMPTS = [
    ([""], "index 0 that is empty"),
    (["A12", None], "index 1 that is a NoneType"),
    (["A12", CHAT], "index 1 that is of another kind than the first"),
    ([CHAT, [{"role": "user"}]], "index 1 that has a NoneType as 'content'"),
    ([[{"role": "user", "content": [{"type": "text", "text": "A12"}]}]], "a list of parts as 'content'"),
]


@pytest.mark.parametrize(("prompts", "message"), NO_PROMPTS)
def test_what_is_no_prompt(reasoner, prompts, message):
    with pytest.raises(ValueError, match=message):
        reasoner.generate(prompts)
    if len(prompts) == 1:
        with pytest.raises(ValueError, match=message):
            reasoner.stream(prompts[0])


def test_wrong_arguments_of_generate(main_folder, reasoner):
    for prompts in ("A12", [], [{"role": "user", "content": "A12"}]):
        with pytest.raises(ValueError, match="`prompts` must be a list of prompts"):
            reasoner.generate(prompts)
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got 0"):
        reasoner.generate(PROMPTS, num_samples=0)
    with pytest.raises(ValueError, match="`num_samples` must be int, got 2.0"):
        reasoner.generate(PROMPTS, num_samples=2.0)
    with pytest.raises(ValueError, match="all `num_samples=2` would be alike"):
        reasoner.generate(PROMPTS, num_samples=2, do_sample=False)
    with pytest.raises(ValueError, match="`selection` must be one of first, majority, best, got 'worst'"):
        reasoner.generate(PROMPTS, selection="worst")
    with pytest.raises(ValueError, match="`selection='best'` needs a value head"):
        make_reasoner(main_folder, head=False).generate(PROMPTS, selection="best")


# ---- Streams ----


def test_a_stream_is_the_answer_in_pieces(reasoner):
    for prompt, text in zip(PROMPTS, reasoner.generate(PROMPTS).texts, strict=True):
        pieces = list(reasoner.stream(prompt))
        assert "".join(pieces) == text
        assert len(pieces) > 1
    torch.manual_seed(0)
    sampled = "".join(reasoner.stream(PROMPTS[0], do_sample=True))
    torch.manual_seed(0)
    assert sampled == reasoner.generate([PROMPTS[0]], do_sample=True).texts[0]


def test_prompts_are_rendered_as_in_training(main_folder):
    reasoner = make_reasoner(main_folder)
    for own in (reasoner.processing_class, reasoner.main_processing_class):
        own.chat_template = CHAT_TEMPLATE + "{{ ending }}"
    chat = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:2]]
    plain = [reasoner.generate([f"{prompt}=++"]) for prompt in PROMPTS[:2]]
    reasoner.policy.config.chat_template_kwargs = {"ending": "++"}
    found = reasoner.generate(chat)
    assert found.texts == [output.texts[0] for output in plain]
    assert torch.allclose(found.latents, torch.cat([output.latents for output in plain]), atol=1e-6)
    assert "".join(reasoner.stream(chat[0])) == found.texts[0]
    reasoner.policy.config.chat_template_kwargs = None
    assert not torch.allclose(reasoner.generate(chat).latents, found.latents, atol=1e-3)


def test_a_stream_that_is_left_stops_decoding(main_folder):
    reasoner = make_reasoner(main_folder, max_new_tokens=40)
    num_forwards = 0

    def count(*args):
        nonlocal num_forwards
        num_forwards += 1

    reasoner.engine.model.register_forward_hook(count)
    before = set(threading.enumerate())
    stream = reasoner.stream(PROMPTS[0])
    next(stream)
    (writer,) = set(threading.enumerate()) - before
    assert writer.is_alive()
    stream.close()
    assert not writer.is_alive()
    assert num_forwards < 40


def test_what_goes_wrong_in_a_stream_is_raised(main_folder):
    reasoner = make_reasoner(main_folder)

    def fail(*args):
        raise RuntimeError("out of memory")

    reasoner.engine.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(reasoner.stream(PROMPTS[0]))
    with pytest.raises(ValueError, match="exceed the main model's 64 positions"):
        list(reasoner.stream("1" * 60))


def test_wrong_arguments_of_stream(reasoner, monkeypatch):
    for prompt in (PROMPTS, [], [[{"role": "user", "content": "A12"}]]):
        with pytest.raises(ValueError, match="`prompt` must be one prompt"):
            reasoner.stream(prompt)
    monkeypatch.setattr(reasoner, "engine", object.__new__(VLLMServerEngine))
    with pytest.raises(ValueError, match="`stream` needs `engine='transformers'`; VLLMServerEngine returns whole"):
        reasoner.stream(PROMPTS[0])


# ---- Saved and loaded ----


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_a_saved_policy_answers_as_before(main_folder, tmp_path, adapter, head):
    reasoner = make_reasoner(main_folder, adapter, head)
    reasoner.save_pretrained(tmp_path / "policy")
    loaded = LatentReasoner.from_pretrained(str(tmp_path / "policy"), max_new_tokens=6)
    assert_same(reasoner, loaded)
    assert loaded.engine.model is not reasoner.engine.model
    files = {str(path.relative_to(tmp_path / "policy")) for path in (tmp_path / "policy").rglob("*")}
    assert not [file for file in files if file.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert ("value_head.safetensors" in files) is head
    assert (f"{BASE_POLICY}/model.safetensors" in files) is adapter


def test_an_adapter_is_saved_with_the_policy_below_it(main_folder, tmp_path):
    reasoner = make_reasoner(main_folder, adapter=True)
    base = {name: tensor.clone() for name, tensor in make_reasoner(main_folder).policy.state_dict().items()}
    reasoner.save_pretrained(tmp_path)
    saved = load_file(tmp_path / BASE_POLICY / "model.safetensors")
    assert set(saved) == set(base)
    assert all(torch.equal(tensor, base[name]) for name, tensor in saved.items())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE_POLICY
    assert policy_below(reasoner.model) is not reasoner.policy  # which stays as it was
    assert_same(reasoner, LatentReasoner.from_pretrained(str(tmp_path), max_new_tokens=6))


def test_an_adapter_whose_base_policy_is_elsewhere(main_folder, tmp_path):
    reasoner = make_reasoner(main_folder, adapter=True)
    reasoner.save_pretrained(tmp_path / "policy")
    shutil.move(tmp_path / "policy" / BASE_POLICY, tmp_path / "base")
    path = tmp_path / "policy" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    assert_same(reasoner, LatentReasoner.from_pretrained(str(tmp_path / "policy"), max_new_tokens=6))


def test_a_card_is_kept(main_folder, tmp_path):
    reasoner = make_reasoner(main_folder)
    reasoner.save_pretrained(tmp_path / "policy")
    short = (tmp_path / "policy" / "README.md").read_text()
    assert 'LatentReasoner.from_pretrained("policy", main_model)' in short and str(tmp_path) not in short
    plots = "![rewards](report/rewards.png)\n\n![gone](report/gone.png)"
    (tmp_path / "policy" / "README.md").write_text(f"{short}\n{plots}\n\nWritten by hand.\n")
    (tmp_path / "policy" / "report").mkdir()
    (tmp_path / "policy" / "report" / "rewards.png").write_bytes(b"PNG")
    LatentReasoner.from_pretrained(str(tmp_path / "policy")).save_pretrained(tmp_path / "again")
    assert (
        (tmp_path / "again" / "README.md")
        .read_text()
        .endswith("\n![rewards](report/rewards.png)\n\nWritten by hand.\n")
    )
    assert (tmp_path / "again" / "report" / "rewards.png").read_bytes() == b"PNG"


@pytest.fixture
def policy_folder(reasoner, tmp_path):
    reasoner.save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


def test_the_main_model_may_be_given(policy_folder, main_folder, reasoner):
    given = reasoner.engine.model
    loaded = LatentReasoner.from_pretrained(policy_folder, given, max_new_tokens=6)
    assert loaded.engine.model is given
    assert_same(reasoner, loaded)
    paths = Path(policy_folder), Path(main_folder)
    assert_same(reasoner, LatentReasoner.from_pretrained(*paths, max_new_tokens=6, batch_size=2))
    with pytest.raises(ValueError, match="`main_model` must be a Hub id, a path or a transformers model, got 3"):
        LatentReasoner.from_pretrained(policy_folder, 3)
    with pytest.raises(ValueError, match="`main_processing_class` must be a tokenizer, got str"):
        LatentReasoner.from_pretrained(policy_folder, main_processing_class="tok")
    with pytest.raises(ValueError, match="`main_model_init_kwargs` are for a `main_model` given by name"):
        LatentReasoner.from_pretrained(policy_folder, given, main_model_init_kwargs={"dtype": torch.bfloat16})


def test_limits_and_options_reach_the_decoder(policy_folder):
    loaded = LatentReasoner.from_pretrained(
        policy_folder,
        max_new_tokens=2,
        generation_kwargs={"min_new_tokens": 2},
        batch_size=2,
        main_model_init_kwargs={"dtype": torch.float64},
    )
    assert loaded.engine.max_new_tokens == 2 and loaded.engine.batch_size == 2
    assert loaded.engine.generation_kwargs["min_new_tokens"] == 2
    assert loaded.engine.model.dtype == torch.float64
    assert not any(parameter.requires_grad for parameter in loaded.engine.model.parameters())
    assert not loaded.engine.model.training and not loaded.policy.training


def test_no_tokens_or_rows_of_an_answer_are_refused(policy_folder):
    with pytest.raises(ValueError, match="`batch_size` must be at least 1 or `None`, got 0"):
        LatentReasoner.from_pretrained(policy_folder, batch_size=0)
    with pytest.raises(ValueError, match="`max_new_tokens` must be at least 1, got 0"):
        LatentReasoner.from_pretrained(policy_folder, max_new_tokens=0)
    with pytest.raises(ValueError, match="`vllm_kwargs` are for `engine='vllm'`, got 'transformers'"):
        LatentReasoner.from_pretrained(policy_folder, vllm_kwargs={"seed": 1})
    with pytest.raises(ValueError, match="`batch_size` has no meaning for `engine='vllm'`"):
        LatentReasoner.from_pretrained(policy_folder, engine="vllm", batch_size=3)


def test_another_main_model_is_refused(policy_folder):
    other = random_main_model(seed=1, initializer_range=0.2)
    given = {"main_processing_class": tokenizer()}
    with pytest.raises(ValueError, match="`main_model` has weights with fingerprint .*, but the policy was built for"):
        LatentReasoner.from_pretrained(policy_folder, other, **given)
    with pytest.warns(UserWarning, match="`main_model` has weights with fingerprint"):
        LatentReasoner.from_pretrained(policy_folder, other, allow_main_model_mismatch=True, **given)
    with pytest.raises(ValueError, match="`main_model` has embeddings of size 32"):
        LatentReasoner.from_pretrained(policy_folder, random_main_model(hidden_size=32), **given)


def test_a_policy_is_used_from_anywhere(main_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(main_folder).parent)
    reasoner = make_reasoner("main", adapter=True)
    assert reasoner.policy.config.main_model_name_or_path == main_folder
    reasoner.save_pretrained(tmp_path / "policy")
    monkeypatch.chdir(tmp_path)
    assert_same(reasoner, LatentReasoner.from_pretrained("policy", max_new_tokens=6))


def test_a_main_model_that_has_moved_is_said_where(main_folder, tmp_path):
    reasoner = make_reasoner(main_folder)
    reasoner.policy.config.main_model_name_or_path = str(tmp_path / "gone")
    reasoner.save_pretrained(tmp_path / "policy")
    message = (
        r"main model cannot be loaded: The folder '.*gone' does not exist .* Say where it is with `main_model` \("
    )
    with pytest.raises(ValueError, match=message):
        LatentReasoner.from_pretrained(str(tmp_path / "policy"))
    found = LatentReasoner.from_pretrained(str(tmp_path / "policy"), main_folder)
    found.save_pretrained(tmp_path / "policy")  # which names where it was found
    assert_same(reasoner, LatentReasoner.from_pretrained(str(tmp_path / "policy"), max_new_tokens=6))
    found.policy.config.main_model_name_or_path = "user/main"  # a name on the Hub is everyone's, and stays
    found.policy.attach_main_model(reasoner.engine.model)
    assert found.policy.config.main_model_name_or_path == "user/main"


@pytest.mark.parametrize("name", ["./nope", "/nope", "../nope/policy", "a/b/c", "outputs/", "~/policy"])
def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    monkeypatch.setattr(hub.HfApi, "file_exists", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    for load in (LatentReasoner, ThinkingReasoner):
        with pytest.raises(ValueError, match=f"The folder '{name}' does not exist"):
            load.from_pretrained(name)


def test_a_misspelt_folder_is_asked_for_once(tmp_path, monkeypatch):
    def away(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    monkeypatch.setattr(hub, "hf_hub_download", lambda *args, **kwargs: pytest.fail("which tries for half a minute"))
    monkeypatch.setattr(hub.HfApi, "file_exists", away)
    with pytest.raises(FileNotFoundError, match="'outputs/polcy' is no folder here"):
        LatentReasoner.from_pretrained("outputs/polcy")


def test_the_main_model_is_loaded_as_it_was_trained_with(policy_folder, main_folder):
    config = LatentPolicyConfig.from_pretrained(policy_folder)
    config.main_model_dtype, config.max_completion_length = "bfloat16", 5
    config.save_pretrained(policy_folder)
    loaded = LatentReasoner.from_pretrained(policy_folder)
    assert loaded.engine.model.dtype == torch.bfloat16 and loaded.engine.max_new_tokens == 5
    assert loaded.engine.model.model.rotary_emb.inv_freq.dtype == torch.float32
    given = LatentReasoner.from_pretrained(
        policy_folder, max_new_tokens=7, main_model_init_kwargs={"dtype": torch.float32}
    )
    assert given.engine.model.dtype == torch.float32 and given.engine.max_new_tokens == 7


def test_what_cannot_be_loaded(policy_folder, main_folder, tmp_path):
    with pytest.raises(
        ValueError, match="`engine` must be 'transformers', 'vllm' or the URL of a vLLM server, got 'tgi'"
    ):
        LatentReasoner.from_pretrained(policy_folder, engine="tgi")
    with pytest.raises(ValueError, match=r"found None\) nor an adapter of one"):
        LatentReasoner.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"found 'llama'\) nor an adapter of one"):
        LatentReasoner.from_pretrained(main_folder)
    with pytest.raises(ValueError, match="`main_processing_class` must be given"):
        LatentReasoner.from_pretrained(policy_folder, random_main_model(initializer_range=0.2))
    path = Path(policy_folder, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "main_model_name_or_path": None}))
    with pytest.raises(
        ValueError, match="`main_model` must be given: the policy .* was trained for one that was built in"
    ):
        LatentReasoner.from_pretrained(policy_folder)


def test_code_that_comes_with_a_model_is_not_executed(policy_folder, main_folder, tmp_path):
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w')\nfrom transformers import LlamaConfig as Custom\n"
    with_code = tmp_path / "main"
    shutil.copytree(main_folder, with_code)
    for folder in (Path(policy_folder), with_code):
        (folder / "custom.py").write_text(code)
        for file in ("config.json", "tokenizer_config.json"):
            content = json.loads((folder / file).read_text())
            names = (
                ("AutoConfig", "AutoModel", "AutoModelForCausalLM") if file == "config.json" else ("AutoTokenizer",)
            )
            content["auto_map"] = dict.fromkeys(names, "custom.Custom")
            (folder / file).write_text(json.dumps(content))
    LatentReasoner.from_pretrained(policy_folder, str(with_code))
    path = with_code / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "custom"}))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        LatentReasoner.from_pretrained(policy_folder, str(with_code))
    assert not marker.exists()


def test_a_policy_that_is_a_pickle_is_not_loaded(policy_folder):
    path = Path(policy_folder, "model.safetensors")
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        LatentReasoner.from_pretrained(policy_folder)


@pytest.mark.parametrize("file", ["model.safetensors", "value_head.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_was_cut_off_is_named(policy_folder, file):
    path = Path(policy_folder, file)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"'{policy_folder}' has a file that is damaged or cut off"):
        LatentReasoner.from_pretrained(policy_folder)


def test_a_main_model_that_was_cut_off_is_named(policy_folder, main_folder, tmp_path):
    shutil.copytree(main_folder, tmp_path / "main")
    path = tmp_path / "main" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="main' has a file that is damaged or cut off"):
        LatentReasoner.from_pretrained(policy_folder, str(tmp_path / "main"))


def test_an_adapter_of_another_trainer_is_told_apart(main_folder, tmp_path):
    main_model = type(random_main_model()).from_pretrained(main_folder)
    get_peft_model(main_model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="is an adapter of '.*main', a model of type 'llama', and not of a latent policy"
    ):
        LatentReasoner.from_pretrained(str(tmp_path))


def test_an_adapter_of_a_model_that_was_built_in_memory(tmp_path):
    get_peft_model(random_main_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="is an adapter that names no base model"):
        LatentReasoner.from_pretrained(str(tmp_path))


def test_an_adapter_whose_weights_are_a_pickle_is_refused(main_folder, tmp_path):
    make_reasoner(main_folder, adapter=True, head=False).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="has no adapter_model.safetensors"):
        load_policy(str(tmp_path))


def test_a_model_that_thinks_is_told_from_a_policy(main_folder, tmp_path):
    main_model = type(random_main_model()).from_pretrained(main_folder)
    ThinkingReasoner(main_model, tokenizer(), ThinkingConfig(num_latents=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="thinks by itself: load it with `ThinkingReasoner`"):
        LatentReasoner.from_pretrained(str(tmp_path))


def test_a_policy_is_loaded_in_float32(policy_folder, main_folder, tmp_path):
    loaded = load_policy(policy_folder)
    loaded.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert load_policy(str(tmp_path / "half")).dtype == torch.float32


def test_an_adapter_answers_after_loading(main_folder, tmp_path):
    reasoner = make_reasoner(main_folder, adapter=True, head=False)
    reasoner.save_pretrained(tmp_path)
    expected = reasoner.generate(PROMPTS).texts
    assert expected != make_reasoner(main_folder).generate(PROMPTS).texts
    assert LatentReasoner.from_pretrained(str(tmp_path), max_new_tokens=6).generate(PROMPTS).texts == expected
    # As a trainer leaves it, which names the policy below by its path
    path = tmp_path / "adapter_config.json"
    named = {**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / BASE_POLICY)}
    path.write_text(json.dumps(named))
    assert LatentReasoner.from_pretrained(str(tmp_path), max_new_tokens=6).generate(PROMPTS).texts == expected


def test_a_policy_without_its_main_model_is_saved_as_with_it(policy_folder, tmp_path):
    reasoner = LatentReasoner.without_main_model(policy_folder)
    reasoner.save_pretrained(tmp_path)
    names = {path.name for path in Path(policy_folder).iterdir()}
    assert names <= {path.name for path in tmp_path.iterdir()} and reasoner.engine is None
    assert (tmp_path / "model.safetensors").read_bytes() == Path(policy_folder, "model.safetensors").read_bytes()


def test_conversations_without_a_chat_template_are_refused(main_folder):
    plain = make_reasoner(main_folder)
    plain.processing_class.chat_template = plain.main_processing_class.chat_template = None
    with pytest.raises(ValueError, match="no chat template.*--is_chat false"):
        plain.generate([[{"role": "user", "content": "A12"}]])
    assert plain.generate(["A12"]).texts

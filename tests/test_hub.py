# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Policies that are pushed by one process and pulled by another, with the real client and a Hub on this machine."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.hub_server import LocalHub
from tests.hub_worker import DEMO_QUESTIONS, FAULTS
from trl_dlr.models import LatentPolicyConfig
from trl_dlr.models.hub import card_data, describe_push_failure, find_file, hub_name, leave_out_folders, usage
from trl_dlr.models.loading import BASE_POLICY
from trl_dlr.scripts.utils import SMOLLM2, find_smollm2


ROOT = Path(__file__).parents[1]


def run(hub: LocalHub, action: str, folder: Path, token: str | None = "hf_write") -> dict:
    """Run hub_worker.py in a process of its own, and return what it has seen."""
    command = [sys.executable, "-m", "tests.hub_worker", action, str(folder)]
    environment = hub.environment(folder / f"home_{action}", token)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / f"{action}.json").read_text())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LocalHub(tmp_path_factory.mktemp("storage")) as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    return run(hub, "push", tmp_path_factory.mktemp("push"))


@pytest.fixture(scope="module")
def pulled(hub, pushed, tmp_path_factory):
    return run(hub, "pull", tmp_path_factory.mktemp("pull"), token="hf_read")


# ---- There and back ----


@pytest.mark.parametrize("name", ["policy", "adapter", "reasoner", "thinking"])
def test_a_fresh_process_gets_the_same_answers(pushed, pulled, name):
    before, after = pushed[name], pulled[name]
    assert after["texts"] == before["texts"]
    assert after["candidates"] == before["candidates"]
    assert after["latents"] == pytest.approx(before["latents"], abs=1e-6)
    assert after["scores"] == pytest.approx(before["scores"], abs=1e-5)


def test_what_is_pushed_is_different(pushed):
    assert pushed["policy"]["latents"] != pytest.approx(pushed["adapter"]["latents"], abs=1e-4)


def test_a_policy_is_pushed_with_all_it_needs_and_nothing_to_unpickle(hub, pushed):
    assert set(hub.files("user/policy")) == {
        *(".gitattributes", "README.md", "config.json", "model.safetensors", "value_head.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "eval_results.json", "all_results.json", "report/rewards.png"),
    }
    adapter = {
        "README.md",
        "config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "value_head.safetensors",
    }
    adapter |= {".gitattributes", "tokenizer.json", "tokenizer_config.json"}
    adapter |= {f"{BASE_POLICY}/config.json", f"{BASE_POLICY}/model.safetensors"}
    assert set(hub.files("user/bare")) == adapter
    # A run's base policy can be trained on by itself, with its own tokenizer
    adapter |= {f"{BASE_POLICY}/tokenizer.json", f"{BASE_POLICY}/tokenizer_config.json"}
    assert set(hub.files("user/adapter", "first")) == adapter


def test_a_model_that_thinks_is_pushed_with_how_it_thinks_and_nothing_to_unpickle(hub, pushed):
    assert set(hub.files("user/thinking")) == {
        *(".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("thinking_config.json", "tokenizer.json", "tokenizer_config.json"),
    }


def test_nothing_that_is_pushed_names_a_folder_of_this_machine(hub, pushed, tmp_path_factory):
    base = str(tmp_path_factory.getbasetemp()).encode()
    pushes = [("user/policy", "main"), ("user/adapter", "first"), ("user/bare", "main"), ("user/thinking", "main")]
    for repo_id, revision in pushes:
        files = hub.files(repo_id, revision)
        assert [name for name, content in files.items() if base in content] == []


def test_an_assistant_names_no_folder_of_this_machine(tmp_path):
    for name, left in (("/home/me/hub/models--a--b/snapshots/1", None), ("a/b", "a/b")):
        config = LatentPolicyConfig()
        config.assistant_config._name_or_path = name
        config.save_pretrained(tmp_path)
        leave_out_folders(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["assistant_config"]["_name_or_path"] == left
        assert LatentPolicyConfig.from_pretrained(tmp_path).assistant_config.name_or_path == left


def test_private_repositories_and_revisions(hub, pushed, pulled):
    assert hub.repos["user/adapter"].private and hub.repos["user/copy"].private
    assert not hub.repos["user/policy"].private
    assert set(hub.files("user/adapter")) == set(hub.files("user/copy")) == {".gitattributes"}  # all is in the branch
    assert "Invalid username or password" in pulled["private"]
    assert "user/adapter" in pulled["private"]
    assert "v9" in pulled["no_such_revision"]
    assert "user/nothing" in pulled["missing"]
    assert pulled["no_policy"].startswith(
        "ValueError: 'user/main' holds neither a policy (a `config.json` of type 'latent_policy', found 'llama') nor "
        "an adapter of one (`adapter_config.json`). Nor does it think by itself"
    )


def test_a_download_goes_on_after_a_cut_and_the_cache_serves_without_a_connection(pushed, pulled):
    assert pulled["after_cut"] == pulled["offline"] == pulled["policy"]
    assert pulled["offline_adapter"] == pulled["adapter"]


def test_a_reasoner_keeps_the_card_that_it_was_loaded_with(hub, pushed, pulled):
    own = ModelCard(hub.files("user/policy")["README.md"].decode())
    copied = ModelCard(hub.files("user/copy", "v1")["README.md"].decode())
    renamed = own.text.replace("user/policy", "user/copy").replace("\n# policy\n", "\n# copy\n")
    assert copied.text == renamed and "\n# policy\n" in own.text and "## Results" in own.text
    assert (own.data.model_name, copied.data.model_name) == ("policy", "copy")
    assert 'LatentReasoner.from_pretrained("user/copy")' in copied.text and "(report/rewards.png)" in copied.text
    assert {"report/rewards.png", "eval_results.json"} < set(hub.files("user/copy", "v1"))
    assert copied.data.tags == [*own.data.tags, "mine"]
    assert ModelCard(pulled["card"]).content == copied.content


# ---- During a run ----


def test_an_upload_that_fails_during_training_is_logged_and_training_goes_on(hub, pushed):
    (message,) = pushed["during"]
    assert "'user/steps' could not be pushed: the Hub answered 500 (Internal Error)." in message
    assert "Its files are complete in " in message
    files = hub.files("user/steps", "dev")
    assert "last-checkpoint/optimizer.pt" in files  # what resuming needs is pushed with this `hub_strategy` only
    for name in ("model.safetensors", "value_head.safetensors", "README.md"):
        assert files[name] == files[f"last-checkpoint/{name}"]
    state = json.loads(files["last-checkpoint/trainer_state.json"])
    assert state["global_step"] == 3
    assert not [name for name in files if "/" not in name and name.endswith((".bin", ".pt", ".pth"))]


# ---- Failures ----


# As the client meets a cut while it reads, or while it still writes: then it looks for an answer, and there is none
CUT = re.compile(r"\[Errno 104\] Connection reset by peer|Server disconnected without sending a response")
REASONS = {
    "token": "the Hub answered 401 (Invalid username or password). The token is missing or not valid: log in with",
    "rights": "the Hub answered 403 (You need write access to this repository). The token may not write there",
    "quota": "the Hub answered 403 (Private repository storage limit reached, please upgrade your plan). The account's",
    "payment": "the Hub answered 402 (Payment required). The account's storage is used up",
    "too_large": "the Hub answered 413 (Request Entity Too Large). The account's storage is used up, or a file is too",
    "conflict": "the Hub answered 409 (Conflicting update). Somebody else changes the repository at the same time",
    "moved_on": "the Hub answered 412 (A commit has happened since. Please refresh and try again). Somebody else",
    "rate": "the Hub answered 429 (Too many requests). Wait some minutes and push again.",
    "gone": "the Hub answered 404 (Repository not found). The repository or revision does not exist",
    "commit_500": "the Hub answered 500 (Internal Error). The Hub has a problem of its own: push again later.",
    "upload_503": "the Hub answered 503 (Service Unavailable). The Hub has a problem of its own: push again later.",
    "upload_cut": "the connection failed (CUT). Check the network and push again",
    "commit_cut": "the connection failed (CUT). Check the network and push again",
    "card": "the Hub answered 400 (Invalid metadata). Correct that and push again.",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_push_that_fails_says_why_and_leaves_the_files(pushed, name):
    message = CUT.sub("CUT", pushed["faults"][name])
    assert message.startswith(f"RuntimeError: 'user/policy' could not be pushed: {REASONS[name]}")
    assert "Its files are complete in " in message and "\n" not in message
    assert pushed["whole"][name]


def test_failures_at_the_start_and_of_a_reasoner(pushed):
    faults = pushed["faults"]
    assert faults["reasoner"].startswith(
        "RuntimeError: 'user/copy' could not be pushed: the Hub answered 403 (You need"
    )
    assert "You don't have the rights to create a model under the namespace" in faults["namespace"]
    assert faults["no_rights_at_start"].startswith(
        "RuntimeError: 'user/start' could not be pushed: the Hub answered 403"
    )
    assert faults["bad_token_at_start"].startswith(
        "RuntimeError: 'user/start' could not be pushed: the Hub answered 401"
    )


def test_a_failure_of_another_kind_is_passed_on():
    error = RuntimeError("outer")
    error.__cause__ = ValueError("inner")
    assert describe_push_failure(error, "user/policy", "All is here.") == (
        "'user/policy' could not be pushed: outer. Correct that and push again. All is here."
    )
    error = ValueError("LFS batch API returned errors:\nEncountered error for file: Storage quota exceeded")
    assert describe_push_failure(error, "user/policy") == (
        "'user/policy' could not be pushed: LFS batch API returned errors: Encountered error for file: Storage quota "
        "exceeded. The account's storage is used up, or a file is too large: free some, or push to another account."
    )


# ---- The card ----


def test_the_card_of_a_trained_policy(hub, pushed):
    card = ModelCard(hub.files("user/policy")["README.md"].decode())
    data = card.data.to_dict()
    assert data["base_model"] == ["user/main"] and data["base_model_relation"] == "finetune"
    assert (data["library_name"], data["pipeline_tag"], data["datasets"]) == (
        "trl_dlr",
        "text-generation",
        "user/letters",
    )
    assert {"trl", "trl_dlr", "latent-reasoning", "deeplatent-reasoning"} <= set(data["tags"])
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics == {"accuracy": 0.75, "pass_at_k": 0.875}
    for part in (
        "| policy | 0.750 | 0.875 |",
        "| no latents | 0.250 |  |",
        "![rewards](report/rewards.png)",
        "| `prescreening_fraction` | `0.5` |",
        "- transformers: ",
        "papers/2601.17275",
        "@article{shan2026latent",
    ):
        assert part in card.text
    assert "learning_rate_scheduler" not in card.text and "output_dir" not in card.text and "hf_" not in card.text


def test_the_card_of_an_adapter_and_of_a_policy_without_one(hub, pushed):
    adapter = ModelCard(hub.files("user/adapter", "first")["README.md"].decode())
    assert adapter.data.base_model_relation == "adapter" and "- peft: " in adapter.text
    bare = ModelCard(hub.files("user/bare")["README.md"].decode())
    assert bare.data.base_model_relation == "adapter" and bare.data.base_model == ["user/main"]
    assert 'LatentReasoner.from_pretrained("user/bare")' in bare.text


def test_local_models_are_no_base_models(tmp_path):
    (tmp_path / "main").mkdir()
    config = LatentPolicyConfig(main_model_name_or_path=str(tmp_path / "main"))
    config.assistant_config.name_or_path = "org/assistant"
    assert card_data(config, False, []).base_model == ["org/assistant"]
    lines = usage("user/policy", config)
    assert str(tmp_path) not in lines and 'from_pretrained("user/policy", main_model)' in lines
    for name in (None, "", "/data/model", "./model", "a/b/c", str(tmp_path)):
        assert hub_name(name) is None
    assert hub_name("gpt2") == "gpt2" and hub_name("org/model-1.5") == "org/model-1.5"


def test_the_prompt_of_the_snippet_is_a_literal():
    config = LatentPolicyConfig(main_model_name_or_path="org/main")
    chat = [{"role": "user", "content": 'Say "hi"\nnow'}]
    line = usage("user/policy", config, chat).splitlines()[-2]
    assert eval(line.removeprefix("print(reasoner.generate(").removesuffix(").texts)")) == [chat]


def test_files_of_a_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert find_file(str(tmp_path), "config.json") == str(tmp_path / "config.json")
    assert find_file(str(tmp_path), "value_head.safetensors") is None


# ---- The demo ----


@pytest.mark.slow
def test_three_lines_load_the_demo_and_answer_as_the_training_process_did(hub, tmp_path):
    hub.add_folder(SMOLLM2, find_smollm2())
    trained = run(hub, "demo", tmp_path)

    lines = [
        "from trl_dlr import LatentReasoner",
        'reasoner = LatentReasoner.from_pretrained("user/demo", max_new_tokens=12)',
        f"print(reasoner.generate({json.dumps(DEMO_QUESTIONS)}).texts)",
    ]
    environment = hub.environment(tmp_path / "home", token=None)
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-5000:]
    print(done.stdout)
    assert ast.literal_eval(done.stdout.splitlines()[-1]) == trained["texts"]

    card = ModelCard(hub.files("user/demo")["README.md"].decode())
    assert card.data.base_model == [SMOLLM2]
    assert "| policy | " in card.text and {result.metric_type for result in card.data.eval_results} >= {"accuracy"}
    snippet = [lines[0], "", 'reasoner = LatentReasoner.from_pretrained("user/demo")', "print(reasoner.generate([[{"]
    assert "\n".join(snippet) in card.text

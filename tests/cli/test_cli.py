# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from tests.launch import Job, run_python
from tests.tiny import tiny_dataset, tiny_tokenizer, trained_main_model
from trl_dlr import LatentPolicyModel, ThinkingConfig, ThinkingReasoner, fresh_layers
from trl_dlr.cli.main import COMMANDS, main
from trl_dlr.cli.parser import CommandParser
from trl_dlr.cli.serve import ServeArguments
from trl_dlr.cli.serve import main as serve
from trl_dlr.scripts.latent_grpo import ARGUMENTS as train_arguments
from trl_dlr.scripts.utils import find_reward, load_reward


RUN = {
    "main_model_name_or_path": "main",
    "dataset_name": "train.jsonl",
    "prompt_template": "{question}",
    "max_steps": 2,
    "per_device_train_batch_size": 32,
    "max_completion_length": 4,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def test_policies_to_serve_may_be_named_one_by_one(tmp_path):
    parser = CommandParser((ServeArguments,), prog="trl-dlr serve")
    (tmp_path / "serve.yaml").write_text("policy: [other/c]\nmax_rows: 4\n")
    config = ["--config", str(tmp_path / "serve.yaml")]
    (args,) = parser.parse_args_and_config(["--policy", "user/a", "--policy", "b=user/b", "--main_model", "main"])
    assert list(args.policies.items()) == [("user/a", "user/a"), ("b", "user/b")]
    assert args.main_model_name_or_path == "main"
    for given, expected in (([], ["other/c"]), (["--policy", "user/a", "user/b"], ["user/a", "user/b"])):
        parser = CommandParser((ServeArguments,), prog="trl-dlr serve")
        (args,) = parser.parse_args_and_config([*config, *given])
        assert args.policy == expected and args.max_rows == 4


def test_what_cannot_be_served_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setenv("TRL_DLR_API_KEY", "a-key\n")  # as a file of secrets has it
    assert ServeArguments(["user/a"]).api_key == "a-key"
    with pytest.raises(ValueError, match="`timeout` must be a positive number, got inf"):
        ServeArguments(["user/a"], timeout=float("inf"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"`port={port}` cannot be listened at"):
            serve(ServeArguments(["user/a"], port=port))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A main model, a policy for it, questions, and the configuration of a run."""
    folder = tmp_path_factory.mktemp("cli")
    trained_main_model().save_pretrained(folder / "main")
    tiny_tokenizer().save_pretrained(folder / "main")
    main_model = trained_main_model()
    policy = LatentPolicyModel.from_assistant(
        fresh_layers(main_model, 1), main_model, tiny_tokenizer(), anchor_text="=="
    )
    policy.config.main_model_name_or_path = "main"
    policy.save_pretrained(folder / "policy")
    tiny_tokenizer().save_pretrained(folder / "policy")
    ThinkingReasoner(main_model, tiny_tokenizer(), ThinkingConfig(num_latents=2)).save_pretrained(folder / "thinking")
    rows = tiny_dataset(24, seed=0).rename_column("prompt", "question")
    rows.to_json(folder / "train.jsonl")
    lines = [f"{name}: {json.dumps(value)}" for name, value in RUN.items()]
    (folder / "run.yaml").write_text(
        "\n".join([*lines, "model_name_or_path: fresh_layers", "assistant_num_layers: 1"])
    )
    return folder


@pytest.fixture
def cli(workplace, monkeypatch, capfd):
    monkeypatch.chdir(workplace)
    monkeypatch.delenv("TRL_DLR_DEBUG", raising=False)

    def run(*argv):
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as end:  # argparse: help, or arguments that do not parse
            code = end.code
        captured = capfd.readouterr()  # of processes that were started, too
        return code, captured.out, captured.err

    yield run
    os.environ.pop("TRL_DLR_DEBUG", None)


def launched(workplace, *argv):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trl_dlr.cli.main", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=workplace, env=environment)


def test_help_names_every_command(cli):
    code, out, _ = cli("--help")
    assert code == 0
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"^    {name}\s+{summary.split()[0]} ", out, flags=re.MULTILINE)
    assert cli()[1] == out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_teaches(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0 and out.startswith(f"usage: trl-dlr {command} [--config FILE] [--OPTION VALUE ...]\n")
    assert command == "env" or f"\n    trl-dlr {command} --" in out  # an example, as it is to be typed
    # Its own options, and no more: what the parser has beyond them is TRL's
    module = importlib.import_module(f"trl_dlr.{COMMANDS[command][0]}")
    parser = CommandParser(module.ARGUMENTS, prog=command)
    listed = re.findall(r"^  --(\w+) \(", out, flags=re.MULTILINE)
    assert command == "env" or 2 <= len(listed) < 90
    assert set(listed) <= {action.dest for action in parser._actions} and len(set(listed)) == len(listed)
    own = {name for arguments in module.ARGUMENTS for name in own_fields(arguments)}
    assert set(listed) >= own and "`" not in out
    for config in [arguments for arguments in module.ARGUMENTS if issubclass(arguments, TrainingArguments)]:
        refused = getattr(sys.modules[config.__module__], "REFUSED_OPTIONS", {})
        assert not set(refused) & set(listed)
        assert re.search(r"Every option of \w+Config and ModelConfig \(TRL\)", out)


def own_fields(cls):
    """Fields that classes of this package add."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("trl_dlr.")]
    return {
        name
        for base in own
        for name in getattr(base, "__annotations__", ())
        if name in {field.name for field in fields(cls)}
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--num_latents", 2], "trl-dlr train: error: `dataset_name` must be set"),
        (["train", "--dataset_name", "a"], "trl-dlr train: error: `main_model_name_or_path` must be set"),
        (["train", "--config", "run.yaml", "--num_latents", 0], "error: `num_latents` must be at least 1, got 0."),
        (["sft", "--config", "run.yaml", "--num_stages", -1], "error: `num_stages` must be at least 0, got -1."),
        (["generate"], "trl-dlr generate: error: `policy` must be set"),
        (["generate", "--policy", "policy"], "error: `prompts` must hold at least one question"),
        (
            ["generate", "--policy", "main", "--prompts", "A12"],
            "a Coconut model does from its first stage with latents on",
        ),
        (["generate", "--policy", "nowhere", "--prompts", "A12"], "error: 'nowhere' is no folder here, it is not in"),
        (["generate", "--policy", "./nope", "--prompts", "A12"], "error: The folder './nope' does not exist"),
        (
            ["train", "--config", "run.yaml", "--main_model_name_or_path", "../nope"],
            "The folder '../nope' does not exist",
        ),
        (
            ["train", "--config", "run.yaml", "--reward_funcs", "corectness_reward"],
            "but there is no 'corectness_reward'. Did you mean 'correctness_reward'?",
        ),
        (["train", "--config", "run.yaml", "--reward_funcs", "no_module.f"], "there is no 'module no_module'."),
        (["chat"], "trl-dlr chat: error: `policy` must be set"),
        (["push", "--policy", "policy"], "trl-dlr push: error: `repo_id` must be set"),
        (["eval", "--policy", "policy"], "trl-dlr eval: error: `dataset_name` must be set"),
        (
            ["eval", "--policy", "policy", "--dataset_name", "train.jsonl", "--k", 9],
            "error: `k` must be between 1 and",
        ),
        (
            ["eval", "--policy", "policy", "--dataset_name", "train.jsonl", "--controls", "own"],
            "error: `controls` must be some",
        ),
        (["report", "--output_dir", "policy"], "trl-dlr report: error: `output_dir='policy'` has no report/run.json"),
        (["plan", "--config", "run.yaml", "--num_generations", 7], "trl-dlr plan: error: "),
        (
            ["plan", "--config", "run.yaml", "--gpu_memory", -3],
            "`gpu_memory` must be sizes in GB above 0, got [-3.0].",
        ),
        (
            ["train", "--config", "run.yaml", "--main_model_init_kwargs", '{"dtype": "bf16"}'],
            "`main_model_init_kwargs['dtype']` must be 'auto' or a dtype of torch such as 'bfloat16' or 'float32'",
        ),
        *(
            ([*command, *argument], message)
            for command in (
                ["generate", "--policy", "policy", "--prompts", "A12"],
                ["eval", "--policy", "policy", "--dataset_name", "train.jsonl"],
            )
            for argument, message in (
                (["--main_model_dtype", "bf16"], "error: `main_model_dtype` must be 'auto' or a dtype of torch"),
                (["--output_json", "no/such.json"], "`output_json=no/such.json` must be a file that can be written"),
                (["--output_json", "policy"], "`output_json=policy` must be a file that can be written"),
            )
        ),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(cli, argv, message, monkeypatch):
    # No launched process is waited for, which would say it after half a minute
    monkeypatch.setattr("trl_dlr.cli.launch.launch_command", lambda arguments: pytest.fail("launched"))
    code, _, err = cli(*argv)
    assert code == 1
    assert message in err.splitlines()[-1] and "Traceback" not in err


def test_arguments_that_do_not_parse_exit_with_2(cli):
    assert cli("no_such_command")[0] == 2
    assert cli("train", "--config", "run.yaml", "--max_steps", "many")[0] == 2
    for command in ("train", "generate", "plan"):  # nor an argument of accelerate's
        code, _, err = cli(command, "--no_such_argument", "1")
        assert code == 2 and len(err.splitlines()) < 6
        hint = ". Runs of `trl-dlr train` are planned, without arguments of accelerate but --num_processes."
        hint = hint if command == "plan" else ""
        assert err.splitlines()[-1] == f"trl-dlr {command}: error: unrecognized arguments: --no_such_argument{hint}"


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["generate", "--polcy", "policy", "--prompts", "A12"], "--polcy. Did you mean '--policy'?"),
        (["train", "--learning-ratee", "1"], "--learning-ratee. Did you mean '--learning-rate'?"),
        (["train", "--num_proceses=2"], "--num_proceses. Did you mean '--num_processes'?"),  # of accelerate
        (["eval", "--config", "bad_key.yaml"], "--num_eval_sample. Did you mean '--num_eval_samples'?"),
        (["generate", "A12"], "unrecognized arguments: A12"),
        (["train", "--density", "gaussian"], "--density. Did you mean '--latent_density'?"),
    ],
)
def test_a_misspelt_argument_is_told_how_it_is_spelt(cli, workplace, argv, hint):
    (workplace / "bad_key.yaml").write_text("num_eval_sample: 3\nenv: {}\n")
    code, _, err = cli(*argv)
    assert code == 2 and err.splitlines()[-1].endswith(hint)


@pytest.mark.parametrize(
    ("command", "line", "message"),
    [
        ("eval", "num_eval_samples: true", r"argument --num_eval_samples\b.*: invalid int value: 'True'"),
        ("eval", "seeds: [0, 1.5]", r"argument --seeds\b.*: invalid int value: '1.5'"),
        ("train", "num_eval_questions: 2.5", r"argument --num_eval_questions\b.*: invalid int value: '2.5'"),
        ("train", "reward_weights: [true, 1]", r"argument --reward_weights\b.*: invalid float value: 'True'"),
        ("train", "report: 3", r"argument --report\b"),
        ("train", "main_model_init_kwargs: 'dtype: x'", "`main_model_init_kwargs` must be a dictionary"),
        ("train", "answer_pattern: '['", "`answer_pattern` must be a regular expression, got"),
        ("train", "learning_rate: -1", "`learning_rate` must be a number of at least 0, got -1.0"),
    ],
)
def test_values_of_a_file_are_read_as_those_of_the_command_line(cli, workplace, command, line, message):
    lines = ["dataset_name: train.jsonl", "main_model_name_or_path: main", line]
    lines += ["policy: policy"] if command == "eval" else ["bf16: false", "output_dir: typed"]
    (workplace / "typed.yaml").write_text("\n".join(lines))
    code, _, err = cli(command, "--config", "typed.yaml")
    assert code in (1, 2) and re.search(message, err.splitlines()[-1]) and "Traceback" not in err, err


def test_one_value_of_a_list_is_a_list(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    (workplace / "one.yaml").write_text(
        "dataset_name: train.jsonl\nmain_model_name_or_path: main\nreward_funcs: correctness_reward\n"
        "reward_weights: '1.0'\nlearning_rate: 1e-4\nbf16: false\noutput_dir: x\nuse_cpu: true\nmodel_init_kwargs: {a: 1}\n"
    )
    script, training, _ = CommandParser(train_arguments, prog="").parse_args_and_config(["--config", "one.yaml"])
    assert script.reward_funcs == ["correctness_reward"] and training.reward_weights == [1.0]
    assert training.learning_rate == 1e-4 and training.model_init_kwargs == {"a": 1}


@pytest.mark.parametrize("name", ["thinking", "main"])
def test_what_is_no_policy_is_not_trained_on_as_one(cli, name):
    code, _, err = cli("train", "--config", "run.yaml", "--policy", name, "--output_dir", "wrong")
    assert code == 1 and f"{name!r} holds neither a policy" in err and not os.path.exists("wrong")


def test_a_policy_without_a_tokenizer_is_told(cli, workplace):
    (workplace / "bare").mkdir()
    for file in ("config.json", "model.safetensors"):
        (workplace / "bare" / file).write_bytes((workplace / "policy" / file).read_bytes())
    code, _, err = cli("generate", "--policy", "bare", "--prompts", "A12")
    assert code == 1 and "'bare' has a policy, and no tokenizer of its assistant" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("num_samples: [1", "bad.yaml is no YAML: while parsing a flow sequence"),
        ("- 1", "bad.yaml must hold lines like 'learning_rate: 1e-4', but is [1]"),
        ("", "bad.yaml must hold lines like 'learning_rate: 1e-4', but is None"),
    ],
)
def test_a_file_that_is_no_configuration_exits_with_2(cli, workplace, content, message):
    (workplace / "bad.yaml").write_text(content)
    for command in ("generate", "train"):
        code, _, err = cli(command, "--config", "bad.yaml")
        assert code == 2 and message in err.splitlines()[-1]
        code, _, err = cli(command, "--config", "missing.yaml")
        assert code == 2 and "the file 'missing.yaml' cannot be read: No such file" in err.splitlines()[-1]
    assert cli("generate", "--config")[0] == 2


def test_a_configuration_is_named_with_an_equals_sign_too(cli, monkeypatch):
    launched = []
    monkeypatch.setattr("trl_dlr.cli.launch.launch_command", launched.append)
    assert cli("train", "--config=run.yaml", "--num_processes", 1)[0] == 0
    assert launched[0].training_script_args == ["--config=run.yaml"]
    code, out, err = cli("plan", "--config=run.yaml")
    assert code == 0 and "total peak" in out, err


def test_reward_functions_by_import_path(cli, workplace):
    (workplace / "my_rewards.py").write_text("raise_at_import = 1 / 0\n")
    assert find_reward("my_rewards.brevity") == ("my_rewards", "brevity")  # looked for, not executed
    with pytest.raises(ValueError, match=r"'my_rewards' cannot be imported: ZeroDivisionError\('division by zero'\)"):
        load_reward("my_rewards.brevity")
    (workplace / "other_rewards.py").write_text("def brevity(completions, **kwargs):\n    return []\n\nlength = 3\n")
    assert load_reward("other_rewards.brevity")([]) == []
    with pytest.raises(ValueError, match="'other_rewards' has no function 'brevty'. Did you mean 'brevity'?"):
        load_reward("other_rewards.brevty")
    with pytest.raises(ValueError, match="'other_rewards' has no function 'length'"):
        load_reward("other_rewards.length")


def test_debug_adds_the_traceback(cli):
    code, _, err = cli("--debug", "generate")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("trl-dlr generate: error: ")


def test_generate_answers_and_writes_all_it_knows(cli, workplace):
    arguments = [
        "generate",
        "--policy",
        "policy",
        "--is_chat",
        "false",
        "--max_new_tokens",
        4,
        "--prompts",
        "A12",
        "B34",
    ]
    code, out, _ = cli(*arguments, "--num_samples", 3, "--selection", "majority", "--output_json", "answers.json")
    rows = json.loads((workplace / "answers.json").read_text())
    assert code == 0 and [row["prompt"] for row in rows] == ["A12", "B34"]
    assert all(len(row["candidates"]) == 3 and row["text"] in row["candidates"] for row in rows)
    assert out == "".join(f"> {row['prompt']}\n{row['text']}\n\n" for row in rows)


def test_chat_answers_until_an_empty_line(cli, monkeypatch):
    lines = iter(["A12", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, out, _ = cli("chat", "--policy", "policy", "--is_chat", "false", "--max_new_tokens", 4)
    answer = cli("generate", "--policy", "policy", "--is_chat", "false", "--max_new_tokens", 4, "--prompts", "A12")[1]
    assert code == 0 and out.splitlines()[-1] == answer.splitlines()[1]


def test_eval_prints_the_policy_beside_its_controls(cli, workplace):
    questions = ["--dataset_name", "train.jsonl", "--prompt_template", "{question}", "--num_eval_questions", 6]
    arguments = ["eval", "--policy", "policy", *questions, "--max_new_tokens", 4, "--seeds", 0, 1]
    code, out, _ = cli(*arguments, "--controls", "policy", "shuffled", "no_latents", "--output_json", "eval.json")
    found = json.loads((workplace / "eval.json").read_text())
    assert code == 0 and found["settings"]["num_eval_questions"] == 6
    assert list(found["results"]) == ["policy", "shuffled", "no_latents"]
    assert len(found["results"]["policy"]["pass@1"]["runs"]) == 2
    for name, figures in found["results"].items():
        assert f"\n{name:<14}" in out and f"{figures['pass@1']['mean']:.3f} [" in out


def test_a_model_that_thinks_by_itself_is_evaluated_and_answers(cli, workplace):
    model = ["--policy", "thinking", "--max_new_tokens", 4]
    questions = ["--dataset_name", "train.jsonl", "--prompt_template", "{question}", "--num_eval_questions", 4]
    code, out, _ = cli("eval", *model, *questions, "--seeds", 0, "--output_json", "thinking.json")
    assert code == 0
    found = json.loads((workplace / "thinking.json").read_text())["results"]
    assert list(found) == ["policy", "mean_latents", "no_latents", "zero_latents", "shuffled"]
    code, out, _ = cli("generate", *model, "--is_chat", "false", "--prompts", "A12")
    expected = ThinkingReasoner.from_pretrained(str(workplace / "thinking"), max_new_tokens=4).generate(["A12"])
    assert code == 0 and expected.texts[0].strip() in out
    code, _, err = cli("eval", *model, *questions, "--controls", "policy", "fresh_head")
    assert code == 1 and "for this policy, got fresh_head" in err
    code, _, err = cli("generate", *model, "--prompts", "A12", "--engine", "vllm")
    assert code == 1 and "`engine` has no meaning for 'thinking': it thinks by itself" in err


def test_plan_prints_parts_and_verdicts(cli):
    code, out, _ = cli("plan", "--config", "run.yaml", "--gpu_memory", 1, "--prompt_length", 32)
    assert code == 0 and "total peak" in out and "fits 1 GB" in out
    code, out, _ = cli("plan", "--config", "run.yaml", "--gpu_memory", 1e-6, 1)
    assert code == 0 and "does not fit 1e-06 GB" in out
    code, out, _ = cli("plan", "--config", "run.yaml", "--gpu_memory", 1e-6)
    assert code == 1 and "does not fit 1e-06 GB" in out


def test_env_names_versions(cli):
    code, out, _ = cli("env")
    assert code == 0 and "transformers" in out and "torch" in out


def test_train_and_sft_run_under_accelerate(cli, workplace):
    code, out, err = cli("sft", "--config", "run.yaml", "--output_dir", "sft", "--learning_rate", "1e-3")
    assert code == 0 and "Saved to sft." in out, err[-3000:]
    # Right and wrong answers to one question are a matter of luck in two steps; this reward has both in every group
    lines = ["def alternating(completions, **kwargs):", "    return [float(i % 2) for i in range(len(completions))]"]
    (workplace / "mixed_rewards.py").write_text("\n".join(lines))
    arguments = ["--config", "run.yaml", "--policy", "sft", "--output_dir", "rl", "--num_processes", "1"]
    rewards = ["--reward_funcs", "correctness_reward", "mixed_rewards.alternating"]
    code, out, err = cli("train", *arguments, *rewards, "--report", "true")
    assert code == 0 and "Saved to rl." in out, err[-3000:]
    first, second = (LatentPolicyModel.from_pretrained(workplace / name).state_dict() for name in ("sft", "rl"))
    assert first.keys() == second.keys() and any((first[name] != second[name]).any() for name in first)
    assert (workplace / "rl" / "report" / "report.html").is_file()
    code, out, _ = cli("report", "--output_dir", "rl")
    assert code == 0 and out.strip().endswith("report.html")


def test_arguments_of_accelerate_come_before_a_script(workplace):
    result = run_python(
        "-m", "trl_dlr.scripts.latent_grpo", "--config", "run.yaml", "--num_processes", "2", cwd=workplace
    )
    assert result.returncode == 2
    hint = "unrecognized arguments: --num_processes. Arguments of accelerate go before the script, or to `trl-dlr`."
    assert result.stderr.splitlines()[-1].endswith(hint)


def test_an_error_in_a_launched_process_is_one_line_too(workplace):
    (workplace / "bad_rewards.py").write_text("")
    arguments = ["--config", "run.yaml", "--output_dir", "bad", "--reward_funcs", "bad_rewards.reward"]
    result = launched(workplace, "train", *arguments)
    assert result.returncode == 1
    # Nothing before it but progress: no warning of a library, and nothing of what the launcher takes by itself
    *before, last = result.stderr.splitlines()
    assert last == "trl-dlr train: error: `reward_funcs`: 'bad_rewards' has no function 'reward'."
    assert all(not line or re.match(r"\r?(Map|Generating \w+ split): ", line) for line in before), before


@pytest.mark.parametrize(
    ("number", "num_processes", "status"), [(signal.SIGTERM, 1, 55), (signal.SIGINT, 1, 42), (signal.SIGTERM, 2, 143)]
)
def test_a_signal_to_the_launcher_reaches_the_run_and_its_status_is_returned(tmp_path, number, num_processes, status):
    script = """
import os, pathlib, signal, sys, time
def end(number, frame):
    pathlib.Path(f"ended_{os.environ.get('RANK')}").touch()
    sys.exit(40 + number)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, end)
pathlib.Path(f"started_{os.environ.get('RANK')}").touch()
time.sleep(60)
"""
    (tmp_path / "script.py").write_text(script)
    launcher = f"""
import sys
from trl_dlr.cli.env import ARGUMENTS
from trl_dlr.cli.launch import launch
from trl_dlr.cli.parser import CommandParser
sys.exit(launch("script", CommandParser(ARGUMENTS, prog=""), ["--num_processes", "{num_processes}"]))
"""
    (tmp_path / "launcher.py").write_text(launcher)
    job = Job([tmp_path / "launcher.py"], tmp_path / "output", cwd=tmp_path)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("started_*"))) < num_processes:
        assert time.monotonic() < deadline and job.processes[0].is_alive(), job.read("stderr")
        time.sleep(0.05)
    os.kill(job.processes[0].pid, number)
    assert job.wait().returncode == status, job.read("stderr")
    assert len(list(tmp_path.glob("ended_*"))) == num_processes


def test_help_is_quiet_and_imports_no_trainer(workplace):
    program = "import sys; from trl_dlr.cli.main import main; main(['train', '--help']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=workplace)
    assert result.returncode == 0 and result.stderr == "" and result.stdout.endswith("\nFalse\n")


def test_num_processes_are_as_many_on_cpus(cli, workplace):
    # Nothing but their number says that there are several, not even `use_cpu`
    arguments = ["--config", "run.yaml", "--output_dir", "two", "--num_processes", 2, "--logging_steps", 1]
    environment = dict(os.environ)
    code, _, err = cli("train", *arguments, "--per_device_train_batch_size", 16, "--use_cpu", "false")
    assert code == 0 and "2 processes" in err, err[-3000:]
    assert environment == dict(os.environ)

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""Local files as tasks of lm-evaluation-harness, with the rewards of training."""

import json

from datasets import Dataset

from trl_dlr.rewards import correctness_reward, get_reasoning_gym_reward
from trl_dlr.scripts.questions import read_json


def load_questions(data_file: str | None = None, **kwargs) -> dict[str, Dataset]:
    if data_file is None:
        raise ValueError("`data_file` must be given: --metadata data_file=<JSON or JSONL file>.")
    rows = read_json(data_file)
    columns = {
        "question": [row["question"] if "question" in row else row["problem"] for row in rows],
        "answer": [row["answer"] if "answer" in row else row["solution"] for row in rows],
        "entry": [json.dumps(row) for row in rows],
    }
    return {"test": Dataset.from_dict(columns)}


def correctness(doc: dict, results: list[str]) -> dict[str, float]:
    return {"accuracy": float(correctness_reward(results, answer=[doc["answer"]])[0] > 0)}


def judgement_of_reasoning_gym(doc: dict, results: list[str]) -> dict[str, float]:
    reward = get_reasoning_gym_reward([json.loads(doc["entry"])])
    return {"accuracy": float(reward(results, index=[0])[0] > 0)}

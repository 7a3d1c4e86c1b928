# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

import math
import threading
import time

import pytest

from trl_dlr.rewards import answers_agree, correctness_reward, extract_answer, math_judge

from .answers import ANSWERS


@pytest.mark.parametrize("kind", ANSWERS)
def test_what_states_the_gold_answer_and_nothing_else(kind):
    judged = [
        (completion, gold, reward)
        for gold, (right, wrong) in ANSWERS[kind].items()
        for reward, completions in ((1.0, right), (-1.0, wrong))
        for completion in completions
    ]
    completions, golds, _ = zip(*judged, strict=True)
    given = correctness_reward(list(completions), answer=list(golds))
    assert [case for case, reward in zip(judged, given, strict=True) if reward != case[2]] == []
    assert correctness_reward(list(golds), answer=list(golds)) == [1.0] * len(golds)


MARKS = [
    "{}",
    "**{}**",
    "<answer>{}</answer>",
    "<answer>\n{}\n</answer>",
    "<think>5?</think>{}",
    "#### {}",
    "#### {}\n\nQuestion: x\n#### 99",
    "\\boxed{{{}}}",
    "The answer is {}",
    "So the answer is: $\\boxed{{{}}}$.",
    "**Answer:** {}",
    "The final answer is {}.",
]
NOTATIONS = {
    "18": "18|18.0|$18.00|18 apples|18 percent|18 km/h|18 cm^2|18 m²|18°|18\\degree|+18|018|x = 18|3 \\times 6 = 18|9+9 = 18 apples|≈18"
    "|about 18|exactly 18|just 18|only 18|around 18|EUR 18|GBP 18|18 per day|€18|18 €|USD 18|18h|18 kg|\\$18|18\\text{ dollars}|18\\%|{18}|(18)|`18`|eighteen|18 (9 * 2)",
    "-5": "-5|−5|–5|-5.0|-$5|$-5|- 5|x = -5|minus 5|negative 5|3 - 8 = -5|-5°C",
    "1234567.5": "1,234,567.5|1234567.5|1 234 567.5|1{,}234{,}567.5|1,\\!234,\\!567.5|1'234'567.5|1_234_567.5",
    "3/4": "3/4|0.75|75%|\\frac{3}{4}|\\frac34|\\dfrac{3}{4}|6/8|¾|3/4 cups|x = \\frac{3}{4}",
    "2.5": "2.5|2 1/2|2½|5/2|2\\frac{1}{2}|2 and 1/2|2.5 hours",
    "-1/2": "-1/2|-0.5|-\\frac{1}{2}|\\frac{-1}{2}|−½|-.5",
    "1500000": "1.5 million|1.5e6|1.5 \\times 10^6|1.5 \\cdot 10^{6}|1500 thousand|1500k|1.5M",
    "B": "B|(B)|B.|B)|option B|B) Paris|(B) Paris|B: Paris|\\textbf{(B)}|[B]|b|(b)",
    "1, 2": "1, 2|2, 1|1 and 2|1,2|{1, 2}|\\{1, 2\\}|x = 1, x = 2|x = 1 or x = 2|1; 2",
    "x+1": "x+1|1+x|$x+1$|(x+1)",
    "(1,2)": "(1,2)|(1, 2)|\\left(1, 2\\right)",
    "\\sqrt{2}": "\\sqrt{2}|\\sqrt2|sqrt(2)|√2|2^{1/2}",
    "Paris": 'Paris|paris|\\text{Paris}|Paris.|The Paris|"Paris"',
    "yes": "yes|YES|Yes.",
    "12:30": "12:30",
}


@pytest.mark.parametrize("gold", NOTATIONS)
def test_every_marked_answer_is_paid_in_every_notation(gold):
    completions = [mark.format(answer) for answer in NOTATIONS[gold].split("|") for mark in MARKS]
    rewards = correctness_reward(completions, answer=[gold] * len(completions))
    assert [text for text, reward in zip(completions, rewards, strict=True) if reward != 1.0] == []


SOLUTIONS = {
    72: "She sold 48/2 = <<48/2=24>>24 in May.\nShe sold 48+24 = <<48+24=72>>72 in April and May.",
    1080: "He runs 3*60=<<3*60=180>>180 meters a day, and 6*180=<<6*180=1080>>1,080 meters a week.",
    120000: "The house is worth 80,000*1.5=$<<80000*1.5=120000>>120,000 more.",
    -3: "It was 4 degrees and fell by 7, so it is 4-7=<<4-7=-3>>-3 degrees.",
    10: "She gets 12/60 = $<<12/60=0.2>>0.2 a minute.\nFor 50 she gets 0.2 x 50 = $<<0.2*50=10>>10.",
}


@pytest.mark.parametrize("number", SOLUTIONS)
def test_solutions_agree_with_themselves_and_no_other_number(number):
    solution = SOLUTIONS[number]
    gold = f"{solution}\n#### {number:,}"
    right = [gold, solution, str(number), f"{number}.0", f"\\boxed{{{number:,}}}", f"The answer is ${number:,}."]
    assert correctness_reward(right, answer=[gold] * len(right)) == [1.0] * len(right)
    others = [number + 1, number - 1, -number, 10 * number, number / 10, number + 0.5]
    wrong = [text.format(other) for other in others for text in ("{}", "#### {}", solution + "\n#### {}", "It is {}.")]
    assert correctness_reward(wrong, answer=[gold] * len(wrong)) == [-1.0] * len(wrong)


def test_numbers_letters_and_words_are_no_matter_for_math_verify(monkeypatch):
    monkeypatch.setattr(math_judge, "same_expression", lambda gold, answer: pytest.fail(f"{gold}, {answer}"))
    answers = ["$1,000.50", "\\frac12", "19", "2 + 3", "10^{10^{10}}", "x + 1", "A", "a cat", "1 and 2", "$x + 1$"]
    golds = ["1000.5", "0.5", "18", "5", "18", "5", "B", "a dog", "2, 1", "x+1"]
    assert correctness_reward(answers, answer=golds) == [1.0, 1.0] + [-1.0] * 6 + [1.0, 1.0]


def test_completions_of_several_shapes():
    parts = [{"type": "text", "text": "#### "}, {"type": "image"}, {"type": "text", "text": "7"}]
    completions = [
        [{"role": "assistant", "content": "7"}],
        [{"content": "7"}],
        [{"role": "assistant", "content": "1"}, {"role": "assistant", "content": parts}],
        [{"role": "assistant", "content": "8"}],
        [{"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}],
        [{"role": "assistant", "content": None}, {"role": "tool", "content": "7"}],
        [{"role": "assistant"}],
        [{"role": "assistant", "content": []}],
        [],
    ]
    assert correctness_reward(completions, solution=["7"] * 9) == [1.0] * 3 + [-1.0] * 6
    assert correctness_reward([], answer=[]) == []


@pytest.mark.parametrize("gold", [None, "", "  ", math.nan, "nan", ["7"]])
def test_rows_without_a_gold_answer_are_refused(gold):
    with pytest.raises(ValueError, match="`solution` must hold a text or a number"):
        correctness_reward(["None"], solution=[gold])
    assert not answers_agree("", "")


def test_gold_answers_may_be_numbers():
    assert correctness_reward(["7", "0.5", "7"], answer=[7, 0.5, 8]) == [1.0, 1.0, -1.0]


def test_a_dataset_without_gold_answers_is_refused():
    with pytest.raises(ValueError, match="answer.*solution"):
        correctness_reward(["7"])


def test_extract_answer_takes_the_statement():
    assert extract_answer("<answer>1</answer> no, <answer> 2 </answer>") == "2"
    assert extract_answer("<think>#### 4</think>\nwork\n#### 5\n#### 6") == "5"
    assert extract_answer("#### Plan\n#### 1. Add\n#### x + 1\n\nso it is") == "x + 1"
    assert extract_answer(r"\boxed{3}, that is \boxed{\frac{1}{2}} and \boxed{4}") == r"\frac{1}{2}, 4"
    assert extract_answer("The answer is 4. No, the **answer** is: **5**. Good.") == "5**."
    assert extract_answer("5\n\nQuestion: which?\nThe answer is 6.\nQ: 7?\nThe answer is 8.") == "5"
    assert extract_answer(" plain ") == "plain"
    assert extract_answer("\n\n") == ""


@pytest.mark.parametrize(
    "piece",
    [
        "<answer>",
        "<",
        "####",
        "#### 1. Add\n",
        "\n",
        " ",
        "\\boxed{",
        "answer ",
        "<think>",
        "not 1 ",
        "1, ",
        "1 1/2 ",
        "x =",
    ],
)
def test_time_is_linear_in_the_length(piece):
    text = (piece * 40_000)[:40_000]
    start = time.thread_time()
    correctness_reward([text, text + "18", "x" + text[:1900] + " 18"], answer=["18", "x+1", "18"])
    assert time.thread_time() - start < 1.0  # most take 0.02


def test_what_takes_too_long_is_wrong_and_counted_once(monkeypatch, caplog):
    asked = []

    def same_expression(gold, answer):
        asked.append(answer)
        monkeypatch.setattr(math_judge, "spent", math_judge.spent + 3.0)
        return True

    monkeypatch.setattr(math_judge, "same_expression", same_expression)
    completions = ["x + 1", "<answer>18</answer>"] * 32
    assert correctness_reward(completions, answer=["1 + x", "18"] * 32) == [1.0, 1.0] * 2 + [-1.0, 1.0] * 30
    assert len(asked) == 2  # which used up two seconds and a twentieth for each of 64
    assert [record.message.split(" answers")[0] for record in caplog.records] == ["30 of 64"]


def test_works_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.extend(correctness_reward(["x+1"], answer=["1+x"])))
    thread.start()
    thread.join()
    assert results == [1.0]


def test_a_gold_answer_for_each_completion():
    for column in ("answer", "solution"):
        with pytest.raises(ValueError, match=f"`{column}` must hold .*got 1 for 2 completions"):
            correctness_reward(["1", "2"], **{column: ["1"]})

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Small tasks with one short answer each, and one strict judge for all. Not a script.

An answer counts where it stands alone ("16", "Oslo.") or ends the first sentence after "is", "=" or the like ("4 + 12 =
16", "The capital of Norway is Oslo."), and where the completion names no other answer: a list of guesses, a copied
question, or a sum that is left to do are wrong.
"""

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset

from trl_dlr.scripts.questions import addition, with_prompts


VALUE = r"(?P<value>-?\d[\d,]*(?:\.\d+)?|[^\W\d_](?:['-]?[^\W\d_])*(?: [^\W\d_]+){0,2}?)"
STATED = re.compile(
    rf"(?:.*(?:\b(?:is|are|was|equals|equal to)|=|:)\s+)?(?:(?:the|an?|to) )?[\"'*]*{VALUE}[\"'*]*[.!]*[\"'*]*",
    re.IGNORECASE,
)
WORD = re.compile(r"[^\W_]+")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def canonical(answer: str) -> str:
    answer = answer.strip().casefold()
    return answer.replace(",", "").removesuffix(".0") if NUMBER.fullmatch(answer) else answer


def stated(completion: str) -> str | None:
    """The answer that a completion's first sentence states, or `None`."""
    first = re.split(r"(?<=[.!?])[\"']?\s|\n", completion.strip(), maxsplit=1)[0]
    match = STATED.fullmatch(first)
    return None if match is None else canonical(match["value"])


def is_right(completion: str, answer: str, question: str, answers: frozenset[str]) -> bool:
    """Whether a completion states the answer, and no other of the task's (`answers`) or other number."""
    if stated(completion) != canonical(answer):
        return False
    if NUMBER.fullmatch(answer):
        # Minus signs aside: in "12 - 4" there is no -4
        named = {canonical(number.lstrip("-")) for number in NUMBER.findall(completion)}
        asked = {canonical(number.lstrip("-")) for number in NUMBER.findall(question)}
        return named <= asked | {canonical(answer).lstrip("-")}
    said, asked = spaced(completion), spaced(question)
    others = answers - {canonical(answer), *canonical(answer).split()}
    return not any(spaced(other) in said and spaced(other) not in asked for other in others)


def spaced(text: str) -> str:
    return f" {' '.join(re.findall(WORD, text.casefold()))} "


def is_brief(completion: str) -> bool:
    """Whether a completion states an answer, right or wrong, and ends there."""
    return "\n" not in completion.strip() and not re.search(r"[.!?]\s", completion) and stated(completion) is not None


@dataclass
class Task:
    """Questions to train on, held-out ones (columns `prompt`, `question`, `answer`), and tokens of an answer."""

    name: str
    train: Dataset
    test: Dataset
    max_new_tokens: int = 12

    def __post_init__(self):
        self.answers = frozenset(canonical(answer) for split in (self.train, self.test) for answer in split["answer"])

    def correct(self, completions: list, answer: list[str], question: list[str], **kwargs) -> list[float]:
        texts = map(text_of, completions)
        found = [is_right(*row, self.answers) for row in zip(texts, answer, question, strict=True)]
        return [1.0 if right else -1.0 for right in found]

    def brief(self, completions: list, **kwargs) -> list[float]:
        return [1.0 if is_brief(text_of(completion)) else -1.0 for completion in completions]

    def for_pilot(self) -> "Task":
        """The questions to train on, of which some are held out in turn: choices are made without the others."""
        rows = [*self.train.select_columns(["question", "answer"])]
        random.Random(1).shuffle(rows)
        train, test = map(with_prompts, hold_out(rows, min(len(self.test), len(rows) * 2 // 5)))
        return Task(self.name, train, test, self.max_new_tokens)

    def best_constant(self) -> float:
        """Share of held-out questions that the most frequent answer gets right."""
        return Counter(map(canonical, self.test["answer"])).most_common(1)[0][1] / len(self.test)


def text_of(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def same_question(question: str) -> str:
    """What questions have in common that are held out together: sums and products of the same numbers."""
    numbers = NUMBER.findall(question)
    is_ordered = re.search(r"\d\s*[-/]|-\s*\d", question)
    return question if is_ordered or len(numbers) < 2 else " ".join(sorted(numbers))


def hold_out(rows: list[dict[str, str]], num_test: int) -> tuple[Dataset, Dataset]:
    """Rows to train on, and rows that are held out."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(same_question(row["question"]), []).append(row)
    train, test = [], []
    for group in groups.values():
        side = test if len(test) + len(group) <= num_test else train
        side += group
    return Dataset.from_list(train), Dataset.from_list(test)


def split(name: str, rows: list[tuple[str, str]], num_test: int, max_new_tokens: int = 12) -> Task:
    """Different questions, the same ones held out for every seed."""
    rows = [{"question": question, "answer": answer} for question, answer in dict(rows).items()]
    random.Random(0).shuffle(rows)
    return Task(name, *map(with_prompts, hold_out(rows, num_test)), max_new_tokens)


def gym(name: str, num_test: int = 60, size: int = 400, max_new_tokens: int = 12, **settings) -> Task:
    """A family of reasoning-gym."""
    import reasoning_gym

    entries = reasoning_gym.create_dataset(name, size=size, seed=0, **settings)
    return split(name, [(entry["question"], str(entry["answer"])) for entry in entries], num_test, max_new_tokens)


def pairs(text: str) -> list[tuple[str, str]]:
    return [tuple(part.strip().split(":")) for part in text.replace("\n", " ").split(",")]


CAPITALS = pairs("""Afghanistan:Kabul, Albania:Tirana, Algeria:Algiers, Angola:Luanda, Argentina:Buenos Aires,
Armenia:Yerevan, Australia:Canberra, Austria:Vienna, Azerbaijan:Baku, Bangladesh:Dhaka, Belarus:Minsk,
Belgium:Brussels, Bhutan:Thimphu, Bosnia and Herzegovina:Sarajevo, Botswana:Gaborone, Brazil:Brasilia, Bulgaria:Sofia,
Cambodia:Phnom Penh, Canada:Ottawa, Chad:N'Djamena, Chile:Santiago, China:Beijing, Colombia:Bogota, Croatia:Zagreb,
Cuba:Havana, Cyprus:Nicosia, Denmark:Copenhagen, Ecuador:Quito, Egypt:Cairo, Eritrea:Asmara, Estonia:Tallinn,
Ethiopia:Addis Ababa, Fiji:Suva, Finland:Helsinki, France:Paris, Georgia:Tbilisi, Germany:Berlin, Ghana:Accra,
Greece:Athens, Guinea:Conakry, Guyana:Georgetown, Haiti:Port-au-Prince, Honduras:Tegucigalpa, Hungary:Budapest,
Iceland:Reykjavik, India:New Delhi, Indonesia:Jakarta, Iran:Tehran, Iraq:Baghdad, Ireland:Dublin, Italy:Rome,
Jamaica:Kingston, Japan:Tokyo, Jordan:Amman, Kazakhstan:Astana, Kenya:Nairobi, Kyrgyzstan:Bishkek, Laos:Vientiane,
Latvia:Riga, Lebanon:Beirut, Liberia:Monrovia, Libya:Tripoli, Lithuania:Vilnius, Madagascar:Antananarivo,
Malawi:Lilongwe, Malaysia:Kuala Lumpur, Mali:Bamako, Malta:Valletta, Moldova:Chisinau, Mongolia:Ulaanbaatar,
Morocco:Rabat, Mozambique:Maputo, Namibia:Windhoek, Nepal:Kathmandu, New Zealand:Wellington, Nicaragua:Managua,
Niger:Niamey, Nigeria:Abuja, North Korea:Pyongyang, Norway:Oslo, Oman:Muscat, Pakistan:Islamabad, Paraguay:Asuncion,
Peru:Lima, Philippines:Manila, Poland:Warsaw, Portugal:Lisbon, Qatar:Doha, Romania:Bucharest, Russia:Moscow,
Rwanda:Kigali, Saudi Arabia:Riyadh, Senegal:Dakar, Serbia:Belgrade, Sierra Leone:Freetown, Slovakia:Bratislava,
Slovenia:Ljubljana, Somalia:Mogadishu, South Korea:Seoul, Spain:Madrid, Sudan:Khartoum, Suriname:Paramaribo,
Sweden:Stockholm, Syria:Damascus, Taiwan:Taipei, Tajikistan:Dushanbe, Thailand:Bangkok, Togo:Lome, Tunisia:Tunis,
Turkey:Ankara, Turkmenistan:Ashgabat, Uganda:Kampala, Ukraine:Kyiv, United Kingdom:London, Uruguay:Montevideo,
Uzbekistan:Tashkent, Venezuela:Caracas, Vietnam:Hanoi, Zambia:Lusaka, Zimbabwe:Harare""")
OPPOSITES = pairs("""hot:cold, big:small, tall:short, fast:slow, light:dark, happy:sad, rich:poor, strong:weak,
young:old, early:late, full:empty, open:closed, wet:dry, clean:dirty, hard:soft, high:low, thick:thin, wide:narrow,
deep:shallow, loud:quiet, sharp:dull, rough:smooth, sweet:bitter, heavy:light, true:false, right:wrong, good:bad,
up:down, left:right, in:out, near:far, first:last, inside:outside, above:below, before:after, always:never,
begin:end, buy:sell, push:pull, win:lose, remember:forget, love:hate, laugh:cry, arrive:depart, accept:refuse,
increase:decrease, rise:fall, build:destroy, give:take, question:answer, friend:enemy, victory:defeat, day:night,
summer:winter, north:south, east:west, man:woman, boy:girl, brother:sister, father:mother, king:queen, uncle:aunt,
success:failure, peace:war, life:death, health:illness, profit:loss, entrance:exit, top:bottom, front:back,
maximum:minimum, positive:negative, cheap:expensive, easy:difficult, safe:dangerous, brave:cowardly,
generous:selfish, polite:rude, honest:dishonest, possible:impossible, legal:illegal, visible:invisible,
asleep:awake, alive:dead, single:married, ancient:modern, private:public, guilty:innocent, permanent:temporary,
simple:complex, tight:loose, straight:crooked, ugly:beautiful, lazy:hardworking, foolish:wise, hopeful:hopeless,
careful:careless, useful:useless, even:odd, more:less, many:few, absent:present, attack:defend, borrow:lend,
freeze:melt, sink:float, shout:whisper, teach:learn, import:export, expand:contract, include:exclude,
appear:disappear, agree:disagree, lock:unlock""")


def words(name: str, question: str, items: list[tuple[str, str]]) -> Callable[[], Task]:
    return lambda: split(name, [(question.format(key), answer) for key, answer in items], len(items) * 2 // 5)


def products() -> Task:
    rows = [(f"What is {a} * {b}?", str(a * b)) for a in range(2, 13) for b in range(2, 13)]
    return split("products", rows, 48)


# The first five are used. `rivals.py --probe` shows all
TASKS: dict[str, Callable[[], Task]] = {
    "addition": lambda: Task("addition", *map(with_prompts, addition())),
    "chain_sum": lambda: gym("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=2),
    "products": products,
    "capitals": words("capitals", "What is the capital of {}?", CAPITALS),
    "opposites": words("opposites", 'What is the opposite of "{}"?', OPPOSITES),
    "number_format": lambda: gym("number_format", max_new_tokens=16),
    "letter_jumble": lambda: gym("letter_jumble", max_new_tokens=16, min_words=1, max_words=1),
    "needle_haystack": lambda: gym("needle_haystack", max_new_tokens=16, min_num_statements=2, max_num_statements=4),
}

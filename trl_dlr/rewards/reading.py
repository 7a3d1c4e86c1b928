# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What a short text states: a number, several, a letter, an expression, or words."""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple


MAX_LENGTH = 2000  # characters that are read, from the end
SYMBOLS = str.maketrans("‐‑‒–−﹣⁄∕÷“”«»’‘≈≃∼~", '------///""""\'\'==  ', "\u200b\u200c\u200d\u2060\ufeff")
SYMBOLS |= str.maketrans({"π": r"\pi ", "√": r"\sqrt ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne "})
SYMBOLS |= str.maketrans({"±": r"\pm ", "×": r"\times ", "·": r"\cdot ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "})
SYMBOLS |= str.maketrans({"—": ", ", "。": ". "})
ISO_CURRENCIES = "AUD|BRL|CAD|CHF|CNY|CZK|DKK|EUR|GBP|HKD|HUF"
ISO_CURRENCIES += "|IDR|ILS|INR|JPY|KRW|MXN|MYR|NOK|NZD|PHP|PLN|RUB|SEK|SGD|THB|TWD|USD|ZAR"
REWRITES = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        # Markdown, HTML and the calculator notes of GSM8K
        (r"<<[^<>\n]*>>|</?[a-z]+\s*/?>|`+|[✓✔✅☑]\ufe0f?", ""),
        (r"^[ \t]*(?:#+|[*•](?=[ \t])|-(?=[ \t]+(?:\*\*|[a-zA-Z])))[ \t]*", ""),
        (r"(?<![\w)}])(?:\*\*|__)|(?:\*\*|__)(?![\w({\\])", ""),
        (r"(?<![\w*)])\*([^*\s][^*\n]*)\*(?![\w*(])|(?<!\w)_([^_\n]+)_(?!\w)", r"\1\2"),
        (r"\*\*", "^"),
        # LaTeX in its plainest form
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])", " "),
        (r"\\!|\\(?:left|right|displaystyle|boxed)(?![a-zA-Z])", ""),
        (r"\{,\}", ","),
        (r"&(?=\s*=)|\\\\\s*\Z|\\(?:begin|end)\{align(?:ed)?\*?\}", ""),
        *[(r"\\(?:text|math|mbox)[a-z]*\s*\{([^{}]*)\}", r"\1")] * 2,
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac\s*(\d)", r"\\frac{\1}"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
        (r"\\?\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])pi\b", r"\\pi "),
        (r"_\{(\w)\}", r"_\1"),
        (r"\\(?:approx|sim(?:eq)?)(?![a-zA-Z])", "="),
        # Units that are signs, currencies, delimiters of mathematics, signs in words
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", " degrees "),
        (r"\\%|\bpercent\b", "%"),
        (r"(?:\b[A-Z]{1,2}(?=\\?\$\s?[\d.]))?\\?\$|[€£¥₹₽₩₪₫฿₱₦₺₴¢]|(?<!\\)\\[\[\]()]", ""),
        (rf"\b(?:{ISO_CURRENCIES}|Rs\.?)\s?(?=[-+]?\.?\d)", ""),
        (r"^(?:minus|negative) (?=\d)", "-"),
    )
]


def normalize(text: str) -> str:
    """`text` without Markdown, currencies and typographic variants."""
    text = re.sub("[¼-¾⅐-⅞]", r" \g<0>", text[-MAX_LENGTH:])  # after a whole number it makes a mixed one
    text = re.sub("[²³¹⁰⁴-⁹]+", r"^\g<0>", text)
    text = unicodedata.normalize("NFKC", text).translate(SYMBOLS)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


# ---- Numbers ----

SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
SCALES |= {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "mn": 10**6, "bn": 10**9, "lakh": 10**5, "crore": 10**7}
TEENS = [f"{one}teen" for one in "thir four fif six seven eigh nine".split()]
ONES = ["zero", *"one two three four five six seven eight nine ten eleven twelve".split(), *TEENS]
TENS = [f"{ten}ty" for ten in "twen thir for fif six seven eigh nine".split()]
SPELLED = [*ONES, *(f"{ten} {one}".strip() for ten in TENS for one in ["", *ONES[1:10]])]
SPELLED = {word: Fraction(value) for value, word in enumerate(SPELLED)}
WITH_LATEX = [  # numbers, and as they are written without
    (re.compile(r"(?<=\d)\s*(?=\\frac)"), " "),
    (re.compile(r"\\frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(-?)(\d+)\s*\}"), r"\2\1/\3"),
    (re.compile(r"(?<=\d)\s*(?:\*|x|\\times|\\cdot)\s*10\s*\^\s*\{?(-?\d{1,3})\}?"), r"e\1"),
]

_BEFORE = r"""
    (?: [^\w\\^*/<>|+.-] | \.(?!\d) | \b(?i:so|thus|hence|therefore|no(?=[,.\n])|probably|in|the|year|same\ as|to|us
      |number|answer|about|approximately|around|roughly|exactly|only|just|not\ \S{1,20}\ but)\b )*"""
_WHOLE = r"(?:\d{1,3}(?:[,\ '_]\d{3})+|\d+)(?!\d)"
_NUMBER = rf"""
    (?P<sign>[-+]\s?)?
    (?P<digits> (?:{_WHOLE}\s+(?:and\s+)?)?\d+\s?/\s?[1-9]\d* | {_WHOLE}(?:\.\d+)?(?:[eE][-+]?\d{{1,3}}(?!\w))? | \.\d+ )
    (?![,.:/-]?\d)
    (?:\s*(?P<scale>{"|".join(SCALES)})s?(?!\w))? (?P<percent>\s*%)?
    (?!\s?[-/]?\s?(?![mglLsdhCFKWVAJN][23]?\b|a\s[a-z])[a-zA-Z](?![a-zA-Z']))  # no variable, as in 18x
"""
_GOES_ON = r"for|in|on|at|by|from|after|as|which|with|because|since|instead|so"
_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_NO_UNIT = rf"""\b(?:{_GOES_ON}|{_MONTH}|[AaPp]\.?[Mm]|BCE?|plus|minus|multiplied|divided|squared|cubed|factorial|hal(?:f|ves)
    |quarters|thirds|tenths|hundredths|thousandths|than|or|is|are|was|were|be|would|can|could|does|not|never|wrong
    |incorrect)\b | n't"""
_UNIT = rf"""(?:
    (?!{_NO_UNIT})[^\W\d_](?:\.(?!\s+[A-Z]))? | [\s'"%)\]}}/-] | (?<=[a-z])\s?\^\{{?[23]\}}? | (?<=[a-z])[23](?!\w))*"""
SAID = re.compile(rf"{_BEFORE} (?:(?P<name>[a-zA-Z]\w?)\s*(?:=|\bis\b){_BEFORE})? {_NUMBER} {_UNIT}", re.VERBOSE)
REMARK = re.compile(
    rf"[\s.,;:!]*$|;\s(?!or\b)(?=[a-z])|,(?:[^\W\d]|[\s.'])*$|,?\s*(?:and(?= not))?\s*(?:{_GOES_ON}|not)\b"
)


class Number(NamedTuple):
    value: Fraction
    is_percent: bool
    name: str | None  # of the variable that is said to be it


def _said(text: str) -> tuple[Number | None, str]:
    """The number that a text begins with, if nothing but its unit and a remark follow, and the remark."""
    if (word := text.lower().replace("-", " ").strip(" \n.!")) in SPELLED:
        return Number(SPELLED[word], False, None), ""
    for pattern, replacement in WITH_LATEX if "\\" in text or "^" in text else ():
        text = pattern.sub(replacement, text)
    match = SAID.match(text)
    remark = text[match.end() :] if match else ""
    if match is None or not REMARK.match(remark):
        return None, ""
    digits = re.sub(r"(?<=\d)[ ,'_](?=\d{3}(?!\d))|\s(?=/)|(?<=/)\s|and", "", match["digits"])
    *whole, value = map(Fraction, digits.split())
    if "/" in digits and (value.denominator == 1 or (whole and value > 1)):
        return None, ""  # a division that is left to do, as 18/2 is
    value = sum(whole, value) * SCALES.get(match["scale"], 1) * (-1 if "-" in (match["sign"] or "") else 1)
    return Number(value, bool(match["percent"]), match["name"]), remark


def quantity(text: str) -> Number | None:
    """The number that a normalized text as a whole is, with a unit or without: `18 apples`, `x = 1/2`."""
    number, remark = _said(text)
    return None if re.search(r"\d|,.*\w", remark) else number


def same_number(a: Number, b: Number) -> bool:
    """Whether two numbers are equal. A percentage is equal to its digits and to its value: 50% to 50 and 0.5."""
    if a.name and b.name and a.name != b.name:
        return False
    if a.is_percent != b.is_percent:
        plain, percent = (b, a) if a.is_percent else (a, b)
        return plain.value in (percent.value, percent.value / 100)
    is_endless = [10**50 % number.value.denominator > 0 for number in (a, b)]
    return a.value == b.value or (is_endless[0] != is_endless[1] and abs(a.value - b.value) < Fraction(1, 10**6))


def listed_numbers(text: str) -> list[Number] | None:
    """
    Several numbers in order of size, without brackets or in braces: `1331 and 1728`, `x = 1, y = 2`, `\\{1, 2\\}`.
    """
    text = re.sub(r"\\[{}]", "", text.strip(" \n.,;:"))
    text = re.sub(r"\\pm\s*([^,;&]+)", r"\1, -\1", text)
    items = [item for item in re.split(r",(?=\s)|,(?!\d{3}(?!\d))|[;&\n]|\band\b|\bor\b", text) if item.strip()]
    numbers = [quantity(item) for item in items]
    is_list = len(items) > 1 and None not in numbers and text[0] not in "(["
    return sorted(numbers, key=lambda number: number.value) if is_list else None


# ---- Statements in prose ----

STATES = re.compile(
    r"((?<![<>!])=>?|->|[→⇒]|\\(?:[lL]ong)?[rR]ightarrow|:(?!\d)|(?<!\d):|'s\b|是"
    r"|\b(?:total of|is|est|es|ist|are|was|were|be|got|go with|has|have|had|leaving|sold|made"
    r"|(?:equal|make|give|get|yield|cost|come|take|run|pay|need|earn|choose|pick|say|think)s?)\b)"
)
SENTENCE_END = re.compile(r"(?<!\b[A-Z])(?<!\b[A-Z][a-z])(?<!\.\.)[.!?](?=[\s\"')*_])|\n")
ASIDE = re.compile(r"\s\([^()]*\)")
CLAUSE = re.compile(r"[,;:]\s|\b(?:but|then)\b")
DENIED = re.compile(r"\b(?:not|never|cannot|or|if|let|suppose|assume|doubt)\b|n't\b", re.IGNORECASE)
CONCLUDES = re.compile(r"=|→|:\s|\b(?:so|thus|therefore|hence|in total|answer)\b", re.IGNORECASE)


def stated_number(text: str) -> Number | None:
    """
    The number that a normalized text states: that it begins with, with a remark behind it at most; or in prose, what
    the last sentence with a number says last that something is, has, makes or costs, where the number follows such a
    word directly. Several sentences have to calculate or to conclude, or they may be a copied question. Questions,
    suppositions, denials, lists, false equations and operations that are left to do state none.
    """
    number, remark = _said(text)
    if number and not re.search(r"[.\n].*\d", remark, re.DOTALL):
        return number
    if numbers := listed_numbers(text):
        is_same = len({number.value for number in numbers}) == 1
        return numbers[0] if is_same and not re.search(r"[,;&]|\band\b", text) else None
    text = ASIDE.sub("", text)
    sentences = _sentences(text)
    numeric = [one for one in sentences if re.search(r"\d", one)]
    if not numeric or numeric[-1].endswith("?"):
        return None
    if len(numeric) > 1 and not CONCLUDES.search(text):
        return quantity(numeric[-1])
    return _predicate(numeric[-1])


def _sentences(text: str) -> list[str]:
    lines = SENTENCE_END.sub(r"\g<0>\n", text).split("\n")
    return [line.strip() for line in lines if line.strip()]


def _is_denied(before: str) -> bool:
    return bool(DENIED.search(CLAUSE.split(before)[-1]))


def _predicate(sentence: str) -> Number | None:
    pieces = STATES.split(sentence)
    parts, verbs = pieces[::2], pieces[1::2]  # the n-th verb stands behind the n-th part
    last = max((index for index, part in enumerate(parts) if re.search(r"\d", part)), default=0)
    if last and verbs[last - 1] == "=":
        parts[last] = parts[last].split(" than ")[0]  # 5 - 3 = 2 more than before
    number = _said(parts[last])[0] if last else quantity(sentence)
    if number is None and verbs and (verbs[0] == "=" or re.match(r"\s*(?:the|what|left)\b", parts[1])):
        last, number = 0, quantity(parts[0])  # 18 = 15 + 3, 18 is the total
    if number is None or _is_denied("".join(pieces[: 2 * last])):
        return None
    sides = [_said(part) for part, verb in zip(parts, verbs, strict=False) if verb == "="]
    is_false = any(side and not remark.strip() and not same_number(side, number) for side, remark in sides)
    return None if is_false else number


def subject_and_predicate(text: str) -> tuple[str, str]:
    """What a normalized text is about, if it is one sentence, and what its last sentence says that something is."""
    *others, sentence = _sentences(text) or [""]
    *before, said = STATES.split(sentence)
    is_subject = before and not others and not re.search(r"\b(?:not|wrong|incorrect|false)\b|n't\b", sentence)
    return before[0].strip() if is_subject else "", "" if _is_denied("".join(before)) else said.strip()


# ---- Letters, expressions, words ----

# No part of a word, and not the words "A" and "I"
LETTER = re.compile(r"(?<![\w'-])[A-J](?![\w'+#=-])(?!(?<=[AI]) (?!or\b|is\b)[a-z])")
UNCHOSEN = re.compile(
    r"\b(?:because|since)\b.*|\b[Nn]ot \(?[A-J]\b\)?|\(?\b[A-J]\)? (?:is|was|isn't) ?(?:not|wrong|incorrect|false)\b"
)
CHOSEN = re.compile(
    r"\W*(?i:(?:so|thus|hence|therefore|choose|the|option|choice|letter|answer)\W+)*([A-J])"
    r"(?:[)\]}>.,:;!\n]|$|\s[-(,]|\sis (?:the|correct|right)\b)"
)
FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp sqrt min max gcd lcm mod det lim and"
OPERATOR = re.compile(r"[\\=<>^+*/|!(){}\[\]-]|(?<![\w.])\.?\d[\d.]*[a-zA-Z]")
NAME = re.compile(r"\s*\d+(?:-\d+)+\s*|\s*\d+(?:[./]\d+){2,}\s*", re.DOTALL)  # of a range, a time, a date


VARIABLE = re.compile(r"(?<![\w\\])[a-zA-Z]\w?\s*=\s*")
DELIMITED = re.compile(r"\$\$?([^$]+)\$|\\[(\[](.+?)\\[)\]]", re.DOTALL)
TRAILING_WORDS = re.compile(r"(?:(?<=[\w})])\s+[a-z]{2,}(?:\^\d)?)*[\s.,;:]*$")


def letter(text: str) -> str | None:
    """The letter of a choice that a normalized text as a whole is: `B`, `(b)`, `Option B`."""
    match = re.fullmatch(r"(?:\(?([A-J])\)?|\(([a-j])\))[.:]?", text)
    return (match[1] or match[2]).upper() if match else None


def stated_letter(text: str) -> str | None:
    """The one letter that a normalized text begins with, or says that it is or chooses."""
    if small := re.fullmatch(r"(?:option )?(?:([a-j])\.?|\(?([a-j])\)(?:[\s.].*)?)", text, re.DOTALL):
        return small[small.lastindex].upper()
    text = UNCHOSEN.sub("", text).strip(" \n\"'")
    chosen = CHOSEN.match(text) or CHOSEN.match(subject_and_predicate(text)[1])
    return chosen[1] if chosen and set(LETTER.findall(text)) == {chosen[1]} else None


def stated_list(text: str) -> list[Number]:
    """The numbers that a normalized text lists, as a whole or as what it says that something is."""
    texts = (text, text.strip("([])"), subject_and_predicate(VARIABLE.sub("", text))[1])
    return next(filter(None, map(listed_numbers, texts)), [])


def stated_expression(text: str) -> str | None:
    """The expression that a text is, has in its last delimiters of mathematics, or says that something is."""
    delimited = [normalize(a or b) for a, b in DELIMITED.findall(text[-MAX_LENGTH:])]
    text = normalize(text)
    expressions = (TRAILING_WORDS.sub("", one) for one in (text, *delimited[::-1], subject_and_predicate(text)[1]))
    return next((one for one in expressions if is_math(one) or quantity(one)), None)


def stated_words(text: str) -> set[str]:
    """What a normalized text may be said to state where the answer is text, to compare with it."""
    if text.endswith("?"):
        return set()
    verdict = re.match(r"(?:yes|no|true|false)(?=[,.;:!\n-])", text, re.IGNORECASE)  # "No, because it is odd"
    words = set(map(as_words, (text, *subject_and_predicate(text), verdict[0] if verdict else ""))) - {""}
    said = words.union(map(as_words, re.split(r"[,.;:!\n]|\s-\s", text)))
    return set() if any(pair <= said for pair in ({"yes", "no"}, {"true", "false"})) else words  # both are none


def is_math(text: str) -> bool:
    """
    Whether a normalized text is an expression, an equation or a set: there is an operator and there are no words.
    """
    bare = re.sub(r"\\(?:begin|end)\{[a-z*]+\}|\\[a-zA-Z]+", " ", text)
    has_words = not set(re.findall(r"[^\W\d_]{3,}", bare)).issubset(FUNCTIONS.split())
    return bool(OPERATOR.search(text)) and not has_words and not NAME.fullmatch(text)


def as_words(text: str) -> str:
    """Text to compare: whatever its case, white space, first article, quotes and the punctuation around it."""
    text = re.sub(r"[\"']|(?<!\d)\.(?!\d)| (?=: ?\d)|(?<=:) (?=\d)", "", " ".join(text.casefold().split()))
    return re.sub(r"^(?:the|an?)\s+(?=\w)", "", text.strip(" .,;:?!()[]{}"))

# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What a short text states: a number, several, a letter, an expression, or words."""

import re
import unicodedata
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple


MAX_LENGTH = 2000  # characters that are read, from the end
SYMBOLS = str.maketrans(
    dict.fromkeys("‐‑‒–−﹣", "-")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff")
    | {
        "⁄": "/",
        "÷": "/",
        "“": '"',
        "”": '"',
        "’": "'",
        "‘": "'",
        "≈": "=",
        "≃": "=",
        "∼": " ",
        "~": " ",
        "—": ", ",
        "。": ". ",
    }
    | {"π": r"\pi ", "√": r"\sqrt ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm "}
    | {"×": r"\times ", "·": r"\cdot ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "}
)
REWRITES = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        # Markdown, HTML and the calculator notes of GSM8K
        (r"<<[^<>\n]*>>|</?(?:b|strong|i|em|u|code|span|p|br|center)\s*/?>|`+|[✓✔✅☑]\ufe0f?", ""),
        (r"^[ \t]*(?:#+|[*•](?=[ \t])|-(?=[ \t]+(?:\*\*|[a-zA-Z])))[ \t]*", ""),
        (r"(?<![\w)}])(?:\*\*|__)|(?:\*\*|__)(?![\w({\\])", ""),
        (r"(?<![\w*)])\*([^*\s][^*\n]*)\*(?![\w*(])|(?<!\w)_([^_\n]+)_(?!\w)", r"\1\2"),
        (r"\*\*", "^"),
        # LaTeX in its plainest form
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])", " "),
        (r"\\!|\{\}|\\(?:left|right|displaystyle|boxed|fbox|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
        (r"\{,\}", ","),
        (r"&(?=\s*=)|\\\\\s*\Z|\\(?:begin|end)\{(?:align|equation|gather)\*?\}", ""),
        *[(r"\\(?:text|math|m)(?:bf|it|rm|sf|tt|normal|box)?\s*\{([^{}]*)\}", r"\1")] * 2,
        (r"\\[dtc]?frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\[dtc]?frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\[dtc]?frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\?\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])pi\b", r"\\pi "),
        (r"_\{(\w)\}", r"_\1"),
        (r"\\(?:approx|thickapprox|simeq|sim)(?![a-zA-Z])", "="),
        # Units that are signs, currencies, delimiters of mathematics, signs in words
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", " degrees "),
        (r"\\%|\s*\b(?:percent|per cent|percentage points?)\b", "%"),
        (r"(?:\b(?:US|CA|AU|NZ|HK|[ACRS])(?=\\?\$\s?[\d.]))?\\?\$|[€£¥₹₽₩₪₫฿₱₦₺₴¢]|(?<!\\)\\[\[\]()]", ""),
        (r"\b(?:USD|EUR|GBP|INR|JPY|CNY|CHF|CAD|AUD|Rs\.?)\s?(?=[-+]?\.?\d)", ""),
        (r"(^|\bis |= ?)(?:minus|negative) (?=\d)", r"\1-"),
    )
]


def _plain_form(match: re.Match) -> str:
    """` 1/2` of `½`, which after a whole number makes a mixed one, and `^2` of `²`."""
    characters = unicodedata.normalize("NFKC", match[0])
    return f" {characters}" if "⁄" in characters else f"^{characters}"


def normalize(text: str) -> str:
    """`text` without Markdown, currencies and typographic variants."""
    text = re.sub("[¼-¾⅐-⅞]|[²³¹⁰⁴-⁹]+", _plain_form, text[-MAX_LENGTH:])
    text = unicodedata.normalize("NFKC", text).translate(SYMBOLS)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


# ---- Numbers ----

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:\ \d{3})+|\d+)(?!\d)"
_NUMBER = rf"""
    (?<![A-Za-z0-9_\\^]) (?<!\d[-,:/.])  # not within a word, a date, a time, a range
    (?P<sign>(?<![\w)\]}}%])(?:[-+]|(?<![\w)\]}}%]\s)[-+]\s))?
    (?: (?:(?P<whole>{_WHOLE})\s+(?:and\s+)?)? (?P<top>\d+)\s?/\s?(?P<bottom>\d+)
      | (?P<latex_whole>{_WHOLE})?\s* \\frac\s*\{{\s*(?P<latex_top>-?\d+)\s*\}}\s*\{{\s*(?P<latex_bottom>\d+)\s*\}}
      | (?P<decimal>{_WHOLE}(?:\.\d+)?|(?<!\.)\.\d+)
        (?: [eE](?P<e>[-+]?\d{{1,3}})(?!\w) | \s*(?:\*|x|\\times|\\cdot)\s*10\s*\^\s*\{{?(?P<power>-?\d{{1,3}})\}}? )? )
    (?![,.:/-]?\d|\s?/\s?\d)"""
NUMBER = re.compile(_NUMBER, re.VERBOSE)
_ANY_NUMBER = re.sub(r"\?P<\w+>", "?:", _NUMBER)

SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
SCALES |= {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "mn": 10**6, "bn": 10**9, "lakh": 10**5, "crore": 10**7}
SCALE = re.compile(rf"\s*({'|'.join(SCALES)})s?(?!\w)")
UNIT = re.compile(r"(?:[^\W\d_]\.?|[\s'\"%)\]}/-]|(?<=[a-z])\s?\^\{?[23]\}?|(?<=[a-z])[23](?!\w))*")
NO_UNIT = re.compile(
    r"\s?[-/]?\s?(?![mglLsdhCFKWVAJN][23]?\b|a\s[a-z])[a-zA-Z](?![a-zA-Z'])"  # a variable, as in 18x
    r"|.*\b(?:plus|minus|multiplied|divided|squared|cubed|factorial|half|halves|thirds|tenths|hundredths|thousandths|or|is|are"
    r"|was|were|be|not|never|cannot|wrong|incorrect)\b|.*n't\b",
    re.DOTALL,
)
PREFIX = re.compile(
    r"[\s=({]*(?:so |thus |hence |therefore |then )?(?:[a-zA-Z]\w?\s*(?:=|is)\s*)?"
    r"(?:about|approximately|approx\.?|around|roughly|exactly|only|just|a total of)?\s*"
)
_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
NO_PREFIX = re.compile(
    r"[\\^*/<>|]|[-+]\s*$|(?<![\w'])[b-hj-zB-HJ-Z]\s*$|\b(?:not|never|cannot|neither|nor|than|except|times|plus|minus"
    r"|multiplied|divided|half|twice|double|triple|root|square|log|ln|sin|cos|tan|sqrt)\b|n't\b"
    rf"|\b(?:{_MONTH}|[Ss]tep|[Qq]uestion|[Pp]roblem)\s*$"
)
DATE = re.compile(rf"{_MONTH}|\b(?:[AaPp]\.?[Mm]|BCE?|CE|AD|o'clock)\b")


class Number(NamedTuple):
    value: Fraction
    is_percent: bool


def _value(match: re.Match, after: str) -> Number | None:
    """The number at `match`. None is a division that is left to do, as 18/2 is."""
    whole, top, bottom = (match[name] or match[f"latex_{name}"] for name in ("whole", "top", "bottom"))
    if top is None:
        value = Fraction(re.sub("[ ,]", "", match["decimal"])) * Fraction(10) ** int(match["e"] or match["power"] or 0)
    elif int(top) % max(int(bottom), 1) == 0 or (whole and int(top) > int(bottom)):
        return None
    else:
        value = Fraction(int(top), int(bottom)) + int(re.sub("[ ,]", "", whole or "0"))
    if scale := SCALE.match(after):
        value *= SCALES[scale[1]]
    return Number(-value if (match["sign"] or "").startswith("-") else value, after.lstrip().startswith("%"))


def _with_unit(match: re.Match, after: str) -> Number | None:
    """The number at `match`, unless what stands `after` it makes it an operand or another number."""
    scale = SCALE.match(after)
    unit = after[scale.end() :] if scale else after
    return _value(match, after) if UNIT.fullmatch(unit) and not NO_UNIT.match(unit) else None


def quantity(text: str) -> Number | None:
    """The number that a normalized text as a whole is, with a unit or without: `18 apples`, `x = 1/2`."""
    text = text.lstrip(" \n,;:").rstrip(" \n.,;:")
    match = NUMBER.search(text)
    if match is None or not PREFIX.fullmatch(text[: match.start()]) or DATE.search(text):
        return None
    return _with_unit(match, text[match.end() :])


def same_number(a: Number, b: Number) -> bool:
    """Whether two numbers are equal. A percentage is equal to its digits and to its value: 50% to 50 and 0.5."""
    if a.is_percent != b.is_percent:
        plain, percent = (b, a) if a.is_percent else (a, b)
        return plain.value in (percent.value, percent.value / 100)
    is_endless = [10**50 % number.value.denominator > 0 for number in (a, b)]
    return a.value == b.value or (is_endless[0] != is_endless[1] and abs(a.value - b.value) < Fraction(1, 10**6))


def listed_numbers(text: str) -> list[Number] | None:
    """Several numbers in order of size, without brackets or in braces: `1331 and 1728`, `x = 1, y = 2`, `\\{1, 2\\}`."""
    text = re.sub(r"\\[{}]", "", text.strip(" \n.,;:"))
    text = re.sub(r"(^|[,;=]\s*)\\pm\s*([^,;&]+)", r"\1\2, -\2", text)
    items = [item for item in re.split(r",(?=\s)|,(?!\d{3}(?!\d))|;|&|\band\b|\bor\b", text) if item.strip()]
    numbers = [quantity(item) for item in items]
    return sorted(numbers) if len(items) > 1 and None not in numbers and text[0] not in "([" else None


# ---- Statements in prose ----

_SMALL = (
    r"think|believe|say|be|been|that|it|it's|this|the|a|final|correct|right|answer|total|result|is|was|equals?|to|really"
    r"|possibly|necessarily|definitely|exactly|make|give|get|have"
)
DENIED = re.compile(
    rf"(?:\b(?:not?|never|cannot|neither|nor|by\s+no\s+means|instead\s+of|far\s+from|(?:anything|all)\s+but)|n't)\s+(?:(?:{_SMALL})\W+)*{_ANY_NUMBER}"
    rf"|(?:{_ANY_NUMBER}\s+)?(?:\w+\s+)?than\s+{_ANY_NUMBER}"
    rf"|{_ANY_NUMBER}\s+(?:(?:is|was|would\s+be|does)\s*(?:\w+ly\s+)?(?:n't|not|never|wrong|incorrect|false)|can't|cannot)\b",
    re.VERBOSE | re.IGNORECASE,
)
JOINED = re.compile(  # a list, a range or an operation
    rf"""{_ANY_NUMBER}(?P<unit>\s*[a-z]*?)
    (?:(?: [\s,;.&*/^+-] | \\times | \\cdot
         | \b(?:or|and|to|maybe|perhaps|plus|minus|times|of|(?:divided|multiplied)\s+by)\b )+ {_ANY_NUMBER}(?P=unit))+""",
    re.VERBOSE,
)
SAME = re.compile(r"(?:[\s,;.]|\bor\b)*")  # between numbers that are said twice
SENTENCE_END = re.compile(r"(?<!\b[A-Z])(?<!\b[A-Z][a-z])(?<!approx)[.!?](?=[\s\"')*_]|$)|\n")
CLAUSE_END = re.compile(r",\s|;|\b(?:so|thus|hence|therefore|then)\b")
REASON = re.compile(r"\b(?:because|since|if|when|where|although|though)\b")
STATES = re.compile(
    r"(?<![<>!])=>?|->|→|⇒|\\(?:[lL]ong)?[rR]ightarrow|\\implies|:(?!\d)"
    r"|\b(?:is|are|was|were|be|equals?|makes?|gives?|gets?|got|leaves?|totals?|yields?|becomes?|costs?|has|have|had)\b"
)
REMARK = re.compile(
    r"[,;:!?(\n]|\.(?:\s|$)|\s-\s(?=[a-zA-Z])"
    r"|\b(?:for|in|on|at|by|from|after|before|as|which|that|who|so|with|to|during|while|do|does|did|don't|doesn't|didn't)\b"
)


def stated_number(text: str) -> Number | None:
    """
    The number that a normalized text states. In prose it is what the last sentence with a number says that something is,
    or the one number of its last clause. Questions, denials, lists and operations that are left to do state none.
    """
    if (number := quantity(text)) is not None or not NUMBER.search(text) or re.search(r"\?$|^[^a-zA-Z]*!$", text):
        return number

    def keep_if_same(match: re.Match) -> str:
        numbers = list(NUMBER.finditer(match[0]))
        is_same = len({_value(number, "") for number in numbers}) == 1 and SAME.fullmatch(NUMBER.sub(" ", match[0]))
        return match[0][numbers[-1].start() :] if is_same else ""

    text = JOINED.sub(keep_if_same, DENIED.sub("", text))
    ends = [0, *(end.end() for end in SENTENCE_END.finditer(text)), len(text)]
    sentences = [text[start:end] for start, end in pairwise(ends)]
    sentence = next((one for one in reversed(sentences) if NUMBER.search(one)), "?")
    *alternatives, last = re.split(r"\bor\b", sentence)
    if sentence.endswith("?") or (NUMBER.search(last) and any(map(NUMBER.search, alternatives))):
        return None
    main = REASON.split(sentence)[0]
    said, *states = STATES.split(main if NUMBER.search(main) else sentence)
    clauses = states if any(map(NUMBER.search, states)) else CLAUSE_END.split(said)
    clause = next(one for one in reversed(clauses) if NUMBER.search(one))
    match = NUMBER.search(clause)
    remark = REMARK.search(clause, match.end())
    is_one_of_several = clauses is not states and remark and remark[0] != "(" and NUMBER.search(clause, remark.end())
    if is_one_of_several or NO_PREFIX.search(clause[: match.start()]):
        return None
    return _with_unit(match, clause[match.end() : remark.start() if remark else None])


def last_statement(text: str) -> str:
    """What the last sentence of a normalized text says that something is."""
    sentences = [one for one in SENTENCE_END.split(text) if one.strip()]
    return STATES.split(sentences[-1])[-1].strip() if sentences else ""


# ---- Letters, expressions, words ----

LETTER = re.compile(
    r"(?<![\w'-])(?<!\b[Nn]ot )(?<!\b[Nn]ot \()(?<!\bbut )(?<!\bnor )[A-J](?![\w'+#=-])"
    r"(?!(?<=[AI]) (?!or\b|and\b|because\b|since\b|is\b)[a-z])"  # the words "A" and "I"
    r"(?! (?:is|was) (?:not|wrong|incorrect|false)\b| isn't)"
)
OPTION = re.compile(r"\b(?:option|choice|letter|answer)\b(?:\s+is)?[\s:(]*", re.IGNORECASE)
FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp sqrt min max gcd lcm mod det lim and"
OPERATOR = re.compile(r"[\\=<>^+*/|!(){}\[\]-]|(?<![\w.])\.?\d[\d.]*[a-zA-Z]")
NAME = re.compile(r"\s*\d+(?:-\d+)+\s*|.*\d[:_]\d.*|\s*\d+(?:[./]\d+){2,}\s*", re.DOTALL)  # of a range, a time, a date


def letter(text: str) -> str | None:
    """The letter of a choice that a normalized text as a whole is: `B`, `(b)`, `Option B`."""
    match = re.fullmatch(r"(?:[Oo]ption |[Cc]hoice )?(?:\(?([A-J])\)?|\(([a-j])\))[.:]?", text)
    return (match[1] or match[2]).upper() if match else None


def stated_letter(text: str) -> str | None:
    """The one letter that a normalized text states."""
    if text.endswith("?"):
        return None
    if small := re.fullmatch(r"(?:option |choice )?(?:([a-j])\.?|\(?([a-j])\)(?:\s.*)?)", text, re.DOTALL):
        return small[small.lastindex].upper()
    for start in reversed([0, *(option.end() for option in OPTION.finditer(text))]):
        if letters := list(LETTER.finditer(text, start)):
            first, is_first = letters[0], letters[0].start() <= start + 1
            is_joined = re.match(
                r"\)?[\s,/&]*(?:(?:or|and|but|maybe|perhaps|possibly)\s*)*\(?[A-J]\b", text[first.end() :]
            )
            is_only = len({found[0] for found in letters}) == 1
            return first[0] if is_only or (is_first and not is_joined) else None
    return None


def is_math(text: str) -> bool:
    """Whether a normalized text is an expression, an equation or a set: there is an operator and there are no words."""
    bare = re.sub(r"\\(?:begin|end)\{[a-z*]+\}|\\[a-zA-Z]+", " ", text)
    has_words = not set(re.findall(r"[^\W\d_]{3,}", bare)).issubset(FUNCTIONS.split())
    return bool(OPERATOR.search(text)) and not has_words and not NAME.fullmatch(text) and not DATE.search(text)


def as_words(text: str) -> str:
    """Text to compare: whatever its case, white space, first article, quotes and the punctuation around it."""
    text = re.sub(r"[\"']|(?<!\d)\.(?!\d)| (?=: ?\d)|(?<=:) (?=\d)", "", " ".join(text.casefold().split()))
    return re.sub(r"^(?:the|an?)\s+(?=\w)", "", text.strip(" .,;:?!()[]{}"))

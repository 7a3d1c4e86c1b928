# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What a short text states: a number, several, a letter, an expression, or words."""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple


MAX_LENGTH = 2000  # characters that are read, from the end
SYMBOLS = str.maketrans(
    dict.fromkeys("‐‑‒–−﹣", "-")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff")
    | {
        "⁄": "/",
        "∕": "/",
        "«": '"',
        "»": '"',
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
        (r"\\%|\b(?:percent|per cent|percentage points?)\b", "%"),
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

SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
SCALES |= {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "mn": 10**6, "bn": 10**9, "lakh": 10**5, "crore": 10**7}
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
SPELLED = {word: value for value, word in enumerate(f"{_SMALL} eighteen nineteen".split())}
SPELLED |= {f"{ten}ty": 10 * value for value, ten in enumerate("twen thir for fif six seven eigh nine".split(), 2)}
SPELLING = re.compile(rf"(?:(?:{'|'.join(SPELLED)}|(?<=\s)(?:hundred|thousand|and))(?![a-z])[\s-]?)+", re.IGNORECASE)
FRACTION = re.compile(r"\\frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(-?\d+)\s*\}")

_WHOLE = r"(?:\d{1,3}(?:[,\ '_]\d{3})+|\d+)(?!\d)"
_BEFORE = r"""
    (?: [^\w\\^*/<>|+.-] | \.(?!\d) | \b(?i:so|thus|hence|therefore|no(?=[,.\n])|now|probably|maybe|i\ think|in|the|year|same\ as|to|us
      |number|answer|about|approximately|approx|around|roughly|exactly|only|just|also|a\ total\ of|not\ \S{1,20}\ but)\b )*"""
_NUMBER = rf"""
    (?P<sign>[-+]\s?)?
    (?: (?:(?P<whole>{_WHOLE})\s+(?:and\s+)?)? (?P<top>\d+)\s?/\s?(?P<bottom>-?\d+)
      | (?P<decimal>{_WHOLE}(?:\.\d+)?|\.\d+)
        (?: [eE](?P<e>[-+]?\d{{1,3}})(?!\w) | \s*(?:\*|x|\\times|\\cdot)\s*10\s*\^\s*\{{?(?P<power>-?\d{{1,3}})\}}? )? )
    (?![,.:/-]?\d|\s?/\s?\d)
    (?:\s*(?P<scale>{"|".join(SCALES)})s?(?!\w))? (?P<percent>\s*%)?
    (?!\s?[-/]?\s?(?![mglLsdhCFKWVAJN][23]?\b|a\s[a-z])[a-zA-Z](?![a-zA-Z']))  # no variable, as in 18x
"""
_GOES_ON = r"for|in|on|at|by|from|after|before|as|which|that|who|with|during|while|because|since|instead|so"
_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_NO_UNIT = rf"""\b(?:{_GOES_ON}|{_MONTH}|[AaPp]\.?[Mm]|BCE?|plus|minus|multiplied|divided|squared|cubed|factorial|hal(?:f|ves)
    |quarters|thirds|tenths|hundredths|thousandths|than|or|and|to|is|are|was|were|be|would|can|could|does|not|never|wrong
    |incorrect)\b | n't"""
_UNIT = rf"""(?:
    (?!{_NO_UNIT})[^\W\d_](?:\.(?!\s+[A-Z]))? | [\s'"%)\]}}/-] | (?<=[a-z])\s?\^\{{?[23]\}}? | (?<=[a-z])[23](?!\w))*"""
SAID = re.compile(
    rf"{_BEFORE} (?:(?P<name>[a-zA-Z]\w?|\w\(\w\))\s*(?:=|\bis\b){_BEFORE})? {_NUMBER} {_UNIT}", re.VERBOSE
)
REMARK = re.compile(
    rf"[\s.,;:!]*$|\s*\(|[;:]\D*$|,(?:[^\W\d]|[\s.'])*$|,?\s*(?:and(?= not))?\s*(?:{_GOES_ON}|not)\b|\s*(?:and(?! a\b)|to)\b\D*$"
)


class Number(NamedTuple):
    value: Fraction
    is_percent: bool
    name: str | None  # of the variable that is said to be it


def _said(text: str) -> tuple[Number | None, str]:
    """The number that a text begins with, if nothing but its unit and a remark follow, and the remark."""
    match = SAID.match(text)
    remark = text[match.end() :] if match else ""
    if match is None or not REMARK.match(remark):
        return None, ""
    whole, top, bottom = match["whole"], match["top"], match["bottom"]
    if top is None:
        value = Fraction(re.sub("[ ,'_]", "", match["decimal"])) * Fraction(10) ** int(
            match["e"] or match["power"] or 0
        )
    elif int(bottom) == 0 or int(top) % int(bottom) == 0 or (whole and int(top) > int(bottom)):
        return None, ""  # a division that is left to do, as 18/2 is
    else:
        value = Fraction(int(top), int(bottom)) + int(re.sub("[ ,'_]", "", whole or "0"))
    value *= SCALES.get(match["scale"], 1) * (-1 if (match["sign"] or "").startswith("-") else 1)
    return Number(value, bool(match["percent"]), match["name"]), remark


def _in_digits(match: re.Match) -> str:
    total, part = 0, 0
    for word in re.findall("[a-z]+", match[0].lower()):
        if word == "thousand":
            total, part = total + part * 1000, 0
        else:
            part = part * 100 if word == "hundred" else part + SPELLED.get(word, 0)
    return f"{total + part} "


def _plain(text: str) -> str:
    """Text whose LaTeX fractions are plain, and that begins with digits where it began with a number in words."""
    text = FRACTION.sub(r"\1/\2", re.sub(r"(?<=\d)\s*(?=\\frac)", " ", text))
    return SPELLING.sub(_in_digits, text, 1) if SPELLING.match(text) else text


def quantity(text: str) -> Number | None:
    """The number that a normalized text as a whole is, with a unit or without: `18 apples`, `x = 1/2`."""
    number, remark = _said(_plain(text))
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
    """Several numbers in order of size, without brackets or in braces: `1331 and 1728`, `x = 1, y = 2`, `\\{1, 2\\}`."""
    text = re.sub(r"\\[{}]", "", text.strip(" \n.,;:"))
    text = re.sub(r"(^|[,;=]\s*)\\pm\s*([^,;&]+)", r"\1\2, -\2", text)
    items = [item for item in re.split(r",(?=\s)|,(?!\d{3}(?!\d))|[;&\n]|\band\b|\bor\b", text) if item.strip()]
    numbers = [quantity(item) for item in items]
    is_list = len(items) > 1 and None not in numbers and text[0] not in "(["
    return sorted(numbers, key=lambda number: number.value) if is_list else None


# ---- Statements in prose ----

STATES = re.compile(
    r"(?<![<>!])=>?|->|→|⇒|\\(?:[lL]ong)?[rR]ightarrow|\\implies|:(?!\d)|(?<!\d):|\bi\.e\.|'s\b|是"
    r"|\b(?:total of|is|est|es|ist|are|was|were|be|got|has|have|had|becomes|leaving|sold|made|(?:equal|make|give|get|leave"
    r"|total|yield|cost|come|take|run|pay|need|earn|save)s?)\b"
)
SENTENCE_END = re.compile(r"(?<!\b[A-Z])(?<!\b[A-Z][a-z])(?<!approx)(?<!\.\.)[.!?](?=[\s\"')*_]|$)|\n")
ASIDE = re.compile(r"\s\([^()]*\)")
REASON = re.compile(r"\b(?:because|since|although|though|when|where)\b")
CLAUSE = re.compile(r"[,;:]\s|\b(?:but|so|then)\b")
DENIED = re.compile(r"\b(?:not|never|cannot|neither|nor|or|if|let|suppose|assume|doubt)\b|n't\b", re.IGNORECASE)
CONCLUDES = re.compile(r"=|→|:\s|\b(?:so|thus|therefore|hence|in total|answer)\b", re.IGNORECASE)


def stated_number(text: str) -> Number | None:
    """
    The number that a normalized text states: that it begins with, with a remark behind it at most; or in prose, what the
    last sentence with a number says last that something is, has, makes or costs, where the number follows such a word
    directly. Several sentences have to calculate or to conclude, or they may be a copied question. Questions,
    suppositions, denials, lists, false equations and operations that are left to do state none.
    """
    text = _plain(text)
    number, remark = _said(text)
    if number and not re.search(r"[.\n].*\d", remark, re.DOTALL):
        return number
    if (numbers := listed_numbers(text)) is not None:
        is_same = len({number.value for number in numbers}) == 1
        return numbers[0] if is_same and not re.search(r"[,;&]|\band\b", text) else None
    text = ASIDE.sub("", text)
    sentences = _sentences(text)
    numeric = [one for one in sentences if re.search(r"\d", one)]
    if not numeric or numeric[-1].endswith("?"):
        return None
    if len(numeric) > 1 and not CONCLUDES.search(text):
        return quantity(numeric[-1])
    return _predicate(REASON.split(numeric[-1])[0]) or _predicate(numeric[-1])


def _sentences(text: str) -> list[str]:
    starts = [0, *(end.end() for end in SENTENCE_END.finditer(text))]
    sentences = [text[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
    return [sentence for sentence in sentences if sentence]


def _is_denied(before: str) -> bool:
    return bool(DENIED.search(CLAUSE.split(before)[-1]))


def _predicate(sentence: str) -> Number | None:
    verbs = list(STATES.finditer(sentence))
    starts, ends = [0, *(verb.end() for verb in verbs)], [*(verb.start() for verb in verbs), None]
    parts = [sentence[start:end] for start, end in zip(starts, ends, strict=True)]
    last = max((place for place, part in enumerate(parts) if re.search(r"\d", part)), default=0)
    if last and verbs[last - 1][0] == "=":
        parts[last] = parts[last].split(" than ")[0]  # 5 - 3 = 2 more than before
    number = _said(parts[last])[0] if last else quantity(sentence)
    if number is None and verbs and (verbs[0][0] == "=" or re.match(r"\s*(?:the|what|my|left)\b", parts[1])):
        last, number = 0, quantity(parts[0])  # 18 = 15 + 3, 18 is the total
    if number is None or _is_denied(sentence[: starts[last]]):
        return None
    sides = [_said(part) for part, verb in zip(parts, verbs, strict=False) if verb[0] == "="]
    is_false = any(side and not remark.strip() and not same_number(side, number) for side, remark in sides)
    return None if is_false else number


def subject_and_predicate(text: str) -> tuple[str, str]:
    """What a normalized text is about, if it is one sentence, and what its last sentence says that something is."""
    *others, sentence = _sentences(text) or [""]
    verbs = list(STATES.finditer(sentence))
    if not verbs:
        return "", sentence
    is_subject = not others and not re.search(r"\b(?:not|wrong|incorrect|false|or)\b|n't\b|[,;]", sentence)
    said = "" if _is_denied(sentence[: verbs[-1].start()]) else sentence[verbs[-1].end() :]
    return sentence[: verbs[0].start()].strip() if is_subject else "", said.strip()


# ---- Letters, expressions, words ----

LETTER = re.compile(
    r"(?<![\w'-])[A-J](?![\w'+#=-])(?!(?<=[AI]) (?!or\b|and\b|is\b)[a-z])"
)  # not the words "A" and "I"
UNCHOSEN = re.compile(
    r"\b(?:because|since)\b.*|\b[Nn]ot \(?[A-J]\b\)?|\(?\b[A-J]\)? (?:is|was|isn't) ?(?:not|wrong|incorrect|false)\b"
)
CHOSEN = re.compile(
    r"(?:^\W*|\b(?i:is|be|it's|choose|pick|select|say|think|so|answer)\b[\s:,(]*)(?i:the )?(?i:(?:option|choice|letter|answer)[\s:(]*)?"
    r"[(\[]?([A-J])(?:[)\]}>.,:;!\n]|$|\s[-(]|\sis (?:the|correct|right)\b)"
)
FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp sqrt min max gcd lcm mod det lim and"
OPERATOR = re.compile(r"[\\=<>^+*/|!(){}\[\]-]|(?<![\w.])\.?\d[\d.]*[a-zA-Z]")
NAME = re.compile(r"\s*\d+(?:-\d+)+\s*|.*\d[:_]\d.*|\s*\d+(?:[./]\d+){2,}\s*", re.DOTALL)  # of a range, a time, a date


def letter(text: str) -> str | None:
    """The letter of a choice that a normalized text as a whole is: `B`, `(b)`, `Option B`."""
    match = re.fullmatch(r"(?:[Oo]ption |[Cc]hoice )?(?:\(?([A-J])\)?|\(([a-j])\))[.:]?", text)
    return (match[1] or match[2]).upper() if match else None


def stated_letter(text: str) -> str | None:
    """The one letter that a normalized text begins with, or says that it is or chooses."""
    if small := re.fullmatch(r"(?:option |choice )?(?:([a-j])\.?|\(?([a-j])\)(?:[\s.].*)?)", text, re.DOTALL):
        return small[small.lastindex].upper()
    text = UNCHOSEN.sub("", text).strip(" \n\"'")
    chosen = CHOSEN.search(text)
    is_only = chosen and set(LETTER.findall(text)) == {chosen[1]}
    return chosen[1] if is_only and not _is_denied(text[: chosen.start()]) else None


def is_math(text: str) -> bool:
    """Whether a normalized text is an expression, an equation or a set: there is an operator and there are no words."""
    bare = re.sub(r"\\(?:begin|end)\{[a-z*]+\}|\\[a-zA-Z]+", " ", text)
    has_words = not set(re.findall(r"[^\W\d_]{3,}", bare)).issubset(FUNCTIONS.split())
    return bool(OPERATOR.search(text)) and not has_words and not NAME.fullmatch(text)


def as_words(text: str) -> str:
    """Text to compare: whatever its case, white space, first article, quotes and the punctuation around it."""
    text = re.sub(r"[\"']|(?<!\d)\.(?!\d)| (?=: ?\d)|(?<=:) (?=\d)", "", " ".join(text.casefold().split()))
    return re.sub(r"^(?:the|an?)\s+(?=\w)", "", text.strip(" .,;:?!()[]{}"))

"""Analyzers: text into terms, by a tokenizer and filters that a field's `analyzer_params` name as in Milvus.

The door to `regex`, whose classes follow Unicode, and to PyStemmer, the Snowball project's own binding of its stemmers.

    {"type": "standard" | "english"}                          built in; "stop_words": [...] may be given
    {"tokenizer": "standard" | "whitespace", "filter": [...]} made of parts; a part with options is {"type": name, ...}

| tokenizer  | a token is                                                                        |
|------------|-----------------------------------------------------------------------------------|
| standard   | letters and digits of any script, with their marks; all else stands between tokens |
| whitespace | what stands between white space                                                   |

| filter         | to each token                                                                       |
|----------------|-------------------------------------------------------------------------------------|
| lowercase      | capital letters become small                                                        |
| asciifolding   | letters that are ASCII letters with an accent, or joined, become these              |
| alphanumonly   | dropped unless all of it are ASCII letters and digits                               |
| cnalphanumonly | dropped unless all of it are Chinese characters, ASCII letters and digits           |
| cncharonly     | dropped unless all of it are Chinese characters                                     |
| removepunct    | dropped if all of it is punctuation                                                 |
| stop           | dropped if among `stop_words`; `_english_` among them stands for Lucene's 33 words  |
| length         | dropped if it has more than `max` characters, or fewer than `min`                   |
| stemmer        | reduced to its stem, in `language`                                                  |

Positions count tokens before filters drop any, so a phrase has gaps where stop words were.

What a text becomes must never change while rows are there that were written by it. So a field's schema keeps the number
of the rules it was made with (`VERSION`), and a node that does not know them refuses the field.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeAlias
from zlib import crc32

import orjson
import regex
import Stemmer

from storage.errors import InvalidParameter

VERSION: Final = 1
"""Of the rules here: another number for others."""
TERM_MAX: Final = (1 << 32) - 2
STOP_WORDS_MAX: Final = 4096
FILTERS_MAX: Final = 16
WORDS_REMEMBERED: Final = 1 << 14
"""Of an analyzer: what filters made of a token. Most texts have few words, and those are short."""
WORD_CHARS_REMEMBERED: Final = 40
ANALYZERS_REMEMBERED: Final = 32
"""With all their words, whoever chose them, below 150 MB."""
ENGLISH: Final = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with".split()
)
"""The stop words that Lucene and Milvus drop from English."""
_LANGUAGES: Final = frozenset(
    "arabic danish dutch english finnish french german greek hungarian italian norwegian portuguese romanian russian "
    "spanish swedish tamil turkish".split()
)
_TOKENIZERS: Final = {
    "standard": regex.compile(r"[\p{Alphabetic}\p{M}\p{N}]+", regex.V1),
    "whitespace": regex.compile(r"\S+", regex.V1),
}
_ELSEWHERE: Final = frozenset("jieba lindera icu language_identifier chinese decompounder regex".split())
_FOLDED: Final = {
    "ß": "ss", "ẞ": "SS", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "đ": "d", "Đ": "D",
    "ð": "d", "Ð": "D", "ł": "l", "Ł": "L", "þ": "th", "Þ": "TH", "\u0131": "i", "ħ": "h", "Ħ": "H", "ŧ": "t", "Ŧ": "T",
}  # fmt: skip
_ASCII_WORD: Final = regex.compile(r"[A-Za-z0-9]+")
_CHINESE: Final = regex.compile(r"\p{Han}+", regex.V1)
_CHINESE_OR_ASCII: Final = regex.compile(r"[\p{Han}A-Za-z0-9]+", regex.V1)
_PUNCTUATION: Final = regex.compile(r"[\p{P}\p{S}]+", regex.V1)

Filter: TypeAlias = Callable[[str], str]
"""Returns what becomes of a token, "" if it is dropped."""


@dataclass(frozen=True, slots=True)
class Token:
    """A term and where it stands."""

    term: str
    start: int
    """Of its text, in bytes of UTF-8."""
    end: int
    position: int
    """How many tokens stood before it, those that were dropped included."""


class Analyzer:
    """Turns text into terms. Any thread may use it."""

    def __init__(self, tokenizer: str, filters: Sequence[Filter]) -> None:
        self._pattern = _TOKENIZERS[tokenizer]
        self._filters = tuple(filters)
        self._remembered = lru_cache(WORDS_REMEMBERED)(self._apply)

    def _apply(self, word: str) -> str:
        for one in self._filters:
            word = one(word)
            if not word:
                break
        return word

    def _filtered(self, word: str) -> str:
        return self._remembered(word) if len(word) <= WORD_CHARS_REMEMBERED else self._apply(word)

    def terms(self, text: str) -> list[str]:
        """Return the terms of a text in their order."""
        filtered = self._filtered
        return [term for word in self._pattern.findall(text) if (term := filtered(word))]

    def placed(self, text: str) -> list[tuple[int, str]]:
        """Return (position, term) of each of its terms."""
        filtered = self._filtered
        return [(i, term) for i, word in enumerate(self._pattern.findall(text)) if (term := filtered(word))]

    def tokens(self, text: str) -> list[Token]:
        """Return its terms with all that is known of them."""
        found, at, at_bytes = [], 0, 0
        for position, match in enumerate(self._pattern.finditer(text)):
            start = at_bytes + len(text[at : match.start()].encode())
            end = start + len(match[0].encode())
            at, at_bytes = match.end(), end
            if term := self._filtered(match[0]):
                found.append(Token(term, start, end, position))
        return found


def term_number(term: str) -> int:
    """Return the number under which sparse vectors have the term: CRC-32 of its UTF-8, the greatest one lowered by 1.

    Terms with the same number, one pair in some 10,000 x 400,000, count as one.
    """
    return min(crc32(term.encode()), TERM_MAX)


@lru_cache(ANALYZERS_REMEMBERED)
def analyzer_of(params: str = "", version: int = VERSION) -> Analyzer:
    """Return the analyzer that `analyzer_params` describe, as JSON; nothing means standard.

    Raises InvalidParameter, also for rules of a version that is not known here.
    """
    if version != VERSION:
        raise InvalidParameter(f"version {version} of the analyzers is not known to this node, which has {VERSION}")
    if not params.strip():
        return Analyzer("standard", [str.lower])
    try:
        given = orjson.loads(params)
    except orjson.JSONDecodeError as error:
        raise InvalidParameter(f"analyzer_params are no JSON: {error}") from None
    if not isinstance(given, dict):
        raise InvalidParameter('analyzer_params are a JSON object, as in {"type": "english"}')
    if "type" in given:
        return _built_in(given)
    _only(given, ("tokenizer", "filter"), "analyzer_params")
    parts = given.get("filter", [])
    if not isinstance(parts, list) or len(parts) > FILTERS_MAX:
        raise InvalidParameter(f"filter of analyzer_params is a list of at most {FILTERS_MAX} filters")
    name, options = _named(given.get("tokenizer", "standard"), "tokenizer")
    if name not in _TOKENIZERS:
        raise _unknown("tokenizer", name, _TOKENIZERS)
    _only(options, (), f"tokenizer {name}")
    return Analyzer(name, [_filter(*_named(one, "filter")) for one in parts])


def _built_in(given: Mapping[str, Any]) -> Analyzer:
    name = given["type"]
    if name not in ("standard", "english"):
        raise _unknown("analyzer", name, ("standard", "english"))
    _only(given, ("type", "stop_words"), f"analyzer {name}")
    filters: list[Filter] = [str.lower]
    stop = given.get("stop_words", [])
    if name == "english":
        filters.append(_stemmer("english"))
        stop = ["_english_", *(stop if isinstance(stop, list) else [stop])]
    if stop:
        filters.append(_stop(stop))
    return Analyzer("standard", filters)


def _filter(name: str, options: Mapping[str, Any]) -> Filter:
    if name in _PLAIN:
        _only(options, (), f"filter {name}")
        return _PLAIN[name]
    if name == "stop":
        _only(options, ("stop_words",), "filter stop")
        return _stop(options.get("stop_words", []))
    if name == "stemmer":
        _only(options, ("language",), "filter stemmer")
        return _stemmer(options.get("language"))
    if name == "length":
        _only(options, ("min", "max"), "filter length")
        return _length(options.get("min", 0), options.get("max"))
    raise _unknown("filter", name, (*_PLAIN, "stop", "stemmer", "length"))


def _kept_if(pattern: Any, wanted: bool = True) -> Filter:
    return lambda word: word if (pattern.fullmatch(word) is not None) == wanted else ""


def _fold(word: str) -> str:
    if word.isascii():
        return word
    return "".join([_folded(one) for one in word])


def _folded(letter: str) -> str:
    """Return a letter without its accents if it is an ASCII one then, else as it is."""
    if letter in _FOLDED:
        return _FOLDED[letter]
    if "\u0300" <= letter <= "\u036f":  # an accent by itself
        return ""
    plain = "".join([one for one in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(one)])
    return plain if plain and plain.isascii() else letter


_PLAIN: Final[Mapping[str, Filter]] = {
    "lowercase": str.lower,
    "asciifolding": _fold,
    "alphanumonly": _kept_if(_ASCII_WORD),
    "cnalphanumonly": _kept_if(_CHINESE_OR_ASCII),
    "cncharonly": _kept_if(_CHINESE),
    "removepunct": _kept_if(_PUNCTUATION, False),
}


def _stop(given: Any) -> Filter:
    words = [given] if isinstance(given, str) else given
    if not isinstance(words, list) or not all(isinstance(one, str) for one in words) or len(words) > STOP_WORDS_MAX:
        raise InvalidParameter(f"stop_words of analyzer_params is a list of at most {STOP_WORDS_MAX} words")
    dropped = frozenset(words) - {"_english_"} | (ENGLISH if "_english_" in words else frozenset())
    return lambda word: "" if word in dropped else word


def _stemmer(language: Any) -> Filter:
    if language not in _LANGUAGES:
        raise _unknown("language of the stemmer", language, sorted(_LANGUAGES))
    stemmer = Stemmer.Stemmer(language, 0)  # without a memory of its own, which threads may not share
    return lambda word: str(stemmer.stemWord(word))


def _length(least: Any, most: Any) -> Filter:
    for one in (least, most):
        if one is not None and (not isinstance(one, int) or isinstance(one, bool) or one < 0):
            raise InvalidParameter(f"min and max of filter length are whole numbers from 0, got {str(one)[:40]}")
    if most is None and not least:
        raise InvalidParameter("filter length needs max, or min")
    return lambda word: word if least <= len(word) and (most is None or len(word) <= most) else ""


def _named(part: Any, what: str) -> tuple[str, Mapping[str, Any]]:
    if isinstance(part, str):
        return part, {}
    if isinstance(part, dict) and isinstance(part.get("type"), str):
        return part["type"], {key: value for key, value in part.items() if key != "type"}
    raise InvalidParameter(f"a {what} of analyzer_params is a name, or an object with its name as `type`")


def _only(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            takes = f"; it takes {', '.join(known)}" if known else ""
            raise InvalidParameter(f"{where}: option {str(key)[:80]} is not known{takes}")


def _unknown(what: str, name: Any, known: Any) -> InvalidParameter:
    why = "not supported by this server" if name in _ELSEWHERE else "unknown"
    return InvalidParameter(f"{what} {str(name)[:80]} of analyzer_params is {why}; there are: {', '.join(known)}")

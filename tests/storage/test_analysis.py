"""Analyzers: what texts become, what is refused."""

from __future__ import annotations

import pytest

from storage.analysis import analyzer_of, term_number
from storage.errors import InvalidParameter

SENTENCE = "The Milvus vector database is built for scale!"


@pytest.mark.parametrize(
    ("params", "text", "terms"),
    [
        ("", SENTENCE, "the milvus vector database is built for scale"),
        ('{"type": "standard"}', SENTENCE, "the milvus vector database is built for scale"),
        ('{"type": "standard", "stop_words": ["for"]}', SENTENCE, "the milvus vector database is built scale"),
        ('{"type": "english"}', "Milvus is a vector database built for scale!", "milvus vector databas built scale"),
        ('{"type": "english", "stop_words": ["built"]}', SENTENCE, "milvus vector databas scale"),
        ('{"tokenizer": "standard"}', SENTENCE, "The Milvus vector database is built for scale"),
        ('{"tokenizer": "whitespace"}', SENTENCE, "The Milvus vector database is built for scale!"),
        ('{"tokenizer": {"type": "whitespace"}, "filter": ["lowercase"]}', "A  b\tC\nd", "a b c d"),
        ('{"tokenizer": "standard", "filter": ["asciifolding"]}', "Café Ærø straße naïve", "Cafe AEro strasse naive"),
        ('{"tokenizer": "standard", "filter": ["asciifolding"]}', "हिन्दी 東京", "हिन्दी 東京"),
        ('{"tokenizer": "standard", "filter": ["alphanumonly"]}', "Milvus 2.0 中文 @ Scale café", "Milvus 2 0 Scale"),
        ('{"tokenizer": "whitespace", "filter": ["cncharonly"]}', "Milvus 中文 中a", "中文"),
        ('{"tokenizer": "whitespace", "filter": ["cnalphanumonly"]}', "Milvus 中文 中a é", "Milvus 中文 中a"),
        ('{"tokenizer": "whitespace", "filter": ["removepunct"]}', "what ? this... !?", "what this..."),
        ('{"tokenizer": "standard", "filter": [{"type": "length", "max": 5}]}', "short longer words", "short words"),
        ('{"filter": [{"type": "length", "min": 3}]}', "to be or not", "not"),
        ('{"filter": ["lowercase", {"type": "stop", "stop_words": ["of", "_english_"]}]}', "The state OF it", "state"),
        ('{"filter": [{"type": "stop", "stop_words": "_english_"}]}', "it is The one", "The one"),
        ('{"filter": [{"type": "stemmer", "language": "english"}]}', "running jumps easily", "run jump easili"),
        ("", "snake_case don't 3.14 e-mail", "snake case don t 3 14 e mail"),
        ("", "", ""),
        ("", " ?! ", ""),
    ],
)  # fmt: skip
def test_what_texts_become(params: str, text: str, terms: str) -> None:
    """Tokenizers and filters make of these texts what Milvus's documentation says they do."""
    assert analyzer_of(params).terms(text) == terms.split()


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ("{", "no JSON"),
        ("[]", "JSON object"),
        ('{"type": "klingon"}', "analyzer klingon of analyzer_params is unknown"),
        ('{"type": "chinese"}', "not supported by this server"),
        ('{"tokenizer": "jieba"}', "tokenizer jieba of analyzer_params is not supported"),
        ('{"tokenizer": 3}', "a tokenizer of analyzer_params is a name"),
        ('{"filter": "lowercase"}', "a list of at most"),
        ('{"filter": ["upper"]}', "filter upper of analyzer_params is unknown"),
        ('{"filter": [{"type": "stemmer", "language": "klingon"}]}', "language of the stemmer klingon"),
        ('{"filter": [{"type": "stop", "stop_words": [1]}]}', "stop_words"),
        ('{"filter": [{"type": "length"}]}', "needs max"),
        ('{"filter": [{"type": "length", "max": -1}]}', "whole numbers"),
        ('{"filters": []}', "option filters is not known"),
        ('{"type": "english", "filter": []}', "option filter is not known"),
    ],
)
def test_what_is_refused(params: str, said: str) -> None:
    """Parameters that cannot be meant are refused by the name of what is wrong with them."""
    with pytest.raises(InvalidParameter, match=said):
        analyzer_of(params)


def test_tokens_know_where_they_stand() -> None:
    """Offsets are bytes of the text, positions count what was dropped too."""
    tokens = analyzer_of('{"type": "english"}').tokens("Das Café is the state-of-the-art, été")
    assert [(one.term, one.position) for one in tokens] == [
        ("das", 0), ("café", 1), ("state", 4), ("art", 7), ("été", 8),
    ]  # fmt: skip
    text = "Das Café is the state-of-the-art, été".encode()
    assert [text[one.start : one.end].decode().lower() for one in tokens] == ["das", "café", "state", "art", "été"]


def test_all_ways_to_ask_agree() -> None:
    """Terms, terms with positions and tokens are the same, one after the other."""
    analyzer = analyzer_of('{"type": "english"}')
    text = "A man, a plan; the canals of Panama"
    assert [one.term for one in analyzer.tokens(text)] == analyzer.terms(text)
    assert [(one.position, one.term) for one in analyzer.tokens(text)] == analyzer.placed(text)


def test_numbers_of_terms_never_change() -> None:
    """A term's number is CRC-32, below the one that sparse vectors cannot have: rows on disk have these."""
    assert (term_number("milvus"), term_number("vector"), term_number("")) == (725768567, 460212315, 0)


def test_unknown_rules_are_refused() -> None:
    """A field that was made by rules of another version is not read by these."""
    with pytest.raises(InvalidParameter, match="version 2"):
        analyzer_of("", 2)

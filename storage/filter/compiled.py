"""The filter as others see it: compiled once, then asked for rows, keys, fields and what can be skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from storage.columns import Batch, Mask, Offsets
from storage.errors import FilterError
from storage.filter.caret import filter_error
from storage.filter.check import check
from storage.filter.evaluate import truth
from storage.filter.indexed import Indexed
from storage.filter.json_paths import Keys
from storage.filter.literals import is_unicode
from storage.filter.parser import parse
from storage.filter.printing import print_predicate
from storage.filter.pruning import FieldStats, PrimaryKeys, may_be_true, primary_keys
from storage.filter.reads import fields_of, has_words, paths_of
from storage.filter.syntax import Complaint
from storage.filter.tree import Always, Predicate
from storage.filter.values import Rows
from storage.schema import CollectionSchema, FieldSchema
from storage.types import FieldId


@dataclass(frozen=True, eq=False)
class CompiledFilter:
    """A checked filter. Immutable, so worker threads may evaluate one on many batches at once."""

    source: str
    predicate: Predicate
    schema: CollectionSchema
    indexed: frozenset[Indexed] = frozenset()
    """What has a scalar index."""

    @property
    def always_true(self) -> bool:
        return isinstance(self.predicate, Always) and self.predicate.truth is True

    def evaluate(self, batch: Batch, offsets: Offsets | None = None, part: Predicate | None = None) -> Mask:
        """Return the rows of the batch, or of those at `offsets` in that order, that the filter is true of.

        part  what to evaluate of the filter, if not all of it

        The batch holds the columns of `field_ids`; a nullable field without a column is null in every row.
        """
        return truth(self.predicate if part is None else part, Rows(batch, offsets, self._paths)).yes

    @cached_property
    def field_ids(self) -> frozenset[FieldId]:
        """The fields it reads."""
        return fields_of(self.predicate)

    @cached_property
    def has_words(self) -> bool:
        """Whether it asks for words of texts, of which there are lists."""
        return has_words(self.predicate)

    @cached_property
    def _paths(self) -> Mapping[FieldId, tuple[Keys, ...]]:
        return paths_of(self.predicate)

    @cached_property
    def text(self) -> str:
        """One way to write the checked filter: constants folded, templates filled in. It compiles to the same."""
        return print_predicate(self.predicate)

    def primary_keys(self) -> PrimaryKeys | None:
        """Return the only keys a row can have that it is true of, or None if that is no finite list."""
        return self._primary_keys

    @cached_property
    def _primary_keys(self) -> PrimaryKeys | None:
        return primary_keys(self.predicate, self.schema.primary)

    def keys_of(self, one: FieldSchema) -> PrimaryKeys | None:
        """Return the same of another field of Int64 or VarChar, such as the partition key."""
        return primary_keys(self.predicate, one)

    def may_match(self, stats: Mapping[FieldId, FieldStats]) -> bool:
        """Return False only if no row of a segment with these statistics can match; no statistics: True."""
        return may_be_true(self.predicate, stats)


def compile_filter(
    text: str,
    schema: CollectionSchema,
    params: Mapping[str, object] | None = None,
    indexed: frozenset[Indexed] = frozenset(),
) -> CompiledFilter:
    """Return the filter that the text says; blank text is the filter that is always true.

    params   values of the templates `{name}` in the text
    indexed  what has a scalar index
    Raises FilterError, whose message points at the place, for whatever is wrong with text or params.
    """
    if not isinstance(text, str):
        raise FilterError(f"cannot parse expression: a filter is text, not {type(text).__name__}")
    if not is_unicode(text):
        sound = text.encode("utf-8", "replace").decode()
        raise FilterError(f"cannot parse expression: {sound[:200]}, error: half of a surrogate pair in the text")
    if not text.strip():
        return CompiledFilter(text, Always(True), schema)
    try:
        return CompiledFilter(text, check(parse(text), schema, params or {}), schema, indexed)
    except Complaint as complaint:
        raise filter_error(text, complaint) from None


def everything(schema: CollectionSchema) -> CompiledFilter:
    """Return the filter that is always true."""
    return CompiledFilter("", Always(True), schema)

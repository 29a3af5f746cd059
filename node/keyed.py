"""Inserts that a client names: however often one comes, through any node, its rows are written once.

A key is `NAME/NUMBER`, such as an import and the place of a batch in it; without a number it is 0. The name, together
with the collection, is a producer of the shards' logs for each virtual channel, the number its sequence: what a shard
remembers of those (`cluster.machine`) tells repeats. Too late a repeat is refused as of unknown outcome, never made.

A repeat must put every row into the shard that it was in before, so keys that the database gives (autoID) follow from
the name: 62 bits of a digest, plus the row's place. Two batches of a thousand million rows in all share one with a
chance of less than one in a thousand million.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import numpy as np
import numpy.typing as npt

from storage.errors import InvalidParameter
from storage.types import CollectionId

NUMBER_MAX: Final = (1 << 62) - 1


@dataclass(frozen=True)
class InsertKey:
    name: str
    number: int

    @classmethod
    def parse(cls, text: str) -> InsertKey:
        """Raises InvalidParameter if the number is too large."""
        name, slash, digits = text.rpartition("/")
        if not (slash and name and digits.isascii() and digits.isdigit()):
            return cls(text, 0)
        if len(digits) > 18:
            raise InvalidParameter(f"the number at the end of the idempotency key {text[:80]} has at most 18 digits")
        return cls(name, int(digits))

    def producer(self, collection_id: CollectionId, channel: int) -> str:
        """Return who writes a batch of this name to a virtual channel of the collection."""
        digest = blake2b(f"{collection_id}/{channel}/{self.name}".encode(), digest_size=12)
        return f"key/{digest.hexdigest()}"

    def ids(self, collection_id: CollectionId, rows: int) -> npt.NDArray[np.int64]:
        """Return the primary keys of the batch's rows where the database gives them."""
        digest = blake2b(f"{collection_id}/{self.name}/{self.number}".encode(), digest_size=8).digest()
        return np.arange(rows, dtype=np.int64) + (int.from_bytes(digest, "little") & NUMBER_MAX)

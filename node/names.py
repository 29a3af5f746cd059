"""Names of collections as this node's copy of the catalogue has them, and the newest one where that may differ.

The copy may be a moment behind. What it does not know, and what a shard has under another id, is looked up again in the
newest catalogue before the client hears of it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

from cluster.catalog import Collection
from storage.errors import (
    AnnulusError,
    BadRequest,
    CollectionNotFound,
    CollectionNotLoaded,
    Conflict,
    FieldNotFound,
    NoLeader,
    PartitionNotFound,
    PartitionNotLoaded,
    SchemaMismatch,
)

if TYPE_CHECKING:
    from node.node import Node

SURE_S: Final = 3.0
"""For how long an answer that must be sure waits for the newest catalogue: longer than an election takes."""
NO_CATALOGUE: Final = "the newest catalogue cannot be had: try again soon"
GONE: Final = (CollectionNotFound, PartitionNotFound)
MAY_BE_OLD: Final = (*GONE, CollectionNotLoaded, PartitionNotLoaded, FieldNotFound)
"""What an old copy of the catalogue says of what has come to be since."""

T = TypeVar("T")


class Names:
    """The look-ups of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def exists(self, database: str, name: str) -> bool:
        """Raises NoLeader if nobody can tell it: an old copy is no answer."""
        if not await self._node.router.refresh_catalog(patience_s=SURE_S):
            raise NoLeader(f"whether collection {name} exists cannot be told: {NO_CATALOGUE}")
        catalog = self._node.catalog
        catalog.database(database)
        return (database, name) in catalog.names or (database, name) in catalog.aliases

    async def find(self, database: str, name: str) -> Collection:
        """Return the collection of this name; one that is not known here is looked up in the newest catalogue.

        Raises NoLeader rather than say of a name that it is not there when this copy of the catalogue may be old.
        """
        try:
            return self._node.catalog.find(database, name)
        except BadRequest as unknown:
            if self._node.mesh is None:
                raise
            if not await self._node.router.refresh_catalog():
                raise _unsure(unknown) from None
            return self._node.catalog.find(database, name)

    async def newest(self, database: str, name: str) -> Collection:
        """Return the collection as the newest catalogue that can be had knows it. Raises NoLeader like `find`."""
        is_newest = await self._node.router.refresh_catalog()
        try:
            return self._node.catalog.find(database, name)
        except BadRequest as unknown:
            if is_newest:
                raise
            raise _unsure(unknown) from None

    async def use(
        self,
        database: str,
        name: str,
        work: Callable[[Collection], Awaitable[T]],
        refused: tuple[type[AnnulusError], ...] = (BadRequest, SchemaMismatch),
    ) -> T:
        """Return `work(collection)`; what is refused once is tried again if the newest catalogue says otherwise.

        refused  what may come of an old copy of the catalogue; for writes only what says that nothing was written
        """
        found = await self.find(database, name)
        try:
            return await work(found)
        except refused as error:
            if self._node.mesh is None and not isinstance(error, SchemaMismatch):
                raise
            if not await self._node.router.refresh_catalog():
                if isinstance(error, MAY_BE_OLD):
                    raise _unsure(error) from None
                raise
            again = self._node.catalog.find(database, name)
            if again == found:
                raise
            replaced = again.collection_id != found.collection_id
            if refused is GONE and replaced and again.schema != found.schema:  # for which the rows were decoded
                raise Conflict(f"collection {name} was replaced by another one meanwhile; try again") from None
            return await work(again)


def _unsure(unknown: BadRequest) -> NoLeader:
    """Return what to say of a name that this node does not know while nobody can tell it whether that is still so."""
    return NoLeader(f"{unknown.message} as far as this node knows; {NO_CATALOGUE}")

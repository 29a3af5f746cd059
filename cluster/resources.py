"""What a change of the catalogue holds while it is made: the cluster, a database or a name, shared or alone.

Two changes conflict if both hold one resource and not both share it. The open tasks of the catalogue hold theirs, on
every replica: that is what keeps them apart. The broadcaster's queue (`node/key_locks.py`) only lets callers wait for
their turn rather than be refused. (Spec: streaming, R-CO-7.)

A name is that of a collection or an alias, which share one space; so changes of aliases and renames hold the names that
they are about, and not their whole database: a change that waits for a shard holds up nobody in another collection.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple


class Domain(StrEnum):
    """In the order in which resources are taken."""

    CLUSTER = "1 cluster"
    DATABASE = "2 database"
    NAME = "3 name"


class Resource(NamedTuple):
    domain: Domain
    database: str = ""
    name: str = ""


class Hold(NamedTuple):
    """A resource, and whether it is held alone."""

    resource: Resource
    alone: bool


Holds = tuple[Hold, ...]
"""Each resource once, in the order in which they are taken."""

WHOLE_CLUSTER = Hold(Resource(Domain.CLUSTER), alone=True)
_ANY_CLUSTER = Hold(Resource(Domain.CLUSTER), alone=False)


def holds(wanted: Iterable[Hold]) -> Holds:
    """Return what is held for these: sorted, each resource once, alone if any says so, and the cluster with others."""
    chosen: dict[Resource, bool] = {}
    for resource, alone in (_ANY_CLUSTER, *wanted):
        chosen[resource] = chosen.get(resource, False) or alone
    return tuple(Hold(resource, chosen[resource]) for resource in sorted(chosen))


def of_names(*names: tuple[str, str]) -> Holds:
    """Return what a change of these (database, name) holds: the names alone, their databases with others."""
    wanted = [Hold(Resource(Domain.DATABASE, database), alone=False) for database, _ in names]
    return holds([*wanted, *(Hold(Resource(Domain.NAME, *one), alone=True) for one in names)])


def of_database(database: str) -> Holds:
    """Return what a change of a database holds."""
    return holds([Hold(Resource(Domain.DATABASE, database), alone=True)])


def conflict(some: Holds, others: Holds) -> bool:
    """Return whether two changes may not be made at the same time."""
    held = dict(others)
    return any(resource in held and (alone or held[resource]) for resource, alone in some)

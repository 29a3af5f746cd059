"""Damaged data set aside, so that a node comes back as one that forgot and takes everything from its peers.

What is left of a damaged journal is not used: a vote or an entry may be among what is gone, and a node that voted or
confirmed twice could lose what was acknowledged. The directory that replaces it remembers one thing, that its node is
no new one (`Identity.is_seated`); from there `node/forming.py` and the snapshots of the others do the rest.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from node.disk import OsDisk
from node.identity import IDENTITY_KEY, Identity, settle
from node.settings import Settings
from storage.chunks import LevelDbChunks
from storage.errors import ChunkDamaged, JournalDamaged

log = logging.getLogger(__name__)

DAMAGE: Final = (JournalDamaged, ChunkDamaged)
"""What peers can make good; any other fault needs a person."""
PARTS: Final = ("journal", "chunks")


def advice(settings: Settings) -> str:
    """Return what to do about damaged data."""
    if not settings.node.has_peers:
        return " Keep a copy of the data directory, then restore it from a backup."
    return (
        " Start this node with --cluster-repair-from-peers true: it moves its data aside and takes everything from its "
        "peers. Do not give it an old copy."
    )


def set_aside(settings: Settings) -> str:
    """Move journal and chunks of the data directory into a new directory beside them; return its path.

    Raises OSError or StorageFault if that cannot be done, or if the directory is not this node's at all. A crash in
    the middle leaves a directory that is refused as damaged again, or one of a node that forgot.
    """
    data, disk = Path(settings.node.data), OsDisk()
    identity = _identity(data, settings).unseated()
    aside = _fresh(data)
    disk.make_directory(str(aside))
    for part in PARTS:
        if (data / part).exists():
            (data / part).rename(aside / part)
    for directory in (aside, data):
        disk.sync_directory(str(directory))
    for part in PARTS:
        disk.make_directory(str(data / part))
    store = LevelDbChunks.open(str(data / "chunks"))
    try:
        store.commit([(IDENTITY_KEY, identity.to_bytes())])
    finally:
        store.close()
    log.warning("damaged data moved aside directory=%s: remove it when this node is whole again", aside)
    return str(aside)


def _identity(data: Path, settings: Settings) -> Identity:
    """Return what is known of the directory's owner; who is new knows no cluster, and asks for it."""
    try:
        store = LevelDbChunks.open(str(data / "chunks"))
    except ChunkDamaged:
        return settle(None, settings.node)
    try:
        raw = store.read(IDENTITY_KEY)
    except ChunkDamaged:
        raw = None
    finally:
        store.close()
    return settle(raw, settings.node)


def _fresh(data: Path) -> Path:
    number = 1
    while (data / f"damaged-{number}").exists():
        number += 1
    return data / f"damaged-{number}"

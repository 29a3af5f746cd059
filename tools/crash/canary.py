"""Lies on purpose: each canary breaks one promise behind the model's back, and the checker has to say which.

A checker that never fails proves nothing. These run against the real node after a few honest rounds.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from tools.crash.model import Kind, Model, Write
from tools.crash.rounds import Arena, client_of
from tools.crash.rows import Key, row

HONEST_ROUNDS = 2
FLIP_EVERY_BYTES = 4096
FLIPPED_BYTES_MIN = 16_384
FLIPPED_FILES_MAX = 6
Sabotage = Callable[[Arena, Model, random.Random], None]


async def run_canaries(arena: Arena, say: Callable[[str], None]) -> list[str]:
    """Return the names of the canaries that were not noticed, after some honest rounds."""
    chance = random.Random(f"{arena.seed}/canary")
    try:
        await arena.start(chance)
        for number in range(1, HONEST_ROUNDS + 1):
            if arena.sound:
                await arena.round(number)
        if not arena.sound:
            say("an honest round failed, so the canaries prove nothing")
            for violation in arena.world.violations:
                say(f"  {violation}")
            return ["honest rounds"]
        missed = [name for name, (kind, sabotage) in CANARIES.items()
                  if not await _noticed(arena, name, kind, sabotage, chance, say)]  # fmt: skip
        arena.node.kill()  # not gently: then the logs are not empty
        return missed + [name for name in _largest_files(arena.data_dir) if not _damage_noticed(arena, name, say)]
    finally:
        arena.node.kill()


async def _noticed(
    arena: Arena, name: str, kind: Kind, sabotage: Sabotage, chance: random.Random, say: Callable[[str], None]
) -> bool:
    subject = "crash_auto" if name == "doubled" else "crash_two"  # else the primary key may forbid it, rightly
    sabotage(arena, arena.world.models[subject], chance)
    arena.world.violations.clear()
    await arena.compare(chance)
    kinds = {str(violation.kind) for violation in arena.world.violations}
    arena.world.violations.clear()
    say(f"canary {name}: {'noticed' if kind in kinds else 'MISSED'}, said {', '.join(sorted(kinds)) or 'nothing'}")
    return kind in kinds


def _lose(arena: Arena, model: Model, chance: random.Random) -> None:
    """An acknowledged row is deleted without the model's knowledge."""
    _call(arena, model, "/entities/delete", filter=model.subject.filter_of([_some_key(model, chance)]))


def _haunt(arena: Arena, model: Model, chance: random.Random) -> None:
    """A row that the model knows as deleted is there."""
    key = _some_key(model, chance)
    version = model.rows.pop(key)
    model.gone[key] = version


def _age(arena: Arena, model: Model, chance: random.Random) -> None:
    """The model remembers a later version than the node has."""
    model.rows[_some_key(model, chance)] = next(arena.world.numbers)


def _double(arena: Arena, model: Model, chance: random.Random) -> None:
    """A row is inserted a second time."""
    key = _some_key(model, chance)
    _call(arena, model, "/entities/insert", data=[row(model.subject, key, model.rows[key])])


def _halve(arena: Arena, model: Model, chance: random.Random) -> None:
    """Half of the rows of a request that nobody answered are there."""
    number = next(arena.world.numbers)
    keys = [max(model.rows, default=0) + 1 + i for i in range(20)]
    _call(arena, model, "/entities/insert", data=[row(model.subject, key, number) for key in keys[:10]])
    model.lose_sight(Write(number, dict.fromkeys(keys, number)))


def _damage(arena: Arena, model: Model, chance: random.Random) -> None:
    """One value of a row changes, its version does not."""
    key = _some_key(model, chance)
    changed = {**row(model.subject, key, model.rows[key]), "number": 0.5}
    _call(arena, model, "/entities/upsert", data=[changed])


def _forget_a_collection(arena: Arena, model: Model, chance: random.Random) -> None:
    """A collection that was acknowledged is not there."""
    arena.world.scratch["crash_scratch_never_made"] = True


CANARIES: Mapping[str, tuple[Kind, Sabotage]] = {
    "lost": (Kind.LOST, _lose),
    "ghost": (Kind.GHOST, _haunt),
    "stale": (Kind.STALE, _age),
    "doubled": (Kind.DOUBLED, _double),
    "half": (Kind.HALF, _halve),
    "damaged": (Kind.DAMAGED, _damage),
    "catalogue": (Kind.CATALOGUE, _forget_a_collection),
}


def _some_key(model: Model, chance: random.Random) -> Key:
    return chance.choice(sorted(model.rows))


def _call(arena: Arena, model: Model, path: str, **body: Any) -> None:
    client_of(arena).call(path, collectionName=model.subject.name, **body)


def _largest_files(folder: str) -> list[str]:
    """Return the largest files below a folder that are worth damaging, as paths within it."""
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
    large = sorted((path for path in paths if os.path.getsize(path) >= FLIPPED_BYTES_MIN), key=os.path.getsize)
    return [os.path.relpath(path, folder) for path in large[-FLIPPED_FILES_MAX:]]


def _damage_noticed(arena: Arena, name: str, say: Callable[[str], None]) -> bool:
    """Return whether `node check` finds fault with a copy of the directory in which one file has flipped bits."""
    copy = os.path.join(arena.folder, "flipped")
    shutil.copytree(arena.data_dir, copy)
    _flip_bytes(os.path.join(copy, name))
    arena.world.trace.write("flipped bytes", file=name)
    noticed = not arena.check(copy)
    arena.world.violations.clear()
    shutil.rmtree(copy)
    say(f"canary flipped bytes in {name}: {'noticed' if noticed else 'MISSED'}")
    return noticed


def _flip_bytes(path: str) -> None:
    """Change one byte in each few KiB of a file: what a disk does without a word.

    One alone could fall on rows that are deleted but not yet cleared away, which nobody has to read.
    """
    with open(path, "r+b") as file:
        for at in range(FLIP_EVERY_BYTES // 2, os.path.getsize(path), FLIP_EVERY_BYTES):
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0x40]))

"""The project's own Python environment: found, made, repaired; standard library only.

The file must be readable by any Python 3.7+, so that an old one can say which Python is wanted instead of showing a
syntax error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator  # noqa: UP035

PROJECT = Path(__file__).resolve().parent.parent
ENVIRONMENT = PROJECT / ".venv"
STAMP = "annulus-stamp.json"
SUPPORTED = ((3, 12), (3, 11))
"""Newest first; plyvel ships no wheel for 3.13 yet, and building it needs LevelDB's headers."""


class Failure(Exception):
    """The command cannot go on; the message is all a person needs to see."""


def choose_python(own_version: tuple[int, ...], own_path: str, find: Callable[[tuple[int, int]], str | None]) -> str:
    """Return the path of a supported Python: this one if it will do, else the newest that `find` finds."""
    if own_version[:2] in SUPPORTED:
        return own_path
    for version in SUPPORTED:
        found = find(version)
        if found is not None:
            return found
    have = ".".join(map(str, own_version[:2]))
    reason = (
        "plyvel, which stores the data, has no wheel for 3.13 yet"
        if own_version[:2] >= (3, 13)
        else "older ones lack what the code uses"
    )
    raise Failure(
        f"Annulus needs Python 3.11 or 3.12; this is Python {have}, and the PATH has neither python3.12 nor python3.11"
        f" ({reason}). Install one of them and run this again."
    )


def find_python(version: tuple[int, int]) -> str | None:
    """Return the path of a Python of this version on the PATH, or None.

    Each is run rather than only found: version managers put names on the PATH that lead to nothing.
    """
    for directory in os.environ.get("PATH", os.defpath).split(os.pathsep):
        path = os.path.join(directory, "python{}.{}".format(*version))
        if os.access(path, os.X_OK) and version_of(path) == version:
            return path
    return None


def version_of(python: str) -> tuple[int, ...] | None:
    """Return (major, minor) of an interpreter; None if it does not run."""
    question = "import sys; print(*sys.version_info[:2])"
    try:
        answer = subprocess.run([python, "-c", question], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30)
        return tuple(map(int, answer.stdout.split())) if answer.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def stamp_of(python_version: str, extras: str) -> dict[str, str]:
    """Return what an environment was made from: equal stamps need no second installation."""
    wanted = (PROJECT / "setup.cfg").read_bytes()
    return {
        "setup": hashlib.sha256(wanted).hexdigest(),
        "project": str(PROJECT),  # an environment does not survive being moved
        "python": python_version,
        "extras": extras,
    }


def is_made(stamp: dict[str, str], environment: Path = ENVIRONMENT) -> bool:
    """Return whether the environment was made to its end from the same stamp; `dev` includes all that demo needs."""
    try:
        found = json.loads((environment / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (environment / "bin" / "python").exists() and found in (stamp, {**stamp, "extras": "dev"})


def make_environment(extras: str) -> Path:
    """Return the environment's Python, making or repairing the environment first if need be.

    extras  "" for what a node needs, "dev" for the tests' tools too

    A stamp is written last, so an installation that was interrupted is taken up again; what is there already is kept.
    """
    chosen = choose_python(sys.version_info[:2], sys.executable, find_python)
    version = version_of(chosen) if chosen != sys.executable else sys.version_info[:2]
    stamp = stamp_of(".".join(map(str, version or ())), extras)
    python = ENVIRONMENT / "bin" / "python"
    with _alone():
        if is_made(stamp):
            return python
        if version_of(str(python)) != version or not _runs(python, "-c", "import pip"):
            shutil.rmtree(ENVIRONMENT, ignore_errors=True)
            say(f"making the environment {ENVIRONMENT} with {chosen}")
            _make_venv(chosen)
        if (ENVIRONMENT / STAMP).exists():
            (ENVIRONMENT / STAMP).unlink()
        _install(python, extras)
        unfinished = ENVIRONMENT / (STAMP + ".new")
        unfinished.write_text(json.dumps(stamp), encoding="utf-8")
        unfinished.replace(ENVIRONMENT / STAMP)
    return python


def _make_venv(python: str) -> None:
    made = subprocess.run(
        [python, "-m", "venv", str(ENVIRONMENT)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=str(PROJECT)
    )
    if made.returncode == 0:
        return
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    said = made.stdout.decode(errors="replace").strip()
    if "ensurepip" in said or "No module named venv" in said:
        raise Failure(
            "this Python cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv"
            " (or python3.11-venv, python3.12-venv), then run this again."
        )
    raise Failure(f"the environment could not be made:\n{tail(said)}")


def _install(python: Path, extras: str) -> None:
    say("installing the dependencies; the first time this takes a minute or two")
    target = f"{PROJECT}[{extras}]" if extras else str(PROJECT)
    log = ENVIRONMENT / "install.log"
    command = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "-e", target]
    with open(str(log), "wb") as output:
        installed = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd=str(PROJECT))
    if installed.returncode != 0:
        raise Failure(explain_installation(log.read_text(encoding="utf-8", errors="replace"), log))


def explain_installation(said: str, log: Path) -> str:
    """Return why an installation failed, as far as its output tells, and where to read more."""
    no_network = ("Temporary failure in name resolution", "NewConnectionError", "Name or service not known",
                  "Network is unreachable", "ProxyError", "ConnectTimeoutError", "nodename nor servname",
                  "Failed to establish a new connection")  # fmt: skip
    if any(sign in said for sign in no_network):
        return (
            "the dependencies could not be downloaded: there is no way to the package index from here. Check the"
            f" network, or pip's proxy and index settings, and run this again; what is there is kept. Details: {log}"
        )
    if "No space left on device" in said:
        return f"the disk is full: the environment needs about 1 GB in {ENVIRONMENT}. Details: {log}"
    return f"the dependencies could not be installed:\n{tail(said)}\nDetails: {log}"


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold the project's directory while the environment is made: two commands at once would spoil it."""
    import fcntl

    handle = os.open(str(PROJECT), os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _runs(python: Path, *arguments: str) -> bool:
    try:
        return subprocess.run([str(python), *arguments], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def say(text: str) -> None:
    """Tell the person what goes on; standard output is kept for results."""
    print(text, file=sys.stderr, flush=True)


def tail(text: str, lines: int = 15) -> str:
    return "\n".join("    " + line for line in text.rstrip().splitlines()[-lines:])

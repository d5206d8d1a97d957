"""Artefacts: the one way to put a file in place, and the manifest that vouches for a set of files.

``commit`` writes to a temporary file in the target's folder, flushes, fsyncs, reads back, renames, and fsyncs the
folder. Nothing partial is ever visible under a final name; a failed commit leaves the previous file as it was.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from medseg.errors import EnvironmentFailure, IntegrityError, OwnershipError, Problem

TEMPORARY_PREFIX = ".medseg-"
TEMPORARY_SUFFIX = ".tmp"
_TURN_S = 0.1
LOCK_NAME = ".medseg.lock"

_FLUSHING = 4  # files at the same time, which wait for the disk together

Writer = Callable[[Path], None]


def commit(path: Path, content: bytes | Writer, verify: Callable[[Path], None] | None = None) -> str:
    """Put ``content`` in place at ``path`` atomically and return its SHA-256 (hex).

    Args:
        path: final name; parent folders are created.
        content: the bytes, or a function that writes the temporary path it is given (it keeps the suffixes of
            ``path``, for libraries that choose the format by name).
        verify: called with the temporary path before the rename; raises to refuse the artefact.

    Raises:
        EnvironmentFailure: E0501 not writable, E0502 no space. The previous file at ``path`` is untouched.
        IntegrityError: E0701 what was read back differs from what was written.
    """
    path = Path(path)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}{TEMPORARY_SUFFIX}{''.join(path.suffixes[-2:])}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            with temporary.open("xb") as file:
                file.write(content)
        else:
            content(temporary)
        _fsync(temporary)
        digest = sha256_of(temporary)
        if isinstance(content, bytes) and digest != hashlib.sha256(content).hexdigest():
            raise IntegrityError(Problem("E0701", f"{path.name} read back differently", "", "check the disk"))
        if verify is not None:
            verify(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except OSError as error:
        raise environment_failure(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return digest


def commit_all(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Put several files in place, each atomically, the last one last.

    They are written, flushed and read back at the same time, so that their fsyncs are waited for once; then they are
    renamed in order. After a failure or a kill the first of them may be in place, the last only if all are.

    Args:
        folder: of all; created if it is not there.
        contents: bytes by name, in order.

    Raises:
        EnvironmentFailure: E0501 not writable, E0502 no space.
        IntegrityError: E0701 what was read back differs from what was written.
    """
    with staging(folder) as stage:
        for name, content in contents.items():
            stage.write(name, content)
        stage.commit(contents)


class Stage:
    """Files that are written, flushed and read back under temporary names, to be put in place together."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self._folder, self._pool = folder, pool
        self._staged: dict[str, tuple[Path, Future[None]]] = {}

    def write(self, name: str, content: bytes) -> None:
        """Begin to write the file that will be called ``name``; ``commit`` waits for it and raises what went wrong."""
        temporary = self._folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}{TEMPORARY_SUFFIX}"
        self._staged[name] = temporary, self._pool.submit(_stage, temporary, content, name)

    def commit(self, names: Iterable[str]) -> None:
        """Give the files their names, one after the other, when all are written.

        Raises:
            EnvironmentFailure: E0501 not writable, E0502 no space.
            IntegrityError: E0701 what was read back differs from what was written.
        """
        for _, written in self._staged.values():
            written.result()
        for name in names:
            with _telling_of(self._folder / name):
                self._staged[name][0].replace(self._folder / name)
        with _telling_of(self._folder):
            _fsync(self._folder)

    def discard(self) -> None:
        """Remove what has not got its name."""
        for temporary, _ in self._staged.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Stage]:
    """A ``Stage`` in ``folder``, which is created if it is not there; what is not committed in the block is removed.

    Several files are flushed at the same time, and while others are still made.

    Raises:
        EnvironmentFailure: E0501 the folder cannot be created.
    """
    folder = Path(folder)
    with _telling_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(_FLUSHING)
    stage = Stage(folder, pool)
    try:
        yield stage
    finally:
        pool.shutdown()
        stage.discard()


@contextlib.contextmanager
def _telling_of(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block into what it means for ``path``."""
    try:
        yield
    except OSError as error:
        raise environment_failure(error, path) from error


def _stage(temporary: Path, content: bytes, name: str) -> None:
    with _telling_of(temporary.parent / name):
        with temporary.open("xb") as file:
            file.write(content)
        _fsync(temporary)
        same = _holds(temporary, content)
    if not same:
        raise IntegrityError(Problem("E0701", f"{name} read back differently", "", "check the disk"))


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file has exactly these bytes."""
    view, size = memoryview(content), 2**20
    with path.open("rb") as file:
        same = all(file.read(size) == view[start : start + size].tobytes() for start in range(0, len(content), size))
        return same and not file.read(1)


def environment_failure(error: OSError, path: Path) -> EnvironmentFailure:
    """The ``EnvironmentFailure`` that tells what an ``OSError`` while writing ``path`` means."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return EnvironmentFailure(Problem("E0502", f"no space left to write {path.name}", "", "free space, run again"))
    reason = error.strerror or str(error)
    return EnvironmentFailure(Problem("E0501", f"cannot write {path}: {reason}", "", "choose a writable folder"))


def commit_json(path: Path, value: Any) -> str:
    """Commit ``value`` as strict JSON (no NaN), keys in the order given."""
    return commit(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Strict, readable JSON with a final newline."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """SHA-256 (hex) of a JSON value in canonical form: equal values have equal hashes."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def sweep(folder: Path) -> None:
    """Remove what killed processes left behind in ``folder`` (only our own temporary names)."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(TEMPORARY_PREFIX) and TEMPORARY_SUFFIX in path.name:
                with contextlib.suppress(OSError):
                    path.unlink()


@contextlib.contextmanager
def owned(folder: Path, *below: str) -> Iterator[None]:
    """Own ``folder`` while the block runs: a second process gets ``OwnershipError`` instead of a race.

    The lock is a file created with ``O_EXCL`` that names host, process and its start; the lock of a process that
    is dead on this host is taken over, one of another host never is. What killed processes left half written is
    removed first, from ``folder`` and from its subfolders that match the globs ``below``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise environment_failure(error, folder) from error
    lock = folder / LOCK_NAME
    mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "start": _process_start(os.getpid())})
    for _ in range(2):
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            _take_over_if_dead(lock)
            continue
        except OSError as error:
            raise environment_failure(error, folder) from error
        with os.fdopen(descriptor, "w") as file:
            file.write(mine)
        break
    else:
        raise OwnershipError(Problem("E0901", f"{folder} is in use", "", "wait for the other process"))
    try:
        for own in (folder, *(path for glob in below for path in folder.glob(glob))):
            sweep(own)
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()


@contextlib.contextmanager
def owned_in_turn(folder: Path, patience_s: float = 3600.0) -> Iterator[None]:
    """``owned``, after whoever owns ``folder`` now; ``OwnershipError`` if that lasts longer than ``patience_s``."""
    give_up = time.monotonic() + patience_s
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(owned(folder))
                break
            except OwnershipError:
                if time.monotonic() >= give_up:
                    raise
                time.sleep(_TURN_S)
        yield


def _take_over_if_dead(lock: Path) -> None:
    try:
        owner = json.loads(lock.read_text())
        host, pid, start = str(owner["host"]), int(owner["pid"]), owner["start"]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, OSError):
        host, pid, start = "unknown", -1, None
    if host == socket.gethostname() and _process_start(pid) != start:
        lock.unlink(missing_ok=True)
        return
    raise OwnershipError(
        Problem(
            "E0901",
            f"{lock.parent} is in use by process {pid} on {host}",
            "",
            f"wait for it, or remove {lock} if that process is gone",
        )
    )


def _process_start(pid: int) -> str | None:
    """A string that identifies a running process beyond its number, or None if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return "alive"
    return "alive"

"""nnU-Net's checkpoints: read without running anything that they say, and written.

A ``.pth`` file is a zip archive of raw tensors and one pickle that says how they belong together. A pickle is a
program. It is read by torch's restricted interpreter (``weights_only=True``) with the few names that nnU-Net's own
files hold added to it, after the archive's table of contents and the pickle's names have been looked at. There is no
other way in.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg.artefacts import commit
from medseg.errors import InputError, IntegrityError, Problem

MAX_BYTES = 16 * 2**30
MAX_PICKLE_BYTES = 64 * 2**20
MAX_MEMBERS = 100_000
NAMES = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What prediction needs of a checkpoint; ``mirror_axes`` () also where nnU-Net would not mirror."""

    weights: dict[str, Tensor]
    trainer: str
    configuration: str
    mirror_axes: tuple[int, ...]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read ``checkpoint_*.pth``; the tensors stay in the file until they are used.

    Raises:
        IntegrityError: E0701 damaged; E0710 the pickle calls what weights do not need, the archive is no plain archive
            of tensors, or is too large; E0711 what nnU-Net stores is not in it.
        InputError: E0100, E0106 it cannot be read.
    """
    _check_archive(path)
    try:
        unsafe = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))) - set(NAMES))
        if unsafe:
            raise _unsafe(path, f"its pickle asks for {', '.join(name[:120] for name in unsafe[:5])}")
        with torch.serialization.safe_globals(_allowed()):
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except IntegrityError:
        raise
    except OSError as error:
        raise InputError(
            Problem("E0106", f"cannot read {path.name}: {error.strerror}", "", "check the file")
        ) from error
    except Exception as error:  # the interpreter of a hostile pickle fails in any way; it ran none of it
        reason = " ".join(str(error).split())[:160]
        damaged = Problem("E0701", f"{path.name} cannot be read: {reason}", "", "get it again")
        raise IntegrityError(damaged) from error
    return _checked(value, path.name)


def write_checkpoint(path: Path, weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Commit a checkpoint that nnU-Net predicts with; ``settings`` are its other entries, of plain Python types."""
    value = {"network_weights": dict(weights), **settings}
    commit(path, lambda temporary: torch.save(value, temporary))


def _allowed() -> list[Any]:
    """Numbers of numpy, which nnU-Net's log holds; its types are classes of their own."""
    numpy_scalar: Any = np.float64(0).__reduce__()[0]
    types = {type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")}
    return [(numpy_scalar, NAMES[0]), (numpy_scalar, NAMES[1]), np.dtype, *types]


def _check_archive(path: Path) -> None:
    """Look at the table of contents: stored as it is, nothing but one pickle and raw data, not too much of it."""
    with _archive(path) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS or sum(member.file_size for member in members) > MAX_BYTES:
            raise _unsafe(path, f"{len(members)} members, more than {MAX_MEMBERS}, or over {MAX_BYTES >> 30} GiB")
        names = [PurePosixPath(member.filename) for member in members]
        for member, name in zip(members, names, strict=True):
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise _unsafe(path, f"member {member.filename[:80]!r} is packed or encrypted")
            if name.name.endswith(".pkl") and (name.name != "data.pkl" or member.file_size > MAX_PICKLE_BYTES):
                raise _unsafe(path, f"member {member.filename[:80]!r} is no part of weights, or too large")
            if name.suffix == ".py" or "code" in name.parts:
                raise _unsafe(path, f"member {member.filename[:80]!r} is code")
        if len(set(names)) != len(names) or sum(name.name == "data.pkl" for name in names) != 1:
            raise _unsafe(path, "members of the same name, or not one data.pkl")


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    if not path.is_file():
        raise InputError(Problem("E0100", f"{path} does not exist", "", "check the path"))
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except zipfile.BadZipFile as error:
        raise _unsafe(path, "it is no zip archive of tensors, as torch has written since 1.6") from error
    except OSError as error:
        raise InputError(
            Problem("E0106", f"cannot read {path.name}: {error.strerror}", "", "check the file")
        ) from error


def _checked(value: Any, name: str) -> Checkpoint:
    if not isinstance(value, dict):
        raise _incomplete(name, "it holds no dictionary")
    weights, arguments = value.get("network_weights"), value.get("init_args")
    if not isinstance(weights, dict) or not weights:
        raise _incomplete(name, "no network_weights")
    if any(not isinstance(key, str) or not isinstance(tensor, Tensor) for key, tensor in weights.items()):
        raise _incomplete(name, "network_weights holds something else than tensors by name")
    trainer, configuration = value.get("trainer_name"), None
    if isinstance(arguments, dict):
        configuration = arguments.get("configuration")
    if not isinstance(trainer, str) or not isinstance(configuration, str):
        raise _incomplete(name, "no trainer_name, or no configuration in init_args")
    axes = value.get("inference_allowed_mirroring_axes")
    axes = () if axes is None else axes
    if not isinstance(axes, tuple | list) or any(type(axis) is not int or not 0 <= axis <= 2 for axis in axes):
        raise _incomplete(name, "inference_allowed_mirroring_axes are no axes")
    return Checkpoint(dict(weights), trainer[:200], configuration[:200], tuple(axes))


def _unsafe(path: Path, measured: str) -> IntegrityError:
    action = "nothing of it was executed; get the model from a source you trust, as written by nnU-Net"
    return IntegrityError(Problem("E0710", f"{path.name}: {measured}", "tensors and numbers", action))


def _incomplete(name: str, measured: str) -> IntegrityError:
    return IntegrityError(Problem("E0711", f"{name}: {measured}", "a checkpoint of nnU-Net v2", "get it again"))


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(Problem("E0106", f"cannot read {path.name}: {error.strerror}", "", "check the file"))

"""nnU-Net's results on disk: which folder, or member of a zip archive, is which model, fold and file.

A result folder is called ``TRAINER__PLANS__CONFIGURATION`` and holds ``plans.json``, ``dataset.json`` and a folder for
every fold. A zip archive of ``nnUNetv2_export_model_to_zip`` holds such folders below ``DatasetXXX_Name``. Of an
archive nothing but the files named here is unpacked, each under limits, into a fresh folder.
"""

from __future__ import annotations

import re
import shutil
import stat
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medseg.artefacts import environment_failure
from medseg.errors import InputError, IntegrityError, Problem, UsageError
from medseg.interop.nnunet_schema import MAX_BYTES as MAX_JSON_BYTES

MAX_ARCHIVE_BYTES = 20 * 2**30
MAX_MEMBERS = 20_000
MAX_RATIO = 200  # weights shrink by a tenth
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_latest.pth")
PLANS, DATASET, POSTPROCESSING = "plans.json", "dataset.json", "postprocessing.json"
_WANTED = re.compile(
    r"(.*/)?(plans\.json|dataset\.json|fold_(\d{1,3}|all)/checkpoint_\w{1,40}\.pth|"
    r"crossval_results_folds_\w{1,200}/postprocessing\.json)"
)
_COPY_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Results:
    """One result folder: its trained folds by name, in order, ``all`` last."""

    path: Path
    folds: tuple[str, ...]

    @property
    def configuration(self) -> str:
        """As the folder's name has it, "" if it was renamed; the checkpoints decide."""
        return self.path.name.rpartition("__")[2] if "__" in self.path.name else ""

    def sibling(self, configuration: str) -> Path:
        """The folder of another configuration with the same trainer and plans."""
        return self.path.with_name(f"{self.path.name.rpartition('__')[0]}__{configuration}")


@contextmanager
def opened(source: Path, workspace: Path) -> Iterator[Path]:
    """A folder with the results in it: ``source`` itself, or what is wanted of an archive, unpacked in ``workspace``.

    Raises:
        InputError: E0100 not found, E0106 neither folder nor zip archive.
        IntegrityError: E0710 the archive is hostile, E0701 it is damaged.
        EnvironmentFailure: E0501, E0502 it cannot be unpacked.
    """
    if source.is_dir():
        yield source
        return
    if not source.exists():
        raise InputError(Problem("E0100", f"{source} does not exist", "", "check the path"))
    if not zipfile.is_zipfile(source):
        expected = "a result folder of nnU-Net v2, or a zip archive of nnUNetv2_export_model_to_zip"
        raise InputError(Problem("E0106", f"{source.name} is neither folder nor zip archive", expected, "give one"))
    try:
        folder = Path(tempfile.mkdtemp(prefix=".medseg-", suffix=".tmp", dir=workspace))
    except OSError as error:
        raise environment_failure(error, workspace) from error
    try:
        _unpack(source, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_results(folder: Path, checkpoint: str) -> list[Results]:
    """The result folders at ``folder`` or up to two levels below it; a fold's own folder stands for that fold.

    Raises:
        InputError: E0100 there is none, or none with this checkpoint.
    """
    folder = folder.absolute()
    if folder.name.startswith("fold_") and (folder.parent / PLANS).is_file():
        results = [_results(folder.parent, checkpoint, folder.name.removeprefix("fold_"))]
    elif (folder / PLANS).is_file():
        results = [_results(folder, checkpoint)]
    else:
        below = sorted([*folder.glob(f"*/{PLANS}"), *folder.glob(f"*/*/{PLANS}")])
        results = [_results(path.parent, checkpoint) for path in below]
    if not results:
        action = "give the folder TRAINER__PLANS__CONFIGURATION, with the files that belong to it"
        raise InputError(Problem("E0100", f"no {PLANS} in {folder}", "a result folder of nnU-Net v2", action))
    found = [result for result in results if result.folds]
    if not found:
        there = sorted({path.name for result in results for path in result.path.glob("fold_*/checkpoint_*.pth")})
        measured = f"no fold_*/{checkpoint} in {', '.join(result.path.name for result in results[:5])}"
        raise InputError(Problem("E0100", measured, f"found {', '.join(there[:5]) or 'none'}", "see --checkpoint"))
    return found


def choose_results(found: list[Results], configuration: str | None) -> Results:
    """The one that is meant: by name, else the only one, else the only one that is no first stage of another.

    Raises:
        UsageError: E0001 there are several, or none of that name.
    """
    named = [result for result in found if configuration in (None, result.configuration)]
    if configuration is None and len(named) > 1:
        firsts = {result.sibling("3d_lowres") for result in named if result.configuration == "3d_cascade_fullres"}
        named = [result for result in named if result.path not in firsts]
    if len(named) == 1:
        return named[0]
    names = ", ".join(result.path.name for result in found[:20])
    if configuration is None or len(named) > 1:
        wanted = "one of them, by --configuration NAME or by its folder"
        raise UsageError(Problem("E0001", f"several models are there: {names}", wanted, "name the one to import"))
    raise UsageError(Problem("E0001", f"no model of configuration {configuration}", names, "choose one of these"))


def postprocessing_file(results: Results, folds: tuple[str, ...]) -> Path | None:
    """The post-processing that was found by cross-validation of exactly these folds, if there is one.

    Raises:
        InputError: E0106 there is only nnU-Net's pickle of it, which is a program.
    """
    folder = results.path / f"crossval_results_folds_{'_'.join(folds)}"
    if (folder / POSTPROCESSING).is_file():
        return folder / POSTPROCESSING
    if (folder / "postprocessing.pkl").is_file():
        measured = f"{folder.name} has postprocessing.pkl, a pickle, but not {POSTPROCESSING}"
        action = f"put {POSTPROCESSING}, which nnU-Net writes beside it, there; or import with --no-postprocessing"
        raise InputError(Problem("E0106", measured, POSTPROCESSING, action))
    return None


def _results(path: Path, checkpoint: str, fold: str | None = None) -> Results:
    names = [file.parent.name.removeprefix("fold_") for file in path.glob(f"fold_*/{checkpoint}")]
    numbers = sorted((name for name in names if name.isascii() and name.isdecimal()), key=int)
    folds = (*numbers, *(name for name in names if name == "all"))
    return Results(path, tuple(name for name in folds if fold in (None, name)))


def _unpack(source: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
            _check_members(members, source)
            for member in members:
                if not member.is_dir() and _WANTED.fullmatch(member.filename):
                    _copy(archive, member, folder)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        reason = " ".join(str(error).split())[:160]
        raise IntegrityError(Problem("E0701", f"{source.name}: {reason}", "", "get the archive again")) from error
    except OSError as error:
        raise environment_failure(error, folder) from error


def _check_members(members: list[zipfile.ZipInfo], source: Path) -> None:
    """Judge the whole table of contents before anything is unpacked."""
    if len(members) > MAX_MEMBERS:
        raise _hostile(source, f"{len(members)} members, more than {MAX_MEMBERS}")
    if sum(member.file_size for member in members) > MAX_ARCHIVE_BYTES:
        raise _hostile(source, f"it unpacks to more than {MAX_ARCHIVE_BYTES >> 30} GiB")
    seen: set[str] = set()
    end = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        fault = _fault(member)
        if fault:
            raise _hostile(source, f"member {member.filename[:80]!r} {fault}")
        key = unicodedata.normalize("NFC", member.filename).casefold().rstrip("/")
        if key in seen:
            raise _hostile(source, f"member {member.filename[:80]!r} is there twice")
        if member.header_offset < end:
            raise _hostile(source, f"member {member.filename[:80]!r} lies over another")
        seen.add(key)
        end = member.header_offset + member.compress_size


def _fault(member: zipfile.ZipInfo) -> str:
    """What is wrong with a member, "" if nothing."""
    raw = member.orig_filename
    parts = PurePosixPath(raw).parts
    kind = stat.S_IFMT(member.external_attr >> 16)
    if not raw or len(raw) > 1024 or "\\" in raw or "\0" in raw or not raw.isprintable():
        return "has an unsafe name"
    if raw.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", raw):
        return "would land outside of its folder"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if member.flag_bits & 1:
        return "is encrypted"
    if member.file_size > 2**20 and member.file_size > MAX_RATIO * max(1, member.compress_size):
        return f"unpacks to more than {MAX_RATIO} times its size"
    if raw.endswith(".json") and _WANTED.fullmatch(raw) and member.file_size > MAX_JSON_BYTES:
        return f"is larger than {MAX_JSON_BYTES >> 20} MiB"
    return ""


def _copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> None:
    """Unpack one file, never more than it declares."""
    target = folder.joinpath(*PurePosixPath(member.filename).parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    left = member.file_size
    with archive.open(member) as source, target.open("xb") as file:
        while chunk := source.read(_COPY_BYTES):
            left -= len(chunk)
            if left < 0:
                raise zipfile.BadZipFile(f"{member.filename[:80]} is longer than declared")
            file.write(chunk)
    if left:
        raise zipfile.BadZipFile(f"{member.filename[:80]} is shorter than declared")


def _hostile(source: Path, measured: str) -> IntegrityError:
    action = "nothing was unpacked; get the archive again, as written by nnUNetv2_export_model_to_zip"
    return IntegrityError(Problem("E0710", f"{source.name}: {measured}", "a plain archive", action))

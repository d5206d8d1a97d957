"""The exceptions of medseg: one tree, a stable code for every problem, and the exit code each branch ends with.

    MedsegError
    ├── UsageError            2   a flag or argument is wrong
    ├── InputError            3   data were refused, nothing was produced
    ├── PartialFailure        4   some cases were done, some were refused
    ├── EnvironmentFailure    5   no space, read-only, permission
    ├── ResourceError         6   memory, or a worker that was killed
    ├── IntegrityError        7   damaged or hostile artefact
    ├── IncompatibleError     8   plan, checkpoint and data do not belong together
    ├── OwnershipError        9   another process owns this output
    ├── NonFiniteError       10   loss or gradient is not finite
    └── Stopped         130/143   stopped by SIGINT / SIGTERM at a safe point

Every code has an entry in ``docs/errors.md`` (a test compares the two).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]

CODES: dict[str, str] = {
    "E0001": "usage",
    "E0100": "not found",
    "E0101": "file truncated",
    "E0102": "file corrupt",
    "E0103": "file changed since planning",
    "E0104": "declared size too large",
    "E0106": "unsupported or unreadable format",
    "E0110": "not-a-number or infinite voxels",
    "E0111": "unexpected number of dimensions or voxel type",
    "E0119": "shapes differ",
    "E0120": "grids differ",
    "W0120": "grids differ slightly",
    "E0121": "direction is not orthonormal",
    "W0121": "direction is slightly sheared",
    "E0122": "sform and qform disagree",
    "W0122": "header spacing differs from the sform",
    "W0123": "no orientation in the header",
    "E0124": "spacing is zero, negative or not finite",
    "E0125": "spacing is implausible",
    "W0125": "spacing is not in millimetres",
    "W0126": "geometry unlike that of other cases",
    "W0127": "intensities unlike those of other cases",
    "E0130": "labels are not integers",
    "W0130": "labels are rounded",
    "E0131": "labels are not declared",
    "W0132": "declared label never occurs",
    "E0133": "channels missing or extra",
    "W0134": "case without foreground",
    "E0135": "no case has foreground",
    "W0135": "label in one case only",
    "E0136": "image is constant",
    "W0136": "channel is constant",
    "W0137": "volume is tiny",
    "W0138": "label of very few voxels",
    "W0139": "labels lie outside the image",
    "E0140": "duplicate case",
    "W0141": "identical images",
    "E0142": "unsafe name",
    "E0143": "broken link",
    "E0144": "label file missing",
    "E0145": "dataset.json is invalid",
    "E0146": "no cases found",
    "W0147": "file ignored",
    "W0148": "number of cases differs from dataset.json",
    "W0149": "identical labels",
    "E0150": "slices are missing",
    "E0151": "series or slices are mixed",
    "E0152": "slice occurs twice",
    "E0153": "several volumes in one series",
    "E0154": "slices have no position",
    "W0155": "single slice",
    "W0156": "inverted grey scale",
    "W0157": "unused bits hold data",
    "E0160": "plan is invalid",
    "E0161": "splits are invalid",
    "E0162": "feature not supported",
    "E0400": "some cases failed",
    "E0501": "cannot write",
    "E0502": "no space left",
    "E0600": "not enough memory",
    "E0601": "worker was killed",
    "E0602": "process of a training is gone",
    "E0701": "artefact is damaged",
    "E0710": "file is not safe to read",
    "E0711": "file does not follow its schema",
    "E0801": "prepared data set is incomplete",
    "E0802": "artefacts do not belong together",
    "E0803": "data changed since planning",
    "E0804": "nothing to resume",
    "E0805": "first stage of the cascade is not trained",
    "E0901": "output is in use",
    "E1001": "loss is not finite",
    "E1002": "prediction is not finite",
    "E7000": "internal error",
    "E1300": "stopped",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding: where, what was measured against what was expected, and what to do about it."""

    code: str
    measured: str
    expected: str = ""
    action: str = ""
    case: str | None = None

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"unknown problem code {self.code}")

    @property
    def severity(self) -> Severity:
        """Warnings have codes that start with W."""
        return "warning" if self.code.startswith("W") else "error"

    def __str__(self) -> str:
        where = f" case={escape(self.case)}" if self.case is not None else ""
        against = f" vs {self.expected}" if self.expected else ""
        action = f"; {self.action}" if self.action else ""
        return f"{self.severity}[{self.code}]{where}: {escape(self.measured + against + action)}"


def escape(text: str) -> str:
    """Replace control characters, so that one problem is one line of the log whatever a file is called."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """What went wrong, for a log."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + text[0] if text else ''}"[:200]


class MedsegError(Exception):
    """Base of all errors that medseg raises on purpose; carries one or more ``Problem``."""

    exit_code = 70

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))

    def __reduce__(self) -> tuple[type[MedsegError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)  # errors cross process borders


class UsageError(MedsegError):
    """A flag or an argument is missing or makes no sense."""

    exit_code = 2


class InputError(MedsegError):
    """Data were refused; nothing was produced."""

    exit_code = 3


class PartialFailure(MedsegError):
    """Some cases were done and some refused."""

    exit_code = 4


class EnvironmentFailure(MedsegError):
    """The machine does not let us: no space, read-only, permission."""

    exit_code = 5


class ResourceError(MedsegError):
    """Memory ran out, or the system killed a worker."""

    exit_code = 6


class IntegrityError(MedsegError):
    """An artefact is damaged or hostile."""

    exit_code = 7


class IncompatibleError(MedsegError):
    """Artefacts that do not belong together: plan, checkpoint, prepared data."""

    exit_code = 8


class OwnershipError(MedsegError):
    """Another process owns this output."""

    exit_code = 9


class NonFiniteError(MedsegError):
    """Loss or gradient is not finite."""

    exit_code = 10


class Stopped(MedsegError):
    """Stopped at a safe point by a signal; the exit code is 128 + its number."""

    def __init__(self, problems: Problem | Iterable[Problem], signal_number: int = 15) -> None:
        super().__init__(problems)
        self.signal_number = signal_number

    def __reduce__(self) -> tuple[type[MedsegError], tuple[tuple[Problem, ...], int]]:  # type: ignore[override]
        return type(self), (self.problems, self.signal_number)

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """128 + the signal's number, as shells report it."""
        return 128 + self.signal_number

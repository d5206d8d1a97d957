"""Watch: what there is to see of a running training, gathered from the lines of its journal."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from medseg.progress import Fact, Facts
from medseg.training.journal import Line, StepLine, ValidationLine
from medseg.training.schedule import Length

WINDOW = 50  # steps that losses, speed and waiting are taken over
FEW_LABELS = 6  # with more, only the lowest are named


@dataclass(frozen=True, slots=True)
class Recent:
    """Means over the last steps; ``wait_share`` is the share of their time that was spent waiting for data."""

    loss: float
    losses: dict[str, float]
    step_s: float | None
    samples_per_s: float | None
    wait_share: float | None


@dataclass(frozen=True, slots=True)
class Time:
    """Of one step: its seconds, those of them that it waited for its batch, and the samples in the batch."""

    seconds: float
    waited_s: float | None
    samples: int


class Watch:
    """Takes the journal's lines and says, in words and numbers, how the training stands.

    Args:
        length: how long the training is.
        validations: those made before, if it goes on.
    """

    def __init__(self, length: Length, validations: Sequence[ValidationLine] = ()) -> None:
        self.length = length
        self.steps: deque[StepLine] = deque(maxlen=WINDOW)
        self.times: deque[Time] = deque(maxlen=WINDOW)
        self.previous: float | None = None  # when the step before ended; None after a validation
        self.validation: ValidationLine | None = None
        self.best: float | None = None
        self.memory_gb: float | None = None
        self.gpu_gb: float | None = None
        for line in validations:
            self.take(line)

    def take(self, line: Line, samples: int = 0) -> None:
        """One more line of the journal, in its order; of a step, with the number of samples in its batch."""
        if isinstance(line, ValidationLine):
            self.validation, self.previous = line, None
            known = line.mean_dice if line.smoothed is None else line.smoothed
            self.best = max((d for d in (self.best, known) if d is not None), default=None)
            return
        self.steps.append(line)
        if self.previous is not None:
            self.times.append(Time(line.seconds - self.previous, line.waited_s, samples))
        self.previous = line.seconds
        self.memory_gb = line.memory_gb or self.memory_gb
        self.gpu_gb = line.gpu_gb or self.gpu_gb

    def facts(self) -> Facts:
        """What is known after the last line."""
        if not self.steps:
            return Facts()
        recent, last = self._recent(), self.steps[-1]
        of = "" if self.length.steps is None else f"of {self.length.steps}"
        lines = [Fact("step", f"{last.step}", of)]
        lines.append(Fact("loss", f"{recent.loss:.3f}", ", ".join(f"{n} {v:.3f}" for n, v in recent.losses.items())))
        lines += self._dice_facts()
        lines.append(Fact("lr", f"{last.lr:.2g}"))
        if recent.step_s is not None:
            speed = f"{recent.samples_per_s:.3g}/s"
            lines.append(Fact("speed", speed, f"samples; {recent.step_s:.2g} s/step"))
        if recent.wait_share is not None:
            lines.append(Fact("waiting", f"{100 * recent.wait_share:.0f} %", "of the time, for data"))
        if self.memory_gb is not None:
            gpu = "" if self.gpu_gb is None else f"GPU {self.gpu_gb:.1f} GB"
            lines.append(Fact("memory", f"{self.memory_gb:.1f} GB", gpu))
        return Facts(tuple(lines), self._values(recent, last), self._seconds_left(recent, last))

    def _recent(self) -> Recent:
        names = self.steps[-1].losses
        losses = {n: _mean([line.losses[n] for line in self.steps if n in line.losses]) for n in names}
        took = sum(time.seconds for time in self.times)
        waited = [time.waited_s for time in self.times if time.waited_s is not None]
        return Recent(
            loss=_mean([line.loss for line in self.steps]),
            losses=losses,
            step_s=took / len(self.times) if took > 0 else None,
            samples_per_s=sum(time.samples for time in self.times) / took if took > 0 else None,
            wait_share=min(1.0, sum(waited) / took) if waited and took > 0 else None,
        )

    def _dice_facts(self) -> list[Fact]:
        line = self.validation
        if line is None or line.mean_dice is None:
            return []
        measured = {name: dice for name, dice in line.dice.items() if dice is not None}
        if len(measured) > FEW_LABELS:
            lowest = sorted(measured, key=lambda name: measured[name])[:3]
            per_label = "lowest: " + ", ".join(f"{name} {measured[name]:.3f}" for name in lowest)
        else:
            per_label = ", ".join(f"{name} {dice:.3f}" for name, dice in measured.items())
        facts = [Fact("Dice", f"{line.mean_dice:.3f}", per_label)]
        if self.best is not None and line.smoothed is not None:
            now = f"moving average; now {line.smoothed:.3f}, of step {line.step}"
            facts.append(Fact("best", f"{self.best:.3f}", now))
        return facts

    def _values(self, recent: Recent, last: StepLine) -> dict[str, object]:
        """For programs: the last step as it is, the means of speed and waiting, and the last validation."""
        values: dict[str, object] = {"step": last.step, "loss": last.loss, "losses": dict(last.losses), "lr": last.lr}
        values["samples_per_s"] = None if recent.samples_per_s is None else round(recent.samples_per_s, 3)
        values["wait_share"] = None if recent.wait_share is None else round(recent.wait_share, 4)
        values |= {"memory_gb": self.memory_gb, "gpu_gb": self.gpu_gb}
        if self.validation is not None:
            line = self.validation
            values |= {"dice": dict(line.dice), "mean_dice": line.mean_dice, "validated_step": line.step}
            values |= {"smoothed_dice": line.smoothed, "best_dice": self.best}
        return values

    def _seconds_left(self, recent: Recent, last: StepLine) -> float | None:
        if self.length.seconds is not None:
            return max(0.0, self.length.seconds - last.seconds)
        assert self.length.steps is not None
        return None if recent.step_s is None else (self.length.steps - last.step) * recent.step_s


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

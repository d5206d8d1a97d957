"""Settings: what is trained, on which device, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from medseg.artefacts import sha256_of_json
from medseg.networks.device import Device
from medseg.preparation.store import StoredCase
from medseg.records.plan import ConfigurationPlan
from medseg.records.task import Task
from medseg.training.schedule import Length
from medseg.training.transfer import Initial

Compile = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is trained and for how long.

    ``recipe`` is how batch size and learning rate were chosen, ``initial`` the weights that fine-tuning begins from.
    ``compile`` says whether the network goes through ``torch.compile``; "auto" is for long trainings on a GPU.
    """

    task: Task
    configuration: ConfigurationPlan
    length: Length
    device: Device
    seed: int = 0
    checkpoint_s: float = 300.0
    recipe: str = "reference"
    initial: Initial | None = None
    compile: Compile = "auto"

    def sha256(self, cases: Sequence[StoredCase]) -> str:
        """Hash of all that the weights depend on, but the length, which may be changed, and the machine."""
        begun_from = {} if self.initial is None else {"initial": self.initial.to_json()}
        return sha256_of_json(
            begun_from
            | {
                "task": self.task.to_json(),
                "configuration": self.configuration.to_json(),
                "recipe": self.recipe,
                "seed": self.seed,
                "cases": [case.provenance for case in cases],
            }
        )

"""The plans equal those of nnU-Net 2.8.1's planners, every field of every configuration."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from medseg.dataset.declaration import NnunetDeclaration, task_of
from medseg.dataset.fingerprint import from_nnunet
from medseg.interop.nnunet_plans import PLANNERS, Naming, nnunet_plans, reader_of
from medseg.planning.planner import make_plan
from medseg.records.plan import Budget

HERE = Path(__file__).resolve().parents[2] / "plans" / "reference"


class Reference(NamedTuple):
    """A fingerprint with what nnU-Net made of it: a whole plans file, or the ``short`` form of one."""

    name: str
    dataset: dict[str, Any]
    fingerprint: dict[str, Any]
    preset: str
    memory_gb: float | None
    expected: dict[str, Any]


def test_the_plans_in_the_repository_are_reproduced():
    assert compare(references_in(HERE.glob("*.json"))) == (45, 1326, [])


def test_a_whole_plans_file_is_reproduced_to_the_order_of_its_keys():
    value = json.loads((HERE / "CT028.json").read_text())
    expected = json.loads((HERE / "nnunet_form" / "CT028.json").read_text())
    reference = Reference("CT028", value["dataset"], value["fingerprint"], "resenc-m", None, expected)
    assert json.dumps(planned(reference)) == json.dumps(expected)


def test_all_published_and_local_plans_are_reproduced_to_the_order_of_their_keys(shared):
    references = list(references_of_msd(shared / "reference_plans"))
    assert compare(references) == (37, 4232, [])
    assert [r.name for r in references if json.dumps(planned(r)) != json.dumps(r.expected)] == []


def test_all_synthetic_plans_are_reproduced(shared):
    assert compare(references_of_synthetic(shared / "reference_plans" / "synthetic")) == (145, 4586, [])


def compare(references: list[Reference]) -> tuple[int, int, list[str]]:
    """Entries, fields and what differs; also what one has and the other has not."""
    entries, fields, wrong = 0, 0, []
    for reference in references:
        found, expected = planned(reference), reference.expected
        if "plans_name" not in expected:
            found = short(found)
        ours, theirs = dict(leaves(found)), dict(leaves(expected))
        wrong += [
            f"{reference.name} {key}: {ours.get(key, 'absent')} vs {theirs.get(key, 'absent')}"
            for key in sorted(ours.keys() | theirs.keys())
            if key not in ours or key not in theirs or ours[key] != theirs[key]
        ]
        entries += 1
        fields += len(theirs)
    return entries, fields, wrong


def planned(reference: Reference) -> dict[str, Any]:
    """Our plan in nnU-Net's form; names that nnU-Net was given on its command line are taken from the reference."""
    fingerprint = from_nnunet(reference.fingerprint)
    budget = None if reference.memory_gb is None else Budget(memory_gb=reference.memory_gb)
    task = task_of(NnunetDeclaration.model_validate(reference.dataset))
    plan = make_plan(fingerprint, task, budget, reference.preset, reference.dataset["numTraining"])
    naming = Naming.of(plan, "Dataset000_Name", reader_of(reference.dataset["file_ending"], fingerprint))
    names = reference.expected
    naming = Naming(names.get("dataset_name", naming.dataset), naming.reader, names.get("plans_name", naming.plans))
    value: dict[str, Any] = json.loads(json.dumps(nnunet_plans(plan, fingerprint, naming)))
    return value


def short(plans: dict[str, Any]) -> dict[str, Any]:
    """What the short form keeps of a plans file, the fields of the network beside those of its configuration."""
    configurations = {}
    for name, whole in plans["configurations"].items():
        kept = ("spacing", "patch_size", "batch_size", "median_image_size_in_voxels", "normalization_schemes")
        kept += ("use_mask_for_norm", "batch_dice", "next_stage", "inherits_from", "previous_stage")
        configurations[name] = {key: whole[key] for key in kept if key in whole}
        if "architecture" in whole:
            network = whole["architecture"]["arch_kwargs"]
            configurations[name] |= {
                "network": whole["architecture"]["network_class_name"].rpartition(".")[2],
                "features_per_stage": network["features_per_stage"],
                "kernel_sizes": network["kernel_sizes"],
                "strides": network["strides"],
                "blocks_encoder": network.get("n_conv_per_stage") or network["n_blocks_per_stage"],
                "blocks_decoder": network["n_conv_per_stage_decoder"],
            }
    return {"transpose_forward": plans["transpose_forward"], "configurations": configurations}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is not a dict, with its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}/{key}")
    else:
        yield path, value


def references_in(paths: Iterator[Path]) -> list[Reference]:
    found = []
    for path in sorted(paths):
        value = json.loads(path.read_text())
        found += presets(path.stem, value["dataset"], value["fingerprint"], value["plans"])
    return found


def references_of_synthetic(folder: Path) -> list[Reference]:
    found = []
    for path in sorted(folder.iterdir()):
        dataset, fingerprint, plans = (
            json.loads((path / f"{name}.json").read_text()) for name in ("dataset", "fingerprint", "nnunet_plans")
        )
        found += presets(path.name, dataset, fingerprint, plans)
    return found


def presets(name: str, dataset: dict, fingerprint: dict, plans: dict) -> Iterator[Reference]:
    """One reference per preset; ``nnunet-16gb`` is the preset nnunet for another memory."""
    for key, plan in plans.items():
        memory = float(key.removeprefix("nnunet-").removesuffix("gb")) if key.endswith("gb") else None
        preset = "nnunet" if memory else key
        yield Reference(f"{name} {key}", dataset, fingerprint, preset, memory, plan)


def references_of_msd(folder: Path) -> Iterator[Reference]:
    by_planner = {planner: preset for preset, (planner, _) in PLANNERS.items()}
    with gzip.open(folder / "msd_and_local.json.gz") as file:
        records = json.load(file)
    for record in records:
        preset = by_planner[record["planner"]]
        yield Reference(record["id"], record["dataset"], record["fingerprint"], preset, None, record["plans"])

"""Made-up content of a report: every section is there, and every name is what the test wants it to be."""

from __future__ import annotations

import numpy as np

from medseg.records.fingerprint import CasePrint, Fingerprint, Intensity
from medseg.records.model import ModelCard
from medseg.records.network import NetworkPlan
from medseg.records.plan import ConfigurationPlan, Normalisation, Plan, Reason
from medseg.records.run import CaseOutcome, Fold, RunManifest, Splits
from medseg.records.scores import CaseScore, Measures
from medseg.records.task import Channel, Label, Region, Task
from medseg.reporting.content import ReportContent, ScoreSet, ShownCase, Training
from medseg.reporting.curves import HistoryPoint
from medseg.reporting.cutout import cut_out
from medseg.reporting.flags import flags_of_scores, usual_volumes
from medseg.reporting.planes import plane_pictures
from medseg.reporting.scene import make_scene


def task(prefix: str = "", regions: bool = False) -> Task:
    return Task(
        name=f"{prefix}liver",
        channels=(Channel(name=f"{prefix}CT"),),
        labels=tuple(
            Label(name=f"{prefix}{name}", value=v) for name, v in (("background", 0), ("organ", 1), ("tumour", 4))
        ),
        regions=(Region(name=f"{prefix}all", values=(1, 4)),) if regions else (),
        regions_order=(1,) if regions else (),
    )


def configuration(name: str = "3d_fullres") -> ConfigurationPlan:
    return ConfigurationPlan(
        name=name,
        spacing_mm=(2.5, 0.8, 0.8),
        patch_size=(20, 64, 48),
        batch_size=2,
        median_shape=(60.0, 200.0, 180.0),
        normalisation=(Normalisation(scheme="ct"),),
        network=NetworkPlan(
            features=(32, 64, 128),
            kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
            strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
            convs_encoder=(2, 2, 2),
            convs_decoder=(2, 2),
        ),
    )


def plan(prefix: str = "", regions: bool = False) -> Plan:
    intensity = Intensity(mean=40, median=38, std=12, min=-900, max=1200, percentile_00_5=-20, percentile_99_5=180)
    return Plan(
        preset=f"{prefix}nnunet",
        task=task(prefix, regions),
        intensities=(intensity,),
        configurations={"3d_fullres": configuration()},
        reasons=(Reason(topic=f"{prefix}spacing", text=f"{prefix}because"),),
    )


def fingerprint(prefix: str = "", cases: int = 12) -> Fingerprint:
    rng = np.random.default_rng(3)
    prints = tuple(
        CasePrint(
            id=f"{prefix}case_{index:02d}",
            shape_after_crop=(50 + index, 190, 170),
            spacing_mm=(2.5, 0.8, 0.8),
            relative_size_after_cropping=0.9,
            voxels_per_label={0: 10**6, 1: int(rng.integers(900_000, 1_100_000)), 4: 4000 if index % 2 else 0},
        )
        for index in range(cases)
    )
    return Fingerprint(cases=prints, intensities=plan().intensities, median_relative_size_after_cropping=0.9)


def score(case: str, label: str, dice: float | None, found: float, true: float) -> CaseScore:
    status = "ok" if found and true else "missed" if true else "spurious" if found else "both empty"
    return CaseScore(
        case=case, label=label, values=(1,), status=status, dice=dice, iou=dice, precision=dice, recall=dice,
        hd95_mm=None if status != "ok" else 3.5, assd_mm=None, nsd=dice, true_positives=1, false_positives=1,
        false_negatives=1, prediction_ml=found, reference_ml=true, volume_error_ml=found - true,
    )  # fmt: skip


def rows(prefix: str = "") -> list[CaseScore]:
    organ = [score(f"{prefix}case_{i:02d}", f"{prefix}organ", 0.6 + i / 40, 1500 + i, 1600) for i in range(6)]
    return [
        *organ,
        score(f"{prefix}case_03", f"{prefix}tumour", 0.0, 0, 5.5),
        score(f"{prefix}case_04", f"{prefix}tumour", 0.0, 7, 0),
    ]


def card(prefix: str = "", regions: bool = False, steps: int = 1234) -> ModelCard:
    whole = plan(prefix, regions)
    return ModelCard(
        configuration="3d_fullres", fold="0", plan=whole, weights_sha256="ab" * 32, medseg_version="0.1.0",
        torch_version=f"{prefix}2.13", settings_sha256="cd" * 32, batch_size=2, training=configuration().training,
        steps=steps, training_seconds=600, scores={"mean": 0.66},
    )  # fmt: skip


def scene(shape=(9, 26, 21)):
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    labels = (((z - 4) / 3) ** 2 + ((y - 13) / 8) ** 2 + ((x - 9) / 6) ** 2 < 1).astype(np.int16)
    labels[labels.shape[0] // 2, 12:15, 8:10] = 2
    image = np.random.default_rng(0).normal(50, 10, shape) + 60 * labels
    return make_scene(image.astype(np.float32), labels, np.roll(labels, 2, axis=2), (2.5, 0.8, 0.9))


def content(prefix: str = "", regions: bool = False) -> ReportContent:
    from medseg.evaluation.summary import summarise

    of_case = tuple(row for row in rows(prefix) if row.case.endswith("03"))
    names = [label.name for label in task(prefix).labels]
    shown = ShownCase(
        f"{prefix}case_03",
        f"{prefix}source",
        "worst",
        plane_pictures(scene()),
        of_case,
        cut_out(scene(), f"{prefix}case_03", names),
    )
    history = tuple(
        HistoryPoint(step, step / 2, train_loss=1 - step / 100, mean_dice=step / 100 if step % 20 == 0 else None)
        for step in range(1, 101)
    )
    outcomes = (CaseOutcome(id=f"{prefix}new", status="failed", problems=(f"{prefix}broken",)),)
    usual = usual_volumes(fingerprint(prefix), task(prefix, regions))
    return ReportContent(
        title=f"{prefix}title",
        task=task(prefix, regions),
        fingerprint=fingerprint(prefix),
        plan=plan(prefix, regions),
        splits=Splits(reason=f"{prefix}by hand", folds=(Fold(train=(f"{prefix}a",), val=(f"{prefix}b",)),)),
        trainings=(
            Training("3d_fullres", "0", card(prefix, regions), history),
            Training("3d_fullres", "1", None, history[:9]),
        ),
        score_sets=(ScoreSet(f"{prefix}held out", summarise(rows(prefix), task(prefix, regions), Measures())),),
        flags=tuple(flags_of_scores(rows(prefix), usual)),
        cases=(shown,),
        manifest=RunManifest(
            command="predict", medseg_version="0.1.0", settings={f"{prefix}key": f"{prefix}value"}, cases=outcomes
        ),
        volumes_ml={f"{prefix}new": {f"{prefix}organ": 3.5}},
        provenance=((f"{prefix}name", f"{prefix}value"),),
        commands=(f"medseg {prefix}",),
        notes=(f"{prefix}note",),
    )

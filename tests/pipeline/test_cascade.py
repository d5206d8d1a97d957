"""A cascade from plan to prediction: cross-validated first labels, nothing done twice, errors that help."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from phantoms import affine_ijk, anatomy, save_nifti
from run_records import check_records
from tiny_runs import add_held_out, cpu, edit, planned_run, tiny

import medseg.pipeline.cascade
import medseg.pipeline.train
from medseg.errors import IncompatibleError, InputError
from medseg.imaging.volumes import read_channels, read_volume
from medseg.inference.model import load_model, on_grid_of, prepare_stages, segment, segment_stage
from medseg.inference.with_openvino import OpenVinoNetwork, exact_in_int8, installed
from medseg.pipeline.cascade import with_previous_labels
from medseg.pipeline.predict import PredictOptions, predict_files
from medseg.pipeline.predict_settings import accelerated
from medseg.pipeline.preprocess import preprocess_run
from medseg.pipeline.quantise import quantise_model
from medseg.pipeline.run import RunOptions, run_all
from medseg.pipeline.run_folder import RunFolder
from medseg.pipeline.train import TrainOptions, train_run
from medseg.preparation.prepare import Prepared, prepare
from medseg.preparation.store import open_store
from medseg.records.int8 import INT8

FIRST, SECOND = "3d_lowres", "3d_cascade_fullres"


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    monkeypatch.setattr(medseg.pipeline.train, "training_picture", lambda path, points: None)


def add_cascade(run):
    """The phantoms are too small for a low resolution by themselves: write one into the plan, as a user would."""

    def three(configurations: dict) -> dict:
        full = configurations["3d_fullres"]
        low = json.loads(json.dumps(full)) | {"name": FIRST, "spacing_mm": [s * 1.3 for s in full["spacing_mm"]]}
        second = json.loads(json.dumps(full)) | {"name": SECOND, "previous_stage": FIRST}
        for configuration in (low, second):
            tiny(configuration)
        return {FIRST: low, "3d_fullres": full, SECOND: second}

    edit(run / "plan.json", configurations=three)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """A finished cascade of two folds, fold 0 of the second stage trained, held-out images segmented."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(medseg.pipeline.train, "training_picture", lambda path, points: None)
        run = planned_run(tmp_path_factory.mktemp("cascade"), cases=4)
        add_cascade(run)
        splits = [{"train": ["case_00", "case_01"], "val": ["case_02", "case_03"]}]
        splits.append({"train": ["case_02", "case_03"], "val": ["case_00", "case_01"]})
        edit(run / "splits.json", folds=splits)
        run_all(
            run.parent / "data",
            run,
            RunOptions(configuration=SECOND, training=TrainOptions(epochs=12), device=cpu(), workers=1),
        )
    return run


def test_a_run_of_the_second_stage_trains_every_fold_of_the_first(cascade):
    trained = sorted(str(card.parent.relative_to(cascade / "models")) for card in cascade.glob("models/*/*/model.json"))
    assert trained == [f"{SECOND}/fold_0", f"{FIRST}/fold_0", f"{FIRST}/fold_1"]
    assert sorted(p.name for p in (cascade / "predictions").glob("*.nii.gz")) == ["new_00.nii.gz", "new_01.nii.gz"]
    scores = json.loads((cascade / "scores" / "held-out.json").read_text())
    assert len(scores["cases"]) == 2 * 2


def test_every_record_of_a_cascade_reads_back_equal(cascade, tmp_path):
    assert "prepared/*/previous/*.json" in check_records(cascade, tmp_path, ("plan.json", "splits.json"))


def test_second_and_full_resolution_share_the_prepared_cases(cascade):
    assert (cascade / "prepared" / "3d_fullres" / "manifest.json").is_file()
    assert sorted(p.name for p in (cascade / "prepared" / SECOND).iterdir()) == ["previous"]


def test_each_case_has_the_labels_of_the_fold_that_did_not_see_it(cascade):
    folder = RunFolder(cascade)
    plan = folder.read_plan()
    stores = open_store(folder.prepared(FIRST)), open_store(folder.prepared("3d_fullres"))
    second = plan.configurations[SECOND]
    found = with_previous_labels(folder, stores, second, stores[1].cases, cpu())
    for fold in folder.read_splits().folds:
        number = folder.read_splits().folds.index(fold)
        model = load_model(folder.fold(FIRST, str(number)), cpu())
        for case_id in fold.val:
            coarse, fine = stores[0].case(case_id), stores[1].case(case_id)
            cropped = segment_stage(model, Prepared(coarse.image[:], coarse.record.preparation))
            expected = on_grid_of(fine.record.preparation, cropped, second)
            assert expected.any()
            assert np.array_equal(found[case_id].previous[:], expected)


def test_training_and_prediction_give_the_second_stage_the_same_labels(cascade):
    """From the stored case, and from the file."""
    folder = RunFolder(cascade)
    plan, dataset = folder.read_plan(), folder.read_dataset()
    stores = open_store(folder.prepared(FIRST)), open_store(folder.prepared("3d_fullres"))
    case = dataset.cases[0]
    stored = with_previous_labels(folder, stores, plan.configurations[SECOND], [case.id], cpu())[case.id]
    first = load_model(folder.fold(FIRST, "1"), cpu())
    volume = read_channels(case.images)
    coarse, fine = (prepare(volume, plan, plan.configurations[name]) for name in (FIRST, SECOND))
    seen = on_grid_of(fine.preparation, segment_stage(first, coarse), plan.configurations[SECOND])
    assert np.array_equal(stored.previous[:], seen)


def test_labels_are_predicted_once_and_again_when_damaged_or_of_other_weights(cascade, monkeypatch):
    folder = RunFolder(cascade)
    second = folder.read_plan().configurations[SECOND]
    stores = open_store(folder.prepared(FIRST)), open_store(folder.prepared("3d_fullres"))
    predicted = []
    original = medseg.pipeline.cascade.segment_stage

    def watch(*arguments, **keywords):
        predicted.append(1)
        return original(*arguments, **keywords)

    monkeypatch.setattr(medseg.pipeline.cascade, "segment_stage", watch)
    cases = stores[1].cases
    with_previous_labels(folder, stores, second, cases, cpu())
    assert not predicted
    damaged = cascade / "prepared" / SECOND / "previous" / f"{cases[0]}.labels.b2nd"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-3] + b"abc")
    (cascade / "prepared" / SECOND / "previous" / f"{cases[1]}.json").write_text("{")
    (damaged.parent / ".medseg-7584204f6c30.tmp.b2nd").write_bytes(b"half")  # of a process that was killed
    with_previous_labels(folder, stores, second, cases, cpu())
    assert len(predicted) == 2
    assert damaged.read_bytes() == content
    assert not list(damaged.parent.glob(".medseg*"))


def test_the_first_stage_matters_to_the_second(cascade, tmp_path):
    """The second stage looks at the labels it is given: other ones, another result."""
    model = load_model(cascade, cpu())  # a cascade counts as one: no configuration to name
    assert [stage.configuration.name for stage in model.stages] == [FIRST, SECOND]
    assert len(model.sha256) == 3
    rng = np.random.default_rng(4)
    image, _ = anatomy(rng)
    save_nifti(tmp_path / "x.nii.gz", image, affine_ijk())
    fine = prepare(read_volume(tmp_path / "x.nii.gz"), model.plan, model.configuration)
    nothing = segment_stage(model, fine, np.zeros(fine.preparation.target_shape, np.int16))
    something = segment_stage(model, fine, np.ones(fine.preparation.target_shape, np.int16))
    assert not np.array_equal(nothing, something)


@pytest.mark.skipif(not (installed() and exact_in_int8()), reason="needs OpenVINO and VNNI")
def test_a_cascade_in_int8_has_ranges_for_every_network_of_both_stages(cascade, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(cascade / "models", models)
    add_held_out(tmp_path, 2)
    (told,) = quantise_model(models / SECOND, tmp_path / "imagesTs", cases=1, device=cpu())
    folders = [path.parent.relative_to(models) for path in told.files]
    assert sorted(map(str, folders)) == [f"{SECOND}/fold_0", f"{FIRST}/fold_0", f"{FIRST}/fold_1"]
    exact = load_model(models / SECOND, cpu())
    model = accelerated(exact, PredictOptions(backend="int8"), 1)
    assert [stage.backend.name for stage in model.stages] == ["int8", "int8"]
    for stage, before in zip(model.stages, exact.stages, strict=True):
        engines = [stage.backend.engine(network) for network in before.networks]
        assert all(isinstance(engine, OpenVinoNetwork) for engine in engines)
    volume = read_volume(tmp_path / "imagesTs" / "new_01_0000.nii.gz")
    labels, expected = (segment(one, prepare_stages(one, volume)) for one in (model, exact))
    assert expected.any()
    assert (labels == expected).mean() > 0.98
    (models / FIRST / "fold_1" / INT8).unlink()
    with pytest.raises(InputError, match=rf"E0100.*{FIRST}.fold_1.*medseg quantise"):
        accelerated(exact, PredictOptions(backend="int8"), 1)


def test_a_second_stage_without_its_first_is_refused(cascade, tmp_path):
    add_held_out(tmp_path, 1)
    alone = tmp_path / "models" / SECOND
    alone.parent.mkdir()
    (cascade / "models" / SECOND).rename(alone)
    try:
        with pytest.raises(InputError, match=r"E0100.*3d_lowres"):
            predict_files(alone, tmp_path / "imagesTs", tmp_path / "out", PredictOptions(device=cpu()))
    finally:
        alone.rename(cascade / "models" / SECOND)


def test_training_the_second_stage_first_says_what_to_train(tmp_path):
    run = planned_run(tmp_path, cases=4)
    add_cascade(run)
    preprocess_run(run, [SECOND], workers=1)
    with pytest.raises(IncompatibleError, match=r"E0805.*fold 0, 1, 2, 3 of 3d_lowres.*--fold 0"):
        train_run(run, SECOND, "0", TrainOptions(epochs=1, device=cpu()))


def test_cases_that_validate_nowhere_are_refused(tmp_path):
    run = planned_run(tmp_path, cases=4)
    add_cascade(run)
    edit(run / "splits.json", folds=[{"train": ["case_00", "case_01"], "val": ["case_02", "case_03"]}])
    preprocess_run(run, [SECOND], workers=1)
    with pytest.raises(IncompatibleError, match=r"E0805.*2 cases \(case_00, case_01"):
        train_run(run, SECOND, "0", TrainOptions(epochs=1, device=cpu()))

"""Training a fold of a run: what it needs, what it leaves alone, what it writes."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
from tiny_runs import CONFIGURATION, STEPS_PER_EPOCH, contents, cpu, edit

import medseg.pipeline.train as module
from medseg.artefacts import owned, sha256_of
from medseg.errors import IncompatibleError, InputError, IntegrityError, OwnershipError, Stopped, UsageError
from medseg.evaluation.scores import evaluate
from medseg.networks.device import choose_device
from medseg.pipeline import validate
from medseg.pipeline.predict import PredictOptions, predict_files
from medseg.pipeline.preprocess import preprocess_run
from medseg.pipeline.run_folder import RunFolder
from medseg.pipeline.train import TrainOptions, train_run
from medseg.records.base import read_record
from medseg.records.model import ModelCard, PostProcessing
from medseg.records.scores import Measures, Scores
from medseg.training.checkpoint import newest_checkpoint
from medseg.training.journal import read_journal


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Drawing the curves takes most of a tiny training."""
    monkeypatch.setattr(module, "training_picture", lambda path, points: None)


def train(run, fold="0", epochs=1, stop=lambda: None, **options):
    options = {"epochs": epochs, "device": cpu()} | options
    return train_run(run, CONFIGURATION, fold, TrainOptions(**options), stop_signal=stop)


def fold_folder(run, fold="0"):
    return run / "models" / CONFIGURATION / f"fold_{fold}"


class StopAfter:
    """A stop signal that comes when it was asked for ``calls`` times."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self) -> int | None:
        self.calls -= 1
        return signal.SIGTERM if self.calls < 0 else None


def test_a_fold_holds_the_model_its_journal_and_its_validation(finished):
    folder = fold_folder(finished)
    card = read_record(folder / "model.json", ModelCard)
    assert card.weights_sha256 == sha256_of(folder / "weights.safetensors")
    assert card.steps == 12 * STEPS_PER_EPOCH
    assert set(card.scores) == {"mean", "outer", "inner"}
    steps, validations = read_journal(folder / "log.jsonl")
    assert [line.step for line in steps] == list(range(1, card.steps + 1))
    assert len(validations) == 10
    assert steps[0].lr > steps[-1].lr > 0
    assert sum(s.loss for s in steps[-10:]) < sum(s.loss for s in steps[:10])
    assert (folder / "progress.png").read_bytes().startswith(b"\x89PNG")
    validated = RunFolder(finished).read_splits().folds[0].val
    assert {p.name for p in (folder / "validation").iterdir()} == {f"{case}.nii.gz" for case in validated}
    scores = read_record(folder / "validation.json", Scores)
    assert {row.case for row in scores.cases} == set(validated)
    assert card.scores["mean"] == scores.mean_dice
    assert (folder / "validation.csv").read_text().count("\n") == 1 + len(scores.cases)
    assert len(list((folder / "checkpoints").iterdir())) in (1, 2)
    assert not list(finished.rglob(".medseg*"))


def test_validation_scores_are_those_of_the_files_against_the_data_sets_labels(finished):
    """The same numbers from the files alone; the fold was not trained on these cases."""
    folder = fold_folder(finished)
    labels = finished.parent / "data" / "labelsTr"
    pairs = [(p.name.removesuffix(".nii.gz"), p, labels / p.name) for p in sorted((folder / "validation").iterdir())]
    again = evaluate(pairs, RunFolder(finished).read_plan().task, Measures())
    recorded = read_record(folder / "validation.json", Scores)
    assert again.mean_dice == recorded.mean_dice > 0.8
    assert sorted(again.cases, key=repr) == sorted(recorded.cases, key=repr)


def test_predicting_the_validation_cases_without_post_processing_gives_the_validation_files(finished, tmp_path):
    model = shutil.copytree(finished / "models" / CONFIGURATION, tmp_path / "model")
    (model / "postprocessing.json").unlink()
    cases = [path.name.removesuffix(".nii.gz") for path in sorted((model / "fold_0" / "validation").iterdir())]
    images = [finished.parent / "data" / "imagesTr" / f"{case}_0000.nii.gz" for case in cases]
    predict_files(model, images, tmp_path / "out", PredictOptions(device=cpu()))
    for case in cases:
        validated = model / "fold_0" / "validation" / f"{case}.nii.gz"
        assert (tmp_path / "out" / validated.name).read_bytes() == validated.read_bytes()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(run):
    first = train(run, "1").weights_sha256
    assert train(run, "1", overwrite=True).weights_sha256 == first
    assert train(run, "1", overwrite=True, seed=1).weights_sha256 != first


def test_a_fold_is_trained_and_validated_in_float16_and_keeps_its_scale(run):
    card = train(run, device=choose_device("cpu", "float16"))
    assert card.steps == STEPS_PER_EPOCH
    assert card.scores["mean"] is not None
    checkpoint = newest_checkpoint(fold_folder(run) / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.state.precision, checkpoint.state.loss_scale.clean_steps > 0) == ("float16", True)


def test_a_run_without_prepared_cases_is_refused(run):
    shutil.rmtree(run / "prepared")
    with pytest.raises(IncompatibleError, match=r"E0801.*run preprocess") as caught:
        train(run)
    assert caught.value.exit_code == 8


def test_cases_prepared_by_another_plan_are_refused_until_they_are_prepared_again(run, prepared):
    edit(run / "plan.json", configurations__3d_fullres__spacing_mm=[2.5, 1.1, 0.9])
    with pytest.raises(IncompatibleError, match=r"E0802.*run preprocess"):
        train(run)
    preprocess_run(run, [CONFIGURATION], workers=1)
    train(run)


def test_a_store_that_lacks_a_planned_case_is_refused(run):
    edit(run / "prepared" / CONFIGURATION / "manifest.json", cases=lambda cases: dict(list(cases.items())[1:]))
    with pytest.raises(IncompatibleError, match=r"E0801.*5 prepared cases vs 6 planned"):
        train(run)


def test_a_case_record_that_was_tampered_with_is_refused(run):
    case = RunFolder(run).read_splits().folds[0].train[0]
    edit(run / "prepared" / CONFIGURATION / f"{case}.case.json", channels=2)
    with pytest.raises(IntegrityError, match=rf"E0701.*{case}"):
        train(run)


@pytest.mark.parametrize("fold", ["5", "-1", "00", "one", "", "٣", "../fold_0", "All"])
def test_a_fold_that_does_not_exist_is_refused_with_those_that_do(run, fold):
    with pytest.raises(UsageError, match=r"E0001.*0 to 4, or all"):
        train(run, fold)
    assert not (run / "models").exists()


def test_a_finished_fold_is_left_alone(run):
    card = train(run)
    before = contents(fold_folder(run))
    assert train(run) == card
    assert train(run, resume=True) == card
    assert contents(fold_folder(run)) == before


@pytest.mark.parametrize("other", [{"seed": 3}, {"seconds": 1.0}, {"recipe": "fast"}])
def test_a_finished_fold_is_not_replaced_by_a_training_with_other_settings(run, other):
    train(run)
    before = contents(fold_folder(run))
    with pytest.raises(IncompatibleError, match=r"E0802.*overwrite"):
        train(run, **other)
    assert contents(fold_folder(run)) == before


def test_a_finished_fold_goes_on_when_more_is_asked_for_and_refuses_less(run):
    short = train(run, epochs=None, iterations=3)
    assert (short.steps, short.length) == (3, "3 steps")
    longer = train(run, epochs=2)
    assert longer.steps == 2 * STEPS_PER_EPOCH
    assert longer.weights_sha256 == sha256_of(fold_folder(run) / "weights.safetensors") != short.weights_sha256
    assert [line.step for line in read_journal(fold_folder(run) / "log.jsonl")[0]] == list(range(1, longer.steps + 1))
    before = contents(fold_folder(run))
    with pytest.raises(IncompatibleError, match=r"E0802.*trained for .* already"):
        train(run, epochs=1)
    shutil.rmtree(fold_folder(run) / "checkpoints")
    with pytest.raises(IncompatibleError, match=r"E0802.*cannot go on"):
        train(run, epochs=3)
    assert contents(fold_folder(run)).items() <= before.items()


def test_every_checkpoint_is_a_model_that_predicts(prepared, run, tmp_path):
    with pytest.raises(Stopped):
        train(run, epochs=3, stop=StopAfter(6))
    (checkpoint,), images = (fold_folder(run) / "checkpoints").glob("step_*"), prepared.parent / "data" / "imagesTr"
    for name, folder in (("newest", checkpoint), ("best", fold_folder(run) / "checkpoints" / "best")):
        manifest = predict_files(folder, images, tmp_path / name, PredictOptions(device=cpu()))
        assert manifest.cases
        assert not manifest.failed
    with pytest.raises(InputError, match="E0100"):  # the fold itself is not finished
        predict_files(run, images, tmp_path / "run", PredictOptions(device=cpu()))


def test_overwrite_starts_anew_whatever_lies_there(run):
    train(run)
    card = train(run, epochs=2, overwrite=True)
    assert card.steps == 2 * STEPS_PER_EPOCH
    steps, _ = read_journal(fold_folder(run) / "log.jsonl")
    assert [line.step for line in steps] == list(range(1, card.steps + 1))
    names = {path.name for path in (fold_folder(run) / "checkpoints").iterdir()}
    assert names == {f"step_{card.steps:08d}", "best"}


def test_a_folder_without_a_plan_is_told_to_be_planned(tmp_path):
    for read in (RunFolder(tmp_path).read_plan, RunFolder(tmp_path).read_splits):
        with pytest.raises(InputError, match=r"E0100.*no (plan|splits)\.json in .*run: medseg plan"):
            read()


def test_resume_without_a_checkpoint_is_refused(run):
    with pytest.raises(UsageError, match=r"E0804.*leave out --resume"):
        train(run, resume=True)
    (fold_folder(run) / "checkpoints" / "step_00000003").mkdir(parents=True)  # killed before it was committed
    with pytest.raises(UsageError, match="E0804"):
        train(run, resume=True)


def test_a_stopped_training_is_resumed_to_the_weights_of_an_undisturbed_one(run, tmp_path):
    with pytest.raises(Stopped) as caught:
        train(run, epochs=3, stop=StopAfter(6))
    assert caught.value.exit_code == 143
    assert not (fold_folder(run) / "model.json").exists()
    resumed = train(run, epochs=3, resume=True)
    undisturbed = train(run, epochs=3, overwrite=True)
    assert resumed.weights_sha256 == undisturbed.weights_sha256


def test_a_stop_while_validating_loses_no_step(run):
    train_steps = STEPS_PER_EPOCH
    with pytest.raises(Stopped, match="validating"):
        train(run, stop=StopAfter(train_steps))
    assert not (fold_folder(run) / "model.json").exists()
    assert train(run, resume=True).steps == train_steps


@pytest.mark.parametrize("first", [{"epochs": 3}, {"epochs": None, "seconds": 600.0}])
@pytest.mark.parametrize(
    "other", [{"epochs": 4, "seconds": None, "seed": 5}, {"epochs": None, "seconds": 700.0, "seed": 6}, {"seed": 5}]
)
def test_a_stopped_training_refuses_other_settings_and_still_goes_on_with_its_own(run, first, other):
    with pytest.raises(Stopped):
        train(run, stop=StopAfter(3), **first)
    before = contents(fold_folder(run))
    with pytest.raises(IncompatibleError, match=r"E0802.*repeat its command"):
        train(run, stop=StopAfter(3), **(first | other))
    assert contents(fold_folder(run)) == before
    with pytest.raises(Stopped):  # that it goes on, not that it ends
        train(run, resume=True, stop=StopAfter(2), **first)


def test_all_trains_on_every_case_and_validates_none(run):
    card = train(run, "all")
    assert card.fold == "all"
    assert card.scores == {}
    names = {path.name for path in fold_folder(run, "all").iterdir()}
    assert names == {"checkpoints", "log.jsonl", "model.json", "weights.safetensors"}
    assert not (run / "models" / CONFIGURATION / "postprocessing.json").exists()


def test_post_processing_counts_the_validated_cases_of_all_folds(run):
    path = run / "models" / CONFIGURATION / "postprocessing.json"
    counts = []
    for fold in ("0", "3", "all"):
        train(run, fold)
        evidence = read_record(path, PostProcessing).evidence
        counts.append(evidence[0].partition(" over ")[2].partition(" ")[0])
    validated = [len(fold.val) for fold in RunFolder(run).read_splits().folds]
    assert counts == [str(validated[0]), str(validated[0] + validated[3]), str(validated[0] + validated[3])]


def test_a_fold_is_not_finished_before_its_post_processing_is_there(run, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(validate, "choose_post_processing", killed)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    monkeypatch.undo()
    assert not (fold_folder(run) / "model.json").exists()
    train(run)
    assert (run / "models" / CONFIGURATION / "postprocessing.json").exists()


def test_a_fold_in_use_by_another_process_is_refused(run):
    with owned(fold_folder(run)), pytest.raises(OwnershipError, match="E0901") as caught:
        train(run)
    assert caught.value.exit_code == 9
    train(run)


def test_an_unplanned_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"E0100.*medseg plan"):
        train(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_the_journal_is_strict_json_by_line(finished):
    for line in (fold_folder(finished) / "log.jsonl").read_text().splitlines():
        assert {"step", "seconds"} < json.loads(line).keys()

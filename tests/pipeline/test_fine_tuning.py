"""Fine-tuning: a run that begins from a trained model, from the command line to the weights."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from phantoms import dataset_json, make_dataset
from tiny_runs import CONFIGURATION, contents, cpu, edit

import medseg.pipeline.train
from medseg.artefacts import sha256_of
from medseg.cli.main import main
from medseg.errors import IncompatibleError, InputError, IntegrityError, Stopped, UsageError
from medseg.inference.model import load_model
from medseg.networks.build import build_network
from medseg.networks.weights import load_weights, save_tensors
from medseg.pipeline.device_plan import Request
from medseg.pipeline.plan import PlanOptions, plan_run
from medseg.pipeline.preprocess import preprocess_run
from medseg.pipeline.run_folder import RunFolder
from medseg.pipeline.split import SplitOptions
from medseg.pipeline.train import TrainOptions, train_run
from medseg.pipeline.transfer import initial_of, read_source
from medseg.planning.matching import Asked
from medseg.planning.networks import Variant
from medseg.records.base import read_record, write_record
from medseg.records.model import CARD, WEIGHTS, ModelCard
from medseg.training.journal import NAME as LOG
from medseg.training.transfer import Slots, begin_from

LABELS = {"background": 0, "Inner": 1, "rim": 2, "OUTER": 4}
ON_CPU = Request(device=cpu())


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    monkeypatch.setattr(medseg.pipeline.train, "training_picture", lambda path, points: None)


@pytest.fixture(scope="module")
def renamed(tmp_path_factory) -> Path:
    """Other phantoms: outer is 4, inner 1, a label ``rim`` is new, and so is a second channel, which goes first."""
    folder = make_dataset(tmp_path_factory.mktemp("renamed") / "data", cases=4, seed=3, channels=2)
    for path in (folder / "labelsTr").glob("*.nii.gz"):
        image = nib.load(path)
        old = np.asarray(image.dataobj)
        new = np.select([old == 2, old == 1], [1, 4], 0).astype(np.uint8)
        new[(new == 4) & (np.indices(new.shape)[1] > new.shape[1] // 2 + 4)] = 2
        nib.save(nib.Nifti1Image(new, image.affine, image.header), path)
    for path in (folder / "imagesTr").glob("*_0000.nii.gz"):
        other = path.with_name(path.name.replace("_0000", "_0001"))
        spare = path.with_name("spare.nii.gz")
        path.rename(spare), other.rename(path), spare.rename(other)
    changes = {"labels": LABELS, "channel_names": {"0": "T2", "1": "mri"}}
    (folder / "dataset.json").write_text(json.dumps(dataset_json(4, **changes)))
    return folder


def begin(dataset: Path, run: Path, model: Path, **options):
    return plan_run(dataset, run, PlanOptions(ON_CPU, begin_from=model, **options))


@pytest.fixture(scope="module")
def tuned(finished, renamed, tmp_path_factory) -> Path:
    """A run planned from the finished phantom model, and prepared. Not to be written to."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    begin(renamed, run, finished, splits=SplitOptions(folds=2))
    preprocess_run(run, workers=1)
    return run


def test_the_plan_names_what_is_taken_over_and_the_run_holds_the_weights(tuned, finished):
    plan, theirs = RunFolder(tuned).read_plan(), RunFolder(finished).read_plan()
    ours, old = plan.configurations[CONFIGURATION], theirs.configurations[CONFIGURATION]
    assert (ours.network, ours.patch_size, ours.spacing_mm) == (old.network, old.patch_size, old.spacing_mm)
    assert plan.origin.channels.places == (None, 0)
    assert plan.origin.outputs.places == (0, 2, None, 1)
    card = read_record(finished / "models" / CONFIGURATION / "fold_0" / CARD, ModelCard)
    assert plan.origin.weights == {CONFIGURATION: {"0": card.weights_sha256}}
    assert sha256_of(tuned / "initial" / CONFIGURATION / "fold_0.safetensors") == card.weights_sha256
    assert str(finished) not in (tuned / "plan.json").read_text()


def test_the_network_segments_what_the_model_knows_before_the_first_step(tuned, finished):
    plan = RunFolder(tuned).read_plan()
    network = build_network(plan.configurations[CONFIGURATION].network, 2, 4)
    begin_from(
        network, plan.configurations[CONFIGURATION].network, initial_of(RunFolder(tuned), plan, CONFIGURATION, "1")
    )
    old = load_model(finished, cpu()).networks[0]
    x = torch.randn((1, 2, 8, 16, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = network.eval()(x)[0], old(x[:, 1:])[0]
    torch.testing.assert_close(found[:, [0, 3, 1]], expected, rtol=1e-4, atol=1e-4)


def test_the_second_stage_of_a_cascade_also_takes_over_the_labels_that_it_sees(tuned):
    plan = RunFolder(tuned).read_plan()
    low = plan.configurations[CONFIGURATION].model_copy(update={"name": "low"})
    full = plan.configurations[CONFIGURATION].model_copy(update={"previous_stage": "low"})
    weights = {"low": {"all": "a" * 64}, CONFIGURATION: {"0": "b" * 64}}
    origin = plan.origin.model_copy(update={"weights": weights})
    both = plan.model_copy(update={"configurations": {"low": low, CONFIGURATION: full}, "origin": origin})
    first, second = (initial_of(RunFolder(tuned), both, name, "0") for name in ("low", CONFIGURATION))
    assert first.inputs == (Slots(1, (None, 0)),)
    assert second.inputs == (Slots(1, (None, 0)), Slots(2, (1, None, 0)))
    assert first.outputs == second.outputs == Slots(3, (0, 2, None, 1))
    assert (first.path.parent.name, first.path.name) == ("low", "fold_all.safetensors")


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_training_begins_far_below_a_fresh_network_and_its_model_predicts(tuned, tmp_path):
    run = Path(shutil.copytree(tuned, tmp_path / "tuned"))
    card = train_run(run, CONFIGURATION, "0", TrainOptions(iterations=3, device=cpu()))
    assert card.plan.origin is not None
    fresh = Path(shutil.copytree(tuned, tmp_path / "fresh"))
    edit(fresh / "plan.json", origin=lambda origin: None)
    train_run(fresh, CONFIGURATION, "0", TrainOptions(iterations=3, device=cpu()))
    mine, theirs = (losses(r / "models" / CONFIGURATION / "fold_0") for r in (run, fresh))
    assert max(mine) < min(theirs) - 0.2
    assert load_model(run, cpu()).plan.task.values == (0, 1, 2, 4)


def stopping_after(steps: int):
    asked = iter(range(10**6))
    return lambda: 15 if next(asked) >= steps else None


def test_a_stopped_training_goes_on_to_the_same_weights_when_the_model_is_gone(finished, renamed, tmp_path):
    model = Path(shutil.copytree(finished / "models", tmp_path / "models"))
    runs = [tmp_path / "undisturbed", tmp_path / "stopped"]
    options = TrainOptions(iterations=5, device=cpu())
    for run in runs:
        begin(renamed, run, model)
        preprocess_run(run, workers=1)
    shutil.rmtree(model)
    undisturbed = train_run(runs[0], CONFIGURATION, "all", options)
    with pytest.raises(Stopped):
        train_run(runs[1], CONFIGURATION, "all", options, stop_signal=stopping_after(2))
    assert train_run(runs[1], CONFIGURATION, "all", options).weights_sha256 == undisturbed.weights_sha256


def test_the_same_command_again_changes_nothing_and_needs_the_model_no_more(finished, renamed, tmp_path):
    run = tmp_path / "run"
    begin(renamed, run, finished)
    before = contents(run)
    for options in (PlanOptions(ON_CPU, begin_from=finished), PlanOptions(ON_CPU)):
        plan_run(renamed, run, options)
        assert contents(run) == before
    other = PlanOptions(ON_CPU, begin_from=finished, asked=Asked(labels={"rim": "inner"}))
    with pytest.raises(IncompatibleError, match="another --from"):
        plan_run(renamed, run, other)
    plan_run(renamed, run, replace(other, overwrite=True))
    assert RunFolder(run).read_plan().origin.outputs.places == (0, 2, 2, 1)
    plan_run(renamed, run, PlanOptions(ON_CPU, overwrite=True))
    assert RunFolder(run).read_plan().origin is None
    assert not (run / "initial").exists()
    with pytest.raises(IncompatibleError, match="no --from"):
        begin(renamed, run, finished)


def test_what_cannot_be_begun_from_is_refused_before_anything_is_written(finished, renamed, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "nnunet").mkdir()
    (tmp_path / "nnunet" / "plans.json").write_text("{}")
    with pytest.raises(InputError, match=r"E0100.*medseg import nnunet"):
        begin(renamed, run, tmp_path / "nnunet")
    with pytest.raises(InputError, match="E0100"):
        begin(renamed, run, tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--network"):
        begin(renamed, run, finished, variant=Variant(network="residual"))
    with pytest.raises(UsageError, match="without --from"):
        plan_run(renamed, run, PlanOptions(ON_CPU, asked=Asked(labels={"rim": "inner"})))
    assert not run.exists()


def test_weights_that_their_card_does_not_vouch_for_are_refused(finished, renamed, tmp_path):
    model = Path(shutil.copytree(finished / "models" / CONFIGURATION / "fold_0", tmp_path / "fold_0"))
    with (model / WEIGHTS).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(IntegrityError, match="E0701"):
        begin(renamed, tmp_path / "run", model)
    assert not (tmp_path / "run" / "plan.json").exists()


def test_a_copy_that_was_exchanged_is_noticed_when_training_begins(tuned, tmp_path):
    run = Path(shutil.copytree(tuned, tmp_path / "run"))
    save_tensors(run / "initial" / CONFIGURATION / "fold_0.safetensors", {"a": torch.zeros(2)})
    with pytest.raises(IntegrityError, match="E0701"):
        train_run(run, CONFIGURATION, "0", TrainOptions(iterations=1, device=cpu()))


def test_folds_of_several_plans_are_not_one_model(finished, tmp_path):
    models = Path(shutil.copytree(finished / "models", tmp_path / "models"))
    shutil.copytree(models / CONFIGURATION / "fold_0", models / CONFIGURATION / "fold_1")
    assert set(read_source(models).given.weights[CONFIGURATION]) == {"0", "1"}
    card = models / CONFIGURATION / "fold_1" / CARD
    edit(card, plan__configurations=lambda c: c | {CONFIGURATION: c[CONFIGURATION] | {"spacing_mm": [3.0, 1.0, 1.0]}})
    with pytest.raises(IncompatibleError, match="E0802"):
        read_source(models)
    edit(card, weights_sha256="../../fold_0")
    with pytest.raises(IntegrityError, match="E0711"):
        read_source(models)


def test_a_second_stage_without_its_first_is_refused(finished, tmp_path):
    fold = Path(shutil.copytree(finished / "models" / CONFIGURATION / "fold_0", tmp_path / "fold_0"))
    card = read_record(fold / CARD, ModelCard)
    full = card.plan.configurations[CONFIGURATION]
    both = {
        "low": full.model_copy(update={"name": "low"}),
        CONFIGURATION: full.model_copy(update={"previous_stage": "low"}),
    }
    write_record(fold / CARD, card.model_copy(update={"plan": card.plan.model_copy(update={"configurations": both})}))
    with pytest.raises(InputError, match=r"E0100.*needs low"):
        read_source(fold)


def test_validating_on_what_the_model_was_trained_on_is_told(finished, renamed, tmp_path, caplog):
    same = finished.parent / "data"
    with caplog.at_level(logging.WARNING):
        begin(renamed, tmp_path / "other", finished)
        assert "trained on" not in caplog.text
        begin(same, tmp_path / "same", finished)
    told = [line for line in caplog.messages if "was trained on" in line]
    assert len(told) == 4  # the model has fold 0 alone, which has seen the validation cases of all others
    assert told[0].startswith("fold 1 validates on")
    caplog.clear()
    copied = Path(shutil.copytree(finished / "models" / CONFIGURATION, tmp_path / "model"))
    begin(same, tmp_path / "again", copied)
    assert len([line for line in caplog.messages if "was trained on" in line]) == 4


def test_volumes_are_seen_on_the_files_axes_if_the_model_saw_them_so(finished, renamed, tmp_path):
    model = Path(shutil.copytree(finished / "models" / CONFIGURATION, tmp_path / "model"))
    edit(model / "fold_0" / CARD, orientation="file")
    run = tmp_path / "run"
    begin(renamed, run, model)
    preprocess_run(run, workers=1)
    record = json.loads((run / "prepared" / CONFIGURATION / "case_00.case.json").read_text())
    assert record["preparation"]["to_canonical"] == [0, 1, 2]
    assert record["preparation"]["flipped"] == [False, False, False]
    card = train_run(run, CONFIGURATION, "all", TrainOptions(iterations=1, device=cpu()))
    assert card.orientation == "file"


def test_the_command_tells_what_was_mapped_and_trains(finished, renamed, tmp_path, capsys):
    run, wanted = tmp_path / "run", ["--iterations", "2", "--device", "cpu", "--precision", "float32", "--workers", "1"]
    options = ["--from", str(finished), "--map-channel", "T2=MRI", "--map-label", "rim=outer", "--progress", "plain"]
    assert main(["run", str(renamed), "--run", str(run), *options, *wanted]) == 0
    told = capsys.readouterr().err
    assert "channels: 2 taken over (T2 from MRI, mri)" in told
    assert "labels: 3 taken over (Inner, rim from outer, OUTER)" in told
    assert f"{CONFIGURATION}: begins from the weights of the model's fold 0" in told
    network = build_network(RunFolder(run).read_plan().configurations[CONFIGURATION].network, 2, 4)
    load_weights(run / "models" / CONFIGURATION / "fold_0" / WEIGHTS, network)


@pytest.mark.parametrize("option", ["rim", "=outer", "rim=outer rim=inner"])
def test_pairs_that_are_none_are_refused(option, finished, renamed, tmp_path, capsys):
    pairs = [word for text in option.split() for word in ("--map-label", text)]
    assert main(["plan", str(renamed), "--run", str(tmp_path / "run"), "--from", str(finished), *pairs]) == 2
    assert "E0001" in capsys.readouterr().err


def test_a_plan_without_images_begins_from_no_model(tmp_path, capsys):
    arguments = ["plan", "--fingerprint", "f.json", "--task", "d.json", "--from", str(tmp_path)]
    assert main(arguments) == 2
    assert "--from" in capsys.readouterr().err

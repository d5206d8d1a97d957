"""``medseg quantise`` and predictions in int8: measured once, kept with the model, labels of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantoms import affine_ijk, anatomy, save_nifti
from tiny_runs import CONFIGURATION, cpu, edit

import medseg
from medseg.cli.main import main
from medseg.errors import IncompatibleError, InputError, IntegrityError, ResourceError, Stopped, UsageError
from medseg.inference.with_openvino import OpenVinoNetwork, exact_in_int8, installed
from medseg.pipeline.predict import PredictOptions, predict_files
from medseg.pipeline.quantise import quantise_model
from medseg.records.base import read_record
from medseg.records.int8 import INT8, Int8Ranges
from medseg.records.model import CARD, PostProcessing

pytestmark = pytest.mark.skipif(not (installed() and exact_in_int8()), reason="needs OpenVINO and VNNI")


@pytest.fixture
def images(tmp_path) -> Path:
    for index in range(5):
        image, _ = anatomy(np.random.default_rng(index))
        save_nifti(tmp_path / "images" / f"case_{index}_0000.nii.gz", image, affine_ijk())
    return tmp_path / "images"


@pytest.fixture
def model(finished, tmp_path) -> Path:
    """The finished configuration, to be written to."""
    return Path(shutil.copytree(finished / "models" / CONFIGURATION, tmp_path / "model"))


def ranges(model: Path) -> Path:
    return model / "fold_0" / INT8


def predict(model: Path, images: Path, output: Path, backend: str):
    options = PredictOptions(device=cpu(), backend=backend, postprocessing=PostProcessing())
    return predict_files(model, images, output, options)


def statuses(manifest) -> set[str]:
    return {case.status for case in manifest.cases}


def test_a_model_is_measured_compared_and_predicts_in_int8(model, images, tmp_path, capsys):
    assert main(["quantise", "--model", str(model), "-i", str(images), "--cases", "2", "--progress", "none"]) == 0
    said = capsys.readouterr().out
    assert str(ranges(model)) in said
    assert "2 cases: " in said
    assert "medseg predict" in said
    record = read_record(ranges(model), Int8Ranges)
    assert record.cases == ("case_0", "case_2")  # evenly spread, every second one to compare with
    assert record.weights_sha256 == json.loads((model / "fold_0" / CARD).read_text())["weights_sha256"]
    plain = predict(model, images, tmp_path / "labels", "torch")
    assert statuses(plain) == {"done"}
    exact = {path.name: np.asarray(nib.load(path).dataobj) for path in (tmp_path / "labels").glob("*.nii.gz")}
    assert statuses(predict(model, images, tmp_path / "labels", "int8")) == {"done"}  # other labels: not skipped
    again = predict(model, images, tmp_path / "labels", "int8")
    assert statuses(again) == {"skipped"}
    assert again.settings["backend"] == "int8"
    for name, expected in exact.items():
        found = np.asarray(nib.load(tmp_path / "labels" / name).dataobj)
        assert (found == expected).mean() > 0.99
        assert np.count_nonzero(found)


def test_dice_told_is_that_of_the_labels(model, images, tmp_path):
    (told,) = quantise_model(model, images, cases=2, device=cpu())
    assert told.compared == ("case_1", "case_3")
    for backend in ("torch", "int8"):
        predict(model, images, tmp_path / backend, backend)
    card = json.loads((model / "fold_0" / CARD).read_text())
    names = {label["name"]: number for number, label in enumerate(card["plan"]["task"]["labels"])}
    assert set(told.dice) == set(names) - {"background"}
    for label, dice in told.dice.items():
        values = []
        for case in told.compared:
            a, b = (np.asarray(nib.load(tmp_path / way / f"{case}.nii.gz").dataobj) for way in ("torch", "int8"))
            a, b = a == names[label], b == names[label]
            values.append(2 * (a & b).sum() / (a.sum() + b.sum()))
        assert dice == pytest.approx(np.mean(values))


def test_one_image_is_measured_and_compared_itself(model, images):
    (told,) = quantise_model(model, images / "case_3_0000.nii.gz", device=cpu())
    assert told.measured == told.compared == ("case_3",)


def test_it_is_asked_for_in_python_too(model, images):
    quantise_model(model, images, cases=1, device=cpu())
    loaded = medseg.load_model(model, device="cpu", precision="float32", backend="int8")
    assert loaded.backend.name == "int8"
    image = nib.load(images / "case_4_0000.nii.gz")
    assert medseg.predict(np.asarray(image.dataobj), image.affine, loaded).any()


def test_without_ranges_or_with_those_of_other_weights_or_damaged_it_is_refused(model, images, tmp_path):
    with pytest.raises(InputError, match=r"E0100.*int8\.json.*medseg quantise"):
        predict(model, images, tmp_path / "out", "int8")
    quantise_model(model, images, cases=1, device=cpu())
    edit(ranges(model), weights_sha256="0" * 64)
    with pytest.raises(IncompatibleError, match=r"E0802.*other weights"):
        predict(model, images, tmp_path / "out", "int8")
    ranges(model).write_text("{")
    with pytest.raises(IntegrityError, match="E0711"):
        predict(model, images, tmp_path / "out", "int8")
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_a_network_without_wide_convolutions_is_told(model, images, monkeypatch):
    monkeypatch.setattr("medseg.inference.int8.LEAST_CHANNELS", 1000)
    with pytest.raises(UsageError, match=r"E0001.*no convolution"):
        quantise_model(model, images, cases=1, device=cpu())
    assert not ranges(model).exists()


def test_an_image_that_memory_is_too_small_for_is_refused_before_anything_is_computed(model, images, monkeypatch):
    monkeypatch.setattr("medseg.pipeline.room.free_memory_bytes", lambda: 1000)
    monkeypatch.setattr("medseg.pipeline.quantise.segment", lambda *_: pytest.fail("it was segmented"))
    with pytest.raises(ResourceError, match=r"E0600.*case=case_0"):
        quantise_model(model, images, cases=2, device=cpu())
    assert not ranges(model).exists()


def test_where_int8_fails_in_the_middle_the_case_fails_and_no_other_precision_takes_its_place(
    model, images, tmp_path, monkeypatch
):
    quantise_model(model, images, cases=1, device=cpu())
    original, seen = OpenVinoNetwork._run, []

    def broken(self, one):
        seen.append(1)
        if len(seen) == 1:
            raise RuntimeError("made up")
        return original(self, one)

    monkeypatch.setattr(OpenVinoNetwork, "_run", broken)
    manifest = predict(model, images, tmp_path / "labels", "int8")
    assert [case.status for case in manifest.cases] == ["failed", *["done"] * 4]
    assert "made up" in manifest.failed[0].problems[0]
    assert statuses(predict(model, images, tmp_path / "labels", "int8")) == {"done", "skipped"}


def test_no_images_and_a_stop_leave_nothing(model, images, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        quantise_model(model, tmp_path / "empty", device=cpu())
    with pytest.raises(Stopped):
        quantise_model(model, images, device=cpu(), stop_signal=lambda: 15)
    assert not ranges(model).exists()

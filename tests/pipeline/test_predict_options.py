"""Presets, maps, keys, memory and bad networks of ``medseg predict``; arrays through ``medseg.predict``."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from phantoms import affine_ijk, anatomy, save_nifti
from tiny_runs import CONFIGURATION, cpu, edit

import medseg
import medseg.pipeline.predict_case as module
import medseg.pipeline.room as room
from medseg.artefacts import sha256_of
from medseg.cli.main import main
from medseg.errors import EnvironmentFailure, InputError, Problem, UsageError
from medseg.inference.backend import TORCH
from medseg.inference.need import Need
from medseg.inference.with_openvino import installed
from medseg.pipeline.predict import MANIFEST, PredictOptions, predict_files
from medseg.pipeline.predict_settings import limited, meaning
from medseg.records.base import read_record
from medseg.records.run import RunManifest


def predict(model, inputs, output, **options) -> RunManifest:
    return predict_files(model, inputs, output, PredictOptions(**({"device": cpu()} | options)))


def statuses(manifest: RunManifest) -> dict[str, str]:
    return {case.id: case.status for case in manifest.cases}


def array(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


@pytest.fixture
def images(tmp_path) -> Path:
    for index, name in enumerate("abc"):
        image, _ = anatomy(np.random.default_rng(index))
        save_nifti(tmp_path / "images" / f"{name}_0000.nii.gz", image, affine_ijk())
    return tmp_path / "images"


@pytest.fixture
def model(finished, tmp_path) -> Path:
    """The finished configuration, to be written to."""
    return Path(shutil.copytree(finished / "models" / CONFIGURATION, tmp_path / "model"))


def test_the_presets_differ_in_step_views_and_networks_and_single_options_go_before_them(finished):
    assert [PredictOptions(speed=s).tile_step for s in ("fast", "balanced", "accurate")] == [0.8, 0.5, 0.5]
    assert [PredictOptions(speed=s).mirror for s in ("fast", "balanced", "accurate")] == [False, False, True]
    assert not PredictOptions(speed="accurate", tta="none").mirror
    assert PredictOptions(speed="fast", tta="mirror", step=0.3).mirror
    assert PredictOptions(speed="fast", step=0.3).tile_step == 0.3
    loaded = medseg.load_model(finished, device="cpu")
    two = type(loaded)(loaded.folder, loaded.cards * 2, loaded.networks * 2, loaded.device)
    assert [len(limited(two, PredictOptions(speed=s)).networks) for s in ("fast", "balanced")] == [1, 2]
    assert len(limited(two, PredictOptions(speed="fast", folds=("0", "1"))).networks) == 2


def test_what_will_be_done_and_what_it_costs_is_said_before_the_start(finished, images, tmp_path, capsys):
    command = ["predict", "--model", str(finished), "-i", str(images), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*command, "--speed", "accurate", "--precision", "float32"]) == 0
    lines = capsys.readouterr().err.splitlines()
    loaded = medseg.load_model(finished, device="cpu")
    assert lines[0] == meaning(loaded, PredictOptions(speed="accurate"))
    assert "tiles 0.5 of their size apart" in lines[0]
    assert "a median case has" in lines[0]
    assert any(line.startswith("a: ") and "GB of memory" in line for line in lines)
    manifest = read_record(tmp_path / "out" / MANIFEST, RunManifest)
    assert (manifest.settings["tta"], manifest.settings["step"]) == ("mirror", "0.5")


@pytest.mark.parametrize("step", [0.0, 0.05, 1.5, float("nan")])
def test_a_step_outside_of_a_tile_is_a_wrong_argument(finished, images, tmp_path, step):
    with pytest.raises(UsageError, match="E0001"):
        predict(finished, images, tmp_path / "out", step=step)


def test_what_does_not_change_labels_does_nothing_again(model, images, tmp_path):
    predict(model, images, tmp_path / "out")
    edit(
        model / "fold_0" / "model.json",
        plan__reasons=[],
        plan__fingerprint_sha256="other",
        plan__budget__memory_gb=3.5,
        batch_size=5,
        training__momentum=0.5,
        training_seconds=1.0,
        medseg_version="99",
        scores={},
    )
    edit(model / "postprocessing.json", evidence=["nothing"])
    moved = model.rename(tmp_path / "moved")
    shutil.copytree(images, tmp_path / "copied")
    assert set(statuses(predict(moved, tmp_path / "copied", tmp_path / "out")).values()) == {"skipped"}
    assert set(statuses(predict(moved, images, tmp_path / "out", step=0.7)).values()) == {"done"}
    assert set(statuses(predict(moved, images, tmp_path / "out", step=0.7, speed="fast")).values()) == {"skipped"}


def test_maps_are_written_beside_the_same_labels_and_made_when_they_are_missing(finished, images, tmp_path):
    one, out = images / "a_0000.nii.gz", tmp_path / "out"
    predict(finished, one, out)
    plain = sha256_of(out / "a.nii.gz")
    manifest = predict(finished, one, out, probabilities="uint16", uncertainty=True)
    (case,) = manifest.cases
    assert case.status == "done"
    assert case.outputs["a.nii.gz"] == plain
    assert set(case.outputs) == {
        "a.nii.gz", "uncertainty/a.nii.gz", *(f"probabilities/a/label_{v}.nii.gz" for v in range(3)),
    }  # fmt: skip
    assert 0 < case.quality <= 1
    labels = array(out / "a.nii.gz")
    shares = np.stack([nib.load(out / f"probabilities/a/label_{v}.nii.gz").get_fdata() for v in range(3)])
    np.testing.assert_allclose(shares.sum(0), 1, atol=5e-5)
    inside = labels > 0  # post-processing may have removed what was likely outside
    clear = np.sort(shares, 0)[-1] - np.sort(shares, 0)[-2] > 1e-3
    assert np.array_equal(shares.argmax(0)[inside & clear], labels[inside & clear])
    given = nib.load(one)
    np.testing.assert_allclose(nib.load(out / "uncertainty/a.nii.gz").affine, given.affine, atol=1e-4)
    assert statuses(predict(finished, one, out)) == {"a": "skipped"}
    assert statuses(predict(finished, one, out, probabilities="uint16", uncertainty=True)) == {"a": "skipped"}
    (out / "uncertainty/a.nii.gz").unlink()
    assert statuses(predict(finished, one, out, probabilities="uint16", uncertainty=True)) == {"a": "done"}
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_folds_that_disagree_are_the_uncertainty_of_several(model, images, tmp_path):
    shutil.copytree(model / "fold_0", model / "fold_1")
    edit(model / "fold_1" / "model.json", fold="1")
    manifest = predict(model, images / "a_0000.nii.gz", tmp_path / "same", uncertainty=True, folds=("0", "1"))
    assert manifest.cases[0].status == "done"
    assert array(tmp_path / "same" / "uncertainty" / "a.nii.gz").max() < 1e-3  # a network agrees with itself


def test_a_prediction_that_is_not_finite_has_a_code_of_its_own(finished, images, tmp_path, monkeypatch):
    original = module.segment

    def broken(model, prepared, **keywords):
        if original.seen == 1:
            prepared[-1].image[:] = np.inf
        original.seen += 1
        return original(model, prepared, **keywords)

    original.seen = 0
    monkeypatch.setattr(module, "segment", broken)
    manifest = predict(finished, images, tmp_path / "out")
    assert statuses(manifest) == {"a": "done", "b": "failed", "c": "done"}
    assert "E1002" in manifest.failed[0].problems[0]


def test_a_case_that_cannot_fit_is_refused_before_it_is_prepared_and_the_others_go_on(
    finished, images, tmp_path, monkeypatch
):
    image, _ = anatomy(np.random.default_rng(3), (60, 50, 40))
    save_nifti(images / "large_0000.nii.gz", image, affine_ijk())
    prepared = []
    original = module.prepare_stages

    def watch(model, volume):
        prepared.append(volume.grid.shape)
        return original(model, volume)

    def by_size(model, shape, *arguments, **keywords):
        size = int(np.prod(shape))
        return Need(size, size, size, 1, 1)

    monkeypatch.setattr(module, "prepare_stages", watch)
    monkeypatch.setattr(room, "case_need", by_size)
    monkeypatch.setattr(room, "free_memory_bytes", lambda: 20_000)  # three times 14 040 do not fit, once does
    manifest = predict(finished, images, tmp_path / "out")
    assert statuses(manifest) == {"a": "done", "b": "done", "c": "done", "large": "failed"}
    assert "error[E0600] case=large" in manifest.failed[0].problems[0]
    assert "GB of memory" in manifest.failed[0].problems[0]
    assert len(prepared) == 3


def test_a_case_is_measured_by_what_is_not_zero_if_the_whole_is_too_large(finished, images, tmp_path, monkeypatch):
    image, _ = anatomy(np.random.default_rng(3))
    wide = np.zeros((90, 70, 60), np.float32)
    wide[20:50, 30:56, 10:28] = image + 1000
    save_nifti(tmp_path / "wide.nii.gz", wide, affine_ijk())
    monkeypatch.setattr(room, "case_need", lambda model, shape, *a, **k: Need(int(np.prod(shape)), 1, 1, 1, 1))
    monkeypatch.setattr(room, "free_memory_bytes", lambda: 50_000)
    assert statuses(predict(finished, tmp_path / "wide.nii.gz", tmp_path / "out")) == {"wide": "done"}


def test_a_case_that_cannot_be_written_fails_alone_and_a_full_disk_ends_the_command(
    finished, images, tmp_path, monkeypatch
):
    original = module.write_labels

    def broken(path, *arguments):
        if path.name == "b.nii.gz":
            raise error
        return original(path, *arguments)

    monkeypatch.setattr(module, "write_labels", broken)
    error: Exception = ZeroDivisionError("oops")
    assert statuses(predict(finished, images, tmp_path / "out")) == {"a": "done", "b": "failed", "c": "done"}
    error = EnvironmentFailure(Problem("E0502", "no space left"))
    with pytest.raises(EnvironmentFailure, match="E0502"):
        predict(finished, images, tmp_path / "full")
    assert statuses(read_record(tmp_path / "full" / MANIFEST, RunManifest))["a"] == "done"


def test_a_gpu_without_memory_does_not_stop_a_case(finished, images, tmp_path, monkeypatch):
    """Memory that runs out is made up; the device is called a GPU until all goes to the CPU."""
    original, tried = module.segment, []

    def hungry(model, prepared, *, blending, **keywords):
        tried.append((model.device.torch_device.type, blending.together, blending.on_device))
        if len(tried) < 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, prepared, blending=blending, **keywords)

    class Gpu(module.Ladder):
        def __init__(self, model):
            device = type(model.device)(torch.device("cuda"), torch.float32, "made up")
            super().__init__(type(model)(model.folder, model.cards, model.networks, device))

    monkeypatch.setattr(module, "segment", hungry)
    monkeypatch.setattr("medseg.pipeline.predict.Ladder", Gpu)
    assert statuses(predict(finished, images / "a_0000.nii.gz", tmp_path / "out")) == {"a": "done"}
    assert tried == [("cuda", None, True), ("cuda", 1, True), ("cuda", 1, False), ("cpu", 1, False)]


# Arrays


@pytest.mark.parametrize("flip", [False, True])
def test_an_array_is_segmented_as_the_file_that_holds_it(finished, images, tmp_path, flip):
    image = nib.load(images / "a_0000.nii.gz")
    if flip:
        image = image.as_reoriented(np.array([[1, -1], [2, 1], [0, 1]]))
        save_nifti(images / "a_0000.nii.gz", np.asarray(image.dataobj), image.affine)
        image = nib.load(images / "a_0000.nii.gz")
    predict(finished, images / "a_0000.nii.gz", tmp_path / "out")
    model = medseg.load_model(finished, device="cpu", precision="float32")
    data = np.asarray(image.dataobj)
    labels = medseg.predict(data, image.affine, model)
    assert labels.shape == data.shape
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, array(tmp_path / "out" / "a.nii.gz"))
    np.testing.assert_array_equal(medseg.predict(data[None], image.affine, model, step=0.5, tta=False), labels)
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["cases"][0]["status"] == "done"


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_gives_the_labels_of_float32_but_for_a_few(finished, images, precision):
    image = nib.load(images / "a_0000.nii.gz")
    data = np.asarray(image.dataobj)
    exact, half = (
        medseg.predict(data, image.affine, medseg.load_model(finished, device="cpu", precision=name, backend="torch"))
        for name in ("float32", precision)
    )
    assert (exact == half).mean() > 0.995
    assert exact.any()


def test_what_overflows_in_float16_is_computed_in_float32(finished, images, caplog):
    image = nib.load(images / "a_0000.nii.gz")
    data = np.asarray(image.dataobj)
    found = []
    for precision in ("float32", "float16"):
        model = medseg.load_model(finished, device="cpu", precision=precision, backend="torch")
        with torch.no_grad():
            model.networks[0].encoder[0][0].weight.mul_(1e6)  # norms take that away again
        model = replace(model, backend=TORCH)  # not with copies of the weights as they were
        found.append(medseg.predict(data, image.affine, model))
    assert found[0].any()
    np.testing.assert_array_equal(found[0], found[1])
    assert sum("computed in float32" in record.getMessage() for record in caplog.records) == 1


def test_a_loaded_model_computes_with_the_backend_asked_for(finished, images):
    image = nib.load(images / "a_0000.nii.gz")
    data = np.asarray(image.dataobj)
    plain = medseg.load_model(finished, device="cpu", precision="float32", backend="torch")
    assert (plain.backend.name, plain.backend.reason) == ("torch", "asked for")
    with pytest.raises(UsageError, match="for a GPU"):
        medseg.load_model(finished, device="cpu", backend="graphs")
    if not installed():
        return
    other = medseg.load_model(finished, device="cpu", precision="float32", backend="openvino")
    assert other.backend.name == "openvino"
    engine, calls = other.backend.engine(other.networks[0]), []
    handle = engine.register_forward_hook(lambda *_: calls.append(1))
    labels = medseg.predict(data, image.affine, other)
    handle.remove()
    assert calls
    assert (labels == medseg.predict(data, image.affine, plain)).mean() > 0.999


@pytest.mark.parametrize(
    ("shape", "affine", "code"),
    [
        ((5, 6), np.eye(4), "E0111"),
        ((2, 5, 6, 7), np.eye(4), "E0133"),
        ((5, 0, 7), np.eye(4), "E0111"),
        ((5, 6, 7), np.zeros((4, 4)), "E0124"),
        ((5, 6, 7), np.eye(3), "E0121"),
    ],
)
def test_arrays_that_are_no_image_of_the_model_are_refused(finished, shape, affine, code):
    with pytest.raises(InputError, match=code):
        medseg.predict(np.ones(shape), affine, medseg.load_model(finished, device="cpu", precision="float32"))


def test_what_the_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_like_that"):
        medseg.nothing_like_that  # noqa: B018

"""Predicting: names, what is skipped, what one bad case costs, and which networks take part."""

from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantoms import affine_ijk, anatomy, save_nifti
from PIL import Image
from scipy import ndimage
from tiny_runs import CONFIGURATION, contents, cpu, edit, finished_run_2d, run_command

import medseg.pipeline.train
from medseg.artefacts import owned, sha256_of
from medseg.errors import (
    EnvironmentFailure,
    IncompatibleError,
    InputError,
    IntegrityError,
    OwnershipError,
    Stopped,
    UsageError,
)
from medseg.evaluation.postprocessing import apply
from medseg.imaging.volumes import read_channels
from medseg.inference.export import labels_from_logits
from medseg.inference.model import load_model
from medseg.inference.sliding import predict_logits
from medseg.pipeline.predict import MANIFEST, PredictOptions, predict_files
from medseg.pipeline.train import TrainOptions, train_run
from medseg.preparation.prepare import prepare
from medseg.preparation.restore import paste_back
from medseg.records.base import read_record
from medseg.records.model import PostProcessing
from medseg.records.run import RunManifest


def predict(model, inputs, output, **options):
    return predict_files(model, inputs, output, PredictOptions(**({"device": cpu()} | options)))


def statuses(manifest: RunManifest) -> dict[str, str]:
    return {case.id: case.status for case in manifest.cases}


def networks_of(manifest: RunManifest) -> set[str]:
    return {name.removeprefix(f"{CONFIGURATION} ") for name in manifest.inputs}


def image_file(path: Path, seed: int = 0) -> Path:
    image, _ = anatomy(np.random.default_rng(seed))
    save_nifti(path, image, affine_ijk())
    return path


def array(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of three images, named with and without a channel number."""
    for index, name in enumerate(("a_0000.nii.gz", "b_0000.nii.gz", "c_0000.nii.gz")):
        image_file(tmp_path / "images" / name, index)
    return tmp_path / "images"


@pytest.fixture
def model(finished, tmp_path) -> Path:
    """The finished run's models, to be written to."""
    return Path(shutil.copytree(finished / "models" / CONFIGURATION, tmp_path / "model"))


# Names


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("case_0000.nii.gz", "case.nii.gz"),
        ("case.nii.gz", "case.nii.gz"),
        ("case_0000.nii", "case.nii"),
        ("patient_0012.nii.gz", "patient_0012.nii.gz"),
        ("with.dots-and_more_0000.nii.gz", "with.dots-and_more.nii.gz"),
        ("UPPER_0000.NII.GZ", "UPPER.nii.gz"),
    ],
)
def test_a_single_file_is_written_under_the_name_of_its_case(finished, tmp_path, given, written):
    image_file(tmp_path / given.lower()).rename(tmp_path / given)
    predict(finished, tmp_path / given, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {written, MANIFEST}


def test_a_list_of_files_from_several_folders_is_one_prediction(finished, tmp_path):
    files = [image_file(tmp_path / "one" / "a.nii.gz", 1), image_file(tmp_path / "two" / "b_0000.nii", 2)]
    manifest = predict(finished, files, tmp_path / "out")
    assert statuses(manifest) == {"a": "done", "b": "done"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.nii.gz", "b.nii", MANIFEST}


def test_cases_of_the_same_name_from_two_folders_are_refused_and_neither_is_chosen(finished, tmp_path):
    files = [image_file(tmp_path / "one" / "a.nii.gz", 1), image_file(tmp_path / "two" / "a.nii.gz", 2)]
    with pytest.raises(InputError, match="E0140"):
        predict(finished, files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_of_a_folder_are_passed_over(finished, images, tmp_path):
    (images / "notes.txt").write_text("x")
    (images / ".hidden_0000.nii.gz").write_text("x")
    assert set(statuses(predict(finished, images, tmp_path / "out"))) == {"a", "b", "c"}


def test_a_folder_without_images_and_a_missing_path_are_refused_and_leave_no_folder_behind(finished, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="E0146") as caught:
        predict(finished, tmp_path / "empty", tmp_path / "out")
    assert caught.value.exit_code == 3
    with pytest.raises(InputError, match=r"E0100.*gone\.nii\.gz does not exist"):
        predict(finished, tmp_path / "gone.nii.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_would_replace_an_input_is_refused(finished, tmp_path):
    image = image_file(tmp_path / "images" / "a.nii.gz")
    digest = sha256_of(image)
    (tmp_path / "link").symlink_to(tmp_path / "images")
    for output in (tmp_path / "images", tmp_path / "link", tmp_path / "images" / ".." / "images"):
        with pytest.raises(UsageError, match=r"E0001.*a\.nii\.gz would replace an input") as caught:
            predict(finished, image, output)
        assert caught.value.exit_code == 2
    assert sha256_of(image) == digest
    assert [p.name for p in (tmp_path / "images").iterdir()] == ["a.nii.gz"]


def test_pictures_give_lossless_label_maps_of_their_size(tmp_path, tmp_path_factory):
    run = finished_run_2d(tmp_path_factory.mktemp("pictures"))
    source = next((run.parent / "data" / "imagesTr").iterdir())
    with Image.open(source) as picture:
        picture.save(tmp_path / "plain.png")
        picture.save(tmp_path / "numbered_0000.png")
        picture.save(tmp_path / "scan.tif")
        picture.save(tmp_path / "lossy.jpg", quality=95)
        size = picture.size
    inputs = [tmp_path / name for name in ("plain.png", "numbered_0000.png", "scan.tif", "lossy.jpg")]
    predict(run, inputs, tmp_path / "out")
    outputs = {p.name for p in (tmp_path / "out").iterdir()} - {MANIFEST}
    assert outputs == {"plain.png", "numbered.png", "scan.tif", "lossy.png"}
    maps = {}
    for name in outputs:
        with Image.open(tmp_path / "out" / name) as label:
            assert label.size == size
            assert label.mode in ("L", "P")
            maps[name] = np.asarray(label)
    assert set(np.unique(maps["plain.png"])) == {0, 1}
    np.testing.assert_array_equal(maps["plain.png"], maps["scan.tif"])
    np.testing.assert_array_equal(maps["plain.png"], maps["numbered.png"])


# What is done again


def test_finished_cases_are_skipped(finished, images, tmp_path):
    assert set(statuses(predict(finished, images, tmp_path / "out")).values()) == {"done"}
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.nii.gz")}
    assert set(statuses(predict(finished, images, tmp_path / "out")).values()) == {"skipped"}
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_changed_input_and_a_damaged_or_missing_output_are_done_again(finished, images, tmp_path):
    out = tmp_path / "out"
    predict(finished, images, out)
    before = contents(out)
    image_file(images / "a_0000.nii.gz", 50)
    (out / "b.nii.gz").write_bytes(before["b.nii.gz"][:-1])
    image_file(images / "d_0000.nii.gz", 51)
    again = statuses(predict(finished, images, out))
    assert again == {"a": "done", "b": "done", "c": "skipped", "d": "done"}
    assert (out / "a.nii.gz").read_bytes() != before["a.nii.gz"]
    assert (out / "b.nii.gz").read_bytes() == before["b.nii.gz"]
    (out / "c.nii.gz").unlink()
    assert statuses(predict(finished, images, out))["c"] == "done"
    assert (out / "c.nii.gz").read_bytes() == before["c.nii.gz"]


@pytest.mark.parametrize("change", ["post-processing", "mirror", "weights"])
def test_another_way_to_predict_does_all_again(model, images, tmp_path, change):
    predict(model, images, tmp_path / "out")
    options = {}
    if change == "post-processing":
        edit(model / "postprocessing.json", keep_largest_foreground=lambda old: not old)
    elif change == "mirror":
        options["tta"] = "mirror"
    else:
        weights = shutil.copy(model / "fold_0" / "weights.safetensors", tmp_path / "old")
        content = bytearray(Path(weights).read_bytes())
        content[-2] ^= 1  # the sign-free middle of the last float
        (model / "fold_0" / "weights.safetensors").write_bytes(content)
        edit(model / "fold_0" / "model.json", weights_sha256=sha256_of(model / "fold_0" / "weights.safetensors"))
    assert set(statuses(predict(model, images, tmp_path / "out", **options)).values()) == {"done"}


def test_a_manifest_that_cannot_be_read_costs_only_time(finished, images, tmp_path):
    predict(finished, images, tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_text("{")
    assert set(statuses(predict(finished, images, tmp_path / "out")).values()) == {"done"}
    assert set(statuses(predict(finished, images, tmp_path / "out")).values()) == {"skipped"}


def test_the_manifest_names_model_settings_and_files_and_keeps_cases_of_earlier_commands(finished, images, tmp_path):
    out = tmp_path / "out"
    predict(finished, [images / "a_0000.nii.gz", images / "b_0000.nii.gz"], out)
    predict(finished, images / "c_0000.nii.gz", out)
    manifest = read_record(out / MANIFEST, RunManifest)
    assert set(statuses(manifest)) == {"a", "b", "c"}
    for case in manifest.cases:
        ((name, digest),) = case.outputs.items()
        assert sha256_of(out / name) == digest
    weights = finished / "models" / CONFIGURATION / "fold_0" / "weights.safetensors"
    assert manifest.inputs == {f"{CONFIGURATION} fold_0": sha256_of(weights)}
    assert manifest.settings["precision"] == "torch.float32"
    assert set(statuses(predict(finished, images, out)).values()) == {"skipped"}


# What a bad case costs


def test_broken_cases_do_not_stop_the_others(finished, images, tmp_path):
    whole = (images / "b_0000.nii.gz").read_bytes()
    (images / "b_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    image, _ = anatomy(np.random.default_rng(3))
    image[3, 4, 5] = np.nan
    save_nifti(images / "nan_0000.nii.gz", image, affine_ijk())
    save_nifti(images / "rgb_0000.nii.gz", np.stack([image, image], -1), affine_ijk())
    (images / "link_0000.nii.gz").symlink_to(images / "nowhere")
    manifest = predict(finished, images, tmp_path / "out")
    codes = {case.id: [p.partition("[")[2][:5] for p in case.problems] for case in manifest.failed}
    assert codes == {"b": ["E0101"], "nan": ["E0110"], "rgb": ["E0111"], "link": ["E0143"]}
    assert all(f"case={case.id}:" in problem for case in manifest.failed for problem in case.problems)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.nii.gz", "c.nii.gz", MANIFEST}
    (images / "b_0000.nii.gz").write_bytes(whole)
    again = statuses(predict(finished, images, tmp_path / "out"))
    assert (again["a"], again["b"], again["c"], again["nan"]) == ("skipped", "done", "skipped", "failed")


def test_an_unexpected_error_in_one_case_is_told_as_a_bug_of_that_case(finished, images, tmp_path, monkeypatch):
    import medseg.pipeline.predict_case as module

    def broken(paths):
        if paths[0].name.startswith("b"):
            raise ZeroDivisionError("oops")
        return read_channels(paths)

    monkeypatch.setattr(module, "read_channels", broken)
    manifest = predict(finished, images, tmp_path / "out")
    assert statuses(manifest) == {"a": "done", "b": "failed", "c": "done"}
    assert "E7000" in manifest.failed[0].problems[0]
    assert "ZeroDivisionError: oops" in manifest.failed[0].problems[0]


def test_a_case_that_does_not_fit_into_memory_is_named(finished, images, tmp_path, monkeypatch):
    import medseg.pipeline.predict_case as module

    def hungry(*arguments, **keywords):
        raise MemoryError

    monkeypatch.setattr(module, "segment", hungry)
    manifest = predict(finished, images, tmp_path / "out")
    assert [p.partition("]")[0] for case in manifest.failed for p in case.problems] == ["error[E0600"] * 3


def test_a_stop_keeps_what_is_done_and_the_same_command_goes_on(finished, images, tmp_path):
    asked = iter([None, None, signal.SIGTERM])
    with pytest.raises(Stopped, match="after 2 cases") as caught:
        predict_files(finished, images, tmp_path / "out", PredictOptions(device=cpu()), stop_signal=lambda: next(asked))
    assert caught.value.exit_code == 143
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.nii.gz", "b.nii.gz", MANIFEST}
    assert statuses(predict(finished, images, tmp_path / "out")) == {"a": "skipped", "b": "skipped", "c": "done"}


def test_a_folder_in_use_is_refused(finished, images, tmp_path):
    with owned(tmp_path / "out"), pytest.raises(OwnershipError, match="E0901"):
        predict(finished, images, tmp_path / "out")


def test_an_output_folder_that_cannot_be_made_is_refused(finished, images, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentFailure, match="E0501") as caught:
        predict(finished, images, tmp_path / "file" / "out")
    assert caught.value.exit_code == 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_permission_is_refused(finished, images, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(EnvironmentFailure, match="E0501"):
        predict(finished, images, tmp_path / "out")


def test_a_disk_that_is_full_ends_the_command_with_5_and_leaves_nothing_partial(finished, images, tmp_path):
    """Files beyond 300 bytes cannot be written: the lock can, a label file cannot."""

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))

    ended = run_command(
        *("predict", "--model", finished, "-i", images, "-o", tmp_path / "out", "--precision", "float32"),
        preexec_fn=small_files_only,
    )
    assert ended.returncode == 5, ended.stderr
    assert "error[E0502]" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list((tmp_path / "out").iterdir()) == []
    assert set(statuses(predict(finished, images, tmp_path / "out")).values()) == {"done"}


# Which networks, and what is done with their output


@pytest.fixture(scope="module")
def folds(prepared, tmp_path_factory) -> Path:
    """A run with folds 0 and 2 trained, without drawing curves."""
    patch = pytest.MonkeyPatch()
    patch.setattr(medseg.pipeline.train, "training_picture", lambda path, points: None)
    run = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("folds") / "run"))
    for fold, seed in (("0", 0), ("2", 7)):
        train_run(run, CONFIGURATION, fold, TrainOptions(epochs=3, seed=seed, device=cpu()))
    patch.undo()
    return run


def expected_labels(run: Path, path: Path, names: tuple[str, ...]) -> np.ndarray:
    """(k, j, i) labels from the mean logits of single folds, each predicted on its own."""
    singles = [load_model(run / "models" / CONFIGURATION / f"fold_{name}", cpu()) for name in names]
    volume = read_channels([path])
    plan, configuration = singles[0].plan, singles[0].configuration
    prepared = prepare(volume, plan, configuration)
    logits = sum(predict_logits(m.networks, prepared.image, configuration, cpu()) for m in singles) / len(singles)
    labels = labels_from_logits(logits, prepared.preparation, configuration.resampling, plan.task)
    chosen = read_record(run / "models" / CONFIGURATION / "postprocessing.json", PostProcessing)
    return apply(paste_back(labels, prepared.preparation), chosen)


@pytest.mark.parametrize("names", [("0",), ("2",), ("0", "2")])
def test_the_logits_of_the_named_folds_are_averaged(folds, tmp_path, names):
    path = image_file(tmp_path / "a.nii.gz", 8)
    predict(folds, path, tmp_path / "out", folds=names)
    np.testing.assert_array_equal(array(tmp_path / "out" / "a.nii.gz").T, expected_labels(folds, path, names))


def test_without_names_all_folds_are_averaged_until_there_is_a_model_of_all_cases(folds, tmp_path):
    path = image_file(tmp_path / "a.nii.gz", 8)
    manifest = predict(folds, path, tmp_path / "both")
    assert networks_of(manifest) == {"fold_0", "fold_2"}
    np.testing.assert_array_equal(array(tmp_path / "both" / "a.nii.gz").T, expected_labels(folds, path, ("0", "2")))
    more = shutil.copytree(folds, tmp_path / "more")
    train_run(more, CONFIGURATION, "all", TrainOptions(epochs=1, device=cpu()))
    assert networks_of(predict(more, path, tmp_path / "all")) == {"fold_all"}
    assert networks_of(predict(more, path, tmp_path / "named", folds=("2", "all"))) == {"fold_2", "fold_all"}


def test_a_fold_that_is_not_finished_takes_no_part(folds, tmp_path):
    half = shutil.copytree(folds, tmp_path / "half")
    (half / "models" / CONFIGURATION / "fold_2" / "model.json").unlink()
    path = image_file(tmp_path / "a.nii.gz", 8)
    assert networks_of(predict(half, path, tmp_path / "out")) == {"fold_0"}
    with pytest.raises(UsageError, match=r"E0001.*fold 2 is not trained"):
        predict(half, path, tmp_path / "out", folds=("2",))


def test_the_folder_of_a_run_a_configuration_or_a_fold_all_name_a_model(folds, tmp_path):
    path = image_file(tmp_path / "a.nii.gz", 8)
    configuration = folds / "models" / CONFIGURATION
    assert networks_of(predict(configuration, path, tmp_path / "one")) == {"fold_0", "fold_2"}
    assert networks_of(predict(configuration / "fold_2", path, tmp_path / "two")) == {"fold_2"}
    assert networks_of(predict(folds, path, tmp_path / "three", configuration=CONFIGURATION)) == {"fold_0", "fold_2"}
    with pytest.raises(UsageError, match=r"E0001.*2d is not trained vs 3d_fullres"):
        predict(folds, path, tmp_path / "four", configuration="2d")
    with pytest.raises(InputError, match=r"E0100.*no trained model"):
        predict(tmp_path, path, tmp_path / "five")


def test_several_configurations_need_a_name(folds, tmp_path):
    two = shutil.copytree(folds, tmp_path / "two")
    shutil.copytree(two / "models" / CONFIGURATION, two / "models" / "other")
    path = image_file(tmp_path / "a.nii.gz", 8)
    with pytest.raises(UsageError, match=r"E0001.*3d_fullres, other.*--configuration"):
        predict(two, path, tmp_path / "out")
    predict(two, path, tmp_path / "out", configuration="other")


def test_folds_of_different_plans_are_not_averaged(folds, tmp_path):
    mixed = shutil.copytree(folds, tmp_path / "mixed")
    edit(
        mixed / "models" / CONFIGURATION / "fold_2" / "model.json",
        plan__configurations__3d_fullres__spacing_mm=[2.5, 1.1, 0.9],
    )
    path = image_file(tmp_path / "a.nii.gz", 8)
    with pytest.raises(IncompatibleError, match=r"E0802.*different plans") as caught:
        predict(mixed, path, tmp_path / "out")
    assert caught.value.exit_code == 8
    predict(mixed, path, tmp_path / "out", folds=("0",))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other", "missing"])
def test_weights_that_are_not_those_of_the_card_are_refused(model, images, tmp_path, damage):
    path = model / "fold_0" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "missing":
        path.unlink()
    elif damage == "flipped":
        content[-20] ^= 64
        path.write_bytes(content)
    else:
        path.write_bytes(gzip.compress(content))
    with pytest.raises(IntegrityError, match=r"E0701.*weights\.safetensors") as caught:
        predict(model, images, tmp_path / "out")
    assert caught.value.exit_code == 7
    assert not (tmp_path / "out").exists()


def test_mirroring_makes_the_result_follow_a_mirrored_image(model, tmp_path):
    """Averaged over all mirrored views, the network knows no left and right. At the plan's own spacing.

    Tiles lie and count a little differently from the other end: nnU-Net's weights are not symmetric.
    """
    edit(model / "fold_0" / "model.json", plan__configurations__3d_fullres__training__mirror_axes=[0, 1, 2])
    spacing = json.loads((model / "fold_0" / "model.json").read_text())["plan"]["configurations"][CONFIGURATION]
    affine = affine_ijk(tuple(reversed(spacing["spacing_mm"])))
    image, _ = anatomy(np.random.default_rng(12))
    save_nifti(tmp_path / "in" / "plain.nii.gz", image, affine)
    for axis in range(3):
        save_nifti(tmp_path / "in" / f"flip{axis}.nii.gz", np.flip(image, axis), affine)
    predict(model, tmp_path / "in", tmp_path / "none")
    predict(model, tmp_path / "in", tmp_path / "mirror", tta="mirror")
    plain = array(tmp_path / "mirror" / "plain.nii.gz")
    assert set(np.unique(plain)) == {0, 1, 2}
    for axis in range(3):
        flipped = array(tmp_path / "mirror" / f"flip{axis}.nii.gz")
        assert (np.flip(flipped, axis) != plain).mean() < 2e-2
    one_sided = [array(tmp_path / "none" / f"flip{axis}.nii.gz") for axis in range(3)]
    assert any(
        (np.flip(f, axis) != array(tmp_path / "none" / "plain.nii.gz")).any() for axis, f in enumerate(one_sided)
    )


@pytest.mark.parametrize(("outer", "inner", "kind"), [(3, 7, np.uint8), (5, 255, np.uint8), (2, 700, np.uint16)])
def test_label_values_with_gaps_are_written_as_the_task_declares_them(
    model, finished, images, tmp_path, outer, inner, kind
):
    predict(finished, images, tmp_path / "plain")
    edit(model / "fold_0" / "model.json", plan__task__labels__1__value=outer, plan__task__labels__2__value=inner)
    predict(model, images, tmp_path / "gaps")
    for name in ("a.nii.gz", "b.nii.gz"):
        plain, written = array(tmp_path / "plain" / name), array(tmp_path / "gaps" / name)
        assert written.dtype == kind
        np.testing.assert_array_equal(written, np.array([0, outer, inner])[plain])


def test_the_chosen_post_processing_is_applied(model, tmp_path):
    """Two phantoms side by side, against scipy: of all foreground only the larger piece stays."""
    image, _ = anatomy(np.random.default_rng(4))
    small, _ = anatomy(np.random.default_rng(5), (18, 16, 14))
    both = np.random.default_rng(6).normal(20, 6, (60, 26, 18)).astype(np.float32)
    both[:30], both[40:58, 5:21, 2:16] = image, small
    save_nifti(tmp_path / "two.nii.gz", both, affine_ijk())
    found = []
    for keep in (False, True):
        chosen = PostProcessing(keep_largest_foreground=keep)
        (model / "postprocessing.json").write_text(json.dumps(chosen.to_json()))
        predict(model, tmp_path / "two.nii.gz", tmp_path / f"keep {keep}")
        found.append(array(tmp_path / f"keep {keep}" / "two.nii.gz"))
    pieces, count = ndimage.label(found[0] > 0, np.ones((3, 3, 3)))
    assert count > 1
    largest = 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    np.testing.assert_array_equal(found[1], np.where(pieces == largest, found[0], 0))

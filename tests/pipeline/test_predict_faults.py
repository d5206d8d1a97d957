"""Faults while predicting: a disk that fills up, kills, threads that die, a GPU without memory (F24, F27, F31, F32)."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from children import Children
from phantoms import affine_ijk, anatomy, save_nifti
from tiny_runs import contents, cpu

import medseg.pipeline.predict_case as module
from medseg.errors import EnvironmentFailure, Problem
from medseg.imaging.volumes import read_channels
from medseg.inference.ladder import RUNGS, Ladder
from medseg.inference.model import load_model, prepare_stages, segment
from medseg.inference.sliding import Blending
from medseg.networks.device import Device
from medseg.pipeline.predict import MANIFEST, PredictOptions, predict_files
from medseg.records.base import read_record
from medseg.records.run import RunManifest


def predict(model, inputs, output) -> RunManifest:
    return predict_files(model, inputs, output, PredictOptions(device=cpu()))


def statuses(manifest: RunManifest) -> dict[str, str]:
    return {case.id: case.status for case in manifest.cases}


def save_images(folder: Path, names: str) -> Path:
    for index, name in enumerate(names):
        image, _ = anatomy(np.random.default_rng(index))
        save_nifti(folder / f"{name}_0000.nii.gz", image, affine_ijk())
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    return save_images(tmp_path / "images", "abcde")


def test_a_disk_that_fills_up_keeps_what_was_written_and_the_same_command_does_the_rest(
    finished, images, tmp_path, monkeypatch
):
    original, written = module.write_labels, []

    def until_full(path, *arguments):
        if len(written) == 3:
            raise EnvironmentFailure(Problem("E0502", "no space left on device"))
        written.append(path.name)
        return original(path, *arguments)

    monkeypatch.setattr(module, "write_labels", until_full)
    with pytest.raises(EnvironmentFailure, match="E0502") as full:
        predict(finished, images, tmp_path / "out")
    assert full.value.exit_code == 5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*written, MANIFEST}
    assert statuses(read_record(tmp_path / "out" / MANIFEST, RunManifest)) == dict.fromkeys("abc", "done")
    monkeypatch.setattr(module, "write_labels", original)
    again = statuses(predict(finished, images, tmp_path / "out"))
    assert again == dict.fromkeys("abc", "skipped") | dict.fromkeys("de", "done")


def whole_files(output: Path) -> list[str]:
    """Label files and maps under their final names, relative."""
    return [name for name in contents(output) if name.endswith(".nii.gz") and ".medseg-" not in name]


def test_what_killed_predictions_left_half_written_goes(finished, images, tmp_path):
    folders = "", "probabilities/a", "uncertainty", "attention/a", "previews"
    left = [tmp_path / "out" / folder / ".medseg-7584204f6c30.tmp.nii.gz" for folder in folders]
    kept = tmp_path / "out" / "other" / ".medseg-7584204f6c30.tmp.nii.gz"
    for path in (*left, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    predict(finished, images, tmp_path / "out")
    assert [path for path in (*left, kept) if path.exists()] == [kept]


@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_predictions_killed_at_any_moment_show_whole_files_only_and_end_like_an_undisturbed_one(
    finished, tmp_path, kills
):
    images = save_images(tmp_path / "images", "abcdefghijklmnopqrst"[: 4 if kills < 100 else 20])

    def arguments(name: str) -> tuple[object, ...]:
        maps = ("--probabilities", "--uncertainty")
        return "predict", "--model", finished, "-i", images, "-o", tmp_path / name, "--precision", "float32", *maps

    rng, done, rounds = random.Random(kills), 0, 0
    with Children(tmp_path) as children:
        code, errors = children.run(*arguments("undisturbed"))
        assert code == 0, errors
        expected = contents(tmp_path / "undisturbed")
        del expected[MANIFEST]  # seconds are in it
        while done < kills:
            name = f"killed_{rounds}"
            while done < kills and children.kill_after(arguments(name), rng.uniform(0, 0.4)):
                done += 1
                for path in whole_files(tmp_path / name):
                    assert (tmp_path / name / path).read_bytes() == expected[path]
            code, errors = children.run(*arguments(name))
            assert code == 0, errors
            found = contents(tmp_path / name)
            del found[MANIFEST]
            assert found == expected
            rounds += 1
    assert rounds < kills  # kills met work


@pytest.mark.parametrize("step", ["read_case", "write_labels"])
@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_an_error_in_a_helping_thread_costs_its_case_only(finished, images, tmp_path, monkeypatch, step, error):
    where = "medseg.pipeline.predict_cases" if step == "read_case" else "medseg.pipeline.predict_case"
    original = getattr(module, step)

    def broken(first, *arguments, **keywords):
        name = first.id if step == "read_case" else first.name[0]
        if name == "b":
            assert threading.current_thread() is not threading.main_thread()
            raise error("made up")
        return original(first, *arguments, **keywords)

    monkeypatch.setattr(f"{where}.{step}", broken)
    manifest = predict(finished, images, tmp_path / "out")
    assert statuses(manifest) == dict.fromkeys("acde", "done") | {"b": "failed"}


def test_an_interrupt_in_a_helping_thread_ends_the_command_with_what_is_done(finished, images, tmp_path, monkeypatch):
    original = module.read_case

    def interrupted(case, *arguments, **keywords):
        if case.id == "c":
            raise KeyboardInterrupt
        return original(case, *arguments, **keywords)

    monkeypatch.setattr("medseg.pipeline.predict_cases.read_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(finished, images, tmp_path / "out")
    left = statuses(read_record(tmp_path / "out" / MANIFEST, RunManifest))
    assert left["a"] == "done"
    assert "c" not in left


def test_only_memory_that_runs_out_goes_down_the_ladder(finished):
    ladder, calls = Ladder(load_model(finished, cpu())), []
    ladder.model = replace(ladder.model, device=Device(torch.device("cuda"), torch.float32, "made up"))

    def work(used, blending):
        calls.append(blending)
        raise RuntimeError("channels do not fit")

    with pytest.raises(RuntimeError, match="channels"):
        ladder.run(work, Blending())
    assert (len(calls), ladder.rung) == (1, 0)


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.words)
def test_every_rung_of_the_ladder_gives_the_same_labels(finished, images, rung):
    model = load_model(finished, cpu())
    prepared = prepare_stages(model, read_channels([images / "a_0000.nii.gz"]))
    expected = segment(model, prepared, mirror=True)
    blending = Blending(together=rung.together, on_device=rung.blend_on_device)
    np.testing.assert_array_equal(segment(model, prepared, mirror=True, blending=blending), expected)
    assert len(np.unique(expected)) > 1

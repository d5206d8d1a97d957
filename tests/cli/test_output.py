"""Output: results on stdout, the rest on stderr, and progress in the form that was asked for."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import sys

import nibabel as nib
import numpy as np
import pytest
from phantoms import affine_ijk, make_dataset, save_nifti
from tiny_runs import CONFIGURATION, run_command

from medseg.cli import console

COMMANDS = ("check", "plan", "preprocess", "train", "predict", "evaluate", "run", "doctor")


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


@pytest.fixture
def faulty(tmp_path):
    """A data set with a fault of another kind in nearly every case."""
    data = make_dataset(tmp_path / "faulty", 8)
    image, label = data / "imagesTr", data / "labelsTr"
    truncated = (image / "case_00_0000.nii.gz").read_bytes()
    (image / "case_00_0000.nii.gz").write_bytes(truncated[: len(truncated) // 2])
    (label / "case_01.nii.gz").unlink()
    loaded = nib.load(label / "case_02.nii.gz")
    undeclared = np.asarray(loaded.dataobj).copy()
    undeclared[0, 0, :3] = 9
    save_nifti(label / "case_02.nii.gz", undeclared, loaded.affine)
    loaded = nib.load(label / "case_03.nii.gz")
    save_nifti(label / "case_03.nii.gz", np.asarray(loaded.dataobj) * np.float32(0.5), loaded.affine)
    loaded = nib.load(label / "case_04.nii.gz")
    save_nifti(label / "case_04.nii.gz", np.asarray(loaded.dataobj), affine_ijk())
    loaded = nib.load(image / "case_05_0000.nii.gz")
    bad = np.asarray(loaded.dataobj).copy()
    bad[2, 3, 4] = np.nan
    save_nifti(image / "case_05_0000.nii.gz", bad, loaded.affine)
    shutil.copy(image / "case_06_0000.nii.gz", image / "case_06_0001.nii.gz")
    (image / "leftover.txt").write_text("x")
    return data


FAULTS = {
    ("case_00", "E0101"),
    ("case_01", "E0144"),
    ("case_02", "E0131"),
    ("case_03", "E0130"),
    ("case_04", "E0120"),
    ("case_05", "E0110"),
    ("case_06", "E0133"),
    (None, "W0147"),
}


def printed_problems(report):
    """(case, code) of every line of the groups of a printed report."""
    found, code = set(), None
    for line in report.splitlines():
        if heading := re.match(r"(error|warning) ([EW]\d{4})  ", line):
            code = heading[2]
        elif code and (case := re.match(r"  (case_\d\d)? ", line)) and not line.startswith("  →"):
            found.add((case[1], code))
        elif not line:
            code = None
    return found


def test_check_lists_the_faults_of_all_cases_at_once_and_ends_with_3(medseg, faulty):
    ended = medseg("check", faulty, "--progress", "none")
    assert ended.code == 3
    assert ended.problems == []
    assert printed_problems(ended.out) == FAULTS
    assert "6 complete cases, 11 files read: 7 errors in 7 cases, 1 warning" in ended.out


def test_check_as_json_is_strict_and_alone_on_stdout(medseg, faulty):
    ended = medseg("check", faulty, "--json")
    assert ended.code == 3
    report = json.loads(ended.out, parse_constant=refuse)
    assert {(p["case"], p["code"]) for p in report["problems"]} == FAULTS
    assert all(p["severity"] in ("error", "warning") and p["measured"] for p in report["problems"])
    assert report["cases"] == 6


def test_a_data_set_without_faults_ends_with_0(medseg, finished):
    ended = medseg("check", finished.parent / "data", "--progress", "none")
    assert (ended.code, ended.err) == (0, "")
    verdict, following = ended.out.splitlines()[-2:]
    assert verdict == "6 complete cases, 12 files read: 0 errors, 0 warnings"
    assert following.startswith("Next: medseg run ")


def test_check_as_json_of_a_data_set_that_cannot_be_read_is_json_too(medseg, tmp_path):
    ended = medseg("check", tmp_path, "--json")
    assert ended.code == 3
    assert [p["code"] for p in json.loads(ended.out)["problems"]] == ["E0100"]


def test_progress_as_json_is_one_object_per_line_of_stderr_and_stdout_has_only_the_result(medseg, run):
    arguments = ("train", "--run", run, "--configuration", CONFIGURATION, "--fold", "2", "--epochs", 2)
    ended = medseg(*arguments, "--precision", "float32", "--progress", "json")
    assert ended.code == 0
    events = [json.loads(line, parse_constant=refuse) for line in ended.err.splitlines()]
    assert {event["event"] for event in events} == {"begin", "update", "end", "message"}
    by_stage: dict[str, list[dict]] = {}
    for event in events:
        if event["event"] != "message":
            by_stage.setdefault(event["stage"], []).append(event)
    assert list(by_stage) == [f"train {CONFIGURATION}", "validate", "evaluate"]
    for stage in by_stage.values():
        done = [event["done"] for event in stage if event["event"] == "update"]
        assert done == sorted(done)
        assert done[-1] == stage[0]["total"]
    first, *scores = ended.out.splitlines()
    assert first.startswith(f"{CONFIGURATION} fold 2: 10 steps in ")
    assert [re.sub(r"[\d.]+$", "…", line) for line in scores] == [
        f"  validation Dice {name}: …" for name in ("mean", "outer", "inner")
    ]


def test_evaluate_prints_a_table_and_writes_json_and_csv(medseg, finished, tmp_path):
    data = finished.parent / "data"
    ended = medseg(
        *("evaluate", "--predictions", finished / "predictions", "--references", data / "labelsTs"),
        *("--task", data / "dataset.json", "--output", tmp_path / "scores.json", "--progress", "none"),
    )
    assert (ended.code, ended.err) == (0, "")
    header, *rows = ended.out.splitlines()
    assert header.split()[:3] == ["label", "cases", "Dice"]
    assert [row.split()[0] for row in rows] == ["outer", "inner", "mean"]
    written = json.loads((tmp_path / "scores.json").read_text(), parse_constant=refuse)
    assert f"{written['mean_dice']:.4f}" in rows[-1]
    assert (tmp_path / "scores.csv").is_file()


def test_evaluate_without_a_prediction_shows_the_others_and_ends_with_4(medseg, finished, tmp_path):
    data = finished.parent / "data"
    predictions = shutil.copytree(finished / "predictions", tmp_path / "predictions")
    (predictions / "new_00.nii.gz").rename(predictions / "extra.nii.gz")
    ended = medseg(
        *("evaluate", "--predictions", predictions, "--references", data / "labelsTs"),
        *("--task", data / "dataset.json", "--progress", "none"),
    )
    assert ended.code == 4
    assert len(ended.out.splitlines()) == 4
    assert [line.partition(":")[2].partition(":")[0] for line in ended.problems] == [
        " warning[W0147] case=extra",
        " error[E0100] case=new_00",
    ]


def test_plan_explains_every_decision(medseg, prepared, run):
    ended = medseg("plan", prepared.parent / "data", "--run", run, "--explain", "--progress", "none")
    assert ended.code == 0
    reasons = json.loads((run / "plan.json").read_text())["reasons"]
    assert [f"{r['topic']}: {r['text']}" for r in reasons] == ended.out.splitlines()[-len(reasons) :]
    assert len(reasons) > 5


def test_doctor_names_machine_versions_and_precision(medseg):
    ended = medseg("doctor")
    assert ended.code == 0
    topics = [re.split(r"  +", line)[0] for line in ended.out.splitlines()]
    assert {"medseg", "system", "processor", "memory", "disk", "networks run on", "precision", "torch"} <= set(topics)


def test_stdout_of_a_whole_run_is_its_result_only(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    ended = run_command("run", finished.parent / "data", "--run", run, "--epochs", 12, "--precision", "float32")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"{CONFIGURATION} fold 0: 60 steps, validation Dice: mean 0.")
    assert f"pictures: {run / 'pictures'}" in ended.stdout
    assert "fold_0 is finished: 60 steps" in ended.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_its_purpose_and_explains_every_option(medseg, command):
    ended = medseg(command, "--help")
    assert ended.code == 0
    text = " ".join(ended.out.split())
    for option in set(re.findall(r"(?<![\w-])--[a-z-]+", ended.out.partition("options:")[2])):
        assert re.search(rf"{option}(?: (?:\[[A-Z …]+\]|[A-Z0-9_|…a]+|{{[^}}]+}}|\.\.\.))*,? \S", text), option
    assert ended.out.splitlines()[0].startswith(f"usage: medseg {command}")


def test_no_line_of_any_help_is_broken_off_from_its_command(medseg):
    ended = medseg("--help")
    lines = ended.out.splitlines()
    for command in COMMANDS:
        (line,) = [text for text in lines if text.split()[:1] == [command]]
        assert len(line.split()) > 2, line
        assert len(line) <= 80


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(console.make_progress("auto"), console.BarProgress)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(console.make_progress("auto"), console.PlainProgress)


@pytest.mark.parametrize("style", ["bar", "plain", "json", "none"])
def test_every_progress_takes_a_stage_of_nothing_and_odd_names(style, capsys):
    progress = console.make_progress(style)
    progress.update(0)
    progress.end()
    progress.begin("[red]stage[/]", 0, "cases")
    progress.say("a [bold]case[/] \x1b[31m with\nodd signs")
    progress.end()
    progress.begin("train", 1000, "‰")
    progress.update(1000, "case [link=x]\x07")
    progress.end()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "\x07" not in shown.err
    assert "\x1b[31m" not in shown.err
    if style in ("bar", "plain"):
        assert "[bold]case[/]" in shown.err


def test_logged_tracebacks_are_shown_with_debug_only(medseg, capsys):
    logger = logging.getLogger("medseg.somewhere")
    for debug in (False, True):
        console.start_logging(debug)
        try:
            raise ValueError("why")
        except ValueError:
            logger.exception("case %s could\nnot be scored", "a")
        shown = capsys.readouterr().err
        assert shown.startswith("medseg: error: case a could\\nnot be scored\n")
        assert ("Traceback" in shown) == debug
    medseg("--version")  # restores logging

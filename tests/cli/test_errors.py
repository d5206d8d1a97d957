"""Errors: their exit codes, and one line for each that says what is wrong and what to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import CONFIGURATION, command, edit, run_command

from medseg.cli.main import main
from medseg.errors import CODES

LINE = re.compile(r"medseg: (error|warning)\[([EW]\d{4})\](?: case=\S+)?: .+")
TRAIN = ("train", "--run", "RUN", "--configuration", CONFIGURATION, "--fold", "1", "--epochs", "1")


def check_form(ended) -> None:
    """Nothing on stdout; on stderr one line per problem, each with a known code, and no traceback."""
    assert ended.out == ""
    assert ended.problems
    for line in ended.err.splitlines():
        match = LINE.fullmatch(line)
        assert match, line
        assert match[2] in CODES
        assert match[1][0].upper() == match[2][0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["segment"], "invalid choice: 'segment'"),
        (["check"], "the following arguments are required: DATASET; see medseg check --help"),
        (["check", "a", "b"], "unrecognized arguments: b"),
        (["check", "a", "--workers", "0"], "'0' is not a whole number above 0"),
        (["check", "a", "--workers", "two"], "'two' is not a whole number above 0"),
        (["check", "a", "--progress", "loud"], "invalid choice: 'loud'"),
        (["plan", "a", "--run", "b", "--memory", "0"], "'0' is not a number of GB from 0.5 to 1024"),
        (["plan", "a", "--run", "b", "--memory", "nan"], "'nan' is not a number of GB"),
        (["preprocess", "--ru", "b"], "required: --run"),
        (["plan", "--run", "b"], "missing: DATASET"),
        ([*TRAIN, "--time-budget", "1m"], "--time-budget: not allowed with argument --epochs"),
        ([*TRAIN, "--epochs", "1.5"], "'1.5' is not a whole number above 0"),
        ([*TRAIN, "--seed", "-1"], "'-1' is not a whole number from 0 to 4294967295"),
        ([*TRAIN[:-2], "--time-budget", "soon"], "'soon' is not a duration vs 90s, 10m or 1h30m"),
        ([*TRAIN, "--checkpoint-every", "0s"], "'0s' is 0 s vs more than 0 s"),
        ([*TRAIN, "--device", "tpu"], "--device tpu vs auto, cpu, cuda or cuda:N"),
        (["predict", "--model", "m", "-i"], "argument -i/--input: expected at least one argument"),
        (["predict", "--model", "m", "-i", "a", "-o", "o", "--tta", "rotate"], "invalid choice: 'rotate'"),
        (["evaluate", "--predictions", "p", "--references", "r"], "required: --task"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_says_what_is_wrong(medseg, arguments, told):
    ended = medseg(*arguments)
    assert ended.code == 2
    check_form(ended)
    assert len(ended.problems) == 1
    assert "error[E0001]" in ended.err
    assert told in ended.err


def test_a_tolerance_that_is_no_distance_is_refused(medseg, finished):
    scores = ("evaluate", "--predictions", finished / "predictions", "--references", finished / "predictions")
    for wrong in ("-1", "nan", "inf", "wide"):
        ended = medseg(*scores, "--task", finished.parent / "data", "--tolerance", wrong)
        assert ended.code == 2, wrong
        check_form(ended)


def test_without_a_command_the_help_is_shown_and_the_exit_code_is_2(medseg):
    ended = medseg()
    assert ended.code == 2
    assert ended.out.startswith("usage: medseg")
    assert ended.err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "NOWHERE", "--run", "RUN"],
        ["run", "NOWHERE", "--run", "RUN", "--time-budget", "1m"],
        ["preprocess", "--run", "NOWHERE"],
        ["train", "--run", "NOWHERE", "--configuration", "2d", "--fold", "0"],
        ["predict", "--model", "NOWHERE", "-i", "NOWHERE", "-o", "OUT"],
        ["evaluate", "--predictions", "NOWHERE", "--references", "NOWHERE", "--task", "NOWHERE"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_path_that_does_not_exist_ends_with_3_and_makes_no_folder(medseg, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    ended = medseg(*arguments)
    assert ended.code == 3
    check_form(ended)
    assert "error[E0100]" in ended.err
    assert "NOWHERE" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_checking_a_path_that_does_not_exist_ends_with_3(medseg, tmp_path):
    ended = medseg("check", tmp_path / "nowhere")
    assert ended.code == 3
    assert "error[E0100]" in ended.err
    assert ended.out == ""


@pytest.mark.parametrize("stage", ["preprocess", "train", "plan"])
def test_a_damaged_plan_ends_with_7_and_names_file_and_place(medseg, run, prepared, stage):
    (run / "plan.json").write_text('{"schema_version": 1,')
    arguments = {
        "preprocess": ("preprocess", "--run", run),
        "train": [run if a == "RUN" else a for a in TRAIN],
        "plan": ("plan", prepared.parent / "data", "--run", run),
    }
    ended = medseg(*arguments[stage])
    assert ended.code == 7
    check_form(ended)
    assert re.search(r"E0711.*plan\.json is not strict JSON: .*line 1", ended.err)


def test_every_wrong_field_of_a_plan_has_a_line_of_its_own(medseg, run):
    wrong = {f"configurations__{name}__batch_size": 0 for name in ("2d", CONFIGURATION)}
    edit(run / "plan.json", **wrong, colour="blue")
    ended = medseg("preprocess", "--run", run)
    assert ended.code == 7
    check_form(ended)
    assert len(ended.problems) == 3
    assert "plan.json: colour: Extra inputs are not permitted" in ended.err


def test_a_damaged_image_ends_prediction_of_several_with_4_and_of_one_with_3(medseg, finished, tmp_path):
    images = shutil.copytree(finished.parent / "data" / "imagesTs", tmp_path / "images")
    broken = images / "new_00_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:500])
    arguments = ("predict", "--model", finished, "--precision", "float32", "--progress", "none")
    ended = medseg(*arguments, "-i", images, "-o", tmp_path / "both")
    assert ended.code == 4
    assert ended.out == f"1 segmented, 0 were there already, 1 failed: {tmp_path / 'both'}\n"
    first, last = ended.err.splitlines()
    assert first.startswith("medseg: error[E0101] case=new_00: new_00_0000.nii.gz")
    assert last.startswith("medseg: error[E0400]: 1 of 2 images failed")
    ended = medseg(*arguments, "-i", broken, "-o", tmp_path / "one")
    assert ended.code == 3
    again = medseg(*arguments, "-i", images / "new_01_0000.nii.gz", "-o", tmp_path / "both")
    assert again.code == 0
    assert again.out.startswith("0 segmented, 1 were there already, 0 failed")
    assert again.err == ""


def test_other_options_for_the_same_run_end_with_8(medseg, run, prepared):
    ended = medseg("plan", prepared.parent / "data", "--run", run, "--memory", 4, "--progress", "none")
    assert ended.code == 8
    check_form(ended)


def test_file_names_with_control_characters_stay_on_their_line(medseg, finished, tmp_path):
    bad = tmp_path / "two\nlines\x1b[31m_0000.nii.gz"
    bad.write_bytes(b"")
    ended = medseg("predict", "--model", finished, "-i", bad, "-o", tmp_path / "out", "--precision", "float32")
    assert ended.code == 3
    check_form(ended)
    assert "\x1b" not in ended.err


def test_a_traceback_appears_with_debug_only_and_the_exit_code_stays(medseg, tmp_path):
    plain, debugged = (medseg("plan", tmp_path, "--run", tmp_path / "run", *more) for more in ((), ("--debug",)))
    assert (plain.code, debugged.code) == (3, 3)
    assert "Traceback" not in plain.err
    assert "Traceback" in debugged.err
    assert debugged.err.splitlines()[-1] == plain.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ZeroDivisionError("oops"), 70, "E7000]: ZeroDivisionError: oops; this is a bug"),
        (MemoryError(), 6, "E0600"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 6, "E0600"),
        (OSError(28, "No space left on device", "/somewhere/log.jsonl"), 5, "E0502]: no space left to write log.jsonl"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
    ],
)
def test_what_no_stage_expected_has_its_exit_code_too(medseg, monkeypatch, tmp_path, error, code, told):
    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr("medseg.pipeline.plan.plan_run", fail)
    ended = medseg("plan", tmp_path, "--run", tmp_path / "run")
    assert ended.code == code
    assert told in ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err.splitlines()) == 1


def test_warnings_are_said_once_however_many_stages_meet_them(medseg, run, prepared):
    note = prepared.parent / "data" / "imagesTr" / "note.txt"
    note.write_text("x")
    try:
        arguments = ("run", prepared.parent / "data", "--run", run, "--configuration", CONFIGURATION)
        ended = medseg(*arguments, "--epochs", 1, "--precision", "float32")
    finally:
        note.unlink()
    assert ended.code == 0, ended.err
    assert len([line for line in ended.problems if "W0147" in line]) == 1
    assert not [line for line in ended.problems if not LINE.fullmatch(line)]


def test_python_m_medseg_is_the_same_command():
    ended = run_command("--version")
    assert ended.returncode == 0
    assert re.fullmatch(r"medseg \d+\.\d+\.\d+\n", ended.stdout)
    assert run_command("check").returncode == 2


def test_the_console_script_leads_to_the_same_function():
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="medseg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["medseg", "frobnicate"])
        with pytest.raises(SystemExit) as caught:
            script.load()()
    assert caught.value.code == main(["frobnicate"]) == 2


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "DATA", "--run", "RUN", "--explain"]])
def test_a_reader_that_goes_away_is_no_error_of_ours(prepared, run, arguments):
    named = {"DATA": prepared.parent / "data", "RUN": run}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        command(*(named.get(a, a) for a in arguments)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_ends_with_5(prepared, run):
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            command("plan", prepared.parent / "data", "--run", run),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert process.returncode == 5
    assert "error[E0502]" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_terminal_that_cannot_show_a_sign_gets_another_one(prepared, run):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    arguments = command("plan", prepared.parent / "data", "--run", run, "--progress", "none")
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert "8 ? 16 ? 16" in ended.stdout

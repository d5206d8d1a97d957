"""``medseg plan --fingerprint``: plans from measurements alone, and in nnU-Net's form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from phantoms import make_dataset

from medseg.cli.main import main
from medseg.pipeline.plan import PlanOptions, plan_run
from medseg.planning.planner import make_plan
from medseg.records.base import read_record
from medseg.records.fingerprint import Fingerprint
from medseg.records.plan import Budget, Plan

REFERENCE = Path(__file__).resolve().parents[2] / "plans" / "reference"


@pytest.fixture
def measured(tmp_path) -> list[str]:
    """The arguments of the command for nnU-Net's fingerprint of a data set called Dataset028_CT."""
    value = json.loads((REFERENCE / "CT028.json").read_text())
    folder = tmp_path / "Dataset028_CT"
    folder.mkdir()
    for name in ("dataset", "fingerprint"):
        (folder / f"{name}.json").write_text(json.dumps(value[name]))
    return ["--fingerprint", str(folder / "fingerprint.json"), "--task", str(folder / "dataset.json")]


def test_nnunets_plans_file_is_what_nnunet_writes(measured, tmp_path, capsys):
    output, theirs = tmp_path / "plan.json", tmp_path / "plans.json"
    wanted = ["--preset", "resenc-m", "--output", str(output), "--nnunet-plans", str(theirs)]
    assert main(["plan", *measured, *wanted]) == 0
    expected = json.loads((REFERENCE / "nnunet_form" / "CT028.json").read_text())
    assert json.dumps(json.loads(theirs.read_text())) == json.dumps(expected)
    assert list(read_record(output, Plan).configurations) == ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"]
    assert "3d_lowres" in capsys.readouterr().out


def test_memory_and_preset_are_those_asked_for(measured, tmp_path):
    output = tmp_path / "plan.json"
    assert main(["plan", *measured, "--preset", "nnunet", "--memory", "4", "--output", str(output)]) == 0
    plan = read_record(output, Plan)
    assert (plan.preset, plan.budget.memory_gb) == ("nnunet", 4)
    expected = json.loads((REFERENCE / "CT028.json").read_text())["plans"]["nnunet-4gb"]["configurations"]
    assert plan.configurations.keys() == expected.keys()
    for name in ("2d", "3d_lowres", "3d_fullres"):
        configuration = plan.configurations[name]
        assert list(configuration.patch_size) == expected[name]["patch_size"]


def test_without_images_or_device_a_plan_is_made_for_a_gpu(measured, tmp_path):
    output = tmp_path / "plan.json"
    assert main(["plan", *measured, "--memory", "6", "--time-budget", "2h", "--output", str(output)]) == 0
    plan = read_record(output, Plan)
    assert plan.preset == "medseg"
    assert plan.budget == Budget(memory_gb=6, device="cuda", seconds=7200)
    assert main(["plan", *measured, "--device", "cpu", "--output", str(output)]) == 0
    assert read_record(output, Plan).budget == Budget(memory_gb=8, device="cpu")


def test_the_fingerprint_of_a_run_is_read_too(tmp_path):
    data = make_dataset(tmp_path / "data", 3)
    plan_run(data, tmp_path / "run", PlanOptions(preset="nnunet"))
    measured, output = tmp_path / "run" / "fingerprint.json", tmp_path / "plan.json"
    task = ["--task", str(data / "dataset.json")]
    assert main(["plan", "--preset", "nnunet", "--fingerprint", str(measured), *task, "--output", str(output)]) == 0
    assert read_record(output, Plan) == read_record(tmp_path / "run" / "plan.json", Plan)


def test_a_task_file_may_have_any_name_and_says_how_many_cases_there_are(measured, tmp_path):
    task = tmp_path / "few.json"
    value = json.loads(Path(measured[3]).read_text())
    task.write_text(json.dumps(value | {"numTraining": 1}))
    output = tmp_path / "plan.json"
    assert main(["plan", *measured[:2], "--preset", "nnunet", "--task", str(task), "--output", str(output)]) == 0
    assert read_record(output, Plan).configurations["2d"].batch_size == 15


def test_a_run_is_planned_with_the_preset_asked_for(tmp_path):
    data = make_dataset(tmp_path / "data", 3)
    assert main(["plan", str(data), "--run", str(tmp_path / "run"), "--preset", "resenc-l"]) == 0
    plan = read_record(tmp_path / "run" / "plan.json", Plan)
    fingerprint = read_record(tmp_path / "run" / "fingerprint.json", Fingerprint)
    assert plan.budget.memory_gb == 24
    assert plan.configurations == make_plan(fingerprint, plan.task, preset="resenc-l").configurations
    assert plan_run(data, tmp_path / "run", PlanOptions(preset="resenc-l")) == plan


def test_two_plans_are_compared(measured, tmp_path, capsys):
    other = tmp_path / "plan.json"
    main(["plan", *measured, "--output", str(other)])
    capsys.readouterr()
    assert main(["plan", *measured, "--compare", str(other)]) == 0
    assert capsys.readouterr().out.endswith("same plan\n")
    assert main(["plan", *measured, "--preset", "resenc-m", "--compare", str(other)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["preset", "resenc-m", "medseg"] in rows
    assert ["2d", "network.name", "residual", "plain"] in rows


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "missing: DATASET, --run"),
        (["data"], "missing: --run"),
        (["--fingerprint", "f.json"], "missing: --task"),
        (["--fingerprint", "f.json", "--task", "t.json", "--run", "r"], "not with --fingerprint: --run"),
        (["data", "--run", "r", "--output", "p.json"], "not with DATASET: --output"),
        (["data", "--run", "r", "--nnunet-plans", "p.json"], "not with DATASET: --nnunet-plans"),
    ],
)
def test_the_two_forms_are_not_mixed(arguments, says, capsys):
    assert main(["plan", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_bad_files_are_named_and_nothing_is_written(measured, tmp_path, capsys):
    output = tmp_path / "plan.json"
    for place, content, code, exit_code in (
        (1, "{", "E0711", 7),
        (1, "[]", "E0711", 7),
        (1, '{"shapes_after_crop": []}', "E0711", 7),
        (3, "{}", "E0145", 3),
        (3, None, "E0100", 3),
        (1, None, "E0100", 3),
    ):
        path = tmp_path / "bad.json"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        arguments = [*measured[:place], str(path), *measured[place + 1 :]]
        assert main(["plan", *arguments, "--output", str(output)]) == exit_code
        assert code in capsys.readouterr().err
    assert main(["plan", *measured, "--preset", "large", "--output", str(output)]) == 2
    assert "resenc-xl" in capsys.readouterr().err
    assert not output.exists()

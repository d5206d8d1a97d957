"""Kills: a command that is killed at any moment goes on with the same command to the result of an undisturbed one."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest
from children import Children
from tiny_runs import CONFIGURATION, STEPS_PER_EPOCH, contents, planned_run, run_command

from medseg.records.base import read_record
from medseg.records.model import ModelCard
from medseg.training.checkpoint import newest_checkpoint
from medseg.training.journal import read_journal

EPOCHS = 8
STEPS = EPOCHS * STEPS_PER_EPOCH
TIMED = ("log.jsonl", "state.json", "model.json", "predict.json", "report.html")  # seconds are in them


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    with Children(tmp_path_factory.mktemp("stderr")) as children:
        yield children


def train_arguments(run: Path, *more: object, epochs: int = EPOCHS, precision: str = "float32") -> tuple[object, ...]:
    fold = ("train", "--run", run, "--configuration", CONFIGURATION, "--fold", 1)
    return *fold, "--epochs", epochs, "--precision", precision, "--checkpoint-every", "0.05s", *more


def fold_of(run: Path) -> Path:
    return run / "models" / CONFIGURATION / "fold_1"


def outcome(run: Path) -> dict[str, object]:
    """What a training came to: all but the seconds."""
    card = read_record(fold_of(run) / "model.json", ModelCard)
    steps, validations = read_journal(fold_of(run) / "log.jsonl")
    return {
        "weights": card.weights_sha256,
        "losses": [(s.step, s.loss, s.lr) for s in steps],
        "validations": [(v.step, v.dice) for v in validations],
        "scores": card.scores,
    }


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory) -> dict[str, object]:
    """The outcome of a training that nobody disturbed, in a process of its own that was not forked."""
    run = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("undisturbed") / "run"))
    ended = run_command(*train_arguments(run))
    assert ended.returncode == 0, ended.stderr
    found = outcome(run)
    assert len(found["losses"]) == STEPS
    return found


def check_left_behind(fold: Path) -> None:
    """What a kill leaves: no model, and checkpoints and journal that can be gone on from."""
    assert not (fold / "model.json").exists()
    checkpoint = newest_checkpoint(fold / "checkpoints")
    if checkpoint is not None:
        steps, _ = read_journal(fold / "log.jsonl")
        assert [s.step for s in steps[: checkpoint.state.step]] == list(range(1, checkpoint.state.step + 1))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_training_killed_at_random_steps_gives_the_same_weights_and_losses(run, undisturbed, children, seed):
    rng = random.Random(seed)
    kills = 0
    while kills < 4 and children.kill(train_arguments(run), "train", rng.randint(1, STEPS // 3)):
        check_left_behind(fold_of(run))
        kills += 1
    assert kills > 0
    code, errors = children.run(*train_arguments(run))
    assert code == 0, errors
    assert outcome(run) == undisturbed
    assert not list(run.rglob(".medseg*"))


@pytest.mark.parametrize("kills", [50, pytest.param(300, marks=pytest.mark.slow)])
def test_trainings_killed_at_random_times_give_the_same_weights_and_losses(
    prepared, undisturbed, children, tmp_path, kills
):
    """Any moment counts: while it starts, trains, writes a checkpoint, validates or commits the model."""
    rng = random.Random(kills)
    done = trainings = 0
    longest = 0.5
    while done < kills:
        run = Path(shutil.copytree(prepared, tmp_path / f"run_{trainings}"))
        killed = True
        while killed and done < kills:
            killed = children.kill_after(train_arguments(run), rng.uniform(0, longest))
            done += killed
            longest *= 0.9 if (fold_of(run) / "model.json").exists() else 1.025  # a fifth shall end before
        code, errors = children.run(*train_arguments(run))
        assert code == 0, errors
        assert outcome(run) == undisturbed
        assert not list(run.rglob(".medseg*"))
        shutil.rmtree(run)
        trainings += 1
    assert trainings < kills / 2  # kills met work


def test_a_training_killed_while_it_validates_is_not_trained_again(run, undisturbed, children):
    assert children.kill(train_arguments(run), "validate", 1)
    check_left_behind(fold_of(run))
    assert newest_checkpoint(fold_of(run) / "checkpoints").state.step == STEPS
    half_written = fold_of(run) / "validation" / ".medseg-7584204f6c30.tmp.nii.gz"
    half_saved = fold_of(run) / "checkpoints" / "best" / ".medseg-a20d2b472453.tmp.safetensors"
    for path in (half_written, half_saved):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    child = children.start(*train_arguments(run))
    stages = [event["stage"] for event in child.events() if event.get("event") == "update"]
    assert child.end()[0] == 0
    assert set(stages) == {"validate", "evaluate"}
    assert outcome(run) == undisturbed
    assert not half_written.exists()
    assert not half_saved.exists()


def test_a_training_in_the_precision_of_the_machine_goes_on_in_the_one_it_began_with(run, children):
    """The self-test measures time, so that two beginnings may choose differently; one training never does."""
    arguments = train_arguments(run, precision="auto")
    child = children.start(*arguments)
    assert child.wait_for("train", 7)
    code, errors = child.end(signal.SIGTERM)
    assert code == 143, errors
    begun = newest_checkpoint(fold_of(run) / "checkpoints").state
    assert children.run(*arguments)[0] == 0
    ended = newest_checkpoint(fold_of(run) / "checkpoints").state
    assert (begun.step < ended.step, begun.precision) == (True, ended.precision)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_stops_a_training_with_a_checkpoint_and_an_exit_code_of_its_own(run, children, number, code):
    child = children.start(*train_arguments(run, "--checkpoint-every", "1d", epochs=1000))
    assert child.wait_for("train", 4)
    ended, errors = child.end(number)
    assert ended == code, errors
    told = [line for line in errors.splitlines() if line.startswith("medseg: ")]
    assert len(told) == 1
    assert "error[E1300]: stopped at step" in told[0]
    step = int(told[0].partition("at step ")[2].partition(";")[0])
    assert newest_checkpoint(fold_of(run) / "checkpoints").state.step == step
    steps, _ = read_journal(fold_of(run) / "log.jsonl")
    assert [s.step for s in steps] == list(range(1, step + 1))
    assert not list(run.rglob(".medseg*"))


def test_of_two_processes_on_one_fold_the_second_is_refused_and_the_first_goes_on(run, children):
    first = children.start(*train_arguments(run, epochs=1000))
    assert first.wait_for("train", 1)
    second = run_command(*train_arguments(run, epochs=1000))
    assert second.returncode == 9, second.stderr
    assert f"error[E0901]: {fold_of(run)} is in use by process {first.pid}" in second.stderr
    assert first.wait_for("train", 20)
    assert first.end(signal.SIGTERM)[0] == 143


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    return planned_run(tmp_path_factory.mktemp("planned"))


def test_a_preprocessing_killed_after_random_cases_ends_byte_for_byte_the_same(planned, tmp_path, children):
    expected = Path(shutil.copytree(planned, tmp_path / "expected"))
    assert run_command("preprocess", "--run", expected, "--configuration", CONFIGURATION).returncode == 0
    run = Path(shutil.copytree(planned, tmp_path / "run"))
    arguments = ("preprocess", "--run", run, "--configuration", CONFIGURATION)
    rng = random.Random(3)
    for workers in (1, 2, 1):
        if not children.kill((*arguments, "--workers", workers), "prepare", rng.randint(1, 3)):
            break
        for name, content in contents(run / "prepared").items():
            assert ".medseg" in name or content == contents(expected / "prepared")[name], name
    assert children.run(*arguments)[0] == 0
    assert contents(run / "prepared") == contents(expected / "prepared")


def test_a_run_killed_once_in_every_stage_ends_like_an_undisturbed_one(planned, tmp_path, children):
    """The plan, edited to be tiny, is there; planning again finds it and keeps it."""
    whole = []
    for name in ("expected", "run"):
        run = Path(shutil.copytree(planned, tmp_path / name))
        arguments = ("run", planned.parent / "data", "--run", run, "--epochs", 2, "--precision", "float32")
        if name == "run":
            for stage in ("check", "prepare", "train", "validate", "evaluate", "predict"):
                assert children.kill(arguments, stage, 1), stage
        code, errors = children.run(*arguments)
        assert code == 0, errors
        whole.append({n: c for n, c in contents(run).items() if not n.endswith(TIMED) and "checkpoints" not in n})
    assert whole[0].keys() == whole[1].keys()
    assert [name for name in whole[0] if whole[0][name] != whole[1][name]] == []

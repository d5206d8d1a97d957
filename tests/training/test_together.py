"""Training together: two processes give the losses of one, stop at the same step, go on, and end when one dies."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from ranks import KINDS, Ranks, store_kind, trains

from medseg.training.checkpoint import newest_checkpoint
from medseg.training.journal import NAME, read_journal
from medseg.training.step import _parts
from medseg.training.world import ALONE

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 5


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with Ranks(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("store")
    store_kind(folder, "batch Dice")
    return str(folder)


@pytest.fixture(scope="module")
def undisturbed(ranks, store, tmp_path_factory) -> tuple[list, Path]:
    """What two processes come to, and where."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return ranks.results("trains", "batch Dice", store, str(folder), 8), folder


def losses(folder: Path) -> list[float]:
    return [line.loss for line in read_journal(folder / NAME)[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_losses_of_one_with_the_same_batches(ranks, tmp_path, kind):
    store_kind(tmp_path / "store", kind)
    store = str(tmp_path / "store")
    together = ranks.results("trains", kind, store, str(tmp_path / "two"), STEPS)
    assert together[0] == together[1]  # the same weights, bit for bit
    if kind == "two parts":  # one process that computes the batch in two parts has the Dice of other samples
        return
    trains(ALONE, kind, store, str(tmp_path / "one"), STEPS)
    alone = losses(tmp_path / "one")
    assert len(alone) == STEPS
    assert losses(tmp_path / "two") == pytest.approx(alone, rel=2e-5, abs=2e-6)


def test_three_processes_with_unequal_shares_give_the_losses_of_one(ranks, store, tmp_path):
    ranks.results("trains", "batch Dice", store, str(tmp_path / "three"), STEPS, size=3)
    trains(ALONE, "batch Dice", store, str(tmp_path / "one"), STEPS)
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_to_one_process_stops_both_at_the_same_step_and_they_go_on_exactly(
    ranks, store, undisturbed, tmp_path, rank
):
    trouble = {"rank": rank, "step": 3, "signal": int(signal.SIGTERM)}
    stopped = ranks.results("trains", "batch Dice", store, str(tmp_path), 8, trouble)
    assert stopped == [[143, "3"], [143, "3"]]
    checkpoints = [path.name for path in (tmp_path / "checkpoints").glob("step_*")]
    assert checkpoints == ["step_00000003"]
    resumed = ranks.results("trains", "batch Dice", store, str(tmp_path), 8)
    assert resumed == undisturbed[0]
    assert losses(tmp_path) == losses(undisturbed[1])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_other_and_the_training_goes_on_from_the_checkpoint(
    ranks, store, undisturbed, tmp_path, rank
):
    trouble = {"rank": rank, "step": 4, "signal": int(signal.SIGKILL), "checkpoint_s": -1}
    ended = ranks.call("trains", "batch Dice", store, str(tmp_path), 8, trouble)
    assert ended[rank].code == -signal.SIGKILL
    assert ended[1 - rank].code == 6, ended[1 - rank].errors
    assert "error[E0602]" in ended[1 - rank].errors
    assert newest_checkpoint(tmp_path / "checkpoints").state.step in (3, 4)
    assert ranks.results("trains", "batch Dice", store, str(tmp_path), 8) == undisturbed[0]
    assert losses(tmp_path) == losses(undisturbed[1])


def test_a_training_of_two_goes_on_alone(ranks, store, undisturbed, tmp_path):
    trouble = {"rank": 1, "step": 3, "signal": int(signal.SIGINT)}
    ranks.results("trains", "batch Dice", store, str(tmp_path), 8, trouble)
    assert trains(ALONE, "batch Dice", store, str(tmp_path), 8)[1] == 8
    assert losses(tmp_path) == pytest.approx(losses(undisturbed[1]), rel=2e-5, abs=2e-6)


def test_processes_that_see_other_checkpoints_refuse_to_go_on(ranks, store, tmp_path):
    trains(ALONE, "batch Dice", store, str(tmp_path / "0"), 2)
    ended = ranks.call("elsewhere", "batch Dice", store, str(tmp_path), 8)
    assert ended[1].code == 8, ended
    assert "E0802" in ended[1].errors
    assert "step_00000002" in ended[1].errors
    assert ended[0].code == 6


class TestParts:
    """Parts of a batch that is computed one part after the other."""

    def batch(self, samples: int, whole: int):
        from medseg.training.batches import Batch

        return Batch(0, torch.zeros(samples, 1, 2, 2), torch.zeros(samples, 2, 2), ("case",) * whole)

    @pytest.mark.parametrize(("whole", "count", "processes"), [(6, 3, 1), (7, 3, 1), (7, 4, 2), (5, 4, 2), (3, 3, 2)])
    def test_all_processes_have_the_same_parts_and_their_shares_sum_to_one(self, whole, count, processes):
        samples = [whole * (n + 1) // processes - whole * n // processes for n in range(processes)]
        found = [list(_parts(self.batch(n, whole), count, processes)) for n in samples]
        assert len({tuple(share for _, _, share in parts) for parts in found}) == 1
        assert sum(share for _, _, share in found[0]) == pytest.approx(1)
        for index, (_, _, share) in enumerate(found[0]):
            assert sum(len(parts[index][0]) for parts in found) / whole == pytest.approx(share)
            assert all(len(parts[index][0]) > 0 for parts in found)

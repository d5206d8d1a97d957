"""The world: several processes compute what one would, and none of them waits for one that is gone."""

from __future__ import annotations

import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import Ranks, kinds, losses
from test_batches import SAMPLING, SHAPES
from tiny_models import FLAT_KERNELS, make_configuration, store_blobs

from medseg.errors import UsageError
from medseg.training.batches import make_batch
from medseg.training.launch import Launch, joined
from medseg.training.losses import mean_of_largest
from medseg.training.world import ALONE, check_batches, check_network


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with Ranks(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


@pytest.fixture(scope="module", params=[2, 3])
def shared(ranks, request):
    """Every loss, as each of the processes computes it."""
    return ranks.results("all_losses", size=request.param)


@pytest.mark.parametrize("kind", kinds(), ids=str)
def test_a_loss_and_its_gradient_over_unequal_shares_are_those_of_one_process(shared, kind):
    """Five samples for two or three processes, one of them without any annotation, parts of others ignored."""
    value, gradients = losses(ALONE, *kind)
    for found in shared:
        loss, parts = found[kinds().index(kind)]
        assert loss == pytest.approx(value, rel=1e-5, abs=1e-6)
        for part, gradient in zip(parts, gradients, strict=True):
            np.testing.assert_allclose(part, gradient, rtol=1e-4, atol=1e-7)


def test_messages_reach_everybody(ranks):
    for found in ranks.results("messages", size=3):
        assert found == {
            "spread": [[0.0] * 3] * 2,
            "sums": [[3.0, 6.0, 9.0], 9.0],
            "mean": pytest.approx(8 / 6),
            "gather": [[0.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 4.0]],
            "largest": 13 / 4,
            "stop": [15, 7.0],
            "nobody": [None, 0.0],
            "text": "µm",
            "empty": "",
        }


def test_a_world_of_one_sends_nothing():
    values = torch.arange(3.0)
    assert ALONE.sums(values)[0] is values
    assert ALONE.agree(2, 0.5) == (2, 0.5)
    assert ALONE.text("a") == "a"
    assert ALONE.gather(values).tolist() == [values.tolist()]
    assert ALONE.share == (0, 1)
    with joined(None, torch.device("cpu")) as world:
        assert world is ALONE


def test_others_wait_for_one_that_works(ranks):
    assert ranks.results("late", 0.7) == ["done", "done"]


@pytest.mark.parametrize("where", ["agree", "sums", "text", "gradients"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_others_with_an_error(ranks, rank, where):
    ended = ranks.call("dies", rank, where)
    if (rank, where) == (1, "text"):  # only the first one talks: it need not notice
        assert ended[0].code in (0, 6)
        return
    assert ended[rank].code == -signal.SIGKILL
    assert ended[1 - rank].code == 6, ended
    assert "error[E0602]: a process of this training ended" in ended[1 - rank].errors


def test_a_process_that_stands_still_ends_the_others_with_an_error(ranks):
    ended = ranks.call("stands_still", 1, size=3)
    assert [one.code for one in ended] == [6, -signal.SIGKILL, 6]
    assert "error[E0602]: process 1 of this training has not been heard of for" in ended[0].errors


@pytest.mark.parametrize("shares", [1, 2, 3, 5])
def test_shares_of_a_batch_put_together_are_the_batch(tmp_path, shares):
    cases = store_blobs(tmp_path, SHAPES)
    sampling = replace(SAMPLING, batch_size=5)
    whole = make_batch(cases, sampling, 4)
    parts = [make_batch(cases, replace(sampling, share=(number, shares)), 4) for number in range(shares)]
    assert torch.equal(torch.cat([part.image for part in parts]), whole.image)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert {part.cases for part in parts} == {whole.cases}


def test_more_processes_than_samples_are_refused():
    configuration = make_configuration((4, 8, 6), FLAT_KERNELS, batch_size=2)
    check_batches(configuration, replace(ALONE, size=2))
    with pytest.raises(UsageError, match=r"E0001.*3 processes for batches of 2"):
        check_batches(configuration, replace(ALONE, size=3))


def test_batch_norm_is_refused_in_several_processes():
    network = torch.nn.Sequential(torch.nn.BatchNorm3d(2))
    check_network(network, ALONE)
    with pytest.raises(UsageError, match=r"E0162.*batch normalisation"):
        check_network(network, replace(ALONE, size=2))


@pytest.mark.parametrize("numbers", [(2, 2, 0, 1), (-1, 2, 0, 1), (0, 2, 1, 1), (0, 2, 0, 3)])
def test_numbers_of_processes_that_make_no_sense_are_refused(numbers):
    with pytest.raises(UsageError, match="E0001"):
        Launch(*numbers, "127.0.0.1", 29500)


def test_the_largest_values_are_counted_once_where_many_are_equal():
    values = torch.tensor([3.0, 1, 1, 1, 0])
    assert float(mean_of_largest(values, 2)) == 2
    assert float(mean_of_largest(values, 9)) == pytest.approx(6 / 5)

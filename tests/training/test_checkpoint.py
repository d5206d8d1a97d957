"""Checkpoints: weights and momentum come back bit for bit, damaged ones are passed over, two are kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import FLAT_KERNELS
from torch import nn

from medseg.errors import NonFiniteError
from medseg.networks.build import build_network
from medseg.networks.device import Device, place
from medseg.training.checkpoint import LoopState, load_checkpoint, newest_checkpoint, save_checkpoint

CPU = Device(torch.device("cpu"), torch.float32, "test")


def training(seed: int, momentum: float = 0.9) -> tuple[nn.Module, torch.optim.SGD]:
    network = place(build_network(FLAT_KERNELS, 1, 2, seed), CPU, 3).train()
    return network, torch.optim.SGD(network.parameters(), lr=0.05, momentum=momentum, nesterov=momentum > 0)


def walk(network: nn.Module, optimizer: torch.optim.SGD, steps: int) -> None:
    x = torch.randn(1, 1, 2, 8, 6, generator=torch.Generator().manual_seed(steps))
    for _ in range(steps):
        optimizer.zero_grad()
        network(x)[0].square().mean().backward()
        optimizer.step()


def state(step: int) -> LoopState:
    return LoopState(
        step=step, elapsed_s=1.25 * step, settings_sha256="s", length="9 steps", precision="torch.float32", threads=1
    )


def save(folder: Path, *steps: int, seed: int = 1) -> None:
    network, optimizer = training(seed)
    walk(network, optimizer, 1)
    for step in steps:
        save_checkpoint(folder, network, optimizer, state(step))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def equal(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_what_is_loaded_goes_on_exactly_as_what_was_saved(tmp_path, momentum):
    network, optimizer = training(1, momentum)
    walk(network, optimizer, 3)
    save_checkpoint(tmp_path, network, optimizer, state(3))
    other, other_optimizer = training(2, momentum)
    walk(other, other_optimizer, 1)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state == state(3)
    load_checkpoint(checkpoint, other, other_optimizer)
    assert equal(network, other)
    for n, o in ((network, optimizer), (other, other_optimizer)):
        walk(n, o, 2)
    assert equal(network, other)


def test_loaded_momentum_lies_in_memory_as_its_parameter(tmp_path):
    save(tmp_path, 1)
    network, optimizer = training(2)
    load_checkpoint(newest_checkpoint(tmp_path), network, optimizer)
    parameter = network.encoder[1][0].weight
    momentum = optimizer.state[parameter]["momentum_buffer"]
    assert parameter.is_contiguous(memory_format=torch.channels_last_3d)
    assert momentum.stride() == parameter.stride()


def test_a_training_that_has_not_begun_can_be_saved(tmp_path):
    network, optimizer = training(1)
    save_checkpoint(tmp_path, network, optimizer, state(0))
    other, other_optimizer = training(2)
    load_checkpoint(newest_checkpoint(tmp_path), other, other_optimizer)
    assert equal(network, other)


def test_two_are_kept_and_the_newest_is_found(tmp_path):
    save(tmp_path, 9, 10, 99, 100)
    assert names(tmp_path) == ["step_00000099", "step_00000100"]
    assert newest_checkpoint(tmp_path).state == state(100)


def test_no_checkpoint_is_none(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "flipped": flip_a_byte,
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path, caplog, name, how):
    save(tmp_path, 4, 8)
    DAMAGE[how](tmp_path / "step_00000008" / name)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state == state(4)
    assert "step_00000008 is passed over" in caplog.text


def test_when_all_are_damaged_there_is_none(tmp_path, caplog):
    save(tmp_path, 4, 8)
    for folder in tmp_path.iterdir():
        flip_a_byte(folder / "weights.safetensors")
    assert newest_checkpoint(tmp_path) is None
    assert caplog.text.count("passed over") == 2


def test_a_file_called_like_a_checkpoint_is_none(tmp_path):
    (tmp_path / "step_00000003").write_text("not a folder")
    assert newest_checkpoint(tmp_path) is None


def test_after_damaged_ones_what_is_saved_stays(tmp_path):
    """A training that went on before two damaged checkpoints, or from the start, must not lose its own."""
    save(tmp_path, 40, 50)
    for folder in tmp_path.iterdir():
        flip_a_byte(folder / "weights.safetensors")
    save(tmp_path, 10)
    assert newest_checkpoint(tmp_path).state == state(10)
    save(tmp_path, 20)
    save(tmp_path, 30)
    assert names(tmp_path) == ["step_00000020", "step_00000030"]


def test_one_that_was_cut_off_while_it_was_written_does_not_push_out_a_whole_one(tmp_path):
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step_00000010", tmp_path / "step_00000015")
    (tmp_path / "step_00000015" / "manifest.json").unlink()
    save(tmp_path, 20)
    assert names(tmp_path) == ["step_00000010", "step_00000020"]


def test_weights_that_are_not_finite_are_not_saved_and_the_last_checkpoint_stays(tmp_path):
    save(tmp_path, 4)
    network, optimizer = training(1)
    with torch.no_grad():
        network.heads[0].bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match="E1001"):
        save_checkpoint(tmp_path, network, optimizer, state(5))
    assert newest_checkpoint(tmp_path).state == state(4)


def test_nothing_in_it_is_a_pickle(tmp_path):
    save(tmp_path, 3)
    files = sorted(p.name for p in (tmp_path / "step_00000003").iterdir())
    assert files == ["manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"]
    assert not any(p.read_bytes()[:2] == b"\x80\x02" or p.read_bytes()[:2] == b"PK" for p in tmp_path.rglob("*.*"))

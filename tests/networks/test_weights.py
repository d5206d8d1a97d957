"""Weights on disk: what is loaded is what was saved, and nothing damaged or not finite passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny_models import FLAT_KERNELS, TWO_D

from medseg.artefacts import sha256_of
from medseg.errors import IntegrityError, NonFiniteError
from medseg.networks.build import build_network
from medseg.networks.device import Device, place
from medseg.networks.weights import load_weights, save_tensors, save_weights

CPU = Device(torch.device("cpu"), torch.float32, "test")


def network(seed: int = 0, outputs: int = 3):
    return build_network(FLAT_KERNELS, 1, outputs, seed)


def test_weights_come_back_as_they_were(tmp_path):
    saved, loaded = network(1), network(2)
    digest = save_weights(tmp_path / "weights.safetensors", saved)
    load_weights(tmp_path / "weights.safetensors", loaded, digest)
    values = loaded.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in saved.state_dict().items())
    assert digest == sha256_of(tmp_path / "weights.safetensors")


def test_the_memory_layout_of_the_saved_network_does_not_matter(tmp_path):
    plain = save_weights(tmp_path / "plain.safetensors", network(1))
    assert plain == save_weights(tmp_path / "placed.safetensors", place(network(1), CPU, 3))
    placed = place(network(2), CPU, 3)
    load_weights(tmp_path / "plain.safetensors", placed)
    assert torch.equal(placed.encoder[0][0].weight, network(1).encoder[0][0].weight)
    assert placed.encoder[0][2].weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_other_programs_read_float32_values_under_the_names_of_the_modules(tmp_path):
    saved = network(1).to(torch.bfloat16)
    save_weights(tmp_path / "weights.safetensors", saved)
    values = load_file(tmp_path / "weights.safetensors")
    assert set(values) == set(saved.state_dict())
    assert {value.dtype for value in values.values()} == {np.dtype(np.float32)}
    expected = saved.encoder[0][0].weight.detach().float().numpy()
    assert np.array_equal(values["encoder.0.0.weight"], expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_and_the_old_file_stays(tmp_path, value):
    path = tmp_path / "weights.safetensors"
    digest = save_weights(path, network(1))
    broken = network(2)
    with torch.no_grad():
        broken.decoder[0][0].weight[0, 0, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match=r"E1001.*decoder\.0\.0\.weight"):
        save_weights(path, broken)
    assert sha256_of(path) == digest
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_no_tensors_at_all_can_be_saved(tmp_path):
    save_tensors(tmp_path / "momentum.safetensors", {})
    assert load_file(tmp_path / "momentum.safetensors") == {}


def test_weights_of_another_shape_are_refused(tmp_path):
    save_weights(tmp_path / "weights.safetensors", network(outputs=4))
    with pytest.raises(IntegrityError, match=r"E0701.*heads\.0\.weight"):
        load_weights(tmp_path / "weights.safetensors", network(outputs=3))


def test_weights_of_another_network_are_refused(tmp_path):
    save_weights(tmp_path / "weights.safetensors", build_network(TWO_D, 1, 3))
    with pytest.raises(IntegrityError, match="E0701"):
        load_weights(tmp_path / "weights.safetensors", network())


def test_another_file_than_the_card_names_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "weights.safetensors"
    digest = save_weights(path, network(1))
    save_weights(path, network(2))
    loaded = network(3)
    with pytest.raises(IntegrityError, match="E0701"):
        load_weights(path, loaded, digest)
    assert torch.equal(loaded.encoder[0][0].weight, network(3).encoder[0][0].weight)


@pytest.mark.parametrize("sha256", [None, "0" * 64])
def test_a_missing_file_is_an_integrity_error(tmp_path, sha256):
    with pytest.raises(IntegrityError, match=r"E0701.*weights\.safetensors"):
        load_weights(tmp_path / "weights.safetensors", network(), sha256)


@pytest.mark.parametrize("damage", ["empty", "truncated", "header", "not safetensors"])
def test_a_damaged_file_is_an_integrity_error(tmp_path, damage):
    path = tmp_path / "weights.safetensors"
    save_weights(path, network())
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "truncated": content[:-7],
            "header": b"\xff" * 8 + content[8:],
            "not safetensors": b"PK\x03\x04 some zip archive",
        }[damage]
    )
    with pytest.raises(IntegrityError, match="E0701"):
        load_weights(path, network())

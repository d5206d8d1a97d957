"""Models on disk: found in a run, a configuration or a fold; whatever is missing, damaged or mixed is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import FLAT_KERNELS, TWO_D, make_card, make_configuration, make_plan, make_task
from torch import Tensor, nn

from medseg.errors import IncompatibleError, InputError, IntegrityError, MedsegError, UsageError
from medseg.inference.model import Model, load_model, segment
from medseg.inference.sliding import stream_logits
from medseg.networks.build import build_network
from medseg.networks.device import Device
from medseg.networks.weights import save_weights
from medseg.preparation.prepare import prepare
from medseg.records.base import write_record
from medseg.records.grid import Grid, Volume
from medseg.records.model import ModelCard
from medseg.records.plan import ConfigurationPlan, Normalisation, Plan

CPU = Device(torch.device("cpu"), torch.float32, "test")
FULL = make_configuration((4, 8, 6), FLAT_KERNELS, name="3d_fullres", mirror_axes=(0, 1, 2))
FLAT = make_configuration((8, 6), TWO_D, name="2d")
PLAN = make_plan(FULL, make_task())


def save_fold(run: Path, fold: str, seed: int, plan: Plan = PLAN, batch_size: int = 2) -> Path:
    """A finished fold of the only configuration of ``plan``."""
    (configuration,) = plan.configurations.values()
    folder = run / "models" / configuration.name / f"fold_{fold}"
    network = build_network(configuration.network, len(plan.task.channels), plan.task.outputs, seed)
    sha256 = save_weights(folder / "weights.safetensors", network)
    card = make_card(plan, fold=fold, weights_sha256=sha256, batch_size=batch_size)
    write_record(folder / "model.json", card)
    return folder


def first_weights(model: Model) -> list[Tensor]:
    return [network.state_dict()["encoder.0.0.weight"] for network in model.networks]


def weights_of(seed: int) -> Tensor:
    return build_network(FULL.network, 1, 3, seed).state_dict()["encoder.0.0.weight"]


@pytest.fixture
def run(tmp_path) -> Path:
    save_fold(tmp_path / "run", "1", seed=11)
    save_fold(tmp_path / "run", "0", seed=10)
    return tmp_path / "run"


@pytest.mark.parametrize("below", ["", "models", "models/3d_fullres"])
def test_all_folds_are_found_from_the_run_down_to_the_configuration(run, below):
    model = load_model(run / below, CPU)
    assert [card.fold for card in model.cards] == ["0", "1"]
    assert all(torch.equal(a, weights_of(s)) for a, s in zip(first_weights(model), (10, 11), strict=True))
    assert model.folder == run / "models" / "3d_fullres"
    assert (model.plan, model.configuration) == (PLAN, PLAN.configurations["3d_fullres"])
    assert model.sha256 == tuple(card.weights_sha256 for card in model.cards)
    assert not any(network.training for network in model.networks)


def test_a_fold_is_a_model_by_itself_wherever_it_was_moved(run, tmp_path):
    model = load_model(run / "models" / "3d_fullres" / "fold_1", CPU)
    assert torch.equal(first_weights(model)[0], weights_of(11))
    moved = shutil.move(run / "models" / "3d_fullres" / "fold_1", tmp_path / "our model")
    assert torch.equal(first_weights(load_model(Path(moved), CPU))[0], weights_of(11))


def test_the_current_folder_can_be_the_model(run, monkeypatch):
    monkeypatch.chdir(run / "models" / "3d_fullres")
    assert len(load_model(Path(), CPU, "3d_fullres").networks) == 2
    monkeypatch.chdir("fold_1")
    assert len(load_model(Path(), CPU, folds=["1"]).networks) == 1


def test_named_folds_are_taken_in_the_order_given(run):
    model = load_model(run, CPU, folds=["1"])
    assert [card.fold for card in model.cards] == ["1"]
    assert [card.fold for card in load_model(run, CPU, folds=["1", "0"]).cards] == ["1", "0"]


def test_the_model_of_all_cases_is_preferred(run):
    save_fold(run, "all", seed=12)
    assert [card.fold for card in load_model(run, CPU).cards] == ["all"]
    assert [card.fold for card in load_model(run, CPU, folds=["0"]).cards] == ["0"]


def test_a_fold_without_a_card_is_not_finished_and_not_found(run):
    (run / "models" / "3d_fullres" / "fold_0" / "model.json").unlink()
    assert [card.fold for card in load_model(run, CPU).cards] == ["1"]


@pytest.mark.parametrize("kind", ["nowhere", "empty", "file"])
def test_where_there_is_no_model_it_says_so(tmp_path, kind):
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("no folder")
    with pytest.raises(InputError, match=r"E0100.*no trained model"):
        load_model(path, CPU)


def test_of_several_configurations_one_must_be_named(run):
    save_fold(run, "0", seed=1, plan=make_plan(FLAT, make_task()))
    with pytest.raises(UsageError, match=r"E0001.*2d, 3d_fullres"):
        load_model(run, CPU)
    assert load_model(run, CPU, "2d").configuration.name == "2d"
    assert load_model(run, CPU, "3d_fullres").configuration.name == "3d_fullres"


@pytest.mark.parametrize("below", ["", "models/3d_fullres", "models/3d_fullres/fold_0"])
def test_a_configuration_that_is_not_trained_is_refused(run, below):
    with pytest.raises(UsageError, match="E0001") as caught:
        load_model(run / below, CPU, "3d_lowres")
    assert "3d_fullres" in str(caught.value)


def test_a_fold_that_is_not_trained_is_refused(run):
    with pytest.raises(UsageError, match=r"E0001.*fold 3, all is not trained vs 0, 1"):
        load_model(run, CPU, folds=["0", "3", "all"])


def changed(configuration: ConfigurationPlan, **changes: object) -> Plan:
    return make_plan(configuration.model_copy(update=changes), make_task())


@pytest.mark.parametrize("change", [{"spacing_mm": (2.5, 1.0, 0.8)}, {"patch_size": (4, 8, 8)}])
def test_folds_of_different_plans_are_not_mixed(run, change):
    save_fold(run, "2", seed=1, plan=changed(FULL, **change))
    with pytest.raises(IncompatibleError, match="E0802"):
        load_model(run, CPU)
    assert len(load_model(run, CPU, folds=["0", "1"]).networks) == 2


def test_folds_that_were_only_trained_differently_belong_together(run):
    save_fold(run, "2", seed=1, plan=changed(FULL, batch_size=5), batch_size=3)
    assert len(load_model(run, CPU).networks) == 3


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "of another fold"])
def test_damaged_weights_are_refused(run, damage):
    folder = run / "models" / "3d_fullres"
    path = folder / "fold_1" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "of another fold":
        shutil.copy(folder / "fold_0" / path.name, path)
    else:
        content[-5] ^= 2
        path.write_bytes(content if damage == "flipped" else content[:-4])
    with pytest.raises(IntegrityError, match="E0701"):
        load_model(run, CPU)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_text("{"), id="cut off"),
        pytest.param(lambda path: path.write_text("[]"), id="another kind"),
        pytest.param(lambda path: edit(path, extra=1), id="unknown field"),
        pytest.param(lambda path: edit(path, schema_version=2), id="later schema"),
        pytest.param(lambda path: edit(path, configuration="3d_other"), id="configuration that is not in its plan"),
        pytest.param(lambda path: edit(path, plan={}), id="no plan"),
    ],
)
@pytest.mark.parametrize("below", ["", "models/3d_fullres/fold_1"])
def test_a_damaged_card_is_refused(run, damage, below):
    damage(run / "models" / "3d_fullres" / "fold_1" / "model.json")
    with pytest.raises(IntegrityError, match="E0711"):
        load_model(run / below, CPU)


def test_every_refusal_is_one_of_ours_whatever_byte_of_the_card_is_changed(run):
    path = run / "models" / "3d_fullres" / "fold_1" / "model.json"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(0, len(content), 60):
        changed = bytearray(content)
        changed[position] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(changed)
        try:
            load_model(run, CPU, folds=["1"])
        except MedsegError:
            refused += 1
    assert refused > 0


class Threshold(nn.Module):
    """Class 1 above a half."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [torch.cat((torch.zeros_like(x), x - 0.5), 1)]


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1), (1, -1, 1)])
def test_a_threshold_finds_the_bright_voxels_of_any_file_where_they_are(signs, mirror):
    """Cropped, turned and flipped on the way in, and all of that undone on the way out."""
    rng = np.random.default_rng(4)
    array = np.zeros((1, 9, 14, 11), np.float32)
    array[0, 1:8, 2:13, 3:9] = rng.uniform(0.1, 1, (7, 11, 6))
    affine = np.zeros((4, 4))
    affine[[1, 2, 0], [0, 1, 2]] = np.array((0.8, 2.0, 1.0)) * signs  # file axes are y, z, x of the patient
    affine[3, 3] = 1
    configuration = FULL.model_copy(update={"spacing_mm": (2.0, 0.8, 1.0)})
    plan = make_plan(configuration, make_task(2))
    plain = plan.configurations["3d_fullres"].model_copy(update={"normalisation": (Normalisation(scheme="none"),)})
    plan = plan.model_copy(update={"configurations": {"3d_fullres": plain}})
    card = ModelCard.model_construct(configuration="3d_fullres", plan=plan, weights_sha256="0")
    prepared = prepare(Volume(array, Grid((9, 14, 11), affine)), plan, plain)
    assert prepared.image.shape == (1, 11, 7, 6)
    labels = segment(Model(Path(), (card,), (Threshold(),), CPU), [prepared], mirror=mirror)
    assert np.array_equal(labels, (array[0] > 0.5).astype(np.int16))


def test_mirroring_is_along_the_axes_of_the_plan(run, monkeypatch):
    model = load_model(run, CPU)
    array = np.random.default_rng(0).uniform(1, 2, (1, 5, 9, 7)).astype(np.float32)
    prepared = prepare(Volume(array, Grid((5, 9, 7), np.diag((1.0, 1.0, 1.0, 1.0)))), model.plan, model.configuration)
    seen = []

    def watch(*arguments, mirroring, blending, previous, backend):
        seen.append((mirroring.axes, previous))
        return stream_logits(*arguments, mirroring=mirroring, blending=blending, backend=backend)

    monkeypatch.setattr("medseg.inference.model.stream_logits", watch)
    segment(model, [prepared])
    segment(model, [prepared], mirror=True)
    assert seen == [((), None), ((0, 1, 2), None)]

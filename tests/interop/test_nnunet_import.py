"""nnU-Net models as they are: against nnU-Net's recorded predictions, and everything that can be asked of an import."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunet_phantoms import (
    NETWORK,
    RESIDUAL,
    architecture,
    checkpoint,
    configuration,
    plans,
    write_results,
)

from medseg.cli.main import main
from medseg.errors import InputError, IntegrityError, MedsegError, UsageError
from medseg.inference.model import load_model, prepare_stages
from medseg.interop.nnunet_models import ImportOptions, import_nnunet
from medseg.interop.nnunet_weights import from_nnunet
from medseg.networks.build import build_network
from medseg.networks.device import choose_device
from medseg.records.grid import Grid, Volume


def codes(error: MedsegError) -> list[str]:
    return [problem.code for problem in error.problems]


def old_configuration() -> dict:
    """The same network as ``NETWORK``'s sizes allow, in the form of nnU-Net before 2.5."""
    value = configuration(
        UNet_class_name="PlainConvUNet",
        UNet_base_num_features=4,
        unet_max_num_features=8,
        n_conv_per_stage_encoder=[2, 1, 2],
        n_conv_per_stage_decoder=[1, 2],
        num_pool_per_axis=[1, 2, 1],
        pool_op_kernel_sizes=[[1, 1, 1], [1, 2, 2], [2, 2, 1]],
        conv_kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    )
    del value["architecture"]
    return value


def labels_of(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


@pytest.mark.parametrize("tta", ["none", "mirror"])
def test_predictions_are_those_of_nnunet(shared, tmp_path, tta):
    source = shared / "nnunet_model" / "hippocampus"
    model, found = tmp_path / "model", tmp_path / "found"
    assert main(["import", "nnunet", str(source), "--output", str(model)]) == 0
    names = ["hippocampus_274", "hippocampus_051"][: 1 if tta == "mirror" else 2]
    inputs = [str(source / "input" / f"{name}_0000.nii.gz") for name in names]
    options = ["--tta", tta, "--precision", "float32", "--device", "cpu", "--progress", "none"]
    assert main(["predict", "--model", str(model), "-i", *inputs, "-o", str(found), *options]) == 0
    for name in names:
        folder = "output_mirroring" if tta == "mirror" else "output_no_mirroring"
        theirs, ours = labels_of(source / folder / f"{name}.nii.gz"), labels_of(found / f"{name}.nii.gz")
        assert (theirs == ours).mean() > 0.9999


def test_a_zip_archive_a_fold_and_a_folder_above_give_the_same_model(tmp_path):
    results = write_results(tmp_path / "Dataset900_Phantom", plans({"3d_fullres": configuration()}), folds=("0", "3"))
    (results / "fold_0" / "progress.png").write_bytes(b"picture")
    archive = tmp_path / "exported.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(results.rglob("*.*")):
            file.write(path, path.relative_to(tmp_path))
    hashes = []
    for number, source in enumerate((results, results.parent, tmp_path, archive)):
        imported = import_nnunet(source, tmp_path / f"model_{number}")
        hashes.append([card.weights_sha256 for card in imported.cards])
    assert hashes[0] == hashes[1] == hashes[2] == hashes[3]
    alone = import_nnunet(results / "fold_3", tmp_path / "alone")
    assert [card.weights_sha256 for card in alone.cards] == hashes[0][1:]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".medseg")] == []


@pytest.mark.parametrize("network", [NETWORK, RESIDUAL], ids=["plain", "residual"])
def test_weights_give_the_same_logits_whatever_biases_stand_in_front_of_a_norm(network):
    theirs = checkpoint(network, "3d_fullres")["network_weights"]
    expected = build_network(network, 1, 3).eval()
    noise = {k: torch.randn_like(v) if k.endswith(".conv.bias") else v for k, v in theirs.items()}
    for name in [k for k in noise if "all_modules.0.bias" in k]:
        del noise[name]  # the other names of what was changed
    noise = {k: v for k, v in noise.items() if not (k.startswith("decoder.encoder.") and k.endswith(".conv.bias"))}
    found = build_network(network, 1, 3, seed=1).eval()
    found.load_state_dict(from_nnunet(noise, network, 1, 3))
    x = torch.randn(1, 1, 8, 16, 12)
    with torch.inference_mode():
        torch.testing.assert_close(found(x)[0], expected(x)[0])


def test_plans_before_2_5_and_inherited_ones_mean_the_same_network(tmp_path):
    old = {"base": old_configuration(), "3d_fullres": {"inherits_from": "base", "batch_size": 5}}
    network = NETWORK.model_copy(update={"features": (4, 8, 8)})
    results = write_results(tmp_path, plans(old), network=network)
    card = import_nnunet(results, tmp_path / "model").cards[0]
    assert card.plan.configurations["3d_fullres"].network == network
    assert card.batch_size == 5


def test_two_stages_of_a_cascade_come_together(tmp_path):
    both = {
        "3d_lowres": configuration(spacing=[4.0, 2.2, 1.8]),
        "3d_fullres": configuration(),
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    second = write_results(tmp_path, plans(both), "3d_cascade_fullres", channels=3)
    with pytest.raises(InputError, match="3d_lowres, is not beside it") as refused:
        import_nnunet(second, tmp_path / "model")
    assert codes(refused.value) == ["E0100"]
    assert not (tmp_path / "model").exists()
    write_results(tmp_path, plans(both), "3d_lowres", folds=("0", "1"))
    imported = import_nnunet(tmp_path, tmp_path / "model")
    assert [(c.configuration, c.fold) for c in imported.cards] == [
        ("3d_cascade_fullres", "0"),
        ("3d_lowres", "0"),
        ("3d_lowres", "1"),
    ]
    model = load_model(tmp_path / "model", choose_device("cpu", "float32"))
    assert [stage.configuration.name for stage in model.stages] == ["3d_lowres", "3d_cascade_fullres"]


@pytest.mark.parametrize(
    ("reader", "turned"),
    [("SimpleITKIO", False), ("NibabelIO", False), ("SimpleITKIOWithReorient", True), ("NibabelIOWithReorient", True)],
)
def test_volumes_are_seen_on_the_axes_that_the_reader_gives(tmp_path, reader, turned):
    written = plans({"3d_fullres": configuration()}, image_reader_writer=reader)
    import_nnunet(write_results(tmp_path, written), tmp_path / "model")
    model = load_model(tmp_path / "model", choose_device("cpu", "float32"))
    affine = np.diag([2.0, 1.0, 1.0, 1.0])[[2, 1, 0, 3]]  # z, y, x grow towards superior, anterior, right
    affine[:, 0] *= -1
    image = np.random.default_rng(0).normal(10, 1, (1, 9, 20, 14)).astype(np.float32)
    (prepared,) = prepare_stages(model, Volume(image, Grid((9, 20, 14), affine)))
    assert prepared.preparation.flipped == (turned, False, False)


def test_regions_and_the_ignore_label_are_kept(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    results = write_results(tmp_path, plans({"3d_fullres": configuration()}), labels=labels, regions_class_order=[1, 2])
    task = import_nnunet(results, tmp_path / "model").cards[0].plan.task
    assert [(region.name, region.values) for region in task.regions] == [("whole", (1, 2)), ("core", (2,))]
    assert (task.regions_order, task.ignore_value) == ((1, 2), 3)


def test_resampling_arguments_are_read(tmp_path):
    arguments = {
        f"resampling_fn_{part}_kwargs": {
            "is_seg": part == "seg",
            "order": order,
            "order_z": 1,
            "force_separate_z": False,
        }
        for part, order in (("data", 2), ("seg", 0), ("probabilities", 1))
    }
    results = write_results(tmp_path, plans({"3d_fullres": configuration(**arguments)}))
    found = import_nnunet(results, tmp_path / "model").cards[0].plan.configurations["3d_fullres"].resampling
    assert (found.image_order, found.label_order, found.probability_order) == (2, 0, 1)
    assert (found.image_order_z, found.label_order_z, found.probability_order_z) == (1, 1, 1)
    assert found.force_separate_z is False


def arch(**changes: object) -> dict:
    value = architecture()
    return {"architecture": value | {"arch_kwargs": value["arch_kwargs"] | changes}}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (arch(norm_op="torch.nn.modules.batchnorm.BatchNorm3d"), "norm_op"),
        (arch(nonlin="torch.nn.ReLU"), "nonlin"),
        (arch(nonlin_kwargs={"negative_slope": 0.2}), "nonlin_kwargs"),
        (arch(nonlin_first=True), "nonlin_first"),
        (arch(conv_op="os.system"), "conv_op"),
        (arch(stem_channels=7), "stem_channels"),
        ({"architecture": architecture() | {"network_class_name": "my.Net"}}, "network_class_name"),
        ({"preprocessor_name": "MyPreprocessor"}, "preprocessor_name"),
        ({"resampling_fn_data": "resample_torch_fornnunet"}, "resampling_fn_data"),
        ({"normalization_schemes": ["MyNormalization"]}, "normalization_schemes"),
    ],
)
def test_what_medseg_does_not_predict_is_refused_and_named(tmp_path, changes, word):
    results = write_results(tmp_path, plans({"3d_fullres": configuration(**changes)}))
    with pytest.raises(InputError, match=word) as refused:
        import_nnunet(results, tmp_path / "model")
    assert codes(refused.value) == ["E0162"]
    assert not (tmp_path / "model").exists()


def test_weights_that_do_not_fit_the_plans_are_refused_and_named(tmp_path):
    results = write_results(tmp_path, plans({"3d_fullres": configuration()}))
    file = results / "fold_0" / "checkpoint_final.pth"
    good = checkpoint(NETWORK, "3d_fullres")
    name = "decoder.seg_layers.1.weight"
    faults = {
        "missing": {k: v for k, v in good["network_weights"].items() if k != name},
        "unknown": good["network_weights"] | {"decoder.attention.weight": torch.zeros(3)},
        "of another shape": good["network_weights"] | {name: torch.zeros(5, 4, 1, 1, 1)},
        "not the same": good["network_weights"] | {"encoder.stages.0.0.convs.0.all_modules.0.weight": torch.zeros(1)},
        "not of floating point": good["network_weights"] | {name: torch.zeros(3, 4, 1, 1, 1, dtype=torch.int64)},
    }
    for what, weights in faults.items():
        torch.save(good | {"network_weights": weights}, file)
        with pytest.raises(MedsegError, match=what) as refused:
            import_nnunet(results, tmp_path / "model")
        assert codes(refused.value) == ["E0802"], what
    torch.save(good | {"network_weights": good["network_weights"] | {name: torch.full((3, 4, 1, 1, 1), np.nan)}}, file)
    with pytest.raises(MedsegError) as refused:
        import_nnunet(results, tmp_path / "model")
    assert codes(refused.value) == ["E1001"]


def test_a_model_that_is_there_is_replaced_only_on_request(tmp_path):
    results = write_results(tmp_path, plans({"3d_fullres": configuration()}))
    import_nnunet(results, tmp_path / "model")
    with pytest.raises(UsageError, match="--overwrite"):
        import_nnunet(results, tmp_path / "model")
    import_nnunet(results, tmp_path / "model", ImportOptions(overwrite=True))
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    with pytest.raises(UsageError, match="is there already"):
        import_nnunet(results, tmp_path / "precious", ImportOptions(overwrite=True))


def test_what_is_asked_for_and_not_there_is_named(tmp_path):
    results = write_results(tmp_path, plans({"3d_fullres": configuration()}))
    with pytest.raises(UsageError, match="fold 4"):
        import_nnunet(results, tmp_path / "m", ImportOptions(folds=("4",)))
    with pytest.raises(InputError, match=r"checkpoint_final\.pth"):
        import_nnunet(results, tmp_path / "m", ImportOptions(checkpoint="checkpoint_best.pth"))
    with pytest.raises(UsageError, match="no model of configuration 2d"):
        import_nnunet(results, tmp_path / "m", ImportOptions(configuration="2d"))
    (results / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"no dataset\.json"):
        import_nnunet(results, tmp_path / "m")
    (results / "plans.json").unlink()
    with pytest.raises(InputError, match=r"no plans\.json"):
        import_nnunet(results, tmp_path / "m")


def test_postprocessing_is_taken_over_from_json_and_its_pickle_is_not_opened(tmp_path):
    results = write_results(tmp_path, plans({"3d_fullres": configuration()}), folds=("0", "1"))
    folder = results / "crossval_results_folds_0_1"
    folder.mkdir()
    (folder / "postprocessing.pkl").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(InputError, match="pickle") as refused:
        import_nnunet(results, tmp_path / "model")
    assert codes(refused.value) == ["E0106"]
    function = "remove_all_but_largest_component_from_segmentation"
    steps = [{"labels_or_regions": [1, 2]}, {"labels_or_regions": 2}]
    value = {"postprocessing_fns": [function] * 2, "postprocessing_kwargs": steps, "mean": {"Dice": float("nan")}}
    (folder / "postprocessing.json").write_text(json.dumps(value))
    found = import_nnunet(results, tmp_path / "model").postprocessing
    assert found is not None
    assert (found.keep_largest_foreground, found.keep_largest_labels) == (True, (2,))
    assert (tmp_path / "model" / "3d_fullres" / "postprocessing.json").is_file()
    one = import_nnunet(results, tmp_path / "one", ImportOptions(folds=("0",)))
    assert one.postprocessing is None, "it was found for other folds"
    (folder / "postprocessing.json").write_text(json.dumps(value | {"postprocessing_fns": ["os.system"] * 2}))
    with pytest.raises(InputError, match="system"):
        import_nnunet(results, tmp_path / "two")
    without = import_nnunet(results, tmp_path / "three", ImportOptions(postprocessing=False))
    assert without.postprocessing is None


def test_a_trainer_of_somebodys_own_is_pointed_out(tmp_path):
    results = write_results(tmp_path, plans({"3d_fullres": configuration()}))
    assert import_nnunet(results, tmp_path / "a").notes == ()
    file = results / "fold_0" / "checkpoint_final.pth"
    for name, notes in (("nnUNetTrainer_4000epochs_NoMirroring", 0), ("MyTrainer", 1)):
        torch.save(checkpoint(NETWORK, "3d_fullres") | {"trainer_name": name}, file)
        assert len(import_nnunet(results, tmp_path / name).notes) == notes


def test_label_values_with_gaps_are_refused_as_nnunet_would_not_write_them(tmp_path):
    results = write_results(tmp_path, plans({"3d_fullres": configuration()}), labels={"background": 0, "a": 1, "b": 3})
    with pytest.raises(InputError) as refused:
        import_nnunet(results, tmp_path / "model")
    assert codes(refused.value) == ["E0145"]


def test_plans_that_inherit_from_themselves_are_refused(tmp_path):
    circle = {"3d_fullres": {"inherits_from": "other"}, "other": {"inherits_from": "3d_fullres"}}
    results = write_results(tmp_path, plans(circle))
    with pytest.raises(IntegrityError, match="circle"):
        import_nnunet(results, tmp_path / "model")

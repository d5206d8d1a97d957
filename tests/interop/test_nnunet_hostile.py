"""Hostile nnU-Net models: nothing in them is executed, unpacked elsewhere, or allocated before it is judged."""

from __future__ import annotations

import io
import pickle
import stat
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from nnunet_phantoms import NETWORK, architecture, checkpoint, configuration, plans, write_results

from medseg.errors import IntegrityError, MedsegError
from medseg.interop.nnunet_checkpoint import read_checkpoint
from medseg.interop.nnunet_folder import opened
from medseg.interop.nnunet_models import import_nnunet

CALLS: list[str] = []


def _watch(event: str, arguments: tuple) -> None:
    if event in ("os.system", "subprocess.Popen", "socket.connect", "os.exec", "exec.canary"):
        CALLS.append(f"{event} {arguments}")


sys.addaudithook(_watch)


class Calls:
    """Pickled, it is a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def with_pickle(path: Path, program: bytes) -> Path:
    """A checkpoint whose data.pkl is ``program``."""
    torch.save(checkpoint(NETWORK, "3d_fullres"), path.with_suffix(".good"))
    with zipfile.ZipFile(path.with_suffix(".good")) as good, zipfile.ZipFile(path, "w") as bad:
        for member in good.infolist():
            data = program if member.filename.endswith("data.pkl") else good.read(member)
            bad.writestr(member.filename, data)
    return path


def programs() -> dict[str, bytes]:
    import os
    import subprocess

    return {
        "system": pickle.dumps({"network_weights": Calls(os.system, "touch canary")}),
        "popen": pickle.dumps(Calls(subprocess.Popen, ["touch", "canary"])),
        "eval": pickle.dumps([Calls(eval, "__import__('os').system('touch canary')")]),
        "getattr": pickle.dumps(Calls(getattr, "text", "format")),
        "import": b"c__builtin__\n__import__\n(S'os'\ntR.",
        "load": b"ctorch\nload\n(S'other.pth'\ntR.",
        "stack": b"cos\nsystem\n\x93(S'touch canary'\ntR.",
        "truncated": pickle.dumps({"a": list(range(99))})[:50],
        "nothing": b"",
        "long": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"1" * 20 + b".",
    }


@pytest.mark.parametrize("name", programs())
def test_a_checkpoint_that_is_a_program_is_refused_and_not_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    CALLS.clear()
    with pytest.raises(IntegrityError) as refused:
        read_checkpoint(with_pickle(tmp_path / "checkpoint_final.pth", programs()[name]))
    assert refused.value.problems[0].code in ("E0701", "E0710")
    assert CALLS == []
    assert not (tmp_path / "canary").exists()


def test_files_that_are_no_archives_of_tensors_are_refused(tmp_path):
    import os

    bare = tmp_path / "bare.pth"
    bare.write_bytes(pickle.dumps(Calls(os.system, "true")))
    legacy = tmp_path / "legacy.pth"
    torch.save(checkpoint(NETWORK, "x"), legacy, _use_new_zipfile_serialization=False)
    script = tmp_path / "script.pth"
    with zipfile.ZipFile(script, "w") as file:
        file.writestr("m/data.pkl", pickle.dumps({}))
        file.writestr("m/code/__torch__.py", "import os")
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("m/data.pkl", pickle.dumps({}))
        file.writestr("m/data/0", bytes(2**20))
    empty = tmp_path / "empty.pth"
    empty.write_bytes(b"")
    CALLS.clear()
    for path in (bare, legacy, script, packed, empty):
        with pytest.raises(IntegrityError) as refused:
            read_checkpoint(path)
        assert refused.value.problems[0].code == "E0710", path.name
    assert CALLS == []


@pytest.mark.parametrize(
    "change",
    [
        {"network_weights": None},
        {"network_weights": {}},
        {"network_weights": {"a": 3}},
        {"init_args": None},
        {"trainer_name": 7},
        {"inference_allowed_mirroring_axes": (5,)},
        {"inference_allowed_mirroring_axes": "zyx"},
    ],
)
def test_checkpoints_without_what_nnunet_stores_are_refused(tmp_path, change):
    path = tmp_path / "checkpoint_final.pth"
    torch.save(checkpoint(NETWORK, "3d_fullres") | change, path)
    with pytest.raises(IntegrityError) as refused:
        read_checkpoint(path)
    assert refused.value.problems[0].code == "E0711"


def test_a_tensor_that_is_a_view_of_one_number_is_judged_by_its_shape(tmp_path):
    results = write_results(tmp_path, plans({"3d_fullres": configuration()}))
    stored = checkpoint(NETWORK, "3d_fullres")
    stored["network_weights"]["decoder.seg_layers.0.weight"] = torch.zeros(1).expand(10**9, 10**4)
    torch.save(stored, results / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(MedsegError) as refused:
        import_nnunet(results, tmp_path / "model")
    assert refused.value.problems[0].code == "E0802"


def archive(path: Path, *members: tuple[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.filename = name  # as it is, where ZipInfo would mend it
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, data)
    return path


@pytest.mark.parametrize(
    "name",
    ["../plans.json", "/tmp/plans.json", "a/../../plans.json", "C:/plans.json", "a\\plans.json", "a\nb/plans.json"],
)
def test_members_that_would_land_elsewhere_are_refused_before_anything_is_unpacked(tmp_path, name):
    path = archive(tmp_path / "a.zip", ("m/dataset.json", b"{}"), (name, b"{}"))
    with pytest.raises(IntegrityError) as refused, opened(path, tmp_path):
        pass
    assert refused.value.problems[0].code == "E0710"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip"]
    assert not (tmp_path.parent / "plans.json").exists()


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_are_refused(tmp_path, mode):
    path = archive(tmp_path / "a.zip", ("m/plans.json", b"/etc/passwd"), mode=mode | 0o777)
    with pytest.raises(IntegrityError, match="link or a device"), opened(path, tmp_path):
        pass


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["m/plans.json", "m/Plans.json", "M/plans.json"])
def test_names_that_clash_are_refused(tmp_path, second):
    path = archive(tmp_path / "a.zip", ("m/plans.json", b"{}"), (second, b"[]"))
    with pytest.raises(IntegrityError, match="twice"), opened(path, tmp_path):
        pass


def test_archives_that_unpack_to_far_more_are_refused(tmp_path):
    path = archive(tmp_path / "a.zip", ("m/fold_0/checkpoint_final.pth", bytes(64 * 2**20)))
    with pytest.raises(IntegrityError, match="times its size"), opened(path, tmp_path):
        pass


def test_members_that_lie_over_one_another_are_refused(tmp_path):
    data = archive(tmp_path / "a.zip", ("m/plans.json", b"{}" * 99), ("m/dataset.json", b"[]" * 99)).read_bytes()
    directory = data.rindex(b"PK\x01\x02")
    moved = data[: directory + 42] + struct.pack("<I", 0) + data[directory + 46 :]  # where the second one begins
    (tmp_path / "b.zip").write_bytes(moved)
    with pytest.raises(IntegrityError, match="over another"), opened(tmp_path / "b.zip", tmp_path):
        pass


def test_damaged_archives_are_refused_and_leave_nothing(tmp_path):
    data = archive(tmp_path / "a.zip", ("m/plans.json", b"{}" * 500)).read_bytes()
    broken = bytearray(data)
    broken[45] ^= 0xFF
    (tmp_path / "b.zip").write_bytes(bytes(broken))
    with pytest.raises(IntegrityError) as refused, opened(tmp_path / "b.zip", tmp_path):
        pass
    assert refused.value.problems[0].code == "E0701"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "b.zip"]


def test_only_what_is_wanted_is_unpacked(tmp_path):
    path = archive(
        tmp_path / "a.zip",
        ("m/plans.json", b"{}"),
        ("m/setup.py", b"x"),
        ("m/postprocessing.pkl", b"x"),
        ("m/x.sh", b"x"),
    )
    with opened(path, tmp_path) as folder:
        assert [p.name for p in folder.rglob("*") if p.is_file()] == ["plans.json"]
    assert not folder.exists()


def arguments(**changes: object) -> dict:
    value = architecture()
    return {"architecture": value | {"arch_kwargs": value["arch_kwargs"] | changes}}


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": [10**6] * 3},
        {"patch_size": [65536, 65536, 65536]},
        {"patch_size": [8, 16, -12]},
        {"patch_size": [7, 16, 12]},
        {"patch_size": "os.system"},
        {"spacing": [1e-12, 1, 1]},
        {"spacing": [0, 1, 1]},
        {"batch_size": 2**40},
        {"batch_size": 0},
        {"normalization_schemes": []},
        {"resampling_fn_data_kwargs": {"order": 3, "callback": "os.system"}},
        {"previous_stage": "3d_fullres"},
        {"previous_stage": "elsewhere"},
        arguments(n_stages=10**9),
        arguments(n_stages=4),
        arguments(features_per_stage=[10**9, 6, 8]),
        arguments(features_per_stage=[60000, 60000, 60000]),
        arguments(kernel_sizes=[[3, 3, 3], [3, 3, 3], [1001, 3, 3]]),
        arguments(kernel_sizes=[[2, 3, 3]] * 3),
        arguments(strides=[[1, 1, 1], [3, 3, 3], [2, 2, 1]]),
        arguments(n_conv_per_stage=[10**6, 1, 1]),
        arguments(evil="torch.hub.load"),
    ],
)
def test_impossible_plans_are_refused_before_anything_is_built(tmp_path, changes):
    results = write_results(tmp_path, plans({"3d_fullres": configuration(**changes)}))
    with pytest.raises(IntegrityError) as refused:
        import_nnunet(results, tmp_path / "model")
    assert {problem.code for problem in refused.value.problems} == {"E0711"}
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"plans_name": "a", "plans_name": "b"}',
        '{"plans_name": Infinity}',
        "null",
        "",
        '{"plans_name": "\\ud800"}',
        " " * (17 * 2**20),
    ],
    ids=["deep list", "deep object", "twice", "infinity", "null", "empty", "surrogate", "large"],
)
def test_plans_that_are_no_plans_are_refused(tmp_path, text):
    results = write_results(tmp_path, plans({"3d_fullres": configuration()}))
    (results / "plans.json").write_text(text)
    with pytest.raises(IntegrityError) as refused:
        import_nnunet(results, tmp_path / "model")
    assert {problem.code for problem in refused.value.problems} == {"E0711"}


@pytest.mark.parametrize("field", ["image_reader_writer", "label_manager"])
@pytest.mark.parametrize("value", ["os.system", "../x", "builtins.exec"])
def test_names_of_code_are_compared_never_looked_up(tmp_path, field, value):
    results = write_results(tmp_path, plans({"3d_fullres": configuration()}, **{field: value}))
    with pytest.raises(MedsegError) as refused:
        import_nnunet(results, tmp_path / "model")
    assert refused.value.problems[0].code == "E0162"


def test_many_hostile_bytes_are_refused_in_some_known_way(tmp_path):
    good = io.BytesIO()
    torch.save(checkpoint(NETWORK, "3d_fullres"), good)
    data = good.getvalue()
    path = tmp_path / "checkpoint_final.pth"
    seen = set()
    for step in range(40):
        place = (step * 7919) % len(data)
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            read_checkpoint(path)
        except MedsegError as error:
            seen |= {problem.code for problem in error.problems}
    assert seen <= {"E0701", "E0710", "E0711"}

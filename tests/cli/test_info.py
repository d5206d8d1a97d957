"""``medseg info`` and the choice of network and loss on the command line."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image
from tiny_models import FLAT_KERNELS, make_configuration, make_plan, make_task

from medseg.cli.main import main
from medseg.pipeline.info import Wanted, describe, draw
from medseg.records.base import write_record


def test_the_table_names_layers_weights_and_the_receptive_field(capsys):
    wanted = ["--network", "unet2015", "--patch", "512", "512", "--channels", "3", "--outputs", "1"]
    assert main(["info", *wanted]) == 0
    out = capsys.readouterr().out
    assert "31,037,633" in out
    assert "1024 × 32 × 32" in out
    assert "204 × 204" in out


def test_a_plan_gives_network_patch_and_channels(tmp_path, capsys):
    plan = make_plan(make_configuration((4, 12, 16), FLAT_KERNELS), make_task(4, 2))
    write_record(tmp_path / "plan.json", plan)
    assert main(["info", "--plan", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["outputs"][0] == [4, 4, 12, 16]
    assert found["choice"] == "plain"
    assert main(["info", "--plan", str(tmp_path), "--network", "attention", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert (other["choice"], other["outputs"][0]) == ("attention", [4, 4, 12, 16])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither --network nor --plan"),
        (["--network", "vnet"], "--network vnet"),
        (["--network", "plain", "--patch", "8"], "--patch 8"),
        (["--network", "plain", "--patch", "8", "9", "--spacing", "1"], "--spacing"),
        (["--network", "plain", "--patch", "8", "9", "--draw", "x.gif"], ".svg"),
    ],
)
def test_what_cannot_be_shown_is_a_usage_error(arguments, message, capsys):
    assert main(["info", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--network", "vnet"), ("--loss", "hinge")])
def test_unknown_networks_and_losses_are_refused_before_anything_is_done(option, value, tmp_path, capsys):
    assert main(["plan", str(tmp_path), "--run", str(tmp_path / "run"), option, value]) == 2
    assert value in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["attention", "unetpp", "resnet-unet", "transunet", "unet2015-valid"])
def test_networks_can_be_drawn_and_equal_ones_give_equal_files(name, tmp_path):
    info = describe(Wanted(name, patch=(32, 48)))
    assert info.memory_bytes > 0
    first, again = draw(info, tmp_path / "a.svg"), draw(info, tmp_path / "b.svg")
    assert first == again
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_drawings_may_be_pictures(tmp_path):
    draw(describe(Wanted("plain", patch=(32, 48))), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 300

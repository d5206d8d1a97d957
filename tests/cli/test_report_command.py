"""``medseg report`` from the command line."""

from __future__ import annotations

from medseg.cli.main import main


def test_the_page_is_named_on_standard_output(prepared, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", "--run", str(prepared), "-o", str(page), "--progress", "none"]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_options_of_predictions_make_no_sense_for_a_run(prepared, capsys):
    assert main(["report", "--run", str(prepared), "--images", "x"]) == 2
    assert "--images with --run" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert main(["report", "--run", str(prepared), "--pictures", "-1"]) == 2

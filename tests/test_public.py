"""What a newcomer meets first: a light ``import medseg`` and ``medseg --help``, pages whose links lead somewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "monai", "matplotlib", "scipy", "nibabel", "blosc2", "numpy", "pydantic")
COMMANDS = ("dataset", "check", "plan", "preprocess", "train", "predict", "stats", "evaluate", "run", "doctor")

PROBE = """
import contextlib, io, json, sys
out = io.StringIO()
code = 0
with contextlib.redirect_stdout(out):
    try:
        {statement}
    except SystemExit as stop:
        code = stop.code or 0
modules = sorted({{m.partition(".")[0] for m in sys.modules}})
json.dump({{"code": code, "out": out.getvalue(), "modules": modules}}, sys.stdout)
"""


def probe(statement: str) -> dict:
    """What a fresh Python prints and has loaded after one statement."""
    command = [sys.executable, "-W", "error", "-c", PROBE.format(statement=statement)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_importing_medseg_loads_nothing_heavy():
    assert not set(HEAVY) & set(probe("import medseg")["modules"])


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_asking_for_help_loads_nothing_heavy(arguments):
    found = probe(f"from medseg.cli.main import main; code = main({arguments!r})")
    assert not {"torch", "monai", "matplotlib", "scipy", "nibabel", "blosc2"} & set(found["modules"])


def test_help_names_every_command():
    found = probe("from medseg.cli.main import main; code = main(['--help'])")
    assert found["code"] == 0
    assert [c for c in COMMANDS if not re.search(rf"^\s+{c}\b", found["out"], re.MULTILINE)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_without_loading_torch(command):
    found = probe(f"from medseg.cli.main import main; code = main(['{command}', '--help'])")
    assert found["code"] == 0
    assert f"medseg {command}" in found["out"]
    assert "torch" not in found["modules"]


def pages() -> list[Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [
        t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t and not t.startswith("#")
    ]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_of_the_documentation_is_reachable_from_its_index():
    docs = ROOT / "docs"
    seen, queue = set(), [docs / "index.md"]
    while queue:
        page = queue.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in re.findall(r"\]\(([^)\s#]+\.md)", page.read_text(encoding="utf-8")):
            linked = (page.parent / target).resolve()
            if linked.exists() and docs in linked.parents:
                queue.append(linked)
    assert set(docs.rglob("*.md")) - seen == set()

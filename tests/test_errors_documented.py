"""``docs/errors.md`` has an entry for every code of ``medseg.errors``, and for no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from medseg.errors import CODES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
ENTRY = re.compile(r"^### ([EW]\d{4}) (.+)\n+((?:(?!^#).*\n)*)", re.MULTILINE)


def entries() -> list[tuple[str, str, str]]:
    return ENTRY.findall(PAGE.read_text(encoding="utf-8") + "\n")


def test_every_code_is_documented_and_every_documented_code_exists():
    documented = [code for code, _, _ in entries()]
    assert sorted(documented) == sorted(set(documented)), "an entry appears twice"
    assert set(documented) == set(CODES)


def test_entries_stand_in_the_order_of_their_numbers():
    numbers = [int(code[1:]) for code, _, _ in entries()]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("code", CODES)
def test_an_entry_has_the_title_of_its_code_and_says_what_to_do(code):
    title, text = {name: (title, text) for name, title, text in entries()}[code]
    assert title.strip() == CODES[code]
    assert len(text.split()) >= 15, "an entry says what was found and what to do"


def test_every_code_that_the_pages_mention_exists():
    pages = [*PAGE.parent.rglob("*.md"), PAGE.parents[1] / "README.md"]
    mentioned = {code for page in pages for code in re.findall(r"\b[EW]\d{4}\b", page.read_text(encoding="utf-8"))}
    assert mentioned <= set(CODES)

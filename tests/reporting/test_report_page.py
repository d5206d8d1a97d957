"""The page: it loads nothing, no name gets out of its place, and those who read otherwise than with eyes can use it."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise

import made_up
import numpy as np
import pytest

from medseg.reporting.content import ReportContent
from medseg.reporting.report import render_report

HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<!--<script>",
    "]]></style><style>*{display:none}</style>",
    "{{ 7*7 }}{% raw %}",
    "javascript:alert(1)//",
    "name\u2028with\u0000odd\ud83d\ude00 signs".encode("utf-16", "surrogatepass").decode("utf-16"),
)
VOID = {"meta", "img", "input", "link", "br"}


class Page(HTMLParser):
    """Elements with their attributes, the text of each, and whether every one is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def text() -> str:
    return render_report(made_up.content())


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_a_page_loads_nothing_from_anywhere(page, text):
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/jpeg;base64,")), (tag, name)
    assert not {tag for tag, _ in page.elements} & {
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "audio",
        "video",
    }
    assert not re.findall(r"url\(|@import|https?://|fetch\(|XMLHttpRequest|WebSocket|import\(", text)


def test_the_policy_allows_our_style_and_script_and_nothing_else(page):
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    (style,) = page.text["style"]
    script = page.text["script"][-1]
    for name, content in (("style-src", style), ("script-src", script)):
        assert rules[name] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    assert not any("style" in attributes for _, attributes in page.elements)  # would be refused by the policy
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_gets_out_of_its_place(name, page):
    hostile = Page(render_report(made_up.content(prefix=name)))
    assert not hostile.open
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in page.elements]
    assert [sorted(a) for _, a in hostile.elements] == [sorted(a) for _, a in page.elements]
    assert hostile.text["style"] == page.text["style"]
    assert hostile.text["script"][-1] == page.text["script"][-1]
    assert all(a["src"].startswith("data:image/jpeg;") for a in hostile.all("img"))
    assert any(name.split("\x00")[0] in cell for cell in hostile.text["th"])
    volume = json.loads(hostile.text["script"][0])
    assert volume["case"] == f"{name}case_03"
    assert volume["names"] == [f"{name}organ", f"{name}tumour"]


def test_the_same_content_gives_the_same_bytes(text):
    assert render_report(made_up.content()) == text


def test_pictures_tables_and_charts_have_words(page):
    assert page.all("html")[0]["lang"] == "en"
    assert all(a["alt"] and a["width"] and a["height"] for a in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(a["scope"] in ("col", "row") for a in page.all("th"))
    drawings = [a for a in page.all("svg") if "aria-hidden" not in a]
    assert len(drawings) >= 6
    assert all(a["role"] == "img" and a["aria-label"] for a in drawings)
    assert all("aria-label" in a for a in page.all("canvas"))
    identifiers = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    assert {a["href"][1:] for a in page.all("a")} <= set(identifiers)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    viewport = [a["content"] for a in page.all("meta") if a.get("name") == "viewport"]
    assert viewport == ["width=device-width, initial-scale=1"]


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
def test_text_stands_out_from_its_ground_in_light_and_dark(theme):
    css = files("medseg.reporting").joinpath("assets", "report.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[theme]
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", block))
    for ink in ("ink", "soft", "accent"):
        for ground in ("page", "card"):
            light, dark = sorted((luminance(colours[ink]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)  # WCAG 2, AA
    light, dark = sorted((luminance(colours["alert"]), luminance(colours["alert-page"])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_the_volumes_in_the_page_are_the_scene(page):
    volume, scene = json.loads(page.text["script"][0]), made_up.scene()
    for name in ("prediction", "reference"):
        values = np.frombuffer(gzip.decompress(base64.b64decode(volume[name])), np.uint8).reshape(volume["shape"])
        np.testing.assert_array_equal(values, getattr(scene, name))
    assert volume["reduced"] == [1, 1, 1]


def test_a_page_about_almost_nothing_is_a_page():
    page = Page(render_report(ReportContent(title="nothing", task=None)))
    assert not page.open
    assert not page.all("img")
    assert page.text["h1"] == ["nothing"]


def test_regions_are_scored_and_named(text):
    whole = render_report(made_up.content(regions=True))
    assert "binary cross-entropy of each region" in whole
    assert "binary cross-entropy" not in text


def test_cases_with_a_picture_are_linked_from_where_they_are_named(page):
    linked = [a["href"] for a in page.all("a") if a["href"].startswith("#case-")]
    assert len(linked) >= 3
    assert set(linked) == {"#case-1"}


def test_thousands_of_flags_are_not_all_listed():
    content = made_up.content()
    flag = content.flags[0]
    many = tuple(dataclasses.replace(flag, case=f"case {number}") for number in range(1000))
    text = render_report(dataclasses.replace(content, flags=many))
    assert "case 199<" in text
    assert "case 200<" not in text
    assert "And 800 more" in text

"""Report: one HTML page that needs nothing but itself — style, script, pictures and volumes are inside it."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from medseg import __version__
from medseg.reporting import sections, style
from medseg.reporting.content import ReportContent, ShownCase
from medseg.reporting.cutout import Cutout
from medseg.reporting.drawing import inline_network
from medseg.reporting.flags import RULES
from medseg.reporting.methods import methods_text

MOST_FLAGS = 200  # rows; a thousand flags are no flags


def render_report(content: ReportContent) -> str:
    """The page as HTML; the same content gives the same text.

    Every name (of cases, labels, channels, folders) is escaped where it is put into the page, and a content security
    policy lets the page run and load nothing but what was written into it here.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_asset("report.html.j2"))
    css, script = _asset("report.css"), _asset("viewer.js")
    cutouts = [case.cutout for case in content.cases if case.cutout is not None]
    return template.render(
        content=content,
        css=Markup(css),  # noqa: S704  # our own file
        script=Markup(script),  # noqa: S704
        policy=_policy(css, script),
        version=__version__,
        flags=content.flags[:MOST_FLAGS],
        more_flags=max(0, len(content.flags) - MOST_FLAGS),
        flag_rules=RULES,
        anchors=_anchors(content),
        legend=_legend(content),
        volumes=[_volume(cutout) for cutout in cutouts],
        viewer_cases=[case for case in content.cases if case.cutout is not None],
        picture=_picture,
        **_tables(content),
    )


def _tables(content: ReportContent) -> dict[str, Any]:
    """What the page shows of each section, None or empty where there is nothing."""
    fingerprint, plan, task = content.fingerprint, content.plan, content.task
    anchors = _anchors(content)
    data = fingerprint is not None and task is not None
    cards = [training.card for training in content.trainings if training.card is not None]
    first = content.score_sets[0].scores if content.score_sets else None
    return {
        "data_tables": [
            sections.data_table(fingerprint),
            sections.presence_table(fingerprint, task),
            sections.intensity_table(fingerprint, task),
        ]
        if fingerprint is not None and task is not None
        else [],
        "volume_chart": sections.volume_chart(fingerprint, task) if data and fingerprint and task else None,
        "configurations": [
            (c.name, sections.configuration_table(c, plan), inline_network(c, plan.task))
            for c in plan.configurations.values()
        ]
        if plan
        else [],
        "training_table": sections.training_table(content.trainings) if content.trainings else None,
        "training_charts": sections.training_charts(content.trainings),
        "folds": [(name, style.hex_colour(c)) for name, c in sections.fold_legend(content.trainings)],
        "scores": [
            (
                s,
                sections.score_table(s.scores),
                sections.score_charts(s.scores),
                sections.worst_table(s.scores, anchors),
            )
            for s in content.score_sets
        ],
        "selection_table": sections.selection_table(content.selection) if content.selection else None,
        "volumes_table": sections.volumes_table(content.volumes_ml) if content.volumes_ml else None,
        "methods": methods_text(plan, fingerprint, content.splits, cards, first) if plan else None,
        "definitions": first.definitions if first else {},
        "shown": sections.shown,
    }


def _anchors(content: ReportContent) -> dict[str, str]:
    return {case.case: f"case-{number}" for number, case in enumerate(content.cases, start=1)}


def _legend(content: ReportContent) -> list[tuple[str, str]]:
    """Names and colours of the labels, as outlines are drawn."""
    labels = content.task.foreground if content.task else ()
    return [(label.name, style.hex_colour(index)) for index, label in enumerate(labels, start=1)]


def _picture(case: ShownCase, number: int) -> dict[str, Any]:
    """What an ``<img>`` needs."""
    plane = case.planes[number]
    against = " and the reference dashed" if case.rows else ""
    return {
        "source": f"data:image/jpeg;base64,{base64.b64encode(plane.jpeg).decode('ascii')}",
        "alt": f"{case.case}, {plane.caption}: outlines of the prediction{against} on the image",
        "caption": plane.caption,
        "width": plane.width,
        "height": plane.height,
    }


def _volume(cutout: Cutout) -> Markup:
    """A cut-out as JSON that may stand inside a script element, whatever the names are."""
    text = json.dumps(asdict(cutout), ensure_ascii=True, separators=(",", ":"), sort_keys=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704  # nothing that HTML would see is left in it


def _policy(css: str, script: str) -> str:
    """Content security policy: nothing from anywhere, our style and script by their hashes, pictures from the page."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"

    return f"default-src 'none'; img-src data:; style-src {digest(css)}; script-src {digest(script)}; base-uri 'none'"


def _asset(name: str) -> str:
    return files("medseg.reporting").joinpath("assets", name).read_text(encoding="utf-8")

"""Drawing: the network of a configuration as a U of boxes, made from its plan."""

from __future__ import annotations

from markupsafe import Markup

from medseg.planning.wording import times
from medseg.records.plan import ConfigurationPlan
from medseg.records.task import Task
from medseg.reporting.network import TITLES

_WIDTH, _ROW, _BOX_HEIGHT = 420, 62, 40
_WIDEST, _NARROWEST = 150, 92


def inline_network(configuration: ConfigurationPlan, task: Task) -> Markup:
    """Encoder on the left, decoder on the right, one row per stage with its features, size and kernel."""
    stages = len(configuration.network.features)
    height = 34 + _ROW * stages + 8
    rows = [_row(configuration, stage, task) for stage in range(stages)]
    return Markup('<svg class="network" viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg>').format(
        _WIDTH, height, describe_network(configuration, task), _ends(configuration, task), Markup("").join(rows)
    )


def describe_network(configuration: ConfigurationPlan, task: Task) -> str:
    """The network in a sentence, for those who do not see the drawing."""
    plan = configuration.network
    return (
        f"{TITLES[plan.name]} of {len(plan.features)} stages: features "
        f"{', '.join(map(str, plan.features))}; sizes {', '.join(times(s) for s in sizes(configuration))} voxels; "
        f"{configuration.input_channels(task)} input and {task.outputs} output channels"
    )


def sizes(configuration: ConfigurationPlan) -> list[tuple[int, ...]]:
    """Voxels of a patch in each stage, finest first."""
    found = []
    size = configuration.patch_size
    for stride in configuration.network.strides:
        size = tuple(n // s for n, s in zip(size, stride, strict=True))
        found.append(size)
    return found


def _ends(configuration: ConfigurationPlan, task: Task) -> Markup:
    channels = configuration.input_channels(task)
    out = _WIDTH - _WIDEST // 2 - 4 if len(configuration.network.features) > 1 else _WIDEST // 2 + 100
    text = f"{channels} channel{'s' if channels > 1 else ''} in"
    return Markup(
        '<text x="{}" y="16" text-anchor="middle">{}</text><path class="flow" d="M{} 21v11"/>'
        '<text x="{}" y="16" text-anchor="middle">{} outputs</text><path class="flow" d="M{} 32v-11"/>'
    ).format(_WIDEST // 2 + 4, text, _WIDEST // 2 + 4, out, task.outputs, out)


def _row(configuration: ConfigurationPlan, stage: int, task: Task) -> Markup:
    plan = configuration.network
    last = len(plan.features) - 1
    top = 34 + _ROW * stage
    left, right = _WIDEST // 2 + 4, _WIDTH - _WIDEST // 2 - 4
    size = times(sizes(configuration)[stage]) if plan.padding == "same" else "without padding"
    kernel = times(plan.kernels[stage])
    unit = "block" if plan.name == "residual" else "conv"
    encoder = f"{plan.convs_encoder[stage]} {unit}{'s' if plan.convs_encoder[stage] > 1 else ''} {kernel}"
    width = _WIDEST - (_WIDEST - _NARROWEST) * stage / max(1, last)
    parts = [_box(left, top, width, f"{plan.features[stage]} features", size, encoder, "encoder")]
    if stage < last:
        convs = plan.convs_decoder[last - 1 - stage]
        decoder = f"{convs} conv{'s' if convs > 1 else ''} {kernel}"
        parts.append(_box(right, top, width, f"{plan.features[stage]} features", size, decoder, "decoder"))
        middle = top + _BOX_HEIGHT / 2
        skip = Markup('<path class="skip" d="M{:.1f} {:.1f}H{:.1f}"/>')
        parts.append(skip.format(left + width / 2 + 2, middle, right - width / 2 - 2))
        stride = times(plan.strides[stage + 1])
        parts.append(_step(left, top, f"↓ {stride}", up=False))
        target = right if stage + 1 < last else None
        parts.append(_step(right, top, f"↑ {stride}", up=True) if target else _turn(left, right, top, stride))
    return Markup("").join(parts)


def _box(centre: float, top: float, width: float, first: str, second: str, third: str, kind: str) -> Markup:
    return Markup(
        '<g class="{}"><rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="5"/>'
        '<text x="{}" y="{}" text-anchor="middle">{}</text><text class="small" x="{}" y="{}" text-anchor="middle">{}'
        "</text><title>{}</title></g>"
    ).format(
        kind, centre - width / 2, top, width, _BOX_HEIGHT, centre, top + 17, first, centre, top + 32, second, third
    )


def _step(x: float, top: float, text: str, *, up: bool) -> Markup:
    start, by = (top + _ROW - 2, -(_ROW - _BOX_HEIGHT - 4)) if up else (top + _BOX_HEIGHT + 2, _ROW - _BOX_HEIGHT - 4)
    return Markup('<path class="flow" d="M{} {}v{}"/><text class="small" x="{}" y="{}">{}</text>').format(
        x, start, by, x + 6, top + _BOX_HEIGHT + 15, text
    )


def _turn(left: float, right: float, top: float, stride: str) -> Markup:
    """From the deepest encoder stage, which has no decoder beside it, up to the first of the decoder."""
    deepest = top + _ROW + _BOX_HEIGHT / 2
    return Markup('<path class="flow" d="M{:.1f} {}H{}V{}"/><text class="small" x="{}" y="{}">↑ {}</text>').format(
        left + _NARROWEST / 2, deepest, right, top + _BOX_HEIGHT + 2, right + 6, top + _BOX_HEIGHT + 15, stride
    )

"""Charts as SVG without script, style or address; the page's style colours them. Sole importer of pygal."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

from batchrun.errors import JobError

MISSING = "the page needs another package: pip install 'batchrun[report]'"

WIDE, NARROW = (760, 320), (350, 340)
"""For a desk and for a phone. The page's style shows the one that fits, so no text is scaled down."""

LETTER_PX = 7
"""About the width of a letter of a label."""

COLOURS = 8
"""Colours in the page's style. Further series are summed up as `others`."""


class Chart(NamedTuple):
    """`kind`: `stacked`, `bars` or `lines`. `series` are (name, values), one value for each label."""

    kind: str
    title: str
    unit: str
    labels: Sequence[str]
    series: Sequence[tuple[str, Sequence[float | None]]]


def svg(chart: Chart) -> str:
    """The chart twice, wide and narrow, as inline SVG.

    Raises:
        JobError: pygal is not installed.
    """
    return _drawn(chart, *WIDE, "wide") + _drawn(chart, *NARROW, "narrow")


def _drawn(chart: Chart, width: int, height: int, shape: str) -> str:
    try:
        import pygal
    except ImportError as error:
        raise JobError(MISSING) from error
    make = {"stacked": pygal.StackedBar, "bars": pygal.Bar, "lines": pygal.Line}[chart.kind]
    labels = list(chart.labels)
    if len({label[:5] for label in labels}) == 1 and all(len(label) == 10 and label[4] == "-" for label in labels):
        labels = [label[5:] for label in labels]  # days without their year, which all share
    every = max(1, -(-len(labels) // (16 if shape == "wide" else 7)))  # labels of days, side by side
    longest = max((len(label) for label in labels), default=0)
    crowded = longest * LETTER_PX * -(-len(labels) // every) > 0.85 * width
    drawing = make(
        js=[],
        width=width,
        height=height,
        show_legend=False,  # the page has one, in text
        margin=8,
        margin_bottom=70 if crowded else 8,
        spacing=6,
        show_dots=False,
        include_x_axis=True,  # values start at 0
        max_scale=6,
        x_label_rotation=45 if crowded else 0,
        truncate_label=24,
        value_formatter=lambda value: f"{value:,.6g}",
    )
    drawing.x_labels = [label if place % every == 0 else "" for place, label in enumerate(labels)]
    for name, values in chart.series:
        drawing.add(name, list(values))
    return _stripped(drawing.render_tree(), chart, shape)


def _stripped(tree: Any, chart: Chart, shape: str) -> str:
    """Removes what pygal adds for its script: definitions, tooltips, separate values."""
    for parent in list(tree.iter()):
        for child in list(parent):
            name = child.tag.rpartition("}")[2] if isinstance(child.tag, str) else ""
            gone = name in ("defs", "script", "style", "desc", "") or "tooltip-overlay" in child.get("class", "")
            if gone or (name == "title" and parent is tree):
                parent.remove(child)
            child.attrib.pop("style", None)
            child.attrib.pop("id", None)
    tree.attrib.pop("id", None)
    tree.set("class", f"pygal-chart {shape}")
    tree.set("role", "img")
    tree.set("aria-label", f"{chart.title}, {chart.unit}; the figures are in the table below")
    text = ElementTree.tostring(tree, encoding="unicode")
    return text.replace("svg:", "").replace("ns0:", "").replace("xmlns:ns0=", "xmlns=").replace("xmlns:svg=", "xmlns=")

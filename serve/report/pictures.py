"""Panels as elements of a page: ids of their own, and colours that the page's style sheet may change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cusprun.panels import AnyPanel
from cusprun.plots import Palette, svg_document

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

PALETTE = Palette("#1b1b1f", "#b9b9c4", ("#0b57d0", "#9a3b00", "#00695c", "#7b1fa2", "#b3005e"))
_MUTED = "#808080"  # what matplotlib makes of its grey 0.5
"""For a white ground. No two are the same: each becomes a custom property that a dark page sets anew."""


def _properties() -> dict[str, str]:
    """Return each colour with the CSS value that stands for it."""
    numbered = {colour: str(number) for number, colour in enumerate(PALETTE.cycle)}
    names = {PALETTE.text: "text", PALETTE.grid: "grid", _MUTED: "muted", **numbered}
    return {colour: f"var(--plot-{name}, {colour})" for colour, name in names.items()}


def inline_svg(panel: AnyPanel, prefix: str) -> str:
    """Return one panel as an ``<svg>`` element that can stand in an HTML page beside others.

    Its ids begin with ``prefix``, and its colours are the custom properties ``--plot-text``, ``--plot-grid``,
    ``--plot-0`` and so on; it holds no style sheet, script or address, and no text but the panel's.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    from xml.etree import ElementTree

    root = ElementTree.fromstring(svg_document(panel, PALETTE))
    _to_html(root, prefix)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _to_html(root: Element, prefix: str) -> None:
    """Turn an SVG document into an element of a page: no namespaces or sheet, own ids, the page's colours."""
    colours = _properties()
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            plain = name.rpartition("}")[2]
            own = value.replace("url(#", f"url(#{prefix}-")
            if plain == "id":
                own = f"{prefix}-{value}"
            elif plain == "href" and value.startswith("#"):
                own = f"#{prefix}-{value[1:]}"
            elif plain == "style":
                for colour, variable in colours.items():
                    own = own.replace(colour, variable)
            element.set(plain, own)
    # What the sheet said of every element, and the view box alone gives the size.
    root.attrib.update({"stroke-linejoin": "round", "stroke-linecap": "butt"})
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)

"""The report as one HTML page that asks nothing of anybody: style and pictures are inside, and no script."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

from cusprun.errors import MissingDependencyError
from cusprun.plots import COMMAND, require_plots
from serve.report.pictures import inline_svg
from serve.report.view import Page, Picture

if TYPE_CHECKING:
    pass

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load for the page: nothing; heat maps are images inside their pictures."""

_SIGNS = {"ok": "✓", "look": "!", "stop": "✗", "unknown": "?", "told": "i", "ship": "✓"}


def render(page: Page) -> str:
    """Return the page; equal views give equal text.

    Without matplotlib the pictures are left out, which the page says; their tables are there.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(_file("page.html"))
    return template.render(
        page=page,
        style=Markup(_file("page.css")),
        policy=POLICY,
        signs=_SIGNS,
        drawn=_drawn(page),
        missing=COMMAND,
    )


def _file(name: str) -> str:
    return resources.files("serve.report").joinpath(name).read_text(encoding="utf-8")


def _drawn(page: Page) -> dict[str, list[dict[str, Any]]]:
    """Return each picture's panels by its name; nothing when matplotlib is not there."""
    try:
        require_plots()
    except MissingDependencyError:
        return {}
    pictures = [block for section in page.sections for block in section.blocks if isinstance(block, Picture)]
    return {picture.name: _panels(picture) for picture in pictures}


def _panels(picture: Picture) -> list[dict[str, Any]]:
    from markupsafe import Markup

    return [
        {
            "label": f"{panel.title}. {picture.description}" if panel.title else picture.description,
            "svg": Markup(inline_svg(panel, f"{picture.name}-{number}")),
        }
        for number, panel in enumerate(picture.panels)
    ]

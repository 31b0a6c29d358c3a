"""`make docs`: put the committed results into the pages that show them.

A page marks a place with ``<!-- result: quality.md -->`` and ``<!-- end -->``; what stands between is
replaced by that file of ``benchmarks/results``. ``--check`` changes nothing and fails when a page differs.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
_PLACE = re.compile(r"(<!-- result: (?P<file>[\w.-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)


def rendered(text: str, results: Path = ROOT / "benchmarks" / "results") -> str:
    """Return a page's text with every marked place filled in."""

    def fill(match: re.Match[str]) -> str:
        text = (results / match["file"]).read_text(encoding="utf-8")
        # A result's own heading would stand beside the page's.
        body = "\n".join(line for line in text.splitlines() if not line.startswith("# ")).strip("\n")
        return f"{match[1]}\n{body}\n\n{match[4]}"

    return _PLACE.sub(fill, text)


def pages(root: Path = ROOT) -> list[Path]:
    """Return the pages that may hold results."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def main() -> int:
    """Fill in every page, or with ``--check`` tell which ones differ."""
    stale = [page for page in pages() if rendered(page.read_text("utf-8")) != page.read_text("utf-8")]
    for page in stale:
        if "--check" in sys.argv[1:]:
            print(f"{page.name} does not show the committed results; run `make docs`")
        else:
            page.write_text(rendered(page.read_text("utf-8")), encoding="utf-8")
    return 1 if stale and "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())

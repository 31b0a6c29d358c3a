"""Pages show the committed results, and name only commands, files and packs that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cusprun.corpus import load_expert, pack_names

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_result_shown_is_the_committed_one() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/render.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_packs_named_exist(page: Path) -> None:
    for pack in re.findall(r"pack:\s*([a-z]+/[a-z-]+)", page.read_text("utf-8")):
        assert pack in pack_names()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_expert_files_shown_are_valid(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(
        re.findall(r"```yaml\n(name: .*?)```", page.read_text("utf-8"), re.DOTALL)
    ):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        load_expert(path)

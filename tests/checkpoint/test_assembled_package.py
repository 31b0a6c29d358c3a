"""A package that brings its GGUF file in parts and a function that joins them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from cusprun.errors import ModelError, OutputError
from cusprun.resolve import locate

JOINS = """
from pathlib import Path
CALLS = Path(__file__).with_name("calls")

def assemble(output_path=None, overwrite=False):
    CALLS.write_text(CALLS.read_text() + "x" if CALLS.exists() else "x")
    Path(output_path).write_bytes(b"GGUF" + b"a" * 100)
    return output_path
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site" / "model_in_parts"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "model_in_parts", raising=False)
    importlib.invalidate_caches()
    return folder


def test_it_is_assembled_once_in_the_cache(package: Path, tmp_path: Path) -> None:
    (package / "__init__.py").write_text(JOINS)
    first, second = locate("package:model_in_parts"), locate("package:model_in_parts")
    assert first == second
    assert first.source == "package:model_in_parts"
    assert first.path.is_relative_to(tmp_path / "cache")
    assert first.path.read_bytes()[:4] == b"GGUF"
    assert (package / "calls").read_text() == "x"
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]


def test_another_version_is_assembled_anew(package: Path) -> None:
    (package / "__init__.py").write_text(JOINS)
    first = locate("package:model_in_parts").path
    (package / "__init__.py").write_text(JOINS + "VERSION = 2\n")
    assert locate("package:model_in_parts").path != first


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("    raise FileNotFoundError('Missing chunk files: part03')", "Missing chunk files: part03"),
        ("    import a_package_that_is_not_there", "a_package_that_is_not_there"),
        ("    raise ValueError('sha256 did not match')", "sha256 did not match"),
        ("    open(output_path, 'wb').write(b'PK')", "wrote no GGUF file"),
        ("    return 1", "wrote no GGUF file"),
    ],
)
def test_a_failure_is_one_sentence_and_leaves_nothing(
    package: Path, tmp_path: Path, body: str, match: str
) -> None:
    (package / "__init__.py").write_text(f"def assemble(output_path):\n{body}\n")
    with pytest.raises(ModelError, match=match) as caught:
        locate("package:model_in_parts")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "assembled").iterdir()) == []


def test_a_full_disk_is_said(package: Path) -> None:
    (package / "__init__.py").write_text(
        "def assemble(path):\n    raise OSError(28, 'No space left on device')"
    )
    with pytest.raises(OutputError, match="No space left"):
        locate("package:model_in_parts")


@pytest.mark.parametrize(
    "text", ["x = 1\nraise RuntimeError", "def assemble(", "from a import assemble\nraise 1"]
)
def test_a_package_that_defines_no_such_function_is_not_run(package: Path, text: str) -> None:
    (package / "__init__.py").write_text(text)
    with pytest.raises(ModelError, match="holds none"):
        locate("package:model_in_parts")
    assert "model_in_parts" not in sys.modules


def test_a_gguf_in_the_package_goes_first(package: Path) -> None:
    (package / "__init__.py").write_text("def assemble(path):\n    raise RuntimeError")
    (package / "m.gguf").write_bytes(b"GGUF")
    assert locate("package:model_in_parts").path == package / "m.gguf"
    assert "model_in_parts" not in sys.modules

"""cusprun's own wheel, packed from what is installed, editable or not; the same files give the same bytes."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from cusprun.errors import MissingDependencyError

PACKAGES = ("cusprun", "deploy", "exporters", "serve")
_DATE = (1980, 1, 1, 0, 0, 0)
_LEFT_OUT = "__pycache__"
_WHEEL = "Wheel-Version: 1.0\nGenerator: cusprun\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_CARRIED = {
    "METADATA": ("METADATA", "PKG-INFO"),
    "entry_points.txt": ("entry_points.txt",),
    "licenses/LICENSE": ("licenses/LICENSE", "../LICENSE"),
}
"""What goes into the wheel, and what an installation calls it: an editable one leaves an ``egg-info`` with
``PKG-INFO`` in the checkout, which is found first from there."""


def own_wheel() -> tuple[str, bytes]:
    """Return the name and the bytes of a wheel of the cusprun that runs.

    Raises:
        MissingDependencyError: it runs from a checkout that is not installed, so that it has no metadata.
    """
    try:
        distribution = metadata.distribution("cusprun")
    except metadata.PackageNotFoundError:
        raise MissingDependencyError(
            "cusprun is not installed, so that it cannot be packed; run: pip install . in its checkout"
        ) from None
    folder = f"cusprun-{distribution.version}.dist-info"
    entries = dict(_sources())
    for name, sources in _CARRIED.items():
        text = next(filter(None, map(distribution.read_text, sources)), None)
        if text is not None:
            entries[f"{folder}/{name}"] = text.encode()
    entries[f"{folder}/WHEEL"] = _WHEEL.encode()
    record = "".join(f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in sorted(entries.items()))
    entries[f"{folder}/RECORD"] = f"{record}{folder}/RECORD,,\n".encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(entries.items()):
            entry = zipfile.ZipInfo(name, _DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    return f"cusprun-{distribution.version}-py3-none-any.whl", buffer.getvalue()


def _sources() -> Iterator[tuple[str, bytes]]:
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*")):
            parts = path.relative_to(root).parts
            is_ours = not any(part == _LEFT_OUT or part.startswith(".") for part in parts)
            if path.is_file() and is_ours:
                yield "/".join([package, *parts]), path.read_bytes()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()

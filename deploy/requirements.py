"""Pinned requirements: the packages that serve, and all that these need, in the versions installed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata

from cusprun.errors import MissingDependencyError

UNUSED: Mapping[str, frozenset[str]] = {"tokenizers": frozenset({"huggingface-hub"})}
"""What a package asks for and serving never imports: the hub's client would bring ten more."""

ENGINE_MODULES: Mapping[str, str] = {"llamacpp": "xllamacpp", "onnx": "onnxruntime_genai"}
"""What is imported to find out whether an engine's wheel works on a machine."""

_VISUAL_C = "Microsoft's Visual C++ Redistributable (x64) of 2015 or later"
LIBRARIES: Mapping[tuple[str, str], str] = {
    ("linux", "llamacpp"): "the libraries of OpenMP and C++ (Debian's packages libgomp1 and libstdc++6)",
    ("linux", "onnx"): "the library of C++ (Debian's package libstdc++6)",
    ("win32", "llamacpp"): _VISUAL_C,
    ("win32", "onnx"): _VISUAL_C,
}
"""What the wheels of an engine take from a system (``sys.platform``) that it may lack. macOS has it all."""

ABSENT_HERE: Mapping[str, str] = {
    "async-timeout": "5.0.1",
    "colorama": "0.4.6",
    "exceptiongroup": "1.3.0",
    "tomli": "2.2.1",
    "tzdata": "2025.2",
}
"""Versions of what only other platforms and older Pythons need, so that it may be missing here."""


def pinned(names: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the version of each package and of all that these need in an environment, by canonical name.

    Raises:
        MissingDependencyError: a package is not installed here, so that its version is not known.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    wanted = [(Requirement(name), "cusprun") for name in names]
    while wanted:
        requirement, asker = wanted.pop()
        name = str(canonicalize_name(requirement.name))
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            found[name] = metadata.version(name)
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            if name not in ABSENT_HERE:
                raise MissingDependencyError(
                    f"{name}, which {asker} needs there, is not installed here, so that its version is not "
                    f"known; run: pip install {name}"
                ) from None
            found[name], needs = ABSENT_HERE[name], []
        extras = ("", *requirement.extras)
        for text in needs:
            need = Requirement(text)
            applies = need.marker is None or any(
                need.marker.evaluate({**environment, "extra": extra}) for extra in extras
            )
            if applies and canonicalize_name(need.name) not in UNUSED.get(name, ()):
                wanted.append((need, name))
    return dict(sorted(found.items()))

"""The arrows between rooms, and that nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cusprun", "deploy", "exporters", "serve")

BASE = {
    "cusprun.clock",
    "cusprun.records",
    "cusprun.errors",
    "cusprun.codec",
    "cusprun.llamacpp_log",
    "cusprun.paths",
    "cusprun.progress",
    "cusprun.version",
}
EVERYTHING = {*PACKAGES}
ARROWS: dict[str, set[str]] = {
    "cusprun.records": BASE,
    "cusprun.errors": set(),
    "cusprun.clock": {"cusprun.errors"},
    "cusprun.codec": BASE,
    "cusprun.paths": BASE,
    "cusprun.progress": set(),
    "cusprun.llamacpp_log": set(),
    "cusprun.version": set(),
    "cusprun.families": BASE,
    "cusprun.checkpoint": BASE | {"cusprun.families"},
    "cusprun.corpus": BASE,
    "cusprun.walk": BASE | {"cusprun.checkpoint", "cusprun.families"},
    "cusprun.quality": BASE | {"cusprun.checkpoint", "cusprun.corpus", "cusprun.walk"},
    "cusprun.pruning": BASE
    | {"cusprun.checkpoint", "cusprun.corpus", "cusprun.families", "cusprun.quality", "cusprun.walk"},
    "cusprun.diagnosis": BASE,
    "cusprun.cache": BASE | {"cusprun.checkpoint.output"},
    "cusprun.hub": BASE,
    "cusprun.panels": set(),
    "cusprun.plots": BASE | {"cusprun.panels"},
    "cusprun.resolve": BASE | {"cusprun.cache", "cusprun.checkpoint", "cusprun.hub"},
    "cusprun.recipe": EVERYTHING,
    "cusprun.pipeline": EVERYTHING,
    "cusprun.cli": EVERYTHING,
    "cusprun.__main__": {"cusprun.cli"},
    "cusprun": EVERYTHING,
    "deploy": {"cusprun.errors", "cusprun.records", "serve.runtimes.chat_template"},
    "exporters": BASE | {"cusprun.checkpoint", "cusprun.families"},
    "serve.child_guard": set(),
    "serve.child_process": set(),
    "serve.child_server": BASE | {"serve.child_process"},
    "serve.runtimes": BASE | {"serve.child_server"},
    "serve.api": set(),
    "serve.front": BASE | {"serve.api"},
    "serve.onnx_server": BASE | {"serve.api", "serve.front.backend", "serve.runtimes"},
    "serve.engines": BASE
    | {"serve.api", "serve.child_server", "serve.front", "serve.onnx_server", "serve.runtimes"},
    "serve.side_by_side": {"serve.front"},
    "serve.bench": BASE | {"serve.runtimes"},
    "serve.report": BASE | {"cusprun.panels", "cusprun.plots"},
    "serve": set(),
}
"""What each room may import, itself apart; a name stands for all that is below it."""

HEAVY = (
    "torch", "transformers", "llama_cpp", "gguf", "datasets", "pyarrow", "huggingface_hub", "numpy",
    "matplotlib", "fastapi", "starlette", "uvicorn", "aiohttp", "xllamacpp", "onnxruntime_genai",
)  # fmt: skip


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def room_of(module: str) -> str:
    return max((room for room in ARROWS if below(module, room)), key=len)


def below(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def imports_of(path: Path, module: str) -> Iterator[tuple[str, int]]:
    """Every module of ours that a file imports, at its top or inside functions."""
    names = {name for name, _ in modules()}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            found = [
                full if (full := f"{node.module}.{alias.name}") in names else str(node.module)
                for alias in node.names
            ]
        else:
            continue
        yield from ((name, node.lineno) for name in found if name.partition(".")[0] in PACKAGES)


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=str)
def test_a_module_imports_only_what_its_room_may(module: str, path: Path) -> None:
    room = room_of(module)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for name, line in imports_of(path, module)
        if not below(name, room) and not any(below(name, allowed) for allowed in ARROWS[room])
    ]
    assert not wrong, f"{room} may import {sorted(ARROWS[room])}: {wrong}"


def test_every_room_of_the_table_exists() -> None:
    found = {room_of(module) for module, _ in modules()}
    assert found == set(ARROWS)


def run_python(source: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_cusprun_imports_nothing_heavy() -> None:
    loaded = run_python("import sys, cusprun; dir(cusprun); cusprun.__version__; print(*sys.modules)")
    assert not {*HEAVY, "typer", "rich", "yaml"} & {name.partition(".")[0] for name in loaded.split()}


def test_no_help_imports_anything_heavy() -> None:
    loaded = run_python(
        "import sys, typer\n"
        "from cusprun.cli.app import app, run\n"
        "names = list(typer.main.get_command(app).commands)\n"
        "codes = [run([])] + [run([name, '--help']) for name in names]\n"
        "assert len(names) > 10 and not any(codes), codes\n"
        "print('LOADED', *sys.modules)\n"
    )
    names = loaded.rpartition("LOADED")[2].split()
    assert not set(HEAVY) & {name.partition(".")[0] for name in names}


def test_no_module_takes_the_place_of_a_public_function() -> None:
    """Importing a submodule sets it on its package, over a function of the same name."""
    import cusprun

    functions = set(cusprun.__all__) - {"errors", "__version__"}
    assert not functions & {name.partition(".")[2] for name, _ in modules() if name.startswith("cusprun.")}


def test_every_public_name_is_there_and_documented() -> None:
    run_python(
        "import cusprun\n"
        "for name in cusprun.__all__:\n"
        "    found = getattr(cusprun, name)\n"
        "    assert name.startswith('__') or found.__doc__, name\n"
    )


def test_an_unknown_name_is_an_attribute_error() -> None:
    import cusprun

    with pytest.raises(AttributeError, match="prun"):
        _ = cusprun.prun  # type: ignore[attr-defined]

"""Containers on one machine: image, Compose with the original beside and monitoring, start script."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from cusprun.errors import UserError
from deploy import dashboard
from deploy.containers import (
    BAKED,
    PORT,
    STOP_S,
    USER_ID,
    VOLUME,
    ask_command,
    check_gpus,
    check_image,
    image_files,
    is_gpu,
    literal,
    memory_text,
    serve_arguments,
    whole_number,
)
from deploy.facts import Facts
from deploy.render import MODEL_FOLDER, File, artifact_files, text_file

PROMETHEUS_TAG = "v3.5.0"
GRAFANA_TAG = "12.1.0"

_KEY_FILE = "/run/secrets/api_key"
_ORIGINAL_FOLDER = "original"
_TMP_SIZE = {True: "4g", False: "64m"}
"""vLLM keeps compiled kernels in /tmp; the others write next to nothing."""

_MAX_PORT = 65534  # the original's is the next

_MONITORING_PORTS = {3000, 9090}

Options = Mapping[str, str | None]


def check(facts: Facts, options: Options) -> None:
    """Raise ``UserError`` for options that cannot be."""
    check_image(_image(facts, options))
    if facts.original is not None:
        check_image(_original_image(facts, options))
    port = whole_number("port", options["port"], 1, _MAX_PORT)
    if {port, port + 1} & _MONITORING_PORTS:
        raise UserError(f"port={port} meets Prometheus' 9090 or Grafana's 3000; choose another")
    check_gpus(facts, options["gpus"])


def files(facts: Facts, options: Options) -> Iterator[File]:
    """Yield the image's build context, Compose, monitoring, the start script and the README."""
    model = options["model"] or VOLUME
    gpus = check_gpus(facts, options["gpus"])
    yield from image_files(facts, model, gpus)
    yield from artifact_files(facts)
    if facts.original is not None:
        yield from _original_files(facts.original, options)
    sides = _sides(facts, options, gpus)
    yield text_file(
        "compose.yaml",
        "docker/compose.yaml.j2",
        name=facts.name,
        sides=sides,
        user_id=USER_ID,
        container_port=PORT,
        stop_s=STOP_S,
        tmp_size=_TMP_SIZE[is_gpu(facts)],
        gpus=gpus if is_gpu(facts) else 0,
        prometheus_tag=PROMETHEUS_TAG,
        grafana_tag=GRAFANA_TAG,
    )
    yield from _monitoring([f"{side['side']}:{PORT}" for side in sides], facts)
    yield text_file("start.sh", "docker/start.sh.j2", executable=True, original=facts.original is not None)
    yield File(".gitignore", b"secrets/\n")
    yield text_file(
        "README.md",
        "docker/README.md.j2",
        facts=facts,
        ask=shlex.join(ask_command(facts, _KEY_FILE)),
        port=int(options["port"] or PORT),
        gpus=is_gpu(facts),
        is_baked=model == BAKED,
        original=facts.original is not None,
        context=f"{facts.sizing.context_tokens:,}",
        parallel=facts.sizing.parallel,
        memory=memory_text(facts),
        digest_argument="VLLM_DIGEST" if is_gpu(facts) else "PYTHON_DIGEST",
    )


def _image(facts: Facts, options: Options) -> str:
    return options["image"] or f"{facts.name}:{_tag(facts.cusprun_version)}"


def _original_image(facts: Facts, options: Options) -> str:
    """Return a name of its own: where two services build one name at once, the second finds it taken."""
    return f"{_image(facts, options)}-original"


def _tag(version: str) -> str:
    """Return a version as a tag, which may not hold the ``+`` of a local version."""
    return version.replace("+", "-")


def _sides(facts: Facts, options: Options, gpus: int) -> list[dict[str, object]]:
    """Return what differs between the expert and the original."""
    port = int(options["port"] or PORT)
    image = _image(facts, options)
    model = options["model"] or VOLUME
    expert = {
        "side": "expert",
        "image": image,
        "target": "baked" if model == BAKED else "runtime",
        "folder": None if model == BAKED else MODEL_FOLDER,
    }
    found = [{**expert, **_load(facts, gpus), "port": port}]
    if facts.original is not None:
        beside = {
            "side": "original",
            "image": _original_image(facts, options),
            "target": "runtime",
            "folder": _ORIGINAL_FOLDER,
        }
        found.append({**beside, **_load(facts.original, gpus), "port": port + 1})
    return found


def _load(facts: Facts, gpus: int) -> dict[str, object]:
    return {
        "memory_mib": facts.memory_limit_mib,
        "words": [literal(word) for word in serve_arguments(facts, _KEY_FILE, gpus)],
    }


def _original_files(original: Facts, options: Options) -> Iterator[File]:
    path = Path(str(options["original"])).expanduser().resolve()
    under = (
        f"{_ORIGINAL_FOLDER}/{original.artifact_name}" if original.artifact_is_folder else _ORIGINAL_FOLDER
    )
    for name in sorted(original.sha256):
        yield File(f"{under}/{name}", path / name if original.artifact_is_folder else path)


def _monitoring(targets: list[str], facts: Facts) -> Iterator[File]:
    yield text_file("monitoring/prometheus.yaml", "monitoring/prometheus.yaml.j2", targets=targets)
    yield text_file(
        "monitoring/datasource.yaml",
        "monitoring/datasource.yaml.j2",
        datasource_uid=dashboard.DATASOURCE_UID,
    )
    yield text_file("monitoring/dashboards.yaml", "monitoring/dashboards.yaml.j2")
    yield File("monitoring/dashboard.json", dashboard.json_bytes(facts.engine, facts.model, facts.name))

"""What every container has in common: the image's build context, how the server is called, valid names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from cusprun.errors import UserError
from deploy.facts import Facts
from deploy.own_wheel import own_wheel
from deploy.platforms import marker_environment
from deploy.render import MODEL_FOLDER, File, artifact_path, question, text_file
from deploy.requirements import pinned
from deploy.sizing import SHARED_BYTES
from deploy.wheelhouse import requirement_lines

PYTHON_TAG = "3.12.12-slim-bookworm"
"""glibc 2.36 and libstdc++ of GCC 12: all wheels of the engines want less."""

_PYTHON = "3.12"
_PLATFORM = "linux-x86_64"  # what is needed on linux-aarch64 is the same

VLLM_VERSION = "0.32.0"
"""The vLLM that cusprun's own tests run."""

USER_ID = 10001
PORT = 8000
MODEL_ROOT = f"/{MODEL_FOLDER}"
BAKED, VOLUME = "baked", "volume"

DRAIN_S = 30
STOP_S = DRAIN_S + 15
"""How long a container is given to end: the drain, and the engine's own end."""

_START_S: Mapping[str, int] = {"gguf": 300, "onnx": 300, "vllm": 900}
"""How long a start may take: 10 GB from a disk of a network; vLLM compiles besides."""

_HOME = "/opt/cusprun"
_HEALTH = (
    "import urllib.request as r; "
    f"r.build_opener(r.ProxyHandler({{}})).open('http://127.0.0.1:{PORT}/health', timeout=4)"
)

_PATH_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = (
    r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*(?::[0-9]+)?"
)
_IMAGE = re.compile(
    rf"(?:(?P<host>{_HOST})/)?(?P<path>{_PATH_PART}(?:/{_PATH_PART})*)"
    r"(?P<tag>:[\w][\w.-]{0,127})?(?P<digest>@sha256:[0-9a-f]{64})?",
    re.ASCII,
)
"""Image names: https://github.com/distribution/reference (grammar in reference.go)."""

_MAX_IMAGE = 255
_MAX_TAG = 128


def is_gpu(facts: Facts) -> bool:
    """Tell whether the image is that of a GPU."""
    return facts.format == "vllm"


def start_s(facts: Facts) -> int:
    """Return the seconds that a start may take."""
    return _START_S[facts.format]


def python_of(facts: Facts) -> str:
    """Return the interpreter in the image."""
    return "python3" if is_gpu(facts) else f"{_HOME}/bin/python"


def ask_command(facts: Facts, key_file: str) -> list[str]:
    """Return the command that asks the server from inside its container; the question follows the program."""
    return [python_of(facts), f"{_HOME}/ask.py", "What is 7 x 8?", key_file]


def shared_mib(facts: Facts) -> int:
    """Return the MiB of ``/dev/shm``."""
    return SHARED_BYTES.get(facts.format, 0) // 2**20


def memory_need_mib(facts: Facts) -> int:
    """Return the MiB that a container needs."""
    return math.ceil(facts.sizing.memory_bytes / 2**20)


def memory_text(facts: Facts) -> str:
    """Say what memory is needed and granted."""
    need = memory_need_mib(facts)
    limit = facts.memory_limit_mib
    if limit is None:
        return f"{need:,} MiB of memory asked for, without a limit: give --results of a benchmark for one"
    return f"{need:,} MiB of memory needed ({facts.sizing.source}), {limit:,} MiB granted"


def serve_arguments(facts: Facts, key_file: str | None = None, gpus: int = 1) -> list[str]:
    """Return what follows ``cusprun``; without ``key_file`` the key is ``$CUSPRUN_API_KEY``."""
    sizing = facts.sizing
    words = [
        "serve", artifact_path(facts, MODEL_ROOT), "--engine", facts.engine, f"--name={facts.model}",
        "--host", "0.0.0.0", "--port", str(PORT),
        "--context", str(sizing.context_tokens), "--parallel", str(sizing.parallel),
        "--drain", str(DRAIN_S),
    ]  # fmt: skip
    words += ["--threads", str(sizing.num_threads)] if sizing.num_threads and not is_gpu(facts) else []
    words += ["--api-key-file", key_file] if key_file else []
    return words + (["--", "--tensor-parallel-size", str(gpus)] if gpus > 1 else [])


def literal(word: str) -> str:
    """Return a word in which ``$`` means itself for Compose and for Kubernetes, which both read ``$$`` so."""
    return word.replace("$", "$$")


def image_files(facts: Facts, model: str, gpus: int = 1, under: str = "") -> Iterator[File]:
    """Yield an image's build context, the model apart, below ``under`` (empty, or with a slash at its end).

    ``model`` is ``baked`` (the image takes it from the folder ``model`` of the context) or ``volume`` (it is
    mounted at ``/model``).
    """
    is_baked = model == BAKED
    entrypoint = [python_of(facts), "-m", "cusprun"] if is_gpu(facts) else [f"{_HOME}/bin/cusprun"]
    yield text_file(
        f"{under}Dockerfile",
        f"docker/Dockerfile.{'gpu' if is_gpu(facts) else 'cpu'}.j2",
        python_tag=PYTHON_TAG,
        vllm_version=VLLM_VERSION,
        home=_HOME,
        needs_openmp=facts.format == "gguf",
        user_id=USER_ID,
        port=PORT,
        start_s=start_s(facts),
        health=[python_of(facts), "-c", _HEALTH],
        entrypoint=entrypoint,
        arguments=serve_arguments(facts, gpus=gpus),
        model=facts.model,
        version=facts.cusprun_version,
        license=facts.license,
        is_baked=is_baked,
        model_folder=MODEL_ROOT,
    )
    yield text_file(f"{under}.dockerignore", "docker/dockerignore.j2", is_baked=is_baked)
    yield text_file(f"{under}ask.py", "docker/ask.py.j2", route=question(facts)[0], port=PORT)
    name, wheel = own_wheel()
    yield File(f"{under}wheels/{name}", wheel)
    if not is_gpu(facts):
        versions = pinned(facts.versions, marker_environment(_PLATFORM, _PYTHON))
        yield File(f"{under}requirements.txt", requirement_lines(versions).encode())


def check_image(text: str) -> None:
    """Raise ``UserError``, with the reason and a name near it, when ``text`` is no image name with a tag."""
    found = _IMAGE.fullmatch(text)
    if found and len(text) > _MAX_IMAGE:
        raise UserError(f"the image name has {len(text)} characters; at most {_MAX_IMAGE} are allowed")
    if found and found["digest"]:
        raise UserError(
            f"the image {text!r} is yet to be built and has no digest; leave out {found['digest']}"
        )
    if found and (found["tag"] in (None, ":latest")):
        raise UserError(
            f"the image {text!r} needs a tag of its own, so that a version can be told from the next; "
            f"for example {text.removesuffix(':latest')}:1"
        )
    if not found:
        raise UserError(
            f"the image name {text!r} is not valid ({_image_fault(text)}); for example {near_image(text)!r}"
        )


def _image_fault(text: str) -> str:
    if not text:
        return "it is empty"
    if "://" in text:
        return "it begins with a protocol"
    tag = _split_tag(text)[1]
    if len(tag) > _MAX_TAG:
        return f"its tag has {len(tag)} characters, of {_MAX_TAG} allowed"
    odd = re.search(r"[^\w.:/@-]", text, re.ASCII)
    if odd:
        return f"it holds {odd.group()!r}"
    if text != text.lower():
        return "a repository is written in lower-case letters"
    return "its parts are letters and digits, with single dots, underscores or hyphens between them"


def _split_tag(text: str) -> tuple[str, str]:
    """Return what stands before and after the colon of the last part."""
    path, _, tag = text.rpartition(":") if ":" in text.rpartition("/")[2] else (text, "", "")
    return path, tag


def near_image(text: str) -> str:
    """Return a valid image name near ``text``."""
    bare = re.sub(r"^[a-zA-Z]+://", "", text)
    path, tag = _split_tag(bare)
    parts = [re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in path.split("/")]
    host, *rest = path.split("/")
    if rest and re.fullmatch(_HOST, host) and ("." in host or ":" in host or host == "localhost"):
        parts[0] = host.lower()
    label = re.sub(r"[^\w.-]+", "-", tag, flags=re.ASCII).strip("-.")[:_MAX_TAG] or "1"
    return f"{'/'.join(part for part in parts if part) or 'expert'}:{label}"


def whole_number(name: str, text: str | None, least: int, most: int) -> int:
    """Return an option that is a whole number; raises ``UserError`` outside of ``least`` to ``most``."""
    if text is None or not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise UserError(f"{name} must be a whole number from {least} to {most}, not {text!r}")
    return int(text)


def check_gpus(facts: Facts, text: str | None) -> int:
    """Return the GPUs of one server; raises ``UserError`` for several where the engine uses none."""
    gpus = whole_number("gpus", text, 1, 16)
    if gpus > 1 and not is_gpu(facts):
        raise UserError(f"a {facts.format} artifact is served on the CPU; leave out gpus={gpus}")
    return gpus

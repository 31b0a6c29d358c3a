"""The targets as data; a target's module is imported only when it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from cusprun.errors import UserError, require_known
from deploy.facts import Option, Target
from deploy.platforms import MACHINES
from deploy.sizing import IN_A_CONTAINER

_ALL = frozenset({"gguf", "onnx", "vllm"})
_LIGHT = frozenset({"gguf", "onnx"})

_MODEL = ("baked", "volume")

_PLATFORM = Option(
    "platform", None, "machine that the wheels are for; this one's when not given", tuple(MACHINES)
)
_PYTHON = Option("python", None, "Python version there, like 3.12; this one's when not given")
_GPUS = Option("gpus", "1", "GPUs of one server, for vLLM")
_DOCKER = (
    Option("image", None, "name and tag of the image; the model's name and cusprun's version when not given"),
    Option("model", "volume", "whether the model is mounted or in the image", _MODEL),
    Option("original", None, "artifact of the same format that is served beside"),
    Option("port", "8000", "port on this machine's loopback; the original's is the next"),
    _GPUS,
)
_KUBERNETES = (
    Option("image", None, "name and tag of the image, with its registry; must be given"),
    Option("model", "baked", "whether the model is in a volume or in the image", _MODEL),
    Option("namespace", None, "namespace; the model's name when not given"),
    Option("labels", None, "labels for everything, like team=search,tier=gold"),
    Option("min_replicas", "1", "servers at least"),
    Option("max_replicas", "4", "servers at most"),
    Option("storage_class", None, "storage class of the model's volume; the cluster's own when not given"),
    _GPUS,
)
_SYSTEM = Option("system", None, "system text of every chat that has none")
_PREFIX = Option("prefix", None, "folder of the service on its machine; /opt/NAME when not given")
_HOST = Option("host", "127.0.0.1", "address to listen on")
_VLLM = Option("vllm", "/opt/vllm", "environment with vLLM there, for folders that it serves")
_PORT = Option("port", "8000", "port to listen on")

TARGETS: Mapping[str, Target] = {
    "bundle": Target("bundle", "deploy.bundle", _LIGHT, (_PLATFORM, _PYTHON)),
    "ollama": Target("ollama", "deploy.ollama", frozenset({"gguf"}), (_SYSTEM,)),
    "docker": Target("docker", "deploy.docker", _ALL, _DOCKER, IN_A_CONTAINER),
    "kubernetes": Target("kubernetes", "deploy.kubernetes", _ALL, _KUBERNETES, IN_A_CONTAINER),
    "systemd": Target("systemd", "deploy.systemd", _ALL, (_PREFIX, _HOST, _PORT, _VLLM, _PYTHON)),
}


def target_of(name: str) -> Target:
    """Return the target called ``name``; raises ``UserError`` with the nearest known one otherwise."""
    require_known(name, TARGETS, "target")
    return TARGETS[name]


def load(target: Target) -> Any:
    """Import a target's module."""
    return import_module(target.module)


def parse_options(texts: Iterable[str]) -> dict[str, str]:
    """Return options written ``NAME=VALUE``; raises ``UserError`` for one without a value or given twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"the option {text!r} has no value; write NAME=VALUE")
        if name in found:
            raise UserError(f"the option {name!r} is given twice; give it once")
        found[name] = value
    return found


def complete_options(target: Target, given: Mapping[str, str]) -> dict[str, str | None]:
    """Return a value for every option of a target.

    Raises:
        UserError: an option is unknown there, or its value is none of its choices.
    """
    known = {option.name: option for option in target.options}
    for name, value in given.items():
        if not known:
            raise UserError(f"the target {target.name} has no options; leave out {name!r}")
        require_known(name, known, f"option of the target {target.name}")
        if known[name].choices:
            require_known(value, known[name].choices, name)
    return {name: given.get(name, option.default) for name, option in known.items()}

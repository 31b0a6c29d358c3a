"""A service in a cluster: the image's build context, manifests with Kustomize, and KServe for vLLM."""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

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
    memory_need_mib,
    memory_text,
    python_of,
    serve_arguments,
    shared_mib,
    start_s,
    whole_number,
)
from deploy.facts import Facts
from deploy.kubernetes_names import check_namespace, check_subdomain, parse_labels
from deploy.render import MODEL_FOLDER, File, artifact_files, text_file

_KEY_FOLDER = "/run/secrets/cusprun"
_KEY_NAME = "keys"
_CLIENT_LABEL = ("cusprun/client", "true")
_MIB = 2**20
_FILE_SYSTEM = 1.1  # of the model's bytes: the volume's own
_MAX_REPLICAS = 1000

_BASE = ("deployment.yaml", "service.yaml", "hpa.yaml", "networkpolicy.yaml", "pdb.yaml")
_KSERVE = ("inferenceservice.yaml", "networkpolicy.yaml")

Options = Mapping[str, str | None]


def check(facts: Facts, options: Options) -> None:
    """Raise ``UserError`` for options that cannot be."""
    image = options["image"]
    if image is None:
        raise UserError(
            "the target kubernetes needs the name of an image that the nodes can pull; "
            f"give --option image=REGISTRY/{facts.name}:1"
        )
    check_image(image)
    check_namespace(_namespace(facts, options))
    parse_labels(options["labels"])
    least = whole_number("min_replicas", options["min_replicas"], 1, _MAX_REPLICAS)
    most = whole_number("max_replicas", options["max_replicas"], 1, _MAX_REPLICAS)
    if least > most:
        raise UserError(f"min_replicas={least} is over max_replicas={most}; swap them")
    check_gpus(facts, options["gpus"])
    if options["storage_class"] is not None:
        check_subdomain(options["storage_class"], "storage class")
        if options["model"] != VOLUME:
            raise UserError("a storage class is for a model in a volume; add --option model=volume")


def files(facts: Facts, options: Options) -> Iterator[File]:
    """Yield the image's build context, the manifests, the start script and the README."""
    values = _values(facts, options)
    is_volume = bool(values["is_volume"])
    yield from image_files(facts, VOLUME if is_volume else BAKED, int(values["gpus"] or 1), "image/")
    yield from artifact_files(facts, MODEL_FOLDER if is_volume else f"image/{MODEL_FOLDER}")
    if is_volume:
        yield text_file("loader/pvc.yaml", "kubernetes/pvc.yaml.j2", **values)
        yield text_file("loader/loader.yaml", "kubernetes/loader.yaml.j2", **values)
    yield text_file("namespace.yaml", "kubernetes/namespace.yaml.j2", **values)
    yield from _folder("base", _BASE, values)
    yield from _folder("monitoring", ("podmonitor.yaml",), values, has_dashboard=True)
    place = f"{values['namespace']}/{facts.name}"
    match = dashboard.of_pods(values["namespace"], facts.name)
    yield File("monitoring/dashboard.json", dashboard.json_bytes(facts.engine, facts.model, place, match))
    if is_gpu(facts):
        own = {"serving.kserve.io/inferenceservice": facts.name}
        yield from _folder("kserve", _KSERVE, {**values, "selected": own, "is_kserve": True})
    yield text_file("start.sh", "kubernetes/start.sh.j2", executable=True, **values)
    yield text_file("README.md", "kubernetes/README.md.j2", **{**values, "is_kserve": is_gpu(facts)})


def _folder(
    name: str, resources: tuple[str, ...], values: Mapping[str, Any], *, has_dashboard: bool = False
) -> Iterator[File]:
    """Yield the manifests of a folder and the kustomization that lists them."""
    for resource in resources:
        yield text_file(f"{name}/{resource}", f"kubernetes/{resource}.j2", **values)
    yield text_file(
        f"{name}/kustomization.yaml",
        "kubernetes/kustomization.yaml.j2",
        **{**values, "resources": resources, "dashboard": has_dashboard},
    )


def _namespace(facts: Facts, options: Options) -> str:
    return facts.name if options["namespace"] is None else options["namespace"]


def _digest(facts: Facts) -> str:
    """Return a hash of the artifact, by which the start script knows what the volume holds."""
    lines = [f"{digest}  {path}\n" for path, digest in sorted(facts.sha256.items())]
    return hashlib.sha256("".join([f"{facts.artifact_name}\n", *lines]).encode()).hexdigest()[:16]


def _values(facts: Facts, options: Options) -> dict[str, Any]:
    sizing = facts.sizing
    gpus = check_gpus(facts, options["gpus"]) if is_gpu(facts) else 0
    selector = {"app.kubernetes.io/name": "cusprun", "app.kubernetes.io/instance": facts.name}
    key_file = f"{_KEY_FOLDER}/{_KEY_NAME}"
    return {
        "facts": facts,
        "name": facts.name,
        "namespace": _namespace(facts, options),
        "image": options["image"],
        "is_volume": options["model"] == VOLUME,
        "selector": selector,
        "selected": selector,
        "is_kserve": False,
        "labels": {
            **parse_labels(options["labels"]),
            **selector,
            "app.kubernetes.io/version": facts.cusprun_version.replace("+", "_"),
            "app.kubernetes.io/managed-by": "cusprun",
        },
        "clients": dict([_CLIENT_LABEL]),
        "client_label": "=".join(_CLIENT_LABEL),
        "words": [literal(word) for word in serve_arguments(facts, key_file, max(gpus, 1))],
        "ask": shlex.join(ask_command(facts, key_file)),
        "python": python_of(facts),
        "port": PORT,
        "user_id": USER_ID,
        "stop_s": STOP_S,
        "start_s": start_s(facts),
        "threads": sizing.num_threads,
        "gpus": gpus,
        "request_mib": memory_need_mib(facts),
        "limit_mib": facts.memory_limit_mib,
        "shm_mib": shared_mib(facts),
        "artifact_name": facts.artifact_name,
        "model_digest": _digest(facts),
        "model_mib": max(1, math.ceil(facts.artifact_bytes * _FILE_SYSTEM / _MIB)),
        "storage_class": options["storage_class"],
        "key_folder": _KEY_FOLDER,
        "key_name": _KEY_NAME,
        "min_replicas": int(options["min_replicas"] or 1),
        "max_replicas": int(options["max_replicas"] or 1),
        "queue_metric": dashboard.QUEUE_METRICS[facts.engine],
        "context": f"{sizing.context_tokens:,}",
        "parallel": sizing.parallel,
        "memory": memory_text(facts),
    }

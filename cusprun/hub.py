"""Models by hub id: only what a model needs is downloaded, never pickles and never code."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cusprun.errors import ModelError
from cusprun.progress import SILENT, Progress

log = logging.getLogger(__name__)

WANTED_FILES = (
    "model*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "*.txt",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY.md",
)
_TIMEOUT_S = 10.0
_UNREACHABLE_HINT = "check the network, or give a local folder or a GGUF file"


def wanted(names: Sequence[str]) -> list[str]:
    """Return the files of a repository that a model needs, in the order given."""
    return [
        name
        for name in names
        if any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in WANTED_FILES)
    ]


def download(repo_id: str, progress: Progress = SILENT) -> Path:
    """Return the local snapshot of a hub repository, downloading what is missing.

    Without a network, a snapshot that was downloaded before is used.

    Raises:
        ModelError: the hub cannot be reached, does not have or does not give the repository, or the
            repository holds no safetensors weights.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(repo_id, files_metadata=True, timeout=_TIMEOUT_S)
    except HfHubHTTPError as error:
        raise ModelError(_refusal(repo_id, error)) from None
    except Exception as error:  # sockets, TLS, proxies and offline mode each raise types of their own
        return _downloaded_before(repo_id, error)
    sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
    names = wanted(list(sizes))
    if not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"the hub's {repo_id} holds no safetensors weights (pickled ones can run code and are not read); "
            "choose another model or convert it first"
        )
    folder = None
    with progress.stage(f"downloading {repo_id}", sum(sizes[n] for n in names) >> 20, "MiB") as advance:
        for name in names:
            try:
                # The last one by branch: that leaves the mark by which the whole is found offline.
                revision = None if name == names[-1] else info.sha
                file = hf_hub_download(repo_id, name, revision=revision)
            except Exception as error:  # as above
                raise ModelError(
                    f"the download of {name} from the hub's {repo_id} failed ({_first_line(error)}); "
                    "run again, it continues"
                ) from None
            folder = folder or Path(file).parents[name.count("/")]
            advance(sizes[name] >> 20)
    assert folder is not None
    return folder


def _downloaded_before(repo_id: str, error: Exception) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, local_files_only=True))
    except Exception:  # nothing there, or of no use
        raise ModelError(
            f"{repo_id} is no local path, and the hub cannot be reached ({_first_line(error)}); "
            f"{_UNREACHABLE_HINT}"
        ) from None
    log.info("the hub cannot be reached; using the copy of %s that was downloaded before", repo_id)
    return folder


def _refusal(repo_id: str, error: Any) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 404):
        return f"{repo_id} is no local path, and the hub has no public model of that name; check the name"
    if status == 403:
        return (
            f"the hub does not give {repo_id}: accept its terms on its page, then log in with `hf auth login`"
        )
    return f"the hub refuses {repo_id} (status {status}); {_UNREACHABLE_HINT}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__

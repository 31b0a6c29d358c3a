"""Running tasks through lm-eval: nothing downloaded, nothing kept, nothing said."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cusprun.corpus.tokens import load_tokenizer
from cusprun.errors import MissingDependencyError, ModelError, UserError
from cusprun.progress import SILENT, Progress
from cusprun.quality.stock import load_stock_model
from cusprun.quality.tasks import Task
from cusprun.walk.device import CPU, Device

DEFAULT_BATCH_SIZE = 8

_NEEDED = ("lm_eval", "accelerate")  # lm-eval's model class imports the second, and does not ask pip for it
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_CHATTY = ("lm_eval", "accelerate", "datasets", "evaluate", "transformers")
_DEFAULT_CONTEXT = 2048


def require_lm_eval() -> None:
    """Raise ``MissingDependencyError`` when lm-eval, or what its model class needs, is not installed."""
    for name in _NEEDED:
        if find_spec(name) is None:
            raise MissingDependencyError(
                f"tasks need the library {name.replace('_', '-')!r}, which is not installed; "
                "run pip install 'cusprun[eval]'"
            )


def require_room(folder: Path, context_length: int | None, tasks: Sequence[Task]) -> None:
    """Raise ``UserError`` when a prompt and what is generated after it do not fit the model's context.

    lm-eval would cut the beginning of the prompt away, and with it the examples or the passage.
    """
    tokenizer = load_tokenizer(folder)
    room = context_length or _DEFAULT_CONTEXT
    for task in tasks:
        longest = max(
            len(tokenizer(document.prompt, verbose=False)["input_ids"]) for document in task.documents
        )
        if longest + task.spec.max_new_tokens > room:
            raise UserError(
                f"the task {task.spec.name!r} has a prompt of {longest:,} tokens and generates "
                f"{task.spec.max_new_tokens:,} more, and {folder.name} takes {room:,}; use fewer shots, "
                "shorter passages or a smaller max_new_tokens"
            )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer in {folder} names no end-of-text token, which lm-eval needs; add 'eos_token' to "
            "its tokenizer_config.json"
        )


def score_tasks(
    folder: Path,
    context_length: int | None,
    tasks: Sequence[Task],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    device: Device = CPU,
    progress: Progress = SILENT,
) -> dict[str, tuple[float, ...]]:
    """Generate the answers of a model to tasks, greedily, in the type of its weights, and score them.

    Returns, for each task by name, the score of each of its documents in order.

    Raises:
        DeviceError: the device has too little memory, for fewer prompts at one time too.
        MissingDependencyError: lm-eval is not installed.
        ModelError: transformers cannot load the model or its tokenizer.
    """
    from cusprun.walk.fallback import Batching, with_smaller_batches

    require_lm_eval()
    total = sum(len(task.documents) for task in tasks)

    def work(batching: Batching) -> dict[str, tuple[float, ...]]:
        name = f"running tasks{batching.note}"
        with progress.stage(name, total, "document") as advance, _quiet_and_offline():
            from cusprun.quality.harness import per_document_scores

            return per_document_scores(
                load_stock_model(folder, device),
                load_tokenizer(folder),
                tasks,
                batch_size=batching.share_of(batch_size),
                max_length=context_length or _DEFAULT_CONTEXT,
                advance=advance,
            )

    return with_smaller_batches(device, work)


@contextmanager
def _quiet_and_offline() -> Iterator[None]:
    """Keep the libraries from the network and from talking; all is as before afterwards."""
    before: dict[str, Any] = {name: os.environ.get(name) for name in _OFFLINE}
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

"""Stores of scores in the cache: made once, checked whole before one is taken, copied out."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.cache import cache_folder, cached
from cusprun.codec import key_of
from cusprun.errors import OutputError, PlanError, StoreError
from cusprun.records import Corpora
from cusprun.version import __version__

if TYPE_CHECKING:
    from cusprun.pipeline.opening import OpenModel

log = logging.getLogger(__name__)

_SPARE_BYTES = 1_000_000


def cached_store(
    opened: OpenModel,
    corpora: Corpora,
    granularity: str,
    score: Callable[[Path, str], object],
    *inputs: object,
) -> Path:
    """Return the store of a model and corpora in the cache, made unless it is there and sound.

    ``score`` gets the folder to write and the hash of the corpora; ``inputs`` are what else its scores
    depend on. A device's scores are kept apart from the CPU's, which they equal only to rounding.

    The store is the first rank's: the others help to make it, and are told where it is.

    Raises:
        OutputError: the cache cannot be written, or holds a damaged store that cannot be removed.
    """
    from cusprun.checkpoint.files import tokenizer_hash
    from cusprun.checkpoint.output import require_space
    from cusprun.corpus import corpus_hash
    from cusprun.pruning.store_layout import store_bytes

    digest, tokenizer = corpus_hash(corpora), tokenizer_hash(opened.index.folder)
    inputs = (*inputs, *opened.device.key)
    name = key_of("score", granularity, opened.model_hash, digest, tokenizer, __version__, *inputs)

    def make(path: Path) -> None:
        size = store_bytes(opened.index.shape, len(corpora.calibration), granularity)
        require_space(path, size + _SPARE_BYTES)
        score(path, digest)

    ranks, store = opened.workspace.ranks, cache_folder() / "scores" / name
    if ranks.from_first(lambda: _is_sound(store, opened, granularity, digest)):
        log.info("found finished scores of this model and these documents; not scoring again")
    elif ranks.is_first:
        cached("scores", name, make)
    else:
        score(store, digest)
    return store


def _is_sound(store: Path, opened: OpenModel, granularity: str, corpus_hash: str) -> bool:
    """Tell whether a store is there and whole; one that is not is removed."""
    if not store.exists():
        return False
    try:
        _check(store, opened, granularity, corpus_hash)
    except (StoreError, PlanError):
        log.info("the finished scores in %s are damaged; scoring again", cache_folder())
        _remove(store)
        return False
    return True


def _check(store: Path, opened: OpenModel, granularity: str, corpus_hash: str) -> None:
    from cusprun.pruning.store import open_store

    kept = open_store(store)
    kept.require_model(opened.index, opened.model_hash)
    if (kept.granularity, kept.infos[0].corpus_hash) != (granularity, corpus_hash):
        raise StoreError(f"{store} holds other scores than its name says")
    kept.check_files()


def _remove(store: Path) -> None:
    if store.is_dir() and not store.is_symlink():
        shutil.rmtree(store, ignore_errors=True)
    else:
        store.unlink(missing_ok=True)
    if store.exists():
        raise OutputError(f"the damaged scores in {store} cannot be removed; remove them, then run again")


def copy_store(store: Path, target: Path, expert_name: str) -> None:
    """Copy a store of the cache to ``target`` under the name of the expert that asked for it.

    Raises:
        OutputError: ``target`` exists, cannot be written or does not fit on the disk.
    """
    from cusprun.checkpoint.output import atomic_folder, require_space
    from cusprun.codec import dump_json, load_json
    from cusprun.pruning.store_layout import STORE_FILE, StoreInfo

    info = load_json(StoreInfo, store / STORE_FILE, StoreError)
    files = sorted(path for path in store.iterdir() if path.name != STORE_FILE)
    require_space(target, sum(path.stat().st_size for path in files) + _SPARE_BYTES)
    with atomic_folder(target) as folder:
        for path in files:
            shutil.copyfile(path, folder / path.name)
        dump_json(replace(info, expert_name=expert_name), folder / STORE_FILE)

"""Artifacts: written from a folder for a runtime, and proven."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.cache import fresh_output
from cusprun.checkpoint.output import remove
from cusprun.errors import ExportError, ModelError, require_known
from cusprun.pipeline.calibration import MANIFEST_NAME, importance_for, known_corpora
from cusprun.pipeline.proof import RUNTIMES, parity_documents, prove
from cusprun.pipeline.workspaces import workspace_of
from cusprun.progress import SILENT, Progress
from cusprun.records import Expert
from cusprun.resolve import StrPath, resolve
from cusprun.walk.device import DEFAULT_DEVICE, open_device

if TYPE_CHECKING:
    from cusprun.checkpoint.index import CheckpointIndex

log = logging.getLogger(__name__)

DEFAULT_FORMAT = "gguf"


def export(
    folder: StrPath,
    out: StrPath,
    *,
    to: str = DEFAULT_FORMAT,
    quant: str | None = None,
    options: Mapping[str, Any] | None = None,
    verify: bool = True,
    expert: StrPath | Expert | None = None,
    device: str = DEFAULT_DEVICE,
    progress: Progress = SILENT,
) -> Path:
    """Write a model as an artifact for a runtime, prove that it computes the same, and return its path.

    ``to`` is ``gguf`` (a file), ``onnx`` or ``vllm`` (folders); ``quant`` one of the format's precisions, its
    default otherwise; ``options`` are the fields of the format's ``Options``. Quantisers are calibrated on
    the calibration documents of ``expert``, or of the expert that the folder's ``cusprun.json`` names, which
    run on ``device`` (that of :func:`cusprun.score`). The
    proof (see :func:`cusprun.verify`) leaves ``<out>.parity.json``; an artifact that fails it is renamed to
    ``<out>.rejected``.

    Raises:
        DeviceError: the device is unknown, does not work or has too little memory.
        ExportError: the format, precision or an option is unknown, or the model cannot be written in it.
        ModelError: the model is missing, damaged, not what its manifest says, or not finite.
        OutputError: ``out`` exists, cannot be written or does not fit on the disk.
        MissingDependencyError: a library that the export or its proof needs is not installed.
        GateError: the artifact does not compute the same.
    """
    from cusprun.checkpoint.index import open_checkpoint
    from exporters.registry import format_of

    where = open_device(device)
    target = fresh_output(out)
    chosen = format_of(to)
    quant = quant or chosen.default_quant
    require_known(quant, chosen.quants, f"{to} precision", ExportError)
    asked = chosen.options({} if options is None else options)
    if verify:
        RUNTIMES[to].require()
    source = resolve(folder, progress).path
    index = open_checkpoint(source)
    refuse_edited(index)
    for loss in chosen.check(index, quant, asked):
        log.info("note: %s", loss)
    wanted = verify or quant in chosen.calibrated
    corpora = known_corpora(source, expert, progress) if wanted else None
    importance = importance_for(chosen, quant, asked, index, corpora, progress, where, workspace_of())
    chosen.export(source, target, quant=quant, options=asked, importance=importance, progress=progress)
    if verify:
        try:
            prove(source, [target], parity_documents(corpora), progress)
        except BaseException:
            # Interrupted or refused: an unproven artifact must not look proven, or block the next try.
            remove(target)
            raise
    return target


def refuse_edited(index: CheckpointIndex) -> None:
    """Raise ``ModelError`` when a folder's manifest was written for other weights or another config."""
    from cusprun.checkpoint.index import model_hash

    path = index.folder / MANIFEST_NAME
    try:
        stated = json.loads(path.read_text(encoding="utf-8")).get("model_hash")
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError):
        raise ModelError(f"{path} cannot be read as a manifest; make the expert again or remove it") from None
    if stated != model_hash(index):
        raise ModelError(
            f"{path} was written for other weights or another config than those beside it; make the expert "
            "again, or remove the manifest to export the folder as it is"
        )

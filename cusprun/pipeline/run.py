"""A recipe from the model to the table; every finished stage is found again by the next run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cusprun.cache import remove_leftovers
from cusprun.codec import dump_json, key_of, load_json, to_plain
from cusprun.errors import CusprunError, MissingDependencyError, OutputError
from cusprun.pipeline.calibration import importance_for
from cusprun.pipeline.evaluation import measure, measured_sets
from cusprun.pipeline.opening import OpenModel, as_expert, corpora_of, open_model
from cusprun.pipeline.proof import RUNTIMES, parity_documents, prove
from cusprun.pipeline.results import RunReport, run_report, to_markdown
from cusprun.pipeline.stages import prune_opened
from cusprun.pipeline.workspaces import workspace_of
from cusprun.progress import SILENT, Progress
from cusprun.recipe import ExportSpec, Recipe, load_recipe, recipe_tree
from cusprun.records import Corpora, Expert, Manifest
from cusprun.resolve import StrPath
from cusprun.version import __version__
from cusprun.walk.device import open_device

if TYPE_CHECKING:
    from cusprun.pipeline.samples import SampleAnswer
    from cusprun.quality.report import EvalReport
    from exporters.parity_records import ParityReport
    from serve.bench.records import BenchReport

log = logging.getLogger(__name__)
T = TypeVar("T")

RESULTS_JSON, RESULTS_MARKDOWN = "results.json", "results.md"
_STAGES_FILE = "stages.json"
_BEFORE, _AFTER = "original", "expert"


@dataclass(frozen=True)
class Stages:
    """``stages.json``: what each output in the folder was, or is being, made from, as a hash."""

    keys: Mapping[str, str]
    schema_version: int = 1


@dataclass
class _OutFolder:
    """The recipe's output folder: knows which of its outputs are finished."""

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def model_or_artifact(self, name: str, key: str, make: Callable[[Path], object]) -> Path:
        """Return the output called ``name``, made unless it is there.

        Outputs appear by rename, so one that is there and was begun from the same inputs is whole. One from
        other inputs is never replaced.
        """
        path = self.folder / name
        keys = self._keys()
        if path.exists():
            if keys.get(name) != key:
                raise OutputError(
                    f"{path} was made from other inputs than this recipe's; remove it or choose another 'out'"
                )
            log.info("found %s, finished before; not making it again", path)
            return path
        remove_leftovers(self.folder, name)
        self._begin(name, key)
        started = time.monotonic()
        make(path)
        self.seconds[name] = round(time.monotonic() - started, 1)
        return path

    def measurement(
        self,
        name: str,
        kind: type[T],
        key: str,
        make: Callable[[], T],
        is_finished: Callable[[T], bool] = lambda _: True,
    ) -> T:
        """Return a finished record that was measured from the same inputs, or measure and keep it."""
        path = self.folder / name
        if path.exists() and self._keys().get(name) == key:
            found = load_json(kind, path)
            if is_finished(found):
                log.info("found %s, finished before; not measuring again", path)
                return found
        path.unlink(missing_ok=True)
        self._begin(name, key)
        started = time.monotonic()
        record = make()
        self.seconds[name] = round(time.monotonic() - started, 1)
        dump_json(record, path)
        return record

    def _keys(self) -> dict[str, str]:
        path = self.folder / _STAGES_FILE
        return dict(load_json(Stages, path, OutputError).keys) if path.exists() else {}

    def _begin(self, name: str, key: str) -> None:
        dump_json(Stages({**self._keys(), name: key}), self.folder / _STAGES_FILE)


def run(
    recipe: StrPath | Recipe,
    *,
    device: str | None = None,
    memory: int | str | None = None,
    workdir: StrPath | None = None,
    progress: Progress = SILENT,
) -> RunReport:
    """Run a recipe: resolve, prune, export, prove, evaluate, measure; write and return the results.

    ``out`` then holds ``expert/`` (the Hugging Face folder), an artifact of original and expert for each
    entry of ``exports``, and the table as ``results.json`` and ``results.md``. Run again, it continues from
    the finished stages; an output that was made from other inputs is never replaced. ``device``, when given,
    stands in for the recipe's. ``memory`` is that of :func:`cusprun.score`, for pruning, importances and
    perplexities; proofs, samples and the benchmark run whole models. So is ``workdir``.

    Raises:
        DeviceError: the device is unknown, does not work or has too little memory.
        ConfigError: the recipe or its expert has faults.
        OutputError: an output cannot be written, or belongs to another recipe.
        CusprunError: whatever a stage raises.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    where = open_device(chosen.device if device is None else device, dtype=chosen.dtype)
    expert = as_expert(chosen.expert)
    chosen.wishes.check_dimensions(expert)
    if chosen.verify or chosen.bench:
        for spec in chosen.exports:
            RUNTIMES[spec.to].require()
    workspace = workspace_of(memory, workdir=workdir)
    out = _OutFolder(_made(Path(chosen.out)))
    before = open_model(chosen.model, progress, where, workspace)
    for spec in chosen.exports:
        _refuse_export(before, spec)
    corpora = corpora_of(before, expert, progress)
    folder = _prune(chosen, expert, before, corpora, out, progress)
    after = open_model(folder, progress, where, workspace)
    artifacts = {
        spec: {
            side: _export(model, spec, side, corpora, out, progress)
            for side, model in ((_BEFORE, before), (_AFTER, after))
        }
        for spec in chosen.exports
    }
    parity = _prove_all(before, after, artifacts, corpora, progress) if chosen.verify else ()
    quality = _evaluate(before, after, expert, corpora, out, progress) if chosen.evaluate else None
    parameters = {"before": before.index.num_parameters, "after": after.index.num_parameters}
    speed = _bench(chosen, artifacts, parameters, out, progress)
    samples = _samples(chosen, before, after, expert, corpora, artifacts, out, progress)
    report = run_report(
        manifest=load_json(Manifest, folder / "cusprun.json"),
        artifacts={(spec.to, spec.quant): paths for spec, paths in artifacts.items()},
        parity=parity,
        quality=quality,
        bench=speed,
        seconds=out.seconds,
        samples=samples,
        recipe=recipe_tree(chosen),
    )
    dump_json(report, out.folder / RESULTS_JSON)
    (out.folder / RESULTS_MARKDOWN).write_text(to_markdown(report), encoding="utf-8")
    return report


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the folder {folder} cannot be made ({error.strerror}); choose another 'out'"
        ) from None
    return folder


def _prune(
    recipe: Recipe,
    expert: Expert,
    before: OpenModel,
    corpora: Corpora,
    out: _OutFolder,
    progress: Progress,
) -> Path:
    from cusprun.corpus import corpus_hash

    key = key_of(
        "expert",
        before.model_hash,
        corpus_hash(corpora),
        to_plain(recipe.wishes),
        __version__,
        *before.device.key,
    )
    return out.model_or_artifact(
        _AFTER, key, lambda path: prune_opened(before, expert, corpora, path, recipe.wishes, progress)
    )


def _refuse_export(model: OpenModel, spec: ExportSpec) -> None:
    """Raise, before any work, when the original could not be exported; its expert has the same features."""
    from exporters.registry import format_of

    chosen = format_of(spec.to)
    chosen.check(model.index, spec.quant, chosen.options(dict(spec.options)))


def _export(
    model: OpenModel, spec: ExportSpec, side: str, corpora: Corpora, out: _OutFolder, progress: Progress
) -> Path:
    """Export one side; original and expert are calibrated on the same documents."""
    from cusprun.corpus import corpus_hash
    from exporters.registry import format_of

    chosen = format_of(spec.to)
    options = chosen.options(dict(spec.options))
    for loss in chosen.check(model.index, spec.quant, options):
        log.info("note: %s", loss)
    calibrated = spec.quant in chosen.calibrated
    documents = corpus_hash(corpora) if calibrated else ""
    device = model.device.key if calibrated else ()
    key = ("export", model.model_hash, spec.to, spec.quant, spec.options, documents, __version__, *device)
    return out.model_or_artifact(
        f"{side}-{spec.quant}{chosen.suffix}",
        key_of(*key),
        lambda path: chosen.export(
            model.index.folder,
            path,
            quant=spec.quant,
            options=options,
            importance=importance_for(
                chosen,
                spec.quant,
                options,
                model.index,
                corpora,
                progress,
                model.device,
                model.workspace,
            ),
            progress=progress,
        ),
    )


def _prove_all(
    before: OpenModel,
    after: OpenModel,
    artifacts: Mapping[ExportSpec, Mapping[str, Path]],
    corpora: Corpora,
    progress: Progress,
) -> tuple[ParityReport, ...]:
    """Prove every artifact, but for those that an earlier run has proven."""
    documents = parity_documents(corpora)
    reports: list[ParityReport] = []
    for side, model in ((_BEFORE, before), (_AFTER, after)):
        wanted = [paths[side] for paths in artifacts.values()]
        proven = {path: found for path in wanted if (found := _proven(path, model)) is not None}
        for path in proven:
            log.info("%s was proven before; not verifying again", path)
        left = [path for path in wanted if path not in proven]
        reports += proven.values()
        if left:
            reports += prove(model.index.folder, left, documents, progress)
    return tuple(reports)


def _proven(artifact: Path, model: OpenModel) -> ParityReport | None:
    from exporters.parity import sha256_of
    from exporters.parity_records import ParityReport

    path = artifact.with_name(f"{artifact.name}.parity.json")
    if not path.is_file():
        return None
    try:
        report = load_json(ParityReport, path)
    except CusprunError:
        return None
    same = (report.reference_sha256, report.artifact_sha256) == (
        model.model_hash,
        sha256_of(artifact),
    )
    return report if same and report.verdict == "pass" else None


def _evaluate(
    before: OpenModel,
    after: OpenModel,
    expert: Expert,
    corpora: Corpora,
    out: _OutFolder,
    progress: Progress,
) -> EvalReport:
    from cusprun.quality.report import EvalReport

    sets = measured_sets(corpora, expert)
    texts = {name: [document.text_hash for document in group] for name, group in sets.items()}
    inputs = (before.model_hash, after.model_hash, texts, expert.max_tokens, __version__)
    key = key_of("eval", *inputs, *before.device.key)
    return out.measurement(
        "eval.json", EvalReport, key, lambda: measure([before, after], expert, sets, progress)
    )


def _samples(
    recipe: Recipe,
    before: OpenModel,
    after: OpenModel,
    expert: Expert,
    corpora: Corpora,
    artifacts: Mapping[ExportSpec, Mapping[str, Path]],
    out: _OutFolder,
    progress: Progress,
) -> tuple[SampleAnswer, ...]:
    """Let both models answer held-out prompts, in the first runtime that loads an export in seconds."""
    from cusprun.pipeline.samples import SampleReport, sample_answers

    if not recipe.samples or not corpora.held_out:
        return ()
    folders = {_BEFORE: (before.index.folder, "torch"), _AFTER: (after.index.folder, "torch")}
    quick = (spec for to in ("gguf", "onnx") for spec in artifacts if spec.to == to and _installed(to))
    spec = next(quick, None)
    models = folders if spec is None else {side: (path, spec.to) for side, path in artifacts[spec].items()}
    hashes = [document.text_hash for document in corpora.held_out]
    chosen = "" if spec is None else repr(spec)
    key = key_of("samples", before.model_hash, after.model_hash, hashes, chosen, recipe.samples, __version__)
    folder = before.index.folder
    return out.measurement(
        "samples.json",
        SampleReport,
        key,
        lambda: sample_answers(models, folder, expert, corpora, recipe.samples, progress),
    ).answers


def _installed(to: str) -> bool:
    try:
        RUNTIMES[to].require()
    except MissingDependencyError:
        return False
    return True


def _bench(
    recipe: Recipe,
    artifacts: Mapping[ExportSpec, Mapping[str, Path]],
    parameters: Mapping[str, int],
    out: _OutFolder,
    progress: Progress,
) -> BenchReport | None:
    from cusprun.pipeline.bench import RUNTIME_OF, target_of
    from exporters.parity import sha256_of
    from serve.bench.orchestrate import bench
    from serve.bench.records import BenchReport

    spec = recipe.bench
    if spec is None:
        return None
    chosen = {(export.to, export.quant): paths for export, paths in artifacts.items()}
    measured = {export: chosen[export] for export in spec.exports}
    hashes = [sha256_of(paths[side]) for paths in measured.values() for side in (_BEFORE, _AFTER)]
    key = key_of("bench", [*measured], hashes, repr(spec.options), __version__)

    def measure_all() -> BenchReport:
        targets = [
            target_of(RUNTIME_OF[to], paths[_BEFORE], paths[_AFTER], quant, parameters)
            for (to, quant), paths in measured.items()
        ]
        # What was made and proven before is worth its table, also where nothing can be measured.
        return bench(targets, spec.options, progress, must_measure=False)

    return out.measurement("bench.json", BenchReport, key, measure_all, lambda report: not report.failed)

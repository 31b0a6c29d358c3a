"""What the benchmarks share: a model with an expert's corpora, rows that outlive a stopped run, tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from experts import BenchExpert, BenchModel, load_corpora

from cusprun.checkpoint.index import CheckpointIndex, open_checkpoint
from cusprun.codec import key_of
from cusprun.corpus import corpus_hash
from cusprun.errors import CusprunError
from cusprun.pipeline.opening import OpenModel, open_model
from cusprun.pruning.folder import Provenance, write_expert
from cusprun.pruning.refit import RefitSettings
from cusprun.pruning.score import score_model
from cusprun.pruning.store import ImpactStore, open_store
from cusprun.quality.likelihood import DocumentLikelihood, measure_likelihood
from cusprun.quality.report import corpus_quality
from cusprun.records import Corpora, Expert, Plan, TokenizedDocument
from cusprun.walk.device import CPU, Device, open_device

RESULTS = Path(__file__).parent / "results"
VERSIONED = ("cusprun", "torch", "transformers")
UNITS = ("ffn_channel",)
"""What may go. All rules then cut to one shape; with heads in play each rule might choose another."""
SIDES = ("held_out", "general")

Likelihoods = Sequence[DocumentLikelihood]
Row = dict[str, Any]


class Bench:
    """One model with the corpora of one expert; scores and the original's likelihoods are made when needed.

    ``scratch`` is a folder of its own that may be filled.
    """

    def __init__(self, opened: OpenModel, expert: BenchExpert, corpora: Corpora, scratch: Path) -> None:
        self.opened, self.expert, self.corpora = opened, expert, corpora
        self._scratch = scratch

    @classmethod
    def of(cls, model: BenchModel, expert: BenchExpert, options: Options, scratch: Path) -> Bench:
        """Open the model and read the corpora."""
        opened = open_model(model.source, device=options.device)
        return cls(opened, expert, load_corpora(expert, options.data, opened.index.folder), scratch)

    @property
    def index(self) -> CheckpointIndex:
        """The model that is cut."""
        return self.opened.index

    def key(self, *inputs: object) -> str:
        """Return the hash of the model, all documents and what else a row was made from; never the code."""
        corpora = self.corpora
        documents = [
            [(document.dimension, document.token_ids) for document in side]
            for side in (corpora.calibration, corpora.held_out, corpora.general)
        ]
        return key_of(self.opened.model_hash, documents, *inputs)

    @cached_property
    def store(self) -> ImpactStore:
        """Impacts of the units on the calibration documents."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        return open_store(
            score_model(
                self.index,
                self.corpora,
                self._scratch / "store",
                model_hash=self.opened.model_hash,
                corpus_hash=corpus_hash(self.corpora),
                device=self.opened.device,
            )
        )

    @cached_property
    def originals(self) -> dict[str, Likelihoods]:
        """The likelihoods of the documents that are measured on, under the model before it is cut."""
        return self._likelihoods(self.index)

    @property
    def provenance(self) -> Provenance:
        """What a manifest says of where an expert comes from; the corpora stand in the result file."""
        expert = Expert(self.expert.name, {})
        return Provenance(
            self.opened.source, self.opened.model_hash, corpus_hash(self.corpora), expert, seconds={}
        )

    @contextmanager
    def expert_of(self, plan: Plan, settings: RefitSettings) -> Iterator[Path]:
        """Write the expert of a plan; the folder is gone afterwards."""
        with self.folder() as folder:
            write_expert(
                self.index,
                plan,
                folder,
                corpora=self.corpora,
                provenance=self.provenance,
                settings=settings,
                measure=False,
                device=self.opened.device,
            )
            yield folder

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield the path of a folder that may be made, and is removed afterwards."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as parent:
            yield Path(parent) / "expert"

    def measured(self, folder: Path) -> Row:
        """Measure a folder on both sides, in float32, against the original."""
        return self.compared(self._likelihoods(open_checkpoint(folder)))

    def _likelihoods(self, index: CheckpointIndex) -> dict[str, Likelihoods]:
        device = self.opened.device
        return {side: measure_likelihood(index, getattr(self.corpora, side), device=device) for side in SIDES}

    def compared(self, likelihoods: Mapping[str, Likelihoods]) -> Row:
        """Return perplexities and their ratios to the original's, with intervals over documents."""
        return {side: _ratio_row(likelihoods[side], self.originals[side]) for side in SIDES}

    def description(self) -> Row:
        """Return what the tables say of the corpora and of the original."""
        corpora, expert = self.corpora, self.expert
        return {
            "corpora": {
                "calibration": _size(corpora.calibration, *(part.file for part in expert.calibration)),
                "held_out": _size(corpora.held_out, expert.held_out.file),
                "general": _size(corpora.general, expert.general.file),
            },
            "original": {
                side: corpus_quality(likelihoods).perplexity.value
                for side, likelihoods in self.originals.items()
            },
        }


def _ratios(row: Row) -> str:
    return ", ".join(f"{side} {ratio_of(row, side):.3f}" for side in SIDES)


def _ratio_row(likelihoods: Likelihoods, original: Likelihoods) -> Row:
    row = asdict(corpus_quality(likelihoods, original))
    return {name: row[name] for name in ("documents", "predicted_tokens", "perplexity", "perplexity_ratio")}


def _size(documents: Sequence[TokenizedDocument], *files: str) -> Row:
    tokens = sum(len(document.token_ids) for document in documents)
    return {"files": list(files), "documents": len(documents), "tokens": tokens}


@dataclass(frozen=True)
class Job:
    """One row to be made: its key, what it is called, and the work."""

    key: str
    label: Row
    work: Callable[[], Row]


class Ledger:
    """A result file: tables, each with its finished rows under the hash of what they were made from."""

    def __init__(self, path: Path, command: str) -> None:
        self._path = path
        self.content: Row = {"schema_version": 2, "command": command, "tables": {}}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("schema_version") == self.content["schema_version"]:
                self.content["tables"] = found["tables"]

    @property
    def tables(self) -> dict[str, Row]:
        """The tables by name."""
        tables: dict[str, Row] = self.content["tables"]
        return tables

    def finish(
        self,
        name: str,
        jobs: Sequence[Job],
        describe: Callable[[], Row],
        *,
        fresh: bool = False,
        show: Callable[[Row], str] | None = None,
        wanted: Callable[[Job], bool] = lambda _job: True,
        device: Device = CPU,
    ) -> None:
        """Do the jobs of a table whose rows are missing; rows that no job makes any more are dropped.

        ``describe`` gives what the table holds beside its rows, and is called when a row is missing; ``show``
        says in a few words what a row found, its perplexity ratios otherwise. Jobs that are not ``wanted``
        are left as they are.
        """
        table = self.tables.setdefault(name, {"rows": {}})
        known = {
            job.key: table["rows"][job.key]
            for job in jobs
            if job.key in table["rows"] and not (fresh and wanted(job))
        }
        table["rows"] = known
        missing = [job for job in jobs if job.key not in known and wanted(job)]
        print(f"{name}: {len(known)} rows are there, {len(missing)} to go", flush=True)
        if missing:
            table.update(describe())
        for job in missing:
            started = time.monotonic()
            row = {**job.label, **job.work()}
            row |= {
                "seconds": round(time.monotonic() - started, 1),
                "machine": machine(device),
                "versions": {package: metadata.version(package) for package in VERSIONED},
            }
            table["rows"][job.key] = row
            # In the order of the jobs, whatever was there before.
            table["rows"] = {each.key: table["rows"][each.key] for each in jobs if each.key in table["rows"]}
            self.save()
            shown = (show or _ratios)(row)
            print(
                f"{name}: {' '.join(map(str, job.label.values()))}: {shown}, {row['seconds']} s", flush=True
            )
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        partial.replace(self._path)


@dataclass(frozen=True)
class Options:
    """What the command line says; ``results`` is where the files go, ``only`` names one table.

    What is left in ``scratch`` stays there when the command line named it.
    """

    data: Path
    results: Path
    scratch: Path
    fresh: bool
    only: str | None
    smoke: bool
    device: Device = CPU

    def expert(self, expert: BenchExpert) -> BenchExpert:
        """Return an expert, with a few documents of each kind in a smoke run."""
        return expert.smoke() if self.smoke else expert


def run(
    name: str, description: str, make: Callable[[Options, Ledger], str], *, needs_data: bool = True
) -> None:
    """Read the command line, make a benchmark's rows and write its two result files.

    ``make`` fills the ledger and returns the Markdown. A smoke run writes nothing that stays. What does not
    need data measures with what is shipped.
    """
    parser = argparse.ArgumentParser(description=description.split("\n", maxsplit=1)[0])
    if needs_data:
        parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/ and xquad/")
    parser.add_argument("--fresh", action="store_true", help="make finished rows again, too")
    parser.add_argument("--only", metavar="MODEL/EXPERT", help="make the rows of one table")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto")
    parser.add_argument("--scratch", type=Path, help="folder to work in, which is kept for the next run")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    scratch = given.scratch or Path(tempfile.mkdtemp(prefix="cusprun-bench-"))
    scratch.mkdir(parents=True, exist_ok=True)
    results = scratch if given.smoke else RESULTS
    results.mkdir(exist_ok=True)
    try:
        ledger = Ledger(results / f"{name}.json", f"make bench-{name}" + " DATA=FOLDER" * needs_data)
        device = open_device(given.device)
        data = given.data if needs_data else Path()
        options = Options(data, results, scratch, given.fresh, given.only, given.smoke, device)
        markdown = make(options, ledger)
        (results / f"{name}.md").write_text(markdown, encoding="utf-8")
        print(markdown)
    except CusprunError as error:
        sys.exit(f"{parser.prog}: {error}")
    finally:
        if given.scratch is None:
            shutil.rmtree(scratch, ignore_errors=True)


def stock_model(folder: Path) -> Any:
    """Load the whole model in float32 with stock transformers."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval()


@torch.inference_mode()
def stock_likelihoods(model: Any, documents: Sequence[TokenizedDocument]) -> tuple[DocumentLikelihood, ...]:
    """Measure documents one by one with a stock model: a plain loop that shares no code with ours."""
    results = []
    for document in documents:
        ids = torch.tensor([document.token_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").double()
        results.append(DocumentLikelihood(len(nats), float(nats.sum())))
    return tuple(results)


def machine(device: Device = CPU) -> Row:
    """Describe where the numbers come from; ``gpu`` is there when the walk ran on one."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_at_end": round(os.getloadavg()[0], 2),
        **({} if device.is_host else {"gpu": device.label}),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def interval(row: Row, side: str) -> str:
    """Show a perplexity ratio with its interval."""
    ratio = row[side]["perplexity_ratio"]
    digits = 3 if ratio["value"] < 10 else 1 if ratio["value"] < 100 else 0
    value, low, high = (f"{ratio[name]:,.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def ratio_of(row: Row, side: str) -> float:
    """Return a row's perplexity over the original's."""
    return float(row[side]["perplexity_ratio"]["value"])


def corpora_text(table: Row) -> str:
    """Say what a table was calibrated and measured on, and what the original reached there."""
    calibration, held_out, general = (table["corpora"][side] for side in ("calibration", *SIDES))
    original = table["original"]
    return (
        f"Calibration on {calibration['documents']} documents ({calibration['tokens']:,} tokens) of "
        f"{' and '.join(calibration['files'])}. Held-out: {held_out['documents']} documents "
        f"({held_out['tokens']:,} tokens) of {held_out['files'][0]}, original perplexity "
        f"{original['held_out']:.2f}. General: {general['documents']} documents ({general['tokens']:,} "
        f"tokens) of {general['files'][0]}, original perplexity {original['general']:.2f}."
    )


def machine_text(rows: Sequence[Row]) -> str:
    """Say where rows were measured and how long they took."""
    threads = ", ".join(sorted({str(row["machine"]["torch_threads"]) for row in rows}))
    cpus = ", ".join(sorted({row["machine"]["cpu"] for row in rows}))
    minutes = sum(row["seconds"] for row in rows) / 60
    gpus = sorted({row["machine"]["gpu"] for row in rows if "gpu" in row["machine"]})
    walked = f", the walk of some on {', '.join(gpus)}" if gpus else ""
    return f"{len(rows)} rows, {minutes:.0f} minutes with {threads} torch threads on {cpus}{walked}."

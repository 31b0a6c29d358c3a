"""Table ``memory``: a model of Llama-3.1-8B's shape, scored, planned, refit, written and exported in 4 GB.

Each stage is a command of its own, whose memory the kernel tells. With ``--scratch FOLDER`` the outputs of
finished stages stay, so that each row can be made alone; a stage whose inputs are not there makes them first.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from measuring import Job, Ledger, Options, Row
from scale_model import MODELS, Config, expert_file, model_folder
from scale_parts import RATIO, asked_for, gigabytes, minutes, verdict, wanted
from watched import Watched, cusprun, watched

from cusprun.checkpoint.index import open_checkpoint
from cusprun.checkpoint.output import remove
from cusprun.codec import key_of
from cusprun.families import shape_of

TABLE = "memory"
LIMIT_BYTES = 4_000_000_000
DOCUMENTS = 8
TOKENS = 128


@dataclass(frozen=True)
class Chain:
    """The stages from a random model to a GGUF file, in one folder, which the model may stand outside of."""

    name: str
    folder: Path
    model: Path
    documents: int = DOCUMENTS
    tokens: int = TOKENS
    limit_bytes: int = LIMIT_BYTES

    @property
    def config(self) -> Config:
        """The model's config."""
        return MODELS[self.name]

    @cached_property
    def expert(self) -> Path:
        """The expert's file."""
        return expert_file(self.folder / "corpus", self.documents, self.tokens)

    @property
    def outputs(self) -> Mapping[str, Path]:
        """What each stage makes, in the order of the stages."""
        return {
            "write": self.model,
            "score": self.folder / "store",
            "plan": self.folder / "plan.json",
            "prune": self.folder / "expert",
            "export": self.folder / "expert-q8_0.gguf",
        }

    def command(self, stage: str) -> list[str]:
        """Return the command line of a stage."""
        outputs = self.outputs
        bounds = ("--memory", self.limit_bytes)
        out = ("--out", outputs[stage])
        writer = Path(__file__).parent / "scale_model.py"
        commands = {
            "write": [sys.executable, str(writer), self.name, str(self.model)],
            "score": cusprun("score", self.model, "--expert", self.expert, *out, *bounds),
            "plan": cusprun("plan", self.model, "--scores", outputs["score"], "--ratio", RATIO, *out),
            "prune": cusprun(
                *("prune", self.model, "--expert", self.expert, "--plan", outputs["plan"]), *out, *bounds
            ),
            # The proof runs the whole checkpoint in stock transformers.
            "export": cusprun("export", outputs["prune"], *out, "--quant", "q8_0", "--no-verify"),
        }
        return commands[stage]

    def run(self, stage: str) -> Watched:
        """Do a stage anew; those before it whose outputs are not there are done first."""
        stages = list(self.outputs)
        for earlier in stages[: stages.index(stage)]:
            if not self.outputs[earlier].exists():
                self.run(earlier)
        remove(self.outputs[stage])
        return watched(
            self.command(stage),
            self.folder / "logs" / f"{stage}.log",
            env={"CUSPRUN_CACHE": str(self.folder / "cache"), "TMPDIR": str(self.folder)},
            folders=(self.folder,),
        )


STAGES: Mapping[str, str] = {
    "write": "write the model",
    "score": "score",
    "plan": "plan",
    "prune": "refit and rewrite",
    "export": "export to q8_0 GGUF",
}
"""What the stages are called."""


def chain(options: Options) -> Chain:
    """Return the chain that is measured."""
    name = "tiny" if options.smoke else "llama-3.1-8b"
    return Chain(name, options.scratch / TABLE, model_folder(options.scratch, name, MODELS[name]))


def fill(options: Options, ledger: Ledger) -> None:
    """Make the rows that are missing."""
    if not asked_for(options, TABLE):
        return
    work = chain(options)
    jobs = [
        Job(
            key_of(stage, work.config, work.documents, work.tokens, work.limit_bytes),
            {"stage": stage},
            partial(_row, work, stage),
        )
        for stage in STAGES
    ]
    ledger.finish(
        TABLE,
        jobs,
        lambda: _description(work),
        fresh=options.fresh,
        show=_shown,
        wanted=wanted(options, TABLE),
    )


def _description(work: Chain) -> Row:
    shape = shape_of(work.config, "the config")
    return {
        "model": work.name,
        "shape": vars(shape),
        "documents": work.documents,
        "tokens_per_document": work.tokens,
        "limit_bytes": work.limit_bytes,
        "ratio": RATIO,
    }


def _row(work: Chain, stage: str) -> Row:
    found = work.run(stage)
    return {
        "stage_seconds": round(found.seconds, 1),
        "anonymous_bytes": found.anonymous_bytes,
        "resident_bytes": found.resident_bytes,
        "max_resident_bytes": found.max_resident_bytes,
        "disk_bytes": found.disk_bytes,
        **(_sizes(work.outputs[stage]) if stage in ("write", "prune", "export") else {}),
        "is_within": found.anonymous_bytes <= work.limit_bytes,
    }


def _sizes(output: Path) -> Row:
    if output.is_file():
        return {"output_bytes": output.stat().st_size}
    index = open_checkpoint(output)
    return {"output_bytes": index.num_bytes, "output_parameters": index.num_parameters}


def _shown(row: Row) -> str:
    return f"{gigabytes(row['anonymous_bytes'])} GB in {minutes(row['stage_seconds'])}"


def to_markdown(table: Row) -> str:
    """Render the table."""
    rows: Sequence[Row] = list(table["rows"].values())
    lines = [
        f"| {STAGES[row['stage']]} | {gigabytes(row['anonymous_bytes'])} | "
        f"{gigabytes(row['resident_bytes'])} | {_output(row)} | {minutes(row['stage_seconds'])} |"
        for row in rows
    ]
    shape, limit = table["shape"], f"{table['limit_bytes'] / 1e9:g}"
    bounded = [row for row in rows if row["stage"] != "write"]
    is_met = all(row["is_within"] for row in bounded)
    return (
        "| stage | peak memory, GB | with pages of files, GB | written, GB | time |\n"
        "|---|---:|---:|---:|---:|\n" + "\n".join(lines) + "\n\n"
        f"A random model of the shape of {table['model']}: {shape['num_hidden_layers']} blocks, hidden size "
        f"{shape['hidden_size']}, FFN width {shape['intermediate_size']}, vocabulary "
        f"{shape['vocab_size']:,}. {table['documents']} documents of {table['tokens_per_document']} tokens, "
        f"ratio {table['ratio']}, `--memory {limit}GB`. Peak memory is what no file holds, which the kernel "
        "is asked for every 20 ms (`RssAnon` and `RssShmem`); pages of files are taken back when others need "
        f"them. At most {limit} GB in every stage: {verdict(is_met)}.\n"
    )


def _output(row: Row) -> str:
    return gigabytes(row["output_bytes"]) if "output_bytes" in row else ""

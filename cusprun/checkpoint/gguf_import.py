"""A GGUF file turned into a Hugging Face folder that stock transformers load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cusprun.checkpoint.files import write_config
from cusprun.checkpoint.gguf_config import build_config, gguf_family
from cusprun.checkpoint.gguf_header import GgufFile, read_gguf
from cusprun.checkpoint.gguf_tokenizer import read_tokenizer
from cusprun.checkpoint.gguf_weights import PlannedWeight, plan_weights, read_weight, source_types
from cusprun.checkpoint.output import atomic_folder, refuse_existing, require_space
from cusprun.checkpoint.writer import TORCH_NAMES, CheckpointWriter, Declared
from cusprun.errors import ModelError, require_known
from cusprun.families import Family, shape_of
from cusprun.progress import SILENT, Progress

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SPARE_BYTES = 64_000_000  # room for the tokenizer and configs beside the weights


def import_gguf(file: Path, out: Path, *, dtype: str = "auto", progress: Progress = SILENT) -> Path:
    """Write ``out``, a Hugging Face folder with the weights, tokenizer and chat template of a GGUF file.

    Every type that ``gguf`` can dequantise is read, one tensor at a time. Q and K rows that llama.cpp
    permuted are put back, and without ``output.weight`` the head is tied to the embedding. The tokenizer
    gives llama.cpp's token ids on the source file (the exceptions are in ``gguf_tokenizer``).

    Args:
        file: the GGUF file; never written to.
        out: the folder to make; whole or absent.
        dtype: ``float32``, ``float16`` or ``bfloat16`` for all weights, or ``auto`` (see ``choose_dtype``).
        progress: told about each tensor written.

    Raises:
        ModelError: the file is missing, damaged, or holds NaN or infinite weights.
        UnsupportedModelError: an architecture, tokenizer or tensor type that cannot be carried over.
        OutputError: ``out`` exists, or its disk is full.
    """
    require_known(dtype, ("auto", *DTYPES), "dtype")
    source = read_gguf(file)
    family = gguf_family(source)
    config = build_config(source, family, dtype)
    plan, flags = plan_weights(source, family, shape_of(config, str(file)))
    chosen = choose_dtype(plan, family) if dtype == "auto" else dtype
    tokenizer = read_tokenizer(source, config["vocab_size"])
    config |= {**flags, **tokenizer.config_ids(), "dtype": chosen}
    declared = [Declared(weight.name, TORCH_NAMES[DTYPES[chosen]], weight.shape) for weight in plan]
    refuse_existing(out)
    require_space(out, sum(tensor.num_bytes for tensor in declared) + _SPARE_BYTES)
    with atomic_folder(out) as folder:
        write_config(folder, config)
        tokenizer.write(folder)
        _write_weights(source, plan, declared, DTYPES[chosen], folder, progress)
    return out


def choose_dtype(plan: Sequence[PlannedWeight], family: Family) -> str:
    """Return the type that ``auto`` means: the one most of the matrices are stored in, float16 if quantised.

    Quantised blocks are small integers times float16 scales, so float16 keeps 3 bits more of them than
    bfloat16 at the same two bytes, and float32 doubles the folder for next to nothing. SmolLM2-135M-Instruct
    (Q4_1) on 1,493 tokens of prose and mathematics, against its exact float32 values:

    ========================  ===============  ===============  ==================
    weights / computation     same next token  KL, nats/token   largest difference
    ========================  ===============  ===============  ==================
    float16 / float32         99.93 %          2.2e-6           0.08
    bfloat16 / float32        99.87 %          8.2e-5           0.36
    float16 / float16         99.73 %          2.2e-5
    bfloat16 / bfloat16       96.38 %          1.4e-3
    llama.cpp on the Q4_1     96.52 %          4.2e-3           3.4
    ========================  ===============  ===============  ==================

    llama.cpp differs more than the first three because it rounds activations to 8 bits for quantised
    matrices; on its own float32 copy of the file it agrees with float32 to 7e-5. Activations reach 25,000 in
    this model, and float16 ends at 65,504: where a model overflows when it is computed in float16, import it
    as bfloat16. Families that do so as a rule, such as Gemma 3, say it in their file and get bfloat16.
    """
    types = source_types(plan)
    most = max(types, key=lambda name: types[name])
    quantised = "bfloat16" if family.overflows_float16 else "float16"
    return {"F32": "float32", "F64": "float32", "BF16": "bfloat16"}.get(most, quantised)


def _write_weights(
    source: GgufFile,
    plan: Sequence[PlannedWeight],
    declared: Sequence[Declared],
    dtype: torch.dtype,
    folder: Path,
    progress: Progress,
) -> None:
    try:
        stream = source.path.open("rb")
    except OSError as error:
        raise ModelError(f"{source.path} cannot be read ({error.strerror}); check the file") from None
    stage = progress.stage("reading weights", len(plan), "tensor")
    with stream, CheckpointWriter(folder, declared) as writer, stage as advance:
        for weight in plan:
            writer.write(weight.name, read_weight(source, stream, weight, dtype))
            advance(1)

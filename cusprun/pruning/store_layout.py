"""The impact store: what is known of every unit on every document, kept so that plans cost no forward pass.

A store is a folder: ``store.json`` says what it was made from, ``layer-00000.safetensors`` and so on hold one
decoder block each. Per kind of unit there are

- ``<kind>``: impacts, float32 [documents, units];
- ``<kind>.weight_squares``: the squared norm of the unit's weights, float64 [units];

and, in stores of structural units, for the inputs of the two last projections (``attention`` and ``mlp``)

- ``<input>.sums``, ``<input>.squares``: each channel added up, and its squares, over all tokens, float64;
- ``<input>.column_squares``: the squared norm of each channel's output column, float64;

and ``block.sums``, the block's relative increment added up over all tokens, float64 [hidden_size]. Sums add,
so several stores read as one give what one store of all their documents would. The header of each file says
which block of which store it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cusprun.errors import StoreError, require_known
from cusprun.records import DIMENSIONS, NEURONS, UNITS, Shape, TokenizedDocument

STORE_FILE = "store.json"
SUMS = (
    "mlp.sums", "mlp.squares", "mlp.column_squares",
    "attention.sums", "attention.squares", "attention.column_squares",
    "block.sums",
)  # fmt: skip
"""What is kept of the inputs of the last projections, and of the block, over all tokens together."""

_MOST = 2**31
"""Above any width of a model and any length of a document: what is not below comes from no model."""


@dataclass(frozen=True)
class StoredDocument:
    """One scored document; ``tokens_hash`` is the SHA-256 of its token ids."""

    dimension: str
    text_hash: str
    num_tokens: int
    tokens_hash: str

    @classmethod
    def of(cls, document: TokenizedDocument) -> StoredDocument:
        """Return what a store keeps of a document."""
        ids = ",".join(map(str, document.token_ids))
        digest = hashlib.sha256(ids.encode()).hexdigest()
        return cls(document.dimension, document.text_hash, len(document.token_ids), digest)


@dataclass(frozen=True)
class StoreInfo:
    """What a store was made from; ``granularity`` is what its impacts belong to, ``unit`` or ``neuron``.

    ``rotary_dim`` is the number of rotated channels of a head, whose rows of Q and K come in pairs; stores of
    neurons have it. ``tokenizer_hash`` stands for the model's tokenizer, empty when it had none. ``device``
    is the kind that the model ran on, ``cpu`` or ``cuda``, whose impacts agree to rounding.
    """

    model_hash: str
    corpus_hash: str
    expert_name: str
    shape: Shape
    documents: tuple[StoredDocument, ...]
    cusprun_version: str
    granularity: str = "unit"
    rotary_dim: int = 0
    tokenizer_hash: str = ""
    device: str = "cpu"
    schema_version: int = 3


def layer_file(layer: int) -> str:
    """Return the file name of one block."""
    return f"layer-{layer:05d}.safetensors"


def layer_bytes(info: StoreInfo, layer: int, arrays: dict[str, torch.Tensor]) -> bytes:
    """Return the contents of the file of one block, with its place in the header."""
    return save(arrays, metadata=_place(info, layer))


def _place(info: StoreInfo, layer: int) -> dict[str, str]:
    # One entry: safetensors writes several in an order that differs from run to run.
    return {"block": f"{layer} of {info.model_hash} on {info.corpus_hash}"}


def check_info(info: StoreInfo, where: Path) -> None:
    """Raise ``StoreError`` when a description says what no model or document can be."""
    again = "make the store again with `cusprun score`"
    kinds_of(info.granularity, f"{where}: ")
    sizes: Mapping[str, int] = asdict(info.shape)
    for name, size in sizes.items():
        if name != "tie_word_embeddings" and not 0 < size < _MOST:
            raise StoreError(f"{where}: shape.{name} is {size}, which no model has; {again}")
    if info.shape.num_attention_heads % info.shape.num_key_value_heads:
        raise StoreError(f"{where}: the query heads do not divide over the KV heads; {again}")
    if not 0 <= info.rotary_dim <= info.shape.head_dim:
        raise StoreError(f"{where}: rotary_dim is {info.rotary_dim}, not within a head; {again}")
    if not info.documents:
        raise StoreError(f"{where} names no document; {again}")
    for number, document in enumerate(info.documents):
        entry = f"{where}: documents[{number}]"
        require_known(document.dimension, DIMENSIONS, f"{entry}.dimension", StoreError)
        if not 0 < document.num_tokens < _MOST:
            raise StoreError(f"{entry}.num_tokens is {document.num_tokens}, which no document has; {again}")


def read_arrays(folder: Path, info: StoreInfo, layer: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
    path = folder / layer_file(layer)
    shapes = array_shapes(info.shape, len(info.documents), info.granularity)
    wanted = {name: ("F64" if "." in name else "F32", size) for name, size in shapes.items()}
    try:
        with safe_open(path, framework="pt") as stream:
            slices = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
            found = {name: (array.get_dtype(), tuple(array.get_shape())) for name, array in slices.items()}
            sound = found == wanted and stream.metadata() == _place(info, layer)
            arrays = {name: stream.get_tensor(name) for name in names} if sound else {}
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise StoreError(
            f"{path} cannot be read ({error}); make the store again with `cusprun score`"
        ) from None
    if not sound or not all(_sound(name, array) for name, array in arrays.items()):
        raise StoreError(f"{path} does not fit its store.json; make the store again with `cusprun score`")
    return arrays


def _sound(name: str, array: torch.Tensor) -> bool:
    finite = bool(torch.isfinite(array).all())
    return finite and (name.endswith(".sums") or bool((array >= 0).all()))


def kinds_of(granularity: str, where: str = "") -> tuple[str, ...]:
    """Return the kinds of unit or neuron of a granularity; raises ``StoreError`` on an unknown one."""
    table = {"unit": UNITS, "neuron": NEURONS}
    require_known(granularity, table, f"{where}granularity", StoreError)
    return table[granularity]


def unit_counts(shape: Shape) -> dict[str, int]:
    """Return how many units of each kind a block has."""
    counts = (shape.intermediate_size, shape.num_attention_heads, shape.num_key_value_heads, 1)
    return dict(zip(UNITS, counts, strict=True))


def neuron_counts(shape: Shape) -> dict[str, int]:
    """Return how many neurons of each kind a block has."""
    heads, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return dict(zip(NEURONS, (heads, kv, kv, heads, shape.intermediate_size), strict=True))


def array_shapes(shape: Shape, documents: int, granularity: str) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every array in the file of a block."""
    counts = unit_counts(shape) if granularity == "unit" else neuron_counts(shape)
    shapes: dict[str, tuple[int, ...]] = {kind: (documents, count) for kind, count in counts.items()}
    shapes |= {f"{kind}.weight_squares": (count,) for kind, count in counts.items()}
    if granularity == "unit":
        widths = {
            "mlp": shape.intermediate_size,
            "attention": shape.num_attention_heads * shape.head_dim,
            "block": shape.hidden_size,
        }
        shapes |= {name: (widths[name.partition(".")[0]],) for name in SUMS}
    return shapes


def store_bytes(shape: Shape, documents: int, granularity: str = "unit") -> int:
    """Return the bytes that the arrays of a store take."""
    arrays = empty_arrays(shape, 0, granularity)  # what does not grow with the documents
    per_document = sum(
        unit_counts(shape).values() if granularity == "unit" else neuron_counts(shape).values()
    )
    fixed = sum(array.numel() * array.element_size() for array in arrays.values())
    return shape.num_hidden_layers * (fixed + 4 * documents * per_document)


def empty_arrays(shape: Shape, documents: int, granularity: str = "unit") -> dict[str, torch.Tensor]:
    """Return the arrays of a block, float32 for impacts and float64 for the rest, filled with zeros."""
    return {
        name: torch.zeros(size, dtype=torch.float64 if "." in name else torch.float32)
        for name, size in array_shapes(shape, documents, granularity).items()
    }

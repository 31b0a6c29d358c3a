"""Plans for models that are larger than what is at hand: counted operations and bytes over rates.

Operations and bytes follow from the shape. Rates are those of data sheets times the share of the rate of a
matrix product that was measured where the table ``walk`` was, with the same code on a wide model.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from measuring import Row
from scale_model import LLAMA_8B, Config, index_of
from scale_parts import RATIO, gigabytes, minutes

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.families import axis_length
from cusprun.pruning.refit import RefitSettings
from cusprun.pruning.refit_memory import refitting
from cusprun.records import Shape
from cusprun.walk.budget import scoring

_FLOAT, _DOUBLE = 4, 8
_RIDGES = 4
"""Factorisations of a refit: one for each of the three ridges that are tried, and the last one."""


LLAMA_70B: Config = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LLAMA_405B: Config = {
    **LLAMA_8B,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}
MODELS: Mapping[str, Config] = {"Llama 3.1 70B": LLAMA_70B, "Llama 3.1 405B": LLAMA_405B}


@dataclass(frozen=True)
class Machine:
    """One kind of box and how many of them; rates are data sheets', in operations or bytes per second.

    ``read_rate`` and ``write_rate`` are those of a box's disks, ``network_rate`` that of one device to the
    devices of all boxes.
    """

    title: str
    boxes: int
    devices: int
    float32_rate: float
    float64_rate: float
    device_bytes: int
    host_float64_rate: float
    disk_rate: float
    network_rate: float


MACHINES: tuple[Machine, ...] = (
    # H100 SXM: 67 TFLOP/s in float32 and, by its tensor cores, in float64; 80 GB. Two processors of 64 cores
    # with 16 float64 operations per cycle at 2.5 GHz, four NVMe disks. NVLink within a box, 400 Gbit/s for
    # each GPU between boxes.
    Machine("1 box with 1 H100", 1, 1, 67e12, 67e12, 80 * 10**9, 5e12, 12e9, 450e9),
    Machine("1 box with 8 H100", 1, 8, 67e12, 67e12, 80 * 10**9, 5e12, 12e9, 450e9),
    Machine("8 boxes with 8 H100 each", 8, 8, 67e12, 67e12, 80 * 10**9, 5e12, 12e9, 50e9),
)


@dataclass(frozen=True)
class Shares:
    """What was measured.

    ``walk`` in float32 and ``solve`` in float64 are shares of the rate of a large matrix product;
    ``hash_rate`` is bytes per second.
    """

    walk: float
    solve: float
    hash_rate: float


@dataclass(frozen=True)
class Work:
    """Pruning a model on documents of ``length`` tokens each; all counts are of all blocks.

    ``index`` needs no files behind it.
    """

    index: CheckpointIndex
    documents: int
    length: int

    @property
    def shape(self) -> Shape:
        """The model's widths."""
        return self.index.shape

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.documents * self.length

    @property
    def block_parameters(self) -> int:
        """Parameters of the matrices of one block."""
        shape = self.shape
        heads, kv = axis_length("heads", shape), axis_length("kv", shape)
        return shape.hidden_size * (2 * heads + 2 * kv + 3 * shape.intermediate_size)

    @property
    def pass_operations(self) -> float:
        """One pass of all tokens through all blocks; attention sees half of a document in the mean."""
        attention = 2 * self.length * axis_length("heads", self.shape)
        return self.shape.num_hidden_layers * self.tokens * (2.0 * self.block_parameters + attention)

    @property
    def gram_operations(self) -> float:
        """The upper triangles of the Gram matrices of both last projections."""
        widths = axis_length("heads", self.shape), self.shape.intermediate_size
        return float(self.shape.num_hidden_layers * self.tokens) * sum(width**2 for width in widths)

    @property
    def solve_operations(self) -> float:
        """The choice of the FFN channels, and the least squares for those that stay (``docs/method.md``).

        The metric is factored and inverted; of each channel that goes the inverse's column is freed of those
        before it, and the weights are updated. Then a factorisation and a solution for all features for each
        ridge, and for the last one.
        """
        width, features = float(self.shape.intermediate_size), self.shape.hidden_size
        kept = width * (1 - RATIO)
        gone = width - kept
        choice = width**3 + width * gone**2 + 2 * width * features * gone
        squares = _RIDGES * (kept**3 / 3 + 2 * kept**2 * features) + 2 * features * kept * gone
        return self.shape.num_hidden_layers * (choice + squares)

    @property
    def spilled_bytes(self) -> int:
        """What the refit holds in files: three hidden states and both projections' channels of each token."""
        width = 3 * self.shape.hidden_size + axis_length("heads", self.shape) + self.shape.intermediate_size
        return _FLOAT * self.tokens * width

    @property
    def gram_bytes(self) -> int:
        """The Gram matrix of the widest projection while it is filled."""
        return _DOUBLE * self.shape.intermediate_size**2

    @property
    def solve_bytes(self) -> int:
        """What solving holds: the Gram matrix, that of the survivors, three of the projection's size."""
        width, features = self.shape.intermediate_size, self.shape.hidden_size
        kept = round(width * (1 - RATIO))
        return self.gram_bytes + _DOUBLE * (kept**2 + 3 * width * features)

    @property
    def least_memory_bytes(self) -> int:
        """The least that ``--memory`` takes, on a CPU."""
        lengths = [self.length] * self.documents
        # A budget that is too small for anything is answered with the least.
        least = refitting(self.index, lengths, RefitSettings(anchors=0), memory_bytes=1)
        return max(scoring(self.index, lengths).least_bytes, least.least_bytes)


def shares_of(row: Row) -> Shares:
    """Return the shares that a row of the table ``walk`` shows."""
    work = Work(index_of(row["config"]), row["documents"], row["tokens"] // row["documents"])
    times = row["rounds_seconds"]
    score, refit = (
        statistics.median(each[stage] for each in times) for stage in ("score", "refit_and_write")
    )
    walk_rate = work.pass_operations / score
    walked = (work.pass_operations + work.gram_operations) / walk_rate
    solve_rate = work.solve_operations / max(refit - walked, refit / 10)
    rates = row["product_rates"]
    return Shares(walk_rate / rates["float32"], solve_rate / rates["float64"], row["hash_rate"])


def is_solved_on_device(work: Work, machine: Machine) -> bool:
    """Return whether a device has room to solve the refit beside the block that is walked."""
    return work.solve_bytes + _FLOAT * work.block_parameters <= machine.device_bytes


def stages(work: Work, machine: Machine, shares: Shares) -> dict[str, float]:
    """Return the seconds of each stage."""
    devices = machine.boxes * machine.devices
    walk_rate = devices * machine.float32_rate * shares.walk
    on_device = is_solved_on_device(work, machine)
    solve_rate = machine.float64_rate if on_device else machine.host_float64_rate
    read = work.index.num_bytes / machine.disk_rate
    layers = work.shape.num_hidden_layers
    summed = 2 * work.gram_bytes * layers / machine.network_rate if devices > 1 else 0.0
    spilled = 2 * work.spilled_bytes * layers / (machine.boxes * machine.disk_rate)
    return {
        "hash": work.index.num_bytes * (2 - RATIO) / shares.hash_rate,
        "score": work.pass_operations / walk_rate + read,
        "refit_walk": (work.pass_operations + work.gram_operations) / walk_rate + read + spilled + summed,
        "refit_solve": work.solve_operations / (solve_rate * shares.solve),
        "write": 2 * work.index.num_bytes / machine.disk_rate,
    }


def _lines(shares: Shares, documents: int, length: int) -> Iterator[str]:
    for title, config in MODELS.items():
        work = Work(index_of(config), documents, length)
        for machine in MACHINES:
            seconds = stages(work, machine, shares)
            each = " | ".join(minutes(value) for value in (*seconds.values(), sum(seconds.values())))
            place = "GPU" if is_solved_on_device(work, machine) else "CPU"
            yield f"| {title} | {machine.title} | {each} | {place} |"


def _needs(title: str, work: Work) -> str:
    on_device = work.gram_bytes + _FLOAT * work.block_parameters
    return (
        f"{title}: {gigabytes(work.index.num_bytes)} GB on disk and {gigabytes(work.spilled_bytes)} GB of "
        f"streams in the work folder; on each GPU {gigabytes(on_device)} GB for a block and its Gram matrix, "
        f"{gigabytes(work.solve_bytes)} GB to solve there; on a CPU `--memory` of at least "
        f"{gigabytes(work.least_memory_bytes)} GB."
    )


def to_markdown(row: Row, documents: int = 256, length: int = 512) -> str:
    """Render the plans from a row of the table ``walk``."""
    shares = shares_of(row)
    needs = " ".join(
        _needs(title, Work(index_of(config), documents, length)) for title, config in MODELS.items()
    )
    return (
        "| model | machine | hashing | scoring | refit: walk | refit: solving | writing | whole | "
        "solved on |\n|---|---|---:|---:|---:|---:|---:|---:|---|\n"
        + "\n".join(_lines(shares, documents, length))
        + f"\n\n{documents} documents of {length} tokens, ratio {RATIO}. Computed, not measured: operations "
        "and bytes by the shape; data-sheet rates times the measured shares of a matrix product's rate, "
        f"{shares.walk:.2f} for the walk in float32 and {shares.solve:.2f} for solving in float64. {needs}\n"
    )

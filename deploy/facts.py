"""What a deployment is made of: everything known about an artifact and the memory it needs. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sizing:
    """How much a server of an artifact holds and needs.

    ``context_tokens`` is what a prompt and its answer may have together, for each of ``parallel`` requests
    that are worked on at once; ``num_threads`` None leaves it to the engine. ``memory_bytes``, what the
    server needs, is the sum of weights, cache (keys and values of all requests) and overhead (the processes
    themselves and their work buffers); ``memory_limit_bytes`` is what to grant it. ``source`` is ``measured``
    where the overhead comes from a benchmark's peak, which ``measured_in`` names, ``planned`` otherwise.
    """

    context_tokens: int
    parallel: int
    num_threads: int | None
    weights_bytes: int
    cache_bytes: int
    overhead_bytes: int
    memory_bytes: int
    memory_limit_bytes: int
    source: str
    measured_in: str | None = None

    @property
    def memory_limit_mib(self) -> int:
        """The limit in MiB; it is a whole number of them."""
        return self.memory_limit_bytes // 2**20


@dataclass(frozen=True)
class Facts:
    """An artifact as the targets see it.

    ``name`` is fit for files, units and resources (lower-case ASCII letters, digits and hyphens, at most 40,
    a letter first); ``model`` is what clients call it, any printable text. ``format`` is ``gguf``, ``onnx``
    or ``vllm``, ``artifact_name`` the file's or folder's own name; ``sha256`` has the hash of every file of
    the artifact by its path in it, of a single file by its name. ``license`` is as the model states it,
    ``source`` the model it was made from, ``expert`` what it is an expert for. ``adds_bos`` says whether the
    engine puts ``bos_token`` before every prompt by itself. ``sampling`` has the model's own defaults, such
    as ``temperature``. ``versions`` are those of the packages that serve it, installed where this was made.
    ``original`` is an artifact to be served beside for comparison.
    """

    name: str
    model: str
    format: str
    artifact_name: str
    artifact_is_folder: bool
    artifact_bytes: int
    sha256: Mapping[str, str]
    engine: str
    license: str | None
    source: str | None
    expert: str | None
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    stop_strings: tuple[str, ...]
    system_prompt: str | None
    context_limit: int
    cusprun_version: str
    versions: Mapping[str, str]
    sizing: Sizing
    adds_bos: bool = False
    sampling: Mapping[str, float] = field(default_factory=dict)
    original: Facts | None = None

    @property
    def memory_limit_mib(self) -> int | None:
        """The MiB to grant; None where no number is known: what vLLM plans was measured without a GPU."""
        is_known = self.format != "vllm" or self.sizing.source == "measured"
        return self.sizing.memory_limit_mib if is_known else None


@dataclass(frozen=True)
class Option:
    """An option of a target: ``default`` None means that there is none; ``choices`` empty takes any text."""

    name: str
    default: str | None
    about: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """Where an artifact can be put: its module, the formats it serves, and its options.

    ``beside_bytes`` is what counts there as the server's memory besides its own, by format.

    The module has ``check(facts, options)``, which refuses early what cannot be, and ``files(facts,
    options)``, which yields ``deploy.render.File``; both take every option of the target, as text or None.
    """

    name: str
    module: str
    formats: frozenset[str]
    options: tuple[Option, ...] = ()
    beside_bytes: Mapping[str, int] = field(default_factory=dict)

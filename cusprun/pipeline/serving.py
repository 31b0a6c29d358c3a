"""Serving: an artifact on the engine that suits it, behind one interface."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.errors import ExportError, ModelError, ServingError, UnsupportedModelError, UserError
from cusprun.progress import SILENT, Progress
from cusprun.resolve import StrPath, locate

if TYPE_CHECKING:
    from serve.front.run import Outcome
    from serve.front.settings import FrontSettings

log = logging.getLogger(__name__)

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
MAX_PORT = 65535
_SAY_EVERY_S = 15


@dataclass(frozen=True)
class ServeOptions:
    """Where and how to serve.

    ``keys`` are the API keys that are taken; without one only loopback is allowed, unless ``insecure``.
    ``context_tokens``, ``parallel`` and ``num_threads`` are the engine's own defaults when None; ``model`` is
    the name that clients use, the artifact's when None; ``engine_options`` are the engine's own options;
    ``drain_s`` is how long answers may go on after SIGTERM.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    keys: tuple[str, ...] = ()
    insecure: bool = False
    context_tokens: int | None = None
    parallel: int | None = None
    num_threads: int | None = None
    model: str | None = None
    engine_options: tuple[str, ...] = ()
    trust_remote_code: bool = False
    drain_s: float = 30.0
    show_engine_log: bool = False

    def __post_init__(self) -> None:
        for name in ("context_tokens", "parallel", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.port <= MAX_PORT:
            raise UserError(f"the port must be from 0 to {MAX_PORT}, not {self.port}")
        if not self.drain_s >= 0:
            raise UserError(f"the drain must be at least 0 s, not {self.drain_s}")
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in self.keys):
            raise UserError("an API key must be printable ASCII without spaces, and not empty")


def serve(
    artifact: StrPath,
    options: ServeOptions | None = None,
    *,
    engine: str | None = None,
    draft: StrPath | None = None,
    ready: Callable[[str], None] = log.info,
    progress: Progress = SILENT,
) -> None:
    """Serve an artifact behind OpenAI's interface until SIGINT or SIGTERM.

    ``artifact`` is a GGUF file, an ONNX folder, or a model folder (exported for vLLM or not); ``engine`` is
    chosen by its kind when None. ``draft`` is an artifact of the same kind with the same tokenizer whose
    model guesses tokens that the artifact's model checks: the answers are the model's own. ``ready`` gets
    one line once requests are answered.

    Raises:
        UserError: an option cannot be, the port is in use, or the draft does not fit.
        ModelError: the artifact is missing, damaged, or refused by the engine.
        MissingDependencyError: no engine for the artifact is installed.
        ServingError: the engine ended by itself, or answers were cut off at the end of the drain.
    """
    asked = options or ServeOptions()
    path = locate(artifact, progress).path
    kind = kind_of(path)
    from serve.engines.protocol import EngineSettings
    from serve.engines.registry import ENGINES, choose

    name = choose(kind, engine)
    drafting = None if draft is None else _draft(path, kind, name, draft, progress)
    refuse_open_door(asked)
    _refuse_ranks(path, name, asked.engine_options)
    from serve.front.app import Front, build_app
    from serve.front.run import bind, serve_until_signal

    model = asked.model or (path.stem if path.is_file() else path.resolve().name)
    settings = EngineSettings(
        path,
        model,
        asked.context_tokens,
        asked.parallel,
        drafting,
        asked.num_threads,
        asked.engine_options,
        asked.trust_remote_code,
        echo=show_output if asked.show_engine_log else None,
        waiting=Waiting(name),
    )
    with bind(asked.host, asked.port) as taken:
        with progress.stage(f"starting {name}", 1) as advance:
            running = ENGINES[name].load().start(settings)
            advance(1)
        try:
            wanted = front_settings(asked, model, running.context_tokens)
            front = Front(running.backend, wanted)
            address = address_of(asked.host, taken.getsockname()[1])
            outcome = serve_until_signal(
                build_app(front),
                (front,),
                taken,
                asked.drain_s,
                lambda: ready(f"serving {model} with {running.name} on {address}/v1"),
            )
        finally:
            running.close()
    raise_unless_served(outcome, str(path), asked)


def front_settings(options: ServeOptions, model: str, context_tokens: int | None) -> FrontSettings:
    """Return how the front of one model behaves."""
    from serve.front.hosts import is_loopback
    from serve.front.settings import FrontSettings

    return FrontSettings(model, options.keys, context_tokens, is_loopback(options.host))


def raise_unless_served(outcome: Outcome, what: str, options: ServeOptions) -> None:
    """Raise ``ServingError`` when serving ended otherwise than asked."""
    if outcome.failure:
        raise ServingError(f"{what}: {outcome.failure}; start it again, or with --engine-log to see more")
    if outcome.num_cut_off:
        raise ServingError(
            f"{outcome.num_cut_off} answers were cut off by the end of the drain ({options.drain_s:g} s) or "
            "a second signal; give a longer --drain"
        )


def kind_of(path: Path) -> str:
    """Return the kind of an artifact: ``gguf``, ``onnx`` or ``folder``.

    Raises:
        ModelError: it is none of them.
    """
    if path.is_file():
        return "gguf"
    if (path / "genai_config.json").is_file():
        return "onnx"
    if (path / "config.json").is_file():
        return "folder"
    raise ModelError(
        f"{path} is no model folder: it has neither config.json nor genai_config.json; give what cusprun "
        "export wrote"
    )


def address_of(host: str, port: int) -> str:
    """Return the URL of a host and port."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Waiting:
    """Says now and then that an engine is still starting."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._said = 0

    def __call__(self, seconds: float) -> None:
        if seconds >= self._said + _SAY_EVERY_S:
            self._said = int(seconds)
            log.info("note: %s is starting, %d s so far", self._engine, self._said)


def show_output(piece: bytes) -> None:
    """Pass on what an engine prints."""
    import sys

    sys.stderr.buffer.write(piece)
    sys.stderr.buffer.flush()


def refuse_open_door(options: ServeOptions) -> None:
    """Raise ``UserError`` when other machines could ask without a key and that was not asked for."""
    from serve.front.hosts import is_loopback

    if not is_loopback(options.host) and not options.keys and not options.insecure:
        raise UserError(
            f"{options.host} is open to other machines and there is no API key; give --api-key-file, set "
            "CUSPRUN_API_KEY, or say --insecure"
        )


def _refuse_ranks(path: Path, engine: str, options: Sequence[str]) -> None:
    """Raise ``UserError`` for a tensor-parallel size that does not divide the model, with those that do."""
    from serve.engines.options import value_of

    wanted = value_of(options, ("--tensor-parallel-size", "-tp")) if engine == "vllm" else None
    if wanted is None:
        return
    from cusprun.checkpoint.index import open_checkpoint
    from exporters.vllm_support import tensor_parallel_sizes

    try:
        sizes = tensor_parallel_sizes(open_checkpoint(path))
    except (UnsupportedModelError, ExportError):
        return  # vLLM serves more families than cusprun prunes, and checks for itself
    if wanted not in map(str, sizes):
        raise UserError(
            f"{path} cannot be divided by a tensor-parallel size of {wanted or 'nothing'}; the sizes that "
            f"divide its heads and widths: {', '.join(map(str, sizes))}"
        )


def _draft(path: Path, kind: str, engine: str, draft: StrPath, progress: Progress) -> Path:
    """Return the path of a draft that fits; raises ``UserError`` for one that does not."""
    from serve.engines.registry import ENGINES

    if not ENGINES[engine].drafts:
        able = ", ".join(name for name, entry in ENGINES.items() if entry.drafts)
        raise UserError(f"the engine {engine!r} takes no draft model; those that do: {able}")
    found = locate(draft, progress).path
    if kind_of(found) != kind:
        raise UserError(f"the draft {found} must be a {kind} artifact like {path}; export it to that")
    if _tokens_of(found, kind) != _tokens_of(path, kind):
        raise UserError(
            f"the draft {found} has another tokenizer than {path}; an expert made from that very model has "
            "the same one"
        )
    return found


def _tokens_of(path: Path, kind: str) -> object:
    """Return what tokens and their ids are, to be compared."""
    if kind == "gguf":
        from cusprun.checkpoint.gguf_header import read_gguf

        return read_gguf(path).array("tokenizer.ggml.tokens", str)
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{file} cannot be read ({error}); give the folder its tokenizer") from None

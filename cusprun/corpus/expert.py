"""Reading ``EXPERT.yaml``: what the expert is for and where its documents come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cusprun.corpus.packs import pack_names
from cusprun.corpus.templates import ROLES, Parts, parse_template, require_fields
from cusprun.corpus.yaml_tree import Check, Section, Value, read_yaml
from cusprun.errors import nearest
from cusprun.paths import expand_home
from cusprun.records import DIMENSIONS, Augment, Expert, Source

_PACK_PREFIX = "pack:"
_KINDS = ("path", "dataset", "pack")
_BELONGS_TO: dict[str, tuple[str, ...]] = {
    "config": ("dataset",),
    "split": ("dataset",),
    "template": ("path", "dataset"),
}
"""The options that only some kinds of source have."""

_MOST_DOCUMENTS = 100_000
"""Generated documents: more take days on any machine that this runs on."""


def load_expert(path: Path) -> Expert:
    """Read an expert from a YAML file; paths in it are relative to its folder and come back absolute.

    Raises:
        ConfigError: the file is missing or has faults; all of them, each with file and line.
    """
    root = read_yaml(path)
    folder = path.absolute().parent
    defaults = Expert(name="", dimensions={})
    name = root.take("name", str, path.stem, _not_blank)
    dimensions = {}
    for dimension in DIMENSIONS:
        section = root.section(dimension)
        if section is not None:
            dimensions[dimension] = _sources(section, folder)
    if not dimensions:
        root.fault(None, f"an expert names at least one of {', '.join(DIMENSIONS)}, each with 'sources'")
    general = root.section("general")
    expert = Expert(
        name=name,
        dimensions=dimensions,
        general=() if general is None else _sources(general, folder),
        held_out=root.take("held_out", float, defaults.held_out, _share),
        max_tokens=root.take("max_tokens", int, defaults.max_tokens, _at_least(2)),
        seed=root.take("seed", int, defaults.seed, _at_least(0)),
        augment=_augment(root),
    )
    root.finish()
    return expert


def _not_blank(value: str) -> str:
    return "" if value.strip() else "must not be blank"


def _share(value: float) -> str:
    return "" if 0 < value <= 0.5 else f"must be above 0 and at most 0.5, not {value:g}"


def _at_least(least: int) -> Check:
    return lambda value: "" if value >= least else f"must be at least {least}, not {value}"


def _between(least: float, most: float) -> Check:
    return lambda value: (
        "" if least <= value <= most else f"must be at least {least:,} and at most {most:,}, not {value:g}"
    )


def _augment(root: Section) -> Augment | None:
    section = root.section("augment")
    if section is None:
        return None
    defaults = Augment(documents=1)
    return Augment(
        documents=section.require("documents", int, 1, _between(1, _MOST_DOCUMENTS)),
        temperature=section.take("temperature", float, defaults.temperature, _between(0, 2)),
        max_new_tokens=section.take("max_new_tokens", int, defaults.max_new_tokens, _at_least(1)),
        prompt_tokens=section.take("prompt_tokens", int, defaults.prompt_tokens, _at_least(1)),
    )


def _sources(section: Section, folder: Path) -> tuple[Source, ...]:
    section.require_one(("sources",))
    value = section.value("sources")
    if value is None:
        return ()
    items = value.items()
    if value.is_list and not items:
        value.fault("'sources' must name at least one source")
    return tuple(_source(item, folder) for item in items)


def _source(value: Value, folder: Path) -> Source:
    if value.is_text:
        return _source_from_text(value)
    section = value.section()
    kinds = section.require_one(_KINDS)
    for key, owners in _BELONGS_TO.items():
        if section.has(key) and len(kinds) == 1 and kinds[0] not in owners:
            section.fault(key, f"{key!r} belongs to a {' or '.join(owners)}, not to a {kinds[0]}")
    path = section.take("path", str, None, _not_blank)
    template = section.value("template")
    return Source(
        path=None if path is None else str(folder / expand_home(path)),
        dataset=section.take("dataset", str, None, _not_blank),
        pack=section.take("pack", str, None, _known_pack),
        config=section.take("config", str, None, _not_blank),
        split=section.take("split", str, None, _not_blank),
        template=None if template is None else _template(template),
        limit=section.take("limit", int, None, _at_least(1)),
    )


def _source_from_text(value: Value) -> Source:
    text = value.scalar(str, "")
    if not text.startswith(_PACK_PREFIX):
        value.fault(f"{text!r} is not a source; write {{path: {text}}}, {{dataset: ID}} or 'pack:lang/en'")
        return Source()
    name = text.removeprefix(_PACK_PREFIX).strip()
    wrong = _known_pack(name)
    if wrong:
        value.fault(f"{value.name!r} {wrong}")
    return Source(pack=name)


def _known_pack(name: str) -> str:
    names = pack_names()
    hint = nearest(name, names) or f" (known: {', '.join(names)})"
    return "" if name in names else f"names the unknown pack {name!r}{hint}"


def _template(value: Value) -> Any:
    """Return a text template, or a list of ``{role, content}``; faults are noted."""
    if value.is_text:
        text = value.scalar(str, "")
        _require_fields(value, [_parts(value, text)])
        return text
    if not value.is_list:
        # Unquoted, YAML reads {question} as a mapping.
        value.fault("'template' must be text in quotes, like '{text}', or a list of {role, content} messages")
        return None
    messages, parsed = [], []
    for item in value.items():
        section = item.section()
        role = section.require("role", str, None, _role)
        content = section.require("content", str, None)
        parsed.append(None if content is None else _parts(section.value("content") or item, content))
        messages.append({"role": role, "content": content})
    _require_fields(value, parsed)
    return messages


def _role(role: str) -> str:
    return "" if role in ROLES else f"must be one of {', '.join(ROLES)}, not {role!r}"


def _parts(value: Value, text: str) -> Parts | None:
    try:
        return parse_template(text)
    except ValueError as error:
        value.fault(str(error))
        return None


def _require_fields(value: Value, templates: list[Parts | None]) -> None:
    sound = [parts for parts in templates if parts is not None]
    if len(sound) < len(templates):
        return
    try:
        require_fields(sound)
    except ValueError as error:
        value.fault(str(error))

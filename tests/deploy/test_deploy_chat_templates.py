"""Chat templates in Go's language: the evaluator against the language's words, templates against Jinja."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from deployable import CHATML, facts_of
from hypothesis import given
from hypothesis import strategies as st

from cusprun.errors import UserError
from cusprun.records import Message
from deploy import ollama
from deploy.chat_pieces import InexpressibleError, renderer
from deploy.go_template import evaluate, quoted
from serve.runtimes.chat_template import render_template

DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful \"{{ .System }}\"<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MERGED_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set lead = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set lead = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}"
    "{{ (lead if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
BOS_EVERY_TURN = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set s = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set s = false %}{% endif %}{% for m in turns %}"
    "{% if loop.first and s %}{% set c = '<<SYS>>\n' + s + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set c = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + c + ' [/INST]' }}"
    "{% else %}{{ ' ' + c + ' ' + eos_token }}{% endif %}{% endfor %}"
)
EOS_WITHOUT_GENERATION = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
EXPRESSIBLE = {
    "chatml": CHATML,
    "default-system": DEFAULT_SYSTEM,
    "llama3": LLAMA3,
    "merged-system": MERGED_SYSTEM,
    "no-system": NO_SYSTEM,
    "bos-every-turn": BOS_EVERY_TURN,
    "eos-without-generation": EOS_WITHOUT_GENERATION,
}


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", EXPRESSIBLE.values(), ids=EXPRESSIBLE)
def test_a_template_says_what_jinja_says(template: str, adds_bos: bool) -> None:
    """Of a chat that the proof does not use, BOS left out where the engine adds it."""
    facts = facts_of(chat_template=template, adds_bos=adds_bos)
    made = ollama.chat_template(facts)
    turns = [
        ("user", "eins"),
        ("assistant", "}} two"),
        ("user", "três\n3"),
        ("assistant", "4"),
        ("user", "5"),
    ]
    messages = [Message(role, text) for role, text in turns]
    jinja = render_template(template, messages, "<s>", "<|im_end|>")
    wanted = jinja.removeprefix("<s>") if adds_bos else jinja
    assert ollama.said(made, turns) == wanted


def test_gos_own_library_says_what_jinja_says(tmp_path: Path) -> None:
    """kubectl prints an object by Go's text/template, which is what Ollama renders with."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    mark = "=/=/="
    data: dict[str, object] = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}}
    whole, wanted = "", []
    for number, template in enumerate(EXPRESSIBLE.values()):
        facts = facts_of(chat_template=template, adds_bos=bool(number % 2))
        own = renderer(facts)
        chats = [
            turns for turns in ollama.conversations()[::5] if template != NO_SYSTEM or turns[0][0] == "user"
        ]
        data[f"T{number}"] = [
            {
                "System": "".join(text for role, text in turns if role == "system"),
                "Messages": [{"Role": role, "Content": text} for role, text in turns],
            }
            for turns in chats
        ]
        whole += f'{{{{ range .T{number} }}}}{ollama.chat_template(facts)}{{{{ "{mark}" }}}}{{{{ end }}}}'
        wanted += [own(turns) for turns in chats]
    (tmp_path / "object.json").write_text(json.dumps(data))
    (tmp_path / "template").write_text(whole)
    done = subprocess.run(
        [kubectl, "annotate", "--local", "--filename", "object.json", "a=b",
         "--output", "go-template-file=template"],
        cwd=tmp_path, capture_output=True, check=False, env={"HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = done.stdout.decode().split(mark)[:-1]
    assert len(found) > 30
    assert found == wanted


def test_the_proof_holds_ten_conversations_for_a_template_that_takes_no_system_text_too() -> None:
    chats = ollama.conversations()
    without = [chat for chat in chats if chat[0][0] != "system"]
    assert len(without) >= ollama.NUM_PROVEN
    assert all(chat[-1][0] == "user" for chat in chats)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        ("{{ strftime_now('%Y') }}" + CHATML, "writes the date"),
        (CHATML.replace("m['content']", "m['content'] | upper"), "changes its text"),
        (CHATML.replace("{{ m['role'] }}", "{{ loop.index }} {{ m['role'] }}"), "cannot be said"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == "
            "'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
            "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}",
            "You are terse",
        ),
        ("{{ messages[-1].content }}", "once and in order"),
        ("{{ raise_exception('never') }}", "never"),
    ],
    ids=["none", "date", "upper", "numbered", "system-last", "last-only", "raises"],
)
def test_what_cannot_be_said_is_refused_with_the_reason(template: str | None, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        ollama.check(facts_of(chat_template=template), {"system": None})


def test_a_wrong_piece_is_found_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ollama, "write", lambda pieces: "{{- range $i, $m := .Messages }}{{ .Content }}{{ end }}"
    )
    with pytest.raises(InexpressibleError, match="cannot be said"):
        ollama.chat_template(facts_of())


VALUES = {
    "System": "sys",
    "Messages": [{"Role": "user", "Content": "a"}, {"Role": "assistant", "Content": "b"}],
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        # https://pkg.go.dev/text/template, "Text and spaces"
        ('{{"23"}} < {{"45"}}', "23 < 45"),
        ('{{"23"}}\n {{- " < " }} {{ "45"}}', "23 <  45"),
        ("{{ .System }}\n{{- if .System }} yes {{ else }} no {{ end }}", "sys yes "),
        ("{{ if not .System }}a{{ else if eq .System \"sys\" }}b{{ else }}c{{ end }}", "b"),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Role }}{{ .Content }}{{ $.System }};{{ end }}",
         "0userasys;1assistantbsys;"),
        ("{{ range $i, $m := .Messages }}{{ if gt $i 0 }}{{ if eq .Role \"user\" }}x{{ else }}y{{ end }}"
         "{{ end }}{{ end }}.", "y."),
        (r'{{ "a\nb\u0022\\ }}" }}', 'a\nb"\\ }}'),
    ],
)  # fmt: skip
def test_the_evaluator_does_as_the_language_says(template: str, text: str) -> None:
    assert evaluate(template, VALUES) == text


@pytest.mark.parametrize(
    "template", ["{{ .System", "{{ end }}", "{{ len .Messages }}", "{{ range .Messages }}{{ end }}"]
)
def test_the_evaluator_refuses_what_is_not_of_its_part(template: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        evaluate(template, VALUES)


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_a_literal_is_itself_and_never_ends_a_modelfile(text: str) -> None:
    template = f"{{{{ {quoted(text)} }}}}"
    assert evaluate(template, {}) == text
    assert '"""' not in template
    assert template.isprintable()  # Ollama's parser drops the rest

"""How servers start, end and refuse to start, seen from outside."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from endpoint import ROOT, serving, start
from parrot import ANSWER, CONTEXT_TOKENS, LOOP, PROMPT, Parrot
from tiny_exports import TinyConfig, make_folder, sentencepiece_tokenizer

COMPLETIONS = "/v1/completions"


def refused(*arguments: str, **variables: str) -> str:
    """Return the one line that a server says which does not start, by the user's fault."""
    process = start(arguments, variables)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output
    return line


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def gguf(artifacts: dict[str, Path]) -> str:
    return str(artifacts["llamacpp"])


def test_sigterm_finishes_answers_and_refuses_further_ones(artifacts: dict[str, Path]) -> None:
    with serving(gguf(artifacts), "--context", str(CONTEXT_TOKENS)) as endpoint:
        connection = endpoint.connect()
        body = {"prompt": LOOP, "temperature": 0, "max_tokens": CONTEXT_TOKENS - 8, "stream": True}
        connection.request("POST", COMPLETIONS, json.dumps(body))
        answer = connection.getresponse()
        first = answer.readline()
        endpoint.process.send_signal(signal.SIGTERM)
        text = (first + answer.read()).decode()
        assert text.rstrip().endswith("data: [DONE]")
        assert endpoint.process.wait(timeout=60) == 0


def test_answers_that_outlast_the_drain_are_counted(artifacts: dict[str, Path]) -> None:
    with serving(gguf(artifacts), "--drain", "0") as endpoint:
        connection = endpoint.connect()
        connection.putrequest("POST", COMPLETIONS)
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"{")  # the rest never comes
        while endpoint.under_way() == 0:
            assert endpoint.process.poll() is None
        assert endpoint.terminate() == 3
        assert "1 answers were cut off" in "".join(endpoint.output)


def test_engine_that_dies_ends_the_server_with_its_reason(artifacts: dict[str, Path]) -> None:
    with serving(gguf(artifacts)) as endpoint:
        children = output_of("pgrep", "-f", "^[^ ]*python[^ ]* -m serve.engines.llamacpp_child").split()
        ours = [int(pid) for pid in children if _is_below(int(pid), endpoint.process.pid)]
        assert len(ours) == 1
        os.kill(ours[0], signal.SIGKILL)
        assert endpoint.process.wait(timeout=60) == 3
        assert "llama.cpp ended with exit code 137" in "".join(endpoint.output)


def _is_below(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        pid = int(status.rpartition(")")[2].split()[1])
    return False


class TestKeys:
    def test_keys_are_asked_for_and_never_shown(self, artifacts: dict[str, Path], tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text("from-a-file\n\nanother\n", encoding="utf-8")
        options = ("--api-key", "on-the-line", "--api-key-file", str(file), "--engine-log")
        with serving(gguf(artifacts), *options, CUSPRUN_API_KEY="of-the-environment") as endpoint:
            for key in ("from-a-file", "another", "on-the-line", "of-the-environment"):
                headers = {"Authorization": f"Bearer {key}"}
                assert endpoint.request("/v1/models", headers=headers)[0] == 200
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic another"}):
                status, answer = endpoint.request("/v1/models", headers=headers)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert endpoint.request("/metrics")[0] == 401
            assert endpoint.request("/health")[0] == 200
            shown = output_of("ps", "-eo", "args", "-ww") + "".join(endpoint.output)
            assert not any(key in shown for key in ("on-the-line", "from-a-file", "of-the-environment"))

    def test_other_machines_need_a_key(self, artifacts: dict[str, Path]) -> None:
        assert "--api-key-file" in refused(gguf(artifacts), "--host", "0.0.0.0")
        with serving(gguf(artifacts), "--host", "0.0.0.0", "--insecure") as endpoint:
            assert endpoint.complete(prompt=PROMPT)[1]["choices"][0]["text"] == ANSWER

    @pytest.mark.parametrize("text", ["", "\n \n"])
    def test_file_without_a_key_is_refused(
        self, artifacts: dict[str, Path], tmp_path: Path, text: str
    ) -> None:
        (tmp_path / "keys").write_text(text, encoding="utf-8")
        assert "holds no key" in refused(gguf(artifacts), "--api-key-file", str(tmp_path / "keys"))

    def test_file_that_is_not_there_is_refused(self, artifacts: dict[str, Path], tmp_path: Path) -> None:
        line = refused(gguf(artifacts), "--api-key-file", str(tmp_path / "keys"))
        assert "cannot be read (No such file or directory)" in line


class TestRefusals:
    def test_nothing_named_and_half_a_pair(self, artifacts: dict[str, Path]) -> None:
        assert "nothing to serve" in refused("--insecure")
        assert "go together" in refused("--before", gguf(artifacts))
        assert "go together" in refused(
            "--before", gguf(artifacts), "--after", gguf(artifacts), "--name", "x"
        )

    def test_a_pair_and_an_artifact(self, artifacts: dict[str, Path]) -> None:
        pair = ("--before", gguf(artifacts), "--after", gguf(artifacts))
        assert "leave out 'another.gguf'" in refused("another.gguf", *pair)
        assert "n_bach" in refused(*pair, "--", "--n-bach", "64")

    def test_port_in_use(self, artifacts: dict[str, Path]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert f"port {port} of 127.0.0.1 is in use" in refused(gguf(artifacts), "--port", str(port))

    def test_host_of_another_machine(self, artifacts: dict[str, Path]) -> None:
        line = refused(gguf(artifacts), "--host", "192.0.2.1", "--api-key", "k")
        assert "192.0.2.1" in line

    @pytest.mark.parametrize("engine", ["llamacpp", "transformers", "onnx"])
    def test_corrupt_artifact(self, artifacts: dict[str, Path], tmp_path: Path, engine: str) -> None:
        if engine == "llamacpp":
            broken = tmp_path / "broken.gguf"
            broken.write_bytes(artifacts["llamacpp"].read_bytes()[:5000])
        else:
            broken = tmp_path / "broken"
            broken.mkdir()
            for file in artifacts[engine].iterdir():
                data = file.read_bytes()
                is_model = file.suffix in (".safetensors", ".onnx", ".data")
                (broken / file.name).write_bytes(data[:1000] if is_model else data)
        assert str(broken) in refused(str(broken), "--engine", engine)

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert "does not exist" in refused(str(tmp_path / "nothing"))
        (tmp_path / "empty").mkdir()
        assert "no model folder" in refused(str(tmp_path / "empty"))

    def test_engine_of_another_kind(self, artifacts: dict[str, Path], parrot: Parrot) -> None:
        assert "use: llamacpp" in refused(gguf(artifacts), "--engine", "vllm")
        assert "did you mean 'llamacpp'" in refused(gguf(artifacts), "--engine", "lamacpp")
        assert "use: vllm, transformers" in refused(str(parrot.folder), "--engine", "onnx")

    def test_numbers_that_cannot_be(self, artifacts: dict[str, Path]) -> None:
        for option, value in (
            ("--context", "0"),
            ("--parallel", "-1"),
            ("--port", "65536"),
            ("--drain", "-1"),
        ):
            refused(gguf(artifacts), option, value)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (("--n-batchs", "4"), "did you mean 'n_batch'"),
            (("--n-batch", "many"), "a whole number"),
            (("--port", "1"), "itself"),
            (("--speculative.draft.n-maxx", "1"), "did you mean 'n_max'"),
            (("n-batch",), "--name value"),
            (("--n-batch",), "needs a value"),
        ],
    )
    def test_engine_options(self, artifacts: dict[str, Path], options: tuple[str, ...], reason: str) -> None:
        assert reason in refused(gguf(artifacts), "--", *options)

    @pytest.mark.parametrize(
        "option", ["--trust-remote-code", "--trust-remote", "--host=0.0.0.0", "--enable_cors"]
    )
    def test_options_that_go_round_the_front(self, parrot: Parrot, option: str) -> None:
        assert "itself" in refused(str(parrot.folder), "--engine", "transformers", "--", option)

    def test_draft_with_another_tokenizer(self, artifacts: dict[str, Path], tmp_path: Path) -> None:
        from exporters import gguf as exporter

        folder = make_folder(tmp_path / "other", TinyConfig("llama"), sentencepiece_tokenizer())
        other = exporter.export(folder, tmp_path / "other.gguf", quant="f32")
        assert "another tokenizer" in refused(gguf(artifacts), "--draft", str(other))

    def test_draft_of_another_kind_or_for_an_engine_without(
        self, artifacts: dict[str, Path], parrot: Parrot
    ) -> None:
        assert "must be a gguf artifact" in refused(gguf(artifacts), "--draft", str(parrot.folder))
        line = refused(str(parrot.folder), "--engine", "transformers", "--draft", str(parrot.folder))
        assert "takes no draft" in line

    def test_missing_engine_names_the_command(self, parrot: Parrot, tmp_path: Path) -> None:
        program = (
            "import sys; sys.modules['xllamacpp'] = None; import importlib.util as u; find = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name == 'xllamacpp' else find(name, *a)\n"
            "from cusprun.cli import main; main(['serve', sys.argv[1]])"
        )
        file = tmp_path / "model.gguf"
        file.write_bytes(b"GGUF")
        command = [sys.executable, "-c", program, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 2
        assert "pip install 'cusprun[serve]'" in done.stderr


def test_draft_of_the_same_model_changes_no_answer(artifacts: dict[str, Path]) -> None:
    with serving(gguf(artifacts), "--draft", gguf(artifacts)) as endpoint:
        answer = endpoint.complete(prompt=PROMPT)[1]
        assert answer["choices"][0]["text"] == ANSWER
        assert answer["timings"]["draft_n_accepted"] > 0


def test_model_is_called_by_its_file(artifacts: dict[str, Path]) -> None:
    with serving(gguf(artifacts), "--", "--n-batch", "64", "--no_perf") as endpoint:
        assert endpoint.request("/v1/models")[1]["data"][0]["id"] == "parrot"


@pytest.mark.vllm
class TestVllm:
    def test_tensor_parallel_size_that_does_not_divide(self, parrot: Parrot) -> None:
        line = refused(str(parrot.folder), "--engine", "vllm", "--", "--tensor-parallel-size", "3")
        assert "divide its heads and widths: 1, 2, 4" in line
        assert "1, 2, 4" in refused(str(parrot.folder), "--engine", "vllm", "--", "-tp=8")

    def test_options_that_go_round_the_front(self, parrot: Parrot) -> None:
        for option in ("--api-key=x", "--trust-remote", "--host"):
            assert "itself" in refused(str(parrot.folder), "--engine", "vllm", "--", option)

    def test_draft_changes_no_answer(self, parrot: Parrot) -> None:
        folder = str(parrot.folder)
        with serving(folder, "--engine", "vllm", "--draft", folder, "--", "--enforce-eager") as endpoint:
            assert endpoint.complete(prompt=PROMPT)[1]["choices"][0]["text"] == ANSWER
            _, metrics = endpoint.request("/metrics")
            (line,) = [
                m for m in metrics.splitlines() if m.startswith("vllm:spec_decode_num_accepted_tokens_total")
            ]
            assert float(line.split()[-1]) > 0
            status, answer = endpoint.complete(prompt=PROMPT, min_p=0.1)
            assert (status, answer["error"]["param"]) == (400, "min_p")

    def test_corrupt_folder(self, parrot: Parrot, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        broken.mkdir()
        for file in parrot.folder.iterdir():
            data = file.read_bytes()
            (broken / file.name).write_bytes(data[:1000] if file.suffix == ".safetensors" else data)
        line = refused(str(broken), "--engine", "vllm")
        assert str(broken) in line


def test_requests_that_would_end_llama_cpp_are_refused(artifacts: dict[str, Path]) -> None:
    """Each of them ended it: by the memory that it takes, or by the depth of its parsers' stacks."""

    def schema(num_references: int) -> dict[str, object]:
        steps = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(num_references)}
        definitions = {**steps, f"a{num_references}": {"type": "string"}}
        return {"$ref": "#/$defs/a0", "$defs": definitions}

    def answered(num_references: int) -> dict[str, object]:
        form = {"type": "json_schema", "json_schema": {"schema": schema(num_references)}}
        return {"response_format": form}

    def tool(num_references: int) -> dict[str, object]:
        function = {"name": "f", "parameters": schema(num_references)}
        return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}

    messages = [{"role": "user", "content": PROMPT}]
    with serving(gguf(artifacts), "--context", str(CONTEXT_TOKENS)) as endpoint:
        for param, fields in (
            ("repeat_last_n", {"repeat_last_n": 2**31 - 1, "repeat_penalty": 1.5}),
            ("dry_penalty_last_n", {"dry_penalty_last_n": 2**31 - 1, "dry_multiplier": 1.0}),
            ("grammar", {"grammar": "root ::= " + "(" * 1_000_000}),
            ("grammar", {"grammar": "root ::= " + "(" * 40_000}),
            ("response_format", answered(10_000)),
            ("json_schema", {"json_schema": schema(10_000)}),
            ("tools", tool(10_000)),
            ("grammar_triggers", {"grammar_triggers": [{"type": 2, "value": "(" * 100_000}]}),
        ):
            status, answer = endpoint.request(
                "/v1/chat/completions", {"messages": messages, "max_tokens": 2, **fields}
            )
            assert (status, answer["error"]["param"]) == (400, param)
        for wrong in (
            {"tools": ["x"]},
            {"tools": [{"type": "function", "function": {}}]},
            {"reasoning_format": "x"},
            {"messages": [{"role": "assistant", "content": None, "tool_calls": "x"}]},
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        ):
            body = {"messages": messages, "max_tokens": 2, **wrong}
            assert endpoint.request("/v1/chat/completions", body)[0] == 400
        for fields in (
            {"repeat_last_n": CONTEXT_TOKENS, "repeat_penalty": 1.5},
            {"grammar": "root ::= " + "(" * 500 + '"a"' + ")" * 500},
            answered(1_800),
            tool(1_500),
        ):
            body = {"messages": messages, "max_tokens": 2, **fields}
            assert endpoint.request("/v1/chat/completions", body)[0] == 200


def test_empty_key_is_refused(artifacts: dict[str, Path]) -> None:
    assert "not empty" in refused(gguf(artifacts), "--api-key", "")
    assert "API key must" in refused(gguf(artifacts), "--api-key", "two\nkeys")

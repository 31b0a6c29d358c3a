"""The contract of docs/serve.md, the same for every engine, against real servers on a model whose answers
are known."""

from __future__ import annotations

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from endpoint import Endpoint
from parrot import ANSWER, CHAT_ANSWER, CONTEXT_TOKENS, LOOP, PROMPT, Parrot

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "Größe?"}]


def streamed_text(events: list[Any]) -> str:
    choices = [choice for event in events[:-1] for choice in event["choices"]]
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)


def finish_reason(events: list[Any]) -> str:
    return [c["finish_reason"] for e in events[:-1] for c in e["choices"] if c.get("finish_reason")][-1]


def test_models_lists_the_one_that_is_served(endpoint: Endpoint) -> None:
    status, answer = endpoint.request("/v1/models")
    assert status == 200
    assert [model["id"] for model in answer["data"]] == ["parrot"]
    assert endpoint.request("/v1/models/parrot")[1]["max_model_len"] == CONTEXT_TOKENS
    assert endpoint.request("/health")[0] == 200


def test_completion_says_the_text_and_counts_exactly(endpoint: Endpoint, parrot: Parrot) -> None:
    status, answer = endpoint.complete(prompt=PROMPT)
    assert status == 200, answer
    choice, usage = answer["choices"][0], answer["usage"]
    assert (choice["text"], choice["finish_reason"]) == (ANSWER, "stop")
    assert answer["model"] == "parrot"
    # A BOS too many would be one more; the token that ends the answer may be counted.
    assert usage["prompt_tokens"] == parrot.num_prompt_tokens
    assert usage["completion_tokens"] - parrot.num_answer_tokens in (0, 1)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_chat_applies_the_template_once(endpoint: Endpoint, parrot: Parrot) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parrot.folder)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)
    status, answer = endpoint.request(CHAT, {"messages": MESSAGES, "temperature": 0, "max_tokens": 64})
    assert status == 200, answer
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CHAT_ANSWER, "stop")
    assert choice["message"]["role"] == "assistant"
    assert answer["usage"]["prompt_tokens"] == len(prompt["input_ids"])


@pytest.mark.parametrize(
    ("route", "body", "said"),
    [(COMPLETIONS, {"prompt": PROMPT}, ANSWER), (CHAT, {"messages": MESSAGES}, CHAT_ANSWER)],
)
def test_stream_is_the_same_answer(endpoint: Endpoint, route: str, body: dict[str, Any], said: str) -> None:
    fields = {**body, "temperature": 0, "max_tokens": 64, "stream_options": {"include_usage": True}}
    events = endpoint.events(route, fields)
    assert events[-1] == "[DONE]"
    assert streamed_text(events) == said
    assert finish_reason(events) == "stop"
    whole = endpoint.request(route, {**body, "temperature": 0, "max_tokens": 64})[1]["usage"]
    usage = events[-2]["usage"]
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage[key] == whole[key]


def test_no_character_is_split(endpoint: Endpoint) -> None:
    events = endpoint.events(COMPLETIONS, {"prompt": PROMPT, "temperature": 0, "max_tokens": 64})
    pieces = [choice["text"] for event in events[:-1] for choice in event["choices"]]
    assert "\ufffd" not in "".join(pieces)
    assert any("😀" in piece for piece in pieces)


@pytest.mark.parametrize("stop", ["wn f", ["nowhere", "fox 😀"], ["own", "brown", "br"], "."])
def test_stop_that_spans_tokens_is_never_leaked(endpoint: Endpoint, stop: str | list[str]) -> None:
    first = min(ANSWER.index(text) for text in ([stop] if isinstance(stop, str) else stop) if text in ANSWER)
    expected = ANSWER[:first]
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 64, "stop": stop}
    answer = endpoint.complete(prompt=PROMPT, stop=stop)[1]["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == (expected, "stop")
    events = endpoint.events(COMPLETIONS, body)
    assert (streamed_text(events), finish_reason(events)) == (expected, "stop")


def test_limit_on_tokens_ends_an_answer(endpoint: Endpoint) -> None:
    answer = endpoint.complete(prompt=LOOP, max_tokens=5)[1]
    assert answer["choices"][0]["text"] == LOOP * 5
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5
    default = endpoint.request(COMPLETIONS, {"prompt": LOOP, "temperature": 0})[1]
    assert default["usage"]["completion_tokens"] == 16
    long = endpoint.request(CHAT, {"messages": MESSAGES, "max_completion_tokens": 2, "temperature": 0})[1]
    assert long["usage"]["completion_tokens"] == 2


def test_load_generators_may_go_on_past_the_end(endpoint: Endpoint) -> None:
    """`ignore_eos` is vLLM's; what measures servers uses it to get answers of one length."""
    status, answer = endpoint.complete(prompt=PROMPT, max_tokens=20, ignore_eos=True, repetition_penalty=1.0)
    assert status == 200, answer
    assert answer["choices"][0]["text"].startswith(ANSWER)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 20


def test_same_seed_says_the_same(endpoint: Endpoint) -> None:
    def answers(seed: int) -> set[str]:
        return {
            endpoint.complete(prompt=LOOP, temperature=1, seed=seed, max_tokens=24)[1]["choices"][0]["text"]
            for _ in range(2)
        }

    one, other = answers(1), answers(2)
    assert len(one) == len(other) == 1
    assert one != other


def test_prompt_over_the_context_is_refused_with_the_numbers(endpoint: Endpoint) -> None:
    status, answer = endpoint.complete(prompt=LOOP * 1000)
    assert status == 400
    assert answer["error"]["code"] == "context_length_exceeded"
    assert str(CONTEXT_TOKENS) in answer["error"]["message"]
    status, answer = endpoint.complete(prompt=LOOP, max_tokens=CONTEXT_TOKENS - 8)
    assert status == 200
    assert answer["choices"][0]["finish_reason"] == "length"


def test_answers_at_temperature_zero_do_not_depend_on_neighbours(endpoint: Endpoint) -> None:
    with ThreadPoolExecutor(6) as pool:
        prompts = [PROMPT, LOOP] * 6
        found = list(pool.map(lambda p: endpoint.complete(prompt=p, max_tokens=24)[1], prompts))
    texts = [answer["choices"][0]["text"] for answer in found]
    assert texts == [ANSWER, LOOP * 24] * 6


def test_client_that_leaves_frees_its_place(endpoint: Endpoint) -> None:
    leavers = [endpoint.connect() for _ in range(6)]
    body = {"prompt": LOOP, "stream": True, "max_tokens": CONTEXT_TOKENS - 8, "temperature": 0}
    for connection in leavers[:3]:
        connection.request("POST", COMPLETIONS, json.dumps(body))
        connection.getresponse().read(1)
    for connection in leavers[3:]:
        connection.request("POST", COMPLETIONS, json.dumps({**body, "stream": False}))
    for connection in leavers:
        connection.close()
    assert endpoint.complete(prompt=PROMPT)[1]["choices"][0]["text"] == ANSWER
    for _ in range(10_000):
        if endpoint.under_way() == 0:
            return
    pytest.fail("requests of clients that left are still under way")


BAD = {
    "no JSON": b"{",
    "no object": b"[1]",
    "no UTF-8": b'{"prompt": "\xff"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": 1e999}',
    "surrogate": b'{"prompt": "\\ud800"}',
    "deep": b'{"prompt": ' + b"[" * 100_000,
    "huge number": b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}",
    "prompt of a wrong type": {"prompt": {"a": 1}},
    "empty list": {"prompt": []},
    "no prompt": {},
    "negative temperature": {"prompt": "a", "temperature": -1},
    "temperature as text": {"prompt": "a", "temperature": "hot"},
    "true as a number": {"prompt": "a", "temperature": True},
    "negative tokens": {"prompt": "a", "max_tokens": -1},
    "half a token": {"prompt": "a", "max_tokens": 1.5},
    "top_p of nothing": {"prompt": "a", "top_p": 0},
    "seed of 33 bits": {"prompt": "a", "seed": 2**32},
    "thousand stops": {"prompt": "a", "stop": [str(i) for i in range(1000)]},
    "empty stop": {"prompt": "a", "stop": ""},
    "stop as a number": {"prompt": "a", "stop": 1},
    "stream as text": {"prompt": "a", "stream": "yes"},
    "unknown model": {"prompt": "a", "model": "gpt-5"},
    "stream options alone": {"prompt": "a", "stream_options": {"include_usage": True}},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_refused_and_the_server_stays(endpoint: Endpoint, case: str) -> None:
    status, answer = endpoint.request(COMPLETIONS, BAD[case])
    assert status == (404 if case == "unknown model" else 400)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["message"]
    assert endpoint.request("/health")[0] == 200


@pytest.mark.parametrize(
    "messages", [[], [{}], ["a"], [{"role": "user"}], [{"role": 1, "content": "a"}], "a"]
)
def test_bad_messages_are_refused(endpoint: Endpoint, messages: Any) -> None:
    status, answer = endpoint.request(CHAT, {"messages": messages})
    assert (status, answer["error"]["param"]) == (400, "messages")


def test_unknown_routes_and_methods_have_the_same_shape(endpoint: Endpoint) -> None:
    for route, body, status in (("/nowhere", None, 404), ("/v1/nowhere", {}, 404), (COMPLETIONS, None, 405)):
        found, answer = endpoint.request(route, body)
        assert found == status
        assert answer["error"]["message"]


def test_pages_of_other_hosts_are_refused(endpoint: Endpoint) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        status, answer = endpoint.request(COMPLETIONS, {"prompt": "a"}, headers=headers)
        assert (status, answer["error"]["type"]) == (403, "permission_error")


def test_body_over_the_limit_is_refused(endpoint: Endpoint) -> None:
    connection = endpoint.connect()
    connection.putrequest("POST", COMPLETIONS)
    connection.putheader("Content-Length", str(2**30))
    connection.endheaders()
    assert connection.getresponse().status == 413


def test_openai_client(endpoint: Endpoint) -> None:
    with openai.OpenAI(base_url=endpoint.url, api_key="none") as client:
        whole = client.chat.completions.create(model="parrot", messages=MESSAGES, temperature=0)  # type: ignore[arg-type]
        assert whole.choices[0].message.content == CHAT_ANSWER
        stream = client.chat.completions.create(
            model="parrot",
            messages=MESSAGES,  # type: ignore[arg-type]
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == CHAT_ANSWER
        assert chunks[-1].usage is not None
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="a")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_as_the_docs_show_it(endpoint: Endpoint) -> None:
    body = json.dumps({"messages": MESSAGES, "temperature": 0})
    done = subprocess.run(
        ["curl", "-s", f"{endpoint.url}/chat/completions", "-d", body], capture_output=True, check=True
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == CHAT_ANSWER

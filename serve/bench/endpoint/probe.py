"""What an endpoint takes, found out by short requests before anything is measured."""

from __future__ import annotations

import asyncio
import json

from cusprun.errors import UserError
from serve.bench.endpoint.client import Client, Clock, Limits, refusal_text
from serve.bench.endpoint.records import CHAT, COMPLETIONS, REFUSED, Endpoint, LoadOptions
from serve.bench.endpoint.transport import KEY_VARIABLE, Transport, TransportError, hide_key, read_all

_WISHES = ((True, True), (True, False), (False, True), (False, False))
"""Whether to ask for usage and to ignore the token that ends an answer, the most wanted first."""

_PROMPT = "Say something short."
_MAX_TOKENS = 8
_NO_KEY = (401, 403)
_NOT_THERE = (404, 405)
_UNFIT = (400, 404, 405, 415, 422, 500, 501)
"""Statuses with which endpoints refuse a route or a field."""


async def open_client(
    transport: Transport, url: str, options: LoadOptions, clock: Clock, key: str | None = None
) -> Client:
    """Return a client of the endpoint at the base URL ``url``, with what it was found to take.

    A short request that fails otherwise than by a refusal settles nothing and ends the search: the rows of
    the levels will say what is wrong.

    Raises:
        UserError: it cannot be reached, wants a key, lists no model, or refuses every way to ask.
    """
    model = options.model
    if model is None:
        try:
            model = await asyncio.wait_for(_first_model(transport, url, key), options.stall_s)
        except asyncio.TimeoutError:
            raise UserError(
                f"{url}/models does not answer within {options.stall_s:g} s; check that it runs, or "
                "give --model"
            ) from None
    routes = (CHAT, COMPLETIONS) if options.route is None else (options.route,)
    endpoint = Endpoint(url, model, routes[0], asks_usage=True, ignores_eos=True)
    limits = Limits(options.stall_s, options.request_limit_s)
    return await _fitting(Client(transport, endpoint, limits, clock, key), routes)


async def _fitting(first: Client, routes: tuple[str, ...]) -> Client:
    """Return the client with the first route and the most fields that the endpoint takes."""
    url = first.endpoint.url
    refusals: list[str] = []
    for route in routes:
        for asks_usage, ignores_eos in _WISHES:
            client = first.asking(route=route, asks_usage=asks_usage, ignores_eos=ignores_eos)
            seen = await client.ask(_PROMPT, _MAX_TOKENS)
            if seen.http_status in _NO_KEY:
                raise UserError(_no_entry(url, str(seen.reason)))
            if seen.http_status is None and seen.failure == REFUSED:
                raise UserError(_no_way(url, str(seen.reason)))
            if seen.http_status not in _UNFIT:
                return client
            refusals.append(f"{route}: {seen.reason}")
            if seen.http_status in _NOT_THERE:
                break
    said = "; ".join(dict.fromkeys(refusals))
    raise UserError(f"{url} refuses to answer ({said}); check the URL and the model")


async def _first_model(transport: Transport, url: str, key: str | None) -> str:
    try:
        async with transport.get("/models") as answer:
            status, body = answer.status, hide_key(await read_all(answer), key)
    except TransportError as error:
        raise UserError(_no_way(url, str(error))) from None
    if status in _NO_KEY:
        raise UserError(_no_entry(url, refusal_text(status, body)))
    try:
        name = json.loads(body)["data"][0]["id"] if status == 200 else None
    except (ValueError, LookupError, TypeError, RecursionError):
        name = None
    if not isinstance(name, str) or not name:
        raise UserError(f"{url}/models names no model (status {status}); check the URL, or give --model")
    return name


def _no_entry(url: str, reason: str) -> str:
    return f"{url} lets nobody in without its key ({reason}); give it by ${KEY_VARIABLE} or --api-key"


def _no_way(url: str, reason: str) -> str:
    return f"{url} cannot be reached ({reason}); check the URL and that it runs"

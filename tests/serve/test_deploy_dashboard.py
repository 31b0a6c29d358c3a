"""The dashboard and the autoscaler ask for nothing that a server does not export."""

from __future__ import annotations

import json
import re

import pytest
from endpoint import Endpoint

from deploy import dashboard

_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"')
_LABELS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)|\{[^}]*\}|\[[^\]]*\]")
_NAME = re.compile(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?!\s*\(|[\w:])")
_OPERATORS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


def metrics_in(expression: str) -> set[str]:
    """Return the metrics of a PromQL expression: names before no parenthesis, labels and ranges apart."""
    bare = _LABELS.sub(" ", _STRINGS.sub(" ", expression))
    return {name for name in _NAME.findall(bare) if name.lower() not in _OPERATORS}


def exported(text: str) -> dict[str, set[str]]:
    """Return the labels of each series in Prometheus' text format, by its name."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            match = re.match(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? [^ ]+$", line)
            assert match, line
            labels = re.findall(r'(\w+)="', match[2] or "")
            found.setdefault(match[1], set()).update(labels)
    return found


def test_metrics_in_expressions() -> None:
    assert metrics_in('sum by (instance) (rate(a:b_total{job="c d"}[$__rate_interval]))') == {"a:b_total"}
    assert metrics_in("histogram_quantile(0.95, sum by (le) (rate(x_bucket[5m]))) / y") == {"x_bucket", "y"}


def test_every_query_is_about_what_the_engine_exports(
    endpoint: Endpoint, request: pytest.FixtureRequest
) -> None:
    engine = request.node.callspec.params["endpoint"]
    if engine not in dashboard.ENGINES:
        pytest.skip(f"no format is deployed on {engine}")
    assert endpoint.complete(prompt="The")[0] == 200  # requests are counted once one has ended
    status, text = endpoint.request("/metrics")
    assert status == 200
    series = exported(text)
    match = dashboard.of_pods("space", "expert")
    plain = json.loads(dashboard.json_bytes(engine, "model", "space/expert", match))
    expressions = [target["expr"] for panel in plain["panels"] for target in panel["targets"]]
    assert len(expressions) >= 5
    for expression in [*expressions, dashboard.QUEUE_METRICS[engine]]:
        names = metrics_in(expression)
        assert expression.count(match) == len(names) or expression in dashboard.QUEUE_METRICS.values()
        assert names, expression
        for name in names:
            assert name in series, f"{engine} does not export {name}"
            assert not name.endswith("_bucket") or "le" in series[name]
    assert "status" in series["cusprun_requests_total"]


@pytest.mark.parametrize("engine", sorted(dashboard.ENGINES))
def test_panels_do_not_overlap_and_have_a_source(engine: str) -> None:
    plain = json.loads(dashboard.json_bytes(engine, 'a "name"', "here"))
    assert plain["title"] == 'cusprun: a "name"'
    taken: set[tuple[int, int]] = set()
    for panel in plain["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24, "Grafana's grid has 24 columns"
        taken |= cells
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {dashboard.DATASOURCE_UID}
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
    assert len({panel["id"] for panel in plain["panels"]}) == len(plain["panels"])


def test_a_dashboard_in_a_cluster_is_about_its_own_pods() -> None:
    """And stands in one Grafana beside others."""
    match = dashboard.of_pods("space", "my-expert")
    pattern = re.search('pod=~"([^"]+)"', match)
    assert pattern
    own = ("my-expert-6d4cf56db6-x2z9q", "my-expert-predictor-7b9f8c-abcde")
    others = ("my-expert-2-6d4cf56db6-x2z9q", "their-my-expert-6d4cf56db6-x2z9q", "my-expert-loader")
    assert [bool(re.fullmatch(pattern[1], name)) for name in (*own, *others)] == [True] * 2 + [False] * 3
    uids = {
        json.loads(dashboard.json_bytes("onnx", "model", place))["uid"] for place in ("a/x", "b/x", "a/y")
    }
    assert len(uids) == 3
    assert max(map(len, uids)) <= 40, "Grafana's longest"

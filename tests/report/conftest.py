"""The pages that several tests look at, rendered once: drawing takes seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import report_fixtures as made

from cusprun.pipeline.report import build_page
from serve.report.page import render
from serve.report.view import Page

EVIL = "<script>alert(1)</script></style><img src=x onerror=alert(2)>\"'&{{ 7*7 }}\x00\ud800"


@pytest.fixture(scope="session")
def page() -> Page:
    return build_page(made.everything())


@pytest.fixture(scope="session")
def html(page: Page) -> str:
    pytest.importorskip("matplotlib")
    return render(page)


@pytest.fixture(scope="session")
def evil_page() -> Page:
    sample = replace(made.SAMPLE, prompt=EVIL, before=EVIL, after=EVIL, reference=EVIL, dimension=EVIL)
    suite = replace(made.suite(), library=EVIL, noise=(EVIL,))
    first, second = made.eval_report().models
    run = made.run_report(
        source=EVIL,
        expert=EVIL,
        samples=(sample,),
        bench=made.bench_report(suite),
        quality=replace(
            made.eval_report(), expert=EVIL, models=(replace(first, model=EVIL), replace(second, model=EVIL))
        ),
        parity=(made.parity_report(artifact=EVIL),),
    )
    manifest = made.manifest(source=EVIL, expert=replace(made.manifest().expert, name=EVIL))
    found = [one for one in made.everything(run) if one.kind.name not in ("manifest", "sweep")]
    return build_page([*found, *made.results(manifest=manifest)])


@pytest.fixture(scope="session")
def evil_html(evil_page: Page) -> str:
    pytest.importorskip("matplotlib")
    return render(evil_page)

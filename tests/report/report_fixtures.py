"""Results of a believable expert, built in code: a 30-layer model that lost a third of its FFN channels."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from cusprun.codec import Indices
from cusprun.pipeline.curve import CurvePoint, SweepReport
from cusprun.pipeline.curve_quality import CurveQuality
from cusprun.pipeline.frontier import FrontierPoint, Speed, SpeedOptions
from cusprun.pipeline.reporting.inputs import Result
from cusprun.pipeline.reporting.kinds import KINDS
from cusprun.pipeline.results import ArtifactFile, RunReport
from cusprun.pipeline.samples import SampleAnswer
from cusprun.pruning.overlap import ComparedDimension, KindOverlap, LayerOverlap, OverlapReport
from cusprun.quality.report import CorpusQuality, Estimate, EvalReport, ModelQuality, TaskQuality
from cusprun.records import (
    Candidate,
    Expert,
    LayerPlan,
    LayerRefit,
    Manifest,
    NeuronLayer,
    NeuronManifest,
    NeuronPlan,
    Plan,
    Shape,
    Source,
)
from exporters.parity_records import Limits, LogitParity, ParityReport, TextParity
from serve.bench.endpoint.records import (
    Endpoint,
    EndpointReport,
    Level,
    LevelResult,
    LevelRun,
    LevelSummary,
    LoadComparison,
    LoadOptions,
    Quantiles,
    RequestRecord,
)
from serve.bench.records import (
    Artifact,
    BenchOptions,
    BenchReport,
    Bound,
    Comparison,
    Environment,
    Interval,
    LostRun,
    Roofline,
    Run,
    Suite,
)
from serve.bench.table import Row, Table

LAYERS, WIDTH, KEPT_WIDTH = 30, 1536, 1024
BEFORE = Shape(LAYERS, 576, WIDTH, 9, 3, 64, 49152, True)
AFTER = replace(BEFORE, intermediate_size=KEPT_WIDTH)
SOURCE, NAME = "HuggingFaceTB/SmolLM2-135M-Instruct", "maths-en"
HASH = {name: (name * 11)[:64].ljust(64, "0") for name in "abcdef"}


def plan() -> Plan:
    draws = random.Random(0)

    def layer(number: int) -> LayerPlan:
        # Channels of the second half go more often, so that the picture shows something.
        weights = [draws.random() * (1.6 if k < WIDTH // 2 else 1.0) for k in range(WIDTH)]
        kept = sorted(range(WIDTH), key=lambda k: -weights[k])[:KEPT_WIDTH]
        return LayerPlan(Indices(range(3)), Indices(range(9)), Indices(kept))

    return Plan(
        model_hash=HASH["a"],
        store_hash=HASH["b"],
        rule="surgeon",
        ratio=0.25,
        budget="25% of the decoder blocks' parameters",
        block_ratio=0.25,
        total_ratio=0.1973,
        targets=("gguf:q8_0", "onnx:int4", "vllm:tp1"),
        units=("ffn_channel", "query_head", "kv_group"),
        before=BEFORE,
        after=AFTER,
        reasons=(
            "attention is dear here: a KV group costs 4 times what the same parameters of the FFN cost",
        ),
        candidates=(Candidate(30, 3, 9, 1024, 0.25, 0.0312), Candidate(30, 2, 6, 1280, 0.26, 0.0741)),
        ffn_thresholds=(0.1,) * LAYERS,
        kept_blocks=Indices(range(LAYERS)),
        layers=tuple(layer(number) for number in range(LAYERS)),
        content_hash=HASH["c"],
    )


def manifest(**changes: Any) -> Manifest:
    draws = random.Random(1)
    refit = tuple(
        LayerRefit(layer, projection, error := 0.02 + 0.004 * layer * draws.random(), error * 0.45, 1e-3)
        for layer in range(LAYERS)
        for projection in ("down_proj",)
    )
    made = Manifest(
        cusprun_version="0.1.0",
        created="2026-11-26T09:10:00+00:00",
        source=SOURCE,
        source_hash=HASH["a"],
        model_hash=HASH["d"],
        expert=Expert(
            name=NAME,
            dimensions={
                "language": (Source(pack="lang/en"),),
                "domain": (Source(pack="domain/maths-en"), Source(path="school-exams.jsonl", limit=400)),
                "task": (Source(pack="task/worked-answers-en"),),
            },
            general=(Source(pack="general/en", limit=24),),
        ),
        corpus_hash=HASH["e"],
        calibration_documents=140,
        calibration_tokens=39_767,
        held_out_documents=32,
        rule="surgeon",
        refit=refit,
        plan=plan(),
        parameters_before=134_515_008,
        parameters_after=107_972_928,
        seconds={"score": 96.53, "plan": 0.19, "refit_and_write": 144.94},
        versions={"python": "3.11.7", "torch": "2.13.0", "transformers": "5.24.0"},
        measurements={
            "held_out": {"perplexity_before": 17.89, "perplexity_after": 18.61, "perplexity_ratio": 1.0402}
        },
    )
    return replace(made, **changes)


def neuron_manifest(**changes: Any) -> NeuronManifest:
    gone = {"query_row": Indices(range(144)), "ffn_channel": Indices(range(384))}
    layer = NeuronLayer(gone, {"query_row": 0.1, "ffn_channel": 0.2})
    made = manifest()
    found = NeuronManifest(
        cusprun_version=made.cusprun_version,
        created=made.created,
        source=SOURCE,
        source_hash=HASH["a"],
        model_hash=HASH["d"],
        expert=made.expert,
        corpus_hash=made.corpus_hash,
        calibration_documents=140,
        calibration_tokens=39_767,
        held_out_documents=32,
        rule="paper",
        ratio=0.25,
        relevant=False,
        counts=({kind: len(rows) for kind, rows in gone.items()},) * LAYERS,
        plan=NeuronPlan(HASH["a"], HASH["b"], "paper", 0.25, False, 0, (layer,) * LAYERS),
        parameters=134_515_008,
        zeroed_parameters=26_542_080,
        seconds={"score": 96.53},
        versions=made.versions,
        measurements={
            "held_out": {"perplexity_before": 17.89, "perplexity_after": 18.61, "perplexity_ratio": 1.0402}
        },
    )
    return replace(found, **changes)


METRICS = (
    ("load_time_ms", "Load time", "ms", "lower", 113.2, 0.93, 0.08),
    ("time_to_first_token_ms@128", "Time to first token", "ms", "lower", 191.3, 0.79, 0.02),
    ("time_to_first_token_ms@512", "Time to first token", "ms", "lower", 783.0, 0.78, 0.02),
    ("prompt_tokens_per_second@128", "Prompt processing", "tokens/s", "higher", 669.1, 1.27, 0.02),
    ("prompt_tokens_per_second@512", "Prompt processing", "tokens/s", "higher", 653.7, 1.28, 0.02),
    ("decode_tokens_per_second@128", "Decode speed", "tokens/s", "higher", 86.2, 1.22, 0.012),
    ("decode_tokens_per_second@512", "Decode speed", "tokens/s", "higher", 83.0, 1.21, 0.012),
    ("inter_token_latency_p50_ms@512", "Inter-token latency, p50", "ms", "lower", 11.9, 0.83, 0.015),
    ("inter_token_latency_p90_ms@512", "Inter-token latency, p90", "ms", "lower", 12.6, 0.85, 0.04),
    ("inter_token_latency_p99_ms@512", "Inter-token latency, p99", "ms", "lower", 16.1, 0.96, 0.11),
    ("peak_memory_bytes", "Peak memory", "bytes", "lower", 357_400_576, 0.85, 0.001),
    ("steady_memory_bytes", "Steady memory", "bytes", "lower", 351_166_464, 0.85, 0.001),
    ("mapped_file_resident_bytes", "Resident part of the file", "bytes", "lower", 270_885_888, 0.804, 0.0002),
)
WORDS = {"lower": ("faster", "slower"), "higher": ("faster", "slower")}


def comparison(row: tuple[Any, ...], speed: float = 1.0) -> Comparison:
    metric, label, unit, better, before, ratio, spread = row
    before, after = before / speed, before / speed * ratio
    low, high = ratio - spread, ratio + spread
    verdict = "no difference shown"
    if not low <= 1 <= high:
        verdict = ("less" if ratio < 1 else "more") if unit == "bytes" else "faster"
    return Comparison(
        metric=metric,
        label=label,
        unit=unit,
        better=better,
        before=Interval(before, before * (1 - spread), before * (1 + spread)),
        after=Interval(after, after * (1 - spread), after * (1 + spread)),
        ratio=Interval(ratio, low, high),
        p_value=None if unit == "bytes" else 0.0004 if verdict != "no difference shown" else 0.31,
        verdict=verdict,
    )


def suite(runtime: str = "llamacpp", speed: float = 1.0, **changes: Any) -> Suite:
    comparisons = tuple(comparison(row, speed) for row in METRICS)
    runs = tuple(
        Run(side, pair, {one.metric: one.before.median for one in comparisons})
        for pair in range(9)
        for side in ("before", "after")
    )

    def bound(side: str, metric: str, num_bytes: float, reached: float) -> Bound:
        return Bound(side, metric, num_bytes, 2.2e8, 28.1e9, 1.9e11, 28.1e9 / num_bytes, reached, "memory")

    made = Suite(
        runtime=runtime,
        library="llama-cpp-python 0.3.36" if runtime == "llamacpp" else "onnxruntime-genai 0.18",
        before=Artifact("original-f16.gguf", 270_885_888, 134_515_008, 16.11, "f16"),
        after=Artifact("expert-f16.gguf", 217_802_304, 107_972_928, 16.14, "f16"),
        context_length=640,
        comparisons=comparisons,
        runs=runs,
        lost_runs=(LostRun("after", 4, "the process was killed for memory"),),
        noise=("another program used 14 % of the CPUs during pair 3",),
        stopped="the intervals of all speeds are within 2 % of their ratio",
        roofline=Roofline(
            bounds=(
                bound("before", "decode_tokens_per_second@512", 2.75e8, 0.86),
                bound("after", "decode_tokens_per_second@512", 2.21e8, 0.84),
            ),
            notes=(
                "Decoding reads 1.24 times fewer bytes per token and is 1.21 times faster: memory bounds it.",
            ),
        ),
        elapsed_s=88.4,
    )
    return replace(made, **changes)


def failed_suite() -> Suite:
    return suite(
        "onnx", comparisons=(), runs=(), lost_runs=(), noise=(), stopped="", roofline=None,
        failure="onnxruntime-genai ran out of memory while loading the original",
    )  # fmt: skip


def bench_report(*suites: Suite) -> BenchReport:
    return BenchReport(
        created="2026-11-26T09:14:41+00:00",
        options=BenchOptions(),
        environment=Environment(
            cpu_model="AMD EPYC 7B13",
            physical_cores=2,
            num_threads=2,
            memory_bytes=25_276_502_016,
            load_average=0.31,
            usable_cpus="0-1",
            governor=None,
            gpus=(),
            operating_system="Linux-6.12-x86_64-with-glibc2.36",
            versions={"python": "3.11.7", "cusprun": "0.1.0", "llama-cpp-python": "0.3.36"},
        ),
        suites=suites or (suite(),),
        elapsed_s=91.0,
    )


def estimate(value: float, spread: float) -> Estimate:
    return Estimate(value, value * (1 - spread), value * (1 + spread))


def eval_report(held_out: float = 1.04, general: float = 1.62, spread: float = 0.012) -> EvalReport:
    def rows(*ratios: float) -> dict[str, CorpusQuality]:
        corpora = {}
        for name, ratio, perplexity, documents in zip(
            ("held_out", "general"), ratios, (17.887, 53.237), (32, 24), strict=True
        ):
            own = CorpusQuality(documents, 160 * documents, estimate(perplexity * ratio, 0.15))
            if ratio != 1:
                own = replace(
                    own,
                    perplexity_ratio=estimate(ratio, spread),
                    mean_kl_divergence=estimate(0.11 * ratio, 0.1),
                    top1_agreement=estimate(0.9 / ratio, 0.03),
                )
            corpora[name] = own
        return corpora

    task = TaskQuality("gsm8k", "exact_match", 200, estimate(0.31, 0.1))
    return EvalReport(
        created="2026-11-26T09:14:09+00:00",
        cusprun_version="0.1.0",
        expert=NAME,
        models=(
            ModelQuality(SOURCE, HASH["a"], 134_515_008, rows(1, 1), (task,)),
            ModelQuality(
                "expert", HASH["d"], 107_972_928, rows(held_out, general),
                (replace(task, score=estimate(0.30, 0.1), difference=Estimate(-0.01, -0.03, 0.01)),),
            ),
        ),
    )  # fmt: skip


def parity_report(side: str = "expert", verdict: str = "pass", **changes: Any) -> ParityReport:
    made = ParityReport(
        verdict=verdict,
        failures=() if verdict == "pass" else ("the mean KL divergence 0.31 is over the limit 0.0001",),
        reference="transformers 5.24.0",
        candidate="llama-cpp-python 0.3.36",
        limits=Limits("f16", None, 1e-4, 0.995, 1.001),
        text=TextParity(286, 0, (), {}, 3, (), 1, 1, (), (4,), ()),
        logits=LogitParity(
            15, 4117, 2.5e-6 if verdict == "pass" else 0.31, 1.7e-4, 0.9993, 0.14, 22.4, 22.4, 1.0
        ),
        format="gguf",
        quant="f16",
        reference_sha256=HASH["a"],
        artifact_sha256=HASH["b"],
        artifact=f"{side}-f16.gguf",
    )
    return replace(made, **changes)


SAMPLE = SampleAnswer(
    prompt="My daughter bought 4 exercise books at $1.35 each and 3 gel pens. She paid with a ten-dollar "
    "note and got $1.60 back. What did one pen cost?",
    before="She spent 10.00 − 1.60 = $8.40.\nThe books cost 4 × 1.35 = $5.40.\nThree pens cost $3.00, so "
    "one pen cost $1.00.",
    after="She paid $8.40 in all. The books were $5.40, which leaves $3.00 for three pens.\n\n"
    "**One pen cost $1.00.**",
    reference="Work from the money backwards. She spent $8.40; the books cost $5.40; each pen cost $1.00.",
    dimension="task",
)


def run_report(**changes: Any) -> RunReport:
    made = RunReport(
        created="2026-11-26T09:15:02+00:00",
        cusprun_version="0.1.0",
        source=SOURCE,
        expert=NAME,
        ratio=0.25,
        block_ratio=0.25,
        total_ratio=0.1973,
        table=Table(
            (
                Row("Parameters", "134.5 M", "108.0 M", "↓ 19.7 %, smaller"),
                Row("File size (f16)", "270.9 MB", "217.8 MB", "↓ 19.6 %, smaller"),
                Row("Perplexity, held-out expert documents", "17.89", "18.60", "↑ 4.0 % (2.8 to 5.2), worse"),
            ),
            ("25.0% of the blocks' attention and FFN parameters are gone, 19.7% of all.",),
        ),
        artifacts=(
            ArtifactFile("before", "f16", "original-f16.gguf", 270_885_888),
            ArtifactFile("after", "f16", "expert-f16.gguf", 217_802_304),
        ),
        parity=(parity_report("original"), parity_report("expert")),
        quality=eval_report(),
        bench=bench_report(),
        seconds={"expert": 289.2, "eval.json": 72.6, "bench.json": 91.1},
        prune_seconds={"score": 96.53},
        samples=(SAMPLE,),
    )
    return replace(made, **changes)


def overlap_report() -> OverlapReport:
    draws = random.Random(2)

    def kind(name: str, units: int, chance: float) -> KindOverlap:
        layers = tuple(
            LayerOverlap(
                layer, tuple(0.35 + 0.4 * draws.random() for _ in range(3)), 0.1 + 0.05 * draws.random()
            )
            for layer in range(LAYERS)
        )
        means = tuple(sum(one.jaccard[pair] for one in layers) / LAYERS for pair in range(3))
        return KindOverlap(name, units, units // 4, layers, means, 0.12, chance, chance / 4)

    return OverlapReport(
        created="2026-11-26T08:00:00+00:00",
        cusprun_version="0.1.0",
        model_hash=HASH["a"],
        store_hash=HASH["b"],
        rule="paper",
        ratio=0.25,
        num_hidden_layers=LAYERS,
        dimensions=tuple(
            ComparedDimension(name, name, NAME, 48, 13_000) for name in ("language", "domain", "task")
        ),
        pairs=(("language", "domain"), ("language", "task"), ("domain", "task")),
        kinds=(kind("ffn_channel", WIDTH, 0.143), kind("query_head", 9, 0.15)),
    )


def endpoint_report() -> EndpointReport:
    endpoints = tuple(
        Endpoint(f"http://127.0.0.1:80{place}0/v1", f"{name}-q8_0", "chat", True, True)
        for place, name in enumerate(("original", "expert"))
    )

    def summary(place: int, load: int) -> LevelSummary:
        latency = (40 + 9 * load) * (1 - 0.2 * place)
        spread = Quantiles(latency, 1.3 * latency, 1.9 * latency)
        failed = {"stalled": 1} if (place, load) == (1, 8) else {}
        return LevelSummary(
            32, 32 - len(failed), 0, failed, 60.0, 0.5 * load, 60 * load**0.7, None, spread, spread, spread,
            spread, 256, 128, 127.5, 0.4, False,
        )  # fmt: skip

    stalled = RequestRecord(
        "stalled", "no event for 60 s", 1.0, 0.0, None, (), None, None, None, None, None, 0
    )
    loads = [(place, load) for place in range(2) for load in (1, 2, 8)]
    return EndpointReport(
        created="2026-11-26T10:00:00+00:00",
        options=LoadOptions(concurrency=(1, 2, 8)),
        prompts="the shipped probe texts",
        tokenizer=None,
        client={"python": "3.11.7"},
        endpoints=endpoints,
        runs=(LevelRun(1, Level("concurrency", 8.0), 0, 60.0, (stalled,), summary(1, 8)),),
        results=tuple(
            LevelResult(place, Level("concurrency", float(load)), summary(place, load))
            for place, load in loads
        ),
        comparisons=(
            LoadComparison(
                1, None, "time_to_first_token_p50_ms", 9, Interval(49.0, 48.0, 50.0),
                Interval(39.2, 38.0, 40.0), Interval(0.8, 0.78, 0.82), "faster",
            ),
        ),
        elapsed_s=400.0,
    )  # fmt: skip


def frontier() -> tuple[FrontierPoint, ...]:
    """Two sizes in two exports: one is dominated, and one could not be made."""

    def point(
        ratio: float, precision: str, megabytes: float, quality: float, **changes: Any
    ) -> FrontierPoint:
        rate = 90 - megabytes / 5
        made = FrontierPoint(
            ratio,
            "gguf",
            precision,
            108_000_000,
            HASH["a"],
            round(megabytes * 1e6),
            8.5,
            {"held_out": CurveQuality(32, 5120, estimate(18 * quality, 0.1), estimate(quality, 0.01))},
            None,
            Speed(
                Interval(rate, rate - 1, rate + 1),
                Interval(1.2, 1.18, 1.22),
                Interval(8 * rate, 7 * rate, 9 * rate),
                Interval(1.25, 1.2, 1.3),
                3e8,
                10,
                "llama-cpp-python 0.3.36",
                "AMD EPYC, 2 threads",
            ),
        )
        return replace(made, **changes)

    return (
        point(0.0, "q8_0", 144.0, 1.001),
        point(0.0, "q4_k_m", 105.0, 1.09, dominated_by="0.3 gguf:q8_0"),
        point(0.3, "q8_0", 104.0, 1.07),
        point(0.3, "q4_k_m", 80.0, 1.16, failure="llama.cpp ran out of memory", corpora={}, speed=None),
    )  # fmt: skip


def sweep_report() -> SweepReport:
    def point(ratio: float) -> CurvePoint:
        cost = 1 + 0.8 * ratio**2
        same = ratio == 0
        corpora = {
            name: CurveQuality(
                documents, 160 * documents, estimate(base * cost**power, 0.1),
                None if same else estimate(cost**power, 0.02),
            )
            for name, documents, base, power in (("held_out", 32, 17.9, 1), ("general", 24, 53.2, 4))
        }  # fmt: skip
        share = 1 - 0.79 * ratio
        return CurvePoint(
            ratio, ratio, 0.79 * ratio, replace(BEFORE, intermediate_size=round(1536 * (1 - ratio))),
            round(134_515_008 * share), round(269_030_016 * share), corpora, {"prune": 100.0},
        )  # fmt: skip

    return SweepReport(
        created="2026-11-26T07:00:00+00:00",
        cusprun_version="0.1.0",
        versions={"python": "3.11.7"},
        model=SOURCE,
        model_hash=HASH["a"],
        expert=NAME,
        corpus_hash=HASH["e"],
        calibration_documents=140,
        calibration_tokens=39_767,
        rule="surgeon",
        targets=("gguf:q8_0",),
        units=("ffn_channel",),
        refit=True,
        dimension_weights={},
        inputs_hash=HASH["f"],
        original=point(0),
        points=tuple(point(ratio) for ratio in (0.1, 0.2, 0.3, 0.4, 0.5)),
        frontier=frontier(),
        speed_options=SpeedOptions(),
    )


def results(**records: Any) -> list[Result]:
    return [Result(KINDS[name], f"{name}.json", record) for name, record in records.items()]


def everything(run: Any = None) -> list[Result]:
    """Everything that a run and its companions hold, as reading them gives it."""
    chosen = run or run_report()
    return [
        *results(run=chosen, manifest=manifest(), bench=chosen.bench, evaluation=chosen.quality),
        *(Result(KINDS["proof"], "results.json", one) for one in chosen.parity),
        *results(overlap=overlap_report(), sweep=sweep_report()),
        Result(KINDS["load test"], "load.json", endpoint_report()),
    ]

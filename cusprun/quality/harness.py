"""Our tasks as lm-eval's: it batches, generates and cuts at the stop texts; the scores are ours.

Imports lm-eval, so only :mod:`cusprun.quality.task_run` imports this, once it is known to be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task as LmEvalTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from cusprun.progress import Advance
from cusprun.quality.answers import METRICS
from cusprun.quality.tasks import Task

_SCORE = "score"


def per_document_scores(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    batch_size: int,
    max_length: int,
    advance: Advance,
) -> dict[str, tuple[float, ...]]:
    """Return, for each task by name, the score of each of its documents in order."""
    runner = _StockModel(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=max_length,
    )
    runner.advance = advance
    # Without log_samples there are only means; bootstrap_iters=0 leaves the intervals to us.
    found = evaluate(
        runner, {task.spec.name: _LocalTask(task) for task in tasks}, log_samples=True, bootstrap_iters=0
    )
    return {
        name: tuple(
            float(sample[_SCORE]) for sample in sorted(samples, key=lambda sample: int(sample["doc_id"]))
        )
        for name, samples in found["samples"].items()
    }


class _StockModel(HFLM):  # type: ignore[misc]
    """lm-eval's own transformers model, which says how far it is through a listener instead of a bar."""

    advance: Advance

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:  # noqa: ARG002
        return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(self, context: Any, *args: Any, **settings: Any) -> Any:
        generated = super()._model_generate(context, *args, **settings)
        self.advance(int(context.shape[0]))
        return generated


class _LocalTask(LmEvalTask):  # type: ignore[misc]
    """A task whose prompts are made already, with their examples."""

    VERSION = 0
    OUTPUT_TYPE = "generate_until"

    def __init__(self, task: Task) -> None:
        self._task = task
        self._rows: list[dict[str, Any]] = [
            {"prompt": document.prompt, "answers": list(document.answers)} for document in task.documents
        ]
        super().__init__()
        self.set_config("task", task.spec.name)
        self.set_config("num_fewshot", 0)

    def download(self, *args: Any, **settings: Any) -> None:
        """Do nothing: the rows are there."""

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[dict[str, Any]]:
        return self._rows

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        return str(doc["prompt"])

    def doc_to_target(self, doc: dict[str, Any]) -> str:
        return str(doc["answers"][0])

    def build_all_requests(self, **settings: Any) -> None:  # noqa: ARG002
        """Make the requests; lm-eval's own way samples examples and shows a bar."""
        self._instances = [
            self.construct_requests(doc, doc["prompt"], metadata=(self._task.spec.name, number, 1))
            for number, doc in enumerate(self._rows)
        ]

    def construct_requests(self, doc: dict[str, Any], ctx: str, **settings: Any) -> Any:
        spec = self._task.spec
        greedy = {"until": list(spec.stop), "max_gen_toks": spec.max_new_tokens, "do_sample": False}
        return Instance(
            request_type="generate_until",
            doc=doc,
            arguments=(ctx, greedy),
            idx=0,
            metadata=settings["metadata"],
        )

    def process_results(self, doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
        spec = self._task.spec
        return {_SCORE: METRICS[spec.metric](results[0], doc["answers"], spec.language)}

    def aggregation(self) -> dict[str, Any]:
        return {_SCORE: lambda scores: sum(scores) / len(scores)}

    def higher_is_better(self) -> dict[str, bool]:
        return {_SCORE: True}

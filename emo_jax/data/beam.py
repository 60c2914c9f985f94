"""Shards on Apache Beam: the same function of a shard's number on whatever machines a runner has (Dataflow, Flink, Spark).

All of them need this package, the source and the output folder under the same paths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

from emo_jax.data.tokenization import OverShards, Tokenization, Work
from emo_jax.errors import InputError, RunError


@contextlib.contextmanager
def workers(job: Tokenization, options: Sequence[str]) -> Generator[OverShards]:
    """`tokenize.workers` on Beam. options: NAME=VALUE of Beam and its runner, such as runner=DataflowRunner."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise InputError("--runner beam needs Apache Beam: pip install 'emo-jax[beam]'") from None

    def over_shards(work: Work, numbers: Sequence[int], what: str) -> None:
        pipeline = beam.Pipeline(options=PipelineOptions([f"--{option}" for option in options]))
        shards = pipeline | beam.Create(list(numbers)) | beam.Reshuffle()  # else one worker would get them all
        shards | what >> beam.Map(_one, work, job)
        try:
            pipeline.run().wait_until_finish()
        except RuntimeError as e:  # what Beam makes of an error in a worker
            raise RunError(f"{what} {job.source.name} on Beam failed: {e}") from e

    yield over_shards


def _one(number: int, work: Work, job: Tokenization) -> None:
    from apache_beam.metrics import Metrics

    documents, tokens = (Metrics.counter("emo_jax", name) for name in ("documents", "tokens"))

    def report(more_documents: int, more_tokens: int) -> None:
        documents.inc(more_documents)
        tokens.inc(more_tokens)

    work(job, number, report)

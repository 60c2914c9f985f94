"""Evaluation on documents of another source than the run's: by label, on any format, nothing held out of training."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import records, tiny_config

import emo_jax
from emo_jax.checkpoints.compatibility import require_same_data
from emo_jax.data.evaluation import MAX_DOCUMENTS, evaluation_rows, evaluation_set
from emo_jax.errors import InputError
from emo_jax.train import start
from emo_jax.train.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents of a run, and beside them an evaluation set of other labels in Parquet."""
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_config(folder)
    made = pa.table({"text": [f"red {i} ten" for i in range(40)], "source": ["law" if i < 30 else "bio" for i in range(40)]})
    pq.write_table(made, folder / "set.parquet")
    return folder


def test_all_documents_are_trained_on_and_the_others_evaluated_by_label(folder, tmp_path):
    own = start.open_documents(tiny_config(folder), tmp_path)
    config = tiny_config(folder, f"--data.eval_path={folder / 'set.parquet'}")
    documents = start.open_documents(config, tmp_path)
    assert len(own.held_out) and len(own.train) < len(own.source) and own.evaluated is own.source
    assert len(documents.train) == len(documents.source) == 120
    rows = evaluation_rows(config, documents.evaluated, documents.tokenizer, documents.held_out)
    assert [label for label, _ in rows] == ["bio", "law"]
    assert set(rows[0][1]["document_ids"][rows[0][1]["segment_ids"] > 0]) <= set(range(30, 40))
    assert documents.fingerprint == own.fingerprint  # of what is trained on


def test_a_large_set_is_looked_at_all_over(folder, tmp_path):
    text = "".join(json.dumps({"text": "x", "source": f"{i // 5_000}"}) + "\n" for i in range(25_000))
    (tmp_path / "large.jsonl").write_text(text)
    source, numbers = evaluation_set(tiny_config(folder, f"--data.eval_path={tmp_path / 'large.jsonl'}").data)
    assert len(numbers) == MAX_DOCUMENTS and {source.label(int(i)) for i in numbers} == set("01234")


def test_a_wrong_evaluation_set_is_named(folder, tmp_path):
    with pytest.raises(InputError, match="data.eval_path: data.path='nowhere'"):
        start.open_documents(tiny_config(folder, "--data.eval_path=nowhere"), tmp_path)


def test_only_whether_there_is_an_evaluation_set_is_part_of_the_stream(folder):
    without, one, other = (tiny_config(folder, f"--data.eval_path={path}") for path in ("", "one", "other"))
    require_same_data(one, other, 1, "checkpoint")
    for saved, given in ((one, without), (without, one)):
        with pytest.raises(InputError, match=r"data.eval_fraction \(0 with data.eval_path\): 0"):
            require_same_data(saved, given, 1, "checkpoint")


def test_a_run_is_evaluated_on_its_set(folder, tmp_path):
    config = tiny_config(folder, f"--data.eval_path={folder / 'set.parquet'}", "--train.steps=2")
    result = train(config, tmp_path / "run")
    assert set(result["held_out"]["labels"]) == {"law", "bio"} == set(records(tmp_path / "run", evaluation=True)[-1]["labels"])
    loaded = emo_jax.load(tmp_path / "run")
    source, numbers = loaded.documents_to_score()
    assert np.array_equal(numbers, np.arange(40)) and source.label(0) == "law"
    loaded = emo_jax.load(tmp_path / "run", data=str(folder / "documents.jsonl"))
    assert len(loaded.documents_to_score()[1]) == 120

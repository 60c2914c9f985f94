"""lm-evaluation-harness on a checkpoint: its numbers equal direct computations."""

import importlib.util
import json
import os
import random
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_run
from lm_eval.api.instance import Instance
from published import forward_pass, rows_of

from emo_jax import sharding
from emo_jax.checkpoints import subset as subset_lib
from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.cli import main
from emo_jax.convert.exporting import export_checkpoint
from emo_jax.errors import InputError
from emo_jax.generation import scoring
from emo_jax.harness import EmoLM, Tasks, evaluate_tasks
from emo_jax.train import loop

WORDS = "red green blue gray pink one two six ten".split()
TASKS = {
    "choice": """
task: local_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: acc_norm, aggregation: mean, higher_is_better: true}]
""",
    "perplexity": """
task: local_perplexity
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
""",
    "answer": """
task: local_answer
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: [" o"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
DATA = """
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a trained run (`out`), tasks, and the questions, which end in texts of the training words."""
    folder = tmp_path_factory.mktemp("harness")
    draw = random.Random(0)

    def words(a, b):
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(a, b)))

    questions = [{"question": words(2, 8), "choices": [words(1, 1), words(2, 3), words(1, 2)], "text": words(1, 60),
                  "answer": draw.randrange(3)} for _ in range(12)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(task + DATA)
    config = tiny_run.tiny_config(folder, f"--train.eval_tasks={folder / 'choice.yaml'}", "--train.steps=4",
                                  "--model.head_dim=16")  # as Qwen2-MoE has it
    from emo_jax.harness import TaskEvaluation

    loop.train(config, folder / "out", [TaskEvaluation.make])
    return folder, questions


@pytest.fixture(scope="module")
def direct(run):
    """(tokenizer, log_probs(tokens, allowed=None) [T, V]: of the next token after each, one row at a time)."""
    from emo_jax.data.tokenizer import Tokenizer

    found, mesh = open_checkpoint(run[0] / "out"), sharding.single_device_mesh()
    with jax.set_mesh(mesh):
        params = found.restore_params(mesh)
        passes = {}

    def log_probs(tokens, allowed=None):
        key = None if allowed is None else allowed.tobytes()
        row = np.zeros((1, 32), np.int32)
        row[0, : len(tokens)] = tokens
        with jax.set_mesh(mesh):
            forward = passes.setdefault(key, forward_pass(found.config, mesh, allowed))
            segments = (np.arange(32) < len(tokens)).astype(np.int32)[None]
            logits = np.asarray(forward(params, rows_of(mesh, row, segments)))[0, : len(tokens)].astype(np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return Tokenizer(run[0] / "out", "<|endoftext|>"), log_probs


def accuracies(questions, tokenizer, log_probs, allowed=None):
    right, right_normed = [], []
    for q in questions:
        scores = []
        for choice in q["choices"]:
            context, whole = tokenizer.encode(q["question"]), tokenizer.encode(f"{q['question']} {choice}")
            each = log_probs(whole[:-1], allowed)[np.arange(len(whole) - 1), whole[1:]]
            scores.append(each[len(context) - 1:].sum())
        right.append(np.argmax(scores) == q["answer"])
        right_normed.append(np.argmax(np.array(scores) / [len(c) for c in q["choices"]]) == q["answer"])
    return np.mean(right), np.mean(right_normed)


def test_multiple_choice_equals_a_direct_computation(run, direct, monkeypatch):
    folder, questions = run
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 512)  # several batches
    result = evaluate_tasks(str(folder / "out"), str(folder / "choice.yaml"))["tasks"]["local_choice"]
    acc, acc_norm = accuracies(questions, *direct)
    assert (result["acc,none"], result["acc_norm,none"]) == (acc, acc_norm)

    records = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    while_training = [r for r in records if r.get("eval") == "tasks"]
    assert while_training[-1]["step"] == 4 and while_training[-1]["local_choice"]["acc"] == acc


def test_subsets_and_the_command(run, direct, tmp_path, capsys):
    folder, questions = run
    config = open_checkpoint(folder / "out").config
    allowed = np.arange(7) % 2 == np.arange(2)[:, None]
    subset_lib.full(config).with_mask(allowed).save(tmp_path / "subset.json")
    arguments = ["eval", str(folder / "out"), "--tasks", str(folder / "choice.yaml"), "--json"]
    assert main([*arguments, "--subset", str(tmp_path / "subset.json")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]["local_choice"]
    acc, acc_norm = accuracies(questions, *direct, allowed)
    assert (result["acc,none"], result["acc_norm,none"]) == (acc, acc_norm)
    assert main(["eval", str(folder / "out"), "--tasks", "no_such_task.yaml"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_perplexity_of_long_texts_equals_a_direct_computation(run, direct):
    folder, questions = run
    tokenizer, log_probs = direct
    result = evaluate_tasks(str(folder / "out"), str(folder / "perplexity.yaml"))["tasks"]["local_perplexity"]
    nats = 0.0
    for q in questions:
        ids = tokenizer.encode(q["text"])
        for start in range(0, len(ids), 32):  # parts of at most a row, each after as much as still fits before it
            end = min(start + 32, len(ids))
            window = ids[end - 33 : end] if start else np.concatenate([[tokenizer.eos_id], ids[:end]])
            each = log_probs(window[:-1])[np.arange(len(window) - 1), window[1:]]
            nats -= each[start - end:].sum()
    size = sum(len(q["text"].encode()) for q in questions)
    np.testing.assert_allclose(result["byte_perplexity,none"], np.exp(nats / size), rtol=1e-5)


def test_texts_end_before_the_words_of_until(run, direct):
    folder, questions = run
    tokenizer, log_probs = direct
    found, mesh = open_checkpoint(folder / "out"), sharding.single_device_mesh()
    with jax.set_mesh(mesh):
        lm = EmoLM(found.config, mesh, tokenizer, (tokenizer.eos_id,), found.restore_params(mesh))
    contexts = [q["question"] for q in questions[:4]]
    until = " o"
    made = lm.generate_until([Instance("generate_until", {}, (c, {"until": [until], "max_gen_toks": 8}), i)
                              for i, c in enumerate(contexts)])
    for context, text in zip(contexts, made):
        ids = tokenizer.encode(context).tolist()
        start = len(ids)
        while len(ids) < start + 8:
            ids.append(int(log_probs(ids)[-1].argmax()))
            if ids[-1] == tokenizer.eos_id:
                ids.pop()
                break
        expected = tokenizer.decode(np.array(ids))[len(context):]
        assert text == expected.split(until)[0]


def test_the_terminal_shows_results_and_no_noise(run):
    """In a process of its own, which is in no git repository."""
    done = subprocess.run([sys.executable, "-m", "emo_jax", "eval", "out", "--tasks", "choice.yaml,answer.yaml"], cwd=run[0],
                          capture_output=True, text=True, env=os.environ | {"HF_HOME": str(run[0] / "home")})
    assert done.returncode == 0 and "local_choice" in done.stdout
    assert [line for line in done.stderr.splitlines() if not line.startswith("scoring: ")] == []


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("accelerate", "transformers"))),
                    reason="needs accelerate and transformers (extra test-clients)")
@pytest.mark.parametrize("form", ["hf", "qwen2_moe"])
def test_the_harness_finds_the_same_figures_with_an_export(run, form):
    folder, _ = run
    export_checkpoint(str(folder / "out"), str(folder / form), form)
    tasks = ",".join(str(folder / f"{name}.yaml") for name in TASKS)
    done = subprocess.run([
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder / form},trust_remote_code=True,"
        "dtype=float32", "--tasks", tasks, "--device", "cpu", "--batch_size", "4",
        "--output_path", str(folder / f"{form}.json")],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")})
    assert done.returncode == 0, done.stderr[-2000:]
    written = next(folder.glob(f"{form}*.json"))
    theirs, ours = json.loads(written.read_text())["results"], evaluate_tasks(str(folder / "out"), tasks)["tasks"]
    figures = lambda found: {(task, key): f"{value:.4f}" for task, metrics in found.items() for key, value in metrics.items()
                             if isinstance(value, (int, float)) and "," in key}
    assert figures(ours) == {key: value for key, value in figures(theirs).items() if key in figures(ours)}
    assert len(figures(ours)) >= 6


def test_what_is_wrong_with_tasks_is_named(tmp_path, run):
    (tmp_path / "task.yaml").write_text(TASKS["choice"] + DATA)  # without its data
    for wanted, message in ((str(tmp_path / "task.yaml"), "task.yaml cannot be loaded"), ("", "--tasks is empty"),
                            (f"{run[0] / 'choice.yaml'},nowhere.yml", "no such file: nowhere.yml"),
                            ("not_a_task_of_the_harness", "no task, group or tag not_a_task_of_the_harness")):
        with pytest.raises(InputError, match=message):
            Tasks(wanted)

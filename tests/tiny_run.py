"""A model, documents and config so small that a run takes seconds.

The rate is constant after its warmup, so that runs of any length are the same programs; importing this keeps compiled
programs for the test session, in this process and in those that tests start.
"""

import atexit
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import jax

from emo_jax.config import Config, load_config

CACHE = {"jax_compilation_cache_dir": tempfile.mkdtemp(prefix="emo_jax_test_"),
         "jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
for name, value in CACHE.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
atexit.register(shutil.rmtree, CACHE["jax_compilation_cache_dir"], ignore_errors=True)

CONFIG = '''
from emo_jax.config import *

def config():
    return Config(
        name="tiny",
        model=ModelConfig(vocab_size=320, num_layers=2, d_model=32, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=16,
                          num_experts=8, num_shared_experts=1, top_k=3),
        router=RouterConfig(pool_min=2, pool_max=7),
        data=DataConfig(path={path!r}, sequence_length=32, max_documents_per_row=8, eval_fraction=0.1, workers=0),
        optimizer=OptimizerConfig(schedule="constant", warmup_steps=2, learning_rate=1e-2),
        train=TrainConfig(steps=8, batch_size=8, log_every=1, eval_every=0, eval_rows=4, remat="none"),
        checkpoint=CheckpointConfig(every=100))
'''


def write_documents(path: Path, count: int = 120, seed: int = 0) -> Path:
    """A JSONL of short documents of two labels with different words."""
    draw, words = random.Random(seed), {"color": "red green blue gray pink".split(), "count": "one two six ten".split()}
    with path.open("w") as file:
        for i in range(count):
            label = ("color", "count")[i % 2]
            text = " ".join(draw.choice(words[label]) for _ in range(draw.randint(3, 30)))
            file.write(json.dumps({"text": text, "source": label}) + "\n")
    return path


def config_file(folder: Path) -> Path:
    """`tiny.py` in `folder`, with documents beside it."""
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(path=str(write_documents(folder / "documents.jsonl"))))
    return path


def tiny_config(folder: Path, *overrides: str) -> Config:
    path = folder / "tiny.py"
    return load_config(str(path if path.exists() else config_file(folder)), overrides)


def records(out: Path, evaluation: bool = False) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if ("eval" in r) == evaluation]


def series(out: Path, name: str = "loss") -> list[tuple[int, float]]:
    return [(r["step"], r[name]) for r in records(out)]

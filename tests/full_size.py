"""Import, extract and export at the size of the published model: `python tests/full_size.py --folder DIR --tokenizer FILE`.

Writes a synthetic checkpoint of its shape (27 GB of random bfloat16, a shard at a time), then runs the commands that a person
would, each in a process of its own, and prints its time, peak memory and bytes read. Needs about 70 GB of disk at
`emo_1b14b_1t`; `--config emo_small` tries it with little.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from emo_jax.checkpoints import subset as subset_lib
from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.config import Config, load_config
from emo_jax.convert.folder import common_keys
from emo_jax.convert.layouts import entries
from emo_jax.convert.tensors import Planned, write_folder

LOAD = """
import sys
from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.checkpoints.subset import load
from emo_jax.surgery.load import load_subset
found = open_checkpoint(sys.argv[1])
load_subset(found, load(sys.argv[2], found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--config", default="emo_1b14b_1t")
    parser.add_argument("--keep", type=int, default=16)
    parser.add_argument("--whole", action="store_true", help="also a GGUF file of the whole model")
    arguments = parser.parse_args()
    folder, config = arguments.folder, load_config(arguments.config, [])
    folder.mkdir(parents=True, exist_ok=True)
    write_synthetic(folder / "published", config, arguments.tokenizer)
    command = str(Path(sys.executable).with_name("emo-jax"))
    run, small = folder / "run", folder / "small"
    step("import", [command, "import", folder / "published", "--out", run])
    found = open_checkpoint(run)
    m = config.model
    order = np.random.default_rng(0).permuted(np.tile(np.arange(m.num_routed_experts), (m.num_layers, 1)), axis=1)
    subset = subset_lib.full(found.config).with_mask(order < arguments.keep - m.num_shared_experts, method="random")
    subset.save(folder / "subset.json")
    step("load the subset from it", [sys.executable, "-c", LOAD, run, folder / "subset.json"])
    step("subset extract", [command, "subset", "extract", run, "--subset", folder / "subset.json", "--out", small])
    step("export the subset, bfloat16", [command, "export", small, "--format", "qwen2_moe", "--out", folder / "hf"])
    gguf = ["--format", "gguf", "--dtype", "q8_0", "--out"]
    step("export the subset, GGUF q8_0", [command, "export", small, *gguf, folder / "gguf"])
    if arguments.whole:
        step("export the whole, GGUF q8_0", [command, "export", run, *gguf, folder / "gguf-whole"])


def write_synthetic(folder: Path, config: Config, tokenizer: Path) -> None:
    """Random weights of a plausible size in the published layout, with the files that lie beside them."""
    folder.mkdir()
    m, rng = config.model, np.random.default_rng(0)
    plan = list(entries("emo", m))

    def values():
        for e in plan:
            bits = rng.integers(0, 1 << 10, e.shape, np.uint16)  # of the sign, the last bits of the exponent, and the fraction
            sign, rest = bits >> 9, bits & 0x1FF
            yield (np.uint16(0x3C00) + (sign << 15) + rest).view(ml_dtypes.bfloat16) if len(e.shape) > 1 else np.ones(
                e.shape, ml_dtypes.bfloat16)

    write_folder(folder, [Planned(e.name, e.shape) for e in plan], values(), np.dtype(ml_dtypes.bfloat16))
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    (folder / "config.json").write_text(json.dumps(common_keys(config, "bfloat16") | {
        "architectures": ["EmoForCausalLM"], "num_experts": m.num_experts, "num_experts_per_tok": m.top_k,
        "num_shared_experts": m.num_shared_experts}))


def step(what: str, command: list) -> None:
    began, read = time.monotonic(), 0
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    while True:
        pid, status, used = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        with contextlib.suppress(OSError, IndexError):  # what it asked the system for, so far; gone when it has ended
            read = int(Path(f"/proc/{process.pid}/io").read_text().split()[1])
        time.sleep(0.1)
    if status:
        sys.exit(f"{what}: exit status {os.waitstatus_to_exitcode(status)}")
    print(f"{what:32} {time.monotonic() - began:7.0f} s   peak {used.ru_maxrss / 2**20:5.2f} GiB   read {read / 1e9:5.1f} GB",
          flush=True)


if __name__ == "__main__":
    main()

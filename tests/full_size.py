"""Import, extract and export at the size of the published model: `python tests/full_size.py --folder DIR --tokenizer FILE`.

Writes a synthetic checkpoint of its shape (27 GB of random bfloat16, a shard at a time), then runs the commands that a person
would, each in a process of its own, and prints its time, peak memory and bytes read. Needs about 70 GB of disk at
`emo_1b14b_1t`; `--config emo_small`, or fields (`--model.num_layers=4`), try it with less. With `--engines DIR` (of
launch/engines.sh) the whole model and its subsets are then run by llama.cpp and vLLM.
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

ENGINES = Path(__file__).parent / "engines"
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
    parser.add_argument("--keep", default="16", help="experts of the subsets: 32,16")
    parser.add_argument("--whole", action="store_true", help="also exports of the whole model")
    parser.add_argument("--formats", default="qwen2_moe:bfloat16,gguf:q8_0")
    parser.add_argument("--engines", type=Path)
    arguments, overrides = parser.parse_known_args()
    folder, config = arguments.folder, load_config(arguments.config, overrides)
    folder.mkdir(parents=True, exist_ok=True)
    write_synthetic(folder / "published", config, arguments.tokenizer)
    command = str(Path(sys.executable).with_name("emo-jax"))
    run, m = folder / "run", config.model
    step("import", [command, "import", folder / "published", "--out", run])
    for file in (folder / "published").glob("*.safetensors"):
        file.unlink()
    found, models = open_checkpoint(run), {"whole": run} if arguments.whole else {}
    order = np.random.default_rng(0).permuted(np.tile(np.arange(m.num_routed_experts), (m.num_layers, 1)), axis=1)
    for keep in map(int, arguments.keep.split(",")):
        subset = subset_lib.full(found.config).with_mask(order < keep - m.num_shared_experts, method="random")
        subset.save(folder / f"{keep}.json")
        step(f"load {keep} experts from it", [sys.executable, "-c", LOAD, run, folder / f"{keep}.json"])
        models[str(keep)] = folder / f"{keep}"
        step(f"subset extract, {keep}", [command, "subset", "extract", run, "--subset", folder / f"{keep}.json", "--out",
                                         models[str(keep)]])
    np.save(folder / "rows.npy", np.random.default_rng(0).integers(0, m.vocab_size, (2, 64)).astype(np.int32))
    for form, dtype in (entry.split(":") for entry in arguments.formats.split(",")):
        for name, model in models.items():
            out = folder / f"{name}-{form}"
            step(f"export {name}, {form} {dtype}", [command, "export", model, "--format", form, "--dtype", dtype, "--out", out])
            if arguments.engines:
                engine, path = ("llama_cpp", next(out.glob("*.gguf"))) if form == "gguf" else ("vllm", out)
                step(f"  in {engine}", [arguments.engines / engine / "bin/python", ENGINES / f"with_{engine}.py", path,
                                        folder / "rows.npy", folder / "answers.npz"], VLLM_DTYPE=dtype)
                print(f"  {float(np.load(folder / 'answers.npz')['written']):.1f} tokens/s", flush=True)


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


def step(what: str, command: list, **environment: str) -> None:
    began, read = time.monotonic(), 0
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, env=os.environ | environment)
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

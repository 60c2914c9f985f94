"""The model card (README.md) of an export: what it is, its shape, its evaluations, and how its format is loaded.

Plain text: the front matter is a handful of keys, whose values are JSON, which is YAML; huggingface_hub's ModelCard would make
every export need it and jinja2.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from emo_jax.checkpoints.checkpoint import Checkpoint
from emo_jax.checkpoints.subset import Subset, load
from emo_jax.config import ModelConfig
from emo_jax.convert.formats import Options
from emo_jax.convert.importing import HF_FILES
from emo_jax.convert.layouts import entries, experts_of_layer
from emo_jax.convert.tensors import read_json
from emo_jax.errors import InputError
from emo_jax.train.metrics import METRICS, records_and_foreign_lines

TRANSFORMERS = '''```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}"{more})
model = AutoModelForCausalLM.from_pretrained("{repo}"{more})
inputs = tokenizer(["Once upon a time"], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=32)))
```'''
REMOTE = TRANSFORMERS.replace("{more}", ", trust_remote_code=True")
STOCK = TRANSFORMERS.replace("{more}", "")
VLLM = "vLLM: `vllm serve {repo}`."
# How a folder or file of each kind is used: (library_name, text). {repo}: its name on the hub, or the path of the folder.
USAGE = {
    "hf-own": ("transformers", "transformers 4.57 or later, with the code in this repository:\n\n" + REMOTE),
    "hf-published": ("transformers", "transformers 4.57, with the published code, which it fetches:\n\n" + REMOTE),
    "qwen2_moe": ("transformers", f"transformers, without remote code:\n\n{STOCK}\n\n{VLLM}"),
    "llama": ("transformers", f"transformers, without remote code:\n\n{STOCK}\n\n{VLLM}"),
    "gguf": ("gguf", "llama.cpp: `llama-cli -hf {repo}`, or `llama-cli -m FILE.gguf` with the file."),
}
PUBLISHED = ("Emo_1b14b_1T", "StdMoE_1b4b_130B", "Dense_1b_130B")  # names on the hub that are known to exist
MAX_LABELS = 40


def model_card(found: Checkpoint, options: Options, architecture: str, usage: str) -> str:
    """`usage`: a key of USAGE. `architecture`: as the format calls it."""
    m, subset = found.config.model, subset_of(found)
    library, how = USAGE[usage]
    kind = _kind(found)
    total, active = count_parameters(m)
    name = options.repo.rpartition("/")[2] or found.config.name
    base = _base_model(found)
    parts = [
        _front_matter({
            "license": options.license or None, "library_name": library, "pipeline_tag": "text-generation",
            "tags": ["emo_jax", *(["mixture-of-experts"] if m.num_experts else []), *(["emo"] if kind == "EMO" else []),
                     *(["expert-subset"] if subset else [])],
            "base_model": base}),
        f"# {name}",
        f"{'An' if kind == 'EMO' else 'A'} {kind} language model with {_amount(total)} parameters"
        + (f", of which a token uses {_amount(active)}" if m.num_experts else "")
        + f": step {found.step:,} of `{found.config.name}`, written by emo_jax as {architecture} ({options.dtype})."
        + (f" It is made of [{base}](https://huggingface.co/{base})." if base else ""),
        "## Shape", _table(("", ""), _shape(found, total, active)),
        *(_subset_text(subset) if subset else ()),
        *_evaluations(found, subset),
        "## Use", how.replace("{repo}", options.repo or "."),
        *(["No document pools are needed here: a token's experts are its strongest of all."] if kind == "EMO" else ()),
        "## Licence", options.license or "Not stated by whoever exported it.",
    ]
    return "\n\n".join(parts) + "\n"


def count_parameters(m: ModelConfig) -> tuple[int, int]:
    """(all, those that a token uses) as published checkpoints count them: router rows of shared experts too."""
    total = sum(math.prod(e.shape) for e in entries("emo" if m.num_experts else "dense", m))
    idle = sum(max(n - m.top_k, 0) for n in (experts_of_layer(m, i) for i in range(m.num_layers if m.num_experts else 0)))
    return total, total - idle * 3 * m.d_model * m.d_ff


def subset_of(found: Checkpoint) -> Subset | None:
    """What an extracted or fine-tuned run keeps of the model that it was made from."""
    path, m = found.run / "subset.json", found.config.model
    try:
        subset = load(path) if path.is_file() else None
    except InputError:
        return None  # somebody else's file; the card says nothing of it
    here = [experts_of_layer(m, i) for i in range(m.num_layers)]
    return subset if subset and m.num_experts and subset.experts_per_layer == here else None


def _kind(found: Checkpoint) -> str:
    """A published config does not tell an EMO from a standard MoE: its name has to."""
    imported, c = _imported_name(found), found.config
    if not c.model.num_experts:
        return "dense"
    if imported is not None and not re.match("emo|stdmoe", imported, re.IGNORECASE):
        return "mixture-of-experts"
    is_emo = c.uses_pools if imported is None else imported.lower().startswith("emo")
    return "EMO" if is_emo else "standard mixture-of-experts"


def _imported_name(found: Checkpoint) -> str | None:
    source = found.meta.get("source")
    name = source.get("imported") if isinstance(source, dict) else None
    return name if isinstance(name, str) else None


def _shape(found: Checkpoint, total: int, active: int) -> list[tuple[str, str]]:
    m, rows = found.config.model, []
    rows += [("parameters", f"{total:,}"), ("layers, width", f"{m.num_layers}, {m.d_model}"),
             ("attention heads, key/value heads", f"{m.num_heads}, {m.num_kv_heads}")]
    if m.num_experts:
        each = sorted(set(m.experts_per_layer)) or [m.num_experts]
        count = f"{each[0]}" if len(each) == 1 else f"{each[0]} to {each[-1]}"
        rows[1:1] = [("of which a token uses", f"{active:,}")]
        rows += [("experts of a layer", f"{count} of width {m.d_ff}, {m.num_shared_experts} of them shared"),
                 ("experts of a token", f"{m.top_k}, the shared ones included"),
                 ("router", f"`{found.config.router.semantics}`")]
    else:
        rows += [("width of the MLP", f"{m.d_ff}")]
    rows += [("vocabulary", f"{m.vocab_size:,}"), ("context", f"{found.config.data.sequence_length:,} tokens")]
    tokens = found.meta.get("tokens")
    return rows + ([("tokens trained on", f"{tokens:,}")] if tokens else [])


def _subset_text(subset: Subset) -> list[str]:
    of, text = subset.num_routed + subset.num_shared, subset.calibration
    chosen = f"Chosen by `{subset.method}`"
    if text.get("documents"):
        chosen += f" from {text['documents']:,} documents" + (f" ({text['tokens']:,} tokens)" if text.get("tokens") else "")
    where = f" of `{subset.model['name']}`, step {subset.model.get('step', 0):,}" if subset.model.get("name") else ""
    kept = [(str(i), str(len(ids) + subset.num_shared), ", ".join(map(str, ids))) for i, ids in enumerate(subset.kept)]
    return ["## Kept experts", f"{subset.share:.1%} of the {of} experts of each layer{where}. {chosen}.",
            _table(("layer", "experts", "routed ones, by their number in the whole model"), kept)]


def _evaluations(found: Checkpoint, subset: Subset | None) -> list[str]:
    """The newest of each kind in metrics.jsonl that is of this step or before."""
    path = found.run / METRICS
    records = records_and_foreign_lines(path.read_bytes())[0] if path.is_file() else []
    newest = {r["eval"]: r for r in records if isinstance(r.get("eval"), str) and r["step"] <= found.step}
    parts = []
    if held := newest.get("held_out"):
        rows = [(name, *(_figure(r.get(key)) for key in ("tokens", "loss", "bits_per_byte")))
                for name, r in [("all", held), *list((held.get("labels") or {}).items())[:MAX_LABELS]] if isinstance(r, dict)]
        parts += [f"Held-out text, after step {held['step']:,}:",
                  _table(("label", "tokens", "loss (nats/token)", "bits/byte"), rows)]
    if tasks := newest.get("tasks"):
        rows = [(task, name, _figure(value)) for task, metrics in tasks.items() if isinstance(metrics, dict)
                for name, value in metrics.items() if isinstance(value, (int, float)) and not name.endswith("_stderr")]
        parts += [f"lm-evaluation-harness, after step {tasks['step']:,}:", _table(("task", "metric", "value"), rows)]
    if subset and not parts:
        parts = ["What these experts lose against the whole model was not measured; `emo-jax eval` of the whole model with "
                 "`--subset` does, by label."]
    elif subset:
        parts += ["These are figures of the kept experts, trained on; of the whole model there are none here."]
    return ["## Evaluation", *parts] if parts else []


def _base_model(found: Checkpoint) -> str | None:
    """The hub's name of the model that was imported, where it is known."""
    config = found.run / HF_FILES / "config.json"
    path = read_json(config).get("_name_or_path") if config.is_file() else None
    if isinstance(path, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        return path
    name = _imported_name(found)
    return f"allenai/{name}" if name in PUBLISHED else None


def _front_matter(keys: dict[str, Any]) -> str:
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in keys.items() if value), "---"])


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)


def _figure(x: Any) -> str:
    return f"{x:,}" if isinstance(x, int) else f"{x:.4f}" if isinstance(x, float) else ""


def _amount(n: int) -> str:
    for unit, size in (("billion", 10**9), ("million", 10**6)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:,}"

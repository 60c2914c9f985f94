"""`emo-jax analyze`: everything that this room knows of one model, or of two side by side, in a folder.

    OUT/analysis.json      every number; documents.npz: the text and the clusters of its tokens
    OUT/report.html        the page; figures/ as PNG and SVG, tables/ as CSV, cards/ a page for each cluster
    OUT/activations/MODEL  probabilities and choices of every token, memory-mapped; what was interrupted goes on from them
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from emo_jax import model
from emo_jax.analysis import clusters as clusters_lib
from emo_jax.analysis import contents, coverage, measures, modules
from emo_jax.analysis.activations import collect, losses, with_random_routers
from emo_jax.analysis.looked import Looked, Options
from emo_jax.analysis.page import write_figures, write_page
from emo_jax.analysis.text import Text, read_text
from emo_jax.analysis.use import pool_size
from emo_jax.analysis.words import Words
from emo_jax.buckets import is_url
from emo_jax.checkpoints.subset import Subset, require_experts
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, make_folder
from emo_jax.loaded import LoadedModel
from emo_jax.progress import say
from emo_jax.train.flops import active_matmul_params


def analyze(models: Sequence[LoadedModel], out: str | AnyPath, options: Options,
            subsets: Mapping[str, Subset] | None = None, keep_curves: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes the folder and returns what is in analysis.json. The text is that of the first model's data; `subsets` are of the
    first model, by name; `keep_curves` the results of `emo-jax eval --keep` by name of model. Raises `InputError` for models
    that do not read the same tokens."""
    _check(models)
    folder = local_folder(out)
    source, numbers = models[0].documents_to_score()
    text = read_text(models[0].config, source, models[0].tokenizer, numbers, options.tokens_per_document, options.tokens)
    say(f"{len(text.tokens):,} tokens of {len(text.labels):,} documents in {len(text.names)} labels of {text.source}")
    words, looked = Words(text, models[0].tokenizer), []
    for title, loaded in zip(_names(models), models):
        looked.append(_look(title, loaded, text, folder / "activations" / title, options))
    found = {
        "data": {"source": text.source, "documents": len(text.labels), "tokens": len(text.tokens),
                 "tokens_per_document": options.tokens_per_document, "labels": list(text.names),
                 "documents_of_label": np.bincount(text.labels, minlength=len(text.names)).tolist()},
        "models": [_describe(one, words, options, {} if i else subsets or {}, (keep_curves or {}).get(one.name))
                   for i, one in enumerate(looked)],
        "random_router": _null(looked[0], options),
        "difference": _difference(looked), "alignment": None, "measures": [row._asdict() for row in measures.MEASURES],
    }
    if len(looked) == 2:
        found["alignment"] = coverage.align(*(one.clusters.of_token for one in looked))
    say("writing the report")
    contents.write(folder, found, text, words, looked)
    write_page(folder)
    write_figures(folder)
    return found


def _check(models: Sequence[LoadedModel]) -> None:
    if jax.process_count() > 1:
        raise InputError("analyze runs in one process (of any number of devices)")
    for loaded in models:
        require_experts(loaded.config)
        if loaded.tokenizer.sha256 != models[0].tokenizer.sha256:
            raise InputError(f"{loaded.saved.run} and {models[0].saved.run} have different tokenizers; two models are compared "
                             f"token by token")


def local_folder(out: str | AnyPath) -> Path:
    """--out. Raises `InputError` for one in a bucket."""
    if is_url(str(out)):
        raise InputError(f"--out {out}: activations are memory-mapped; give a local folder, and copy it from there")
    return Path(make_folder(out))


def _names(models: Sequence[LoadedModel]) -> list[str]:
    """Of the config; of two with the same, also the run's folder and the step."""
    names = [loaded.config.name for loaded in models]
    if len(set(names)) < len(names):
        names = [f"{loaded.config.name}-{loaded.saved.run.name}-{loaded.saved.step}" for loaded in models]
    return names if len(set(names)) == len(names) else [f"{n}-{i}" for i, n in enumerate(names)]


def _look(title: str, loaded: LoadedModel, text: Text, folder: Path | None, options: Options) -> Looked:
    began, m = time.monotonic(), loaded.config.model
    a = collect(loaded, text, folder)
    pooled = {key: losses(loaded, text, pool_size(m.num_routed_experts, share, m.routed_top_k), what=f"{title}: loss in pools")
              for key, share in measures.POOLS.items()}
    say(f"{title}: activations {time.monotonic() - began:.0f} s; clusters")
    found = clusters_lib.cluster_tokens(a, options.features, options.clusters, options.seed)
    say(f"{title}: {len(found.centres)} clusters; measures and their intervals")
    return Looked(title, loaded, a, found, measures.measure(a, found, pooled))


def _null(one: Looked, options: Options) -> dict[str, Any] | None:
    if not options.null_tokens:
        return None
    title = f"{one.name} with random routers"
    text = one.activations.text.thinned(options.null_tokens)
    null = _look(title, with_random_routers(one.loaded, options.seed), text, None, options)
    return {"name": title, "tokens": len(text.tokens), "measures": _measures(null)}


def _difference(looked: Sequence[Looked]) -> dict[str, Any] | None:
    if len(looked) < 2:
        return None
    first, second = (one.estimates for one in looked)
    return {key: (first[key].mean() - second[key].mean()).describe() for key in first if key in second}


def _measures(one: Looked) -> dict[str, Any]:
    known = measures.baselines(one.activations)
    return {key: e.mean().describe() | {"baseline": known.get(key)} for key, e in one.estimates.items()}


def _describe(one: Looked, words: Words, options: Options, subsets: Mapping[str, Subset], keep_curve: Any) -> dict[str, Any]:
    a, m = one.activations, one.loaded.config.model
    arrays = {"coverage": coverage.coverage(a), "similarity": coverage.similarity(a)}
    return {
        "name": one.name, "checkpoint": str(one.loaded.saved.path), "step": one.loaded.saved.step, "layers": m.num_layers,
        "experts": m.num_routed_experts, "top_k": m.routed_top_k, "shared": m.num_shared_experts,
        "identity": one.loaded.identity(), "kind": "emo" if one.loaded.config.uses_pools else "standard",
        "parameters": model.num_params(one.loaded.config),
        "active_parameters": active_matmul_params(one.loaded.config),
        "measures": _measures(one),
        "by_layer": {key: e.describe() for key, e in one.estimates.items() if e.drawn.ndim == 2},
        "clusters": modules.of_clusters(one, words, options),
        "subsets": [modules.of_subset(one, words, options, title, subset) for title, subset in subsets.items()],
        **{title: {key: x.tolist() for key, x in part.items()} for title, part in arrays.items()},
        "keep_curve": keep_curve,
    }

"""lm-evaluation-harness on our checkpoints: an adapter to its interface for language models, and its tasks.

Needs the extra `eval` (lm_eval). Imported only where tasks are asked for.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from emo_jax import model
from emo_jax.config import Config
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.errors import InputError, RunError
from emo_jax.generation.engine import Generator
from emo_jax.generation.sampling import Sampling
from emo_jax.generation.scoring import Scorer
from emo_jax.loaded import load

try:
    import datasets
    from lm_eval.api import model as harness_model
    from lm_eval.api import task as harness_task
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as e:
    raise InputError(f"tasks need lm-evaluation-harness ({e}): pip install 'emo-jax[eval]'") from None

MAX_NEW_TOKENS = 256  # where a task does not say


class EmoLM(TemplateLM):
    """A model as the harness sees it. `params` may be given later, and changed, with `set_params`."""

    def __init__(self, config: Config, mesh: Mesh, tokenizer: Tokenizer, eos_ids: Sequence[int],
                 params: model.Params | None = None, allowed: np.ndarray | None = None):
        super().__init__()
        self.config, self.mesh, self.tokens, self.eos_ids, self.allowed = config, mesh, tokenizer, eos_ids, allowed
        self._scorer, self._params = Scorer(config, mesh, params, allowed), params
        self._generator: Any = None

    def set_params(self, params: model.Params | None) -> None:
        self._params, self._generator = params, None
        self._scorer.set_params(params)

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokens.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.tokens.encode(string).tolist()

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        return self._scorer([(context, continuation) for _, context, continuation in requests], progress=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        pairs, owners = [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id,
                                                self._scorer.max_length, 1)
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(i)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [score for score, _ in self._scorer(pairs, progress=True)])
        return totals.tolist()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        if self._generator is None:
            self._generator = Generator(self.config, self.mesh, self._params or {}, self.eos_ids, self.allowed)
        groups: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_settings(request.args[1]), []).append(i)
        out = [""] * len(requests)
        for (until, count, sampling), members in groups.items():
            texts = self._generate([requests[i].args[0] for i in members], until, count, sampling)
            for i, text in zip(members, texts):
                out[i] = text
        return out

    def _generate(self, contexts: list[str], until: tuple[str, ...], count: int, sampling: Sampling) -> list[str]:
        room = self._scorer.max_length - count
        if room < 1:
            raise InputError(f"a task asks for {count} new tokens, which leaves its prompt nothing of the "
                             f"{self._scorer.max_length} tokens of a row")
        prompts = [(self.tok_encode(c) or [self.prefix_token_id])[-room:] for c in contexts]

        def stop(row: int, tokens: list[int]) -> bool:
            text = self.tokens.continuation(prompts[row], tokens)
            return any(s in text for s in until)

        made = self._generator.generate(prompts, count, sampling, stop if until else None)
        texts = [self.tokens.continuation(p, m) for p, m in zip(prompts, made)]
        return [text[: min([text.find(s) for s in until if s in text], default=None)] for text in texts]


def _settings(kwargs: dict[str, Any]) -> tuple[tuple[str, ...], int, Sampling]:
    """What a request's arguments ask for; the same for all requests of a group."""
    until = kwargs.get("until") or []
    until = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
    count = int(kwargs.get("max_gen_toks") or kwargs.get("max_new_tokens") or MAX_NEW_TOKENS)
    temperature = float(kwargs.get("temperature") or 0.0) if kwargs.get("do_sample", True) else 0.0
    return until, count, Sampling(temperature, float(kwargs.get("top_p") or 1.0)).check()


# ---- tasks ----------------------------------------------------------------------------------------------------------


class Tasks:
    """`wanted`: names and YAML files, separated by commas. Paths in a file are relative to it. They are loaded at once,
    so that what is missing is known before anything runs."""

    def __init__(self, wanted: str, num_fewshot: int | None = None, limit: int | None = None):
        items = [item.strip() for item in wanted.split(",") if item.strip()]
        files = [Path(item) for item in items if item.endswith((".yaml", ".yml"))]
        missing = [str(f) for f in files if not f.is_file()]
        if missing or not items:
            raise InputError(f"--tasks {wanted}: no such file: {', '.join(missing)}" if missing else "--tasks is empty")
        only_files = len(files) == len(items)
        self.manager = TaskManager(include_path=sorted({str(f.resolve().parent) for f in files}),
                                   include_defaults=not only_files)
        known = set(self.manager.all_tasks)
        unknown = [item for item in items if Path(item) not in files and item not in known]
        if unknown:
            raise InputError(f"--tasks: no task, group or tag {', '.join(unknown)} in lm-evaluation-harness, and no "
                             f"such YAML file")
        self.num_fewshot, self.limit = num_fewshot, limit
        self.loaded = [task for item in items for task in self._load(item, Path(item) if Path(item) in files else None)]

    def _load(self, name: str, file: Path | None) -> list:
        """The tasks (or the group) of this name or in this file, with their data."""
        try:
            with contextlib.chdir(file.resolve().parent if file else "."), _quiet():
                found = self.manager.load(file.name if file else name)
        except Exception as e:
            raise InputError(f"--tasks {name} cannot be loaded: {type(e).__name__}: {str(e).strip()[:500]}\n(its data "
                             f"may need the network; a task file can name local data, see dataset_kwargs.data_files)"
                             ) from None
        groups = found.get("groups") or {}
        return [groups[name]] if name in groups else list(groups.values() or found["tasks"].values())

    def __call__(self, lm: EmoLM) -> dict[str, dict[str, Any]]:
        """{task: {"metric,filter": value, ...}}, as the harness reports it."""
        random.seed(0)  # this and the next one: what the harness's own command sets
        np.random.seed(1234)
        loaded = self.manager.load(list(self.loaded))
        for task in loaded["tasks"].values():
            asked, own = self.num_fewshot, task.get_config("num_fewshot")
            if own is None or (asked is not None and own != 0):  # a task file's 0 means never any
                task.set_config(key="num_fewshot", value=asked or 0)
            task.set_fewshot_seed(seed=1234)
        # Not `simple_evaluate`: that also asks git and the system's tools in child processes about the machine.
        with contextlib.redirect_stdout(sys.stderr), _quiet():
            found = evaluate(lm, loaded, limit=self.limit, log_samples=False, bootstrap_iters=1000)
        if found is None:
            raise RunError("the harness returned no results")
        return {task: {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
                for task, metrics in {**found["results"], **(found.get("groups") or {})}.items()}


@contextlib.contextmanager
def _quiet():
    """Without the progress bars of the harness and of `datasets`; scoring has its own lines."""
    modules = (harness_model, harness_task)
    bars, enabled = [m.tqdm for m in modules], datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    for module in modules:
        vars(module)["tqdm"] = lambda items, *args, **kwargs: items  # all that is asked of it
    try:
        yield
    finally:
        for module, bar in zip(modules, bars):
            vars(module)["tqdm"] = bar
        if enabled:
            datasets.enable_progress_bars()


def evaluate_tasks(path: str, wanted: str, *, subset: str = "", num_fewshot: int | None = None,
                   limit: int | None = None, step: int | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """`emo-jax eval --tasks`."""
    tasks = Tasks(wanted, num_fewshot, limit)
    loaded = load(path, overrides, step=step, mesh="experts", subset=subset or None)
    lm = EmoLM(loaded.config, loaded.mesh, loaded.tokenizer, loaded.end_ids, loaded.params, loaded.allowed())
    return {"checkpoint": str(loaded.saved.path), "step": loaded.saved.step, "subset": subset or None,
            "tasks": tasks(lm)}


class TaskEvaluation:
    """An extra evaluation of the training loop: the tasks of `train.eval_tasks`."""

    name = "tasks"

    def __init__(self, config: Config, mesh: Mesh, tokenizer: Tokenizer):
        self._tasks = Tasks(config.train.eval_tasks)
        self._lm = EmoLM(config, mesh, tokenizer, (tokenizer.eos_id,))

    @classmethod
    def make(cls, config: Config, mesh: Mesh, documents: Any) -> TaskEvaluation:
        """`documents`: the `train.start.Documents` of the run."""
        return cls(config, mesh, documents.tokenizer)

    def __call__(self, params: model.Params) -> dict[str, Any]:
        self._lm.set_params(params)
        results = self._tasks(self._lm)
        self._lm.set_params(None)
        return {task: {k.removesuffix(",none"): v for k, v in metrics.items()} for task, metrics in results.items()}


def table(result: dict[str, Any]) -> str:
    lines = [f"{'task':32} {'metric':20} {'value':>10} {'stderr':>10}"]
    for task, metrics in result["tasks"].items():
        for key, value in metrics.items():
            name, _, form = key.partition(",")
            if name.endswith("_stderr") or name == "alias" or not form:
                continue
            error = metrics.get(f"{name}_stderr,{form}")
            error = f"{error:10.4f}" if isinstance(error, float) else f"{'':10}"
            lines.append(f"{task[:32]:32} {name[:20]:20} {value:10.4f} {error}")
    return "\n".join(lines)

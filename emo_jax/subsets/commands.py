"""What `emo-jax select`, `emo-jax subset ...` and `emo-jax eval` with subsets do: arguments -> (result, text)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emo_jax import sharding
from emo_jax.data.documents import Document, Source
from emo_jax.errors import InputError
from emo_jax.subsets import calibration as calibration_lib
from emo_jax.subsets import compose as compose_lib
from emo_jax.subsets import report
from emo_jax.subsets import subset as subset_lib
from emo_jax.subsets.budget import Budget
from emo_jax.subsets.calibration import Calibration
from emo_jax.subsets.check import check_own_labels, check_subsets, compare, documents_to_score, evaluation_of
from emo_jax.subsets.choose import choose, choose_one
from emo_jax.subsets.opened import Opened, open_model
from emo_jax.subsets.subset import Subset
from emo_jax.train.checkpoint import open_checkpoint

Result = tuple[dict[str, Any], str]


def select(args) -> Result:
    sharding.start_distributed()
    opened = open_model(args.checkpoint, args.overrides, args.step)
    budget = Budget(args.keep, args.keep_per_layer, args.keep_total)
    budget.check(opened.config)
    found = choose_one(opened, _calibration(opened, args), args.method, budget, **_options(args))
    found.save(args.out)
    about = found.calibration
    return _describe(found) | {"out": args.out}, (
        f"{_summary(found)}, chosen by {about['documents']} documents ({about['tokens']:,} tokens): {args.out}")


def evaluate(args) -> Result:
    """`emo-jax eval` with --subset or --keep."""
    sharding.start_distributed()
    if bool(args.subset) == bool(args.keep):
        raise InputError("give either --subset or --keep")
    if args.subset:
        for flag in ("against", "out", "calibration", "example"):
            if getattr(args, flag):
                raise InputError(f"--{flag} goes with --keep; the subsets of --subset are chosen already")
        opened = open_model(args.checkpoint, args.overrides, args.step, args.data)
        return _checked(opened, {path: subset_lib.load(path, opened.config) for path in args.subset}, args)
    models = {}
    for path in (args.checkpoint, args.against) if args.against else (args.checkpoint,):
        opened = open_model(path, args.overrides, args.step if path == args.checkpoint else None, args.data)
        models[_unique(opened.config.name, models)] = _keeps(opened, args)
    figure = report.save_figure(models, Path(args.out) / "keep_curve.png") if args.out else None
    text = report.curve_table(models) + (f"\n{figure}" if figure else "")
    return {"models": models, "figure": figure and str(figure)}, text


def show(args) -> Result:
    subsets = {path: subset_lib.load(path) for path in args.files}
    result = {"subsets": [_describe(s) | {"file": path} for path, s in subsets.items()]}
    lines = [f"{path}: {_summary(s)}" for path, s in subsets.items()]
    if len(subsets) > 1:
        result["similarity"] = compose_lib.similarity(list(subsets.values()))
        for name, table in result["similarity"].items():
            lines += [f"{name}:", *(" ".join(f"{x:6.3f}" for x in row) for row in table)] if table else []
    elif subsets:
        result["kept"] = [list(ids) for ids in next(iter(subsets.values())).kept]
        lines += [f"  layer {i}: {' '.join(map(str, ids))}" for i, ids in enumerate(result["kept"])]
    return result, "\n".join(lines)


def extract(args) -> Result:
    from emo_jax import model
    from emo_jax.subsets.extract import extract as run
    from emo_jax.subsets.load import require_same

    found = open_checkpoint(args.checkpoint)
    chosen = subset_lib.load(args.subset, found.config)
    require_same(found, chosen)
    path = run(found, chosen, args.out)
    small = open_checkpoint(path)
    counts = [model.num_params(c.config) for c in (small, found)]
    return {"checkpoint": str(path), "keep": chosen.keep, "parameters": counts[0], "of": counts[1]}, (
        f"{path}: {counts[0]:,} of {counts[1]:,} parameters; {_summary(chosen)}")


def compose(args) -> Result:
    subsets = [subset_lib.load(path) for path in args.files]
    if args.how == "union":
        if args.keep or args.weights:
            raise InputError("--keep and --weights go with --how weighted or need; a union keeps everything")
        made = compose_lib.union(subsets)
    else:
        routed = (args.keep or 0) - subsets[0].num_shared
        if not 0 < routed <= subsets[0].num_routed:
            raise InputError(f"--how {args.how} needs --keep between {subsets[0].num_shared + 1} and "
                             f"{subsets[0].num_routed + subsets[0].num_shared}, not {args.keep}")
        made = (compose_lib.weighted(subsets, routed, args.weights) if args.how == "weighted"
                else compose_lib.needed(subsets, routed))
    made.save(args.out)
    return _describe(made) | {"out": args.out}, f"{_summary(made)}: {args.out}"


def merge(args) -> Result:
    from emo_jax.subsets.merge import merge as run

    sharding.start_distributed()
    whole, part = open_checkpoint(args.checkpoint), open_checkpoint(args.part)
    chosen = subset_lib.load(args.subset or part.run / "subset.json", whole.config)
    path = run(whole, part, chosen, args.out, alpha=args.alpha, router=args.router, shared=args.shared)
    result: dict[str, Any] = {"checkpoint": str(path)}
    if args.no_check:
        return result, str(path)
    before = open_model(args.checkpoint, args.overrides, data_path=args.data or "")
    source, numbers = documents_to_score(before, own_text=not args.data)
    evaluation = evaluation_of(before, source, numbers)
    full = evaluation.losses(before.params)
    after = evaluation.losses(open_model(str(path), args.overrides).params)
    result |= {"data": source.name, "full": evaluation.summary(*full), "documents_left_out": 0, "subsets": [
        compare(evaluation, full, after) | {"name": "merged", "keep": "all", "share": 1.0, "method": "merge"}]}
    return result, f"{path}\n{report.subset_table(result)}"


def suggest(args) -> Result:
    sharding.start_distributed()
    if not args.calibration:
        raise InputError("subset suggest needs --calibration with two documents or more: one part chooses, the other "
                         "is scored")
    opened = open_model(args.checkpoint, args.overrides, data_path=args.calibration)
    source, numbers = documents_to_score(opened, own_text=False)
    groups = calibration_lib.by_label(source, numbers)
    if args.label and args.label not in groups:
        raise InputError(f"{source.name}: no document of label {args.label!r}; there are {', '.join(groups)}")
    groups = {"": groups[args.label] if args.label else [int(i) for i in numbers]}
    chosen_by, scored = calibration_lib.halves(groups, opened.config.seed)
    if not scored:
        raise InputError(f"{source.name}: subset suggest needs two documents or more")
    chosen_by[""] = calibration_lib.sample(chosen_by[""], args.documents or calibration_lib.MAX_DOCUMENTS, 0)
    text = calibration_lib.from_source(opened.config, source, opened.tokenizer, chosen_by)
    best, tried = compose_lib.suggest(opened, text, evaluation_of(opened, source, scored[""]), args.tolerance,
                                      args.method, **_options(args))
    best.save(args.out)
    lines = [f"  keep {t['keep']:4}  {t['loss']:.4f} nats/token ({t['difference']:+.4f})" for t in tried]
    return _describe(best) | {"out": args.out, "tried": tried}, "\n".join([f"{_summary(best)}: {args.out}", *lines])


def finetune(args) -> Result:
    from emo_jax.subsets.finetune import finetune as run

    sharding.start_distributed()
    found = open_checkpoint(args.checkpoint)
    overrides = [f"optimizer.trainable={args.train_what}"] if args.train_what else []
    chosen = subset_lib.load(args.subset, found.config)
    result = run(found, chosen, args.out, args.data or "", overrides + args.overrides)
    return result, f"trained to step {result['step']} of {result['steps']}: {result['checkpoint']}"


def extend(args) -> Result:
    from emo_jax.subsets.extend import extend as run

    path = run(open_checkpoint(args.checkpoint), args.experts, args.out, init=args.init, forced=not args.not_forced)
    return {"checkpoint": str(path), "experts": args.experts, "init": args.init}, (
        f"{path}: {args.experts} new experts in every layer ({args.init}); train them with the config beside it and "
        f"--train.init_params_from={path}")


def disable(args) -> Result:
    sharding.start_distributed()
    opened = open_model(args.checkpoint, args.overrides, data_path=args.data)
    rest = compose_lib.complement(subset_lib.load(args.subset, opened.config))
    subset_lib.require_fits(rest, opened.config, f"everything but {args.subset}")
    if args.out:
        rest.save(args.out)
    return _checked(opened, {f"without {args.subset}": rest}, args)


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _calibration(opened: Opened, args) -> Calibration:
    if args.example:
        for text in args.example:
            if not text:
                raise InputError("--example is empty; give a text")
        source = Examples(args.example)
        return calibration_lib.from_source(opened.config, source, opened.tokenizer, {"": range(len(args.example))})
    return calibration_lib.open_calibration(opened.config, opened.tokenizer, args.calibration, args.label,
                                            args.documents)


class Examples(Source):
    """Texts given on the command line."""

    name, labels, fingerprint = "--example", ["example"], ""

    def __init__(self, texts: list[str]):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, i: int) -> Document:
        return Document(self._texts[i], "example", int(i))


def _keeps(opened: Opened, args) -> dict[str, Any]:
    """Subsets of every size of --keep (the size of the whole model is the full model itself)."""
    keeps = [k for k in args.keep if k != opened.config.model.num_experts]
    if not keeps:
        raise InputError(f"--keep {','.join(map(str, args.keep))}: give sizes below the "
                         f"{opened.config.model.num_experts} experts of the model")
    if not (args.calibration or args.example):
        return check_own_labels(opened, keeps, args.select, not args.data, args.documents, **_options(args))
    found = choose(opened, _calibration(opened, args), args.select, [Budget(keep=k) for k in keeps], **_options(args))
    return check_subsets(opened, {f"keep {k}": s[0] for k, s in zip(keeps, found)}, own_text=not args.data)


def _checked(opened: Opened, subsets: dict[str, Subset], args) -> Result:
    result = check_subsets(opened, subsets, own_text=not args.data) | {"checkpoint": str(opened.checkpoint.path)}
    return result, report.subset_table(result)


def _options(args) -> dict[str, Any]:
    if args.layer_group < 0:
        raise InputError(f"--layer-group {args.layer_group} must not be negative")
    return {"layer_group": args.layer_group, "on_host": args.activations_on_host, "seed": args.seed or 0}


def _describe(subset: Subset) -> dict[str, Any]:
    calibration = {k: v for k, v in subset.calibration.items() if k != "document_hashes"}
    return {"keep": subset.keep, "share": subset.share, "method": subset.method, "calibration": calibration,
            "model": subset.model}


def _summary(subset: Subset) -> str:
    keep = sorted(set(subset.keep))
    each = f"{keep[0]}" if len(keep) == 1 else f"{keep[0]} to {keep[-1]}"
    return (f"{each} of {subset.num_routed + subset.num_shared} experts in each of {len(subset.kept)} layers "
            f"({subset.share:.1%}; {subset.num_shared} shared) by {subset.method}")


def _unique(name: str, taken: dict) -> str:
    while name in taken:
        name += "'"
    return name

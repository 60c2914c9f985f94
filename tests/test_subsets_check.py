"""A tiny EMO trained on two labels: what subsets cost, compositions of them, fine-tuning, and the commands."""

import json

import numpy as np
import pytest
from tiny_run import records, tiny_config

from emo_jax import cli
from emo_jax.checkpoints import subset as subset_lib
from emo_jax.checkpoints.subset import Subset
from emo_jax.data.sources import open_source
from emo_jax.errors import InputError
from emo_jax.loaded import load
from emo_jax.subsets import calibration as calibration_lib
from emo_jax.subsets import check, compose, modularity
from emo_jax.subsets.budget import Budget
from emo_jax.subsets.choose import choose, choose_one
from emo_jax.train.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def run(folder):
    """Eight experts, enough steps to know the words of both labels."""
    config = tiny_config(folder, "--train.steps=60", "--train.eval_every=30", "--train.eval_subsets=true",
                         "--data.eval_fraction=0.3", "--train.eval_rows=20", "--train.log_every=20")
    train(config, folder / "out", [modularity.Modularity.make])
    return str(folder / "out")


@pytest.fixture(scope="module")
def opened(run):
    return load(run)


@pytest.fixture(scope="module")
def evaluation(opened):
    source = open_source(opened.config.data)
    return opened.evaluation(source, np.arange(len(source)))


def calibration_of(opened, label):
    source = open_source(opened.config.data)
    numbers = [i for i in range(len(source)) if source.label(i) == label][:8]
    return calibration_lib.from_source(opened.config, source, opened.tokenizer, {label: numbers})


def run_command(*argv):
    """(exit status, the JSON object) of `emo-jax ARGV --json`."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = cli.main([*map(str, argv), "--json"])
    return status, json.loads(out.getvalue().splitlines()[-1])


def test_the_full_mask_is_the_full_model_and_masks_work_by_row(opened, evaluation):
    plain, tokens = evaluation.losses(opened.params)
    m = opened.config.model
    everything = np.ones((m.num_layers, m.num_routed_experts), bool)
    np.testing.assert_allclose(evaluation.losses(opened.params, everything)[0], plain, rtol=1e-6)
    small = choose_one(opened, calibration_of(opened, "color"), "router", Budget(keep=3)).mask()
    mixed = np.where((evaluation.labels == "color")[None, :, None], small[:, None], everything[:, None])
    got = evaluation.losses(opened.params, mixed)[0]
    color = evaluation.labels == "color"
    np.testing.assert_allclose(got[color], evaluation.losses(opened.params, small)[0][color], rtol=1e-6)
    np.testing.assert_allclose(got[~color], plain[~color], rtol=1e-6)
    assert tokens.sum() > 0


def test_one_compilation_serves_every_subset(opened, evaluation):
    import jax

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None)
    text = calibration_of(opened, "count")
    sizes = [Budget(keep=k) for k in (7, 5, 4, 3, 2)]
    subsets = [s[0] for s in choose(opened, text, "router", sizes)]
    evaluation.losses(opened.params, subsets[0].mask())
    before = len(compiled)
    losses = [evaluation.losses(opened.params, s.mask())[0].sum() for s in subsets]
    assert len(compiled) == before and len(set(losses)) == 5


def test_differences_have_intervals_that_hold_the_difference(opened, evaluation):
    full = evaluation.losses(opened.params)
    subset = choose_one(opened, calibration_of(opened, "color"), "layerwise", Budget(keep=3))
    row = check.compare(evaluation, full, evaluation.losses(opened.params, subset.mask()))
    low, high = row["interval"]
    assert low <= row["difference"] <= high and set(row["labels"]) == {"color", "count"}
    np.testing.assert_allclose(row["difference"], row["loss"] - evaluation.summary(*full)["loss"], atol=1e-9)
    own, other = row["labels"]["color"]["difference"], row["labels"]["count"]["difference"]
    assert own < other  # the experts of one label serve it better than the other
    same = check.compare(evaluation, full, full)
    assert same["difference"] == 0 and same["interval"] == [0, 0]


def test_the_text_that_chose_is_not_scored(opened, run, folder):
    half = folder / "half.jsonl"
    lines = (folder / "documents.jsonl").read_text().splitlines(keepends=True)
    half.write_text("".join(lines[:60]))
    text = calibration_lib.open_calibration(opened.config, opened.tokenizer, str(half))
    subset = choose_one(opened, text, "router", Budget(keep=4))
    everywhere = load(run, data=str(folder / "documents.jsonl"))
    result = check.check_subsets(everywhere, {"s": subset})
    texts = [json.loads(line)["text"] for line in lines]
    assert result["documents_left_out"] == sum(t in set(texts[:60]) for t in texts)
    with pytest.raises(InputError, match="was used to choose"):
        check.check_subsets(load(run, data=str(half)), {"s": subset})
    source = open_source(everywhere.config.data)
    text, scored = calibration_lib.halves(opened.config, source, opened.tokenizer,
                                          {"a": list(range(11)), "b": [20], "c": [30, 31]}, 5)
    chosen = [calibration_lib.document_hash(source[i]) for i in range(32) if i not in scored]
    assert text.names == ("a", "c") and len(scored) == 5 + 1 and set(scored) < {*range(11), 30, 31}
    assert all(set(about["document_hashes"]) <= set(chosen) for about in text.about)
    assert [about["documents"] for about in text.about] == [5, 1]


def test_metrics_of_modularity_are_logged(run, folder):
    found = [r for r in records(folder / "out", evaluation=True) if r["eval"] == "subsets"]
    assert [r["step"] for r in found] == [30, 60]
    assert set(found[1]["loss_at"]) == {"25%", "12.5%"} and all(v > 0 for v in found[1]["loss_at"].values())
    assert len(found[1]["mutual_information_layers"]) == 2 and found[1]["mutual_information"] > 0


def test_mutual_information_knows_its_extremes():
    alike, apart = np.full((2, 1, 4), 0.25), np.eye(2).repeat(2, axis=1)[:, None] / 2
    tokens = np.array([10, 10])
    np.testing.assert_allclose(modularity.mutual_information(alike, tokens), 0, atol=1e-12)
    np.testing.assert_allclose(modularity.mutual_information(apart, tokens), np.log(2))


def subset_of(*kept, scores=None):
    return Subset(tuple(map(tuple, kept)), 6, 1, "test", scores=scores)


def test_compositions():
    a = subset_of([0, 1], scores=((4.0, 3.0, 2.0, 1.0, 0.0, 0.0),))
    b = subset_of([4, 5], scores=((0.0, 0.0, 1.0, 1.0, 4.0, 4.0),))
    assert compose.union([a, b]).kept == ((0, 1, 4, 5),)
    assert compose.weighted([a, b], 3).kept == ((0, 4, 5),)
    assert compose.weighted([a, b], 3, [3, 1]).kept == ((0, 1, 4),)
    order = compose.by_marginal_need([a, b])[0]
    assert order[:3] in ([0, 4, 5], [0, 4, 1]) and sorted(order) == list(range(6))
    assert compose.needed([a, b], 4).kept == ((0, 1, 4, 5),)
    alike = compose.similarity([a, b, a])
    assert alike["overlap"][0] == [1, 0, 1] and alike["cosine"][0][2] > 0.999 > alike["cosine"][0][1]
    assert compose.complement(a).kept == ((2, 3, 4, 5),)
    with pytest.raises(InputError, match="of one model"):
        compose.union([a, Subset(((0,), (1,)), 6, 1, "test")])


def random_subsets(count, routed=12, layers=3):
    """Of a few strong experts each."""
    scores = np.random.default_rng(0).dirichlet(np.full(routed, 0.2), (count, layers))
    return [Subset(((0,),) * layers, routed, 1, "test", {"path": str(i), "document_hashes": [str(i)]},
                   tuple(map(tuple, s.tolist()))) for i, s in enumerate(scores)]


@pytest.mark.parametrize("quotas", [None, (0.5, 0.25, 0.25), (0.6, 0, 0.1), (0, 0, 0)])
def test_quotas_guarantee_every_corpus_its_best_experts_within_the_budget(quotas):
    corpora, routed = random_subsets(3), 8
    found = compose.quota(corpora, routed, quotas)
    counts = [int(routed * q + 1e-9) for q in quotas or (1 / 3,) * 3]
    scores = np.array([s.score_array() for s in corpora])
    for layer in range(3):
        kept, own = set(found.kept[layer]), set()
        for corpus, count in zip(scores, counts):
            own |= set(np.argsort(-corpus[layer])[:count].tolist())
        assert own <= kept and len(kept) == routed
        rest, mean = sorted(set(range(12)) - own, key=lambda e: -scores[:, layer, e].sum()), scores.mean(axis=0)
        assert kept == own | set(rest[:routed - len(own)])
        np.testing.assert_allclose(found.score_array()[layer], mean[layer])
    parts = found.calibration["subsets"]
    assert [p["guaranteed"] for p in parts] == counts and found.calibration["document_hashes"] == ["0", "1", "2"]
    np.testing.assert_allclose([p["coverage"] for p in parts], (scores * found.mask()).sum(axis=2).mean(axis=1))


def test_quotas_do_not_depend_on_the_order_of_the_corpora_and_serve_one_that_the_mean_forgets():
    corpora = random_subsets(4)
    kept = compose.quota(corpora, 6, (0.4, 0.3, 0.2, 0.1))
    for order in ([3, 2, 1, 0], [2, 0, 3, 1]):
        other = compose.quota([corpora[i] for i in order], 6, [(0.4, 0.3, 0.2, 0.1)[i] for i in order])
        assert other.kept == kept.kept and other.scores == kept.scores
    alike = subset_of([0, 1, 2], scores=((4.0, 4.0, 2.0, 0.0, 0.0, 0.0),))
    spread = subset_of([4, 5], scores=((0.0, 0.0, 1.0, 3.0, 3.2, 3.1),))
    assert compose.weighted([alike, alike, spread], 3).kept == ((0, 1, 2),)
    made = compose.quota([alike, alike, spread], 3)
    assert made.kept == ((0, 1, 4),)
    assert [round(p["coverage"], 3) for p in made.calibration["subsets"]] == [0.8, 0.8, round(3.2 / 10.3, 3)]
    unused = subset_of([0], scores=((1.0, 0.0, 0.0, 0.0, 0.0, 0.0),))  # needs no other expert, so it is guaranteed no other
    assert compose.quota([unused, spread], 4, (0.5, 0.5)).kept == ((0, 3, 4, 5),)
    for quotas in ((0.5, 0.6), (0.5,), (-0.1, 0.5), (float("nan"), 0.1)):
        with pytest.raises(InputError, match=r"--quotas \[.*\] must be 2 numbers that are not negative and at most 1 in sum"):
            compose.quota([unused, spread], 4, quotas)


def test_one_command_chooses_for_several_corpora_and_says_what_each_has_of_its_own(run, folder, tmp_path, capsys):
    lines = (folder / "documents.jsonl").read_text().splitlines(keepends=True)
    paths = [tmp_path / f"{label}.jsonl" for label in ("color", "count")]
    for path in paths:
        path.write_text("".join(line for line in lines if json.loads(line)["source"] == path.stem))
    corpora = [a for path in paths for a in ("--calibration", path)]
    select = ["select", run, *corpora, "--method", "router", "--quotas", 0.5, 0.25, "--out", tmp_path / "both.json"]
    status, result = run_command(*select, "--keep", 5)
    assert status == 0 and result["keep"] == [5, 5] and result["method"] == "quota"
    parts = result["calibration"]["subsets"]
    assert [(p["path"], p["guaranteed"]) for p in parts] == [(str(paths[0]), 2), (str(paths[1]), 1)]
    assert all(0.5 < p["coverage"] < 1 for p in parts)
    for path in paths:
        assert run_command("select", run, "--calibration", path, "--method", "router", "--keep", 5,
                           "--out", path.with_suffix(".json"))[0] == 0
    compose_files = ["subset", "compose", *(path.with_suffix(".json") for path in paths), "--out", tmp_path / "again.json"]
    assert run_command(*compose_files, "--how", "quota", "--keep", 5, "--quotas", 0.5, 0.25)[0] == 0
    both, again = (subset_lib.load(tmp_path / name) for name in ("both.json", "again.json"))
    assert both.kept == again.kept
    assert cli.main(["subset", "show", str(tmp_path / "both.json")]) == 0
    assert f"{parts[0]['coverage']:.1%} of the scores of {paths[0]}, its first 2 in every layer" in capsys.readouterr().out
    for argv, message in [
            ([*select, "--keep-total", 10], "several --calibration go with --keep"),
            ([*select[:4], "--quotas", 0.5, "--keep", 5, "--out", "x"], "given more than once"),
            ([*select[:-2], "--quotas", 0.9, 0.2, "--keep", 5, "--out", "x"], "at most 1 in sum"),
            ([*compose_files, "--how", "need", "--keep", 5, "--quotas", 0.5], "--quotas goes with --how quota, not need"),
            ([*compose_files, "--weights", 1, 2], "--weights goes with --how weighted, not union")]:
        status, result = run_command(*argv)
        assert status == 2 and message in result["error"], result


def test_suggest_finds_the_smallest_that_is_good_enough(opened, evaluation):
    text = calibration_of(opened, "color")
    full = evaluation.summary(*evaluation.losses(opened.params))["loss"]
    tolerance = 0.1
    best, tried = compose.suggest(opened, text, evaluation, tolerance)
    loss = evaluation.summary(*evaluation.losses(opened.params, best.mask()))["loss"]
    assert loss <= full + tolerance and all(t["difference"] > tolerance for t in tried if t["keep"] < best.experts_per_layer[0])
    assert compose.suggest(opened, text, evaluation, 100.0)[0].experts_per_layer == [2, 2]


def test_fine_tuning_trains_what_was_asked_for_and_merges_back(run, folder, tmp_path):
    file = tmp_path / "color.json"
    assert run_command("select", run, "--calibration", folder / "documents.jsonl", "--label", "color", "--keep", 4,
                       "--method", "router", "--out", file)[0] == 0
    status, result = run_command("subset", "finetune", run, "--subset", file, "--out", tmp_path / "tuned",
                                 "--alone", "--train-what", "experts", "--train.steps=3", "--optimizer.learning_rate=0.01",
                                 "--train.batch_size=8",
                                 "--data", folder / "documents.jsonl")
    assert status == 0 and result["step"] == 3
    before, after = (load(str(p)).params for p in (tmp_path / "tuned" / "start", tmp_path / "tuned"))
    moved = {name: bool(np.any(np.asarray(before["layers"]["moe"][name]) != np.asarray(after["layers"]["moe"][name])))
             for name in ("router", "gate", "up", "down")}
    assert moved == {"router": False, "gate": True, "up": True, "down": True}
    np.testing.assert_array_equal(before["head"], after["head"])
    status, merged = run_command("subset", "merge", run, "--part", tmp_path / "tuned", "--out", tmp_path / "merged")
    assert status == 0 and set(merged["subsets"][0]["labels"]) == {"color", "count"}
    assert merged["subsets"][0]["difference"] != 0


def test_commands_and_their_mistakes(run, folder, tmp_path):
    documents, file = folder / "documents.jsonl", tmp_path / "s.json"
    assert run_command("select", run, "--example", "red green blue", "--keep", 3, "--out", file)[0] == 0
    assert subset_lib.load(file).calibration["documents"] == 1
    status, result = run_command("eval", run, "--data", documents, "--subset", file)
    assert status == 0 and result["subsets"][0]["keep"] == 3
    status, result = run_command("eval", run, "--keep", "8,3", "--select", "router", "--against", run,
                                 "--out", tmp_path / "figure")
    assert status == 0 and len(result["models"]) == 2 and (tmp_path / "figure" / "keep_curve.png").stat().st_size > 1000
    assert run_command("subset", "disable", run, "--subset", file)[1]["subsets"][0]["keep"] == 6
    status, result = run_command("subset", "suggest", run, "--calibration", documents, "--tolerance", 50, "--out", file)
    assert status == 0 and result["keep"] == [2, 2]
    assert run_command("subset", "extend", run, "--experts", 2, "--out", tmp_path / "more")[0] == 0
    status, result = run_command("generate", run, "--prompt", "red green", "--subset", "auto", "--keep", 3,
                                 "--max-new-tokens", 4)
    assert status == 0 and result["tokens"] <= 4
    for argv, message in [
            (["generate", run, "--prompt", "red", "--subset", "auto"], "go together"),
            (["select", run, "--calibration", "/no/such", "--keep", 3, "--out", file], "no such file"),
            (["select", run, "--calibration", documents, "--label", "no", "--keep", 3, "--out", file], "color, count"),
            (["select", run, "--calibration", documents, "--keep", 99, "--out", file], "between 2 and 8"),
            (["eval", run, "--subset", documents], "not JSON"),
            (["eval", run, "--keep", "8"], "give sizes below the 8"),
            (["subset", "compose", file, "--how", "need", "--out", tmp_path / "c.json"], "needs --keep between")]:
        status, result = run_command(*argv)
        assert status == 2 and message in result["error"], result

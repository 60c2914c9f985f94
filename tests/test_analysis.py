"""What is measured of routers: on activations whose answer is known, on routers that know nothing, and on trained models."""

import csv
import dataclasses
import json
import math
from itertools import combinations

import numpy as np
import pytest
from test_study import command
from tiny_run import config_file, tiny_config

from emo_jax.analysis import analyze, clusters, coverage, information, measures, use
from emo_jax.analysis.activations import Activations, collect, losses, with_random_routers
from emo_jax.analysis.looked import Options
from emo_jax.analysis.resampling import Estimate, resamples
from emo_jax.analysis.text import Text, make_text, read_text
from emo_jax.analysis.words import Words, name
from emo_jax.data.documents import Examples
from emo_jax.errors import InputError
from emo_jax.loaded import load
from emo_jax.subsets import modularity
from emo_jax.train.loop import train

LABELS, DOCUMENTS, LENGTH, R = 4, 40, 100, 8
WHOLE = np.ones((1, DOCUMENTS))


def activations(expert_of, seed=0) -> Activations:
    """Tokens of 40 documents, each of one of 4 labels; `expert_of(label, token)` is the expert of layer 0, and that of layer 1
    is drawn at random."""
    draw = np.random.default_rng(seed)
    documents = np.repeat(np.arange(DOCUMENTS), LENGTH)
    labels, tokens = np.arange(DOCUMENTS) % LABELS, draw.integers(0, 20, DOCUMENTS * LENGTH)
    experts = np.stack([np.vectorize(expert_of)(labels[documents], tokens), draw.integers(0, R, len(tokens))], axis=1)
    rows = {"tokens": tokens.reshape(DOCUMENTS, LENGTH), "segment_ids": np.ones((DOCUMENTS, LENGTH), int)}
    text = Text(rows, tokens, documents, labels, tuple("abcd"), np.arange(DOCUMENTS))
    return Activations(text, np.eye(R, dtype=np.float16)[experts], experts[..., None], np.ones(len(tokens), np.float32))


def of_text(a, measure):
    return measure(np.ones((1, len(a.text.labels))))[0]


# ---- activations whose answer is known --------------------------------------------------------------------------------


def test_experts_of_labels():
    a = activations(lambda label, token: label)
    by_label, by_token = of_text(a, information.label_information(a)), of_text(a, information.token_information(a))
    assert by_label[0] == pytest.approx(math.log(LABELS), abs=0.2) and abs(by_label[1]) < 0.01
    assert np.all(abs(by_token) < 0.01)  # above chance: shuffled tokens show as much
    found = clusters.cluster(clusters.features(a), 16).of_token
    agreed = clusters.agreement(a, found, 200)
    assert agreed["label"] > 0.5 and abs(agreed["token"]) < 0.02
    assert of_text(a, information.cluster_label_information(found, a)) == pytest.approx(math.log(LABELS), abs=0.25)
    assert abs(of_text(a, information.cluster_token_information(found, a))) < 0.02
    assert of_text(a, use.effective_experts(a)) == pytest.approx([1.0, 8.0], rel=0.06)
    assert clusters.source_entropy(a, found) < 0.1
    whole = clusters.cluster_tokens(a, "document", LABELS).of_token
    assert clusters.agreement(a, whole, 200)["label"] == 1 and len(np.unique(whole)) == LABELS


def test_experts_of_tokens():
    a = activations(lambda label, token: token % R)
    by_label, by_token = of_text(a, information.label_information(a)), of_text(a, information.token_information(a))
    assert by_token[0] == pytest.approx(math.log(R), abs=0.2) and abs(by_token[1]) < 0.01
    assert of_text(a, information.token_information(a, frequent=200)) == pytest.approx(by_token)  # there are 20 ids
    assert abs(by_label[0]) < 0.01
    found = clusters.cluster(clusters.features(a, "0"), R).of_token
    agreed = clusters.agreement(a, found, 200)
    assert agreed["token"] > 0.5 and abs(agreed["label"]) < 0.02
    assert of_text(a, information.cluster_token_information(found, a)) > 1.5
    assert clusters.source_entropy(a, found) == pytest.approx(math.log(LABELS), abs=0.01)


def test_a_document_has_experts_of_its_own_without_telling_its_label():
    a = activations(lambda label, token: 0)
    own = np.random.default_rng(1).integers(0, R, DOCUMENTS)[a.text.documents]
    a = dataclasses.replace(a, probabilities=np.eye(R)[np.stack([own, own], 1)])
    estimate = Estimate(information.label_information(a)(resamples(DOCUMENTS)))
    assert np.all(abs(estimate.drawn[0]) < 0.15)
    sums = np.stack([a.probabilities[a.text.labels[a.text.documents] == g].sum(axis=0) for g in range(LABELS)])
    assert np.all(modularity.mutual_information(sums, np.full(LABELS, 1000.0)) > 0.15)  # what is subtracted is not nothing
    found = estimate.mean().describe()
    assert found["low"] < 0 < found["high"]  # and the interval knows it


def test_few_experts_of_a_document_hold_its_routing():
    a = activations(lambda label, token: 2 * label + token % 2)
    assert of_text(a, use.top_share(a, 0.25)) == pytest.approx([1.0, 0.33], abs=0.02)  # of 100 tokens
    assert of_text(a, use.effective_experts(a)) == pytest.approx([2.0, 8.0], rel=0.06)
    assert coverage.coverage(a)["covered"][:, 0] == pytest.approx(np.full(LABELS, 0.25))
    assert coverage.coverage(a)["effective"][:, 0] == pytest.approx(np.full(LABELS, 2.0), rel=0.01)
    similar = coverage.similarity(a)
    assert similar["cosine"][0] == pytest.approx(np.eye(LABELS), abs=0.05) and np.all(similar["cosine"][1] > 0.9)


def test_pools_overlap_as_pairs_of_documents_do():
    a = activations(lambda label, token: label if token < 15 else token % R)
    chosen = coverage.pools(a)
    same, other = [[np.sum(chosen[i] & chosen[j], axis=1) / 2 for i, j in combinations(range(DOCUMENTS), 2)
                    if (a.text.labels[i] == a.text.labels[j]) == alike] for alike in (True, False)]
    assert of_text(a, coverage.pool_overlap(a)) == pytest.approx(np.mean(same, axis=0) - np.mean(other, axis=0))
    within = np.mean([np.sum(chosen[i] & chosen[j], axis=1) / 2 for i, j in combinations(range(DOCUMENTS), 2)
                      if a.text.labels[i] == a.text.labels[j] == 2], axis=0)
    assert coverage.similarity(a)["pool_overlap"][:, 2, 2] == pytest.approx(within)
    twice = np.where(np.arange(DOCUMENTS) < 20, 2.0, 0.0)[None]  # a document is never compared with itself
    half = activations(lambda label, token: 0)
    assert np.all(abs(coverage.pool_overlap(half)(twice)[0, 0]) < 1e-9)


def test_consistency_of_segments_is_that_of_its_definition():
    a = activations(lambda label, token: label if token < 12 else token % R)
    m, k = use.SEGMENT, 1
    best, hits = np.zeros(2), np.zeros(2)
    for layer in range(2):
        ids = a.expert_ids[:, layer, 0].reshape(DOCUMENTS, LENGTH)[:, :LENGTH // m * m].reshape(-1, m)
        f = np.stack([(ids == e).sum(axis=1) for e in range(R)], axis=1)  # [segments, R]
        for least in range(1, m + 1):
            on = f >= least
            hit, wrong, missed = f[on].sum(), (m - f[on]).sum(), f[~on].sum()
            best[layer] = max(best[layer], 2 * hit / max(2 * hit + wrong + missed, 1))
        hits[layer] = np.mean(np.sort(f, axis=1)[:, -use.CACHE * k:].sum(axis=1) / m)
    assert of_text(a, use.segment_routing(a)) == pytest.approx(best)
    assert of_text(a, use.segment_cache(a)) == pytest.approx(hits)
    always = activations(lambda label, token: 3)
    assert of_text(always, use.segment_routing(always))[0] == of_text(always, use.segment_cache(always))[0] == 1


def test_intervals_are_of_documents_and_differences_are_paired():
    draw = np.random.default_rng(0)
    nats = draw.normal(2, 1, DOCUMENTS)
    a = dataclasses.replace(activations(lambda label, token: 0), nats=np.repeat(nats, LENGTH).astype(np.float32))
    loss = Estimate(use.mean_loss(a)(resamples(DOCUMENTS)))
    found, error = loss.describe(), 1.96 * nats.std(ddof=1) / math.sqrt(DOCUMENTS) * LENGTH / (LENGTH - 1)
    assert found["value"] == pytest.approx(nats.mean() * LENGTH / (LENGTH - 1))
    assert found["high"] - found["value"] == pytest.approx(error, rel=0.25)
    worse = Estimate(use.mean_loss(dataclasses.replace(a, nats=a.nats + 0.1))(resamples(DOCUMENTS)))
    gap = (worse - loss).describe()
    assert gap["low"] == pytest.approx(gap["high"], abs=1e-6) and gap["value"] == pytest.approx(0.101, abs=0.001)
    assert Estimate(np.ones(1)).describe() == {"value": 1.0, "low": None, "high": None}


def test_clusters_of_two_models_are_paired():
    first = np.random.default_rng(0).integers(0, 5, 1000)
    renamed = np.array([3, 0, 4, 1, 2])[first]
    pairs = coverage.align(first, np.where(np.arange(1000) < 900, renamed, 0))
    assert {(p["a"], p["b"]) for p in pairs} == {(0, 3), (1, 0), (2, 4), (3, 1), (4, 2)}
    assert [p["tokens"] for p in pairs] == sorted((p["tokens"] for p in pairs), reverse=True) and pairs[0]["tokens"] > 0.8
    assert coverage.align(first, renamed)[-1]["tokens"] == 1


# ---- text -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with checkpoints of steps 15 and 30, which are two models."""
    folder = tmp_path_factory.mktemp("runs")
    train(tiny_config(folder, "--train.steps=30", "--data.eval_fraction=0.3", "--checkpoint.every=15"), folder / "emo")
    return folder


@pytest.fixture(scope="module")
def opened(runs):
    return load(str(runs / "emo"))


@pytest.fixture(scope="module")
def text(opened) -> Text:
    source, numbers = opened.documents_to_score()
    return read_text(opened.config, source, opened.tokenizer, numbers, 24)


def test_every_token_is_of_its_document(opened, text):
    source = opened.documents_to_score()[0]
    for d in range(len(text.labels)):
        ids = source.encoded(int(text.numbers[d]), opened.tokenizer)[:24]
        assert text.tokens[text.starts[d]:text.starts[d + 1]].tolist() == ids.tolist()
        assert text.names[text.labels[d]] == source.label(int(text.numbers[d]))
    few = text.thinned(100)
    assert 60 <= len(few.tokens) < 160 and set(few.numbers) < set(text.numbers)
    where = np.isin(text.numbers, few.numbers)[text.documents]
    assert np.array_equal(text.tokens[where], few.tokens)
    assert np.array_equal(np.unique(few.documents), np.arange(len(few.labels)))
    values = np.random.default_rng(0).random((len(text.tokens), 3)).astype(np.float32)
    assert text.sums(values)[5] == pytest.approx(values[text.documents == 5].sum(axis=0))
    with pytest.raises(InputError, match="no document of 8 tokens or more"):
        read_text(opened.config, Examples("short", ["a", "b"]), opened.tokenizer, [0, 1], 24)


def test_the_words_of_a_cluster_and_its_name(opened):
    documents = ["the judge naïve 日本 court ruled"] * 3 + ["the judge said so"] * 3 + ["red green blue"] * 6
    encoded = {i: opened.tokenizer.encode_document(t) for i, t in enumerate(documents)}
    made = make_text(opened.config, {i: x[:32] for i, x in encoded.items()}, {"": range(len(documents))})
    words = Words(made, opened.tokenizer)
    for d, number in enumerate(made.numbers):  # characters of several tokens are whole
        if len(encoded[number]) <= 32:
            low, high = made.starts[d:d + 2]
            assert words.spelled(low, high - 1) == documents[number]
    assert {"judge", "naïve", "日本", "court", "green"} <= set(words.vocabulary)
    law = np.array([made.numbers[d] < 6 for d in made.documents])
    found = words.enriched(law)
    assert {"judge", "the"} <= {w["text"] for w in found} and not {"red", "blue"} & {w["text"] for w in found}
    assert all(w["lift"] == pytest.approx(1 / law.mean()) for w in found if w["text"] == "judge")
    from collections import Counter

    taken = Counter()
    assert name([{"text": t} for t in (",", "court", "courts", "judge")], "law", taken) == "court · judge"
    assert name([{"text": t} for t in ("court", "judge")], "law", taken) == "court · judge (2)"
    assert name([], "law", taken) == "law"
    context = words.contexts(law)[0]
    shown = context["before"] + context["token"] + context["after"]
    assert shown.replace("\n", "") and shown in words.spelled(*made.starts[context["document"]:context["document"] + 2])


# ---- models -----------------------------------------------------------------------------------------------------------


def test_activations_are_those_of_the_text(opened, text):
    a, n = collect(opened, text), len(text.tokens)
    assert a.probabilities.shape == (n, 2, 7) and a.probabilities.astype(float).sum(axis=2) == pytest.approx(1, abs=2e-3)
    assert np.all(np.take_along_axis(a.probabilities, a.expert_ids.astype(int), axis=2)[:, :, 0] == a.probabilities.max(axis=2))
    document = text.tokens[:text.starts[1]]
    alone = opened.router_probabilities([opened.tokenizer.decode(document[:-1])])[0]  # the text without its end
    assert a.probabilities[:text.starts[1] - 1] == pytest.approx(alone[:text.starts[1] - 1], abs=1e-3)
    by_text = opened.loss([opened.tokenizer.decode(document[:-1])])[0]
    if opened.tokenizer.eos_id == document[-1]:
        assert a.nats[:text.starts[1]].sum() / (len(document) - 1) == pytest.approx(by_text, abs=1e-4)
    assert np.all(a.nats[text.starts[1:] - 1] == 0)
    assert losses(opened, text) == pytest.approx(a.nats, abs=1e-5)  # a pool of everything is no pool


def test_the_loss_in_a_pool_is_that_with_the_document_s_own_votes(runs):
    """With one layer, whose votes do not depend on its pools."""
    from emo_jax import model

    config = tiny_config(runs, "--model.num_layers=1", f"--data.tokenizer={runs}/emo/tokenizer.json")
    full = load(str(runs / "emo"))
    one = dataclasses.replace(full, config=config, params=model.init_params(config, full.mesh))
    source, numbers = one.documents_to_score()
    text = read_text(config, source, one.tokenizer, numbers[:3], 24)
    a, pooled = collect(one, text), losses(one, text, pool_size=3)
    chosen = np.argsort(-a.probability_sums, axis=2, kind="stable")[..., :3]
    for d in range(len(text.labels)):
        allowed = np.zeros((1, 7), bool)
        allowed[0, chosen[d, 0]] = True
        at = slice(text.starts[d], text.starts[d + 1])
        assert pooled[at] == pytest.approx(losses(one, text, allowed=allowed)[at], abs=1e-5)
    assert np.array_equal(losses(one, text, pool_size=1), losses(one, text, pool_size=2))  # a token needs two


def test_an_interrupted_collection_goes_on(opened, text, tmp_path, monkeypatch):
    whole = collect(opened, text)
    monkeypatch.setattr("emo_jax.analysis.activations.BATCH_TOKENS", 8 * 32)
    monkeypatch.setattr("emo_jax.analysis.activations.FLUSH_SECONDS", 0)
    collect(opened, text, tmp_path / "a")
    state = json.loads((tmp_path / "a" / "state.json").read_text())
    assert state["rows"] == len(text.rows["tokens"])
    array = np.load(tmp_path / "a" / "nats.npy", mmap_mode="r+")
    array[:] = 7
    array.flush()
    (tmp_path / "a" / "state.json").write_text(json.dumps(state | {"rows": 8}))
    again = collect(opened, text, tmp_path / "a")
    done = text.row_starts[8]
    assert np.all(again.nats[:done] == 7) and again.nats[done:] == pytest.approx(whole.nats[done:], abs=1e-5)
    (tmp_path / "a" / "state.json").write_text(json.dumps(state | {"text": "another"}))
    assert collect(opened, text, tmp_path / "a").nats == pytest.approx(whole.nats, abs=1e-5)


def test_with_routers_that_learned_nothing_every_measure_is_at_its_baseline(runs, text):
    """The network is untrained too: its states do not know of documents yet. Routers of this size prefer nothing; choices and
    clusters, which do not know how small a preference is (and words tell the label of these documents), are compared with other
    random routers."""
    from emo_jax import model

    trained = load(str(runs / "emo"))
    fresh = dataclasses.replace(trained, params=model.init_params(trained.config, trained.mesh))
    first, second = (analyze._look("null", one, text, None, Options(clusters=8)) for one in
                     (fresh, with_random_routers(fresh, 1)))
    known = measures.baselines(first.activations)
    for key in ("label_information", "token_information", "gap_quarter", "gap_eighth"):
        assert abs(first.estimates[key].mean().drawn[0] - known[key]) < 0.01, key
    for key in ("top_quarter", "top_eighth"):  # of 7 experts: 2 and 1
        share = {"top_quarter": 2, "top_eighth": 1}[key] / 7
        assert first.estimates[key].mean().drawn[0] == pytest.approx(share, abs=0.03), key
    after = analyze._look("trained", trained, text, None, Options(clusters=8))
    for key in ("label_information", "cluster_label", "segment_routing", "segment_cache", "effective_experts"):
        value = {n: one.estimates[key].mean().drawn[0] for n, one in (("first", first), ("second", second), ("trained", after))}
        if key == "label_information":
            assert value["trained"] > 2 * max(value["first"], value["second"], 0), (key, value)
        noise = max(np.std(first.estimates[key].mean().drawn), 1e-3)
        assert abs(value["first"] - value["second"]) < 0.25 * max(abs(value["first"]), 1) + 6 * noise, (key, value)


def test_analyze_from_the_command_line(runs, tmp_path):
    out = tmp_path / "report"
    documents = str(config_file(runs).parent / "documents.jsonl")
    out.mkdir()
    row = {"share": 0.5, "keep": 4, "difference": 0.1, "interval": [0.05, 0.15]}  # as `eval --keep --out` leaves it
    (out / "keep_curve.json").write_text(json.dumps({"models": {"tiny-emo-30": {"subsets": [row]}}}))
    status, _, _ = command("select", runs / "emo", "--calibration", documents, "--label", "color", "--keep", "4", "--method",
                           "router", "--out", tmp_path / "color.json")
    assert status == 0
    status, result, _ = command("analyze", runs / "emo", runs / "emo" / "checkpoints" / "15", "--data", documents, "--out", out,
                                "--clusters", "6", "--removal-tokens", "600", "--null-tokens", "600", "--subset",
                                tmp_path / "color.json")
    assert status == 0 and result["report"] == f"{out}/report.html"
    found = json.loads((out / "analysis.json").read_text())
    a, b = found["models"]
    assert (a["name"], b["name"], a["kind"]) == ("tiny-emo-30", "tiny-emo-15", "emo")
    assert set(a["measures"]) == {row.key for row in measures.MEASURES} == set(b["measures"])
    assert found["difference"]["loss"]["value"] == pytest.approx(
        a["measures"]["loss"]["value"] - b["measures"]["loss"]["value"])
    assert a["measures"]["label_information"]["value"] > found["random_router"]["measures"]["label_information"]["value"]
    assert sum(c["tokens"] for c in a["clusters"]) == found["data"]["tokens"] and len(found["alignment"]) == len(a["clusters"])
    colors = max(a["clusters"], key=lambda c: c["labels"].get("color", 0) * c["tokens"])
    assert set(colors["name"].split(" · ")) <= set("red green blue gray pink".split())
    rows = list(csv.DictReader((out / "tables" / "measures.csv").open()))
    assert {r["model"] for r in rows} == {a["name"], b["name"], found["random_router"]["name"]}
    subset, = a["subsets"]
    assert subset["name"] == "color" and subset["labels"]["color"] > 0.5
    assert a["keep_curve"] == {"rows": [{"share": 0.5, "keep": 4, "difference": 0.1, "low": 0.05, "high": 0.15}]}
    card = (out / "cards" / a["name"] / f"cluster-{colors['id']:02d}.md").read_text()
    assert colors["name"] in card and "What is lost without it" in card and "| all |" in card
    experts = out / "cards" / a["name"] / f"cluster-{colors['id']:02d}.json"
    status, result, _ = command("subset", "disable", runs / "emo", "--subset", experts, "--data", documents)
    assert status == 0  # a card's file is a subset of the model
    assert (out / "report.html").stat().st_size > 400_000 and len(list((out / "figures").glob("*.svg"))) > 10


def test_what_cannot_be_analyzed(runs, tmp_path):
    out = tmp_path / "report"
    for more, message in ((["--features", "9"], "expected all, document, or a layer of 0..1"),
                          (["--clusters", "300"], "at most 255"),
                          (["--out", "s3://bucket/report"], "give a local folder")):
        status, result, _ = command("analyze", runs / "emo", "--out", out, "--tokens", "1000", *more)
        assert status == 2 and message in result["error"]
    other = tmp_path / "other"
    train(tiny_config(runs, "--train.steps=1", "--data.tokenizer=", "--model.vocab_size=300"), other)
    status, result, _ = command("analyze", runs / "emo", other, "--out", out)
    assert status == 2 and "have different tokenizers" in result["error"]
    out.mkdir(exist_ok=True)
    (out / "keep_curve.json").write_text("[]")
    status, result, _ = command("analyze", runs / "emo", "--out", out)
    assert status == 2 and "keep_curve.json is not what" in result["error"]

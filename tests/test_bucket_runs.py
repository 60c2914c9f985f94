"""A run whose folder is in a bucket: trained, stopped, gone on with, read and rewritten there as in a folder."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import servers
from published import golden
from servers import BUCKET, SCHEMES, Fault
from tiny_run import config_file, series, tiny_config

from emo_jax.checkpoints import subset as subset_lib
from emo_jax.checkpoints.checkpoint import COMMITTED, move_step, open_checkpoint, steps
from emo_jax.checkpoints.subset import full
from emo_jax.convert.exporting import export_checkpoint
from emo_jax.convert.formats import Options
from emo_jax.convert.importing import import_checkpoint
from emo_jax.errors import InputError
from emo_jax.files import absolute_path, copy_tree, folder_path, make_folder, remove_tree, write_result
from emo_jax.surgery.extract import extract
from emo_jax.train.goodput import goodput
from emo_jax.train.loop import train

STEPS = ("--train.steps=4", "--checkpoint.every=2", "--checkpoint.keep_last=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the config, and an uninterrupted run of it, a step longer: `local`."""
    made = tmp_path_factory.mktemp("runs")
    config_file(made)
    train(tiny_config(made, *STEPS, "--train.steps=5", "--checkpoint.keep_last=3"), made / "local")
    return made


@pytest.fixture(scope="module", params=SCHEMES)
def scheme(request):
    return request.param


@pytest.fixture(scope="module")
def done(scheme, folder):
    """The URL of the same run, begun and gone on with in a bucket; a server fails at times."""
    proxy = servers.with_buckets().proxies[scheme]
    out = f"{scheme}://{BUCKET}/{folder.name}/run"
    train(tiny_config(folder, *STEPS, "--train.steps=2"), out)
    proxy.faults = [Fault("checkpoints/2/params", 2, status=503), Fault("checkpoints/4/params", 2, status=503, method=(
        "PUT" if scheme == "s3" else "POST"))]
    train(tiny_config(folder, *STEPS, "--train.profile_steps=3:3"), out)
    assert not any(fault.times for fault in proxy.faults)
    return out


@pytest.fixture
def copied(done, request):
    """A copy of that run, to be spoiled."""
    target = f"{done}-{request.node.originalname}"
    copy_tree(at(done), at(target))
    return target


def at(url):
    return absolute_path(url, "the path")


def names(url) -> set[str]:
    system = fsspec.filesystem(url.split(":")[0])
    return {name.removeprefix(url.partition("://")[2]) for name in system.find(url)}


def test_a_run_in_a_bucket_goes_on_with_the_losses_of_an_uninterrupted_one(done, folder):
    assert steps(at(done) / "checkpoints") == [2, 4]
    assert series(at(done)) == series(folder / "local")[:4]
    assert [open_checkpoint(done, step).hash for step in (2, 4)] == [
        open_checkpoint(folder / "local", step).hash for step in (2, 4)]
    assert open_checkpoint(f"{done}/checkpoints/4").position() == open_checkpoint(folder / "local", 4).position()
    assert {"/config.json", "/tokenizer.json", "/metrics.jsonl", "/checkpoints/4/params/_sharding",
            f"/profile/plugins/profile/steps_3_3/{socket.gethostname()}_0.xplane.pb"} < names(done)
    time = goodput(done)
    assert (time["starts"], time["from"], time["step"]) == (2, 0, 4) and time["seconds"]["restore"] > 0
    assert not any(Path(start).exists() for start in ("s3:", "gs:"))  # all of it is in the bucket
    assert sum(name.startswith("/tensorboard/events") for name in names(done)) == 2


def test_one_goes_on_after_a_save_cut_off_and_a_damaged_checkpoint_and_deletes_old_ones(copied, folder, capsys):
    checkpoints = at(copied) / "checkpoints"
    move_step(checkpoints / "4", checkpoints / "6")
    (checkpoints / "6" / COMMITTED).unlink()  # killed while it was written
    copy_tree(checkpoints / "2", checkpoints / "3")
    for name in names(f"{copied}/checkpoints/3/params"):
        if "/d/" in name:
            (checkpoints / "3" / "params" / name.lstrip("/")).write_bytes(b"damaged")
    assert steps(checkpoints) == [2, 3]
    result = train(tiny_config(folder, *STEPS, "--checkpoint.keep_last=1"), copied)
    assert result["resumed_from"] == 2 and "checkpoints/3 is damaged; moved to" in capsys.readouterr().err
    assert steps(checkpoints) == [4] and {name.split("/")[1] for name in names(str(checkpoints))} == {"4"}
    assert steps(at(copied) / "damaged") == [3]
    assert series(at(copied)) == series(folder / "local")[:4]


def test_what_is_wrong_in_a_bucket_is_set_aside_and_lost_checkpoints_are_not_begun_over(copied, folder, capsys):
    run = at(copied)
    before = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(before + b"note\n\xff\n")
    (run / "config.json").write_bytes(b"\xff")
    (run / "tokenizer.json").write_bytes(b"{}")
    saved = json.loads((run / "checkpoints" / "4" / "meta" / "metadata").read_text())
    (run / "checkpoints" / "4" / "meta" / "metadata").write_text(json.dumps(saved | {"tokens": 0}))
    result = train(tiny_config(folder, *STEPS), copied)
    assert result["resumed_from"] == 2 and series(run) == series(folder / "local")[:4]
    aside = {name.split("/")[1] for name in names(f"{copied}/damaged")}
    assert aside == {"4", "config.json", "metrics.jsonl", "tokenizer.json"}
    message = capsys.readouterr().err
    assert "checkpoints/4: meta and data are not what was saved" in message and "metrics.jsonl has 2 lines" in message
    remove_tree(run / "checkpoints")
    with pytest.raises(InputError, match=f"{copied} holds a run that has saved checkpoints .its metrics end at step 4"):
        train(tiny_config(folder, *STEPS), copied)


def test_a_run_starts_from_a_checkpoint_in_a_bucket(done, folder, tmp_path):
    starts = (f"--train.init_from={done}", "--train.steps=5", f"--data.tokenizer={done}/tokenizer.json")
    train(tiny_config(folder, *starts), tmp_path / "run")
    assert series(tmp_path / "run") == series(folder / "local")[4:]


def test_a_subset_and_the_model_it_leaves_are_written_to_a_bucket(done, folder, tmp_path):
    found = open_checkpoint(done)
    mask = full(found.config).mask()
    mask[:, ::2] = False
    chosen = full(found.config).with_mask(mask, method="test", model=found.identity())
    chosen.save(f"{done}/subset.json")
    assert subset_lib.load(f"{done}/subset.json", found) == chosen
    there = extract(done, f"{done}/subset.json", f"{done}/small")
    here = extract(open_checkpoint(folder / "local", 4), chosen, tmp_path / "small")
    assert open_checkpoint(f"{done}/small").hash == open_checkpoint(here).hash and str(there) == f"{done}/small/checkpoints/0"
    assert subset_lib.load(f"{done}/small/subset.json") == chosen
    with pytest.raises(InputError, match=f"{done}/small already holds a checkpoint"):
        extract(done, chosen, f"{done}/small")
    with pytest.raises(InputError, match=f"subset {done}/nope.json: cannot be read"):
        subset_lib.load(f"{done}/nope.json")


def test_an_export_to_a_bucket_and_back_is_bit_exact(done, folder, tmp_path):
    small = 60_000  # bytes of a file, so that there are several
    export_checkpoint(done, f"{done}/hf", options=Options(shard_bytes=small))
    export_checkpoint(str(folder / "local"), str(tmp_path / "hf"), step=4, options=Options(shard_bytes=small))
    local = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    there = {name: (at(done) / "hf" / name).read_bytes() for name in local}
    cards = [files.pop("README.md").decode().partition("## Evaluation")[0] for files in (there, local)]
    assert there == local and len(local) > 5
    assert cards[0].partition("## Use")[0] == cards[1].partition("## Use")[0]  # the local run was not evaluated at that step
    local["README.md"] = b""
    assert names(f"{done}/hf") == {f"/{name}" for name in local}
    with pytest.raises(InputError, match="is not an empty folder"):
        export_checkpoint(done, f"{done}/hf")
    made = [export_checkpoint(run, f"{out}/gguf", "gguf", step=4)["file"]
            for run, out in ((done, done), (str(folder / "local"), str(tmp_path)))]
    assert (at(done) / "gguf" / made[0]).read_bytes() == (tmp_path / "gguf" / made[1]).read_bytes()
    import_checkpoint(f"{done}/hf", f"{done}/back")
    assert open_checkpoint(f"{done}/back").hash == open_checkpoint(done).hash
    assert f"/checkpoints/0/{COMMITTED}" in names(f"{done}/back") and "/hugging_face/config.json" in names(f"{done}/back")


def test_an_import_into_a_bucket_that_was_stopped_goes_on(scheme, folder, monkeypatch, capsys):
    from emo_jax.convert import importing

    out, source = f"{scheme}://{BUCKET}/{folder.name}/imported", golden("emo")[0]
    monkeypatch.setattr(importing, "BATCH_BYTES", 1 << 16)
    write, count = importing.ParameterStore.write, iter(range(100))

    def stops(self, parts):
        if next(count) == 3:
            raise KeyboardInterrupt
        write(self, parts)

    monkeypatch.setattr(importing.ParameterStore, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(str(source), out)
    with pytest.raises(InputError, match="no checkpoint at"):
        open_checkpoint(out)
    monkeypatch.setattr(importing.ParameterStore, "write", write)
    import_checkpoint(str(source), out)
    assert "resuming the import after" in capsys.readouterr().err
    import_checkpoint(str(source), str(folder / f"imported-{scheme}"))
    assert open_checkpoint(out).hash == open_checkpoint(folder / f"imported-{scheme}").hash


def test_what_a_bucket_lacks_is_said(scheme, monkeypatch):
    with pytest.raises(InputError, match=f"--out {scheme}://no-such-bucket/run cannot be written"):
        make_folder(f"{scheme}://no-such-bucket/run")
    with pytest.raises(InputError, match=f"no checkpoint at {scheme}://{BUCKET}/nothing: no such folder"):
        open_checkpoint(f"{scheme}://{BUCKET}/nothing")
    write_result(f"{scheme}://{BUCKET}/result.json", {"a": 1})
    assert json.loads(at(f"{scheme}://{BUCKET}/result.json").read_text()) == {"a": 1}
    package, extra = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}[scheme]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"--out {scheme}://b/run is in a bucket, which needs {package}: "
                                         rf"pip install 'emo-jax\[{extra}\]'"):
        folder_path(f"{scheme}://b/run")


KEEP = """
import sys
import jax
from emo_jax.compilation import keep_programs

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
keep_programs(sys.argv[1])
jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((32, 32)))
print(len(hits))
"""


def test_compiled_programs_are_kept_in_a_bucket_for_other_hosts(scheme):
    servers.with_buckets()
    url = f"{scheme}://{BUCKET}/compiled-programs"
    hits = [int(subprocess.run([sys.executable, "-c", KEEP, url], capture_output=True, text=True, check=True,
                               env=os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}).stdout) for _ in range(2)]
    assert hits[0] == 0 and hits[1] > 0
    assert any(path.endswith("-cache") for path in fsspec.filesystem(scheme).find(f"{BUCKET}/compiled-programs"))

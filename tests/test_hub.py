"""`emo-jax export --push` against a stand-in of the hub on loopback."""

import json
import os
import socket
import subprocess
import sys
from functools import partial

import huggingface_hub
import pytest
import tiny
from hub_server import Hub
from published import save_new

from emo_jax.cli import main
from emo_jax.convert import hub


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_new(tiny.config(), tmp_path_factory.mktemp("run"))[0]


def command(url, tmp_path, *code):
    """A process that knows no other hub."""
    environment = os.environ | {"HF_ENDPOINT": url, "HF_TOKEN": "hf_of_tests", "HF_HUB_DISABLE_XET": "1",
                                "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run([sys.executable, *code], env=environment, capture_output=True, text=True, timeout=300)


def test_what_is_pushed_is_what_was_exported_and_comes_back(run, tmp_path):
    with Hub() as server:
        for again in ("first", "second"):  # a repository that is there is used
            export = command(server.url, tmp_path, "-m", "emo_jax", "export", str(run), "--out", str(tmp_path / again),
                             "--license", "apache-2.0", "--push", "me/tiny", "--json")
            assert export.returncode == 0, export.stderr
            assert json.loads(export.stdout.splitlines()[-1])["pushed"] == f"{server.url}/me/tiny"
        written = {p.name: p.read_bytes() for p in (tmp_path / "second").iterdir()}
        assert server.files["me/tiny"] == written
        assert {"config.json", "generation_config.json", "model.safetensors", "modeling_emo.py", "README.md"} <= set(written)
        assert b'from_pretrained("me/tiny"' in written["README.md"] and b'license: "apache-2.0"' in written["README.md"]
        back = command(server.url, tmp_path, "-c", "import huggingface_hub; print(huggingface_hub.snapshot_download("
                       f"'me/tiny', local_dir={str(tmp_path / 'back')!r}))")
        assert back.returncode == 0, back.stderr
        assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir() if p.is_file()} == written


def test_what_keeps_a_push_from_the_hub_is_said_before_anything_is_written(run, tmp_path, monkeypatch, capsys):
    def refused(repo="me/tiny", out=tmp_path / "out"):
        assert main(["export", str(run), "--out", str(out), "--push", repo]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "must be ORGANISATION/NAME" in refused("tiny")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)
        assert "pip install 'emo-jax[hub]'" in refused()
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "get_token", lambda: None)
        assert "hf auth login" in refused()
    monkeypatch.setenv("HF_TOKEN", "hf_of_tests")
    with Hub(token="hf_another") as server:
        monkeypatch.setattr(huggingface_hub, "HfApi", partial(huggingface_hub.HfApi, endpoint=server.url))
        assert f"{server.url} does not accept the token" in refused()
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub, "HfApi", partial(huggingface_hub.HfApi, endpoint=address))
        assert f"{address} cannot be reached" in refused()


def test_an_upload_that_fails_leaves_the_export_and_says_so(run, tmp_path, monkeypatch, capsys):
    class Broken:
        endpoint = "http://127.0.0.1:9"

        def create_repo(self, *args, **kwargs):
            raise OSError("the line is cut")

    monkeypatch.setattr(hub.Push, "checked", classmethod(lambda cls, repo, out: cls(Broken(), repo)))
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--push", "me/tiny"]) == 1
    assert "hf upload me/tiny" in capsys.readouterr().err
    assert (tmp_path / "out/config.json").is_file()

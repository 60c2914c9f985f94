"""Bad input ends a command with exit status 2 and a message that says what was given and what is allowed."""

import json
import typing

import pytest

from emo_jax import cli, config_rules
from emo_jax import config as lib
from emo_jax.checkpoints import subset as subset_lib
from emo_jax.config import Config
from emo_jax.errors import InputError
from emo_jax.generation.sampling import Sampling, nucleus

LONG = "x" * 5000
PATHS = {"too long a name": (LONG, "File name too long"), "too long a path": ("x/" * 2500, "File name too long"),
         "a NUL": ("a\0b", "null"), "nobody's home": ("~nobody-of-this-name/x", "home")}


def message(capsys, *argv):
    assert cli.main([str(a) for a in argv]) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text and len(text) < 2000
    return text


# ---- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body, expected", [
    ("def config(): return None", "config() returned None"),
    ("def config(): return {'name': 'x'}", "config() returned {'name': 'x'}"),
    ("def config(): return 1 / 0", "ZeroDivisionError: division by zero"),
    ("def config(size): return size", "missing 1 required positional argument: 'size'"),
    ("def config(): import sys; sys.exit(0)", "SystemExit: 0"),
    ("raise SystemExit", "SystemExit"),
    ("def config(", "SyntaxError"),
    ("import no_such_module", "No module named 'no_such_module'"),
    ("config = 3", "has no function config()"),
    ("from emo_jax.config import *\ndef config(): return Config(name='x', model=3)", "model=3 must be a ModelConfig"),
    ("from emo_jax.config import *\ndef config(): return Config(name='x', model=RouterConfig())", "must be a ModelConfig"),
    ("from emo_jax.config import *\ndef config(): return Config(name='x', steps=3)", "keyword argument 'steps'"),
])
def test_a_config_file_that_gives_no_config(tmp_path, capsys, body, expected):
    path = tmp_path / "mine.py"
    path.write_text(body + "\n")
    text = message(capsys, "config", path)
    assert expected in text
    assert "model=" in expected or "ModelConfig" in expected or (str(path) in text and "config() -> Config" in text)


@pytest.mark.parametrize("kind", PATHS)
def test_a_config_that_cannot_be_looked_up(capsys, kind):
    given, expected = PATHS[kind]
    for name in (given, f"{given}.py"):
        text = message(capsys, "config", name)
        assert "CONFIG='" in text and (expected in text or "/x.py" in name)


def test_a_config_that_is_no_python_file(tmp_path, capsys):
    assert "no config ''" in message(capsys, "config", "")
    assert "no config" in message(capsys, "config", tmp_path)
    (tmp_path / "folder.py").mkdir()
    assert "no config" in message(capsys, "config", tmp_path / "folder.py")
    (tmp_path / "config.json").write_text("{}")
    assert "not a Python file" in message(capsys, "config", tmp_path / "config.json")


NUMBERS = {name: value for name, value in lib.flatten(lib.to_dict(Config(name="x"))).items()
           if type(value) in (int, float)}


def test_every_number_of_a_config_has_one_range():
    fields = [field for _, names in config_rules.RANGES.values() for field in names.split()]
    assert sorted(fields) == sorted(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_its_range_is_named_itself(name):
    for given in ("-5", "1" + "0" * 400):
        with pytest.raises(InputError) as e:
            lib.override(Config(name="x"), [f"--{name}={given}"])
        assert f"{name}=" in str(e.value).partition(" must be ")[0] and len(str(e.value)) < 1000
    if isinstance(NUMBERS[name], float):
        for given in ("nan", "inf", "-inf", "1e39"):
            with pytest.raises(InputError, match=f"{name}=.* must be a finite float32"):
                lib.override(Config(name="x"), [f"{name}={given}"])


@pytest.mark.parametrize("override, allowed", [
    ("train.steps=-5", "at least 1"), ("train.steps=0", "at least 1"), ("optimizer.beta1=1.5", "in [0, 1)"),
    ("optimizer.beta2=1.0", "in [0, 1)"), ("optimizer.eps=0.0", "more than 0"), ("optimizer.eps=-1e-08", "more than 0"),
    ("optimizer.weight_decay=-0.1", "0 or more"), ("model.rope_theta=-1.0", "more than 0"),
    ("model.norm_eps=-1e-06", "more than 0"), ("model.init_std=-0.02", "more than 0"),
    ("seed=-1", "in 0..2^63 - 1"), (f"seed={2**63}", "in 0..2^63 - 1"), (f"train.steps={2**31}", "at most 2147483647"),
    ("kernels.buffer_factor=0.5", "at least 1, or 0"), ("mesh.data=0", "at least 1, or -1"),
    ("kernels.grouped_matmul='nope'", "'fused', 'megablox', 'mosaic', 'batched', 'blocked', 'reference'"),
    ("kernels.attention='nope'", "'splash', 'flash', 'blocked', 'reference'"),
])
def test_a_field_out_of_range_names_what_is_allowed(capsys, override, allowed):
    text = message(capsys, "config", "emo_tiny", "--" + override.replace("'", ""))
    assert f"{override} must be " in text and allowed in text


def test_the_kernels_of_a_config_are_those_that_there_are():
    from emo_jax.kernels import attention, grouped_matmul

    for kernels, name in ((attention, "attention"), (grouped_matmul, "grouped_matmul")):
        allowed = typing.get_args(typing.get_type_hints(lib.KernelConfig)[name])
        assert allowed == ("auto", *kernels.KERNELS) and "reference" in kernels.KERNELS


def test_a_seed_of_63_bits_makes_parameters():
    import jax

    assert jax.random.key(2**63 - 1).shape == ()
    assert lib.override(Config(name="x"), [f"seed={2**63 - 1}"]).seed == 2**63 - 1


@pytest.mark.parametrize("tree, expected", [
    ([], "must be an object"), (None, "must be an object"), ({}, "'name' is missing"),
    ({"name": "x", "model": 3}, "config model: 3 must be an object"), ({"name": "x", "train": None}, "config train"),
    ({"name": "x", "train": {"steps": "3"}}, "train.steps='3' must be int, not str"),
    ({"name": "x", "train": {"step": 3}}, "did you mean steps"), ({"name": 3}, "name=3 must be str"),
    ({"name": "x", "model": {"experts_per_layer": [1.5]}}, "a tuple of integers"),
    ({"name": "x", "router": {"semantics": ["emo_v1"]}}, "must be one of 'emo_v1'"),
    ({"name": "x", "seed": True}, "seed=True must be int"), ({"name": "x", "train": {"batch_size": 1e3}}, "must be int"),
])
def test_a_saved_config_that_was_damaged(tree, expected):
    with pytest.raises(InputError) as e:
        lib.from_dict(tree)
    assert expected in str(e.value)


# ---- data -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "d.jsonl"
    path.write_text('{"text": "one two"}\n{"text": "three four"}\n')
    return path


@pytest.mark.parametrize("kind", PATHS)
def test_a_path_that_cannot_be_looked_up_names_its_field(documents, tmp_path, capsys, kind):
    given, expected = PATHS[kind]
    for field, argv in (("data.path", (f"--data.path={given}",)), ("--run", ("--run", given)),
                        ("data.tokenizer", (f"--data.path={documents}", f"--data.tokenizer={given}"))):
        text = message(capsys, "data", "inspect", "emo_tiny", f"--data.path={documents}", *argv)
        assert f"{field}='" in text and expected in text
    text = message(capsys, "data", "tokenize", "emo_tiny", f"--data.path={documents}", "--out", given)
    assert "--out='" in text and expected in text


def test_a_folder_that_cannot_be_made_is_named(documents, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "x", "/proc/x"):
        for argv in (("tokenize", "--out", out), ("inspect", "--run", out)):
            text = message(capsys, "data", *argv, f"--data.path={documents}", "--model.vocab_size=300")
            assert str(out) in text and ("cannot be written" in text or "is a file" in text)


# ---- subsets --------------------------------------------------------------------------------------------------------

GOOD = {"version": 1, "kept": [[0, 2], [1]], "num_routed": 3, "num_shared": 1, "method": "router", "keep": [3, 2],
        "calibration": {"path": "x", "document_hashes": ["a", "b"]}, "scores": [[0.5, 0.1, 0.4], [0, 1, 0.25]],
        "model": {"name": "m", "step": 3, "hash": "c0ffee"}}
WRONG = [None, True, -1, 0.5, "3", [], {}, [[]], [None], [[0, 0], [1]], [[0, 5], [1]], [["0"], [1]], [[2, 0], [1]], [3, 4],
         {"document_hashes": 3}, {"document_hashes": [3]}, {"hash": []}, [[0.5, 0.1], [0, 1]], [[0.5, 0.1, 0.4]],
         [[float("nan"), 0, 0], [1, 2, 3]], [[float("inf"), 0, 0], [1, 2, 3]], [[True, 0, 0], [1, 2, 3]],
         [["a", 0, 0], [1, 2, 3]], 10**400]
FITS = {"num_routed": [], "num_shared": [], "method": ["3"], "kept": [], "scores": [None],
        "calibration": [{}, {"hash": []}], "model": [{}, {"document_hashes": 3}, {"document_hashes": [3]}], "version": []}


def subset_file(tmp_path, content):
    path = tmp_path / "subset.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_subset_survives_its_file(tmp_path):
    subset = subset_lib.load(subset_file(tmp_path, GOOD))
    assert subset.kept == ((0, 2), (1,)) and subset.experts_per_layer == [3, 2] and subset.scores[1] == (0, 1, 0.25)
    subset.save(tmp_path / "again.json")
    assert subset_lib.load(tmp_path / "again.json") == subset
    needed = {k: GOOD[k] for k in ("version", "kept", "num_routed", "num_shared", "method")}
    old = subset_lib.load(subset_file(tmp_path, needed))
    assert old.scores is None and old.model == {} and old.calibration == {}


@pytest.mark.parametrize("value", WRONG, ids=lambda v: repr(v)[:30])
@pytest.mark.parametrize("field", FITS)
def test_a_wrong_value_in_a_subset_file_names_its_field(tmp_path, field, value):
    path = subset_file(tmp_path, GOOD | {field: value})
    if value in FITS[field]:
        subset_lib.load(path)
        return
    with pytest.raises(InputError) as e:
        subset_lib.load(path)
    named = {"num_routed": [field, "kept"], "kept": [field, "scores"]}.get(field, [field])  # which do not fit each other
    assert str(path) in str(e.value) and any(f"{name}=" in str(e.value) or f"{name}[" in str(e.value) for name in named)
    assert " must be " in str(e.value) and len(str(e.value)) < 1000


@pytest.mark.parametrize("field", ["kept", "num_routed", "num_shared", "method", "version"])
def test_a_field_that_a_subset_file_lacks_is_named(tmp_path, field):
    with pytest.raises(InputError, match=field):
        subset_lib.load(subset_file(tmp_path, {k: v for k, v in GOOD.items() if k != field}))


@pytest.mark.parametrize("content, expected", [
    ("", "not JSON"), ("[" * 100_000, "not JSON"), ("1" * 5000, "not JSON"), ("[]", "version=null"), ("3", "version=null")])
def test_a_file_that_is_no_subset(tmp_path, content, expected):
    with pytest.raises(InputError) as e:
        subset_lib.load(subset_file(tmp_path, content))
    assert expected in str(e.value) and "emo-jax select --out" in str(e.value)


@pytest.mark.parametrize("kind", PATHS)
def test_a_subset_path_that_cannot_be_looked_up(tmp_path, kind):
    given, expected = PATHS[kind]
    with pytest.raises(InputError) as e:
        subset_lib.load(given)
    assert expected in str(e.value) and len(str(e.value)) < 1000
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match="cannot be read"):
            subset_lib.load(path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        subset_lib.load(tmp_path / "binary")


# ---- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag, given", [
    ("--temperature", "inf"), ("--temperature", "nan"), ("--temperature", "-1"), ("--temperature", "1e-40"),
    ("--top-p", "nan"), ("--top-p", "0"), ("--top-p", "1.5"), ("--top-p", "-inf"), ("--seed", "-1"),
    ("--seed", "4294967296"), ("--seed", "100000000000000000000")])
def test_sampling_out_of_range_names_the_flag(capsys, tmp_path, flag, given):
    text = message(capsys, "generate", tmp_path, "--prompt", "x", f"{flag}={given}")
    number = given if flag == "--seed" else float(given)
    assert f"{flag} {number} must be " in text


def test_a_seed_that_is_no_integer_is_wrong_usage(capsys, tmp_path):
    with pytest.raises(SystemExit) as e:
        cli.main(["generate", str(tmp_path), "--prompt", "x", "--seed", "1e20"])
    assert e.value.code == 2 and "--seed" in capsys.readouterr().err


def test_what_is_in_range_can_be_computed():
    import jax.numpy as jnp

    for sampling in (Sampling(), Sampling(1e-30, 1e-300, 2**32 - 1), Sampling(1e30, 1.0, 0)):
        assert sampling.check() is sampling
        assert jnp.isfinite(jnp.float32(80.0) / jnp.float32(sampling.temperature or 1))
        assert int(jnp.uint32(sampling.seed)) == sampling.seed
    assert nucleus(jnp.float32([[1.0, 3.0, 2.0]]), jnp.float32(1e-300)).tolist() == [[False, True, False]]

"""What a run says about the machines it is on: which process holds the others up, and how full devices are."""

from pathlib import Path

import jax
import pytest
from tiny_run import config_file, records, tiny_config
from two_processes import start_command

from emo_jax.train import hosts, loop, metrics
from emo_jax.train.hosts import Hosts, Pace


def test_a_slow_process_of_two_is_named(tmp_path):
    script, out = Path(__file__).with_name("slow_process.py"), tmp_path / "run"
    started = start_command([str(script), "train", str(config_file(tmp_path)), "--out", str(out), "--train.steps=24",
                             "--train.log_every=4"], 2)
    errors = [process.communicate(timeout=400)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    last = records(out)[-1]
    assert last["slowest_host"].startswith("process 1 of 2 on ")
    assert last["host_step_seconds"]["1"] > 0.5 > 0.25 > last["host_step_seconds"]["0"]
    assert last["host_data_wait_fraction"]["1"] > 0.5 > last["host_data_wait_fraction"]["0"]
    assert errors[0].count("holds the others up: it was busy for 0.5") == 1 and not errors[1].count("holds the others up")


@pytest.fixture
def four(monkeypatch):
    """`Hosts` of the first of four processes, and what the others tell."""
    told = {}
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(hosts.liveness, "shared", lambda: told)
    return Hosts(), told


def test_nobody_is_named_until_all_have_told_and_one_is_clearly_slower(four):
    found, told = four
    own = Pace(0.02, 0.0)
    told |= {1: ("a", "[0.02, 0.0]"), 3: ("c", "[0.021, 0.0]")}
    assert found.record(own, 1.0) == {}
    told[2] = ("b", "[0.1, 0.08]")
    assert found.record(own, 1.0) == {"host_step_seconds": {"0": 0.02, "1": 0.02, "2": 0.1, "3": 0.021},
                                      "host_data_wait_fraction": {"0": 0.0, "1": 0.0, "2": 0.08, "3": 0.0}}
    told[2] = ("b", "[0.3, 0.25]")
    record = found.record(own, 1.0)
    assert record["slowest_host"] == "process 2 of 4 on b"
    assert "0.300 s of every step, they for 0.020 s; it waited for data for 25%" in found.complaint(record)
    assert found.complaint(record) is None  # said once
    assert found.record(Pace(0.9, 0.0), 1.0)["slowest_host"].startswith("process 0 of 4 on ")


def test_one_process_says_nothing_of_hosts_and_a_cpu_nothing_of_memory(tmp_path):
    loop.train(tiny_config(tmp_path, "--train.steps=3"), tmp_path / "run")
    assert not any(key.startswith(("host", "slowest", "device_")) for record in records(tmp_path / "run") for key in record)


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, now, peak):
            self.memory_stats = lambda: {"bytes_in_use": now, "peak_bytes_in_use": peak, "bytes_limit": 100}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(5, 9), Device(7, 8)])
    assert metrics._device_memory() == {"device_memory_bytes": 7, "device_memory_peak_bytes": 9}

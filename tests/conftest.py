"""Tests run on eight fake CPU devices; most use one of them. Every call of the package checks its annotations and shapes."""

import gc
import importlib.util
import os
import sys

import pytest
from jaxtyping import install_import_hook
from slow_tests import FAST, LONG, SLOW

GPU = os.environ.get("EMO_JAX_TEST_PLATFORM") == "gpu"  # `launch/test.sh --gpu`: test_gpu.py and nothing else
if GPU:
    os.environ["JAX_PLATFORMS"] = "cuda,cpu"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"  # for runs that go on
else:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
        " --xla_force_host_platform_device_count=8"
        # Compiles four times as fast; nothing here is timed.
        " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
assert "jax" not in sys.modules, "jax was imported before the number of fake devices was set"
import emo_jax.config  # noqa: E402, F401  before the hook: its fields hold whatever a person wrote, until `validate`

install_import_hook("emo_jax", "annotations.check")

CLIENTS = {"test_convert_stock.py": ("torch", "transformers"), "test_harness.py": ("lm_eval",),
           "test_remote_code.py": ("torch", "transformers"), "test_hub.py": ("huggingface_hub",),
           "test_tracker_clients.py": ("wandb", "trackio")}
left_out = [file for file, packages in CLIENTS.items() if not all(map(importlib.util.find_spec, packages))]
own_runs = {"test_gpu.py": GPU, "test_engines.py": "EMO_JAX_ENGINES" in os.environ}  # `launch/test.sh --gpu`, `--engines`
collect_ignore = [*left_out, *(file for file, asked in own_runs.items() if not asked)]


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """What a module leaves behind, compiled programs above all, is not looked at by later collections: each run's end asks for
    a whole one."""
    yield
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also the tests marked long")


def pytest_collection_modifyitems(config, items):
    names = {item: item.nodeid.rpartition("tests/")[2] for item in items}
    if not config.option.long:
        config.hook.pytest_deselected(items=[item for item in items if names[item].startswith(LONG)])
        items[:] = [item for item in items if not names[item].startswith(LONG)]
    for item in items:
        name = names[item]
        if name.startswith(SLOW) and not name.startswith(FAST):
            item.add_marker("slow")
        if name.startswith(tuple(CLIENTS)):
            item.add_marker("clients")


def pytest_collection_finish():
    gc.freeze()  # what was imported; see frozen_heap


def pytest_terminal_summary(terminalreporter, config):
    if left_out:
        terminalreporter.write_line(f"left out: {', '.join(left_out)} (against stock PyTorch, transformers, "
                                    "lm-evaluation-harness, trackers), which `bash launch/test.sh --clients` installs and runs")
    if config.option.markexpr == "not slow":
        terminalreporter.write_line("left out: tests marked slow, which `bash launch/test.sh` runs")

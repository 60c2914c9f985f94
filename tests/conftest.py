"""Tests run on eight fake CPU devices; most use one of them."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0")  # compiles three times as fast; nothing here is timed
assert "jax" not in sys.modules, "jax was imported before the number of fake devices was set"

"""Tests run on eight fake CPU devices; most use one of them. Every call of the package checks its annotations and shapes."""

import importlib.util
import os
import sys

from jaxtyping import install_import_hook

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0")  # compiles three times as fast; nothing here is timed
assert "jax" not in sys.modules, "jax was imported before the number of fake devices was set"
import emo_jax.config  # noqa: E402, F401  before the hook: its fields hold whatever a person wrote, until `validate`

install_import_hook("emo_jax", "annotations.check")

# What takes most of the time, by the start of a test's name, but for what covers the same room faster.
SLOW = (
    "test_aot.py::test_golden_summary", "test_cli.py::test_sigterm", "test_convert.py::test_an_imported",
    "test_convert.py::test_out_of_a", "test_convert_stock.py", "test_data_pipeline.py::test_batches_do_not",
    "test_data_pipeline.py::test_errors", "test_data_pipeline.py::test_resume", "test_data_pipeline.py::test_workers",
    "test_experts.py::test_all_to_all_falls", "test_experts.py::test_an_expert_gradient",
    "test_experts.py::test_equals_the_dense", "test_experts.py::test_rows_and_slots", "test_generate.py::test_batches",
    "test_generate.py::test_decoding_is_ten", "test_generate.py::test_the_command", "test_harness.py",
    "test_kernels.py::test_attention_on_a_mesh", "test_kernels.py::test_experts_of_grouped_rows[fused",
    "test_kernels.py::test_experts_of_grouped_rows[megablox", "test_kernels.py::test_one_document",
    "test_library.py::test_devices", "test_library.py::test_the_examples", "test_plots.py::test_the_picture",
    "test_sharded_step.py", "test_study.py::test_activations", "test_study.py::test_measures", "test_study.py::test_study",
    "test_study.py::test_the_study_goes", "test_study.py::test_what_cannot", "test_subsets_check.py::test_commands",
    "test_subsets_check.py::test_fine_tuning", "test_subsets_check.py::test_metrics", "test_subsets_check.py::test_the_text",
    "test_subsets_choose.py::test_a_mesh", "test_subsets_choose.py::test_contributions",
    "test_subsets_choose.py::test_padding", "test_subsets_store.py", "test_train_faults.py", "test_train_resume.py",
    "test_two_processes.py")
FAST = (
    "test_aot.py::test_golden_summary[auto]", "test_convert.py::test_out_of_a_checkpoint_and_back_is_bit_exact[shared]",
    "test_experts.py::test_equals_the_dense_oracle[all_to_all_portable-blocked",
    "test_experts.py::test_equals_the_dense_oracle[ring-blocked", "test_generate.py::test_batches_meshes_and_subsets_change_no_token[one",
    "test_kernels.py::test_experts_of_grouped_rows[fused-unaligned", "test_sharded_step.py::test_eight_devices_equal_one[data fsdp expert]",
    "test_subsets_choose.py::test_contributions_agree_under_every_dispatch[ring", "test_subsets_store.py::test_extending",
    "test_subsets_store.py::test_forced", "test_train_faults.py::test_stops")
CLIENTS = {"test_convert_stock.py": ("torch", "transformers"), "test_harness.py": ("lm_eval",)}
collect_ignore = [file for file, packages in CLIENTS.items() if not all(map(importlib.util.find_spec, packages))]


def pytest_collection_modifyitems(items):
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        if name.startswith(SLOW) and not name.startswith(FAST):
            item.add_marker("slow")
        if name.startswith(tuple(CLIENTS)):
            item.add_marker("clients")


def pytest_terminal_summary(terminalreporter, config):
    if collect_ignore:
        terminalreporter.write_line(f"left out: {', '.join(collect_ignore)} (against stock PyTorch, transformers and "
                                    "lm-evaluation-harness), which `bash launch/test.sh --clients` installs and runs")
    if config.option.markexpr == "not slow":
        terminalreporter.write_line("left out: tests marked slow, which `bash launch/test.sh` runs")

"""The compile report: reading compiled programs, and golden summaries of small ones that catch a lost sharding."""

import json
import subprocess
import sys
from importlib.util import find_spec

import jax
import pytest

from emo_jax import cli
from emo_jax.aot import compile as aot
from emo_jax.aot import topology
from emo_jax.aot.hlo import Module, array_bytes, group_size
from emo_jax.aot.schedule import schedule
from emo_jax.chips import CHIPS, Chip, chip_name, peak_flops
from emo_jax.config import Config, DataConfig, KernelConfig, MeshConfig, ModelConfig, RouterConfig, TrainConfig
from emo_jax.errors import InputError, RunError

PROGRAM = """HloModule jit_step, is_scheduled=true

%body (arg: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %arg = (s32[], bf16[64,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = bf16[64,128]{1,0} get-tuple-element(%arg), index=1
  %gather.1 = (bf16[64,128]{1,0}, bf16[256,128]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %square = bf16[128,128]{1,0} dot(%x, %x), lhs_contracting_dims={0}, backend_config={"estimated_cycles":"2"}
  %gather.2 = bf16[256,128]{1,0} all-gather-done(%gather.1)
  %sum = bf16[64,128]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %next = (s32[], bf16[64,128]{1,0}) tuple(%i, %sum)
}

%condition (arg: (s32[], bf16[64,128])) -> pred[] {
  %arg = (s32[], bf16[64,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %bound = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (x: bf16[64,128]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[64,128]{1,0}) tuple(%zero, %x)
  %loop = (s32[], bf16[64,128]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[64,128]{1,0} get-tuple-element(%loop), index=1
}
"""
SLOW = Chip(flops=1e9, memory=1e9, bandwidth=1e6, link=1e6, clock=1.0)


def test_a_loop_whose_counter_does_not_begin_at_zero():
    """As XLA makes of one whose first iteration it has moved out."""
    module = Module(PROGRAM.replace("constant(0)", "constant(1)"))
    (loop,) = [i for i in module.computations[module.entry] if i.opcode == "while"]
    assert module.trip_count(module.entry, loop) == 2


def test_a_loop_is_counted_as_often_as_it_runs_and_asynchronous_time_is_covered():
    walked = schedule(Module(PROGRAM), SLOW)
    gather, reduce = sorted(walked.collectives, key=lambda c: c.kind)
    size = 64 * 128 * 2
    assert (gather.kind, gather.asynchronous, gather.group, gather.count) == ("all-gather", True, 4, 3)
    assert (reduce.kind, reduce.asynchronous, reduce.group, reduce.count) == ("all-reduce", False, 2, 3)
    assert gather.payload_bytes == 3 * 4 * size and gather.wire_bytes == 3 * 3 * size
    assert reduce.payload_bytes == 3 * size and reduce.wire_bytes == 3 * 2 * size / 2
    assert walked.flops == pytest.approx(3 * 2 * 128 * 128 * 64)
    # The matmul takes two seconds by the compiler's cycles; the gather takes less, the reduction is not covered at all.
    assert gather.exposed_seconds == 0
    assert walked.exposed_seconds == pytest.approx(reduce.seconds) == pytest.approx(3 * size / SLOW.link)
    assert not walked.unknown_loops


FRAMES = """HloModule jit_step, is_scheduled=true

FileNames
1 "/site/emo_jax/model.py"
2 "/site/jax/lax.py"

FunctionNames
1 "layer"

FileLocations
1 {file_name_id=1 function_name_id=1 line=321 end_line=321 column=1 end_column=9}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

"""


def test_the_gaps_between_cycles_and_floor_are_named_by_source_line():
    """A library's frame counts for the line of this package that called it."""
    metadata = 'metadata={op_name="jit(step)/experts/dot" stack_frame_id=2}, backend_config={"estimated'
    gap, = schedule(Module(PROGRAM.replace("HloModule jit_step, is_scheduled=true\n\n", FRAMES)
                           .replace('backend_config={"estimated', metadata)), SLOW).gaps
    assert (gap.line, gap.operation, gap.fusions) == ("model.py:321", "jit(step)/experts/dot", 3)
    assert gap.cycles_seconds == 6.0 and gap.roofline_seconds == pytest.approx(3 * 4 * 64 * 128 / 1e6, rel=1)


def test_what_is_sent_to_other_slices_takes_their_network_and_runs_beside_the_compute():
    send = ('%sent = (bf16[64,128]{1,0}, u32[], token[]) send(%x, %token), channel_id=5, is_host_transfer=true, '
            'frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_transfer_type="ALL_REDUCE"}')
    recv = send.replace("%sent", "%got").replace("send(%x, ", "recv(").split("_xla_megascale")[0] + '_xla="x"}'
    program = PROGRAM.replace("  %square", f"  {recv}\n  {send}\n  %square").replace(
        "  %sum = ", "  %done = bf16[64,128]{1,0} recv-done(%got)\n  %sum = ")
    walked = schedule(Module(program), SLOW._replace(network=1e5), slices=2, slice_devices=4)
    sent, = (c for c in walked.collectives if c.between_slices)
    size = 64 * 128 * 2
    assert (sent.kind, sent.count, sent.group, sent.asynchronous) == ("all-reduce", 3, 2, True)
    assert sent.payload_bytes == sent.wire_bytes == 3 * size and sent.seconds == pytest.approx(3 * size / 1e5)
    assert sent.exposed_seconds == 0  # the matmul takes two seconds
    assert sum(not c.between_slices for c in walked.collectives) == 2


def test_a_collective_uses_the_links_of_the_torus_axes_that_its_group_spans():
    (one,), (two,) = ([c.seconds for c in schedule(Module(PROGRAM), SLOW, grid).collectives if c.group == 4]
                      for grid in ((4, 2), (2, 2, 2)))
    assert one == 2 * two


FUSIONS = """HloModule jit_step

%inner (p: bf16[16,64,128]) -> bf16[64,128] {
  %p = bf16[16,64,128]{2,1,0} parameter(0)
  %one = bf16[1,64,128]{2,1,0} slice(%p), slice={[3:4], [0:64], [0:128]}
  ROOT %flat = bf16[64,128]{1,0} bitcast(%one)
}

%update (stack: bf16[16,64,128], table: bf16[16,64,128], at: s32[]) -> (bf16[16,64,128], bf16[64,128]) {
  %stack = bf16[16,64,128]{2,1,0} parameter(0)
  %table = bf16[16,64,128]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  %row = bf16[64,128]{1,0} fusion(%table), kind=kLoop, calls=%inner
  %new = bf16[1,64,128]{2,1,0} bitcast(%row)
  %done = bf16[16,64,128]{2,1,0} dynamic-update-slice(%stack, %new, %at)
  ROOT %both = (bf16[16,64,128]{2,1,0}, bf16[64,128]{1,0}) tuple(%done, %row)
}

%cast (p: bf16[64,128]) -> f32[64,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  ROOT %wide = f32[64,128]{1,0} convert(%p)
}

ENTRY %main (stack: bf16[16,64,128], table: bf16[16,64,128], at: s32[]) -> f32[64,128] {
  %stack = bf16[16,64,128]{2,1,0} parameter(0)
  %table = bf16[16,64,128]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  %f = (bf16[16,64,128]{2,1,0}, bf16[64,128]{1,0}) fusion(%stack, %table, %at), kind=kLoop, calls=%update
  %row = bf16[64,128]{1,0} get-tuple-element(%f), index=1
  ROOT %out = f32[64,128]{1,0} fusion(%row), kind=kLoop, calls=%cast
}
"""


def test_a_fusion_moves_only_the_slices_that_it_reads_and_updates():
    module, row = Module(FUSIONS), 64 * 128 * 2
    update, cast = module.find("main", "f"), module.find("main", "out")
    assert module.moved_bytes("main", update) == 4 + 3 * row  # the index; one slice read, and written twice
    assert module.moved_bytes("main", cast) == row + 2 * row


CARRIER = """HloModule jit_step

%step (p: bf16[8,128], buffer: bf16[64,128], x: f32[16,128]) -> (f32[16,128], bf16[8,128], bf16[64,128], bf16[64,128]) {
  %p = bf16[8,128]{1,0} parameter(0)
  %buffer = bf16[64,128]{1,0} parameter(1)
  %x = f32[16,128]{1,0} parameter(2)
  %gather = bf16[64,128]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %twice = f32[16,128]{1,0} add(%x, %x)
  ROOT %all = (f32[16,128]{1,0}, bf16[8,128]{1,0}, bf16[64,128]{1,0}, bf16[64,128]{1,0}) tuple(%twice, %p, %buffer, %gather)
}

ENTRY %main (p: bf16[8,128], buffer: bf16[64,128], x: f32[16,128]) -> f32[16,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  %buffer = bf16[64,128]{1,0} parameter(1)
  %x = f32[16,128]{1,0} parameter(2)
  %f = (f32[16,128]{1,0}, bf16[8,128]{1,0}, bf16[64,128]{1,0}, bf16[64,128]{1,0}) fusion(%p, %buffer, %x),
    kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {})}, calls=%step
  ROOT %out = f32[16,128]{1,0} get-tuple-element(%f), index=0
}
"""


def test_a_fusion_that_carries_a_collective_does_not_move_its_buffers():
    assert schedule(Module(CARRIER), SLOW).moved_bytes == 2 * 16 * 128 * 4


def test_shapes_and_groups():
    assert array_bytes("(f32[2,3]{1,0}, bf16[4]{0:S(1)}, pred[])") == 24 + 8 + 1
    assert array_bytes("(f32[2,3]{1,0}, bf16[4]{0:S(1)})", main_memory=True) == 24
    assert array_bytes("(f32[2,3]{1,0}, bf16[4]{0})", largest=True) == 24
    assert group_size("replica_groups=mesh['a'=2,'b'=8] {'b'}, x") == 8


def test_topologies():
    assert topology.parse("v5p-128") == topology.parse("v5p:4x4x4") == ("v5p", (4, 4, 4))
    assert topology.parse("v6e:16x16") == ("v6e", (16, 16))
    for name in ("v5p:4x4", "h100:8", "v5p", "v6e:4x4x4"):
        with pytest.raises(InputError, match="v5p:4x4x4"):
            topology.parse(name)
    assert topology.parse("h100:8", gpus=True) == ("h100", (1, 8)) and topology.parse("h200:4x8", gpus=True) == ("h200", (4, 8))
    for name in ("h100:1x2x4", "v5p:4x4", "h100"):
        with pytest.raises(InputError, match="h100:8"):
            topology.parse(name, gpus=True)
    with pytest.raises(InputError, match="h100:HOSTSxGPUS"):
        topology.devices("h100:8", slices=2)


def test_chips_by_the_names_of_devices():
    names = {"TPU v5": "v5p", "TPU v5p": "v5p", "TPU v5 lite": "v5e", "TPU v6 lite": "v6e", "TPU7x": "tpu7x",
             "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200", "cpu": None}
    assert {kind: chip_name(kind) for kind in names} == names
    assert peak_flops("NVIDIA H200") == CHIPS["H200"].flops and peak_flops("cpu") is None


def tiny(mesh: MeshConfig, dispatch: str = "auto") -> Config:
    return Config(
        name="golden", mesh=mesh, kernels=KernelConfig(dispatch=dispatch), router=RouterConfig(pool_min=2, pool_max=7),
        model=ModelConfig(vocab_size=256, num_layers=2, d_model=64, num_heads=4, num_kv_heads=4, head_dim=16, d_ff=32,
                          num_experts=16, top_k=3),
        data=DataConfig(sequence_length=64, max_documents_per_row=4), train=TrainConfig(batch_size=16, remat="full"))


# By dispatch: the collectives of one step by kind, over more than one device, and peak megabytes of a device, in the supported
# JAX that needs most. Fewer is progress: lower them.
GOLDEN = {
    "local": (MeshConfig(fsdp=8), {"all-gather": 34, "reduce-scatter": 5, "all-reduce": 8}, 4.32),
    "ring": (MeshConfig(fsdp=2, expert=4), {"all-gather": 49, "reduce-scatter": 11, "all-reduce": 15}, 3.82),
    "all_to_all": (MeshConfig(fsdp=2, expert=4),  # exchanges by all-gathers, as on every CPU
                   {"all-gather": 84, "reduce-scatter": 5, "all-reduce": 19}, 3.96),
    "auto": (MeshConfig(fsdp=2, tensor=2, sequence=2), {"all-gather": 48, "reduce-scatter": 5, "all-reduce": 46}, 4.68),
}


@pytest.mark.parametrize("dispatch", GOLDEN)
def test_golden_summary(dispatch):
    mesh, collectives, megabytes = GOLDEN[dispatch]
    config = tiny(mesh, dispatch)
    compiled, _ = aot.compile_step(config, jax.devices()[:8])
    report = aot.report(config, jax.devices()[:8], compiled)
    counted = {}
    for c in report["collectives"]:
        if c["group"] != 1:
            counted[c["kind"]] = counted.get(c["kind"], 0) + c["count"]
    peak = report["memory"]["peak"] / 1e6
    assert all(n <= collectives.get(kind, 0) for kind, n in counted.items()), f"{counted} exceeds {collectives}"
    assert peak <= 1.05 * megabytes, f"peak {peak:.2f} MB exceeds {megabytes} MB by more than 5 %"


def test_a_wrong_topology_is_named(capsys):
    assert cli.main(["compile", "emo_tiny", "--topology", "v5p:nine", "--json"]) == 2
    assert "v5p:4x4x4" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("name, extra", [("v5p-128", "tpu"), ("h100:8", "cuda")])
def test_a_compiler_that_is_not_installed_is_named(name, extra, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=rf"emo-jax\[{extra}\]"):
        topology.devices(name)


@pytest.mark.skipif(not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)), reason="needs the CUDA compiler")
@pytest.mark.parametrize("topology, gathers", [("h100:8", True), ("h200:2x4", True), ("h100:1", False)])
def test_a_step_is_compiled_for_gpus_that_are_not_there(topology, gathers):
    command = [sys.executable, "-m", "emo_jax", "compile", "emo_tiny", "--topology", topology, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout.splitlines()[-1])
    assert report["chip"] == topology[:4].upper() and report["memory"]["fits"]
    assert any(c["kind"] == "all-gather" and c["group"] == 8 for c in report["collectives"]) == gathers
    assert 0.7 < report["flops"]["hardware"] / report["flops"]["model"] < 1.5  # without those of attention's kernel

"""Plans: what a compiled step holds, computes and exchanges, and the roofline that follows."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console

from gram_jax.abstract_step import abstract_step, argument_bytes, with_model
from gram_jax.arithmetic import abstract_mesh, estimate
from gram_jax.chips import CHIPS, Slice, parse_topology
from gram_jax.collectives import Collective, collectives, group_axes, grouped
from gram_jax.config import (
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    ObjectiveConfig,
    TrainConfig,
)
from gram_jax.errors import UserError
from gram_jax.flops import device_flops
from gram_jax.hlo import Instruction, parse
from gram_jax.plan_sweep import overrides, sweep
from gram_jax.planning import out_of_memory
from gram_jax.roofline import Roofline, closes, link_bandwidth, network_seconds
from gram_jax.sharding_table import sharding_table
from gram_jax.traffic import memory_traffic

ROOT = Path(__file__).parents[1]
H100 = parse_topology("h100:8")
# The loops of attention in blocks run as often as the data says.
COMPUTE = dataclasses.replace(tiny.COMPUTE, attention="xla")


def config(**changes):
    """A tiny pretraining config of two parts on a mesh of 2 x 2 x 2."""
    values = {
        "model": tiny.config(),
        "compute": COMPUTE,
        "mesh": MeshConfig(data=2, fsdp=2, tensor=2),
        "data": DataConfig(row_length=64),
        "train": TrainConfig(batch_rows=16, accumulate=2),
    }
    return Config(**values | changes)


@pytest.fixture(scope="module")
def compiled():
    """The tiny training step, for 8 CPU devices: the step, the mesh, the program."""
    mesh = tiny.mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        step = abstract_step(config(), mesh)
        executable = step.trace().lower().compile()
    return SimpleNamespace(
        step=step, mesh=mesh, executable=executable, program=parse(executable.as_text())
    )


# Chips and slices


def test_a_topology_is_a_kind_and_a_shape():
    assert parse_topology("v5p:4x4x4").chips == 64
    assert parse_topology("tpu7x:4x4x4").devices == 128
    two = parse_topology("2*v5e:16x16")
    assert (two.slices, two.chips, two.name) == (2, 512, "2*v5e:16x16")


@pytest.mark.parametrize("text", ["v5p", "v9:4x4", "v5p:4x4", "v5e:4x4x4", "h100:0", "v5e:4xx4"])
def test_what_is_no_topology_is_said(text):
    with pytest.raises(UserError, match=f"--topology={text}"):
        parse_topology(text)


def test_every_figure_has_a_source():
    for chip in CHIPS.values():
        assert all(source.startswith("https://") for source in chip.sources) and chip.sources
        assert chip.flops > 1e14 and chip.memory > 1e10 and chip.links > chip.network


# Reading a compiled program


def test_the_program_of_a_scan_runs_its_body_as_often_as_it_says():
    def function(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
    program = parse(jax.jit(function).lower(x, w).compile().as_text())
    loops = [
        program.trip_count(computation, i)
        for computation, _ in program.runs()
        for i in computation.instructions.values()
        if i.opcode == "while"
    ]
    assert loops == [5]


def test_a_loop_whose_count_is_not_written_is_counted_from_its_condition():
    text = """HloModule loop

%condition (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(14)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (q: (s32[], f32[4])) -> (s32[], f32[4]) {
  %q = (s32[], f32[4]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%j, %two)
  %x = f32[4]{0} get-tuple-element(%q), index=1
  %sum = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %pair = (s32[], f32[4]{0}) tuple(%next, %sum)
}

ENTRY %main (x: f32[4]) -> (s32[], f32[4]) {
  %start = s32[] constant(4)
  %x = f32[4]{0} parameter(0)
  %first = (s32[], f32[4]{0}) tuple(%start, %x)
  ROOT %loop = (s32[], f32[4]{0}) while(%first), condition=%condition, body=%body
}
"""
    (found,) = collectives(parse(text), {"data": 2, "fsdp": 4})
    assert found == Collective("all-reduce", ("fsdp",), 4, 16, 5, "f32")


def test_an_exchange_that_another_core_makes_is_counted_once():
    """Of tpu7x: an asynchronous call, in it a custom call, and in that the exchange."""
    text = """HloModule offloaded

%called.1 (p.1: bf16[8,24]) -> bf16[8,192] {
  %p.1 = bf16[8,24]{1,0} parameter(0)
  ROOT %gather.1 = bf16[8,192]{1,0} all-gather(%p.1), channel_id=18, replica_groups=mesh['a'=8] {'a'}, dimensions={1}
}, execution_thread="sparsecore"

%async.1 (p.2: bf16[8,24]) -> bf16[8,192] {
  %p.2 = bf16[8,24]{1,0} parameter(0)
  ROOT %call.1 = bf16[8,192]{1,0} custom-call(%p.2), custom_call_target="T", called_computations={%called.1}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[8,24]) -> bf16[8,192] {
  %x = bf16[8,24]{1,0} parameter(0)
  %start = ((bf16[8,24]{1,0}), bf16[8,192]{1,0}) async-start(), calls=%async.1
  %update = ((bf16[8,24]{1,0}), bf16[8,192]{1,0}) async-update(%start, %x)
  ROOT %done = bf16[8,192]{1,0} async-done(%update)
}
"""  # noqa: E501
    program = parse(text)
    (found,) = collectives(program, {"data": 1, "fsdp": 8})
    assert found == Collective("all-gather", ("fsdp",), 8, 2 * 8 * 192, 1, "bf16")
    assert memory_traffic(program) == 2 * 8 * (24 + 192)


@pytest.mark.parametrize(("target", "slices"), [("{1,2}x{0:7}", 2), ("{1:4}x{0:7}", 4)])
def test_what_is_sent_to_other_slices_is_counted(target, slices):
    text = f"""HloModule slices

ENTRY %main (x: f32[192,8]) -> f32[192,8] {{
  %x = f32[192,8]{{1,0}} parameter(0)
  %token = token[] after-all()
  %send = (f32[192,8]{{1,0}}, u32[]{{:S(2)}}, token[]) send(%x, %token), channel_id=6, is_host_transfer=true, frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{target}",_xla_megascale_transfer_type="ALL_REDUCE"}}
  %recv = (f32[192,8]{{1,0}}, u32[]{{:S(2)}}, token[]) recv(%token), channel_id=5, is_host_transfer=true, frontend_attributes={{_xla_megascale_target="{target}",_xla_megascale_transfer_type="ALL_REDUCE"}}
  %sent = token[] send-done(%send), channel_id=6
  %received = (f32[192,8]{{1,0}}, token[]) recv-done(%recv), channel_id=5
  ROOT %sum = f32[192,8]{{1,0}} get-tuple-element(%received), index=0
}}
"""  # noqa: E501
    (found,) = collectives(parse(text), {"data": slices, "fsdp": 8})
    assert found == Collective("all-reduce", ("data",), slices, 4 * 192 * 8, 1, "f32")


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups=[2,4]<=[2,4]T(0,1)", ("fsdp", "tensor")),
        ("replica_groups=[4,2]<=[4,2]", ("tensor",)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data", "fsdp")),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ("data",)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ("fsdp",)),
        ("replica_groups={}", ("data", "fsdp", "tensor")),
        ("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}", ("fsdp",)),
    ],
)
def test_the_axes_of_an_exchange_are_those_along_which_its_devices_differ(groups, axes):
    i = Instruction("x", "all-reduce", (), (), groups, False)
    found, size = group_axes(i, {"data": 2, "fsdp": 2, "tensor": 2})
    assert found == axes and size == 2 ** len(axes)


def test_exchanges_of_known_functions_have_their_bytes(compiled):
    mesh = compiled.mesh
    spec = jax.P(("data", "fsdp"), "tensor")
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=jax.NamedSharding(mesh, spec))

    def gather(x):
        return jax.reshard(x, jax.P(None, "tensor"))

    def total(x):
        return jax.shard_map(
            lambda x: jax.lax.psum(x, "tensor"), in_specs=spec, out_specs=jax.P(spec[0])
        )(x)

    for function, kind, axes, whole, sent in (
        (gather, "all-gather", ("data", "fsdp"), 64 * 16 * 4, 64 * 16 * 4 * 3 / 4),
        (total, "all-reduce", ("tensor",), 16 * 16 * 4, 16 * 16 * 4),
    ):
        with jax.set_mesh(mesh):
            text = jax.jit(function).lower(x).compile().as_text()
        (found,) = collectives(parse(text), dict(mesh.shape))
        assert (found.kind, found.axes, found.whole, found.sent) == (kind, axes, whole, sent)


def test_exchanges_that_a_shard_map_asks_for_are_all_counted(compiled):
    """They share one channel, which is that of one exchange elsewhere."""
    mesh, spec = compiled.mesh, jax.P(("data", "fsdp"), "tensor")
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=jax.NamedSharding(mesh, spec))

    def twice(x):
        first = jax.lax.psum(x, "tensor")
        return jax.lax.psum(jnp.tanh(first) * x, "tensor")

    with jax.set_mesh(mesh):
        run = jax.shard_map(twice, in_specs=spec, out_specs=jax.P(spec[0]))
        text = jax.jit(run).lower(x).compile().as_text()
    found = collectives(parse(text), dict(mesh.shape))
    assert [(c.kind, c.axes, c.whole) for c in found] == [("all-reduce", ("tensor",), 1024)] * 2


def test_the_training_step_exchanges_weights_and_gradients_in_every_layer_and_part(compiled):
    found = collectives(compiled.program, dict(compiled.mesh.shape))
    kinds = {(c.kind, c.axes) for c in found}
    assert ("all-gather", ("fsdp",)) in kinds
    assert any(kind == "all-reduce" and "tensor" in axes for kind, axes in kinds)
    once, often = min(c.times for c in found), max(c.times for c in found)
    assert once == 1 and often > 1
    assert math.isclose(sum(c.sent for c in grouped(found)), sum(c.sent for c in found))


def test_the_memory_traffic_of_plain_functions_is_what_they_read_and_write():
    x, i = jnp.ones((64, 1024)), jnp.int32(3)

    def traffic(function, *arguments, **options):
        text = jax.jit(function, **options).lower(*arguments).compile().as_text()
        return memory_traffic(parse(text))

    assert traffic(lambda x: x + 1, x) == 2 * x.nbytes
    one_row = traffic(lambda x, i: jax.lax.dynamic_index_in_dim(x, i) * 2, x, i)
    assert one_row <= 3 * x.nbytes / 64
    update = traffic(
        lambda x, i: jax.lax.dynamic_update_index_in_dim(x, x[0] + 1, i, 0),
        x, i, donate_argnums=0,
    )  # fmt: skip
    assert update <= 6 * x.nbytes / 64


# FLOPs and memory


def test_products_are_counted_per_device_and_loop(compiled):
    mesh = compiled.mesh

    def array(shape, *spec):
        sharding = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def layer(x_bd, w_df):
        x_bf = jnp.einsum("bd,df->bf", x_bd, w_df, out_sharding=jax.P("data", "tensor"))
        return jnp.einsum("bf,df->bd", x_bf, w_df, out_sharding=jax.P("data")), None

    x, w = array((8, 16), "data"), array((3, 16, 32), None, None, "tensor")
    with jax.set_mesh(mesh):
        traced = jax.jit(lambda x, w: jax.lax.scan(layer, x, w)[0]).trace(x, w)
    jaxpr = traced.jaxpr.jaxpr
    assert device_flops(jaxpr, dict(mesh.shape)) == 3 * 2 * (2 * 8 * 16 * 32) / 4


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_flops_of_a_step_are_those_of_the_model_and_what_is_computed_twice(remat):
    # The reference attends to whole rows: twice the causal half that the model is counted with.
    compute = dataclasses.replace(COMPUTE, remat=remat)
    c = config(compute=compute, train=TrainConfig(batch_rows=8))
    mesh = abstract_mesh(c, H100)
    with jax.sharding.use_abstract_mesh(mesh):
        step = abstract_step(c, mesh)
        found = 8 * device_flops(step.trace().jaxpr.jaxpr, dict(mesh.shape))
    m, t = c.model, c.data.row_length
    head = 8 * t * 2 * m.hidden_size * m.vocab_size
    attention = 8 * t * m.num_layers * 2 * m.num_heads * m.head_dim * t  # the acausal half
    layers = 8 * t * m.flops_per_token(t, targets_per_token=0) + attention
    # Of a block, all but its last product is computed again; of the head, the logits.
    down = 8 * t * m.num_layers * 2 * m.hidden_size * m.intermediate_size
    assert found == 3 * layers + (layers - down) * (remat == "full") + 4 * head


def test_the_arguments_of_a_step_take_the_bytes_that_are_counted(compiled):
    found = compiled.executable.memory_analysis()
    assert found.argument_size_in_bytes == pytest.approx(
        sum(argument_bytes(compiled.step)), rel=0.02
    )


def test_the_compilers_message_says_how_much_is_missing():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.51G of 15.75G hbm."
    )
    limit = round(15.75 * 2**30)
    assert out_of_memory(message, 1000) == (round(23.51 * 2**30), limit)
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory"
        " required for HLO temporaries (82.35G) exceeds available HBM (15.75G). HLO module: jit_f."
    )
    assert out_of_memory(message, 1000) == (round(82.35 * 2**30) + 1000, limit)
    with pytest.raises(RuntimeError, match="something else"):
        out_of_memory("something else", 0)


# Roofline


def test_a_step_takes_the_longest_of_three_times():
    r = Roofline(compute=2.0, memory=1.0, network=3.0, model_flops=1e14, peak=1e14, tokens=1000)
    assert (r.step, r.bound_by, r.mfu, r.serial_mfu) == (3.0, "network", 1 / 3, 1 / 6)
    assert r.tokens_per_day == 1000 / 3 * 86400
    assert r.days(r.tokens_per_day * 2.5) == pytest.approx(2.5)


def test_links_count_where_a_group_can_use_them():
    cube, plane, pod = (parse_topology(t) for t in ("v5p:4x4x4", "v5e:4x4", "v5e:16x16"))
    line = [(x, 0, 0) for x in range(4)]
    assert closes(cube, 0) and not closes(plane, 0) and closes(pod, 1)
    assert link_bandwidth(cube, line) == cube.chip.links / 3
    assert link_bandwidth(cube, line[:2]) == cube.chip.links / 6
    assert link_bandwidth(plane, line) == plane.chip.links / 4
    everywhere = [(x, y, 0) for x in range(16) for y in range(16)]
    assert link_bandwidth(pod, everywhere) == pod.chip.links


def test_slices_exchange_over_the_slower_network():
    where = parse_topology("2*v5e:2x2")
    devices = np.array(
        [
            SimpleNamespace(coords=(x, y, 0), slice_index=s)
            for s in range(2) for x in range(2) for y in range(2)
        ]
    ).reshape(2, 4)  # fmt: skip
    mesh = {"data": 2, "fsdp": 4}
    inside = Collective("all-gather", ("fsdp",), 4, 10**9, 1, "bf16")
    across = Collective("all-reduce", ("data",), 2, 10**9, 1, "f32")
    assert network_seconds([inside], where, mesh, devices) == pytest.approx(0.75e9 / 100e9)
    assert network_seconds([across], where, mesh, devices) > 1e9 / where.chip.network


# Arithmetic, tables, sweep


def test_a_gpu_slice_is_planned_by_arithmetic():
    found = estimate(config(), H100)
    weights, optimizer, _ = argument_bytes(found.step)
    assert found.memory.weights == weights and found.memory.fits
    assert optimizer == pytest.approx(2 * weights, rel=0.01)
    assert 0 < found.roofline.mfu < 1
    wide = estimate(config(model=tiny.config(hidden_size=64)), H100)
    assert wide.memory.total > found.memory.total and wide.flops > found.flops


def test_scores_of_whole_rows_are_planned_for_gpus_unless_a_kernel_does_without():
    """rows x heads x T^2 in float32, twice, on each device; of all layers without remat."""

    def planned(attention, remat):
        compute = ComputeConfig(remat=remat, attention=attention)
        return estimate(config(data=DataConfig(row_length=512), compute=compute), H100)

    model = tiny.config()
    scores = 2 * model.num_heads // 2 * 512**2  # 8 rows over data x fsdp, heads over tensor
    for remat, copies in (("full", 8), ("matmuls", 8), ("none", 8 + 6 * model.num_layers)):
        plain, kernel = planned("auto", remat), planned("flash", remat)
        assert plain.memory.temporary - kernel.memory.temporary == copies * scores
        assert plain.traffic > kernel.traffic


def test_a_scoring_step_is_planned_without_an_optimiser():
    c = config(objective=ObjectiveConfig(name="judge"), data=DataConfig(row_length=64))
    found = estimate(c, H100, "score")
    assert found.step.rows == 16384 // 64 * 4
    assert found.memory.optimizer == 0


def test_the_table_of_shardings_names_every_array_of_256_chips():
    where = parse_topology("v6e:16x16")
    c = config(
        model=tiny.config(hidden_size=64, num_heads=8, num_kv_heads=4, vocab_size=128),
        mesh=MeshConfig(data=2, fsdp=32, tensor=4),
        train=TrainConfig(batch_rows=64),
    )
    mesh = abstract_mesh(c, where)
    with jax.sharding.use_abstract_mesh(mesh):
        rows = sharding_table(abstract_step(c, mesh))
    table = {(row.kind, row.name): row for row in rows}
    q = table["weight", "stacks.0.q"]
    assert (q.shape, q.spec) == ((2, 64, 8, 8), "-, fsdp, tensor, -")
    assert q.bytes == 4 * 2 * 64 * 8 * 8 // (32 * 4)
    moments = [row for row in rows if row.kind == "optimiser" and row.name.endswith("stacks.0.q")]
    assert [(row.spec, row.bytes) for row in moments] == [(q.spec, q.bytes)] * 2
    hidden = [r for r in rows if r.kind == "activation" and r.shape == (64, 64, 64)]
    assert {row.spec for row in hidden} == {"data+fsdp, -, -"}
    assert not [row.name for row in rows if "lambda" in row.name or row.name[0].isdecimal()]
    assert {row.kind for row in rows} == {"weight", "optimiser", "row", "activation"}


def test_a_sweep_ranks_what_fits_and_says_how_to_set_it(capsys):
    c = config(mesh=MeshConfig(), train=TrainConfig(batch_rows=8))
    ranked = sweep(c, H100, "train", 4, Console(width=140))
    times = [plan.roofline.seconds_per_token for plan in ranked]
    assert len(ranked) == 4 and times == sorted(times)
    winner = ranked[0].step.config
    assert "best: " + " ".join(overrides(c, winner)) in capsys.readouterr().out.replace("\n", " ")
    assert math.prod((winner.mesh.data, winner.mesh.fsdp, winner.mesh.tensor)) == 8


def test_a_config_without_a_shape_is_said():
    with pytest.raises(UserError, match="NOWHERE"):
        with_model(Config(init_from="NOWHERE"))
    shaped = Config(init_from="NOWHERE", model=tiny.config())
    assert with_model(shaped) is shaped


# The command


def run_plan(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "gram_jax.plan", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def test_the_command_prints_a_plan_and_fails_where_it_does_not_fit(tmp_path):
    file = tmp_path / "plan.json"
    done = run_plan(
        "--config=configs/llama3_8b_pretrain.py", "--topology=h100:1", f"--json={file}",
        "--config.train.accumulate=64",
    )  # fmt: skip
    values = json.loads(file.read_text())
    assert done.returncode == 1, done.stderr
    assert "arithmetic alone" in done.stdout and "too much" in done.stderr
    assert not values["fits"] and values["memory"]["missing"] > 0
    assert values["memory"]["weights"] == 4 * 8_030_261_248


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed (pip install -e '.[plan]')",
)
def test_a_step_is_compiled_for_a_slice_of_tpus(tmp_path):
    file = tmp_path / "plan.json"
    done = run_plan(
        "--config=configs/tiny_pretrain.py", "--topology=v5e:2x4", f"--json={file}",
        "--config.mesh.fsdp=4", "--config.mesh.data=2", "--config.train.batch_rows=16",
    )  # fmt: skip
    values = json.loads(file.read_text())
    assert done.returncode == 0, done.stderr
    assert "Compiled, not measured" in done.stdout
    assert {c["kind"] for c in values["collectives"]} >= {"all-gather", "all-reduce"}
    assert values["flops"] >= values["model_flops"] > 0


def test_without_the_compiler_it_says_what_to_install():
    if importlib.util.find_spec("libtpu") is not None:
        pytest.skip("libtpu is installed")
    done = run_plan("--config=configs/tiny_pretrain.py", "--topology=v5e:2x4")
    assert done.returncode == 2 and "'.[plan]'" in done.stderr


def test_a_slice_knows_its_devices():
    tpu7x = parse_topology("tpu7x:2x2x1")
    assert isinstance(tpu7x, Slice) and tpu7x.device_memory == tpu7x.chip.memory / 2

"""Splash attention over a row compiles for real TPUs, where their compiler is installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import functools
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from gram_jax.config import MeshConfig
from gram_jax.mesh import activation_spec, make_mesh
from gram_jax.models.attention_tpu import splash_attention, splash_view

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices

def array(shape, dtype, dims):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, activation_spec(dims)))

def gradients(has_branches, q, k, v, *row):
    def total(q, k, v):
        segments, branches, positions = row
        view = splash_view(segments, branches if has_branches else None, positions)
        out = splash_attention(q, k, v, view)
        return out.astype(jnp.float32).sum()
    return jax.grad(total, argnums=(0, 1, 2))(q, k, v)

for width, context in ((64, 1), (128, 1), (128, 2)):
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=2, context=context), devices)
    q = array((16, 2048, 16, width), jnp.bfloat16, "BTHE")
    kv = array((16, 2048, 4, width), jnp.bfloat16, "BTKE")
    ids = array((16, 2048), jnp.int32, "BS")
    for has_branches in (False, True):
        with jax.set_mesh(mesh):
            function = jax.jit(functools.partial(gradients, has_branches))
            function.lower(q, kv, kv, ids, ids, ids).compile()
        print("compiled", width, context, has_branches)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed (pip install libtpu)",
)
def test_splash_compiles_for_a_mesh_of_sixteen_tpus():
    setting = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "JAX_PLATFORMS": "cpu",
    }
    # In a process of its own: the compiler, once loaded, is seen by every other test.
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=os.environ | setting,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("compiled") == 6, done.stderr

"""Plans a run on a pod that is not here: does it fit, what bounds it, how long will it take.

  python -m gram_jax.plan --config=configs/llama3_8b_pretrain.py --topology=v5p:4x4x4

The real training step (--step=score: the scoring step) is compiled for that slice of TPUs, with
libtpu's compiler: pip install -c constraints.txt -e '.[plan]'; no TPU is needed. Printed are the
memory of a device, FLOPs, what the devices exchange, and the least time of a step by the published
figures of the chips (gram_jax/chips.py). Compiled, not measured. Exit status 1: it does not fit.

More examples:

  # A GPU slice, by arithmetic alone; long rows want attention that holds no scores
  python -m gram_jax.plan --config=configs/llama3_8b_pretrain.py --topology=h100:64 \\
      --config.compute.attention=flash
  # Every weight, optimiser state and activation: its shape and how it is split
  python -m gram_jax.plan --config=configs/llama3_8b_pretrain.py --topology=v5p:4x4x4 --shardings
  # Which mesh, batch and remat are best there
  python -m gram_jax.plan --config=configs/llama3_8b_pretrain.py --topology=v5p:4x4x4 --sweep
  # Two slices of 256 chips, joined by the slower network, and the numbers as JSON
  python -m gram_jax.plan --config=configs/llama3_8b_pretrain.py --topology='2*v6e:16x16' \\
      --config.mesh.data=2 --json=plan.json

Topologies: v5e, v5p, v6e, tpu7x with the slice's shape in chips; a100, h100, h200 with a number.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from gram_jax import entry
from gram_jax.abstract_step import STEPS, abstract_step, with_model
from gram_jax.arithmetic import abstract_mesh, estimate
from gram_jax.chips import Slice, parse_topology
from gram_jax.config import Config
from gram_jax.config_rules import validate
from gram_jax.errors import UserError
from gram_jax.plan_report import Plan, console, gib, print_plan, print_shardings, to_json
from gram_jax.plan_sweep import sweep
from gram_jax.planning import compile_step, prepare_compiler
from gram_jax.sharding_table import sharding_table

_CONFIG = entry.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Slice to plan for, as in v5p:4x4x4 or h100:64.", required=True
)
_STEP = flags.DEFINE_enum("step", "train", list(STEPS), "Which step: of training, or of scoring.")
_TOKENS = flags.DEFINE_float("tokens", 15e9, "Tokens whose time is printed.", lower_bound=1)
_SHARDINGS = flags.DEFINE_bool("shardings", False, "Print how every array is split, and stop.")
_SWEEP = flags.DEFINE_bool(
    "sweep", False, "Try meshes, batches and remat policies, and rank those that fit."
)
_SWEEP_COMPILES = flags.DEFINE_integer(
    "sweep_compiles", 6, "Of the sweep, so many are compiled: the best by arithmetic.",
    lower_bound=1,
)  # fmt: skip
_JSON = flags.DEFINE_string("json", None, "File to write the numbers to.")


def main(_: list[str]) -> None:
    where = parse_topology(_TOPOLOGY.value)
    config: Config = _CONFIG.value
    validate(config)
    config = with_model(config)
    if _SHARDINGS.value:
        mesh = abstract_mesh(config, where)
        with jax.sharding.use_abstract_mesh(mesh):
            step = abstract_step(config, mesh, _STEP.value)
            print_shardings(sharding_table(step), step, mesh, console())
        return
    if where.chip.platform == "tpu":
        prepare_compiler(where)
    if _SWEEP.value:
        found = sweep(config, where, _STEP.value, _SWEEP_COMPILES.value, console())
        _write([to_json(plan, where, _TOKENS.value) for plan in found])
        return
    plan = _plan(config, where)
    print_plan(plan, where, _TOKENS.value, console())
    _write(to_json(plan, where, _TOKENS.value))
    if not plan.memory.fits:
        print(f"does not fit {where.name}: {gib(plan.memory.missing)} too much", file=sys.stderr)
        sys.exit(1)


def _plan(config: Config, where: Slice) -> Plan:
    if where.chip.platform == "tpu":
        return compile_step(config, where, _STEP.value)
    return estimate(config, where, _STEP.value)


def _write(values: Any) -> None:
    if _JSON.value is None:
        return
    try:
        Path(_JSON.value).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json={_JSON.value}: {error.strerror}") from None


if __name__ == "__main__":
    entry.run(main, one_process=True)

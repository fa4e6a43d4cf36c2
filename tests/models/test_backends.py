"""Every backend of this machine computes a row's hidden states as the reference does."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from gram_jax.config import ComputeConfig
from gram_jax.errors import UserError
from gram_jax.models.backends import attention_of
from gram_jax.packing import pack
from gram_jax.rows import RowShape, stack_rows
from gram_jax.text_packing import pack_texts

SHAPE = RowShape(80, 80, 8, 4)
TEXT = RowShape(80, 80)
WINDOWS = pytest.mark.parametrize("windows", [(), (7, 0)], ids=["full", "windows"])


def hidden(batch, name, windows):
    """Of places that hold a token."""
    compute = ComputeConfig(dtype="float32", attention=name)
    config = tiny.config(num_layers=2, windows=windows)
    found = jax.jit(lambda model, batch: model(batch))(tiny.decoder(config, compute), batch)
    return np.asarray(found)[batch.segment_ids != 0]


def check(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())


@WINDOWS
def test_blocks_are_the_reference(windows):
    batch = stack_rows([row.batch for row in pack(tiny.preferences(0, 12), SHAPE)])
    check(hidden(batch, "blocks", windows), hidden(batch, "xla", windows))


def test_the_kernel_for_gpus_does_not_split_rows():
    batch = stack_rows([row.batch for row in pack(tiny.preferences(0, 12), SHAPE)])
    with jax.set_mesh(tiny.mesh(1, 1, 1, 2)), pytest.raises(UserError, match="attention=flash"):
        attention_of(batch, "flash")


@WINDOWS
@pytest.mark.parametrize("name", ["xla", "blocks"])
def test_text_needs_no_branches(name, windows):
    batch = stack_rows([row.batch for row in pack_texts(tiny.text_examples(0, 30), TEXT)])
    without = dataclasses.replace(batch, branch_ids=None)
    check(hidden(without, name, windows), hidden(batch, "xla", windows))

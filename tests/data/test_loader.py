"""Every epoch has every row once, in an order of its own; a device gets its own rows alone."""

import jax
import numpy as np
import pytest
import tiny

from gram_jax.data.loader import RowOrder, device_batch
from gram_jax.data.rowset import Rows
from gram_jax.errors import UserError
from gram_jax.packing import pack
from gram_jax.rows import RowShape

SHAPE = RowShape(48, 32, 6, 4)
N = 37


@pytest.fixture(scope="module")
def packed():
    return list(pack(tiny.preferences(0, 60, reference=True), SHAPE))


@pytest.fixture(scope="module")
def rows(packed, tmp_path_factory):
    return tiny.rows(tmp_path_factory.mktemp("rows"), packed, SHAPE)


def test_every_epoch_visits_every_row_once_in_a_new_order():
    order = RowOrder([N], seed=0)
    epochs = [order.numbers(epoch * N, N).tolist() for epoch in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(N))
        assert epoch != list(range(N))
    assert len(set(map(tuple, epochs))) == 4


def test_the_order_depends_on_the_seed_and_on_nothing_else():
    first, again, other = (RowOrder([N], seed).numbers(0, 3 * N) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.8


def test_any_position_can_be_read_without_those_before_it():
    whole = RowOrder([N], seed=2).numbers(0, 3 * N)
    for start in (0, 5, N - 2, N, 2 * N + 3):
        np.testing.assert_array_equal(
            RowOrder([N], seed=2).numbers(start, 7), whole[start : start + 7]
        )


def test_several_sources_are_shuffled_together():
    order = RowOrder([20, 17], seed=3)
    np.testing.assert_array_equal(order.numbers(0, 100), RowOrder([N], seed=3).numbers(0, 100))


def test_a_mixture_has_its_shares_and_epochs_of_each_source():
    sizes, weights = [12, 30], [1.0, 3.0]
    numbers = RowOrder(sizes, 0, weights).numbers(0, 4 * 60)
    first, second = numbers[numbers < 12], numbers[numbers >= 12]
    assert (len(first), len(second)) == (60, 180)
    for begin in range(0, 240 - 8, 8):  # and of every stretch
        assert 1 <= (numbers[begin : begin + 8] < 12).sum() <= 3
    for source, size, start in ((first, 12, 0), (second, 30, 12)):
        epochs = source[: len(source) // size * size].reshape(-1, size)
        assert len(set(map(tuple, epochs.tolist()))) == len(epochs)
        for epoch in epochs:
            assert sorted(epoch) == list(range(start, start + size))
    for at in (0, 7, 111):
        np.testing.assert_array_equal(
            RowOrder(sizes, 0, weights).numbers(at, 5), numbers[at : at + 5]
        )


def test_sources_of_one_size_have_orders_of_their_own():
    numbers = RowOrder([30, 30], 0, [1.0, 1.0]).numbers(0, 60)
    a, b = numbers[numbers < 30], numbers[numbers >= 30] - 30
    assert (a != b).mean() > 0.8


def test_rows_of_several_folders_have_one_count(packed, tmp_path):
    sets = [tiny.row_set(tmp_path / "a", packed[:5], SHAPE, 1),
            tiny.row_set(tmp_path / "b", packed[5:], SHAPE, 3)]  # fmt: skip
    both = Rows(sets)
    numbers = np.array([[6, 0], [4, 5]])
    read = both.read(numbers)
    assert len(both) == len(packed)
    assert read.tokens.shape == (2, 2, SHAPE.tokens)
    for at, number in np.ndenumerate(numbers):
        np.testing.assert_array_equal(read.tokens[at], packed[number].batch.tokens)


def test_rows_with_and_without_reference_log_probs_do_not_mix(packed, tmp_path):
    plain = list(pack(tiny.preferences(0, 9), SHAPE))
    sets = [tiny.row_set(tmp_path / "a", packed, SHAPE), tiny.row_set(tmp_path / "b", plain, SHAPE)]
    with pytest.raises(UserError, match="different fields"):
        Rows(sets)


def test_rows_are_read_by_number(rows, packed):
    numbers = np.array([3, 0, 3])
    read = rows.read(numbers)
    for place, number in enumerate(numbers):
        jax.tree.map(
            lambda ours, theirs, place=place: np.testing.assert_array_equal(ours[place], theirs),
            read,
            packed[number].batch,
        )
    assert len(rows) == len(packed)


def test_the_row_of_padding_weighs_nothing(rows):
    row = rows.read(np.array([rows.padding]))
    assert rows.padding == len(rows)
    for name in ("tokens", "segment_ids", "weights", "sequence_ids", "pair_weight", "pair_a"):
        assert not getattr(row, name).any(), name
    assert row.reference.shape == (1, SHAPE.sequences)


def test_the_mean_context_and_targets_are_those_of_the_rows(rows, packed):
    positions = [p.batch.positions[p.batch.segment_ids != 0] for p in packed]
    assert rows.context() == pytest.approx(2 * (np.concatenate(positions) + 1).mean())
    live = sum((p.batch.weights != 0).sum() for p in packed)
    assert rows.targets_per_token(()) == pytest.approx(live / sum(map(len, positions)))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_batch_on_a_mesh_is_the_rows_that_were_asked_for(rows, sizes, parts):
    mesh = tiny.mesh(*sizes)
    numbers = np.random.default_rng(0).permutation(len(rows))[:16]
    batch = device_batch(rows, numbers, parts, mesh)
    expected = rows.read(numbers.reshape(parts, -1))
    assert len(jax.tree.leaves(batch)) == 14
    for ours, theirs in zip(jax.tree.leaves(batch), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)
        assert ours.dtype == theirs.dtype
        assert ours.sharding.mesh == mesh
        assert ours.sharding.spec == jax.P(None, ("data", "fsdp"))
        shares = sizes[0] * sizes[1]
        assert {s.data.shape[1] for s in ours.addressable_shards} == {16 // parts // shares}


class WatchedRows(Rows):
    """Remembers which rows were read."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked = []

    def read(self, numbers):
        self.asked.append(np.asarray(numbers).ravel().tolist())
        return super().read(numbers)


@pytest.mark.parametrize(("sizes", "shares"), [((2, 2, 2), 4), ((8, 1, 1), 8), ((1, 1, 1), 1)])
def test_each_share_of_the_rows_is_read_once_and_nothing_more(rows, sizes, shares):
    watched = WatchedRows(rows.sets)
    device_batch(watched, np.arange(8), 1, tiny.mesh(*sizes))
    asked = [numbers for numbers in watched.asked if numbers]
    assert sorted(asked) == np.arange(8).reshape(shares, -1).tolist()

"""The primitive equals the plain computation, never holds all logits, and talks once per pass."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gram_jax.logprobs import (
    next_token_loss,
    next_token_sums,
    read_targets,
    reference_logprobs,
    target_logprobs,
    target_logprobs_and_logz,
)
from gram_jax.mesh import activation_spec, weight_spec

B, M, D, V = 8, 12, 32, 96
MESHES = [(2, 2, 2), (1, 4, 2), (8, 1, 1), (2, 1, 2, 2)]
CHUNKS = {"one at a time": 1, "does not divide": 5, "all at once": M, "chosen": 0}


@pytest.fixture(scope="module")
def arrays():
    """hidden, unembedding, targets, and weights of both outputs for a scalar to differentiate."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, M, D)).astype(np.float32)
    unembedding = rng.normal(size=(V, D)).astype(np.float32) * 0.5
    targets = rng.integers(0, V, (B, M)).astype(np.int32)
    targets[0, :2] = 0, V - 1
    return hidden, unembedding, targets, rng.normal(size=(2, B, M)).astype(np.float32)


def weighted(function, hidden, unembedding, targets, weights, **options):
    """A scalar that depends on both outputs, and the outputs."""
    logprob, logz = function(hidden, unembedding, targets, **options)
    return (weights[0] * logprob + weights[1] * logz).sum(), (logprob, logz)


def outputs_and_gradients(function, arrays, **options):
    run = functools.partial(weighted, function, **options)
    (_, out), gradients = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(*arrays)
    return {
        "logprob": out[0],
        "logz": out[1],
        "d_hidden": gradients[0],
        "d_unembedding": gradients[1],
    }


@pytest.fixture(scope="module")
def expected(arrays):
    return outputs_and_gradients(reference_logprobs, arrays)


def placed(arrays, mesh):
    hidden, unembedding, targets, weights = arrays
    specs = (activation_spec("BMD"), weight_spec("VD"), activation_spec("BM"))
    put = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip((hidden, unembedding, targets), specs, strict=True)
    ]
    return (*put, jax.device_put(weights, NamedSharding(mesh, activation_spec("xBM"))))


def check(found, expected, tolerance=1e-5):
    """Largest error relative to the largest entry."""
    for name, value in expected.items():
        size = np.abs(value).max()
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance * size, err_msg=name)


def test_the_reference_is_a_log_softmax(arrays, expected):
    hidden, unembedding, targets, _ = map(np.float64, arrays)
    logits = hidden @ unembedding.T
    logz = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, targets.astype(int)[..., None], -1)[..., 0]
    check({"logprob": picked - logz, "logz": logz}, {k: expected[k] for k in ("logprob", "logz")})


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
def test_values_and_gradients_are_those_of_the_plain_way(arrays, expected, chunk):
    check(outputs_and_gradients(target_logprobs_and_logz, arrays, chunk=chunk), expected)


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_values_and_gradients_are_the_same_on_a_mesh(arrays, expected, sizes, chunk):
    mesh = tiny.mesh(*sizes)
    with jax.set_mesh(mesh):
        found = outputs_and_gradients(target_logprobs_and_logz, placed(arrays, mesh), chunk=chunk)
    check(found, expected)
    assert found["logprob"].sharding.spec == activation_spec("BM")
    wanted = NamedSharding(mesh, weight_spec("VD"))
    assert found["d_unembedding"].sharding.is_equivalent_to(wanted, 2)


@pytest.mark.parametrize("sizes", [None, *MESHES], ids=str)
def test_the_likeliest_tokens_are_known(arrays, sizes):
    hidden, unembedding, targets, weights = arrays
    best = (hidden @ unembedding.T).argmax(-1).astype(np.int32)
    mixed = np.where(np.arange(M) % 3 == 0, best, targets)
    read = jax.jit(lambda *arrays: read_targets(*arrays, chunk=5)[2])
    if sizes is None:
        found = read(hidden, unembedding, mixed)
    else:
        mesh = tiny.mesh(*sizes)
        with jax.set_mesh(mesh):
            found = read(*placed((hidden, unembedding, mixed, weights), mesh)[:3])
    np.testing.assert_array_equal(found, mixed == best)
    assert 0 < (mixed == best).sum() < mixed.size


def test_through_the_log_prob_alone_the_gradient_is_onehot_minus_softmax(arrays):
    hidden, unembedding, targets, _ = arrays
    gradient = jax.jit(jax.grad(lambda h: target_logprobs(h, unembedding, targets, chunk=5).sum()))
    logits = hidden.astype(np.float64) @ unembedding.T.astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    by_hand = (np.eye(V)[targets] - p) @ unembedding
    np.testing.assert_allclose(gradient(hidden), by_hand, rtol=0, atol=1e-5 * np.abs(by_hand).max())


def test_large_logits_stay_finite(arrays):
    hidden, unembedding, targets, weights = arrays
    found = outputs_and_gradients(
        target_logprobs_and_logz, (1e4 * hidden, unembedding, targets, weights), chunk=5
    )
    for name, value in found.items():
        assert np.isfinite(value).all(), name
    check(found, outputs_and_gradients(reference_logprobs, (1e4 * hidden, *arrays[1:])), 1e-4)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=str)
def test_bfloat16_differs_from_float32_by_its_rounding(arrays, expected, sizes):
    hidden, *rest = arrays
    half = (jnp.asarray(hidden, jnp.bfloat16), *rest)
    if sizes is None:
        found = outputs_and_gradients(target_logprobs_and_logz, half, chunk=5)
    else:
        mesh = tiny.mesh(*sizes)
        with jax.set_mesh(mesh):
            found = outputs_and_gradients(target_logprobs_and_logz, placed(half, mesh), chunk=5)
    assert found["logprob"].dtype == found["logz"].dtype == jnp.float32
    assert found["d_hidden"].dtype == jnp.bfloat16
    assert found["d_unembedding"].dtype == jnp.float32
    # bfloat16 keeps 8 bits: 2^-8 per factor, and sums of 32 products average it out.
    found = {name: np.asarray(value, np.float32) for name, value in found.items()}
    check(found, expected, tolerance=2**-7)


def loss_and_gradients(function, hidden, unembedding, targets, weights):
    """A loss times 3, so that its cotangent is not 1; and what it is without z."""
    run = jax.jit(
        jax.value_and_grad(
            lambda h, u: (3 * (out := function(h, u, targets, weights))[0], out[1]), (0, 1), True
        )
    )
    (total, nll), (d_hidden, d_unembedding) = run(hidden, unembedding)
    return {"total": total, "nll": nll, "d_hidden": d_hidden, "d_unembedding": d_unembedding}


@pytest.fixture(scope="module", params=[0.0, 1e-2], ids=["nll alone", "with z-loss"])
def losses(arrays, request):
    """z, the arrays with unused slots among them, and what the plain way makes of them."""
    hidden, unembedding, targets, weights = arrays
    weights = np.where(np.arange(M) % 5 == 3, 0.0, np.abs(weights[0])).astype(np.float32)
    arrays = (hidden, unembedding, targets, weights)

    def plain(h, u, t, w):
        return next_token_sums(*reference_logprobs(h, u, t), w, request.param)

    return request.param, arrays, loss_and_gradients(plain, *arrays)


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
def test_the_next_token_loss_and_its_gradient_are_those_of_the_plain_way(losses, chunk):
    z, (hidden, unembedding, targets, weights), expected = losses
    hidden = np.where((weights == 0)[..., None], np.nan, hidden)  # what is unused means nothing

    def fused(*arrays):
        return next_token_loss(*arrays, z_loss=z, chunk=chunk)

    check(loss_and_gradients(fused, hidden, unembedding, targets, weights), expected)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 4, 1)], ids=str)
def test_the_next_token_loss_is_the_same_on_a_mesh(losses, sizes):
    z, (hidden, unembedding, targets, weights), expected = losses
    mesh = tiny.mesh(*sizes)
    with jax.set_mesh(mesh):
        *arrays, _ = placed((hidden, unembedding, targets, np.zeros((2, B, M))), mesh)
        weights = jax.device_put(weights, NamedSharding(mesh, activation_spec("BM")))
        found = loss_and_gradients(
            functools.partial(next_token_loss, z_loss=z, chunk=5), *arrays, weights
        )
    check(found, expected)


# What is compiled, on sizes that occur nowhere else: M = 64 in chunks of 16, V = 480.
ROWS, TARGETS, CHUNK, WORDS = 8, 64, 16, 480


@functools.cache
def compiled(sizes=None, targets=TARGETS):
    """Forward and backward, compiled; and on what share of rows and words a device works."""

    def run():
        specs = (("BMD", (ROWS, targets, D)), ("VD", (WORDS, D)), ("BM", (ROWS, targets)))
        shapes = []
        for dims, shape in specs:
            spec = weight_spec(dims) if dims == "VD" else activation_spec(dims)
            sharding = NamedSharding(mesh, spec) if sizes else None
            dtype = jnp.int32 if dims == "BM" else jnp.float32
            shapes.append(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding))
        hidden, unembedding, ids = shapes

        def scalar(h, u, t):
            logprob, logz = target_logprobs_and_logz(h, u, t, chunk=CHUNK)
            return (logprob + 0.1 * logz**2).sum()

        return jax.jit(jax.value_and_grad(scalar, (0, 1))).lower(hidden, unembedding, ids).compile()

    if sizes is None:
        return run()
    mesh = tiny.mesh(*sizes)
    with jax.set_mesh(mesh):
        return run()


def shapes_in(hlo):
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\[(\d[\d,]*)\]", hlo)}


def words_of(sizes):
    return WORDS // sizes[2] if sizes else WORDS


@pytest.mark.parametrize("sizes", [None, *MESHES], ids=str)
def test_logits_of_more_than_a_chunk_never_exist(sizes):
    rows = ROWS // (sizes[0] * sizes[1]) if sizes else ROWS
    targets = TARGETS // (sizes[3] if sizes and len(sizes) > 3 else 1)
    shapes = shapes_in(compiled(sizes).as_text())
    words = words_of(sizes)
    largest = max(np.prod(shape) for shape in shapes if words in shape and D not in shape)
    assert largest == rows * CHUNK * words
    assert all(np.prod(shape) < rows * targets * words for shape in shapes)


def computations(hlo):
    """{name: lines} of the computations of an HLO module."""
    found, name = {}, None
    for line in hlo.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" "):
            name, found[head[1]] = head[1], []
        elif name and line.startswith(" "):
            found[name].append(line.strip())
    return found


def reached(found, name):
    """A computation's lines and those of all that it calls."""
    lines = list(found[name])
    for line in found[name]:
        for called in re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line):
            lines += reached(found, called)
    return lines


COLLECTIVE = re.compile(
    r" = (.*) (all-reduce|all-gather|reduce-scatter|all-to-all|\S*permute)\S*\("
)


def collectives(lines):
    """(kind, shape) of each array that lines exchange between devices."""
    for line in lines:
        match = COLLECTIVE.search(line)
        for shape in shapes_in(match[1]) if match else ():
            yield match[2], shape


def exchanged_in_loops(hlo):
    """What each loop that multiplies matrices exchanges between devices, loop by loop."""
    found = computations(hlo)
    lines = "\n".join(line for body in found.values() for line in body)
    loops = {name: reached(found, name) for name in re.findall(r"body=%?([\w.\-]+)", lines)}
    return [list(collectives(body)) for body in loops.values() if any("dot" in x for x in body)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_nothing_is_exchanged_inside_the_loop_over_chunks(sizes):
    assert exchanged_in_loops(compiled(sizes).as_text()) == [[], []]  # forward and backward


def test_an_exchange_inside_a_loop_would_be_seen():
    def loop(x, w):
        def step(total, part):
            return total + jax.lax.psum(part @ w, "data"), None

        return jax.lax.scan(step, jnp.zeros((4, D)), x)[0]

    mesh = tiny.mesh(8, 1, 1)
    with jax.set_mesh(mesh):
        shapes = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
            for shape, spec in (((6, 32, D), P(None, "data")), ((D, D), P()))
        ]
        local = jax.shard_map(loop, in_specs=(P(None, "data"), P()), out_specs=P())
        hlo = jax.jit(local).lower(*shapes).compile().as_text()
    assert exchanged_in_loops(hlo) == [[("all-reduce", (4, D))]]


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2)], ids=str)
def test_the_vocabulary_is_never_gathered(sizes):
    found = computations(compiled(sizes).as_text())
    exchanged = list(collectives(line for lines in found.values() for line in lines))
    assert any(kind == "all-gather" for kind, _ in exchanged)  # of D, once per pass
    for kind, shape in exchanged:
        assert WORDS not in shape, kind
        # What is sent is a share of the unembedding, or one number per target.
        assert np.prod(shape) <= max(words_of(sizes) * D, ROWS * TARGETS * D), kind


def test_memory_does_not_grow_with_targets_times_vocabulary():
    few, many = (
        compiled(targets=n).memory_analysis().temp_size_in_bytes for n in (TARGETS, 8 * TARGETS)
    )
    added = 7 * TARGETS * ROWS
    # Hidden states and their gradients may be copied; one array of logits would be 4 V each.
    assert many - few < added * 4 * (4 * D)
    assert few > ROWS * CHUNK * WORDS * 4

"""What a request takes of memory while it waits, and how long it is told to wait."""

import tracemalloc

import numpy as np

from gram_jax.encoding import Cut, Encoded
from gram_jax.scorer import Question
from gram_jax.scoring import batch_shapes
from gram_jax.serving.batching import Batcher, Work

PROMPT, RESPONSES, QUESTIONS = 8000, 128, 20


def test_a_long_prompt_is_not_copied_for_each_of_its_responses():
    dice = np.random.default_rng(0)
    encoded = []
    for _ in range(QUESTIONS):
        prompt = dice.integers(0, 400, PROMPT, np.int32)
        sequences = [(prompt, np.array([i, 1], np.int32)) for i in range(RESPONSES)]
        encoded.append(Encoded(sequences, (2,) * RESPONSES, Cut(0, (0,) * RESPONSES)))
    usual = batch_shapes(8192, 1, "likelihood", None)[-1]
    tracemalloc.start()
    try:
        work = Work(encoded, usual, lambda error: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(work.sequences) == QUESTIONS * RESPONSES
    copied = QUESTIONS * RESPONSES * PROMPT * 4
    assert peak < copied / 20


def test_equal_sequences_of_different_arrays_are_computed_once():
    prompts = [np.arange(40, dtype=np.int32) for _ in range(3)]
    response = np.array([5, 6, 7], np.int32)
    encoded = [Encoded([(prompt, response)], (3,), Cut(0, (0,))) for prompt in prompts]
    work = Work(encoded, batch_shapes(256, 1, "likelihood", None)[-1], lambda error: None)
    assert len(work.sequences) == work.missing == 1


def test_what_was_dropped_says_nothing_of_the_speed(make_scorer):
    scorer = make_scorer(batch_rows=1)
    batcher, told = Batcher(scorer), []
    speeds = []
    for is_dropped in (False, True):
        work = Work([scorer.encode(Question("a", ["b"]))], scorer.shapes[-1], told.append)
        batcher.add(work)
        if is_dropped:
            batcher.drop(work)
        batcher._compute()
        speeds.append(batcher._speed)
    assert told == [None]
    assert speeds[0] == speeds[1] > 0

"""No token of a text is lost or predicted twice; what is cut is cut by rule, and counted."""

import numpy as np
import peer_models
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from gram_jax.config import DataConfig
from gram_jax.data.examples import Layout, encode_rows, group_records, row_shape
from gram_jax.data.sources import PreferenceRow, ResponsesRow, TextRow, UnpairedRow
from gram_jax.data.token_records import ExampleCounts
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import DataError
from gram_jax.packing import pack
from gram_jax.pair import Pair

BOS, EOS, V = 1, 2, 96
bounded = settings(deadline=None, max_examples=60)
texts = st.lists(st.lists(st.integers(3, V - 1), min_size=1, max_size=30), min_size=1, max_size=8)


def word_tokenizer(bos):
    """One word per id; with ``bos`` a prompt starts with <s>, as its post-processor says."""
    base = peer_models.tokenizer()
    if not bos:
        return base
    words = {f"w{i}": i for i in range(3, V)} | {"<pad>": 0, "<s>": BOS, "</s>": EOS}
    backend = tokenizers.Tokenizer(models.WordLevel(words, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return Tokenizer(backend.to_str(), base.special_tokens, None, "the test's tokenizer")


WITH_BOS, WITHOUT_BOS = word_tokenizer(True), word_tokenizer(False)

TEXT, LIKELIHOOD = Layout("text", True), Layout("likelihood", True)


def preference(prompt, chosen, rejected, reference=None, line=1):
    fields = ("chosen", "rejected")
    return PreferenceRow(prompt, (chosen, rejected), (Pair(0, 1),), fields, "", reference, line)


def words(ids):
    return " ".join(f"w{i}" for i in ids)


def examples(rows, format, tokenizer, counts, **options):
    """The examples of rows, all in one shard, in the order of their rows."""
    config = DataConfig(**options)
    records = []
    layout = TEXT if format in ("text", "responses") else LIKELIHOOD
    for found in encode_rows(rows, config, layout, tokenizer, counts, file="f.jsonl", document="0"):
        if isinstance(found, DataError):
            raise found
        records += found
    counts.rows = len(rows)
    return list(group_records(records, format, counts))


def of_text(documents, tokenizer, **options):
    counts = ExampleCounts()
    rows = [TextRow(words(d), "", i) for i, d in enumerate(documents, start=1)]
    return examples(rows, "text", tokenizer, counts, **{"row_length": 16} | options), counts


def test_the_two_tokenizers_differ_in_bos():
    assert WITH_BOS.encode_prompt("w5") == [BOS, 5]
    assert WITHOUT_BOS.encode_prompt("w5") == [5]


@bounded
@given(texts, st.booleans(), st.booleans(), st.sampled_from([0, 5]))
def test_every_token_of_a_text_is_predicted_once(documents, bos, add_eos, row_targets):
    tokenizer = WITH_BOS if bos else WITHOUT_BOS
    options = {"add_eos": add_eos, "row_targets": row_targets}
    found, counts = of_text(documents, tokenizer, **options)
    examples = iter(found)
    longest, split, lost = row_targets or 16, 0, 0
    for document in documents:
        whole = [BOS] * bos + document + [EOS] * add_eos
        # Without BOS, the first token is what the rest is predicted from.
        remaining, before = whole[1:], whole[:1]
        split += len(remaining) > longest
        lost += not remaining
        while remaining:
            example = next(examples)
            (response,) = example.responses
            assert example.prompt.tolist() == before[-1:]
            assert response.tolist() == remaining[:longest]
            before, remaining = response.tolist(), remaining[longest:]
    assert next(examples, None) is None
    assert counts.rows == len(documents)
    assert counts.examples == len(found)
    assert counts.split_documents == split
    assert counts.tokens == sum(len(d) + bos + add_eos for d in documents)
    assert counts.dropped_rows == lost
    assert [example.key for example in found] == list(range(len(found)))


@bounded
@given(texts)
def test_texts_go_into_rows_whole(documents):
    found, _ = of_text(documents, WITH_BOS)
    rows = list(pack(found, row_shape(DataConfig(row_length=16), TEXT)))
    targets = np.concatenate([row.batch.targets[row.batch.weights != 0] for row in rows])
    wanted = [token for document in documents for token in [*document, EOS]]
    assert sorted(targets) == sorted(wanted)


def preferences(rows, **options):
    """Examples of (prompt, chosen, rejected[, reference]) given as lists of ids."""
    counts = ExampleCounts()
    read = [
        preference(words(p), words(c), words(r), rest[0] if rest else None, i)
        for i, (p, c, r, *rest) in enumerate(rows, start=1)
    ]
    options = {"row_length": 24, "row_targets": 16} | options
    return examples(read, "preferences", WITH_BOS, counts, **options), counts


def test_a_prompt_has_bos_and_a_response_has_eos():
    (example,), counts = preferences([([5, 6], [7], [8, 9])])
    assert example.prompt.tolist() == [BOS, 5, 6]
    assert [r.tolist() for r in example.responses] == [[7, EOS], [8, 9, EOS]]
    assert example.pairs == (Pair(0, 1, target=1.0),)
    assert example.reference is None
    assert (counts.rows, counts.examples, counts.tokens) == (1, 1, 3 + 2 + 3)
    (bare,), _ = preferences([([5, 6], [7], [8, 9])], add_eos=False)
    assert [r.tolist() for r in bare.responses] == [[7], [8, 9]]


def test_rows_of_one_prompt_become_one_example_and_share_responses():
    rows = [
        ([5], [10], [11], (-1.0, -2.0)),
        ([6], [10], [11], (-5.0, -6.0)),
        ([5], [10], [12], (-1.0, -3.0)),
        ([5], [12], [11], (-3.0, -2.0)),
        ([5], [12], [11], (-3.0, -2.0)),
    ]
    (one, other), counts = preferences(rows)
    assert [r.tolist() for r in one.responses] == [[10, EOS], [11, EOS], [12, EOS]]
    assert one.pairs == (Pair(0, 1), Pair(0, 2), Pair(2, 1), Pair(2, 1))
    assert one.reference == (-1.0, -2.0, -3.0)
    assert other.reference == (-5.0, -6.0)
    assert (one.key, other.key) == (0, 1)
    assert counts.rows == 5
    assert counts.examples == 2
    assert counts.shared_responses == 5
    assert counts.repeated_pairs == 1
    assert counts.text() == ("rows 5, examples 2, tokens 30, shared responses 5, repeated pairs 1")


def test_a_long_prompt_keeps_bos_and_its_end():
    prompt = list(range(10, 40))
    (example,), counts = preferences([(prompt, [5], [6])], max_prompt=8)
    assert example.prompt.tolist() == [BOS, *prompt[-7:]]
    assert (counts.cut_prompts, counts.cut_tokens, counts.cut_responses) == (1, 31 - 8, 0)
    (example,), counts = preferences([(prompt, [5], [6])])
    assert len(example.prompt) == 12  # half of a row


@pytest.mark.parametrize(
    ("lengths", "kept", "cut"),
    [
        ((7, 7), (8, 8), 0),  # 8 + 8 with EOS: just fits
        ((20, 3), (12, 4), 1),  # the longer one gives way
        ((3, 20), (4, 12), 1),
        ((20, 20), (8, 8), 2),
        ((20, 8), (8, 8), 2),
        ((8, 7), (8, 8), 1),
    ],
)
def test_two_responses_that_do_not_fit_are_cut_at_their_ends(lengths, kept, cut):
    chosen, rejected = (list(range(10, 10 + n)) for n in lengths)
    rejected[0] = 50
    (example,), counts = preferences([([5], chosen, rejected)])
    whole = ([*chosen, EOS], [*rejected, EOS])
    found = [r.tolist() for r in example.responses]
    assert found == [w[:k] for w, k in zip(whole, kept, strict=True)]
    assert counts.cut_responses == cut == sum(r[-1] != EOS for r in found)
    assert counts.cut_tokens == sum(lengths) + 2 - sum(kept)


lists = st.lists(st.integers(3, V - 1), min_size=1, max_size=40)


@bounded
@given(st.lists(st.tuples(lists, lists, lists), min_size=1, max_size=8))
def test_whatever_is_cut_fits_a_row_with_all_its_pairs(rows):
    config = DataConfig(row_length=24, row_targets=16, row_sequences=4, row_pairs=2)
    found, counts = preferences(rows, row_sequences=4, row_pairs=2)
    live = len(rows) - counts.dropped_pairs
    assert sum(len(example.pairs) for example in found) == live
    packed = list(pack(found, row_shape(config, LIKELIHOOD)))
    assert sum((row.batch.pair_weight != 0).sum() for row in packed) == live
    before = sum(1 + len(p) + len(c) + len(r) + 2 for p, c, r in rows)
    assert counts.tokens == before


def test_rows_have_sequences_and_pairs_for_preferences_only():
    config = DataConfig(row_length=64, row_targets=32, row_sequences=5, row_pairs=3)
    text, both = row_shape(config, TEXT), row_shape(config, LIKELIHOOD)
    assert (text.tokens, text.targets, text.sequences, text.pairs) == (64, 32, 0, 0)
    assert (both.tokens, both.targets, both.sequences, both.pairs) == (64, 32, 5, 3)
    default = row_shape(DataConfig(row_length=2048), LIKELIHOOD)
    assert (default.targets, default.sequences, default.pairs) == (2048, 128, 128)


def responses(rows, **options):
    """Examples of (prompt, [response, ...]) given as lists of ids."""
    counts = ExampleCounts()
    read = [
        ResponsesRow(words(p), tuple(map(words, rs)), i) for i, (p, rs) in enumerate(rows, start=1)
    ]
    return examples(read, "responses", WITH_BOS, counts, **{"row_length": 24} | options), counts


def test_responses_to_one_prompt_become_branches_of_one_example():
    rows = [([5], [[10], [11]]), ([6], [[12]]), ([5], [[10], [13]])]
    (one, other), counts = responses(rows)
    assert one.prompt.tolist() == [BOS, 5]
    # What the data has twice counts twice.
    assert [r.tolist() for r in one.responses] == [[10, EOS], [11, EOS], [10, EOS], [13, EOS]]
    assert [r.tolist() for r in other.responses] == [[12, EOS]]
    assert one.pairs == other.pairs == ()
    assert (counts.rows, counts.examples) == (3, 2)


def test_a_response_that_does_not_fit_is_cut_at_its_end():
    (example,), counts = responses([([5, 6], [list(range(10, 60)), [7]])])
    assert example.responses[0].tolist() == list(range(10, 32))  # 24 places, 2 of the prefix
    assert example.responses[1].tolist() == [7, EOS]
    assert (counts.cut_responses, counts.cut_tokens) == (1, 51 - 22)


def test_rows_that_are_too_long_are_left_out_if_so_wanted():
    long = list(range(10, 60))
    found, counts = responses([([5], [long]), ([6], [[7]])], too_long="drop")
    assert [e.prompt.tolist() for e in found] == [[BOS, 6]]
    assert (counts.dropped_rows, counts.cut_responses, counts.cut_tokens) == (1, 0, 0)
    found, counts = preferences([([5], long, [6]), ([6], [7], [8])], too_long="drop")
    assert (len(found), counts.dropped_rows, counts.cut_tokens) == (1, 1, 0)


def test_a_row_that_the_tokenizer_cannot_take_is_named_and_the_next_goes_on():
    read = [preference(p, "w6", "w7", None, i) for i, p in enumerate(("", "w5"), start=8)]
    bad, good = encode_rows(
        read, DataConfig(), LIKELIHOOD, WITHOUT_BOS, ExampleCounts(), file="f.jsonl", document="0"
    )
    assert isinstance(bad, DataError)
    assert (bad.file, bad.line, bad.field) == ("f.jsonl", 8, "prompt")
    assert good[0].prompt.tolist() == [5]


def test_records_of_one_prompt_or_document_have_one_key():
    def keys(rows):
        found = encode_rows(rows, DataConfig(row_length=8), LIKELIHOOD, WITH_BOS, ExampleCounts(),
                            file="f", document="3")  # fmt: skip
        return [[record.key for record in one] for one in found]

    (a, b, c) = keys([preference(p, "w6", "w7") for p in ("w5", "w8", "w5")])
    assert a == c != b
    first, second = keys([TextRow(words(range(3, 40)), "", line) for line in (1, 2)])
    assert len(set(first)) == len(set(second)) == 1 < len(first)
    assert first[0] != second[0]


def test_pairs_that_become_equal_when_cut_are_dropped_and_counted():
    same = list(range(10, 40))
    found, counts = preferences([([5], [*same, 50], [*same, 51]), ([5], [6], [7])])
    assert [len(example.pairs) for example in found] == [1]
    assert (counts.rows, counts.dropped_pairs) == (2, 1)


def test_reference_logprobs_of_texts_that_must_be_cut_are_refused():
    with pytest.raises(DataError, match="tokens must be cut"):
        preferences([([5], list(range(10, 50)), [6], (-1.0, -2.0))])


def unpaired(rows, **options):
    """Examples of (prompt, completion, label[, reference]) given as lists of ids."""
    counts = ExampleCounts()
    read = [
        UnpairedRow(words(p), words(c), good, rest[0] if rest else None, i)
        for i, (p, c, good, *rest) in enumerate(rows, start=1)
    ]
    return examples(read, "unpaired", WITH_BOS, counts, **{"row_length": 24} | options), counts


def test_labelled_responses_of_one_prompt_become_all_pairs_of_good_and_bad():
    rows = [
        ([5], [10], True, -1.0),
        ([6], [20], False, -5.0),
        ([5], [11], False, -2.0),
        ([5], [12], True, -3.0),
        ([5], [13], False, -4.0),
        ([7], [30], True, -6.0),
        ([6], [21], True, -7.0),
    ]
    (one, other), counts = unpaired(rows)
    assert [r.tolist() for r in one.responses] == [[10, EOS], [11, EOS], [12, EOS], [13, EOS]]
    assert one.pairs == tuple(Pair(a, b, weight=0.25) for a, b in ((0, 1), (0, 3), (2, 1), (2, 3)))
    assert one.reference == (-1.0, -2.0, -3.0, -4.0)
    assert other.pairs == (Pair(1, 0),)
    assert (counts.rows, counts.examples, counts.unpaired_left_out) == (7, 2, 1)


def test_a_response_labelled_good_and_bad_is_no_pair_with_itself():
    found, counts = unpaired([([5], [10], True), ([5], [10], False), ([5], [11], False)])
    assert [example.pairs for example in found] == [(Pair(0, 1),)]
    assert (counts.dropped_pairs, counts.unpaired_left_out) == (1, 0)


def test_any_two_labelled_responses_fit_a_row_beside_their_prompt():
    long = list(range(10, 60))
    (example,), counts = unpaired([([5, 6], long, True), ([5, 6], long[1:], False)])
    # 24 places, 2 of the prefix, and half of the rest.
    assert [r.tolist() for r in example.responses] == [long[:11], long[1:12]]
    assert (counts.cut_responses, counts.cut_tokens) == (2, 51 + 50 - 22)
    (row,) = pack([example], row_shape(DataConfig(row_length=24), LIKELIHOOD))
    assert int((row.batch.pair_weight != 0).sum()) == 1
    with pytest.raises(DataError, match="tokens must be cut"):
        unpaired([([5], long, True, -1.0)])
    with pytest.raises(DataError, match="completion") as caught:
        examples([UnpairedRow("w5", "", True, None, 4)], "unpaired", WITH_BOS, ExampleCounts())
    assert caught.value.line == 4


def test_ties_are_counted():
    counts = ExampleCounts()
    pairs = (Pair(0, 1, 0.5, 1 / 3), Pair(1, 2, 1.0, 1 / 3), Pair(0, 2, 0.5, 1 / 3))
    row = PreferenceRow("w5", ("w6", "w7", "w8"), pairs, ("a", "b", "c"), "", None, 1)
    (example,) = examples([row], "kway", WITH_BOS, counts, row_length=24)
    assert example.pairs == pairs
    assert counts.ties == 2

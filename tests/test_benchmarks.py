"""Benchmarks: records of each kind, and official sums against numbers worked out by hand."""

import math

import numpy as np
import pytest
from strength_judge import StrengthJudge

from gram_jax.benchmarks import BENCHMARKS, Row, answer, recognise
from gram_jax.benchmarks import rewardbench as rb
from gram_jax.benchmarks.rewardbench2 import best_of_four, ties_score
from gram_jax.errors import DataError
from gram_jax.scorer import Question, Verdict

PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}
REWARDBENCH = PAIR | {"subset": "math-prm", "chosen_model": "a", "rejected_model": "b", "id": 7}
REWARDBENCH2 = {
    "id": "3", "prompt": "q", "chosen": ["right"], "rejected": ["x", "y", "z"], "subset": "Math",
    "num_correct": 1, "total_completions": 4,
}  # fmt: skip
RMBENCH = {
    "id": "m1", "prompt": "q", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"],
    "domain": "math",
}  # fmt: skip
JUDGEBENCH = {
    "pair_id": "p", "source": "mmlu-pro-law", "question": "q", "response_A": "a",
    "response_B": "b", "label": "B>A",
}  # fmt: skip
LLMBAR = {"input": "q", "output_1": "a", "output_2": "b", "label": 2, "subset": "natural"}
HHH = {"input": "q", "targets": {"choices": ["a", "b"], "labels": [0, 1]}, "subset": "honest"}


def row(record, line=1, file="data.jsonl"):
    return Row(record, file, line)


def read(record, **place):
    return recognise(row(record, **place)).read(row(record, **place))


def verdict(rewards=None, forward=None, backward=None, n=2):
    def as_array(values):
        return None if values is None else np.array(values, dtype=np.float64)

    tokens = np.ones(n if rewards is None else len(rewards), dtype=np.int64)
    return Verdict(as_array(rewards), tokens, as_array(forward), as_array(backward), False)


def rated(record, rewards):
    """A likelihood's or a head's answer, by the rewards of the responses."""
    return answer(read(record), verdict(rewards), beta=1.0)


def judged(record, forward, backward):
    """A judge's answer, by z_A - z_B of each pair with the better shown first, and second."""
    return answer(read(record), verdict(None, forward, backward), beta=1.0)


def right(record, yes):
    """An answer to a pair that is right or wrong."""
    return rated(record, [1.0, 0.0] if yes else [0.0, 1.0])


def sums(benchmark, answers):
    return {one.name: one.value for one in BENCHMARKS[benchmark].official(answers).sums}


@pytest.mark.parametrize(
    ("record", "name", "subset", "responses", "pairs"),
    [
        (PAIR, "preferences", "", 2, [(0, 1)]),
        (PAIR | {"subset": "x", "source": "y"}, "preferences", "x", 2, [(0, 1)]),
        (REWARDBENCH, "rewardbench", "math-prm", 2, [(0, 1)]),
        (REWARDBENCH2, "rewardbench2", "Math", 4, [(0, 1), (0, 2), (0, 3)]),
        (RMBENCH, "rmbench", "math", 6, [(i, 3 + j) for i in range(3) for j in range(3)]),
        (JUDGEBENCH, "judgebench", "Knowledge", 2, [(1, 0)]),
        (JUDGEBENCH | {"label": "A>B"}, "judgebench", "Knowledge", 2, [(0, 1)]),
        (LLMBAR, "llmbar", "natural", 2, [(1, 0)]),
        (LLMBAR | {"label": "1"}, "llmbar", "natural", 2, [(0, 1)]),
        (PAIR | {"subset": "adversarial-gptinst", "source": "llmbar"}, "llmbar",
         "adversarial-gptinst", 2, [(0, 1)]),
        (HHH, "hhh", "honest", 2, [(1, 0)]),
        (PAIR | {"subset": "other", "source": "hhh"}, "hhh", "other", 2, [(0, 1)]),
    ],
)  # fmt: skip
def test_a_record_is_recognised_by_its_columns(record, name, subset, responses, pairs):
    item = read(record, line=5)
    assert (item.benchmark, item.subset) == (name, subset)
    assert len(item.responses) == responses
    assert list(item.pairs) == pairs
    assert (item.file, item.line) == ("data.jsonl", 5)
    for field, value in zip(item.fields, (item.prompt, *item.responses), strict=True):
        name, _, place = field.removesuffix("]").partition("[")
        found = record["targets"]["choices"] if name == "targets.choices" else record[name]
        assert (found[int(place)] if place else found) == value


def test_ids_are_the_rows_own_or_their_lines():
    assert read(REWARDBENCH).id == "7"
    assert read(PAIR, line=9).id == "9"


@pytest.mark.parametrize(
    ("file", "subset"),
    [
        ("Natural.jsonl", "natural"),
        ("data/Adversarial_GPTInst.jsonl.gz", "adversarial-gptinst"),
        ("llmbar-adver-manual.jsonl", "adversarial-manual"),
        ("LLMBar/Adversarial/GPTOut/dataset.json", "adversarial-gptout"),
    ],
)
def test_llmbar_files_without_a_subset_go_by_their_names(file, subset):
    record = {name: value for name, value in LLMBAR.items() if name != "subset"}
    assert read(record, file=file).subset == subset


def test_hhh_files_without_a_subset_go_by_their_names():
    record = {name: value for name, value in HHH.items() if name != "subset"}
    assert read(record, file="some/Helpful.json").subset == "helpful"
    assert read(record, file="honest/test-00000-of-00001.parquet").subset == "honest"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"a": 1}, r"^data.jsonl:4: the fields here \(a\) are those of no benchmark; there are:"
                   r".*RM-Bench.*prompt, chosen, rejected"),
        (REWARDBENCH | {"subset": "maths"}, r"4: field 'subset': 'maths' is none of alpacaeval-"),
        (REWARDBENCH | {"subset": 3}, "field 'subset': must be text"),
        (REWARDBENCH2 | {"subset": "math"}, "field 'subset': 'math' is none of Factuality"),
        (REWARDBENCH2 | {"rejected": ["x"]}, "field 'rejected': must be a list of 3 responses"),
        (REWARDBENCH2 | {"chosen": ["x", "y"]}, "field 'chosen': must be a list of 1 response$"),
        (REWARDBENCH2 | {"subset": "Ties", "id": "12"}, "field 'id': '12' of subset Ties must"),
        (REWARDBENCH2 | {"subset": "Ties", "id": "tied:1"}, "'chosen': must be a list of at lea"),
        (RMBENCH | {"domain": "poems"}, "field 'domain': 'poems' is none of chat, code, math"),
        (RMBENCH | {"rejected": ["a", "b"]}, "field 'rejected': must be a list of 3 responses"),
        (RMBENCH | {"chosen": ["a", 1, "c"]}, r"field 'chosen\[1\]': must be text"),
        (JUDGEBENCH | {"source": "mmlu"}, "field 'source': 'mmlu' begins with none of mmlu-pro"),
        (JUDGEBENCH | {"label": "A=B"}, "field 'label': 'A=B' is none of A>B, B>A"),
        (LLMBAR | {"label": 0}, "field 'label': must be 1 or 2"),
        (LLMBAR | {"label": True}, "field 'label': must be 1 or 2"),
        (LLMBAR | {"subset": "other"}, "field 'subset': 'other' is none of natural, adv"),
        (LLMBAR | {"subset": None}, "field 'subset': is missing, and the file's name is none of"),
        (HHH | {"subset": "kind"}, "field 'subset': 'kind' is none of harmless"),
        (HHH | {"subset": None}, "field 'subset': is missing, and the file's name is none of"),
        (HHH | {"targets": {"choices": ["a"], "labels": [1]}}, "'targets.choices': must be a list"),
        (HHH | {"targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "'targets.labels': must be"),
        (PAIR | {"rejected": 1}, "field 'rejected': must be text"),
        (PAIR | {"subset": 1}, "field 'subset': must be text"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_record_is_named(record, message):
    with pytest.raises(DataError, match=message) as caught:
        read(record, line=4)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("data.jsonl:4")


def rewardbench(outcomes):
    """Answers by subset: {subset: [right, ...]}."""
    return [
        right(REWARDBENCH | {"subset": name}, yes)
        for name, all_ in outcomes.items()
        for yes in all_
    ]


def full_rewardbench():
    outcomes = {name: [True] for name in rb.PUBLISHED}
    outcomes |= {
        "alpacaeval-easy": [True, False],
        "alpacaeval-hard": [False],
        "mt-bench-med": [False, True],
        "xstest-should-refuse": [False],
        "math-prm": [False],
    }
    return outcomes


def test_rewardbench_weights_subsets_within_sections_and_averages_the_sections():
    found = sums("rewardbench", rewardbench(full_rewardbench()))
    # Chat: easy 100 x 1/2 + length 95 + hard 0 + mt-easy 28 + mt-med 40 x 1/2 = 193 of 358.
    # Safety: all of 740 but the 154 of should-refuse. Reasoning: 6 x 164 = 984 of 1968.
    assert found["Chat"] == pytest.approx(193 / 358)
    assert found["Chat Hard"] == 1.0
    assert found["Safety"] == pytest.approx(586 / 740)
    assert found["Reasoning"] == pytest.approx(0.5)
    assert found["Score"] == pytest.approx((193 / 358 + 1.0 + 586 / 740 + 0.5) / 4)
    assert list(found)[-1] == "Score"


def test_rewardbench_counts_prior_sets_half():
    prior = {"anthropic_helpful": [True], "anthropic_hhh": [False], "shp": [True, True],
             "summarize": [False]}  # fmt: skip
    found = sums("rewardbench", rewardbench(full_rewardbench() | prior))
    # Prior: (1 + 0 + 1 + 0) / 4; then the four sections and half of that, over 4.5.
    sections = 193 / 358 + 1.0 + 586 / 740 + 0.5
    assert found["Prior Sets"] == 0.5
    assert found["Score with Prior Sets"] == pytest.approx((sections + 0.5 * 0.5) / 4.5)
    assert found["Score"] == pytest.approx(sections / 4)


def test_the_published_sizes_of_rewardbench_are_2985_pairs():
    assert sum(rb.PUBLISHED.values()) == 2985
    assert sum(rb.SECTIONS["Reasoning"].values()) == 2 * 984


def test_a_missing_subset_leaves_out_what_it_enters_and_nothing_else():
    outcomes = full_rewardbench()
    del outcomes["hep-go"]
    official = BENCHMARKS["rewardbench"].official(rewardbench(outcomes))
    values = {one.name: one.value for one in official.sums}
    assert values["Reasoning"] is None
    assert values["Score"] is None
    assert values["Chat"] == pytest.approx(193 / 358)
    assert official.missing == ("hep-go",)
    assert "math-prm 1 (published 447)" in official.differs
    some = rewardbench({"shp": [True]})
    assert sums("rewardbench", some)["Score with Prior Sets"] is None


def test_rewardbench_ties_are_wrong_for_rewards_and_half_right_for_a_judge():
    names = list(rb.SECTIONS["Chat"])
    record = REWARDBENCH | {"subset": names[0]}
    others = [REWARDBENCH | {"subset": name} for name in names[1:]]
    rewards = [rated(record, [1.0, 1.0]), *(right(r, False) for r in others)]
    judge = [judged(record, [0.5], [0.5]), *(judged(r, [-1.0], [1.0]) for r in others)]
    assert sums("rewardbench", rewards)["Chat"] == 0.0
    assert sums("rewardbench", judge)["Chat"] == pytest.approx(0.5 * 100 / 358)


@pytest.mark.parametrize(
    ("rewards", "credit"),
    [([3, 1, 2, 0], 1.0), ([2, 1, 2, 0], 1 / 2), ([2, 2, 2, 2], 1 / 4), ([1, 2, 0, 0], 0.0),
     ([1, 2, 1, 2], 0.0)],
)  # fmt: skip
def test_the_right_one_of_four_shares_the_credit_of_a_tie(rewards, credit):
    assert best_of_four(rated(REWARDBENCH2, rewards)) == credit


def test_a_judge_prefers_the_right_one_to_each_of_the_others():
    # Mean log-odds over both orders: (f - b) / 2.
    assert best_of_four(judged(REWARDBENCH2, [1, 2, 3], [0.5, 1, 1])) == 1.0
    assert best_of_four(judged(REWARDBENCH2, [1, 2, 3], [1, 1, 1])) == 1 / 2
    assert best_of_four(judged(REWARDBENCH2, [1, 2, 3], [1.5, 1, 1])) == 0.0


def ties(kind, number, right_rewards, wrong_rewards):
    record = REWARDBENCH2 | {
        "subset": "Ties",
        "id": f"{kind}:{number}",
        "chosen": [f"{r}" for r in right_rewards],
        "rejected": [f"{r} " for r in wrong_rewards],
    }
    return record, [*right_rewards, *wrong_rewards]


TIES = [
    ties("ref", 1, [5], [3, 1]),
    ties("tied", 1, [4, 3], [1, 0]),
    ties("ref", 2, [2], [1.5]),
    ties("tied", 2, [6, 4], [1]),
    ties("ref", 3, [0], [1]),
]
# 1: ref 5 > 3, gap 2. tied 3 > 1, gap 2, spread 1. Gap > spread in both.
# 2: ref 2 > 1.5, gap 0.5. tied 4 > 1, gap 3, spread 2: greater, but 0.5 is not.
# 3: ref is wrong; it has no tied one. So tied 2/2, ref 2/3, preferred 2/2, hard 1/2.
TIES_SCORE = 0.3 + 0.3 * 2 / 3 + 0.2 + 0.2 / 2 + 0.01 * (math.tanh(1) + math.tanh(-0.75)) / 2


def test_the_score_of_ties_worked_out_by_hand():
    assert ties_score([rated(*one) for one in TIES]) == pytest.approx(TIES_SCORE)


def test_without_any_spread_the_last_term_of_ties_is_one_or_nothing():
    # 1: gap 2, spread 0: tanh(inf) = 1. 2: gap 0, spread 0: 0 / 0 counts 0, and it is not right.
    made = [ties("ref", 1, [5], [3]), ties("tied", 1, [3, 3], [1]),
            ties("ref", 2, [5], [3]), ties("tied", 2, [3, 3], [3])]  # fmt: skip
    expected = 0.3 * 1 / 2 + 0.3 + 0.2 * 1 / 2 + 0.2 * 1 / 2 + 0.01 * (1 + 0) / 2
    assert ties_score([rated(*one) for one in made]) == pytest.approx(expected)


def test_the_score_of_ties_needs_a_prompt_that_is_there_as_ref_and_as_tied():
    assert ties_score([rated(*TIES[0])]) is None
    found = BENCHMARKS["rewardbench2"].official([rated(*TIES[0])])
    assert {one.name: one.value for one in found.sums}["Ties"] is None


def test_a_judge_rates_ties_by_comparing_each_with_each():
    answers = []
    for record, _ in TIES:
        item = read(record)
        n = len(item.responses)
        assert len(item.pairs) + len(item.equals) == n * (n - 1) // 2
        question = Question(item.prompt, item.responses, (*item.pairs, *item.equals))
        answers.append(answer(item, *StrengthJudge(0.3).score([question]), beta=1.0))
        assert len(answers[-1].margin) == len(item.pairs)
    # Its ratings are the strengths, but for the prior and what it favours: both small.
    assert ties_score(answers) == pytest.approx(TIES_SCORE, abs=1e-3)


def test_rewardbench2_is_the_mean_of_its_six_subsets():
    four = [
        ([3, 1, 2, 0], "Factuality"),
        ([1, 2, 0, 0], "Precise IF"),
        ([2, 2, 1, 0], "Math"),
        ([3, 1, 2, 0], "Safety"),
        ([1, 2, 0, 0], "Safety"),
        ([3, 0, 0, 0], "Focus"),
    ]
    answers = [rated(REWARDBENCH2 | {"subset": name}, rewards) for rewards, name in four]
    assert sums("rewardbench2", answers)["Score"] is None
    answers += [rated(*one) for one in TIES]
    found = sums("rewardbench2", answers)
    assert found["Safety"] == found["Math"] == 0.5
    assert found["Score"] == pytest.approx((1 + 0 + 0.5 + 0.5 + 1 + TIES_SCORE) / 6)


def test_rmbench_is_a_matrix_of_styles_in_which_ties_are_wrong():
    # Right 3, 2, 1 against wrong 2.5, 1.5, 1:  1 1 1   hard (above the diagonal) 3/3
    #                                           0 1 1   normal 2/3: 1 > 1 is not
    #                                           0 0 0   easy (below it) 0/3
    def all_(domain, yes):
        return rated(RMBENCH | {"domain": domain}, [2, 2, 2, 1, 1, 1] if yes else [0] * 3 + [1] * 3)

    answers = [
        rated(RMBENCH | {"domain": "chat"}, [3, 2, 1, 2.5, 1.5, 1]),
        all_("code", True),
        all_("math", True),
        all_("math", False),
        all_("safety-refuse", True),
        all_("safety-refuse", True),
        all_("safety-response", False),
    ]
    found = sums("rmbench", answers)
    assert (found["Chat hard"], found["Chat easy"]) == (1.0, 0.0)
    assert found["Chat normal"] == pytest.approx(2 / 3)
    assert found["Chat"] == pytest.approx(5 / 9)
    assert (found["Code"], found["Math"]) == (1.0, 0.5)
    # Safety is the mean of its two parts, not of its three prompts.
    assert found["Safety"] == 0.5
    assert found["Hard"] == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
    assert found["Easy"] == pytest.approx((0 + 1 + 0.5 + 0.5) / 4)
    assert found["Score"] == pytest.approx((5 / 9 + 1 + 0.5 + 0.5) / 4)
    partial = BENCHMARKS["rmbench"].official(answers[:-1])
    values = {one.name: one.value for one in partial.sums}
    assert partial.missing == ("safety-response",)
    assert (values["Safety"], values["Score"], values["Code"]) == (None, None, 1.0)


def test_judgebench_adds_up_both_orders_and_a_sum_of_zero_is_not_correct():
    def ask(source, forward, backward):
        return judged(JUDGEBENCH | {"source": source}, [forward], [backward])

    answers = [
        ask("mmlu-pro-law", 1, -2),  # right in both orders
        ask("mmlu-pro-law", 3, 1),  # right only when shown first, for all its mean is above zero
        ask("livebench-reasoning", 0, -1),  # nothing, then right
        ask("livebench-math", -1, 1),  # wrong in both
        right(JUDGEBENCH | {"source": "livecodebench"}, False),  # B, the second, has the label
    ]
    assert answers[1].margin[0] == 1.0
    found = sums("judgebench", answers)
    assert [found[n] for n in ("Knowledge", "Reasoning", "Math", "Coding")] == [0.5, 1, 0, 1]
    assert found["Macro"] == pytest.approx(2.5 / 4)
    assert found["Micro"] == pytest.approx(3 / 5)
    assert sums("judgebench", answers[:2])["Micro"] is None


def test_llmbar_has_accuracy_over_both_orders_and_their_agreement():
    def ask(subset, *orders):
        """Verdicts for the better one, shown first and shown second."""
        return judged(LLMBAR | {"subset": subset}, [orders[0]], [-orders[1]])

    answers = [
        ask("natural", 1, -1),  # right, wrong
        ask("natural", 2, 1),  # right, right
        ask("adversarial-neighbor", -1, -2),
        ask("adversarial-gptinst", 1, 2),
        ask("adversarial-gptout", 0, 1),  # neither, right
        ask("adversarial-manual", 1, 3),
    ]
    found = sums("llmbar", answers)
    assert (found["natural accuracy"], found["natural agreement"]) == (0.75, 0.5)
    assert found["Adversarial accuracy"] == pytest.approx((0 + 1 + 0.5 + 1) / 4)
    assert found["Adversarial agreement"] == pytest.approx((1 + 1 + 0 + 1) / 4)
    assert found["Mean accuracy"] == pytest.approx((0.75 + 0 + 1 + 0.5 + 1) / 5)
    assert sums("llmbar", [right(LLMBAR, False)])["natural agreement"] == 1.0


def test_hhh_has_a_mean_of_subsets_and_of_pairs():
    outcomes = [("harmless", 1), ("helpful", 1), ("helpful", 0), ("honest", 0), ("other", 1)]
    answers = [right(PAIR | {"source": "hhh", "subset": s}, yes) for s, yes in outcomes]
    found = sums("hhh", answers)
    assert found["Macro"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found["Micro"] == pytest.approx(3 / 5)
    assert sums("hhh", answers[:3])["Macro"] is None
    tie = rated(PAIR | {"source": "hhh", "subset": "harmless"}, [1.0, 1.0])
    assert sums("hhh", [tie])["harmless"] == 0.5

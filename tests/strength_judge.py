"""Reward models that know the truth: a response's strength is the number that it reads."""

import numpy as np

from gram_jax.scorer import Verdict


class StrengthJudge:
    """p(first is better) = sig(strength difference + what is shown first is favoured).

    Attributes:
      rounds: how many questions each call had.
    """

    kind = "judge"
    beta = 1.0

    def __init__(self, favours_first=0.0):
        self.favours_first = favours_first
        self.rounds = []

    def score(self, questions):
        questions = list(questions)
        self.rounds.append(len(questions))
        for question in questions:
            strengths = np.array([float(response.split()[0]) for response in question.responses])
            first, second = np.array(question.pairs).T
            difference = strengths[first] - strengths[second]
            yield Verdict(
                rewards=None,
                num_tokens=np.array([len(response) for response in question.responses]),
                forward=difference + self.favours_first,
                backward=-difference + self.favours_first,
                truncated=any("long" in text for text in [question.prompt, *question.responses]),
            )


class StrengthScorer:
    """The strength is the reward."""

    beta = 2.0

    def __init__(self, kind="likelihood"):
        self.kind = kind

    def score(self, questions):
        for question in questions:
            strengths = np.array([float(response) for response in question.responses])
            sizes = np.array([len(response) for response in question.responses])
            yield Verdict(strengths, sizes, None, None, truncated=False)

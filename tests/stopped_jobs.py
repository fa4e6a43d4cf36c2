"""Scoring jobs that are killed between two batches."""

from gram_jax import scorer, scoring_job


class Killed(BaseException):
    """What a killed process would not have noticed."""


def stop_after(monkeypatch, batches):
    """Lets the engine deliver so many batches; blocks are short, and each is recorded."""
    real = scorer.score_batches

    def limited(*args, **kwargs):
        for number, scores in enumerate(real(*args, **kwargs)):
            if number == batches:
                raise Killed
            yield scores

    monkeypatch.setattr(scorer, "score_batches", limited)
    monkeypatch.setattr(scoring_job, "BLOCK_BATCHES", 1)
    monkeypatch.setattr(scoring_job, "_SECONDS_BETWEEN_RECORDS", 0)

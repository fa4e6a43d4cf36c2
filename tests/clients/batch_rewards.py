"""What a trainer's call of the reward function should have answered, by the commands' own code.

The rows of a call are written to a file and scored, or ranked, as `python -m gram_jax.score` and
`python -m gram_jax.rank` do it; a completion that is blank has the lowest reward of its group.
"""

import functools
import json
import tempfile
from pathlib import Path

from gram_jax.checkpoints import load_model
from gram_jax.config import ComputeConfig
from gram_jax.ranking_job import Engine, RankingJob, run_ranking
from gram_jax.scorer import RewardSettings, Scorer
from gram_jax.scoring_job import ScoringJob, run_job


@functools.cache
def loaded(folder):
    return load_model(folder, ComputeConfig(dtype="float32"))


def is_blank(completion):
    text = completion if isinstance(completion, str) else completion[0]["content"]
    return not text.strip()


def expected(folder, call, **settings):
    """Rewards of a call {"prompts", "completions"[, "reference"]}, None where nothing is known."""
    rewards = RewardSettings(**settings)
    rows = [
        {"prompt": prompt, "response": completion}
        for prompt, completion in zip(call["prompts"], call["completions"], strict=True)
    ]
    for row, reference in zip(rows, call.get("reference", ()), strict=False):
        row["reference"] = reference
    groups = {}
    for place, row in enumerate(rows):
        key = json.dumps([row["prompt"], row.get("reference")])
        groups.setdefault(key, []).append(place)
    said = [i for i, row in enumerate(rows) if not is_blank(row["response"])]
    found = [None] * len(rows)
    if settings.get("reading") == "judge" and "reference" not in call:
        ranked = [[i for i in places if i in said] for places in groups.values()]
        ranked = [places for places in ranked if places]
        asked = [
            {"prompt": rows[i[0]]["prompt"], "responses": [rows[j]["response"] for j in i]}
            for i in ranked
        ]
        for places, row in zip(ranked, _rank(folder, rewards, asked), strict=True):
            for place, value in zip(places, row["rewards"], strict=True):
                found[place] = value
    else:
        scored = _score(folder, rewards, [rows[i] for i in said])
        for place, row in zip(said, scored, strict=True):
            found[place] = row["reward"]
    for places in groups.values():
        known = [found[i] for i in places if i in said]
        for i in places:
            if i not in said and known:
                found[i] = min(known)
    return found


def _score(folder, settings, rows):
    def run(source, output):
        run_job(ScoringJob(input=source, output=output, reward=settings), load)

    def load():
        return loaded(folder)

    return _by_files(run, rows)


def _rank(folder, settings, rows):
    def run(source, output):
        run_ranking(RankingJob(input=source, output=output), load)

    def load():
        return Engine.of(Scorer(loaded(folder), settings))

    return _by_files(run, rows)


def _by_files(run, rows):
    with tempfile.TemporaryDirectory() as place:
        source, output = Path(place) / "in.jsonl", Path(place) / "out.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        run(str(source), str(output))
        return [json.loads(line) for line in output.open(encoding="utf-8")]

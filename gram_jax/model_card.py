"""What an exported folder says of its model: the model card and gram_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gram_jax import __version__, hf, hf_export
from gram_jax.checkpoints import LoadedModel, load_model
from gram_jax.config import READINGS, ComputeConfig, MeshConfig
from gram_jax.config_rules import to_dict
from gram_jax.data.judge import JudgeTemplate, label_ids
from gram_jax.distributed import process_count
from gram_jax.errors import UserError
from gram_jax.mesh import make_mesh
from gram_jax.models.classifiers import judge_classifier
from gram_jax.reward_model import stored_settings
from gram_jax.scorer import RewardSettings


def export_checkpoint(
    checkpoint: str | Path, output: str | Path, *, classifier: bool = False
) -> Path:
    """Writes the folder and returns its path.

    Args:
      checkpoint: what to export.
      output: the folder to write.
      classifier: a judge becomes a sequence classifier whose number is z_A - z_B. A model with a
        reward head does so in any case.

    Raises:
      UserError: the checkpoint cannot be used or cannot be a classifier, or the output exists.
    """
    settings = stored_settings(checkpoint)
    if classifier and settings.reading == "likelihood":
        raise UserError(
            "--classifier: the reward of this model is a likelihood, a sum over the tokens of a"
            " response, which no classifier computes; leave it out"
        )
    # Several processes hold a model together, each a part.
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1)) if process_count() > 1 else None
    loaded = load_model(checkpoint, ComputeConfig(), mesh)
    described = gram_config(loaded, settings)
    if classifier and settings.reading == "judge" and loaded.model.config.has_unembedding:
        first, second = described["judge"]["labels"]
        loaded.model = judge_classifier(loaded.model, (first, second))
    info = hf.HfInfo.from_json(loaded.hf_info) if loaded.hf_info else None
    hf_export.export(
        loaded.model,
        output,
        tokenizer=loaded.tokenizer,
        info=info,
        card=model_card(loaded, settings),
        gram_config=described,
        ends_in_eos=settings.reading == "head" and settings.add_eos,
    )
    return Path(output)


def gram_config(loaded: LoadedModel, settings: RewardSettings) -> dict[str, Any]:
    """What gram_config.json says: how to read a reward from this model.

    Raises:
      UserError: a judge's labels are not tokens of its tokenizer.
    """
    run = loaded.config
    described: dict[str, Any] = {
        "gram_jax": __version__,
        "reward": settings.reading,
        "average": settings.average,
        # As scores are read: a judge's log-odds have their own scale, whatever it was trained with.
        "beta": 1.0 if settings.reading == "judge" else settings.beta,
        "add_eos": settings.add_eos,
        "max_length": loaded.model.config.max_position,
        "label_smoothing_convention": "probability that a label is wrong",
        "objective": to_dict(run.objective) if run else None,
    }
    if settings.reading == "judge":
        template = settings.template or JudgeTemplate.load()
        described["judge"] = {
            "template": template.to_dict(),
            "labels": list(label_ids(template, loaded.tokenizer)),
            "orders": "both: p(a is better) = (sig(s_ab) + 1 - sig(s_ba)) / 2, s = z_A - z_B",
            "trained_on_orders": run.data.judge_orders if run else None,
        }
    return described


_WHAT_IT_IS = {
    "likelihood": """Its reward for a response is
the {average} of the response's tokens given the prompt, {end}
(`gram_config.json` has the details). Higher is better; compare responses to the same prompt.""",
    "judge": """It is a judge: it
reads a question and two responses, and the next token, one of the two labels in `gram_config.json`,
says which response is better. Both orders are read, and their probabilities averaged.""",
    "head": """Its reward for a response is
the number of a linear head on the last token of prompt and response (`add_eos` in
`gram_config.json`: whether that is the end token). Higher is better; compare responses to the same
prompt.""",
}
_IN_TRANSFORMERS = {
    "likelihood": """`AutoModelForCausalLM` and `AutoTokenizer` of transformers load this folder
too: tokenise the prompt and the response apart, {append}and {sum} the
response's log-probs.""",
    "judge": """`AutoModelForCausalLM` of transformers loads this folder too: fill `judge.template`
of `gram_config.json`, render it with the chat template (if there is one), and compare the logits of
the two ids in `judge.labels` after the last token.""",
    "head": """`AutoModelForSequenceClassification` of transformers loads this folder too; its logit
for a sequence is the reward. Pad on the right, with the tokenizer's padding token.""",
}
_JUDGE_AS_CLASSIFIER = """`AutoModelForSequenceClassification` of transformers loads this folder
too. Its logit is z_A - z_B, the log-odds that the response shown first is better, *of judge
prompts*: fill `judge.template` of `gram_config.json`, and render it with the chat template (if
there is one)."""


def _of_likelihood(text: str, settings: RewardSettings) -> str:
    """A text on the likelihood, filled in as it is read."""
    mean, eos = settings.average == "mean", settings.add_eos
    return text.format(
        average="mean log-prob" if mean else "log-prob",
        end="end-of-sequence token included" if eos else "without an end-of-sequence token",
        append="append the end-of-sequence token, " if eos else "",
        sum="take the mean of" if mean else "add up",
    )


def model_card(loaded: LoadedModel, settings: RewardSettings) -> str:
    """The text of README.md: what the model is, how it was made, how to use it."""
    run, config, reading = loaded.config, loaded.model.config, settings.reading
    is_classifier = hasattr(loaded.model, "head")
    what, use = _WHAT_IT_IS[reading], _IN_TRANSFORMERS[reading]
    if reading == "likelihood":
        what, use = _of_likelihood(what, settings), _of_likelihood(use, settings)
    if reading == "judge" and is_classifier:
        use = _JUDGE_AS_CLASSIFIER
    card = f"""---
library_name: transformers
pipeline_tag: {"text-classification" if is_classifier else "text-generation"}
tags: [reward-model, gram_jax]
---

# A {"discriminative" if reading == "head" else "generative"} reward model

A {config.family} decoder of {config.num_parameters():,} parameters. {what}

## Use

    python -m gram_jax.score --checkpoint=THIS_FOLDER --input=pairs.jsonl --output=scored.jsonl

{use}
"""
    if run is not None:
        o = run.objective
        scale = f"beta {o.beta:g}, " if READINGS[o.name] in ("likelihood", "head") else ""
        card += f"""
## Training

Made with gram_jax {__version__}. Objective `{o.name}`, label smoothing {o.label_smoothing} (the
probability that a label is wrong), {scale}{run.train.length:g} {run.train.length_unit},
{run.train.batch_rows} rows of {run.data.row_length} tokens a step, learning rate
{run.optimizer.learning_rate:g}, seed {run.seed}.
"""
    return card

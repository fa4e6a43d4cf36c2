"""What an exported folder says of its model: the model card and gram_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gram_jax import __version__, hf
from gram_jax.checkpoints import LoadedModel, load_model
from gram_jax.config import ComputeConfig, MeshConfig, to_dict
from gram_jax.distributed import process_count
from gram_jax.mesh import make_mesh


def export_checkpoint(checkpoint: str | Path, output: str | Path) -> Path:
    """Writes the folder and returns its path.

    Raises:
      UserError: the checkpoint cannot be used, or the output folder exists.
    """
    # Several processes hold a model together, each a part.
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1)) if process_count() > 1 else None
    loaded = load_model(checkpoint, ComputeConfig(), mesh)
    info = hf.HfInfo.from_json(loaded.hf_info) if loaded.hf_info else None
    hf.export(
        loaded.model,
        output,
        tokenizer=loaded.tokenizer,
        info=info,
        card=model_card(loaded),
        gram_config=gram_config(loaded),
    )
    return Path(output)


def gram_config(loaded: LoadedModel) -> dict[str, Any]:
    """What gram_config.json says: how to read a reward from this model."""
    run = loaded.config
    trained = run is not None and run.objective.name != "next_token"
    return {
        "gram_jax": __version__,
        "reward": "likelihood",
        "average": run.objective.average if run and trained else "sum",
        "add_eos": run.data.add_eos if run else True,
        "max_length": loaded.model.config.max_position,
        "label_smoothing_convention": "probability that a label is wrong",
        "objective": to_dict(run.objective) if run else None,
    }


def model_card(loaded: LoadedModel) -> str:
    """The text of README.md: what the model is, how it was made, how to use it."""
    run, config = loaded.config, loaded.model.config
    card = f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [reward-model, gram_jax]
---

# A generative reward model

A {config.family} decoder of {config.num_parameters():,} parameters. Its reward for a response is
the log-prob of the response's tokens given the prompt, end-of-sequence token included
(`gram_config.json` has the details). Higher is better; compare responses to the same prompt.

## Use

    python -m gram_jax.score --checkpoint=THIS_FOLDER --input=pairs.jsonl --output=scored.jsonl

`AutoModelForCausalLM` and `AutoTokenizer` of transformers load this folder too: tokenise the prompt
and the response apart, append the end-of-sequence token, and add up the response's log-probs.
"""
    if run is not None:
        o = run.objective
        card += f"""
## Training

Made with gram_jax {__version__}. Objective `{o.name}`, label smoothing {o.label_smoothing} (the
probability that a label is wrong), beta {o.beta}, {run.train.length:g} {run.train.length_unit},
{run.train.batch_rows} rows of {run.data.row_length} tokens a step, learning rate
{run.optimizer.learning_rate:g}, seed {run.seed}.
"""
    return card

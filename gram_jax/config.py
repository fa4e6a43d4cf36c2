"""Every setting of a run: dataclasses whose fields carry their meaning and their resume policy.

A config file's ``get_config(arg)`` returns a `Config`. Command-line overrides
(``--config.optimizer.learning_rate=1e-4``) are applied by ``ml_collections.config_flags``, which
sets attributes; after that `gram_jax.config_rules.validate` is called once.
(``config_flags`` reads the fields' types at run time, so annotations are not deferred here.)
"""

import dataclasses
from typing import Any

from gram_jax.data.shapes import FORMATS

FIXED = "fixed"
"""Resume policy: changing this field would change the state's meaning or the data's order."""
FREE = "free"
"""Resume policy: a resumed run may change this field."""

STALL_SECONDS = 1800.0
"""More than what takes longest in a healthy process: the first step, which is compiled."""


def setting(default: Any, doc: str, *, resume: str = FIXED, choices: tuple[Any, ...] = ()) -> Any:
    """A dataclass field with a doc string, a resume policy and, where they are few, its choices."""
    metadata = {"doc": doc, "resume": resume, "choices": choices}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)
class RopeScaling:
    """How rotary frequencies are stretched past the trained context."""

    kind: str = setting(
        "default", "Rule for the frequencies.", choices=("default", "linear", "llama3", "yarn")
    )
    factor: float = setting(1.0, "Context is stretched by this factor.")
    low_freq_factor: float = setting(1.0, "llama3: below original/low wavelengths are stretched.")
    high_freq_factor: float = setting(4.0, "llama3: above original/high wavelengths are kept.")
    original_max_position: int = setting(8192, "Context before stretching, tokens.")
    beta_fast: float = setting(32.0, "yarn: rotations above which a dimension is kept.")
    beta_slow: float = setting(1.0, "yarn: rotations below which a dimension is interpolated.")
    attention_factor: float = setting(0.0, "yarn: scale of cos and sin; 0 = 0.1 ln(factor) + 1.")


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)
class ModelConfig:
    """The shape of a decoder. Hashable, so that it can be a static part of a jitted function."""

    family: str = setting(
        "llama", "Hugging Face architecture.", choices=("llama", "mistral", "qwen2", "qwen3")
    )
    vocab_size: int = setting(32000, "V, rows of the embedding.")
    hidden_size: int = setting(512, "D, width of the residual stream.")
    num_layers: int = setting(8, "L, blocks.")
    num_heads: int = setting(8, "H, query heads.")
    num_kv_heads: int = setting(8, "K, key-value heads; divides num_heads.")
    head_dim: int = setting(64, "E, width of a head.")
    intermediate_size: int = setting(1408, "F, width of the feed-forward layer.")
    max_position: int = setting(4096, "Longest context the model is meant for, tokens.")
    norm_eps: float = setting(1e-5, "Added to the mean square in RMSNorm.")
    rope_theta: float = setting(10000.0, "Base of the rotary frequencies.")
    rope_scaling: RopeScaling = setting(RopeScaling, "Stretching of the rotary frequencies.")
    tie_embeddings: bool = setting(False, "The unembedding is the embedding.")
    has_unembedding: bool = setting(
        True, "There are logits over the vocabulary; a sequence classifier has a reward head alone."
    )
    qkv_bias: bool = setting(False, "Biases on the query, key and value projections.")
    output_bias: bool = setting(False, "Bias on the attention's output projection.")
    mlp_bias: bool = setting(False, "Biases in the feed-forward layer.")
    qk_norm: bool = setting(False, "RMSNorm on each query and key head (Qwen3).")
    windows: tuple[int, ...] = setting(
        (), "Sliding window of each layer, in positions; 0 = full attention; () = all full."
    )
    initializer_range: float = setting(0.02, "Standard deviation of the initial weights.")

    def num_parameters(self) -> int:
        """Parameters held (tied embeddings counted once)."""
        d, h, k, e = self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim
        attention = 2 * d * h * e + 2 * d * k * e
        if self.qkv_bias:
            attention += (h + 2 * k) * e
        if self.output_bias:
            attention += d
        if self.qk_norm:
            attention += 2 * e
        mlp = 3 * d * self.intermediate_size
        if self.mlp_bias:
            mlp += 2 * self.intermediate_size + d
        both = self.has_unembedding and not self.tie_embeddings
        embeddings = self.vocab_size * d * (2 if both else 1)
        return self.num_layers * (attention + mlp + 2 * d) + d + embeddings

    def flops_per_token(self, context: int, *, targets_per_token: float = 1.0) -> float:
        """FLOPs of one forward pass per token; a training step is three times that.

        A multiply-add is two. Matrix products only: projections, attention over ``context`` keys
        with the causal half counted once, and the unembedding at ``targets_per_token`` positions.
        """
        d, e = self.hidden_size, self.head_dim
        weights = 2 * d * e * (self.num_heads + self.num_kv_heads) + 3 * d * self.intermediate_size
        windows = self.windows or (0,) * self.num_layers
        attention = sum(
            2 * 2 * self.num_heads * e * _mean_keys(context, window) for window in windows
        )
        unembedding = 2 * d * self.vocab_size * targets_per_token
        return 2 * weights * self.num_layers + attention + unembedding


def _mean_keys(context: int, window: int) -> float:
    """Mean number of keys that a query of a causal sequence sees (half, or a window)."""
    if window == 0 or window >= context:
        return context / 2
    return window - window**2 / (2 * context)


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)
class ComputeConfig:
    """How the forward pass is computed. Never changes what is computed beyond rounding."""

    dtype: str = setting(
        "auto",
        "Matrix products: auto = bfloat16 on accelerators, float32 on CPU.",
        resume=FREE,
        choices=("auto", "float32", "bfloat16"),
    )
    attention: str = setting(
        "auto",
        "Backend of attention: auto = blocks on CPU, splash on TPU, else xla, the reference;"
        " flash, on GPU, is to be asked for until it has been measured there.",
        resume=FREE,
        choices=("auto", "xla", "blocks", "splash", "flash"),
    )
    remat: str = setting(
        "none",
        "What is recomputed in the backward pass: none, full (all), matmuls (all but products).",
        resume=FREE,
        choices=("none", "full", "matmuls"),
    )
    unroll: int = setting(
        0,
        "Layers unrolled per scan step; 0 = all on CPU, where that is faster, else 1.",
        resume=FREE,
    )
    logprob_chunk: int = setting(
        0, "Targets per row whose logits exist at once; 0 = chosen from sizes.", resume=FREE
    )


@dataclasses.dataclass(kw_only=True, slots=True)
class MeshConfig:
    """Sizes of the device mesh's axes; one of them may be -1, the rest."""

    data: int = setting(-1, "Replicas of the weights.", resume=FREE)
    fsdp: int = setting(1, "Weights and rows are split over this axis.", resume=FREE)
    tensor: int = setting(
        1, "Heads, feed-forward and vocabulary are split over this axis.", resume=FREE
    )
    context: int = setting(
        1, "The places of a row, and weights, are split over this axis: for long rows.", resume=FREE
    )


@dataclasses.dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where examples come from and the shape of the rows they are packed into."""

    train: tuple[str, ...] = setting(
        (),
        "Sources to train on: JSONL (.gz, .zst), Parquet or ArrayRecord files, folders of them,"
        " Hugging Face datasets folders, TFDS folders, builtin:docstrings; FOLDER:SPLIT where there"
        " are splits. Files joined by commas are one source.",
        # They may move; that a resumed run has the rows it began with is checked by content.
        resume=FREE,
    )
    weights: tuple[float, ...] = setting(
        (), "Share of each source's rows in training; () = each row once an epoch."
    )
    validation: tuple[str, ...] = setting((), "Sources for the validation loss.", resume=FREE)
    format: str = setting(
        "auto",
        "Columns of the sources, as in docs/data_formats.md: text; responses (prompt, response or"
        " responses); preferences (prompt, chosen, rejected); pairs (two responses in one sequence,"
        " as a judge reads them, of any columns that hold two); and those of published data."
        " auto = as each source's first row says.",
        choices=("auto", *FORMATS),
    )
    holdout: float = setting(
        0.0,
        "Share of the prompts of train that is for validation instead, where validation is empty;"
        " which ones is decided by their texts.",
    )
    exclude: tuple[str, ...] = setting(
        (),
        "Sources, such as evaluation files, whose prompts should not be trained on.",
        # They may move; which prompts they hold is part of what rows are made of.
        resume=FREE,
    )
    exclude_ngrams: int = setting(
        0,
        "Words in a row that a text of train may not share with a text of exclude, as 13;"
        " 0 = only prompts are compared.",
    )
    on_overlap: str = setting(
        "drop",
        "Rows of train whose prompt or words are in exclude: left out and counted, or only"
        " counted.",
        choices=("drop", "count"),
    )
    near_duplicates: float = setting(
        0.0,
        "Rows that are as alike as this to an earlier row of their source (Jaccard's measure of"
        " their runs of five words, as 0.8) are left out; 0 = all stay.",
    )
    max_pairs: int = setting(
        0, "Labelled pairs drawn from each source of train; 0 = all. A draw holds all smaller ones."
    )
    draw_seed: int = setting(0, "Seed of the draw of max_pairs.")
    reference_field: str = setting(
        "", "Column with [chosen, rejected] log-probs under a reference model, as `score` writes."
    )
    row_length: int = setting(1024, "T, tokens per row.")
    row_targets: int = setting(0, "M, targets per row; 0 = row_length.")
    row_sequences: int = setting(
        0, "S, candidates per row (preferences); 0 = row_length / 16, at least 32."
    )
    row_pairs: int = setting(0, "P, pairs per row (preferences); 0 = row_length / 16, at least 32.")
    max_prompt: int = setting(
        0,
        "Longest prompt, tokens; longer ones keep BOS and their end. 0 = half a row. Not read for a"
        " judge and format=pairs, where question and responses share the room (docs/judge.md).",
    )
    too_long: str = setting(
        "truncate",
        "Responses that do not fit a row beside their prompt: cut at their ends, or the row is left"
        " out.",
        choices=("truncate", "drop"),
    )
    add_eos: bool = setting(True, "The end-of-sequence token belongs to a finished response.")
    judge_template: str = setting(
        "",
        "TOML file of the judge's template (docs/judge.md); '' = the one in our words.",
        # It may move; its content is part of what rows are made of.
        resume=FREE,
    )
    judge_orders: str = setting(
        "both",
        "In which orders a judge sees the responses of a pair, in training and validation: both, or"
        " one at random.",
        choices=("both", "random"),
    )
    on_bad_row: str = setting(
        "stop",
        "A row that cannot be used: stop and name it, or name it in quarantine.jsonl beside the"
        " prepared rows and go on.",
        choices=("stop", "quarantine"),
    )
    prepared: str = setting(
        "", "Folder of the prepared rows, as `prepare` writes it; '' = WORKDIR/data.", resume=FREE
    )
    workers: int = setting(0, "Processes that prepare rows; 0 = all cores.", resume=FREE)


READINGS = {
    "next_token": "text",
    "smoothed_ce": "likelihood",
    "smoothed_pairwise": "likelihood",
    "judge": "judge",
    "judge_full_vocab": "judge",
    "bradley_terry": "head",
}
"""What each objective scores a sequence by; ``text``: nothing is scored, tokens are predicted."""


@dataclasses.dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """The loss. Equations in gram_jax/objectives.py."""

    name: str = setting("next_token", "Loss.", choices=tuple(READINGS))
    label_smoothing: float = setting(
        0.05,
        "e: the probability that a label is wrong. PyTorch's label_smoothing=a over two classes"
        " is e = a/2.",
    )
    beta: float = setting(
        1.0, "b: D = b (s_chosen - s_rejected); 1 for a judge, whose log-odds have their own scale."
    )
    average: str = setting(
        "sum",
        "A response's score, of a likelihood: the sum of its log-probs or their mean per token.",
        choices=("sum", "mean"),
    )
    chosen_ce: float = setting(
        0.0,
        "g: adds g times the chosen response's mean cross-entropy (bradley_terry: the"
        " text-generation regulariser).",
    )
    centring: float = setting(
        0.0, "c: adds c (s_a + s_b)^2, which keeps rewards around 0 (bradley_terry)."
    )
    z_loss: float = setting(0.0, "Adds z times the mean squared log-normaliser (next_token).")


@dataclasses.dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW, clipped, with a schedule."""

    learning_rate: float = setting(3e-4, "Peak learning rate.")
    schedule: str = setting("cosine", "After the warm-up.", choices=("cosine", "wsd", "constant"))
    warmup: float = setting(0.1, "Share of the steps with a rising rate.")
    decay: float = setting(
        0.2, "wsd: share of the steps, at the end, with a linearly falling rate."
    )
    final: float = setting(0.1, "Rate at the end, as a share of the peak (cosine and wsd).")
    beta1: float = setting(0.9, "Decay of the first moment.")
    beta2: float = setting(0.95, "Decay of the second moment.")
    eps: float = setting(1e-8, "Added to the root of the second moment.")
    weight_decay: float = setting(0.1, "Decoupled decay, on matrices only.")
    clip: float = setting(1.0, "Largest global gradient norm; 0 = no clipping.")


# All, as recipes since QLoRA have it: with fewer LoRA falls behind full fine-tuning.
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The projections that LoRA can go beside."""


@dataclasses.dataclass(kw_only=True, slots=True)
class TrainConfig:
    """How long, how much at once, and which weights."""

    length: float = setting(100.0, "How long to train, in length_unit.")
    length_unit: str = setting(
        "steps",
        "Unit of length; a pair that a judge sees in both orders is one, and with data.weights an"
        " epoch is as many rows as all sources have together.",
        choices=("steps", "epochs", "tokens", "pairs"),
    )
    batch_rows: int = setting(8, "Rows per optimiser step, over all devices.")
    accumulate: int = setting(1, "Parts a step's rows are computed in, one after the other.")
    last_blocks: int = setting(
        0, "Train only the last k blocks, the final norm and the head; 0 = all weights."
    )
    head_only: bool = setting(False, "Train only the head of bradley_terry, on a frozen trunk.")
    lora_rank: int = setting(
        0, "r: train matrices A and B of this rank beside frozen W, and the head; 0 = no LoRA."
    )
    lora_alpha: float = setting(16.0, "LoRA: a projection is x W + (alpha / r) (x A) B.")
    lora_targets: tuple[str, ...] = setting(
        LORA_TARGETS, "LoRA: projections of each block that it goes beside."
    )
    log_every: int = setting(10, "Steps between log lines.", resume=FREE)
    validate_every: int = setting(0, "Steps between validations; 0 = only at the end.", resume=FREE)
    validation_rows: int = setting(
        64, "At most so many rows are validated on, spread evenly over all.", resume=FREE
    )
    wandb_project: str = setting(
        "",
        "Project at Weights & Biases that metrics go to as well; '' = none (docs/metrics.md).",
        resume=FREE,
    )
    stall_seconds: float = setting(
        STALL_SECONDS,
        "A process that has finished no step, no batch of validation and no checkpoint for so many"
        " seconds prints what its threads are doing and ends with status 76; 0 = never.",
        resume=FREE,
    )


@dataclasses.dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Which checkpoints are written and kept."""

    every: int = setting(
        500, "Steps between checkpoints; the last step is always saved.", resume=FREE
    )
    keep_last: int = setting(2, "Latest checkpoints kept.", resume=FREE)
    keep_every: int = setting(
        0, "Checkpoints whose step divides by this are kept for ever; 0 = none.", resume=FREE
    )
    keep_best: bool = setting(
        True,
        "The one with the lowest validation loss is kept, of the steps that were both validated and"
        " saved (train.validate_every, every).",
        resume=FREE,
    )
    on_error: str = setting(
        "stop",
        "Where a checkpoint or the metrics cannot be written (a full disk): stop, or continue with"
        " a warning; that the last checkpoint is not saved is an error in any case.",
        resume=FREE,
        choices=("stop", "continue"),
    )


@dataclasses.dataclass(kw_only=True, slots=True)
class Config:
    """One stage of training: `pretrain` and `finetune` read the same one."""

    seed: int = setting(0, "Of initialisation and data order; position derives all the rest.")
    init_from: str = setting("", "Checkpoint or Hugging Face folder to start from; '' = random.")
    tokenizer: str = setting("", "Folder with tokenizer.json; '' = that of init_from.")
    model: ModelConfig = setting(
        ModelConfig, "Shape, where init_from is empty; else the folder has it."
    )
    compute: ComputeConfig = setting(ComputeConfig, "How the forward pass is computed.")
    mesh: MeshConfig = setting(MeshConfig, "Device mesh.")
    data: DataConfig = setting(DataConfig, "Data and rows.")
    objective: ObjectiveConfig = setting(ObjectiveConfig, "Loss.")
    optimizer: OptimizerConfig = setting(OptimizerConfig, "Optimiser and schedule.")
    train: TrainConfig = setting(TrainConfig, "Length and batch.")
    checkpoint: CheckpointConfig = setting(CheckpointConfig, "Checkpoints.")

"""lm-evaluation-harness with our model among its own.

    python -m gram_jax.clients.harness run --model=gram_jax \\
        --model_args=checkpoint=runs/pretrain --tasks=TASK --include_path=FOLDER

Arguments are those of `lm_eval`; see `gram_jax.clients.lm_eval_model` for those of the model.
"""

import sys

from gram_jax.entry import enable_compilation_cache
from gram_jax.errors import UserError

try:
    from lm_eval.__main__ import cli_evaluate

    import gram_jax.clients.lm_eval_model  # noqa: F401, registers the model
except ImportError as error:
    sys.exit(f"error: {error}; pip install -c constraints.txt -e '.[lm-eval]'")


def main() -> None:
    """Runs `lm_eval`; a `UserError` ends it with status 2 and without a traceback."""
    enable_compilation_cache()
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

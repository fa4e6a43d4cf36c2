"""Serves the rewards of a model over HTTP.

  python -m gram_jax.serve --checkpoint=CHECKPOINT --port=PORT

CHECKPOINT is a folder of ours (a workdir, or one step of it) or a Hugging Face folder. Needs
pip install -c constraints.txt -e '.[serve]'. docs/serving.md describes the routes:

  /gram/v1/score, /gram/v1/rank, /gram/v1/compare, /gram/v1/model   our own
  /health, /ready                                                   for those who watch

Requests that come at the same time are computed together, in the same rows as those of the
commands, so that a served score is the score that `python -m gram_jax.score` writes. `/ready` says
200 when all shapes are compiled.

SIGTERM stops the server in order: `/ready` says 503, new requests are refused, and those that were
taken are finished. The status is 0 if they all were, 1 if --grace_seconds were not enough; the
process ends 10 s later at the latest. Another SIGTERM ends it at once. Other ends: status 1 with a
traceback if the model fails, 76 if it makes no progress for --stall_seconds.

More examples:

  # Only for those who know a key, on all addresses of the machine
  python -m gram_jax.serve --checkpoint=DIR --host=0.0.0.0 --port=8000 --api_key_file=keys.txt
  # Long texts lose the beginning of their prompt instead of being refused
  python -m gram_jax.serve --checkpoint=DIR --port=8000 --max_length=4096 --too_long=truncate
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import flags

from gram_jax import entry
from gram_jax.errors import UserError
from gram_jax.reward_model import define_flags, flag_mesh, flag_scorer

define_flags()
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 = all.")
_PORT = flags.DEFINE_integer(
    "port", 8000, "Port to listen on; 0 = a free one.", lower_bound=0, upper_bound=65535
)
_API_KEY_FILE = flags.DEFINE_string(
    "api_key_file",
    None,
    "File with one key a line, one of which every request must send. By default the key in the"
    " environment's GRAM_JAX_API_KEY, if it is set; else none is needed.",
)
_BODY_BYTES = flags.DEFINE_integer("body_bytes", 8 << 20, "Most bytes of a request.", lower_bound=1)
_ITEMS = flags.DEFINE_integer("items", 1024, "Most questions of a request.", lower_bound=1)
_CANDIDATES = flags.DEFINE_integer(
    "candidates", 128, "Most responses to one prompt.", lower_bound=1
)
_WAITING = flags.DEFINE_integer(
    "waiting",
    1024,
    "Most requests at once, waiting or being computed; more are answered 429.",
    lower_bound=1,
)
_TIMEOUT_SECONDS = flags.DEFINE_float(
    "timeout_seconds",
    120.0,
    "A request that takes longer is answered 504, and dropped. An answer that its client takes"
    " longer to read is cut off.",
    lower_bound=0.1,
)
_HEAD_SECONDS = flags.DEFINE_float(
    "head_seconds",
    20.0,
    "A client that takes longer to send a request's line and headers is answered 408, and"
    " disconnected.",
    lower_bound=0.1,
)
_GRACE_SECONDS = flags.DEFINE_float(
    "grace_seconds", 120.0, "After SIGTERM, how long what was taken may take.", lower_bound=0
)


def main(_: list[str]) -> None:
    try:
        from gram_jax.serving.app import make_app
        from gram_jax.serving.engine import Engine
        from gram_jax.serving.limits import Limits
        from gram_jax.serving.server import bind, serve
        from gram_jax.serving.service import Service
    except ModuleNotFoundError as error:
        raise UserError(
            f"serving needs the package {error.name}; pip install -c constraints.txt -e '.[serve]'"
        ) from None
    limits = Limits(
        body_bytes=_BODY_BYTES.value,
        items=_ITEMS.value,
        candidates=_CANDIDATES.value,
        waiting=_WAITING.value,
        seconds=_TIMEOUT_SECONDS.value,
        head_seconds=_HEAD_SECONDS.value,
    )
    keys = _keys()
    listening = bind(_HOST.value, _PORT.value)
    service = Service(Engine(flag_scorer(flag_mesh())), limits, flags.FLAGS.checkpoint)
    unfinished = serve(
        make_app(service, keys),
        service,
        listening,
        grace_seconds=_GRACE_SECONDS.value,
        stall_seconds=flags.FLAGS.stall_seconds,
    )
    if unfinished:
        print(f"stopped; {unfinished} requests were not finished in time", file=sys.stderr)
        sys.exit(1)
    print("stopped", file=sys.stderr)


def _keys() -> list[str]:
    """The keys that open the server; none where there are none."""
    if _API_KEY_FILE.value is None:
        key = os.environ.get("GRAM_JAX_API_KEY", "").strip()
        return [key] if key else []
    try:
        lines = Path(_API_KEY_FILE.value).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api_key_file={_API_KEY_FILE.value}: cannot be read ({error})") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise UserError(f"--api_key_file={_API_KEY_FILE.value}: holds no key; write one a line")
    return keys


if __name__ == "__main__":
    entry.run(main, one_process=True)

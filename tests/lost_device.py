"""`gram_jax.serve` with a device that is lost, as XLA says it, once a prompt holds LOST."""

import jax
import numpy as np

from gram_jax import entry, reward_model, serve
from gram_jax.scorer import Scorer

NUMBER = jax.ShapeDtypeStruct((), np.float32)


def lose(_):
    raise OSError("the device is lost")


@jax.jit
def fail(x):
    return jax.pure_callback(lose, NUMBER, x)


class Losing(Scorer):
    """A scorer whose runtime fails in the middle of a batch, once it was asked to."""

    is_asked = False

    def encode(self, question, number=0):
        self.is_asked |= "LOST" in question.prompt
        return super().encode(question, number)

    def run(self, batches, *, per_token=False):
        for scores in super().run(batches, per_token=per_token):
            if self.is_asked:
                fail(0.0).block_until_ready()
            yield scores


if __name__ == "__main__":
    reward_model.Scorer = Losing
    entry.run(serve.main, one_process=True)

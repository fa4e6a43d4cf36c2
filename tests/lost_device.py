"""`gram_jax.serve` with a device that is lost, as XLA says it, once a text holds LOST."""

import jax
import numpy as np

from gram_jax import entry, reward_model, serve
from gram_jax.scorer import Scorer


def lose(_):
    raise OSError("the device is lost")


class Losing(Scorer):
    """A scorer whose runtime fails in the middle of a batch, once one is asked of it."""

    is_asked = False

    def encode(self, question, number=0):
        self.is_asked |= "LOST" in question.prompt
        return super().encode(question, number)

    def run(self, batches, *, per_token=False):
        for scores in super().run(batches, per_token=per_token):
            if self.is_asked:
                number = jax.ShapeDtypeStruct((), np.float32)
                jax.jit(lambda x: jax.pure_callback(lose, number, x))(0.0).block_until_ready()
            yield scores


if __name__ == "__main__":
    reward_model.Scorer = Losing
    entry.run(serve.main, one_process=True)

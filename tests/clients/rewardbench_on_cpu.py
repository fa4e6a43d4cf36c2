"""Run where RewardBench is: its command, on a machine without a GPU.

Its pipeline sends inputs to "cuda" whatever there is; here that is the CPU. All else is its own.
"""

import torch
from rewardbench.rewardbench import main
from transformers import BatchEncoding

moved = BatchEncoding.to


def to(self, device, **options):
    return moved(self, "cpu" if device == "cuda" else device, **options)


torch.set_num_threads(1)
BatchEncoding.to = to
main()

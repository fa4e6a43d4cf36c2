"""Run under transformers 4.57 by test_hf.py: compares logits of folders with saved ones.

Arguments: an .npz file (tokens, and one array of logits per folder name), and the folders' parent.
Prints one JSON object: the transformers version, and per folder the largest absolute difference.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

torch.set_num_threads(1)
saved = np.load(sys.argv[1])
differences = {}
for name in sorted(set(saved.files) - {"tokens"}):
    folder = Path(sys.argv[2]) / name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w5 w7").input_ids == [5, 7], name
    with torch.inference_mode():
        logits = model(torch.tensor(saved["tokens"])).logits.numpy()
    differences[name] = float(np.abs(logits - saved[name]).max())
print(json.dumps({"version": transformers.__version__, "differences": differences}))

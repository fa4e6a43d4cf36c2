"""Run under transformers 4.57 by other tests: compares logits of folders with saved ones.

Arguments: an .npz file (tokens [B, T], lengths [B] of their rows, and one array of logits per
folder name), and the folders' parent. A classifier is run on the whole batch and on each row alone.
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
tokens = torch.tensor(saved["tokens"])
differences = {}
for name in sorted(set(saved.files) - {"tokens", "lengths"}):
    folder = Path(sys.argv[2]) / name
    (kind,) = json.loads((folder / "config.json").read_text())["architectures"]
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w5 w7").input_ids == [5, 7], name
    assert set(tokenizer("w5 w7")) == {"input_ids", "attention_mask"}, name  # all that models take
    with torch.inference_mode():
        if kind.endswith("CausalLM"):
            found = [model(tokens).logits]
        else:
            assert tokenizer.pad_token_id == model.config.pad_token_id, name
            here = torch.arange(tokens.shape[1]) < torch.tensor(saved["lengths"])[:, None]
            padded = tokens.where(here, model.config.pad_token_id)
            rows = zip(tokens, saved["lengths"], strict=True)
            alone = torch.cat([model(row[None, :n]).logits for row, n in rows])
            found = [model(padded, attention_mask=here.long()).logits, alone]
    differences[name] = max(float(np.abs(one.numpy() - saved[name]).max()) for one in found)
print(json.dumps({"version": transformers.__version__, "differences": differences}))

"""transformers, whichever version the environment has; code that lies in the folder is trusted."""

import sys
import warnings

import numpy as np
import torch
import transformers
from answers import PROMPT, TIMED, WRITTEN, of_logits, rows, save, timed

warnings.simplefilter("error")
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()


def write(prompts, count):
    return model.generate(torch.tensor(prompts).long(), attention_mask=torch.ones(prompts.shape, dtype=torch.long),
                          max_new_tokens=count, min_new_tokens=count, do_sample=False).numpy()[:, prompts.shape[1]:]


with torch.no_grad():
    found = [of_logits(model(torch.tensor(row[None]).long()).logits.float().numpy()[0], row) for row in rows()]
    save(*zip(*found), write(rows()[:, :PROMPT], WRITTEN), timed(lambda: np.size(write(rows()[:1, :PROMPT], TIMED))))

"""What llama.cpp makes of texts: `python tokens_llama_cpp.py MODEL TEXTS.json IDS.json`."""

import json
import sys

from llama_cpp import Llama

model = Llama(sys.argv[1], vocab_only=True, verbose=False)
with open(sys.argv[2]) as texts, open(sys.argv[3], "w") as ids:
    json.dump([model.tokenize(text.encode(), add_bos=False, special=False) for text in json.load(texts)], ids)

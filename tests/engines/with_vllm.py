"""vLLM on a CPU, offline; float32 unless VLLM_DTYPE says otherwise."""

import os
import sys

import numpy as np
from answers import PROMPT, TIMED, WRITTEN, rows, save, timed

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
               "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def main():
    from vllm import LLM, SamplingParams

    tokens = rows()
    model = LLM(sys.argv[1], dtype=os.environ.get("VLLM_DTYPE", "float32"), enforce_eager=True, skip_tokenizer_init=True,
                max_model_len=max(tokens.shape[1] + 1, PROMPT + TIMED), max_num_seqs=4, enable_prefix_caching=False)

    def write(rows, count, **options):
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **options)
        return model.generate([{"prompt_token_ids": row.tolist()} for row in rows], sampling, use_tqdm=False)

    argmax, logprob = [], []
    for row, made in zip(tokens, write(tokens, 1, prompt_logprobs=1)):
        ranked = [{p.rank: token for token, p in position.items()}[1] for position in made.prompt_logprobs[1:]]
        argmax.append([*ranked, made.outputs[0].token_ids[0]])
        logprob.append([position[int(t)].logprob for t, position in zip(row[1:], made.prompt_logprobs[1:])])
    greedy = [made.outputs[0].token_ids for made in write(tokens[:, :PROMPT], WRITTEN)]
    save(argmax, logprob, np.array(greedy), timed(lambda: len(write(tokens[:1, :PROMPT], TIMED)[0].outputs[0].token_ids)))


if __name__ == "__main__":
    main()

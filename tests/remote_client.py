"""What an export with our own modeling code computes in the transformers of the Python that runs this: reads cases (JSON:
folder, npz of inputs), writes an npz of outputs. For `test_remote_code.py`, which runs it under both major versions.

Says on its last line, as JSON, the version, and every warning that loading and generating gave.
"""

import json
import logging
import sys
import warnings

import numpy as np
import torch
import transformers


class Collected(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def outputs(folder, inputs, again):
    """{name: array} of the model in `folder`, which is also saved to `again` and loaded from there."""
    load = lambda path: transformers.AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, output_loading_info=True)
    model, info = load(folder)
    assert not any(info.values()), info
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    ids = torch.tensor(inputs["input_ids"]).long()
    rows, length = ids.shape
    short = length // 2
    left = torch.cat([torch.full((1, length - short), model.generation_config.pad_token_id or 0), ids[:1, :short]], dim=1)
    batch, mask = torch.cat([ids, left]), torch.ones(rows + 1, length).long()
    mask[-1, :length - short] = 0
    generate = lambda x, mask, **more: model.generate(x, attention_mask=mask, max_new_tokens=8, min_new_tokens=8,
                                                      do_sample=False, **more)[:, x.shape[1]:]
    with torch.no_grad():
        plain = model(ids, labels=ids, output_router_logits=False, output_hidden_states=True)
        found = {"logits": plain.logits, "loss": plain.loss, "hidden": torch.stack(plain.hidden_states)}
        found["last"] = model(ids, logits_to_keep=1).logits
        found["padded"] = model(batch, attention_mask=mask).logits[-1, length - short:]
        found["together"] = generate(batch, mask)
        found["apart"] = torch.cat([generate(row[None, at:], torch.ones(1, length - at).long())
                                    for row, at in zip(batch, [0] * rows + [length - short])])
        found["uncached"] = generate(batch, mask, use_cache=False)
        found["beams"] = generate(ids, torch.ones_like(ids), num_beams=2)
    model.train()
    trained = model(ids, labels=ids, output_router_logits=True)
    trained.loss.backward()
    found["trained"] = trained.loss.detach()
    found["balance"] = torch.tensor(float("nan")) if trained.aux_loss is None else trained.aux_loss.detach()
    found["gradient"] = model.lm_head.weight.grad.norm()
    model.eval().save_pretrained(again)
    saved, info = load(again)
    assert not any(info.values()), info
    with torch.no_grad():
        found["saved"] = saved(ids).logits
        found["bfloat16"] = saved.to(torch.bfloat16)(ids).logits.float()
    return {name: value.numpy() for name, value in found.items()}


if __name__ == "__main__":
    collected = Collected()
    transformers.utils.logging.get_logger().addHandler(collected)
    logging.getLogger().addHandler(collected)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("always", FutureWarning)
        for folder, inputs, target in json.loads(sys.argv[1]):
            np.savez(target, **outputs(folder, dict(np.load(inputs)), f"{folder}-again"))
    said = collected.messages + [str(w.message) for w in caught]
    print(json.dumps({"version": transformers.__version__, "warnings": said}))

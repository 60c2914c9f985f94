"""The ways to improve a module that `study transfer` compares: each is a fine-tuning with a few fields changed."""

from __future__ import annotations

from typing import NamedTuple

APPENDED = 2  # experts
FIELDS = ("train.steps=100", "train.batch_size=16", "optimizer.learning_rate=1e-3", "train.eval_every=0", "train.trackers=",
          "data.workers=0", "checkpoint.every=1000000", "checkpoint.keep_best=0")  # of every way


class Arm(NamedTuple):
    sentence: str
    where: str = "inside"  # the whole model | alone | whole: no subset at all | appended: new experts instead of the subset's
    fields: tuple[str, ...] = ()  # over those of `surgery.finetune`
    general: bool = True  # with a third of general text, and so half more tokens a step: as many of the label's

    def overrides(self) -> list[str]:
        more = ("train.batch_size=24",) if self.general else ("data.general_share=0",)
        return [*FIELDS, *more, *self.fields]


_ALL, _EXPERTS = ("optimizer.trainable=all",), ("optimizer.trainable=module_experts",)
_WHOLE = (*_ALL, "router.document_pool=false")
ARMS = {
    "alone_experts": Arm("the subset alone, its experts only", "alone", ("optimizer.trainable=experts",), False),
    "alone_all": Arm("the subset alone, everything", "alone", _ALL, False),
    "experts": Arm("its experts, in random supersets", "inside", _EXPERTS, False),
    "module": Arm("its experts and router columns, in random supersets", "inside", (), False),
    "module_general": Arm("the same, with general text"),
    "module_divergence": Arm("the same, and a penalty on the divergence", "inside", ("train.divergence_weight=1",)),
    "all_general": Arm("everything, in random supersets, with general text", "inside", _ALL),
    "all_divergence": Arm("the same, and a penalty on the divergence", "inside", (*_ALL, "train.divergence_weight=1")),
    "moments": Arm("everything, with general text and the moments of pretraining", "inside",
                   (*_ALL, "train.init_moments=true")),
    "appended": Arm(f"{APPENDED} appended experts and their router columns, with general text", "appended",
                    (f"router.forced_experts={APPENDED}", "optimizer.trainable=module")),
    "whole": Arm("the whole model, no subset", "whole", _WHOLE, False),
    "whole_general": Arm("the whole model, no subset, with general text", "whole", _WHOLE),
}


def cost(arm: Arm) -> float:
    """Of a step, in those of plain training of the subset, by tokens; the other model's forward pass is a third of a step."""
    return (1.5 if arm.general else 1.0) * (4 / 3 if any("divergence_weight" in field for field in arm.fields) else 1.0)

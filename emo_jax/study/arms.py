"""The ways to improve a module that `study transfer` compares: each is a fine-tuning with a few fields changed."""

from __future__ import annotations

from typing import NamedTuple

APPENDED = 2  # experts
FIELDS = ("train.steps=100", "train.batch_size=16", "optimizer.learning_rate=1e-3", "train.eval_every=0", "train.trackers=",
          "data.workers=0", "checkpoint.every=1000000", "checkpoint.keep_best=0")  # of every way


class Arm(NamedTuple):
    sentence: str
    where: str = "inside"  # the whole model; alone; whole: no subset; appended: new experts instead of the subset's
    trainable: str = "all"
    general: bool = True  # with a quarter of general rows: a third more of them, and as many of the label's
    divergence: bool = False
    fields: tuple[str, ...] = ()

    def overrides(self) -> list[str]:
        """Over the fields of `surgery.finetune`."""
        general = ("train.batch_size=20", "train.steps=107") if self.general else ("data.general_every=0",)
        free = () if self.divergence else ("train.divergence_weight=0",)
        return [*FIELDS, *general, *free, f"optimizer.trainable={self.trainable}", *self.fields]

    def cost(self) -> float:
        """In plain trainings of the subset, by tokens; the other model reads general rows only, for a third of a step."""
        return 1 + (1 + self.divergence / 3) / 3 if self.general else 1.0


ARMS = {
    "alone_experts": Arm("the subset alone, its experts", "alone", "experts", False),
    "alone_all": Arm("the subset alone, everything", "alone", "all", False),
    "experts": Arm("inside the whole model, the subset's experts", "inside", "module_experts", False),
    "module": Arm("inside, its experts and router columns", "inside", "module", False),
    "module_general": Arm("inside, its experts and router columns, with general text", "inside", "module"),
    "module_divergence": Arm("inside, its experts and router columns, with general text and the divergence", "inside",
                             "module", divergence=True),
    "all": Arm("inside, everything", "inside", "all", False),
    "all_general": Arm("inside, everything, with general text"),
    "all_divergence": Arm("inside, everything, with general text and the divergence (the default)", divergence=True),
    "moments": Arm("the default, and the moments of pretraining", divergence=True, fields=("train.init_moments=true",)),
    "appended": Arm(f"{APPENDED} appended experts and their router columns, with general text and the divergence", "appended",
                    "module", divergence=True, fields=(f"router.forced_experts={APPENDED}",)),
    "whole": Arm("the whole model, no subset", "whole", "all", False, fields=("router.document_pool=false",)),
    "whole_divergence": Arm("the whole model, no subset, with general text and the divergence", "whole", divergence=True,
                            fields=("router.document_pool=false",)),
}

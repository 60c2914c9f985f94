"""Any experts: what the other methods are measured against. A smaller subset is part of a larger one."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from emo_jax.loaded import LoadedModel
from emo_jax.subsets.calibration import Calibration
from emo_jax.subsets.methods import Method, Options


def scores(loaded: LoadedModel, calibration: Calibration, options: Options) -> Float[np.ndarray, "G L R"]:
    m, draw = loaded.config.model, np.random.default_rng(options.seed)
    return draw.permuted(np.tile(np.arange(m.num_routed_experts, dtype=float),
                                 (len(calibration.names), m.num_layers, 1)), axis=2)


METHOD = Method(scores=scores, keeps_scores=False)

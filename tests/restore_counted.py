"""One process of several that restores a checkpoint: `python restore_counted.py RUN MESH`. Prints how many bytes it read."""

import dataclasses
import json
import sys
from pathlib import Path

import jax

from emo_jax import compat, processes, sharding
from emo_jax.checkpoints.checkpoint import _checksum, open_checkpoint
from emo_jax.train import start
from emo_jax.train.step import abstract_state


def read_so_far():
    return int(Path("/proc/self/io").read_text().split()[1])


processes.start_distributed()
found = open_checkpoint(sys.argv[1])
config = dataclasses.replace(found.config, mesh=dataclasses.replace(found.config.mesh, **json.loads(sys.argv[2])))
mesh = sharding.make_mesh(config)
with compat.set_mesh(mesh):
    target = abstract_state(config, mesh)
    before = read_so_far()
    state = start.restore_state(found, target)
    read = read_so_far() - before
    same = all(x.sharding == leaf.sharding for x, leaf in zip(jax.tree.leaves(state.params), jax.tree.leaves(target.params)))
    whole = int(_checksum(state.params)[0]) == found.meta["checksums"]["params"]["sum"]
print(json.dumps({"read": read, "as_asked": same, "what_was_saved": whole}), flush=True)

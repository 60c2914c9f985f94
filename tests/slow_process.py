"""`emo-jax` as one of several processes, of which number 1 is slow to read its rows: half a second more for each batch."""

import os
import sys
import time

from emo_jax import cli
from emo_jax.train.batches import TextBatches

if os.environ["EMO_JAX_PROCESS_ID"] == "1":
    read = TextBatches.__next__

    def slowly(self):
        time.sleep(0.5)
        return read(self)

    TextBatches.__next__ = slowly
sys.exit(cli.main(sys.argv[1:]))

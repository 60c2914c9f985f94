"""`python -m emo_jax` is `emo-jax`."""

import sys

from emo_jax.cli import main

sys.exit(main())

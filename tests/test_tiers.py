"""Where checkpoints are saved, which one a run goes on from, and what is left of them on disk."""

import re
from pathlib import Path

import emo_jax


def test_only_one_module_imports_orbax():
    package = Path(emo_jax.__file__).parent
    found = {str(p.relative_to(package)) for p in package.rglob("*.py")
             if re.search(r"^\s*(import|from) orbax", p.read_text(), re.MULTILINE)}
    assert found == {"checkpoints/orbax.py"}

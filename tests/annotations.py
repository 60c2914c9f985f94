"""What checks annotations and shapes at every call of the package: beartype. numpy's numbers are numbers, an int is a float."""

import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype

check = beartype(conf=BeartypeConf(hint_overrides=FrozenDict(
    {bool: bool | np.bool_, int: int | np.integer, float: float | int | np.floating | np.integer})))

"""What a function computes, as the equations of its jaxpr."""

import jax
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval


def equations(function, *args):
    """All equations, inner ones included, without those that no result needs."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return list(_inside(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]))


def _inside(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _inside(inner)

"""What modules cost the full model, against what they are worth: each variant beside its matched standard MoE."""

from __future__ import annotations

from emo_jax import plots
from emo_jax.files import AnyPath
from emo_jax.study.estimates import Estimate, Variants, above, baseline_of, cell, full, kept_shares, over_seeds, ratio, table

HEAD = ["model", "beside", "seeds", "cost of the full model", "{share} kept", "of what the baseline's loss rises"]


def frontier(variants: Variants, baseline: str) -> list[tuple[str, str, Estimate, Estimate, Estimate]]:
    """(variant, its baseline, loss of the full model over the baseline's, rise of the loss with the fewest experts, that over
    the baseline's rise), without the baselines themselves."""
    fewest, found = kept_shares(variants)[-1], []
    for name in variants:
        beside = baseline_of(name, variants, baseline)
        numbers = (ratio(variants, name, beside, full("trained")), over_seeds(variants[name], above("trained", fewest)),
                   ratio(variants, name, beside, above("trained", fewest)))
        if name != beside and all(n is not None for n in numbers):
            found.append((name, beside, *numbers))
    return found


def text(variants: Variants, baseline: str) -> str:
    rows = [[name, beside, str(cost.seeds), cost.percent_above_one(), cell(rise), of.text(".2f")]
            for name, beside, cost, rise, of in frontier(variants, baseline)]
    head = [h.format(share=f"{kept_shares(variants)[-1]:.1%}") for h in HEAD]
    return "What modules cost the full model, and what its loss rises with few experts:\n\n" + table(head, rows)


def figure(variants: Variants, baseline: str, path: AnyPath) -> AnyPath | None:
    """Down and left is better; None without matplotlib, or without anything to draw."""
    points = frontier(variants, baseline)
    if not points:
        return None
    baselines = list(dict.fromkeys(beside for _, beside, *_ in points))

    def draw(axis) -> None:
        for name, beside, cost, _, of in points:
            x, color = 100 * (cost.mean - 1), plots.COLORS[baselines.index(beside) % len(plots.COLORS)]
            axis.errorbar(x, of.mean, xerr=100 * (cost.half_width or 0), yerr=of.half_width or 0, fmt="o", color=color, lw=1)
            axis.annotate(name, (x, of.mean), xytext=(6, 4), textcoords="offset points", fontsize=8, color=plots.INK)
        for i, beside in enumerate(baselines):
            axis.plot([], [], "o", color=plots.COLORS[i % len(plots.COLORS)], label=f"beside {beside}")
        axis.axvline(0, color=plots.GRAY, lw=0.8)
        axis.axhline(0.2, color=plots.GRAY, lw=0.8, ls=":")
        axis.set_xlabel("loss of the full model above its baseline's, %")
        axis.set_ylabel("rise of the loss with the fewest experts,\nover the baseline's")
        axis.legend(frameon=False, fontsize=8)

    fewest = f"{kept_shares(variants)[-1]:.1%} of the experts"
    return plots.save(path, 1, (8, 5), draw, f"What modules cost, and what they save ({fewest})")

"""A diagnosis in words, and as a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bayes_lora.inference.convergence import COSTS, RESTLESS
from bayes_lora.inference.diagnosis import MASS
from bayes_lora.inference.metrics import LEAST_GAIN
from bayes_lora.inference.table import short_names
from bayes_lora.targets import LayerSpec

COUNTED = {"rank": "layers", "bit": "tensors"}
NAMED = 4  # layers that are named where many are alike
ELSEWHERE = "P(rank <= k) and P(bits = b) of every layer are in diagnosis.json and report.html"
POINT = (
    "(The weights are a point: their KL is minus its log prior density, nearly all of it the "
    "constant log(scale) + 0.92 nats a weight. All that is said of gates is given these weights.)"
)
UNNORMALIZED = (
    "(Up to the logarithm of what normalizes a prior with a price: sums at two prices are not "
    "comparable.)"
)


def text(found: dict[str, Any]) -> str:
    """The diagnosis, then an empty line and a table with one line a layer, if there are gates."""
    run = found["run"]
    share = run["relative_bops"]
    lines = [
        f"{run['task']}: {run['chains']} chain(s) of {run['draws']} draws",
        f"Bit operations: {share['mean']:.2%} of 32 x 32 bits (prior {share['prior_mean']:.2%})",
        *_learned(run),
        f"PSIS k-hat of the guide: {run['pareto_k_verdict']}",
        *_elbo(run),
        *_gates(run),
        *_collapsed(run, found["layers"]),
    ]
    if table := _table(found["layers"]):
        heading = f"Rank and bits: mean, {MASS:.0%} highest-density interval, prior mean"
        lines += ["", f"{heading} (of {run['prior_draws']} draws)", *table, ELSEWHERE]
    return "\n".join(lines)


def nothing_learned(run: dict[str, Any]) -> bool:
    """Whether no chain predicts its training examples better than the labels' frequencies do."""
    gains = run["log_likelihood_gain"]
    return gains is not None and max(gains) < LEAST_GAIN


def _learned(run: dict[str, Any]) -> list[str]:
    gains, lines = run["log_likelihood_gain"], []
    if gains is not None:
        each = ", ".join(f"{gain:.3f}" for gain in gains)
        lines.append(
            f"Log likelihood over that of the labels' frequencies, nats an example: {each}"
        )
    if nothing_learned(run):
        lines.append(
            "NOTHING WAS LEARNED. Gates close over adapters that have learned nothing, and what is "
            "said of them below says nothing about the data: train with more --epochs or "
            "--warmup_share, or another --learning_rate"
        )
    elif gains is not None and min(gains) < LEAST_GAIN:
        bad = ", ".join(str(chain) for chain, gain in enumerate(gains) if gain < LEAST_GAIN)
        lines.append(f"Chain {bad} has learned nothing: its gates say nothing about the data")
    return lines


def _elbo(run: dict[str, Any]) -> list[str]:
    lines = [f"ELBO {'when gates were last sampled' if run['gates'] else 'at the end'}, nats:"]
    temperature = run["weight_temperature"]
    for chain, terms in enumerate(run["elbo_terms_nats"]):
        costs = []
        for name in COSTS:
            if name in terms:
                cold = name == "kl_adapter_weights" and temperature != 1
                costs.append(f"{f'{temperature:g} x ' if cold else ''}{name} {terms[name]:,.0f}")
        fit, total = terms["log_likelihood"], terms["sum"]
        less = f" less {', '.join(costs)}" if costs else ""
        lines.append(f"  chain {chain}: log_likelihood {fit:,.0f}{less}: {total:,.0f}")
    if run["weight_posterior"] == "delta":
        lines.append(POINT)
    if any("bops_cost" in terms for terms in run["elbo_terms_nats"]):
        lines.append(UNNORMALIZED)
    return lines


def _gates(run: dict[str, Any]) -> list[str]:
    lines = []
    for name, gates in run["gates"].items():
        lines.append(
            f"{name} gates: {gates['all']}, fixed open {gates['fixed_open']}, fixed closed "
            f"{gates['fixed_closed']}, as they would be without data {gates['unmoved']}"
        )
        if never := gates["never_trained"]:
            lines.append(
                f"{name} gates: in {never} of the {COUNTED[name]} they are where training began: "
                "they had too few steps, and agreement of restarts means nothing"
            )
    if moved := run["movement"]:
        changes = " and ".join(f"{name} by {m['change']:.2f}" for name, m in moved.items())
        rest = ""
        if any(min(m["share"], m["change"]) > RESTLESS for m in moved.values()):
            rest = (
                f", more than {RESTLESS:.0%} of its level: gates had not come to rest, give more "
                "--epochs or --joint_share"
            )
        lines.append(
            f"Over the last fifth of the joint steps a mean moved, of a layer's {changes}{rest}"
        )
    for name, agreement in run.get("restarts", {}).items():
        lines.append(
            f"restarts, {name}: total variation {agreement['mean_distance']:.3f} (largest "
            f"{agreement['largest_distance']:.3f}), {agreement['decided_alike']:.0%} decided alike"
        )
    return lines


def _short(layers: Iterable[str]) -> dict[str, str]:
    paths = list(layers)
    names = short_names([LayerSpec(path, 0, 0) for path in paths]) if paths else []
    return dict(zip(paths, names, strict=True))


def _collapsed(run: dict[str, Any], layers: Iterable[str]) -> list[str]:
    """Layers that probably have rank 0: one line each, or one for many of the same cause."""
    by_cause: dict[str, dict[str, dict[str, float]]] = {}
    short = _short(layers)
    for layer, why in run.get("collapsed", {}).items():
        by_cause.setdefault(_cause(why, nothing_learned(run)), {})[short[layer]] = why
    lines = []
    for cause, alike in by_cause.items():
        names = list(alike)
        if len(names) > NAMED:
            ends = [
                f"{min(values):{form}} to {max(values):{form}}"
                for key, form in (
                    ("probability", ".2f"), ("prior_log_odds", "+.1f"),
                    ("posterior_log_odds", "+.1f"),
                )
                for values in [[why[key] for why in alike.values()]]
            ]  # fmt: skip
            names = [f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more"]
        else:
            ends = []
        for name in names:
            probability, prior, posterior = ends or _odds(alike[name])
            lines.append(
                f"{name}: rank 0 with probability {probability}; log odds of a rank above it "
                f"{prior} a priori, {posterior} a posteriori: {cause}"
            )
    return lines


def _odds(why: dict[str, float]) -> list[str]:
    prior, margin = why["prior_log_odds"], 2 * why["prior_log_odds_error"]
    return [
        f"{why['probability']:.2f}",
        # none of the draws, or all, had a rank above 0: a bound, without an error
        f"beyond {prior:+.1f}" if why["prior_log_odds_bound"] else f"{prior:+.1f} ± {margin:.1f}",
        f"{why['posterior_log_odds']:+.1f}",
    ]


def _cause(why: dict[str, float], nothing: bool) -> str:
    prior, posterior = why["prior_log_odds"], why["posterior_log_odds"]
    if nothing:
        return "nothing was learned, so that the price decides"
    if abs(posterior - prior) <= 2 * why["prior_log_odds_error"]:
        return "as in the prior, as far as its draws tell"
    if posterior < prior:
        return "the data speak against any rank"
    return "prior and price outweigh the data"


def _table(layers: dict[str, Any]) -> list[str]:
    """One line a layer, in columns; none without gates."""
    if not layers:
        return []
    rows = []
    for layer, parts in zip(_short(layers).values(), layers.values(), strict=True):
        cells = {"rank": parts["rank"]} if "rank" in parts else {}
        cells |= parts.get("bits", {})
        described = (
            f"{n} {c['mean']:.1f} [{c['hdi'][0]}, {c['hdi'][1]}] ({c['prior_mean']:.1f})"
            for n, c in cells.items()
        )
        rows.append([layer, *described])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]

"""The report of a run: one self-contained HTML page with all pictures."""

from __future__ import annotations

import base64
import html
import inspect
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bayes_lora.inference.bundle import InferenceData
from bayes_lora.inference.description import ELSEWHERE
from bayes_lora.inference.heat_maps import plot_two_runs
from bayes_lora.inference.plots import PLOTS
from bayes_lora.inference.summary import NothingToShow

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1360px; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem }}
img {{ max-width: 100%; height: auto; display: block }}
pre {{ background: #f6f6f4; padding: 0.8rem 1rem; overflow-x: auto; font-size: 12px }}
pre.prose {{ white-space: pre-wrap }}
figcaption, p.note {{ color: #555; font-size: 13px; max-width: 46rem }}
details {{ margin: 0.4rem 0; overflow-x: auto }} summary {{ cursor: pointer; color: #31688e }}
td, th {{ padding: 0 0.6rem; font-size: 12px; text-align: right; white-space: nowrap }}
td:first-child {{ text-align: left }}
figure {{ margin: 0 0 1rem 0 }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def report(
    name: str,
    bundle: InferenceData,
    description: str,
    found: Mapping[str, Any],
    others: Mapping[str, InferenceData],
) -> str:
    """Lay a run out as a page: diagnosis, every picture, and comparisons with other runs.

    Parameters
    ----------
    name : str
        Of the run.
    bundle : InferenceData
        Of the run.
    description : str
        The diagnosis as text: prose, then perhaps an empty line and a table.
    found : mapping
        The diagnosis, `layers` and `beside`: what the comparison with each other run says.
    others : mapping of str to InferenceData
        Runs to show beside it, by name.

    Returns
    -------
    str
        HTML; pictures are inside.
    """
    prose, _, table = html.escape(description.replace(f"\n{ELSEWHERE}", "")).partition("\n\n")
    parts = [f'<pre class="prose">{prose}</pre>']
    if table:
        parts.append(f"<pre>{table}</pre>")
    parts += _probabilities(found["layers"])
    for title, plot in PLOTS.items():
        try:
            figure = plot(bundle)
        except NothingToShow:
            continue
        shown = f"<figure>{_picture(figure, title)}{_caption(plot)}</figure>"
        parts.append(f"<h2>{html.escape(title)}</h2>\n{shown}")
    for other, theirs in others.items():
        parts.append(f"<h2>Beside {html.escape(other)}</h2>")
        parts.append(f"<pre>{html.escape(found['beside'][other]['text'])}</pre>")
        try:
            short = PurePath(name).name, PurePath(other).name
            names = short if short[0] != short[1] else (name, other)
            picture = _picture(plot_two_runs(bundle, theirs, names), " and ".join(names))
            parts.append(f"<figure>{picture}{_caption(plot_two_runs)}</figure>")
        except ValueError as error:
            parts.append(_note(error))
    title = html.escape(f"Posterior of {name} ({bundle.attrs['task']})")
    return PAGE.format(title=title, body="\n".join(parts))


def _probabilities(layers: Mapping[str, Any]) -> list[str]:
    """P(rank <= k), and P(bits = b) of every tensor, the prior's in brackets; to unfold."""
    tables: dict[str, list[str]] = {}
    for layer, parts in layers.items():
        quantities = {"P(rank ≤ k)": parts["rank"]} if "rank" in parts else {}
        quantities |= {f"P(bits = b) of {t}": found for t, found in parts.get("bits", {}).items()}
        for title, quantity in quantities.items():
            posterior, prior = (
                np.array(list(quantity[name].values()))
                for name in ("probability", "prior_probability")
            )
            if "≤" in title:
                posterior, prior = posterior.cumsum(), prior.cumsum()
            cells = [f"{p:.2f} ({q:.2f})" for p, q in zip(posterior, prior, strict=True)]
            rows = tables.setdefault(title, [_table_row("th", ["", *quantity["probability"]])])
            rows.append(_table_row("td", [layer, *cells]))
    return [
        f"<details><summary>{title}, in brackets the prior's</summary>"
        f"<table>{''.join(rows)}</table></details>"
        for title, rows in tables.items()
    ]


def _table_row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _caption(plot: Callable[..., Figure]) -> str:
    """What its documentation says of the picture; what comes third is for who calls it."""
    said = " ".join((inspect.getdoc(plot) or "").split("\n\n")[:2])
    return f"<figcaption>{html.escape(' '.join(said.split()))}</figcaption>"


def _note(error: ValueError) -> str:
    return f'<p class="note">{html.escape(str(error))}</p>'


def _picture(figure: Figure, title: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'

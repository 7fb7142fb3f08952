"""The report of a run: one self-contained HTML page with all pictures."""

from __future__ import annotations

import base64
import html
import inspect
import io
from collections.abc import Mapping
from pathlib import PurePath

from matplotlib.figure import Figure

from bayes_lora.inference.bundle import InferenceData
from bayes_lora.inference.heat_maps import NothingToShow, plot_two_runs
from bayes_lora.inference.plots import PLOTS

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem }}
img {{ max-width: 100%; height: auto; display: block }}
pre {{ background: #f6f6f4; padding: 0.8rem 1rem; overflow-x: auto; font-size: 12px }}
pre.prose {{ white-space: pre-wrap }}
figcaption, p.note {{ color: #555; font-size: 13px; max-width: 46rem }}
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
    diagnosis: str,
    others: Mapping[str, InferenceData],
    beside: Mapping[str, str],
) -> str:
    """Lay a run out as a page: diagnosis, every picture, and comparisons with other runs.

    Parameters
    ----------
    name : str
        Of the run.
    bundle : InferenceData
        Of the run.
    diagnosis : str
        As text: prose, then perhaps an empty line and a table.
    others : mapping of str to InferenceData
        Runs to show beside it, by name.
    beside : mapping of str to str
        What the comparison with each of them says.

    Returns
    -------
    str
        HTML; pictures are inside.
    """
    prose, _, table = html.escape(diagnosis).partition("\n\n")
    parts = [f'<pre class="prose">{prose}</pre>']
    if table:
        parts.append(f"<pre>{table}</pre>")
    for title, plot in PLOTS.items():
        try:
            figure = plot(bundle)
        except NothingToShow:
            continue
        parts.append(_section(title, figure, (inspect.getdoc(plot) or "").split("\n\n")[0]))
    for other, theirs in others.items():
        parts.append(f"<h2>Beside {html.escape(other)}</h2>")
        parts.append(f"<pre>{html.escape(beside[other])}</pre>")
        try:
            short = PurePath(name).name, PurePath(other).name
            names = short if short[0] != short[1] else (name, other)
            parts.append(_picture(plot_two_runs(bundle, theirs, names)))
        except ValueError as error:
            parts.append(_note(error))
    title = html.escape(f"Posterior of {name} ({bundle.attrs['task']})")
    return PAGE.format(title=title, body="\n".join(parts))


def _section(title: str, figure: Figure, caption: str) -> str:
    note = html.escape(" ".join(caption.split()))
    return (
        f"<h2>{html.escape(title)}</h2>\n<figure>{_picture(figure)}"
        f"<figcaption>{note}</figcaption></figure>"
    )


def _note(error: ValueError) -> str:
    return f'<p class="note">{html.escape(str(error))}</p>'


def _picture(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="" src="data:image/png;base64,{data}">'

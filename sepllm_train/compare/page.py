"""The comparison as one HTML page that needs nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from sepllm_train.compare.tables import Table
from sepllm_train.metrics.flops import CONVENTIONS

CSS = """
:root { color-scheme: light dark;
  --ink: #1a1c1f; --quiet: #5d636b; --paper: #ffffff; --card: #f5f6f8; --grid: #d8dade; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --quiet: #a0a6ae; --paper: #15171a; --card: #1e2125; --grid: #3a3f46; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
.verdict { background: var(--card); border-left: 4px solid #1f77c9; border-radius: 4px; margin: 0;
  padding: .8rem 1rem; }
ul { padding-left: 1.2rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--quiet); font-weight: 600; }
.interval { display: block; color: var(--quiet); font-size: .85em; font-weight: 400; }
tbody th { font-weight: 600; }
figure { margin: 1.5rem 0 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 50rem; }
figcaption, .quiet { color: var(--quiet); font-size: .9rem; }
dt { font-weight: 600; margin-top: .8rem; }
dd { margin: .1rem 0 0; }
"""

METHOD = (
    "Losses are of the same held-out documents, in nats per token. A loss counts as reached the first time a "
    "validation point is at or below it; between neighbouring validation points loss, FLOPs, seconds and tokens are "
    "taken to move along a straight line. Ratios are to the first run named: below 1 means cheaper than it. Seconds "
    "are training time on the machine of the run, without validation and checkpoints. A run that reaches the loss "
    "before its last step still has learning rate to decay there: with a schedule that ends there it would probably "
    "have reached it earlier."
)

SEEDS = (
    "A variant holds the runs that differ only in their seed. Costs of a variant are geometric means over its runs, "
    "losses arithmetic ones. Ratios and differences to the first variant are taken between runs of the same seed, "
    "which read the data in the same order and are validated on the same sequences, and then averaged: ratios as "
    "logarithms, losses in nats as they are (a difference of two is the logarithm of a ratio of perplexities). The "
    "interval of n pairs is mean +- t s / sqrt(n), with their sample standard deviation s and the quantile t of "
    "Student's distribution with n - 1 degrees of freedom that leaves 2.5% on either side. It is of each variant "
    "alone, not corrected for the number of variants. When a run of a pair did not reach the loss no mean is claimed: "
    "what it spent in all bounds it."
)
TIMED = (
    "In place of the runs' own seconds stand steps times the seconds of a step from the timing file. "
    "The ratio of seconds is the paired ratio of steps times the ratio of the seconds of a step, a geometric mean over "
    "the rounds; the variances of both logarithms add up to its interval, with the degrees of freedom of Welch and "
    "Satterthwaite rounded down."
)

SCORED = (
    "Scores are of the tasks that each run was evaluated on while it trained, drawn over what training had spent by "
    "then; the evaluations themselves count as nothing. A score is left out unless all runs have it, of the same "
    "documents and examples. The standard error is that of the documents of one run, not of seeds."
)


def page(
    title: str,
    verdict: str,
    caveats: Sequence[str],
    tables: Sequence[Table],
    drawings: Sequence[tuple[str, str]],
    method: Sequence[str] = (METHOD,),
    legend: str = "",
) -> str:
    """HTML of the comparison; `drawings` are (title, SVG element), `legend` explains their lines."""
    notes = "".join(f"<li>{escape(caveat)}</li>" for caveat in caveats)
    figures = "".join(
        f'<figure role="img" aria-label="{escape(name)}">{drawing}</figure>' for name, drawing in drawings
    )
    paragraphs = "\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in method)
    words = "".join(f"<dt>flops/{key}</dt><dd>{escape(c.words)}</dd>" for key, c in CONVENTIONS.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="verdict">{escape(verdict)}</p>
{f"<ul>{notes}</ul>" if notes else ""}
{_table(tables[0])}
{figures}
<p class="quiet">{escape(legend)}</p>
{"".join(_table(table) for table in tables[1:])}
<h2>How FLOPs are counted</h2>
<dl>{words}</dl>
<h2>How the figures are made</h2>
{paragraphs}
</body>
</html>
"""


def _table(table: Table) -> str:
    """A table with its heading."""
    head = "".join(f'<th scope="col">{_title(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{_cell(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def _cell(text: str) -> str:
    """A cell, its interval in square brackets on a line of its own, so that wide tables fit."""
    return re.sub(r" (\[[^\]]*\])$", r' <span class="interval">\1</span>', escape(text))


def _title(text: str) -> str:
    """The title of a column, what stands in brackets on a line of its own."""
    return re.sub(r" ([\[(][^\])]*[\])])$", r' <span class="interval">\1</span>', escape(text))

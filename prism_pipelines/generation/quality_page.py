"""One page that colours the tokens of scored texts by their quality. No network, light and dark."""

from __future__ import annotations

import html
import json
from pathlib import Path

from ..sampling.token_states import LOW_QUALITY

MOST = 500  # rows of a page; with more, a browser becomes slow
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>@TITLE@</title><style>
:root {color-scheme: light dark; --worst: 220, 80, 20}
body {font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem}
p.text {font-family: ui-monospace, monospace; overflow-wrap: anywhere; margin: .2rem 0 1.2rem; line-height: 1.9}
h2 {font-size: 1rem; margin: 0; overflow-wrap: anywhere} h2 small {font-weight: normal; opacity: .75}
.q {background: rgba(var(--worst), calc((1 - var(--p)) * .8)); border-radius: 2px}
.low {text-decoration: underline 2px} .none {opacity: .5}
</style><h1>@TITLE@</h1>
<p>The stronger the colour, the less likely the token is right. Below @LOW@ it is underlined. Rest on a token for its
number and quality. <span class="q" style="--p:1">1.0</span> <span class="q" style="--p:.75">0.75</span>
<span class="q" style="--p:.5">0.5</span> <span class="q low" style="--p:.25">0.25</span>
<span class="q low" style="--p:0">0.0</span></p>
@ROWS@</html>
"""


def quality_page(path: str | Path, title: str = "Quality") -> str:
    """An HTML page for an output of `score_many`.

    Args:
        path: path of the output, a .jsonl file.
        title: heading; plain text.
    Returns:
        the page as a string. It shows the first 500 rows, and says so if there are more.
    """
    with Path(path).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    parts = [page_row(row) for row in rows[:MOST]]
    if len(rows) > MOST:
        parts.append(f"<p>The first {MOST} of {len(rows)} rows; the others are in {html.escape(Path(path).name)}.</p>")
    page = PAGE.replace("@LOW@", str(LOW_QUALITY)).replace("@TITLE@", html.escape(title))
    return page.replace("@ROWS@", "\n".join(parts))  # last, as a row may hold such a word


def page_row(row: dict) -> str:
    """Heading and coloured text of one row."""
    name = html.escape(str(row.get("header") or row["id"]))
    if row["error"] is not None:
        return f"<h2>{name}</h2><p>Not scored: {html.escape(row['error'])}</p>"
    told = f"mean {row['mean_quality']}, lowest {row['lowest_quality']} at {html.escape(str(row['lowest_token']))}"
    words = any(len(token.strip()) > 1 for token in row["tokens"])
    parts = []
    for number, (token, quality) in enumerate(zip(row["tokens"], row["quality"], strict=True), 1):
        apart = " " if words and not token.startswith("##") else ""
        text = html.escape(token.removeprefix("##").strip() if words else token)
        if quality is None:
            parts.append(f'{apart}<span class="none" title="{number}: mask">{text}</span>')
        else:
            low = " low" if quality < LOW_QUALITY else ""
            tip = f"{text} {number}: {quality}"
            parts.append(f'{apart}<span class="q{low}" style="--p:{quality}" title="{tip}">{text}</span>')
    return f'<h2>{name} <small>{told}</small></h2><p class="text">{"".join(parts)}</p>'

"""Write the tables of docs/performance.md from docs/figures/sampling*.json: no number in them is typed by hand.

Usage: python -m benchmarks.performance [--check]   (--check: exit 1 if the page is not what the tables give)
"""

from __future__ import annotations

import argparse
import json
import re
import sys

from benchmarks.shared import ROOT
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation.tables import markdown_table

PAGE = ROOT / "docs" / "performance.md"
COLUMNS = {
    "ms_per_step": ("ms a step", "{:.1f}"),
    "by_full": ("of full", "{:.2f}"),
    "by_block_floor": ("of block floor", "{:.2f}"),
    "by_row_floor": ("of row floor", "{:.2f}"),
    "total_by_inside": ("total / in model", "{:.2f}"),
    "extra_ms_per_step": ("extra ms a step", "{:.1f}"),
    "tokens_per_s": ("tokens/s", "{:.1f}"),
    "forwards_per_token": ("forwards a token", "{:.2f}"),
}


def section(table: dict) -> str:
    """The tables of one file, in Markdown."""
    settings, where = table["settings"], table["device"]
    where += f", {table['threads']} thread" if table["rows"][0]["peak_bytes"] is None else ""
    size = f"{settings['parameters'] / 1e6:,.0f} million parameters"
    lines = [
        f"{where}, torch {table['versions']['torch']}, commit `{table['commit']}`. Llama of {size} "
        f"({settings['layers']} layers of {settings['hidden']}), vocabulary {settings['vocabulary']:,}, "
        f"{settings['dtype']}, prompt {settings['prompt']}, block {settings['block']}, {settings['turns']} turns."
    ]
    for batch, generated in dict.fromkeys((row["batch"], row["generated"]) for row in table["rows"]):
        rows = [row for row in table["rows"] if (row["batch"], row["generated"]) == (batch, generated)]
        lines += ["", f"Batch {batch}, {generated} tokens in {rows[0]['forwards']} forwards:", ""]
        cells = [[row["arm"], *(form.format(row[name]) for name, (_, form) in COLUMNS.items())] for row in rows]
        lines.append(markdown_table(["", *(title for title, _ in COLUMNS.values())], cells, right=len(COLUMNS)))
        peaks = [row["peak_bytes"] for row in rows]
        if None not in peaks:
            lines += ["", f"Peak of GPU memory: {min(peaks) / 1e9:.1f} to {max(peaks) / 1e9:.1f} GB."]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with each part between `<!-- FILE -->` and `<!-- end -->` made anew."""

    def anew(found: re.Match) -> str:
        table = json.loads((ROOT / "docs" / "figures" / found[1]).read_text())
        return f"<!-- {found[1]} -->\n{section(table)}\n<!-- end -->"

    return re.sub(r"<!-- (\S+\.json) -->.*?<!-- end -->", anew, text, flags=re.DOTALL)


def main(argv=None) -> int:
    """Write or check the page. Returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file in place of writing it")
    args = parser.parse_args(argv)
    text = PAGE.read_text()
    if args.check:
        if page(text) != text:
            print(f"{PAGE} is not what the tables give: run `make results`", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(page(text))
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())

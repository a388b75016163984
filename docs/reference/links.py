"""Links that leave docs/ (to code, to CONTRIBUTING.md) work in the repository; the site shows their text alone."""

import re


def on_page_markdown(markdown, page, **_):
    """Called by mkdocs for every page."""
    up = page.file.src_uri.count("/") + 1
    return re.sub(rf"\[([^\]]+)\]\((?:\.\./){{{up}}}[^)]*\)", r"\1", markdown)

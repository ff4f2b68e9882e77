"""Cards as a web page, to be looked at before they are published; the style of the Hub is another."""

from __future__ import annotations

import html
import re

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 860px; margin: 2rem auto; color: #1f2937; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { border: 1px solid #d1d5db; padding: .3rem .6rem; }
th:empty { padding: 0; } pre { background: #f3f4f6; padding: .8rem; overflow-x: auto; font-size: 13px; }
code { background: #f3f4f6; font-size: 90%; } img { max-width: 100%; } h2 { border-bottom: 1px solid #e5e7eb; }
.meta { background: #eff6ff; border: 1px solid #bfdbfe; padding: .2rem 1rem; font-size: 13px; }
"""


def render_html(text: str) -> str:
    """Return a card as a page: the front matter as it stands in a box, then the text. Pictures stay relative.

    Raises:
        ValueError: the package `markdown` is missing.
    """
    try:
        from markdown import markdown
    except ImportError as error:
        raise ValueError("the package markdown is not installed; use pip install markdown") from error
    found = re.match(r"\A---\n(.*?)\n---\n(.*)\Z", text, re.DOTALL)
    head, body = found.groups() if found else ("", text)
    title = re.search(r"^# (.+)$", body, re.MULTILINE)
    page = markdown(body, extensions=["tables", "fenced_code"])
    name = html.escape(title.group(1) if title else "card")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
        f'<pre class="meta">{html.escape(head)}</pre>{page}</html>\n'
    )

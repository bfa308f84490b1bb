"""What a cell shows: MyST for the book, HTML for JupyterLab, from the same values."""

from __future__ import annotations

import html
import json
import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

VERDICTS = ("supported", "not supported", "inconclusive", "not attempted")
_MARKS = {"supported": "✓", "not supported": "✗", "inconclusive": "?", "not attempted": "–"}


@dataclass(frozen=True)
class Display:
    """Something to show: `markdown` (MyST) is what the book takes, `html` what JupyterLab takes."""

    markdown: str
    html: str

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"text/markdown": self.markdown, "text/html": self.html, "text/plain": self.markdown}


@dataclass(frozen=True)
class Table(Display):
    """A shown table, with the frame that it was drawn from."""

    frame: pd.DataFrame


def show(
    frame: pd.DataFrame,
    caption: str | None = None,
    *,
    name: str | None = None,
    formats: Mapping[str, str] | None = None,
) -> Table:
    """A table without index column, numbers formatted, that scrolls sideways on a phone.

    Strings are MyST (maths, links, citations). caption: numbers the table; name: its label for {numref},
    which needs a caption. formats: column -> format, as in {"loss": ".3f"}; other floats get four significant
    digits. Raises ValueError on an unknown column in `formats`, on an empty column name, on a name without
    caption.
    """
    formats = dict(formats or {})
    if wrong := [column for column in formats if column not in frame.columns]:
        raise ValueError(f"formats names {wrong}, but the columns are {list(frame.columns)}")
    if any(not str(column).strip() for column in frame.columns):
        raise ValueError("every column needs a name: a screen reader reads it out before each cell")
    if name and not caption:
        raise ValueError(f"only a table with a caption has a number that {name!r} could refer to")
    columns = [str(column) for column in frame.columns]
    rows = [
        [number(value, formats.get(column, "")) for column, value in zip(frame.columns, row, strict=True)]
        for row in frame.itertuples(index=False, name=None)
    ]
    right = [
        pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind) for kind in frame.dtypes
    ]
    return Table(
        _myst_table(columns, rows, right, caption, name), _html_table(columns, rows, right, caption), frame
    )


def number(value: object, form: str = "") -> str:
    """A value as a table shows it: four significant digits, intervals in brackets, – for nothing."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(number(part, form) for part in value)}]"
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str) or not isinstance(value, numbers.Number) and not hasattr(value, "item"):
        return str(value)
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if form:
        return format(value, form)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return str(int(value)) if value == int_or_none(value) and abs(value) < 10_000 else f"{value:.4g}"


def int_or_none(value: float) -> int | None:
    return int(value) if math.isfinite(value) and value == int(value) else None


def badge(verdict: str) -> str:
    """A verdict as inline HTML, for MyST and HTML alike: a sign and a word, so that colour is never alone."""
    return (
        f'<span class="verdict verdict-{verdict.replace(" ", "-")}">'
        f'<span aria-hidden="true">{_MARKS[verdict]}</span> {verdict}</span>'
    )


def inline_html(text: str) -> str:
    """A line of MyST as JupyterLab can show it: code, bold, links, badges; maths is left to MathJax."""
    shown = html.escape(text, quote=False)
    shown = re.sub(r"&lt;(/?span(?: [\w-]+=\"[\w -]*\")*)&gt;", r"<\1>", shown)
    shown = re.sub(r"\{[\w:]+\}`([^`]+)`", r"\1", shown)
    shown = re.sub(r"`([^`]+)`", r"<code>\1</code>", shown)
    shown = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", shown)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', shown)


def options(**given: str | None) -> str:
    """The option lines of a MyST directive, quoted so that no character of a value means anything."""
    return "".join(
        f":{key}: {json.dumps(' '.join(value.split()), ensure_ascii=False)}\n"
        for key, value in given.items()
        if value
    )


def _myst_table(columns, rows, right, caption, name) -> str:
    def line(cells):
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) or " " for cell in cells) + " |"

    rules = "|" + "|".join("---:" if numeric else "---" for numeric in right) + "|"
    pipe = "\n".join([line(columns), rules, *(line(row) for row in rows)])
    if caption:
        title = " ".join(caption.split())
        # Tildes: a fence of backticks could not have a citation in its title.
        pipe = f"~~~{{table}} {title}\n{options(name=name)}\n{pipe}\n~~~"
    return f"~~~~{{div}} table-scroll\n{pipe}\n~~~~"


def _html_table(columns, rows, right, caption) -> str:
    def cells(tag, texts):
        styles = [
            ' style="text-align: right"' if numeric else ' style="text-align: left"' for numeric in right
        ]
        opened = f'{tag} scope="col"' if tag == "th" else tag
        return "".join(
            f"<{opened}{style}>{inline_html(t)}</{tag}>" for style, t in zip(styles, texts, strict=True)
        )

    title = f"<caption>{inline_html(caption)}</caption>" if caption else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="table-scroll" style="overflow-x: auto"><table>{title}'
        f"<thead><tr>{cells('th', columns)}</tr></thead><tbody>{body}</tbody></table></div>"
    )

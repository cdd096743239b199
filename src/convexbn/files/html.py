"""One HTML page that needs nothing but itself: escaped text, tables of bounded length, pictures as inline SVG."""

from __future__ import annotations

import html
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NewType

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A fragment whose text is escaped.
Html = NewType("Html", str)

MAX_PICTURE_BYTES = 300_000
_MAX_TEXT, _MAX_ROWS, _MAX_COLUMNS = 2000, 200, 40
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff￾￿]")

_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "convexbn", "font.family": "sans-serif", "font.size": 11,
    "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True,
    "axes.prop_cycle": "cycler('color', ['0072b2', 'd55e00', '009e73', 'cc79a7', 'e69f00', '56b4e9', '000000'])",
    "legend.fontsize": 9.5, "legend.frameon": False,
}  # fmt: skip

_CSS = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 46rem; color: #1a1a1a; background: #fff;
  font: 1.05rem/1.55 Charter, Georgia, "Times New Roman", serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
p { margin: .6rem 0; }
.quiet, footer, figcaption, summary, dt { font-family: system-ui, sans-serif; font-size: .88rem; color: #555; }
.claim { border-left: 4px solid #767676; padding: 0 0 0 1rem; margin: 1rem 0; }
.claim p { margin: .15rem 0; }
.claim.holds { border-color: #0072b2; }
.claim.fails { border-color: #b34700; }
.word { font: 600 .78rem system-ui, sans-serif; letter-spacing: .04em; text-transform: uppercase; color: #555; }
.holds .word { color: #0072b2; }
.fails .word { color: #b34700; }
figure { margin: 1.8rem 0; }
figcaption { font-size: .95rem; color: #1a1a1a; margin-bottom: .4rem; }
figure svg { display: block; width: 100%; max-width: 40rem; height: auto; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font: .82rem/1.35 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e5e5e5; }
td.number, th.number { text-align: right; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .8rem 0; }
dd { margin: 0; min-width: 0; }
code { font-size: .85em; overflow-wrap: anywhere; }
footer { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: .8rem; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
"""


def styled() -> AbstractContextManager[None]:
    """Context of Matplotlib settings for a page: text stays text, and everybody can tell the colours apart."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def text(value: object, limit: int = _MAX_TEXT) -> Html:
    """Escape the text of a value, drop its control characters and bound its length.

    Examples
    --------
    >>> text("<script>" + chr(0)), text("a" * 9, limit=4)
    ('&lt;script&gt;', 'aaa…')
    """
    plain = _CONTROL.sub("", str(value))
    return Html(html.escape(plain if len(plain) <= limit else plain[: limit - 1] + "…"))


def paragraph(value: object, css: str = "") -> Html:
    """A paragraph of text."""
    attribute = f' class="{css}"' if css else ""
    return Html(f"<p{attribute}>{text(value)}</p>")


def facts(values: Mapping[str, object]) -> Html:
    """A list of names and values."""
    return Html("<dl>" + "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in values.items()) + "</dl>")


def folded(summary: str, parts: Iterable[Html]) -> Html:
    """Parts that a click on the summary shows."""
    return Html(f"<details><summary>{text(summary)}</summary>{''.join(parts)}</details>")


def table(rows: Sequence[Mapping[str, Any]], rest: str = "are left out") -> Html:
    """A table whose columns are the keys in order of appearance; a note that ends with ``rest`` counts what is cut."""
    columns, kept = list(dict.fromkeys(key for row in rows for key in row)), rows[:_MAX_ROWS]
    classes = {
        key: ' class="number"' if all(isinstance(row.get(key), int | float | None) for row in rows) else ""
        for key in columns[:_MAX_COLUMNS]
    }
    lines = ["".join(f"<th{css}>{text(key, 80)}</th>" for key, css in classes.items())]
    lines += [
        "".join(f"<td{css}>{text(shown(row.get(key)), 200)}</td>" for key, css in classes.items()) for row in kept
    ]
    cut = {"rows": len(rows) - len(kept), "columns": len(columns) - len(classes)}
    left_out = " and ".join(f"{number} {kind}" for kind, number in cut.items() if number)
    note = paragraph(f"{left_out} more {rest}.", "quiet") if left_out else ""
    return Html(f'<div class="scroll"><table>{"".join(f"<tr>{x}</tr>" for x in lines)}</table></div>{note}')


def picture(title: str, figure: Figure) -> Html:
    """A figure under its title, as inline SVG.

    If it exceeds ``MAX_PICTURE_BYTES``, its lines and points become an image; axes and text stay. ValueError is raised
    if it is still too large.
    """
    drawn = _svg(figure, title)
    if len(drawn.encode()) > MAX_PICTURE_BYTES:
        for axes in figure.axes:
            for artist in [*axes.lines, *axes.collections, *axes.images, *axes.patches]:
                artist.set_rasterized(True)
        drawn = _svg(figure, title)
    if (size := len(drawn.encode())) > MAX_PICTURE_BYTES:
        raise ValueError(f"the picture {title!r} takes {size} bytes, more than {MAX_PICTURE_BYTES}: draw fewer points.")
    return Html(f"<figure><figcaption>{text(title)}</figcaption>{drawn}</figure>")


def page(title: str, parts: Iterable[Html], footer: Iterable[Html] = ()) -> bytes:
    """The whole page, encoded in UTF-8.

    Parameters
    ----------
    title : str
    parts, footer : iterable of Html
    """
    document = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><title>{text(title)}</title><style>{_CSS}</style></head>\n'
        f"<body><main><h1>{text(title)}</h1>\n" + "\n".join(parts) + f"</main>\n<footer>{''.join(footer)}</footer>"
        "</body></html>\n"
    )
    return document.encode()


def shown(value: Any) -> str:
    """Format a value of a table, numbers to five digits.

    Examples
    --------
    >>> shown(0.123456789), shown(20000), shown(None), shown(True)
    ('0.12346', '20000', '', 'yes')
    """
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return f"{value:.5g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _svg(figure: Figure, title: str) -> str:
    """Draw the figure as one SVG element, whose identifiers no other picture of the page has."""
    stream = io.BytesIO()
    with styled():
        figure.savefig(stream, format="svg", dpi=110, metadata={"Date": None})
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(_CONTROL.sub("", stream.getvalue().decode()))
    for metadata in root.findall("{http://www.w3.org/2000/svg}metadata"):
        root.remove(metadata)
    _make_own(root, re.sub(r"\W+", "-", title.lower())[:40])
    del root.attrib["width"], root.attrib["height"]
    root.attrib.update({"role": "img", "aria-label": _CONTROL.sub("", title)[:_MAX_TEXT]})
    return ElementTree.tostring(root, encoding="unicode")


def _make_own(root: ElementTree.Element, prefix: str) -> None:
    """Prefix the identifiers that the picture refers to, and drop the others."""
    link = "{http://www.w3.org/1999/xlink}href"
    used = {e.get(link, "")[1:] for e in root.iter()}
    used |= {name for e in root.iter() for v in e.attrib.values() for name in re.findall(r"url\(#([^)]+)\)", v)}
    for element in root.iter():
        if (name := element.attrib.pop("id", None)) in used:
            element.set("id", f"{prefix}-{name}")
        for key, value in element.attrib.items():
            own = key == link and value.startswith("#")
            element.set(key, f"#{prefix}-{value[1:]}" if own else value.replace("url(#", f"url(#{prefix}-"))

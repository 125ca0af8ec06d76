"""The parts of a page: text in, HTML out. Whatever comes in is escaped here and nowhere else; and the page's style."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

SHORT = 20  # longest name inside a figure; tables show it whole


def visible(text: str) -> str:
    """The text with each character that nobody sees (control, bidi, half a surrogate) replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def short(name: str, size: int = SHORT) -> str:
    """The visible name, its middle left out where it is too long for a figure."""
    name = visible(name)
    return name if len(name) <= size else f"{name[: size - 7]}…{name[-6:]}"


class Markup(str):
    """HTML that is safe already: what `escaped` leaves alone."""


def escaped(value: Any) -> str:
    return value if isinstance(value, Markup) else html.escape(visible(str(value)))


def show(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def document(title: str, parts: Iterable[str]) -> str:
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"<head>{meta}<title>{escaped(title)}</title><style>{CSS}</style></head>"
    return f'<!doctype html>\n<html lang="en">{head}<body><main>{"".join(parts)}</main></body></html>\n'


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escaped(title)}</h2>{''.join(parts)}</section>"


def heading(text: str) -> str:
    return f"<h3>{escaped(text)}</h3>"


def note(text: str) -> str:
    return f"<p class=note>{escaped(text)}</p>"


def banner(kind: str, title: str, text: str) -> str:
    """kind: private, danger or warning."""
    return f"<p class={kind}><b>{escaped(title)}</b> {escaped(text)}</p>"


def code(text: str) -> str:
    """Lines to be copied as they are."""
    listed = (escaped(line) for line in text.splitlines())
    return f"<pre>{chr(10).join(listed)}</pre>"


def bullets(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escaped(item)}</li>' for item in items)}</ul>"


def facts(items: Iterable[tuple[str, str]]) -> str:
    listed = (f"<div><dt>{escaped(a)}</dt><dd>{escaped(b)}</dd></div>" for a, b in items)
    return f"<dl class=facts>{''.join(listed)}</dl>"


def cards(items: Iterable[tuple[str, str, str]]) -> str:
    """What it is, the number, what there is to say about it."""
    listed = (f"<div><dt>{escaped(a)}</dt><dd><b>{escaped(b)}</b>{escaped(c)}</dd></div>" for a, b, c in items)
    return f"<dl class=cards>{''.join(listed)}</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, left: int = 1, kind: str = "") -> str:
    """left: how many columns are text; the others are numbers, aligned at the right."""

    def line(row: Sequence[Any], tag: str) -> str:
        cells = (f"<{tag}{'' if i < left else ' class=n'}>{escaped(cell)}</{tag}>" for i, cell in enumerate(row))
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide {kind}"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def bar(share: float, text: str) -> Markup:
    """A cell with a bar of this share behind its text."""
    return Markup(f'<span class=share style="--share:{min(1.0, share):.1%}">{escaped(text)}</span>')


def heat(share: float, text: str) -> Markup:
    """A cell that is the darker the larger its share."""
    return Markup(f'<span class=heat style="--share:{0.6 * share:.1%}">{escaped(text)}</span>')


def details(summary: str, content: str) -> str:
    return f"<details><summary>{escaped(summary)}</summary>{content}</details>"


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escaped(caption)}</figcaption></figure>"


def pair(*parts: str, kind: str = "") -> str:
    return f'<div class="pair {kind}">{"".join(parts)}</div>'


def legend(items: Iterable[tuple[str, str, str]], last: str) -> str:
    """Colour, glyph and name of each; last: what the black bar means."""
    listed = (f'<li><i style="color:{colour}">{glyph}</i> {escaped(name)}</li>' for colour, glyph, name in items)
    return f"<ul class=legend>{''.join(listed)}<li><i class=bar></i> {escaped(last)}</li></ul>"


CSS = """
*{box-sizing:border-box}
body{margin:0;background:#fff;color:#1b1f24;font:14px/1.5 "Helvetica Neue",Helvetica,Arial,"Liberation Sans",sans-serif}
main{max-width:1128px;margin:0 auto;padding:28px 24px 40px}
h1{font-size:26px;margin:0 0 14px}
h2{font-size:18px;margin:0 0 10px;padding-top:20px;border-top:1px solid #d5dadf}
h3{font-size:14px;margin:16px 0 6px}
section{margin-top:26px}
p,ul{margin:0 0 10px;max-width:104ch}
ul{padding-left:20px}
.private,.danger,.warning{max-width:none;padding:10px 14px;border-left:5px solid #0072b2;background:#eef6fb}
.warning{border-color:#b26a00;background:#fff1d6}
.danger{border:0;padding:14px 18px;background:#b3261e;color:#fff}
.danger b{display:block;font-size:24px;letter-spacing:.06em}
dl{margin:0}dd{margin:0}
.facts div{display:grid;grid-template-columns:110px 1fr;padding:2px 0}
dt,.note,figcaption,footer{color:#5c6670}
dd{overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(3,1fr);gap:12px}
.cards div{border:1px solid #d5dadf;border-radius:6px;padding:12px 14px}
.cards dd{font-size:13px;color:#5c6670}
.cards b{display:block;font-size:26px;line-height:1.3;color:#1b1f24}
figure{margin:0;min-width:0;break-inside:avoid}
figcaption{font-size:13px;margin:4px 0 10px}
svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:24px;align-items:start}
.uneven{grid-template-columns:636fr 420fr}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;padding:0;max-width:none;font-size:13px}
.legend i{font-style:normal}
.legend .bar{display:inline-block;width:3px;height:12px;background:#1b1f24;vertical-align:-1px;margin:0 3px}
.wide{overflow-x:auto;margin-bottom:10px}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:4px 18px 4px 0;border-bottom:1px solid #e3e7eb}
th{font-weight:600;border-bottom-color:#9aa3ab}
.n{text-align:right}
.share{display:inline-block;min-width:110px;padding:0 4px;
background:linear-gradient(90deg,#9cc9e3 var(--share),#eef1f4 var(--share))}
.heat{display:block;text-align:center;padding:4px 10px;margin:-4px -18px -4px 0;min-width:86px;
background:color-mix(in srgb,#0072b2 var(--share),#fff)}
.reasons td{overflow-wrap:anywhere;min-width:60px}
.chain td+td+td{overflow-wrap:anywhere;min-width:190px;font-family:monospace;font-size:11px}
details{margin:6px 0}
summary{cursor:pointer;color:#005a8d;font-size:13px}
.settings{columns:3;column-gap:32px}
.settings div{break-inside:avoid}.settings table{width:100%}
pre{margin:0 0 10px;padding:10px 14px;background:#f4f6f8;font-size:12px;line-height:1.4;white-space:pre-wrap}
.terms td:first-child{white-space:nowrap;font-weight:600}.terms td{overflow-wrap:anywhere}
.half{max-width:600px}
.sign{display:grid;grid-template-columns:1fr 1fr;gap:26px 40px;margin-top:18px;font-size:12px;color:#5c6670}
.sign span{display:block;height:44px;border-bottom:1px solid #1b1f24;margin-bottom:3px}
footer{margin-top:28px;font-size:12px;overflow-wrap:anywhere}
@media print{
@page{size:A4;margin:14mm}
body{font-size:11px}
main{padding:0}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
h2,h3,summary{break-after:avoid}
tr,.cards div,.sign,pre,.private,.danger,.warning{break-inside:avoid}
table{font-size:9px}th,td{padding-right:8px}
.wide{overflow:visible}
pre{font-size:8.5px}.half{max-width:400px}
.uneven{grid-template-columns:1fr;gap:4px}.uneven figure:last-child svg{max-width:420px}
figcaption,.cards dd,.legend,summary{font-size:10px}
details::details-content{content-visibility:visible;height:auto;display:block}
}
"""

"""A hook of mkdocs: formulas become MathML when the site is built, so that a page needs no script to show them."""

import html
import re

from latex2mathml.converter import convert


def on_page_content(content, **_):
    return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', _as_mathml, content, flags=re.DOTALL)


def _as_mathml(found):
    _, bracket, formula = found.groups()
    return convert(html.unescape(formula).strip(), display="block" if bracket == "[" else "inline")

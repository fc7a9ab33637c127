"""HTML built as a tree: every text is escaped when the tree is written, whoever wrote the text."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement, tostring

Child = str | Element


def element(name: str, *children: Child, **attributes: str) -> Element:
    """An element with text and elements inside.

    Args:
        name: of the tag.
        children: texts are escaped when the tree is written.
        attributes: a `_` at the end of a name is dropped, for names that Python reserves.
    """
    made = Element(name, {key.rstrip("_"): value for key, value in attributes.items()})
    for child in children:
        _append(made, child)
    return made


def _append(parent: Element, child: Child) -> None:
    if isinstance(child, Element):
        parent.append(child)
    elif len(parent):
        parent[-1].tail = (parent[-1].tail or "") + child
    else:
        parent.text = (parent.text or "") + child


def page(title: str, style: str, *body: Child) -> bytes:
    """A whole page that loads nothing: its policy allows its own style and inline pictures, and no script.

    Args:
        title: of the page.
        style: CSS.
        body: what to show.
    """
    html = element("html", lang="en")
    head = SubElement(html, "head")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head.extend(
        [
            element("meta", charset="utf-8"),
            Element("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
            element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
            element("title", title),
            element("style", style),
        ]
    )
    html.append(element("body", *body))
    # Lone surrogates, which a model's answer may hold, have no UTF-8.
    return b"<!doctype html>\n" + tostring(html, encoding="unicode", method="html").encode("utf-8", "replace")

"""Templates to pages: HTML is escaped by Jinja, Markdown by `escape_markdown`."""

import re
from html import escape
from pathlib import Path

import jinja2

from neoflix.runtime.console import printable

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **values) -> str:
    """Fills in a template. In HTML all values are escaped; for Markdown the caller escapes them."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(("html.jinja",)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


def escape_markdown(text: str) -> str:
    """The text on one line, without control characters, and with all that Markdown or HTML would interpret escaped."""
    return re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", escape(" ".join(printable(text).split()), quote=False))

"""What comes from a run is text, in HTML and in Markdown."""

from neoflix.reporting.render import escape_markdown, render


def test_html_is_escaped():
    page = render("comparison.html.jinja", title="<b>&", names=[], plots=[], settings={}, figures={}, mark="<!-- x -->")
    assert "&lt;b&gt;&amp;" in page
    assert "<b>" not in page
    assert "<!-- x -->" in page


def test_markdown_is_escaped():
    assert escape_markdown("a *b* `c` [d](e) _f_ # | ~ $ \\") == r"a \*b\* \`c\` \[d\](e) \_f\_ \# \| \~ \$ \\"
    assert escape_markdown("<script>\n\x1b[2J") == r"&lt;script&gt; \[2J"

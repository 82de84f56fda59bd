"""The texts of a request as HTML."""

import base64
import html

from neoflix.runtime.console import printable
from neoflix.sampling.sampler import Sample
from neoflix.web.twins import Twin, Twins
from neoflix.web.writer import Progress

CSS = """
.nf-status {margin: 0 0 .6rem; color: var(--body-text-color-subdued); min-height: 1.5em}
.nf-error {color: var(--error-text-color, #b91c1c); font-weight: 600; overflow-wrap: anywhere}
.nf-card {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .7rem .9rem; margin: 0 0 .7rem;
  background: var(--block-background-fill); overflow-wrap: anywhere; line-height: 1.5}
.nf-card p {margin: 0; white-space: pre-wrap}
.nf-pair {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); gap: .5rem 1.2rem}
.nf-fields, .nf-cut {color: var(--body-text-color-subdued); font-size: .85em}
.nf-fields {margin-bottom: .3rem}
.nf-twin {border-left: 3px solid #d97706; padding-left: .7rem}
.nf-mark {display: inline-block; background: #fef3c7; color: #78350f; border-radius: 4px; padding: 0 .4rem;
  font-size: .85em; font-weight: 600; margin-bottom: .2rem}
.nf-growing::after {content: "\\2588"; animation: nf-blink 1s steps(2) infinite; color: var(--color-accent)}
@keyframes nf-blink {50% {opacity: 0}}
.nf-download {display: inline-block; padding: .5rem 1rem; border-radius: 8px; text-decoration: none;
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color) !important}
"""


READY = '<p class="nf-status">The texts appear here while they are written.</p>'


def draw(progress: Progress, twins: Twins) -> str:
    """A request: how far it is, its texts with their marks, and a link to download them."""
    is_writing = progress.state == "writing"
    begun = [
        (number, sample) for number, sample in enumerate(progress.samples) if sample.num_tokens or sample.finish_reason
    ]
    cards = [_card(sample, progress.twins.get(number), is_writing) for number, sample in begun]
    download = _download(progress) if progress.finished and not is_writing else ""
    return _status(progress, twins) + "".join(cards) + download


def _status(progress: Progress, twins: Twins) -> str:
    if progress.error:
        return f'<p class="nf-status nf-error" role="alert">{_escape(progress.error)}</p>'
    num, num_done = len(progress.samples), len(progress.finished)
    if progress.state == "writing":
        words = f"Writing: {num_done} of {num} finished" if num else "Writing …"
    else:
        head = _count(num, "text") if progress.state == "done" else f"Stopped after {num_done} of {_count(num, 'text')}"
        words = f"{head}, seed {progress.seed}. {_verdict(progress, twins)}"
    return f'<p class="nf-status" role="status">{_escape(words)}</p>'


def _verdict(progress: Progress, twins: Twins) -> str:
    if twins.problem or not progress.twins:
        return ""
    found = [twin for twin in progress.twins.values() if twin]
    num_copies = sum(twin.is_copy for twin in found)
    kinds = {"copy": num_copies, "near duplicate": len(found) - num_copies}
    named = (
        " and ".join(_count(number, kind) for kind, number in kinds.items() if number) or "No copy or near duplicate"
    )
    return f"{named} of the {len(twins.texts):,} training texts."


def _count(number: int, noun: str) -> str:
    plural = noun if number == 1 else noun.removesuffix("y") + "ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {plural}"


def _card(sample: Sample, twin: Twin | None, is_writing: bool) -> str:
    fields = " · ".join(f"{_escape(name)}: {_escape(value)}" for name, value in (sample.fields or {}).items())
    head = f'<div class="nf-fields">{fields}</div>' if fields else ""
    text, cut = sample.text, ""
    if sample.finish_reason is None:
        text = text.rstrip("\ufffd")  # half a character: its other bytes are still to come
        cut = "" if is_writing else '<span class="nf-cut"> … stopped</span>'
    elif sample.finish_reason == "length":
        cut = f'<span class="nf-cut"> … cut after {_count(sample.num_tokens, "token")}</span>'
    growing = ' class="nf-growing"' if is_writing and sample.finish_reason is None else ""
    written = f"<div>{head}<p{growing}>{_escape(text)}{cut}</p></div>"
    return f'<div class="nf-card"><div class="nf-pair">{written}{_beside(twin)}</div></div>'


def _beside(twin: Twin | None) -> str:
    if twin is None:
        return ""
    mark = "Copy of a training text" if twin.is_copy else "Near duplicate of a training text"
    return f'<div class="nf-twin"><span class="nf-mark">{mark}</span><p>{_escape(twin.text)}</p></div>'


def _download(progress: Progress) -> str:
    """A link that holds the file itself, so that nothing is left on disk."""
    data = base64.b64encode(progress.jsonl.encode(errors="surrogatepass")).decode()
    link = f'href="data:application/jsonl;base64,{data}" download="samples-{progress.seed}.jsonl"'
    return f'<a class="nf-download" {link}>Download as JSONL</a>'


def _escape(text: str) -> str:
    """Text for HTML that Gradio also reads as a template: `{` and `$` are escaped too."""
    return html.escape(printable(text)).replace("{", "&#123;").replace("$", "&#36;")

"""The page: what is to be written on the left, the texts on the right; on a phone one below the other."""

from collections.abc import Iterator

import gradio as gr

from neoflix.data.template import Template
from neoflix.web.cards import CSS, READY, draw
from neoflix.web.twins import Twins
from neoflix.web.writer import MOST_TEXTS, Writer

PAGE_CSS = (
    CSS
    + """
.gradio-container {max-width: 1100px !important}
.gradio-container .main {padding: clamp(.6rem, 2vw, 1.5rem) !important}
#texts .html-container {padding: 0}
footer {display: none !important}
"""
)
HOW_FIELDS = {
    True: "What you leave empty, the model writes itself.",
    False: "What you leave empty is taken from a training text.",
}


def make_theme() -> gr.themes.Base:
    """Gradio's own, with small print dark enough to read, and with a bold font that has every letter."""
    grey, light_grey = "*neutral_600", "*neutral_300"
    fonts = [gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "sans-serif"]  # 600 is a subset
    return gr.themes.Default(font=fonts).set(
        body_text_color_subdued=grey,
        body_text_color_subdued_dark=light_grey,
        block_info_text_color=grey,
        block_info_text_color_dark=light_grey,
        block_label_text_color=grey,
    )


def make_page(
    writer: Writer, twins: Twins, name: str, prompt: str | dict, shown: dict, template: Template | None
) -> gr.Blocks:
    """Builds the page.

    Args:
        name: of the model.
        prompt: what the boxes hold at first: the beginning of a text, or fields.
        shown: the first values of temperature, top_p, num_samples and seed.
        template: the model's, if `prompt` is in fields.
    """
    with gr.Blocks(title=f"neoflix: {name}", analytics_enabled=False) as page:
        gr.Markdown(f"# Try the model in {name}")
        if twins.problem:
            gr.Markdown(f"Copies of training texts are not marked: {twins.problem}")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                boxes = _prompt_boxes(prompt, template)
                numbers = _number_boxes(shown)
                with gr.Row():
                    go = gr.Button("Write", variant="primary", min_width=100)
                    stop = gr.Button("Stop", min_width=100)
            with gr.Column(scale=3, min_width=300):
                texts = gr.HTML(READY, elem_id="texts")
        _connect(writer, twins, boxes, numbers, (go, stop), texts, template)
    return page


def _prompt_boxes(prompt: str | dict, template: Template | None) -> list[gr.Textbox]:
    if template is None:
        info = "Each text goes on from here. Empty: the model begins."
        return [gr.Textbox(prompt, label="Beginning", info=info, lines=2, max_lines=8)]
    gr.Markdown(HOW_FIELDS[template.learns_prompt])
    return [gr.Textbox(prompt.get(name, ""), label=name, lines=1, max_lines=3) for name in template.fields]


def _number_boxes(shown: dict) -> list[gr.Number | gr.Textbox]:
    with gr.Row():
        numbers = [
            gr.Number(shown["temperature"], label="Temperature", info="Higher: bolder", step=0.1, min_width=130),
            gr.Number(shown["top_p"], label="Top p", info="Lower: safer words", step=0.05, min_width=130),
        ]
    with gr.Row():
        return [
            *numbers,
            gr.Number(shown["num_samples"], label="Texts", info=f"1 to {MOST_TEXTS}", step=1, min_width=130),
            # A Number cannot be empty: it would show 0.
            gr.Textbox(shown["seed"], label="Seed", info="Empty: a new one", max_lines=1, min_width=130),
        ]


def _connect(
    writer: Writer,
    twins: Twins,
    boxes: list[gr.Textbox],
    numbers: list[gr.Number | gr.Textbox],
    buttons: tuple[gr.Button, gr.Button],
    texts: gr.HTML,
    template: Template | None,
) -> None:
    """A request first ends the one before, then waits in the queue until that has ended."""

    def write(*values) -> Iterator[str]:
        words, (temperature, top_p, num_samples, seed) = values[: len(boxes)], values[len(boxes) :]
        prompt = dict(zip(template.fields, words, strict=True)) if template else words[0]
        for progress in writer.write(prompt, num_samples, seed, temperature=temperature, top_p=top_p):
            yield draw(progress, twins)

    go, stop = buttons
    triggers = [go.click, *(box.submit for box in [*boxes, *numbers])]
    begin = gr.on(triggers, writer.stop, queue=False, show_progress="hidden", api_name=False)
    begin.then(
        write,
        [*boxes, *numbers],
        texts,
        concurrency_limit=1,
        trigger_mode="multiple",
        show_progress="hidden",
        api_name="write",
    )
    stop.click(writer.stop, queue=False, show_progress="hidden", api_name="stop")

"""Serves the page on this machine only."""

import os
import sys
import threading
import webbrowser
from pathlib import Path

from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.runtime.watchdog import end_process
from neoflix.sampling.sampler import Sampler
from neoflix.web.twins import Twins
from neoflix.web.writer import Writer

HOST = "127.0.0.1"
ON_THE_PAGE = ("temperature", "top_p")  # settings that a request chooses


def serve(args, model_dir: Path, sampler: Sampler, prompt: str | dict) -> None:
    """Opens the page and serves it until Ctrl-C.

    Args:
        args: `generate.py`'s; its sampling settings are those of the page, or its first ones.
        prompt: what the page's boxes hold at first.

    Raises:
        UserError: if the port is in use.
    """
    keep_to_this_machine()
    from neoflix.web.page import PAGE_CSS, make_page, make_theme  # Gradio reads the environment when it is imported

    twins = Twins.of_run(args)
    settings = sampler.settings(
        **{name: value for name, value in args.sampling.items() if name not in ("seed", "batch_size")}
    )
    shown = {name: settings.pop(name) for name in ON_THE_PAGE} | {"num_samples": args.num_samples, "seed": args.seed}
    writer = Writer(sampler, twins, settings | {"batch_size": args.batch_size})
    template = sampler.template if isinstance(prompt, dict) else None
    page = make_page(writer, twins, model_dir.resolve().name, prompt, shown, template)
    try:
        page.launch(
            server_name=HOST,
            server_port=args.web_port,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            theme=make_theme(),
            css=PAGE_CSS,
        )
    except OSError as error:
        raise UserError(_busy(args.web_port)) from error
    say(f"The page is at {page.local_url} (on this machine only; Ctrl-C ends it)")
    if has_display():
        webbrowser.open(page.local_url)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        end_process(130)  # without waiting for texts that nobody will read


def _busy(port: int | None) -> str:
    if port is None:
        return "--web: none of Gradio's ports is free; choose one with --web_port"
    return f"--web_port {port}: is in use or not allowed; choose another, or leave it out"


def keep_to_this_machine() -> None:
    """Stops Gradio from counting users, asking for its newest version and reaching its own page through a proxy."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST]))


def has_display() -> bool:
    """Whether a browser can open a window; without one Python would start a browser in the terminal."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))

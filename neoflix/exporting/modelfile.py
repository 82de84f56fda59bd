"""The Modelfile that tells Ollama how to sample from a GGUF file.

Source: Ollama's Modelfile reference, https://docs.ollama.com/modelfile.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from neoflix.data.template import find_template
from neoflix.exporting.gguf_vocabulary import list_never_sampled

MOST_CONTEXT = 2048  # tokens: the cache of keys and values for a whole context can be larger than the model


def write_modelfile(
    path: Path, gguf: str, tokenizer: PreTrainedTokenizerBase, settings: dict, context_length: int
) -> None:
    """Writes a Modelfile beside the GGUF file of the name `gguf`. The prompt is the beginning of the text, without a
    chat around it. Ollama has no setting for tokens that must not be sampled: it ends the text at one.

    Args:
        settings: the sampling settings, by generate.py's names.
    """
    stops = [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(list_never_sampled(tokenizer))]
    parameters = {
        "temperature": settings["temperature"],
        "top_k": settings["top_k"],
        "top_p": settings["top_p"],
        "min_p": 0,
        "repeat_penalty": settings["repetition_penalty"],
        "repeat_last_n": -1,  # the whole text
        "num_predict": settings["max_new_tokens"],
        "num_ctx": min(context_length, MOST_CONTEXT),
    }
    lines = [f"# ollama create {path.stem} -f {path.name}", *describe_prompt(tokenizer), f"FROM ./{gguf}"]
    lines += ['TEMPLATE "{{ .Prompt }}"', *(f'PARAMETER stop "{stop}"' for stop in stops if stop)]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def describe_prompt(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Lines on the form of a prompt, for a model that was trained with a template; otherwise none."""
    template = find_template(tokenizer)
    if template is None:
        return []
    prompt = template.prompt({name: f"{{{name}}}" for name in template.fields})
    return [f"# {line}" for line in f"A prompt has this form: {prompt}".splitlines()]

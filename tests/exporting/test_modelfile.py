"""The Modelfile for Ollama."""

from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.data.template import Template, attach_template
from neoflix.exporting.modelfile import write_modelfile


def lines_of(path, tokenizer, context_length=256, **settings) -> list[str]:
    write_modelfile(path, "my model.gguf", tokenizer, SAMPLING_DEFAULTS | settings, context_length)
    return path.read_text().splitlines()


def test_it_has_the_runs_settings(tokenizer, tmp_path):
    lines = lines_of(tmp_path / "a.Modelfile", tokenizer, top_k=40, repetition_penalty=1.1, max_new_tokens=50)
    assert lines[:3] == ["# ollama create a -f a.Modelfile", "FROM ./my model.gguf", 'TEMPLATE "{{ .Prompt }}"']
    stops = [line.removeprefix("PARAMETER stop ") for line in lines if line.startswith("PARAMETER stop")]
    assert stops == ['"<|endoftext|>"', '"<|startoftext|>"', '"<|pad|>"']
    parameters = dict(line.split()[1:] for line in lines if line.startswith("PARAMETER") and " stop " not in line)
    assert {name: float(value) for name, value in parameters.items()} == {
        **{"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0},
        **{"repeat_penalty": 1.1, "repeat_last_n": -1, "num_predict": 50, "num_ctx": 256},
    }


def test_a_long_context_is_not_reserved(tokenizer, tmp_path):
    assert "PARAMETER num_ctx 2048" in lines_of(tmp_path / "a.Modelfile", tokenizer, context_length=131_072)


def test_the_form_of_a_prompt(tokenizer, tmp_path):
    attach_template(tokenizer, Template("{genre} | {title}:\n{plot}"))
    assert "# A prompt has this form: {genre} | {title}:" in lines_of(tmp_path / "a.Modelfile", tokenizer)
    attach_template(tokenizer, Template("{genre}\n{title}: {plot}"))
    lines = lines_of(tmp_path / "b.Modelfile", tokenizer)
    assert lines[1:3] == ["# A prompt has this form: {genre}", "# {title}:"]
    attach_template(tokenizer, None)

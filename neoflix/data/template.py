"""Templates: what is known of a text in front of it, so that a model writes for what it is told. A leaf.

    {type} | {listed_in} | {title}: {description}

The last field is the text, learnt and written; the fields before it make its prompt. Space at the prompt's end
belongs to the text, as it does where GPT-2's vocabulary splits: prompts and texts are made into tokens each by itself,
so that a prompt is the same tokens in training and in sampling.

In a prompt a field is one line, and what looks like a separator in it has a backslash in front (`Alien\\: Covenant`):
where a field ends is never in doubt. A row without a field leaves its place empty.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from string import Formatter

from neoflix.runtime.errors import UserError

NUM_ROWS = 500  # of a data set, whose fields are kept with the model, to draw from: 20 to 60 KB


KEY = "text_template"  # in tokenizer_config.json


class PromptedText(str):
    """A whole text, of which the first `prompt_length` characters are its prompt."""

    prompt_length: int

    def __new__(cls, prompt: str, text: str):
        whole = super().__new__(cls, prompt + text)
        whole.prompt_length = len(prompt)
        return whole


def parts(text: str) -> tuple[str, str]:
    """(prompt, what is written for it); of a text without a prompt, ("", text)."""
    length = getattr(text, "prompt_length", 0)
    return text[:length], text[length:]


@dataclass(frozen=True)
class Template:
    """A pattern such as "{title}: {description}", and what it takes to fill it in where a field is not given.

    Args:
        learns_prompt: whether the model was trained to write the fields too (`--loss_on_prompt`).
        rows: fields of some rows that it was trained on, each as long as `fields`.
    """

    pattern: str
    learns_prompt: bool = False
    rows: list[list[str]] = field(default_factory=list)

    def __post_init__(self):
        """Raises UserError for a malformed pattern."""
        try:
            pieces = list(Formatter().parse(self.pattern))
        except ValueError as error:
            raise UserError(f"--template {self.pattern!r}: {error}; a brace that is text is written twice") from None
        names = [name for _, name, _, _ in pieces if name is not None]
        if len(names) < 2 or not all(names):
            raise UserError(
                f"--template {self.pattern!r}: must name two columns or more, as in '{{title}}: {{description}}'"
            )
        if any(spec or conversion for _, _, spec, conversion in pieces):
            raise UserError(f"--template {self.pattern!r}: braces hold a column's name and nothing else")
        if len(set(names)) < len(names):
            raise UserError(f"--template {self.pattern!r}: names a column twice")
        if pieces[-1][1] is None:
            raise UserError(
                f"--template {self.pattern!r}: must end with the column of the texts; {pieces[-1][0]!r} follows it"
            )
        for before, name, _, _ in pieces[1:]:
            if not before.strip() and "\n" not in before:
                raise UserError(
                    f"--template {self.pattern!r}: between {{{names[names.index(name) - 1]}}} and {{{name}}} there "
                    "must be a separator, such as ' | '"
                )

    @cached_property
    def _pieces(self) -> list[tuple[str, str]]:
        return [(before, name) for before, name, _, _ in Formatter().parse(self.pattern)]

    @property
    def fields(self) -> list[str]:
        """Columns of the prompt, in its order."""
        return [name for _, name in self._pieces[:-1]]

    @property
    def text_field(self) -> str:
        """The column that is learnt and written."""
        return self._pieces[-1][1]

    @cached_property
    def _separators(self) -> list[str]:
        """What ends each field, without the space around it; a new line is one by itself."""
        return [before.strip() or "\n" for before, _ in self._pieces[1:]]

    def _escape(self, value: str) -> str:
        value = " ".join(value.split()).replace("\\", "\\\\")
        for separator in dict.fromkeys(self._separators):
            is_word = re.match(r"\w", separator)
            value = re.sub(
                _matching(separator) if is_word else re.escape(separator[0]), lambda found: "\\" + found[0], value
            )
        return value

    def prompt(self, fields: dict[str, str], until: str | None = None) -> str:
        """The prompt for these fields; those that are not there are left empty. `until`: ends before that field."""
        prompt = ""
        for before, name in self._pieces:
            prompt += before
            if name in (until, self.text_field):
                break
            prompt += self._escape(fields.get(name, ""))
        return prompt.rstrip()

    def fill(self, row: dict[str, str]) -> PromptedText:
        """A row's whole text, prompt in front."""
        before = self._pieces[-1][0]
        return PromptedText(self.prompt(row), before[len(before.rstrip()) :] + row[self.text_field])

    def _take(self, name: str, written: str) -> tuple[str, str]:
        """(value of a field that `written` begins with, what follows its separator)"""
        separator = self._separators[self.fields.index(name)]
        value = re.match(rf"(?:\\.|(?!{_matching(separator)}).)*", written, re.DOTALL)[0]
        plain = " ".join(re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL).split())
        return plain, written[len(value) + len(separator) :]

    def cut(self, name: str, written: str) -> str:
        """The value of a field, from what a model wrote in its place and beyond."""
        return self._take(name, written)[0]

    def read(self, text: PromptedText) -> list[str]:
        """The fields that a text was filled in with."""
        values, rest = [], text.removeprefix(self._pieces[0][0])
        for name in self.fields:
            value, rest = self._take(name, rest)
            values.append(value)
        return values

    @cached_property
    def _nearest(self) -> dict[tuple, list[dict[str, str]]]:
        """By what is given: the rows that have most of it. Filled as it is asked for: many texts are given the same."""
        return {}

    def _find_nearest(self, given: dict[str, str]) -> list[dict[str, str]]:
        key = tuple(sorted(given.items()))
        if key not in self._nearest:
            rows = [dict(zip(self.fields, row, strict=True)) for row in self.rows]
            alike = [sum(row[name] == given[name] for name in given) for row in rows]
            most = max(alike)
            self._nearest[key] = [row for row, num in zip(rows, alike, strict=True) if num == most]
        return self._nearest[key]

    def draw(self, given: dict[str, str], seed: int, index: int) -> dict[str, str]:
        """All fields: those that are given and, for the others, what a row of the training texts had there, one of
        those that have most of what is given. Text `index` of a seed always gets the same."""
        if len(given) == len(self.fields) or not self.rows:
            return given
        return random.Random(f"{seed} {index}").choice(self._find_nearest(given)) | given

    def check(self, given: Iterable[str], said: str) -> None:
        """UserError for fields that the prompt does not have; `said`: how the user gave them."""
        for name in given:
            if name == self.text_field:
                raise UserError(f"{said}: {name} is what the model writes; give {', '.join(self.fields)}")
            if name not in self.fields:
                raise UserError(f"{said}: the model knows no {name}; give {', '.join(self.fields)}")

    def with_rows(self, texts: list[PromptedText]) -> "Template":
        """The same with fields of some of these texts to draw from; a model that writes fields itself needs none."""
        chosen = [] if self.learns_prompt else random.Random(0).sample(texts, min(NUM_ROWS, len(texts)))
        return Template(self.pattern, self.learns_prompt, [self.read(text) for text in chosen])


def _matching(separator: str) -> str:
    """A separator's regular expression: words match as whole ones."""
    left, right = (r"\b" if re.match(r"\w", end) else "" for end in (separator[0], separator[-1]))
    return left + re.escape(separator) + right


def attach_template(tokenizer, template: Template | None) -> None:
    """Has the tokenizer carry the template wherever it is saved, as it does a chat template; None: none, whatever the
    model that it came with had."""
    tokenizer.init_kwargs.pop(KEY, None)
    if template:
        tokenizer.init_kwargs[KEY] = asdict(template)


def find_template(tokenizer) -> Template | None:
    """The template that a tokenizer carries; None where its model was trained without one."""
    saved = tokenizer.init_kwargs.get(KEY)
    return Template(**saved) if saved else None

"""Examples: a text with the prompt that a template makes of the other columns.

    {type} | {listed_in} | {title}: {description}

The last field is the completion, which the model is trained to write; the fields before it make the prompt. Space at
the end of the prompt belongs to the completion, because GPT-2's vocabulary splits there. Prompt and completion are
tokenized separately, so that a prompt has the same tokens in training and in sampling.

In a prompt, a field is one line, and anything in it that looks like a separator is escaped with a backslash
(`Alien\\: Covenant`), so that it is always clear where a field ends. A field that a row does not have is left empty.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from string import Formatter
from typing import NamedTuple

from neoflix.runtime.errors import UserError

KEY = "text_template"  # in tokenizer_config.json


class Example(NamedTuple):
    """A text of the data set. Without a template the prompt is empty and the completion is all of the text."""

    prompt: str
    completion: str  # begins with the space behind the prompt
    fields: dict[str, str] | None = None  # the prompt's columns and their values; None without a template

    @property
    def whole(self) -> str:
        """The text as the model reads it, prompt first."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Template:
    """A pattern such as "{title}: {description}".

    Args:
        learns_prompt: whether the model is trained to write the fields too (`--loss_on_prompt`).
    """

    pattern: str
    learns_prompt: bool = False

    def __post_init__(self):
        """Raises UserError for a malformed pattern."""
        try:
            pieces = list(Formatter().parse(self.pattern))
        except ValueError as error:
            raise UserError(f"--template {self.pattern!r}: {error}; write {{{{ or }}}} for a literal brace") from None
        names = [name for _, name, _, _ in pieces if name is not None]
        if len(names) < 2 or not all(names):
            raise UserError(
                f"--template {self.pattern!r}: must name two columns or more, as in '{{title}}: {{description}}'"
            )
        if any(spec or conversion for _, _, spec, conversion in pieces):
            raise UserError(f"--template {self.pattern!r}: braces must hold a column name and nothing else")
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
        """The column of the texts, which the model writes."""
        return self._pieces[-1][1]

    @cached_property
    def _separators(self) -> list[str]:
        """The text that ends each field, without the space around it; a line break counts as a separator."""
        return [before.strip() or "\n" for before, _ in self._pieces[1:]]

    def _escape(self, value: str) -> str:
        value = _one_line(value).replace("\\", "\\\\")
        for separator in dict.fromkeys(self._separators):
            is_word = re.match(r"\w", separator)
            value = re.sub(
                _matching(separator) if is_word else re.escape(separator[0]), lambda found: "\\" + found[0], value
            )
        return value

    def prompt(self, fields: dict[str, str], until: str | None = None) -> str:
        """The prompt for these fields; missing fields are left empty. With `until`, it ends before that field."""
        prompt = ""
        for before, name in self._pieces:
            prompt += before
            if name in (until, self.text_field):
                break
            prompt += self._escape(fields.get(name, ""))
        return prompt.rstrip()

    def fill(self, row: dict[str, str]) -> Example:
        """The example of a row, which must have the text field."""
        before = self._pieces[-1][0]
        completion = before[len(before.rstrip()) :] + row[self.text_field]
        return Example(self.prompt(row), completion, {name: _one_line(row.get(name, "")) for name in self.fields})

    def cut(self, name: str, written: str) -> str:
        """The value of a field, from the text that a model wrote in its place: up to the field's separator."""
        separator = _matching(self._separators[self.fields.index(name)])
        value = re.match(rf"(?:\\.|(?!{separator}).)*", written, re.DOTALL)[0]
        return _one_line(re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL))

    def check(self, names: Iterable[str], flag: str) -> None:
        """Raises UserError for a field that the prompt does not have; `flag` is how the user gave it."""
        for name in names:
            if name == self.text_field:
                raise UserError(f"{flag}: the model writes {name} itself; use {', '.join(self.fields)}")
            if name not in self.fields:
                raise UserError(f"{flag}: the model has no field {name}; use {', '.join(self.fields)}")


def _one_line(value: str) -> str:
    return " ".join(value.split())


def _matching(separator: str) -> str:
    """A regular expression for a separator; a separator that is a word matches whole words only."""
    left, right = (r"\b" if re.match(r"\w", end) else "" for end in (separator[0], separator[-1]))
    return left + re.escape(separator) + right


def attach_template(tokenizer, template: Template | None) -> None:
    """Makes the tokenizer carry the template wherever it is saved, as it does a chat template; None removes it."""
    tokenizer.init_kwargs.pop(KEY, None)
    if template:
        tokenizer.init_kwargs[KEY] = asdict(template)


def find_template(tokenizer) -> Template | None:
    """The template that a tokenizer carries; None if its model was trained without one."""
    saved = tokenizer.init_kwargs.get(KEY)  # an earlier version also saved `rows`, fields of training texts
    return Template(saved["pattern"], saved.get("learns_prompt", False)) if saved else None

"""Text in, text out: chat prompts by a checkpoint's template, streams that end at given texts."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

TEMPLATE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"


class ChatError(ValueError):
    """A chat template that is missing, unreadable, or refuses the messages."""


def chat_prompt(
    folder: Path, messages: list[dict[str, str]], *, thinking: bool | None = None
) -> str:
    """The text of a conversation up to where the model answers.

    Args:
        folder: a checkpoint with `chat_template.jinja`, or one in its `tokenizer_config.json`.
        messages: each with "role" and "content".
        thinking: what the template is told as `enable_thinking`; its own default if None.

    Raises:
        ChatError: there is no template, it cannot be read, or it refuses the messages.
    """
    settings = _settings(folder / SETTINGS)
    named = {
        name: settings[name]["content"] if isinstance(settings[name], dict) else settings[name]
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if settings.get(name)
    }
    given = {} if thinking is None else {"enable_thinking": thinking}
    # the environment that templates are written for, as transformers documents it
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda x, **options: json.dumps(
        x, ensure_ascii=False, **options
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    try:
        template = environment.from_string(_template(folder, settings))
        return template.render(messages=messages, add_generation_prompt=True, **named, **given)
    except (TemplateError, TypeError) as error:
        raise ChatError(f"the chat template in {folder}: {error}") from None


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ChatError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise ChatError(f"{path} holds no settings")
    return found


def _template(folder: Path, settings: dict[str, Any]) -> str:
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        # several, by name
        found = next((t.get("template") for t in found if t.get("name") == "default"), None)
    if not isinstance(found, str):
        raise ChatError(f"no chat template in {folder}: neither {TEMPLATE} nor in {SETTINGS}")
    return found


class TextStream:
    """Tokens in, text out as soon as it is certain: whole characters, and no part of a stop text.

    `stopped` is true once a stop text has come; neither it nor what follows is ever shown.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()) -> None:
        if not all(stops):
            raise ValueError("a stop text must not be empty")
        self.stopped = False
        self._tokenizer, self._stops, self._held = tokenizer, stops, ""
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, tokens: list[int]) -> str:
        """The text that new tokens make certain."""
        for token in tokens:
            if not self.stopped:
                self._held += self._stream.step(self._tokenizer, token) or ""
                self._cut()
        kept = 0 if self.stopped else self._beginning()
        shown = self._held[: len(self._held) - kept]
        self._held = self._held[len(shown) :]
        return shown

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        shown, self._held = self._held, ""
        return shown

    def _cut(self) -> None:
        places = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            self._held, self.stopped = self._held[: min(places)], True

    def _beginning(self) -> int:
        """Length of the longest end of the text that begins a stop text."""
        return max(
            (
                n
                for stop in self._stops
                for n in range(1, len(stop))
                if self._held.endswith(stop[:n])
            ),
            default=0,
        )

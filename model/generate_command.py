"""`kexaone generate`: continues a text, or answers a message, with a checkpoint folder."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from tokenizers import Tokenizer

from ..files import check_writable, write_json
from . import console as ui
from .config import Config
from .sampling import Sampling


def generate(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder with a tokenizer.json.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text.")] = None,
    chat: Annotated[
        str | None, typer.Option(help="Message to answer, by the folder's chat template.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    thinking: Annotated[
        bool | None, typer.Option(help="Thinking, with --chat. Default: the template's.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    stop: Annotated[list[str] | None, typer.Option(help="Text to end before, repeatable.")] = None,
    drafts: Annotated[
        str, typer.Option(help='MTP drafts per step, or "auto"; 0 decodes plainly.')
    ] = "0",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 keeps all tokens.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted from used tokens.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    fp8: Annotated[bool, typer.Option("--fp8", help="Keep or make the weights float8.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Default: the checkpoint's own.")] = None,
    device: Annotated[str, typer.Option(help="For example cpu or cuda.")] = "cpu",
    json: ui.JsonPath = None,
) -> None:
    """Continue a text with a checkpoint, or answer a message, streaming it as it comes."""
    from . import generation
    from .checkpoint import load
    from .text import TextStream
    from .tokenizer import load_tokenizer

    text, shown = _prompt(model, (prompt, prompt_file, chat), system, thinking)
    check_writable(json)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p,
                        presence_penalty=presence_penalty, seed=seed)  # fmt: skip
    tokenizer = load_tokenizer(model, Config.from_hf(model))
    ids = tokenizer.encode(_checked_text(text), add_special_tokens=chat is None).ids
    network = load(model, dtype=ui.parse_dtype(dtype), device=str(ui.parse_device(device)),
                   fp8="quantize" if fp8 else "dequantize")  # fmt: skip
    printer = _Printer(shown, TextStream(tokenizer, tuple(stop or ())))
    result = generation.generate(
        network.eval(),
        [ids],
        max_new_tokens=max_new_tokens,
        drafts=_parse_drafts(drafts),
        sampling=sampling,
        on_tokens=printer,
    )
    printer.end()
    _report(json, tokenizer, ids, printer.text, result)


def _report(
    json: Path | None, tokenizer: Tokenizer, ids: list[int], text: str, result: Any
) -> None:
    stats, tokens = result.statistics, result.token_ids[0]
    print(
        f"\n[{stats.new_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, "
        f"draft acceptance {stats.acceptance:.0%}]",
        file=sys.stderr,
    )
    write_json(
        json,
        {
            "prompt_ids": ids,
            "token_ids": tokens,
            "text": text,
            "acceptance": stats.acceptance,
            "tokens_per_second": stats.tokens_per_second,
            "statistics": dataclasses.asdict(stats),
        },
    )


def _prompt(
    model: Path,
    given: tuple[str | None, Path | None, str | None],
    system: str | None,
    thinking: bool | None,
) -> tuple[str, str]:
    """What the model reads, and what of it is shown."""
    from .text import chat_prompt

    prompt, prompt_file, chat = given
    if sum(x is not None for x in given) != 1:
        raise ValueError("give one of --prompt, --prompt-file and --chat")
    if chat is None:
        if system is not None or thinking is not None:
            raise ValueError("--system and --thinking go with --chat")
        text = prompt if prompt is not None else _read_text(prompt_file)
        return text, text
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": chat})
    return chat_prompt(model, messages, thinking=thinking), ""


def _parse_drafts(text: str) -> Any:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f'drafts must be a number or "auto", got {text!r}') from None


class _Printer:
    """Prints the prompt, then what new tokens make certain; ends generation at a stop text."""

    def __init__(self, prompt: str, stream: Any) -> None:
        self.text, self._prompt, self._stream = "", prompt, stream

    def __call__(self, new: list[list[int]]) -> bool:
        self._write(self._stream.push(new[0]))
        return self._stream.stopped

    def end(self) -> None:
        self._write(self._stream.rest())

    def _write(self, text: str) -> None:
        self.text += text
        sys.stdout.write(self._prompt + text)
        sys.stdout.flush()
        self._prompt = ""


def _checked_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt is not UTF-8 text") from None
    return text


def _read_text(path: Path | None) -> str:
    assert path is not None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None

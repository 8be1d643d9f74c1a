"""Chat prompts as transformers renders them, and streams that end where they should."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from kexaone.model.text import ChatError, TextStream, chat_prompt
from kexaone.model.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
TEMPLATE = """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role not in ["user", "system", "assistant"] %}
        {{- raise_exception("unknown role " + m.role) }}
    {%- endif %}
    {%- if m.role == "system" and not loop.first %}
        {% continue %}
    {%- endif %}
    {{- "<|" + m.role + "|>" + m.content | tojson + "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|assistant|>" }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- "<think>\\n\\n</think>" }}
    {%- endif %}
{%- endif %}
"""
MESSAGES = [
    {"role": "system", "content": "Sei kurz: ä"},
    {"role": "user", "content": 'what is "x" < 3?\n'},
    {"role": "system", "content": "left out"},
]


@pytest.mark.parametrize("place", ["file", "settings", "one of several"])
@pytest.mark.parametrize("thinking", [None, True, False])
def test_prompts_are_those_of_transformers(tmp_path, place, thinking):
    other = PreTrainedTokenizerFast(tokenizer_object=BYTES, bos_token="<bos>")
    given = {} if thinking is None else {"enable_thinking": thinking}
    expected = other.apply_chat_template(
        MESSAGES, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True, **given
    )
    settings: dict[str, object] = {"bos_token": {"content": "<bos>"}}
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    elif place == "settings":
        settings["chat_template"] = TEMPLATE
    else:
        named = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
        settings["chat_template"] = named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert chat_prompt(tmp_path, MESSAGES, thinking=thinking) == expected
    assert ("</think>" in expected) == (thinking is False)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("{% for", "chat template"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages.append(1) }}", "chat template"),
        ("{{ ''.__class__.__mro__ }}", "chat template"),
    ],
)
def test_bad_templates_are_one_line(tmp_path, template, words):
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ChatError, match=words) as caught:
        chat_prompt(tmp_path, MESSAGES)
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ChatError, match="cannot read"):
        chat_prompt(tmp_path, MESSAGES)


letters = st.text(st.sampled_from("abß"), max_size=12)


@given(letters, st.lists(st.text(st.sampled_from("abß"), min_size=1, max_size=3), max_size=3),
       st.integers(1, 4))  # fmt: skip
def test_a_stream_ends_before_the_first_stop_text(text, stops, size):
    ids = BYTES.encode(text).ids
    stream, shown = TextStream(BYTES, tuple(stops)), ""
    for start in range(0, len(ids), size):
        if stream.stopped:
            break
        shown += stream.push(ids[start : start + size])
        # what is shown is never taken back
        assert text.startswith(shown)
    shown += stream.rest()
    # the stop text that is complete first; of several that end together, the longest
    ends = [(at + len(s), at) for s in stops if (at := text.find(s)) >= 0]
    assert stream.stopped == bool(ends)
    assert shown == (text[: min(ends)[1]] if ends else text)


def test_nothing_is_held_back_without_need():
    stream = TextStream(BYTES, ("STOP",))
    assert [stream.push([b]) for b in b"aSTx"] == ["a", "", "", "STx"]
    assert stream.push(list("ß".encode())[:1]) == "" and not stream.stopped
    with pytest.raises(ValueError, match="stop text"):
        TextStream(BYTES, ("",))

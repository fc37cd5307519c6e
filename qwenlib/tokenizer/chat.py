"""ChatML as Qwen2.5-Instruct renders it: Jinja template, the same in Python, ids with a loss mask.

A conversation is a list of messages {"role": ..., "content": ...} with roles system, user,
assistant and tool; an assistant message may carry `tool_calls`. A turn is

    <|im_start|>{role}\\n{content}<|im_end|>\\n

A tokenizer's own template decides the default system text, no more: tools and their calls are
written as Qwen does.

`encode_chat` builds ids piece by piece from control ids and encoded text, so a text that spells
`<|im_end|>` cannot end a turn. The mask marks targets: content and `<|im_end|>` of every assistant
turn. It leaves out the header, which is given at inference, and the newline after `<|im_end|>`,
which is never reached.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwenlib.tokenizer.control import IM_END, IM_START, TOOL_CALL, TOOL_CALL_END

if TYPE_CHECKING:
    from qwenlib.tokenizer.tokenizer import Tokenizer

Message = Mapping[str, Any]

DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
ROLES = ("system", "user", "assistant", "tool")

# For tokenizer_config.json; gives the strings of the Qwen2.5-Instruct release. `render` below is
# the same function in Python.
CHAT_TEMPLATE = r"""
{%- set system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant." %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
{%- endif %}
{{- '<|im_start|>system\n' + system }}
{%- if tools %}
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query." }}
    {{- "\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and " }}
    {{- "arguments within <tool_call></tool_call> XML tags:\n" }}
    {{- '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- set text = message.content or '' %}
        {{- text }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function or tool_call %}
            {{- '\n' if text or not loop.first else '' }}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- elif not (message.role == 'system' and loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

_TOOLS_OPEN = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query."
    "\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_CLOSE = (
    "\n</tools>\n\nFor each function call, return a json object with function name and "
    "arguments within "
)
_OPENING = (
    r"(<\|im_start\|>system\n(?P<system>.*?)<\|im_end\|>\n)?"
    r"<\|im_start\|>user\n\?<\|im_end\|>\s*"
)
_CALL_SHAPE = '\n{"name": <function-name>, "arguments": <args-json-object>}\n'


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation: a control token or text, inside a target or not."""

    text: str
    control: bool = False
    target: bool = False


def render(
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    default_system: str | None = DEFAULT_SYSTEM,
) -> str:
    """The conversation as one string, equal to `apply_chat_template(..., tokenize=False)`.

    `default_system` opens a conversation that brings no system message; None adds no such turn.
    Raises ValueError for an empty conversation, an unknown role or a content that is no text.
    """
    pieces = chat_pieces(messages, add_generation_prompt, tools, default_system)
    return "".join(piece.text for piece in pieces)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[list[int], list[int]]:
    """Ids and target mask (1: a token to learn), both of the same length.

    Equal to tokenising the rendered string when no text spells a control token and no answer
    begins with an empty line; there the string would fuse the header's newline with the answer's,
    which generation never sees. So the ids of a prompt with `add_generation_prompt` are always a
    prefix of the ids with the answer. A control string that the vocabulary lacks is text.
    """
    pieces = chat_pieces(messages, add_generation_prompt, tools, tokenizer.default_system)
    if any(piece.control and piece.text not in tokenizer.control for piece in pieces):
        known = (p.control and p.text in tokenizer.control for p in pieces)
        pieces = _join([Piece(p.text, control, p.target) for p, control in zip(pieces, known)])
    ids: list[int] = []
    mask: list[int] = []
    for piece in pieces:
        part = [tokenizer.control[piece.text]] if piece.control else tokenizer.encode(piece.text)
        ids += part
        mask += [int(piece.target)] * len(part)
    return ids, mask


def chat_pieces(
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    default_system: str | None = DEFAULT_SYSTEM,
) -> list[Piece]:
    """The conversation in order; neighbouring texts of one kind are joined before encoding."""
    _validate(messages, tools)
    has_system = messages[0]["role"] == "system"
    system = messages[0]["content"] if has_system else default_system
    pieces: list[Piece] = []
    if system is not None or tools:
        pieces += [_control(IM_START), Piece("system\n" + (system or ""))]
    if tools:
        signatures = "".join("\n" + _to_json(tool) for tool in tools)
        pieces += [
            Piece(_TOOLS_OPEN + signatures + _TOOLS_CLOSE),
            _control(TOOL_CALL),
            _control(TOOL_CALL_END),
            Piece(" XML tags:\n"),
            _control(TOOL_CALL),
            Piece(_CALL_SHAPE),
            _control(TOOL_CALL_END),
        ]
    if pieces:
        pieces += _turn_end()

    for i, message in enumerate(messages):
        role = message["role"]
        if role == "assistant":
            pieces += [_control(IM_START), Piece("assistant\n"), *_answer(message)]
            pieces += _turn_end(target=True)
        elif role == "tool":
            if i == 0 or messages[i - 1]["role"] != "tool":
                pieces += [_control(IM_START), Piece("user")]
            pieces.append(Piece(f"\n<tool_response>\n{message['content']}\n</tool_response>"))
            if i == len(messages) - 1 or messages[i + 1]["role"] != "tool":
                pieces += _turn_end()
        elif not (i == 0 and has_system):
            pieces += [_control(IM_START), Piece(f"{role}\n{message['content']}"), *_turn_end()]
    if add_generation_prompt:
        pieces += [_control(IM_START), Piece("assistant\n")]
    return _join(pieces)


def find_default_system(template: str) -> str | None:
    """The system text that a Jinja chat template puts before one user message; None without one.

    Rendered as transformers does. ValueError when the result is no ChatML, which is all that
    `render` and `encode_chat` write.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        text = environment.from_string(template).render(messages=[{"role": "user", "content": "?"}])
    except TemplateError as error:
        raise ValueError(f"the chat template does not render: {error}") from error
    turns = re.fullmatch(_OPENING, text, flags=re.DOTALL)
    if turns is None:
        raise ValueError(f"the chat template writes no ChatML but {text[:80]!r}: use chat_template="
                         "qwenlib.tokenizer.chat.CHAT_TEMPLATE")  # fmt: skip
    return turns["system"]


def _answer(message: Message) -> list[Piece]:
    text = message.get("content") or ""
    pieces = [Piece(text, target=True)]
    for n, tool_call in enumerate(message.get("tool_calls") or ()):
        call = tool_call.get("function") or tool_call
        head = f'\n{{"name": "{call["name"]}", "arguments": '
        pieces += [
            Piece("\n" if text or n else "", target=True),
            _control(TOOL_CALL, target=True),
            Piece(head + _to_json(call["arguments"]) + "}\n", target=True),
            _control(TOOL_CALL_END, target=True),
        ]
    return pieces


def _control(text: str, target: bool = False) -> Piece:
    return Piece(text, control=True, target=target)


def _turn_end(target: bool = False) -> list[Piece]:
    return [_control(IM_END, target), Piece("\n")]


def _join(pieces: Sequence[Piece]) -> list[Piece]:
    # BPE may merge across a seam, so texts that belong together are encoded as one string.
    joined: list[Piece] = []
    for piece in pieces:
        if not piece.text:
            continue
        last = joined[-1] if joined else None
        if last and not (last.control or piece.control) and last.target == piece.target:
            joined[-1] = Piece(last.text + piece.text, target=piece.target)
        else:
            joined.append(piece)
    return joined


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _validate(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> None:
    if not messages:
        raise ValueError("the conversation is empty: give at least one message")
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {i} has role {role!r}; roles are {', '.join(ROLES)}")
        calls = message.get("tool_calls") or ()
        if calls and role != "assistant":
            raise ValueError(f"message {i} ({role}) has tool_calls; only assistants call tools")
        for tool_call in calls:
            call = tool_call.get("function") or tool_call
            if "name" not in call or "arguments" not in call:
                raise ValueError(f"message {i}: a tool call needs 'name' and 'arguments': {call!r}")
        if not isinstance(content, str) and not (content is None and calls):
            raise ValueError(f"message {i} ({role}) needs a text as content, not {content!r}")
    for tool in tools or ():
        if not isinstance(tool, Mapping):
            raise ValueError(f"a tool is a JSON schema as a dict, not {tool!r}")

"""The 22 control tokens of Qwen2.5: names, order and flags.

Source: report section 2 ("from 3 to 22 tokens") and the released tokenizer_config.json, where they
take the ids 151643 to 151664, right after the 151,643 regular tokens.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ControlToken:
    """One control token; `special` ones vanish under `skip_special_tokens=True`."""

    text: str
    group: str
    special: bool


CONTROL_TOKENS: tuple[ControlToken, ...] = (
    ControlToken("<|endoftext|>", "general", True),
    ControlToken("<|im_start|>", "chat", True),
    ControlToken("<|im_end|>", "chat", True),
    ControlToken("<|object_ref_start|>", "vision", True),
    ControlToken("<|object_ref_end|>", "vision", True),
    ControlToken("<|box_start|>", "vision", True),
    ControlToken("<|box_end|>", "vision", True),
    ControlToken("<|quad_start|>", "vision", True),
    ControlToken("<|quad_end|>", "vision", True),
    ControlToken("<|vision_start|>", "vision", True),
    ControlToken("<|vision_end|>", "vision", True),
    ControlToken("<|vision_pad|>", "vision", True),
    ControlToken("<|image_pad|>", "vision", True),
    ControlToken("<|video_pad|>", "vision", True),
    # From here on the release says special=false: a caller that skips special tokens must still
    # see tool calls and fill-in-the-middle markers, because it has to parse them.
    ControlToken("<tool_call>", "tool", False),
    ControlToken("</tool_call>", "tool", False),
    ControlToken("<|fim_prefix|>", "code", False),
    ControlToken("<|fim_middle|>", "code", False),
    ControlToken("<|fim_suffix|>", "code", False),
    ControlToken("<|fim_pad|>", "code", False),
    ControlToken("<|repo_name|>", "code", False),
    ControlToken("<|file_sep|>", "code", False),
)

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
TOOL_CALL = "<tool_call>"
TOOL_CALL_END = "</tool_call>"

"""`moh chat`: a conversation with a model on the terminal, with its dial.

Reads lines from standard input, a terminal or not.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moh.cli import generation
from moh.cli.loading import add_loading
from moh.cli.options import active_heads, add_active_heads, add_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moh.cli.options import Commands

_HELP = "Talk with a model: /heads K turns the dial, /reset forgets the conversation, /quit ends it."


def add_parser(sub: Commands) -> None:
    """Add `chat` to the commands."""
    parser = add_command(sub, "chat", _HELP, run)
    parser.add_argument("model", help="directory, hub name or .gguf file; dense or MoH")
    parser.add_argument("--system", metavar="TEXT", help="instructions to the model before the conversation")
    generation.add_sampling(parser, max_new_tokens=256, temperature=0.7)
    add_active_heads(parser)
    add_loading(parser)


def run(arguments: Namespace) -> None:
    model, tokenizer = generation.load(arguments)
    conversation = Conversation(model, tokenizer, generation.sampling(arguments), arguments.system)
    terminal = sys.stdin.isatty()
    if terminal:
        print(_HELP, file=sys.stderr)
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            answer(conversation, line.strip())


def answer(conversation: Conversation, line: str) -> None:
    """Carry out one line; print an error to standard error and keep the conversation."""
    command, _, rest = line.partition(" ")
    try:
        if command == "/reset":
            conversation.reset()
        elif command == "/heads":
            print(f"{100 * conversation.turn_dial(rest.strip()):.1f} % of the heads", file=sys.stderr)
        elif command.startswith("/"):
            raise ValueError(f"command must be /heads K, /reset or /quit, got {command}")
        else:
            conversation.say(line)
    except (ValueError, argparse.ArgumentTypeError) as error:
        print(f"moh chat: {error}", file=sys.stderr)


@dataclass
class Conversation:
    """The turns so far, and the model that answers.

    Attributes:
        model: a causal language model.
        tokenizer: the model's; without a chat template the turns are joined as lines of plain text.
        options: for `model.generate`.
        system: the system's turn, before all others.
        messages: the turns, in the format of chat templates.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: dict[str, Any]
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all turns but the system's."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def turn_dial(self, text: str) -> float:
        """Set the number of active heads and return the share of heads.

        Raises:
            ValueError: the model has no dial, or the number is out of range.
            argparse.ArgumentTypeError: the text is not a number.
        """
        import moh

        return moh.set_active_heads(self.model, active_heads(text))

    def say(self, text: str) -> str:
        """Add the user's turn; print the model's answer while it is written, add and return it.

        Raises:
            ValueError: the conversation is too long for the model, or its chat template refuses it; the turn is then not
                added.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        inputs = self._inputs(messages)
        length = inputs["input_ids"].shape[1]
        room = generation.room(self.model)
        if room is not None and length + self.options["max_new_tokens"] > room:
            raise ValueError(
                f"the conversation ({length} tokens) and an answer of {self.options['max_new_tokens']} must fit into "
                f"the model's {room} tokens: /reset, or a smaller --max-new-tokens"
            )
        streamer = generation.printing(self.tokenizer, skip_prompt=True)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        written = self.model.generate(**inputs, pad_token_id=pad, streamer=streamer, **self.options)
        reply: str = self.tokenizer.decode(written[0, length:], skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        return reply

    def _inputs(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        if self.tokenizer.chat_template is not None:
            from jinja2 import TemplateError

            try:
                inputs = self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
                )
            except TemplateError as error:  # how templates refuse, for example, a system's turn
                raise ValueError(f"the model's chat template refuses the conversation: {error}") from None
        else:
            inputs = self.tokenizer("\n".join(message["content"] for message in messages) + "\n", return_tensors="pt")
        return dict(inputs.to(self.model.device))

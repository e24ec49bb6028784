"""`pard-chat`: a conversation at the terminal, or line by line through a pipe."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pard_onnx.cli import Parser, Thoughts, call_lines, complain, exit_code
from pard_onnx.generation_options import (
    add_models,
    add_providers,
    add_revisions,
    add_sampling,
    add_special_tokens,
    add_stops,
    add_template_arguments,
    add_tools,
    load_arguments,
    models_of,
    refuse_bad_options,
    revision_arguments,
    sampling_arguments,
    stop_arguments,
    template_arguments,
    tool_arguments,
    whole_or_auto,
    with_own_sampling,
)
from pard_onnx.models.checks import AUTO
from pard_onnx.models.errors import BadInput, PardError, TooLong
from pard_onnx.runtime.providers.table import CPU
from pard_onnx.runtime.text.template import checked_arguments

if TYPE_CHECKING:
    from pard_onnx.chat_screen import Screen
    from pard_onnx.runtime.chat import Chat
    from pard_onnx.runtime.pair import Pair
    from pard_onnx.runtime.result import Result


def parser() -> argparse.ArgumentParser:
    out = Parser(prog="pard-chat", description="Chat with an exported pair; /help lists the commands inside.")
    add_models(out, "plain decoding and lookup")
    begin = out.add_mutually_exclusive_group()
    begin.add_argument("--system", metavar="TEXT", help="the system message")
    begin.add_argument("--resume", type=Path, metavar="FILE", help="go on with what /save wrote")
    add_template_arguments(out)
    add_special_tokens(out)
    out.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of a reply (default: 512)")
    length = "drafts a round, 1 to 32; 0: plain decoding; auto (default): by measured costs and acceptance"
    out.add_argument("--draft-length", type=whole_or_auto, default=AUTO, metavar="K", help=length)
    out.add_argument("--show-accepted", action="store_true", help="colour the tokens that came from the draft")
    add_stops(out)
    add_tools(out)
    add_sampling(out, default="model")
    add_revisions(out)
    add_providers(out)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    failed: list[int] = []
    return exit_code(lambda: talk(options, failed)) or max(failed, default=0)


def talk(options: argparse.Namespace, failed: list[int]) -> None:
    """Run the whole conversation. failed: gets the exit codes of errors, if messages come from a pipe."""
    target, draft = models_of(options)
    generation = {
        "max_new_tokens": options.max_new_tokens,
        "draft_length": options.draft_length,
        **stop_arguments(options),
        **tool_arguments(options),
        **sampling_arguments(options),
    }
    refuse_bad_options(generation)
    arguments = checked_arguments(template_arguments(options))
    from pard_onnx.chat_screen import Screen
    from pard_onnx.runtime.pair import load

    screen = Screen()
    with load(target, draft, **load_arguments(options), **revision_arguments(options)) as pair:
        if options.resume:
            chat = pair.restore(options.resume, arguments, options.special_tokens)
        else:
            chat = pair.chat(options.system, (), arguments, options.special_tokens)
        generation, how = with_own_sampling(pair, generation, "model")
        talker = Talker(pair, chat, screen, generation, Thoughts(options), mark=options.show_accepted)
        if screen.person:
            screen.note(talker.greeting())
        # In a pipe, a model without settings of its own decodes as it always did, which needs no line
        if how and (screen.person or options.sampling or generation["sampling"] == "model"):
            screen.note(how)
        for line in screen.lines():
            try:
                talker.handle(line)
            except PardError as error:
                screen.end_line()
                code = complain(str(error), error.exit_code)
                if not screen.person:
                    failed.append(code)
            if talker.done:
                break


class Talker:
    """One conversation, its settings, and its commands."""

    def __init__(
        self, pair: Pair, chat: Chat, screen: Screen, generation: dict[str, Any], thoughts: Thoughts, *, mark: bool
    ) -> None:
        self._pair, self._chat, self._screen, self._thoughts = pair, chat, screen, thoughts
        self._generation = generation
        self._mark = mark
        self._last: Result | None = None
        self.done = False

    def greeting(self) -> str:
        pair = self._pair
        models = (pair.target_name, pair.target_commit), (pair.draft_name, pair.draft_commit)
        names = " with ".join(f"{name}@{commit[:12]}" if commit else name for name, commit in models if name)
        names += where_it_runs(self._pair)
        before = f"{len(self._chat.messages)} messages so far; " if self._chat.messages else ""
        return f"{names}; {before}/help lists the commands, Ctrl-C ends a reply, Ctrl-D the chat"

    def handle(self, line: str) -> None:
        """Answer a message or run a command; ignore an empty line."""
        if line.startswith("/"):
            name, _, rest = line[1:].partition(" ")
            if name not in COMMANDS:
                raise BadInput(f"unknown command /{name}; known are {', '.join(f'/{known}' for known in COMMANDS)}")
            COMMANDS[name].act(self, rest.strip())
        elif line.strip():
            self.answer(line.strip())

    def answer(self, text: str) -> None:
        try:
            stream = self._chat.stream(text, **self._generation)
        except TooLong as error:
            raise TooLong(f"{error}; here /reset begins anew") from error
        with stream, self._screen.interrupts(stream.cancel):
            for chunk in stream:
                self._thoughts.show(chunk)
                self._screen.show(chunk, mark=self._mark)
        self._thoughts.end_line()
        self._screen.end_line()
        self._last = stream.result
        for line in call_lines(stream.result):
            print(line, flush=True)
        if note := ENDS.get(stream.result.finish_reason):
            self._screen.note(note)

    def help(self, _: str) -> None:
        for name, command in COMMANDS.items():
            self._screen.note(f"{f'/{name} {command.argument}':<14} {command.text}")
        self._screen.note("all else is a message; a space in front makes one of a line that begins with /")

    def stats(self, _: str) -> None:
        self._screen.note(summary(self._last) if self._last else "no reply yet")

    def draft_length(self, value: str) -> None:
        if value:
            try:
                wanted = value if value == AUTO else int(value)
            except ValueError:
                raise BadInput(f"/k takes a number or auto, not {value}") from None
            changed = {**self._generation, "draft_length": wanted}
            refuse_bad_options(changed)
            self._generation = changed
        self._screen.note(f"draft length: {self._generation['draft_length']}")

    def accepted(self, _: str) -> None:
        self._mark = not self._mark
        self._screen.note(f"the draft's tokens are {'in colour' if self._mark else 'as the others'}")

    def reset(self, _: str) -> None:
        """Forget all messages but the system message, whose KV rows stay in the cache."""
        messages = self._chat.messages
        del messages[1 if messages and messages[0]["role"] == "system" else 0 :]
        self._screen.note("the conversation begins anew")

    def save(self, name: str) -> None:
        if not name:
            raise BadInput("/save takes the name of a file")
        self._chat.save(name)
        self._screen.note(f"saved to {name}; pard-chat --resume goes on with it")

    def quit(self, _: str) -> None:
        self.done = True


def where_it_runs(pair: Pair) -> str:
    """The provider and why it was chosen; nothing for the CPU where the user named it."""
    from pard_onnx.runtime.providers.choice import AS_ASKED

    choice = pair.choice
    plain = choice.provider.key == CPU.key and choice.reason == AS_ASKED
    return "" if plain else f" on {choice.provider.title} ({choice.reason})"


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the chat."""

    act: Callable[[Talker, str], None]  # called with the text after the command's name
    argument: str  # as /help shows it
    text: str  # as /help shows it


COMMANDS = {
    "help": Command(Talker.help, "", "this list"),
    "stats": Command(Talker.stats, "", "of the last reply: speed, accepted drafts, cached tokens"),
    "k": Command(Talker.draft_length, "N|auto", "drafts a round, 0 for plain decoding"),
    "accepted": Command(Talker.accepted, "", "colour the tokens that came from the draft, or no longer"),
    "reset": Command(Talker.reset, "", "begin anew, with the same system message"),
    "save": Command(Talker.save, "FILE", "write the conversation, for --resume"),
    "quit": Command(Talker.quit, "", "end; as Ctrl-D"),
}
ENDS = {
    "length": "[cut here: --max-new-tokens, or the capacity]",
    "cancelled": "[cancelled]",
    "timeout": "[out of time]",
}


def summary(result: Result) -> str:
    """The text of /stats."""
    stats = result.stats
    sources = Counter(stats.sources)
    by = ", ".join(f"{count} {source}" for source, count in sources.most_common())
    return "\n".join(
        (
            f"{stats.new_tokens} tokens in {stats.seconds.total:.2f} s: {stats.tokens_per_second:.1f} tokens/s, "
            f"the first after {stats.time_to_first_token:.2f} s",
            f"{stats.mean_accepted:.2f} accepted a round; rounds: {by or 'none'}",
            f"prompt: {stats.prompt_tokens} tokens, {stats.cached_tokens} of them cached",
        )
    )


if __name__ == "__main__":
    sys.exit(main())

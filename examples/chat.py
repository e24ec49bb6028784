"""A chat in a terminal: python chat.py TARGET [DRAFT]. Ctrl-C ends a reply, Ctrl-D ends the chat."""

import sys

from pard_onnx import Pair, load


def answer(chat, text: str) -> None:
    """Print the reply as it comes; what there is of it stays in the conversation if Ctrl-C ends it."""
    with chat.stream(text, max_new_tokens=512) as stream:
        while True:
            try:
                chunk = next(stream, None)
            except KeyboardInterrupt:  # before the next step; the reply ends there
                stream.cancel()
                continue
            if chunk is None:
                break
            print(chunk.text, end="", flush=True)
    print()


def main(pair: Pair) -> None:
    pair.warm_up()
    with pair.chat("You are a helpful assistant.", overflow="drop-oldest") as chat:
        while True:
            try:
                text = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if text:
                answer(chat, text)


if __name__ == "__main__":
    with load(*sys.argv[1:3]) as pair:
        main(pair)

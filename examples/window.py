"""A desktop window that streams replies: python window.py TARGET [DRAFT]

A thread reads the stream and puts its chunks into a queue, which the window empties fifty times a second: tkinter is
used by one thread only, and the window never waits for the model. Cancel ends the reply before the next step.
"""

import queue
import sys
import threading
import tkinter as tk

from pard_onnx import Chat, Pair, PardError, Stream, load

EVERY = 20  # milliseconds


class Replies:
    """One reply at a time, generated in a thread; what comes of it waits in `events`."""

    def __init__(self, chat: Chat) -> None:
        self.events: queue.Queue[tuple[str, str]] = queue.Queue()  # ("text" | "end" | "error", text)
        self._chat = chat
        self._stream: Stream | None = None
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, text: str) -> None:
        self._stream = self._chat.stream(text, max_new_tokens=1024)
        self._thread = threading.Thread(target=self._read, args=(self._stream,))
        self._thread.start()

    def cancel(self) -> None:
        """End the reply; also before the window is closed, since a thread must not outlive the pair."""
        if self._stream:
            self._stream.cancel()

    def wait(self) -> None:
        if self._thread:
            self._thread.join()

    def _read(self, stream: Stream) -> None:
        try:
            for chunk in stream:
                self.events.put(("text", chunk.text))
            self.events.put(("end", stream.result.finish_reason))
        except PardError as error:
            self.events.put(("error", str(error)))


class Window:
    """A text, an entry, and two buttons."""

    def __init__(self, root: tk.Tk, replies: Replies) -> None:
        self._root, self._replies = root, replies
        self.text = tk.Text(root, wrap="word", state="disabled")
        self.entry = tk.Entry(root)
        self.send_button = tk.Button(root, text="Send", command=self.send)
        self.cancel_button = tk.Button(root, text="Cancel", command=replies.cancel, state="disabled")
        self.text.pack(fill="both", expand=True)
        self.entry.pack(fill="x")
        self.send_button.pack(side="left")
        self.cancel_button.pack(side="left")
        self.entry.bind("<Return>", lambda _: self.send())
        root.protocol("WM_DELETE_WINDOW", self.close)
        self._job = root.after(EVERY, self.poll)

    def send(self) -> None:
        text = self.entry.get().strip()
        if not text or self._replies.running:
            return
        self.entry.delete(0, "end")
        self.show(f"\n> {text}\n")
        try:
            self._replies.start(text)
        except PardError as error:  # a conversation that is too long
            self.show(f"[{error}]\n")
            return
        self.cancel_button.configure(state="normal")

    def poll(self) -> None:
        """Show what has come since the last time."""
        while True:
            try:
                kind, text = self._replies.events.get_nowait()
            except queue.Empty:
                break
            self.show(text if kind == "text" else f"\n[{text}]\n" if text != "stop" else "\n")
            if kind != "text":
                self.cancel_button.configure(state="disabled")
        self._job = self._root.after(EVERY, self.poll)

    def show(self, text: str) -> None:
        self.text.configure(state="normal")
        self.text.insert("end", text)
        self.text.configure(state="disabled")
        self.text.see("end")

    def close(self) -> None:
        self._root.after_cancel(self._job)
        self._replies.cancel()
        self._replies.wait()
        self._root.destroy()


def main(pair: Pair) -> None:
    root = tk.Tk()
    root.title(f"{pair.target_name}, {pair.info().context} tokens")
    with pair.chat(overflow="drop-oldest") as chat:
        Window(root, Replies(chat))
        root.mainloop()


if __name__ == "__main__":
    with load(*sys.argv[1:3]) as pair:
        main(pair)

"""`pdserve chat`: talk to a running server from the terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Annotated

import typer
from rich.console import Console

from pdserve.cli.chat_stream import AnswerStats, ChatFailed, stream_answer
from pdserve.errors import ConfigError
from pdserve.launch.http_front import URL_HELP, first_model, router_url

HELP = "/reset starts over · /quit ends · Ctrl-C stops an answer"


def register(app: typer.Typer) -> None:
    @app.command("chat")
    def chat(
        url: Annotated[str | None, typer.Option(help=URL_HELP)] = None,
        model: Annotated[str | None, typer.Option(help="Default: the first that the server lists.")] = None,
        system: Annotated[str | None, typer.Option(help="A system message.")] = None,
        max_tokens: Annotated[int, typer.Option(min=1)] = 512,
        temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; small models ramble near 1.")] = 0.3,
    ) -> None:
        """Chat with a running server; the answer streams, and each ends with its TTFT and speed."""
        server = router_url(url)
        try:
            name = model or first_model(server)
        except (OSError, ValueError) as error:
            raise ConfigError(f"No server answers at {server} ({error}); start one with `pdserve up`.") from error
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() a history
        Chat(server, name, system, max_tokens, temperature, Console(highlight=False)).run()


class Chat:
    """A conversation. The server is told all of it each turn and finds the earlier turns in its prefix cache."""

    def __init__(
        self, url: str, model: str, system: str | None, max_tokens: int, temperature: float, console: Console
    ) -> None:
        self._url = url
        self._model = model
        self._opening = [{"role": "system", "content": system}] if system else []
        self._body = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
        self._console = console
        self.messages = list(self._opening)

    def run(self) -> None:
        """Until /quit or the end of the input."""
        self._console.print(f"{self._model} at {self._url}\n{HELP}", style="dim", markup=False)
        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                print()
                continue
            if text == "/quit":
                return
            if text == "/reset":
                self.messages = list(self._opening)
            elif text.startswith("/"):
                self._console.print(HELP, style="dim", markup=False)
            elif text:
                self.turn(text)

    def turn(self, text: str) -> None:
        """One question and its answer. An answer that was cut short stays in the conversation as far as it came."""
        question = {"role": "user", "content": text}
        stats = AnswerStats(started_s=time.monotonic())
        pieces = stream_answer(self._url, {**self._body, "messages": [*self.messages, question]}, stats)
        answer: list[str] = []
        note = ""
        try:
            for piece in pieces:
                answer.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            note = "stopped · "
        except ChatFailed as error:
            note = f"{error} · "
        finally:
            pieces.close()
        self._console.print(f"\n{note}{stats.describe()}", style="dim", markup=False, soft_wrap=True)
        if answer:
            self.messages += [question, {"role": "assistant", "content": "".join(answer)}]

"""`pard-generate`: text from an exported pair."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pard_onnx.cli import Parser, Thoughts, call_lines, exit_code, for_stdout
from pard_onnx.generation_options import (
    add_grammar,
    add_models,
    add_providers,
    add_revisions,
    add_sampling,
    add_special_tokens,
    add_stops,
    add_template_arguments,
    add_tools,
    grammar_arguments,
    load_arguments,
    models_of,
    revision_arguments,
    sampling_arguments,
    stop_arguments,
    template_arguments,
    tool_arguments,
    whole_or_auto,
    with_own_sampling,
)
from pard_onnx.models.checks import AUTO
from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.text.template import checked_arguments

if TYPE_CHECKING:
    from pard_onnx.runtime.pair import Pair
    from pard_onnx.runtime.result import Result
    from pard_onnx.runtime.stream import Stream


def parser() -> argparse.ArgumentParser:
    out = Parser(prog="pard-generate", description="Generate text with an exported pair.")
    add_models(out, "plain decoding")
    prompt = out.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="the prompt's text; without it and --prompt-file, stdin")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file")
    out.add_argument("--chat", action="store_true", help="the prompt is a user's message for the chat template")
    add_template_arguments(out)
    add_special_tokens(out)
    out.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    length = "drafts a round, 1 to 32; 0: plain decoding; auto (default): by measured costs and acceptance"
    out.add_argument("--draft-length", type=whole_or_auto, default=AUTO, metavar="K", help=length)
    out.add_argument("--no-lookup", dest="lookup", action="store_false", help="with auto: only the draft model drafts")
    add_stops(out)
    add_grammar(out)
    add_tools(out)
    out.add_argument("--timeout", type=float, metavar="S", help="end after so many seconds")
    add_sampling(out)
    add_revisions(out)
    add_providers(out)
    out.add_argument("--no-exact", dest="exact", action="store_false", help="allow any step width")
    out.add_argument("--json", action="store_true", help="one JSON object instead of streamed text")
    best = "in the JSON object, the log probability of each {} and of the N most likely ones for its place, 0 to 20"
    for name, token in (("--logprobs", "new token"), ("--prompt-logprobs", "token of the prompt")):
        out.add_argument(name, type=int, metavar="N", help=best.format(token))
    return out


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    return exit_code(lambda: generate(options))


def generate(options: argparse.Namespace) -> None:
    from pard_onnx.runtime.pair import load
    from pard_onnx.runtime.sampling.logprobs import checked_top

    target, draft = models_of(options)
    prompt = read_prompt(options.prompt, options.prompt_file)
    arguments = checked_arguments(template_arguments(options))  # refused before the models load
    if arguments and not options.chat:
        raise BadInput("--template-arg is for the chat template; give --chat too, or leave it out")
    for name in ("logprobs", "prompt_logprobs"):
        if checked_top("--" + name.replace("_", "-"), getattr(options, name)) is not None and not options.json:
            raise BadInput(f"--{name.replace('_', '-')} is a part of the JSON object; give --json too, or leave it out")
    generation = {
        "max_new_tokens": options.max_new_tokens,
        "draft_length": options.draft_length,
        "lookup": options.lookup,
        "exact": options.exact,
        "chat": options.chat,
        "timeout": options.timeout,
        "template_arguments": arguments,
        "special_tokens": options.special_tokens,
        "logprobs": options.logprobs,
        "prompt_logprobs": options.prompt_logprobs,
        **stop_arguments(options),
        **tool_arguments(options),
        **grammar_arguments(options),
        **sampling_arguments(options),
    }
    with load(target, draft, **load_arguments(options), **revision_arguments(options)) as pair:
        generation, how = with_own_sampling(pair, generation, "greedy")
        if how:
            print(how, file=sys.stderr)
        stream = pair.stream(prompt, **generation)
        with stream:
            show(stream, pair, Thoughts(options), as_json=options.json)


def read_prompt(text: str | None, file: Path | None) -> str:
    """The prompt of --prompt, --prompt-file or stdin; BadInput if it cannot be read, is not UTF-8, or is empty."""
    source = "--prompt" if text is not None else str(file or "stdin")
    try:
        prompt = text if text is not None else file.read_text(encoding="utf-8") if file else read_stdin()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{source}: the prompt cannot be read: {error}") from error
    prompt = prompt.removeprefix("\ufeff")  # Windows editors and pipes write a byte order mark first
    if not prompt:
        raise BadInput(f"{source}: the prompt is empty")
    return prompt


def read_stdin() -> str:
    if sys.stdin.isatty():
        raise BadInput("no prompt; give --prompt or --prompt-file, or pipe it in")
    return sys.stdin.read()


def show(stream: Stream, pair: Pair, thoughts: Thoughts, *, as_json: bool) -> None:
    for chunk in stream:
        if not as_json:
            thoughts.show(chunk)
            sys.stdout.write(for_stdout(chunk.text))
            sys.stdout.flush()
    if as_json:
        print(json.dumps(summary(stream.result, pair), ensure_ascii=False))
        return
    thoughts.end_line()
    result = stream.result
    lines = call_lines(result)
    print("\n".join(([""] if result.text or not lines else []) + lines))


def summary(result: Result, pair: Pair) -> dict[str, Any]:
    """The JSON object of --json; its keys are a part of Result's, Stats' and Pair's."""
    stats = result.stats
    asked = {"logprobs": result.logprobs, "prompt_logprobs": result.prompt_logprobs}
    return {
        "text": result.text,
        "reasoning": result.reasoning,
        "tool_calls": [call.as_message() for call in result.tool_calls],
        "tokens": list(result.tokens),
        "prompt_tokens": stats.prompt_tokens,
        "new_tokens": stats.new_tokens,
        "finish_reason": result.finish_reason,
        "accepted": list(stats.accepted),
        "mean_accepted": stats.mean_accepted,
        "tokens_per_second": stats.tokens_per_second,
        "time_to_first_token": stats.time_to_first_token,
        "seconds": asdict(stats.seconds),
        "sources": list(stats.sources),
        "ahead": stats.ahead,
        "ahead_used": stats.ahead_used,
        "exact": stats.exact,
        "widths": list(stats.widths),
        "provider": stats.provider,
        "draft_provider": stats.draft_provider,
        "provider_reason": stats.provider_reason,
        "kernel": stats.kernel,
        "seed": stats.seed,
        "target_commit": pair.target_commit,
        "draft_commit": pair.draft_commit,
        **{name: [one and one.openai() for one in found] for name, found in asked.items() if found is not None},
    }


if __name__ == "__main__":
    sys.exit(main())

"""Tasks of lm-evaluation-harness on an exported pair, so that quality is measured by the field's own tasks.

    python benchmarks/quality/harness.py --target DIR [--draft DIR] --tasks hellaswag,gsm8k [--limit N]

Also as `python -m pard_onnx.benchmarks.quality.harness`. Needs the extra `eval`. A draft changes no result; tasks that
generate are faster with it. From Python, once pard_onnx.benchmarks.quality.harness_model is imported:
lm_eval.simple_evaluate("pard-onnx", {"target": DIR}, tasks=[...]).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pard_onnx.cli import Parser, exit_code
from pard_onnx.generation_options import add_providers, add_revisions, load_arguments, revision_arguments
from pard_onnx.models.atomic import atomic_file
from pard_onnx.models.checks import require_whole
from pard_onnx.models.errors import BadInput
from pard_onnx.models.extras import needs
from pard_onnx.runtime.pair import load

KEPT = ("results", "groups", "versions", "n-shot", "n-samples")  # of what the harness returns


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="harness.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="exported target: a folder or a hub id")
    parser.add_argument("--draft", help="exported PARD draft, for tasks that generate")
    parser.add_argument("--tasks", required=True, metavar="NAME,NAME", help="tasks of the harness")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="a folder with tasks of your own (YAML files)")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--apply-chat-template", action="store_true", help="contexts are messages of a user")
    parser.add_argument("--max-gen-toks", type=int, default=256, metavar="N", help="where a task says none")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    add_revisions(parser)
    add_providers(parser)
    options = parser.parse_args(argv)
    return exit_code(lambda: evaluate(options))


def evaluate(options: argparse.Namespace) -> None:
    """Run the tasks and print the harness's table."""
    with needs("eval"):
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table

        from pard_onnx.benchmarks.quality.harness_model import PardOnnx
    for name, least in (("limit", 1), ("num_fewshot", 0)):
        if getattr(options, name) is not None:
            require_whole("--" + name.replace("_", "-"), getattr(options, name), least)
    if options.include_path is not None and not options.include_path.is_dir():
        raise BadInput(f"--include-path {options.include_path}: no such folder")
    if options.output is not None and not options.output.parent.is_dir():
        raise BadInput(f"--output {options.output}: no such folder")
    manager = TaskManager(include_path=str(options.include_path) if options.include_path else None)
    tasks = known_tasks(options.tasks.split(","), manager)
    with load(options.target, options.draft, **load_arguments(options), **revision_arguments(options)) as pair:
        found = simple_evaluate(
            PardOnnx(pair, max_gen_toks=options.max_gen_toks),
            tasks=tasks,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            task_manager=manager,
        )
    print(make_table(found))
    if options.output:
        kept = {name: found[name] for name in KEPT if name in found}
        with atomic_file(options.output) as file:
            file.write((json.dumps(kept, indent=2, default=str) + "\n").encode())


def known_tasks(names: Iterable[str], manager: Any) -> list[str]:
    """The names of tasks; BadInput for one that the harness does not have."""
    wanted = [name.strip() for name in names if name.strip()]
    for name in wanted:
        if not manager.match_tasks([name]):
            raise BadInput(
                f"--tasks {name!r}: no such task; `lm_eval ls tasks` names them, --include-path adds your own"
            )
    if not wanted:
        raise BadInput("--tasks names no task; give names with commas between them")
    return wanted


if __name__ == "__main__":
    sys.exit(main())

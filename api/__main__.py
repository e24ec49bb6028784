"""`python -m pard_onnx COMMAND ...` runs pard-COMMAND, where the folder of the scripts is not on the path."""

import sys

COMMANDS = ("generate", "chat", "serve", "models", "adapt", "export", "quantize", "bench", "demo", "doctor", "deploy")


def main() -> None:
    """Ends the process with the command's exit code, or with 2 where there is no such command."""
    from pard_onnx import entry_points  # sets the signal handlers, so not where this module is only imported

    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        name = sys.argv.pop(1)
        entry_points.run(f"{name}_command")
    from pard_onnx.cli import Parser

    parser = Parser(prog="python -m pard_onnx", description="Run a command of pard-onnx.")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=", ".join(COMMANDS))
    parser.parse_args()


if __name__ == "__main__":
    main()

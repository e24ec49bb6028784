"""What PyInstaller needs to know to freeze an application that uses this package. It finds this by an entry point."""

from pathlib import Path


def hook_folders() -> list[str]:
    """The folder of the hooks, for the entry point `hook-dirs` of PyInstaller."""
    return [str(Path(__file__).parent)]

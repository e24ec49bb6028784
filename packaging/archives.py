"""Wheels and sdists that have the same bytes whenever and wherever they are made."""

import base64
import gzip
import hashlib
import io
import tarfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

OLDEST = 315532800  # 1980: a zip file knows no earlier time


def write_sdist(source: Path, path: Path, epoch: int) -> None:
    """Write the sdist `source` again: files in order, all of one time and of no user."""
    packed = io.BytesIO()
    with tarfile.open(source) as old, tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted((one for one in old if one.isfile()), key=lambda one: one.name):
            info = tarfile.TarInfo(member.name)
            info.size, info.mtime = member.size, epoch
            info.mode = 0o755 if member.mode & 0o100 else 0o644
            new.addfile(info, old.extractfile(member))
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=epoch) as compressed:
        compressed.write(packed.getvalue())


def read_wheel(path: Path) -> dict[str, bytes]:
    """The files of a wheel, by their names."""
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/")}


def with_tag(files: Mapping[str, bytes], tag: str, pure: bool) -> dict[str, bytes]:
    """The files as a wheel for the platform `tag`: WHEEL names the tags, and RECORD is made anew."""
    out = dict(files)
    [wheel] = [name for name in files if name.endswith(".dist-info/WHEEL")]
    record = wheel.replace("/WHEEL", "/RECORD")
    kept = [line for line in files[wheel].decode().splitlines() if line.startswith(("Wheel-Version:", "Generator:"))]
    tags = [f"Tag: py3-none-{one}" for one in tag.split(".")]
    out[wheel] = "\n".join([*kept, f"Root-Is-Purelib: {str(pure).lower()}", *tags, ""]).encode()
    del out[record]
    lines = [f"{name},sha256={urlsafe_digest(data)},{len(data)}" for name, data in sorted(out.items())]
    out[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    return out


def urlsafe_digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def write_wheel(files: Mapping[str, bytes], path: Path, epoch: int) -> None:
    """Write a wheel: files in order, the metadata last, all of one time."""
    date = time.gmtime(max(epoch, OLDEST))[:6]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as wheel:
        for name in sorted(files, key=lambda one: (".dist-info/" in one, one.endswith("/RECORD"), one)):
            info = zipfile.ZipInfo(name, date)
            info.compress_type, info.create_system = zipfile.ZIP_DEFLATED, 3  # Unix, of which the mode is
            info.external_attr = 0o100644 << 16
            wheel.writestr(info, files[name])

"""pard_onnx.json: written and read back, and folders that do not match it refused."""

import hashlib
import json
import os
from dataclasses import replace

import pytest

from pard_onnx.models import manifest as manifests
from pard_onnx.models.errors import BadArtifact
from pard_onnx.models.manifest import FILE_NAME, FORMAT_VERSION, File, Manifest, Parity, Source, TensorReport
from pard_onnx.models.manifest_faults import faults
from pard_onnx.models.precision import FLOAT32, recipe
from pard_onnx.models.spec import Llama3Scaling, ModelSpec, Pard, Rope, TargetFeatures, Vocabulary

SPEC = ModelSpec(
    family="llama",
    layers=2,
    hidden=64,
    intermediate=96,
    heads=4,
    kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    rope=Rope(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
    qk_norm=False,
    qkv_bias=False,
    tied=True,
    max_positions=131072,
    dtype="bfloat16",
    vocabulary=Vocabulary(320, 300, (299, 297), None),
    chat_template="{{ 'né' }}\n",
    pard=Pard(300),
)
MANIFEST = Manifest(
    role="draft",
    spec=SPEC,
    precision="int8",
    recipe=replace(recipe("int8"), overrides=(("model.layers.0.*", FLOAT32),)),
    opset=21,
    attention="gqa",
    capacity=4096,
    kv_rows=4160,
    kv_dtype="float32",
    files=(),
    source=Source("amd/PARD-Llama-3.2-1B", "0" * 40),
    tools=(("torch", "2.13.0"),),
    tensors=(TensorReport("lm_head", "int8-b128", 1000, 0.004),),
    parity=Parity(20, 1e-4, 1e-5, 1.0, 2e-4),
)


CONTENTS = {"model.onnx": b"graph", "model.onnx.data": bytes(range(256)) * 10, "tokenizer.json": b"{}"}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    folder = tmp_path / "cache"
    monkeypatch.setenv("PARD_ONNX_CACHE", str(folder))
    return folder


@pytest.fixture
def artifact(tmp_path):
    folder = tmp_path / "modèle exporté"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
        os.utime(folder / name, ns=(10**18, 10**18))
    replace(MANIFEST, files=tuple(File.of(folder / name) for name in CONTENTS)).write(folder)
    return folder


def change(folder, **values):
    value = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    (folder / FILE_NAME).write_text(json.dumps(value | values), encoding="utf-8")


def test_round_trip(artifact):
    manifest = Manifest.read(artifact)
    assert replace(MANIFEST, files=manifest.files) == manifest
    assert manifest.format_version == FORMAT_VERSION
    assert File("model.onnx", 5, hashlib.sha256(b"graph").hexdigest()) == manifest.files[0]
    assert b"\r" not in (artifact / FILE_NAME).read_bytes()
    manifest.verify(artifact)


def test_writing_again_replaces_and_leaves_nothing_else(artifact):
    before = sorted(artifact.iterdir())
    replace(Manifest.read(artifact), capacity=77).write(artifact)
    assert Manifest.read(artifact).capacity == 77
    assert before == sorted(artifact.iterdir())


def test_a_write_that_fails_leaves_the_old_manifest(artifact):
    before = sorted(artifact.iterdir())
    with pytest.raises(ValueError, match="JSON"):
        replace(MANIFEST, parity=Parity(1, float("nan"), 0.0, 0.0, 0.0)).write(artifact)
    assert before == sorted(artifact.iterdir())
    assert Manifest.read(artifact).parity == MANIFEST.parity


def test_a_rename_that_fails_leaves_nothing(tmp_path):
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(OSError):
        MANIFEST.write(tmp_path)
    assert [tmp_path / FILE_NAME] == list(tmp_path.iterdir())


def test_no_folder(tmp_path):
    with pytest.raises(BadArtifact, match="no such folder"):
        Manifest.read(tmp_path / "absent")


def test_no_manifest(tmp_path):
    with pytest.raises(BadArtifact, match=r"has no pard_onnx\.json; run pard-export"):
        Manifest.read(tmp_path)


def test_a_checkpoint_is_not_an_artifact(tiny, tmp_path):
    with pytest.raises(BadArtifact, match="is a checkpoint, not exported yet; run pard-export"):
        Manifest.read(tiny(tmp_path / "checkpoint"))


def test_newer_format(artifact):
    change(artifact, format_version=FORMAT_VERSION + 1, new_key=1)
    with pytest.raises(BadArtifact, match=r"has format version 2.*reads up to 1; update pard-onnx"):
        Manifest.read(artifact)


def test_broken_json(artifact):
    (artifact / FILE_NAME).write_text("{", encoding="utf-8")
    with pytest.raises(BadArtifact, match=r"pard_onnx\.json: not valid JSON"):
        Manifest.read(artifact)


def test_misfits_are_named(artifact):
    change(artifact, rolle="draft")
    with pytest.raises(BadArtifact, match=r"pard_onnx\.json: unknown key 'rolle'; the nearest known one is 'role'"):
        Manifest.read(artifact)


def test_a_missing_file(artifact):
    (artifact / "model.onnx.data").unlink()
    with pytest.raises(BadArtifact, match=r"model\.onnx\.data: is missing.*export or download it again"):
        Manifest.read(artifact).verify(artifact)


def test_a_truncated_file(artifact):
    (artifact / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(BadArtifact, match=r"model\.onnx\.data: has 5 bytes instead of 2560"):
        Manifest.read(artifact).verify(artifact)


def test_a_changed_byte_is_found_after_a_good_load(artifact, cache):
    manifest = Manifest.read(artifact)
    manifest.verify(artifact)
    assert len(list((cache / "stamps").iterdir())) == 3
    (artifact / "model.onnx").write_bytes(b"grapH")
    with pytest.raises(BadArtifact, match=r"model\.onnx: has been changed \(its hash differs\)"):
        manifest.verify(artifact)


def test_files_stay_inside_the_folder(artifact):
    (artifact.parent / "outside").write_bytes(b"graph")
    outside = replace(File.of(artifact.parent / "outside"), name="../outside")
    with pytest.raises(BadArtifact, match="is not the name of a file beside it"):
        replace(MANIFEST, files=(outside,)).verify(artifact)


def count_hashes(monkeypatch):
    hashed = []
    real = manifests._sha256
    monkeypatch.setattr(manifests, "_sha256", lambda path, *count: hashed.append(path.name) or real(path, *count))
    return hashed


def test_unchanged_files_are_hashed_once(artifact, monkeypatch):
    hashed = count_hashes(monkeypatch)
    manifest = Manifest.read(artifact)
    manifest.verify(artifact)
    manifest.verify(artifact)
    assert hashed == [*CONTENTS]


def test_young_files_are_not_stamped(artifact, monkeypatch):
    os.utime(artifact / "model.onnx")
    hashed = count_hashes(monkeypatch)
    manifest = Manifest.read(artifact)
    manifest.verify(artifact)
    manifest.verify(artifact)
    assert hashed == [*CONTENTS, "model.onnx"]


def test_a_cache_that_cannot_be_written_is_silent(artifact, cache):
    cache.write_text("a file where the folder should be")
    Manifest.read(artifact).verify(artifact)
    Manifest.read(artifact).verify(artifact)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"PARD_ONNX_CACHE": "here"}, "here"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/pard-onnx"),
        ("linux", {}, "home/.cache/pard-onnx"),
        ("win32", {"LOCALAPPDATA": "local", "XDG_CACHE_HOME": "xdg"}, "local/pard-onnx"),
        ("win32", {}, "home/AppData/Local/pard-onnx"),
    ],
)
def test_cache_folder(monkeypatch, tmp_path, platform, variables, expected):
    from pard_onnx.models import cache_folder as stamps

    for name in ("PARD_ONNX_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setattr(stamps.sys, "platform", platform)
    monkeypatch.setattr(stamps.Path, "home", lambda: tmp_path / "home")
    assert tmp_path / expected == stamps.cache_folder()


@pytest.mark.parametrize(
    "edit", [{"kv_rows": 4161}, {"capacity": 10**9}, {"files": []}, {"sha256": "0"}, {"parity": None}]
)
def test_a_manifest_that_was_edited_is_refused(artifact, edit):
    change(artifact, **edit)
    with pytest.raises(
        BadArtifact, match=r"pard_onnx\.json: has been changed since it was written; export or download"
    ):
        Manifest.read(artifact)


def test_a_manifest_may_be_laid_out_anew(artifact):
    expected = Manifest.read(artifact)
    change(artifact)
    assert expected == Manifest.read(artifact)


def test_a_manifest_from_before_an_entry_was_added(artifact):
    """Entries that came later have a default, and a digest of what was there holds."""
    value = json.loads((artifact / FILE_NAME).read_text(encoding="utf-8"))
    for later in ("draft_vocabulary", "graphs", "quantization", manifests.SEAL):
        del value[later]
    old = value | {manifests.SEAL: manifests._digest(value)}
    (artifact / FILE_NAME).write_text(json.dumps(old), encoding="utf-8")
    found = Manifest.read(artifact)
    assert found.draft_vocabulary is None and found.columns == SPEC.vocabulary.rows


FEATURES = TargetFeatures((-1, -2), 128)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"feature_layers": (-1,)}, "it is a draft that has feature_layers"),
        ({"role": "target", "feature_layers": (-4,)}, "feature_layers is -4; it must be from -3 to -1"),
        ({"role": "target", "feature_layers": (0,)}, "feature_layers is 0; it must be"),
        ({"role": "target", "feature_layers": (-1, -1)}, "feature_layers has -1 twice"),
        ({"features": replace(FEATURES, width=0)}, "spec.pard.features.width is 0"),
        ({"features": replace(FEATURES, width=1 << 40)}, "spec.pard.features.width is 1099511627776"),
        ({"features": replace(FEATURES, layers=(-1, 1 << 40))}, "spec.pard.features.layers is 1099511627776"),
        ({"features": replace(FEATURES, layers=())}, "spec.pard.features has 0 layers"),
        ({"features": replace(FEATURES, width=127)}, "spec.pard.features has 2 layers, and the width 127"),
        ({"features": replace(FEATURES, scale=-1.0)}, "spec.pard.features.scale is -1.0"),
    ],
)
def test_features_that_no_model_has(changes, problem):
    pard = Pard(300, "pard2", changes.pop("features", FEATURES))
    spec = replace(SPEC, pard=None if changes.get("role") == "target" else pard)
    assert not list(relevant(replace(MANIFEST, spec=replace(SPEC, pard=Pard(300, "pard2", FEATURES)))))
    assert any(found.startswith(problem) for found in relevant(replace(MANIFEST, spec=spec, **changes)))


def relevant(manifest):
    return [problem for problem in faults(manifest) if "feature" in problem]

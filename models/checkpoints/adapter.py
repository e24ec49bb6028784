"""`Adapter`: a LoRA adapter in peft's layout, merged into a checkpoint's tensors as peft merges it.

adapter_config.json says which modules are changed and how strongly, adapter_model.safetensors holds the weights. The
names of modules are matched by peft's own rules. What the configuration says and the file does not hold, or the other
way round, is refused: peft would ignore it with a warning.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pard_onnx.models.errors import BadCheckpoint, shown
from pard_onnx.models.folder_files import require_files
from pard_onnx.models.json_files import read_json

from .config import Config
from .merged import BiasSum, Change, ChangedTensor, EmbeddingProduct, NewRows, Product, ReplacedTensor
from .module_patterns import ModulePatterns, NotAnExpression, Pattern, TooSlow
from .tensors import DTYPES, HEAD, Tensor, TensorEntry, read_header

FILE = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."  # of the names of the file's tensors
EMBED_MODULE, HEAD_MODULE = "model.embed_tokens", HEAD.removesuffix(".weight")
TOKENS = "token_adapter.trainable_tokens_delta"
ENDS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", TOKENS)
ALL_LINEAR = "all-linear"
# Keys that are read, and those that cannot change what a merged adapter computes
READ = frozenset(
    (
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "lora_bias",
        "trainable_token_indices",
        "ensure_weight_tying",
        "init_lora_weights",
    )
)
HARMLESS = frozenset(
    (
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "inference_mode",
        "lora_dropout",
        "fan_in_fan_out",  # peft switches it off for the linear layers of these models
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
    )
)
# Initializations that leave the base's weights as they are; others subtract from them when the adapter is loaded
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter. Tensors by the names of the base's modules, without peft's prefix."""

    folder: Path
    config: Config
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Read the configuration and the header of the weights. Raises BadCheckpoint."""
        if folder.is_dir():
            require_files(folder, BadCheckpoint)
        if not (folder / FILE).is_file():
            raise BadCheckpoint(f"{folder}: no {FILE}, so not a LoRA adapter; --adapter takes a folder that peft saved")
        config = Config(folder / FILE, read_json(folder / FILE, BadCheckpoint))
        _require_plain_lora(config)
        if not (folder / WEIGHTS).is_file():
            pickled = f" ({PICKLE} is a pickle, which is never loaded)" if (folder / PICKLE).is_file() else ""
            raise BadCheckpoint(f"{folder}: no {WEIGHTS}{pickled}; save the adapter with peft's save_pretrained")
        found: dict[str, TensorEntry] = {}
        for name, entry in read_header(folder / WEIGHTS).items():
            if not name.startswith(PREFIX):
                raise BadCheckpoint(
                    f"{entry.file}: tensor {name} is not of peft's layout; its names begin with {PREFIX}"
                )
            if entry.dtype not in DTYPES:
                raise BadCheckpoint(
                    f"{entry.file}: tensor {name} is stored as {entry.dtype}; supported: {', '.join(DTYPES)}"
                )
            found[name.removeprefix(PREFIX)] = entry
        return cls(folder, config, found)

    def sha256(self) -> str:
        """The digest of the configuration and the weights."""
        digest = hashlib.sha256()
        for name in (FILE, WEIGHTS):
            with (self.folder / name).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def merged(self, base: Mapping[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
        """The base's tensors with the adapter's changes. Raises BadCheckpoint where the two do not fit.

        tied: the base has no head of its own. The result has one where the adapter tells it from the embedding.
        """
        return _Merge(self, dict(base), tied).run()


def base_of(folder: Path) -> str:
    """The name of the base in an adapter's configuration, for errors; BASE where it has none."""
    named = read_json(folder / FILE, BadCheckpoint).get("base_model_name_or_path")
    return named if isinstance(named, str) and named else "BASE"


def _require_plain_lora(config: Config) -> None:
    """BadCheckpoint for another kind of adapter, and for keys with which merging is something else than adding B A."""
    kind = config.values.get("peft_type")
    if kind != "LORA":
        raise config.fault("peft_type", f"is {shown(kind)}; only 'LORA' is merged")
    for key, value in config.values.items():
        if value and key not in READ and key not in HARMLESS:
            raise config.fault(key, f"is {shown(value)}; adapters with it are not merged, only plain LoRA is")
    for key in ("layers_to_transform", "layers_pattern"):
        if config.values.get(key) and isinstance(config.values.get("target_modules"), str):
            raise config.fault(key, "is there beside a pattern in target_modules; peft takes it beside a list only")
    if config.values.get("layers_pattern") and config.values.get("layers_to_transform") is None:
        raise config.fault("layers_pattern", "is there without layers_to_transform, which peft refuses")
    start = config.values.get("init_lora_weights")
    if not any(start is plain or (isinstance(start, str) and start == plain) for plain in PLAIN_STARTS):
        raise config.fault(
            "init_lora_weights",
            f"is {shown(start)}, which changes the base's weights too; convert the adapter to plain LoRA in peft "
            "(save_pretrained with path_initial_model_for_weight_conversion)",
        )


@dataclass
class _Merge:
    """One merge: the adapter, and the base's tensors, which are changed."""

    adapter: Adapter
    tensors: dict[str, Tensor]
    tied: bool

    def run(self) -> dict[str, Tensor]:
        stored = self._by_module()
        if self.tied:
            self.tensors[HEAD] = self.tensors[f"{EMBED_MODULE}.weight"]
        self._replace(whole=False)  # what peft loads into the base itself, before it adds anything
        self._require_saved_modules()
        self._replace(whole=True)
        targets = set(self._targets())
        for module in sorted(targets ^ {module for module, ends in stored.items() if ends - {TOKENS}}):
            problem = "has no weights of" if module in targets else f"holds weights of what {FILE} does not target:"
            raise BadCheckpoint(f"{self._file}: {problem} {module}")
        for module in sorted(targets):
            self._add(module, stored[module])
        if self.tied and self._config.flag("ensure_weight_tying") and {EMBED_MODULE, HEAD_MODULE} <= targets:
            self.tensors[HEAD] = self.tensors[f"{EMBED_MODULE}.weight"]  # both products are the same
        self._replace_rows(stored)
        if self.tied and self.tensors[HEAD] is self.tensors[f"{EMBED_MODULE}.weight"]:
            del self.tensors[HEAD]
        return self.tensors

    @cached_property
    def _patterns(self) -> ModulePatterns:
        modules = {name.removesuffix(".weight") for name in self.tensors}
        try:
            return ModulePatterns(_patterns_of(self._config), sorted(modules))
        except TooSlow as problem:
            raise BadCheckpoint(f"{self._config.path}: {problem}; name the modules instead") from None

    def _matches(self, key: str, pattern: Pattern, module: str) -> tuple[bool, str | None]:
        """Whether a pattern of the configuration matches the module's name, and the number of a layer in it."""
        try:
            return self._patterns.match(pattern, module)
        except NotAnExpression as problem:
            raise self._config.fault(key, f"has a pattern that is not a regular expression: {problem}") from None

    @property
    def _file(self) -> Path:
        return self.adapter.folder / WEIGHTS

    @property
    def _config(self) -> Config:
        return self.adapter.config

    def _by_module(self) -> dict[str, set[str]]:
        """The endings of the adapter's tensors that change a module, by its name."""
        found: dict[str, set[str]] = {}
        for name in self.adapter.tensors:
            end = next((end for end in ENDS if name.endswith(f".{end}")), None)
            if end:
                found.setdefault(name.removesuffix(f".{end}"), set()).add(end)
        return found

    # Tensors that take the place of the base's

    def _replace(self, *, whole: bool) -> None:
        """Put the adapter's own copies in place: of modules_to_save (`whole`), or what else was saved with it.

        A copy of a module stands alone; what is loaded into the base is shared by tied matrices.
        """
        for name, entry in self.adapter.tensors.items():
            if name.endswith(ENDS):
                continue
            plain = name.replace(".token_adapter.", ".").replace(".base_layer.", ".")
            if self._is_saved(plain) != whole:
                continue
            old = self.tensors.get(plain)
            resizable = plain in (HEAD, f"{EMBED_MODULE}.weight")
            fixed = slice(1 if resizable else 0, None)  # the extents that may not change
            if old is None or old.shape[fixed] != entry.shape[fixed]:
                told = "the base has no such tensor" if old is None else f"the base's is {list(old.shape)}"
                raise BadCheckpoint(f"{self._file}: tensor {PREFIX}{name} is {list(entry.shape)}; {told}")
            both = self.tied and resizable and not whole
            for target in (HEAD, f"{EMBED_MODULE}.weight") if both else (plain,):
                self.tensors[target] = ReplacedTensor(entry, old.dtype, self._file)
            if both:
                self.tensors[HEAD] = self.tensors[f"{EMBED_MODULE}.weight"]

    def _is_saved(self, name: str) -> bool:
        """Whether the tensor is of a module of modules_to_save, or of a module inside one."""
        saved = _names(self._config, "modules_to_save")
        parts = name.split(".")[:-1]
        paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(path.endswith(wanted) for path in paths for wanted in saved)

    def _require_saved_modules(self) -> None:
        for name in self.tensors:
            if self._is_saved(name) and name not in self.adapter.tensors:
                if name == HEAD and self.tied and self._config.flag("ensure_weight_tying"):
                    continue
                raise BadCheckpoint(f"{self._file}: no tensor {PREFIX}{name}, which modules_to_save asks for")

    # Sums

    def _targets(self) -> Iterator[str]:
        """The modules that the configuration targets, by peft's rules (`check_target_module_exists`)."""
        targets = self._config.values.get("target_modules")
        linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
        matrices = [name.removesuffix(".weight") for name, tensor in self.tensors.items() if len(tensor.shape) == 2]
        tie = self.tied and self._config.flag("ensure_weight_tying")
        for module in matrices:
            if self._is_excluded(module):
                continue
            if linear:
                found = module not in (EMBED_MODULE, HEAD_MODULE)
            elif isinstance(targets, str):
                found = self._matches("target_modules", Pattern(targets, whole=True), module)[0]
            else:
                found = self._is_listed(module, _names(self._config, "target_modules"))
                pair = {EMBED_MODULE, HEAD_MODULE}
                if tie and module in pair and not found:
                    found = any(self._is_listed(one, _names(self._config, "target_modules")) for one in pair)
            if found:
                yield module

    def _is_excluded(self, module: str) -> bool:
        excluded = self._config.values.get("exclude_modules")
        if isinstance(excluded, str):
            if excluded and self._matches("exclude_modules", Pattern(excluded, whole=True), module)[0]:
                return True
        elif any(module == name or module.endswith(f".{name}") for name in _names(self._config, "exclude_modules")):
            return True
        saved = map(_saved_pattern, _names(self._config, "modules_to_save"))
        return any(self._matches("modules_to_save", pattern, module)[0] for pattern in saved)

    def _is_listed(self, module: str, targets: tuple[str, ...]) -> bool:
        if module in targets:
            return True
        if not any(module.endswith(f".{target}") for target in targets):
            return False
        layers = self._config.values.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        if isinstance(layers, bool) or not isinstance(layers, int | list):
            raise self._config.fault(
                "layers_to_transform", f"is {shown(layers)}; it must be a number or a list of them"
            )
        for pattern in _layer_patterns(self._config):
            found, number = self._matches("layers_pattern", pattern, module)
            if found:
                return int(number or 0) in (layers if isinstance(layers, list) else [layers])
        return False

    def _scaling(self, module: str, rank: int) -> float:
        """What the product is multiplied by. rank: of the stored matrices."""
        config = self._config
        r, alpha = (
            self._number(pattern, module, default)
            for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        if r != rank:
            raise BadCheckpoint(f"{self._file}: {module} has rank {rank}; {FILE} says {r:g}")
        return alpha / (math.sqrt(r) if config.flag("use_rslora") else r)

    def _number(self, pattern: str, module: str, default: str) -> float:
        """The first entry of a pattern that matches the module, or the default (`get_pattern_key`; peft's own is 8)."""
        part = self._config.inside(pattern)
        for key in part.values:
            if self._matches(pattern, _key_pattern(key), module)[0]:
                return part.number(key)
        return part.number(module) if module in part.values else self._config.number(default, 8.0)

    def _add(self, module: str, ends: set[str]) -> None:
        name, embeds = f"{module}.weight", module == EMBED_MODULE
        wanted = {"lora_embedding_A", "lora_embedding_B"} if embeds else {"lora_A.weight", "lora_B.weight"}
        odd = sorted(wanted ^ (ends - {"lora_B.bias"}))
        if odd:
            problem = "no tensor" if odd[0] in wanted else "cannot merge tensor"
            raise BadCheckpoint(f"{self._file}: {problem} {PREFIX}{module}.{odd[0]}")
        a, b = (self.adapter.tensors[f"{module}.{end}"] for end in sorted(wanted))
        rank, (rows, width) = a.shape[0] if a.shape else 0, self.tensors[name].shape
        if embeds:
            rows, width = width, rows
        for entry, end, shape in ((a, "A", (rank, width)), (b, "B", (rows, rank))):
            if entry.shape != shape:
                raise BadCheckpoint(
                    f"{self._file}: lora_{end} of {module} is {list(entry.shape)}; the base needs {list(shape)}"
                )
        scaling = self._scaling(module, rank)
        self._change(name, EmbeddingProduct(a, b, scaling) if embeds else Product(a, b, scaling))
        if self._config.flag("lora_bias"):
            self._add_bias(module, scaling)

    def _add_bias(self, module: str, scaling: float) -> None:
        bias, old = self.adapter.tensors.get(f"{module}.lora_B.bias"), self.tensors.get(f"{module}.bias")
        if bias is None or old is None or bias.shape != old.shape:
            raise BadCheckpoint(
                f"{self._file}: lora_bias is true, which needs a bias of {module} in the base and in the adapter"
            )
        self._change(f"{module}.bias", BiasSum(bias, scaling))

    def _replace_rows(self, stored: Mapping[str, set[str]]) -> None:
        """Put the rows of trainable_token_indices in place; a tied head has those of the embedding."""
        key = "trainable_token_indices"
        indices = self._config.values.get(key)
        named = indices if isinstance(indices, dict) else {EMBED_MODULE: indices} if indices else {}
        holders = {module for module, ends in stored.items() if TOKENS in ends}
        for module, ids in named.items():
            whole = next((name for name in (EMBED_MODULE, HEAD_MODULE) if name.endswith(module)), None)
            if whole not in holders:
                raise BadCheckpoint(f"{self._file}: no tensor {PREFIX}{whole or module}.{TOKENS}, which {key} asks for")
            holders.remove(whole)
            self._replace_rows_of(whole, Config(self._config.path, {key: ids}))
        for module in sorted(holders):
            raise BadCheckpoint(f"{self._file}: {PREFIX}{module}.{TOKENS} is there, but {key} does not name it")

    def _replace_rows_of(self, module: str, part: Config) -> None:
        name, rows = f"{module}.weight", self.adapter.tensors[f"{module}.{TOKENS}"]
        base = self.tensors[name]
        ids = part.ids("trainable_token_indices", base.shape[0])
        if rows.shape != (len(ids), base.shape[1]):
            raise BadCheckpoint(
                f"{self._file}: {PREFIX}{module}.{TOKENS} is {list(rows.shape)}; trainable_token_indices and the base "
                f"need {[len(ids), base.shape[1]]}"
            )
        shared = self.tied and module == EMBED_MODULE and self.tensors[HEAD] is base
        self._change(name, NewRows(ids, rows))
        if shared:
            self.tensors[HEAD] = self.tensors[name]

    def _change(self, name: str, change: Change) -> None:
        self.tensors[name] = ChangedTensor(self.tensors[name], change, self._file)


def _names(config: Config, key: str) -> tuple[str, ...]:
    """One name or a list of them; () if absent."""
    value: Any = config.values.get(key)
    found = [value] if isinstance(value, str) and value else value or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise config.fault(key, f"is {shown(value)}; it must be a list of names")
    return tuple(found)


def _ids(config: Config, value: Any, rows: int) -> tuple[int, ...]:
    key = "trainable_token_indices"
    return Config(config.path, {key: value}).ids(key, rows)


def _patterns_of(config: Config) -> Iterator[Pattern]:
    """All patterns of the configuration."""
    for key in ("target_modules", "exclude_modules"):
        value = config.values.get(key)
        if isinstance(value, str):
            yield Pattern(value, whole=True)
    yield from map(_saved_pattern, _names(config, "modules_to_save"))
    yield from _layer_patterns(config)
    for key in ("rank_pattern", "alpha_pattern"):
        yield from map(_key_pattern, config.inside(key).values)


def _saved_pattern(name: str) -> Pattern:
    return Pattern(name, r"(^|.*\.)", r"($|\..*)")


def _key_pattern(key: str) -> Pattern:
    return Pattern(key, r"(.*\.)?(", ")$")


def _layer_patterns(config: Config) -> list[Pattern]:
    number = r"\.(?P<idx>\d+)\."
    named = [Pattern(name, r"(?:^|.*?\.)", number) for name in _names(config, "layers_pattern")]
    return named or [Pattern("", r".*?\.[^.]*", number)]

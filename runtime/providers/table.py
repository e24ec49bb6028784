"""Execution providers: a table of what users call them, how they are installed, what they take and what they can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from pard_onnx.models.devices import DEVICES
from pard_onnx.models.errors import BadProvider

HOST = "cpu"  # IO binding's name for memory that is no device's
SESSION_OPTION = "ep."  # options of this prefix are the session's, such as ep.context_enable
EP_CONTEXT = ("ep.context_enable", "ep.context_file_path", "ep.context_embed_mode")


@dataclass(frozen=True, slots=True)
class Provider:
    """key: as in `--provider`; ort: ONNX Runtime's name; install: what brings it; plugin: the Python module that
    carries it as a plugin library, if one does.

    names: of the options that it takes; device_option: of these, which device it runs on.
    memory: where its KV caches live, in IO binding's words; in_place: the attention variants whose past and present
    may share a buffer there, others get two by turns.
    options: what was chosen of `names`.
    """

    key: str
    ort: str
    install: str
    names: tuple[str, ...] = ()
    device_option: str = "device_id"
    memory: str = HOST
    in_place: tuple[str, ...] = ()
    plugin: str | None = None
    options: tuple[tuple[str, str], ...] = ()

    @property
    def attention(self) -> tuple[str, ...]:
        """The attention variants of graphs that it can run."""
        return DEVICES[self.key].provider_attention

    @property
    def static(self) -> bool:
        """Whether it needs graphs of fixed shapes."""
        return DEVICES[self.key].static

    @property
    def device(self) -> int:
        """The number of the device that it runs on."""
        return int(dict(self.options).get(self.device_option, "0"))

    @property
    def title(self) -> str:
        """The key, and the device where it is not the first one."""
        return f"{self.key}:{self.device}" if self.device else self.key


def pip(extra: str) -> str:
    return f'pip install "pard-onnx[{extra}]"'


CUDA = (
    "device_id", "gpu_mem_limit", "arena_extend_strategy", "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace",
    "do_copy_in_default_stream", "enable_cuda_graph", "prefer_nhwc", "sdpa_kernel", "tunable_op_enable",
    "tunable_op_tuning_enable", "use_tf32",
)  # fmt: skip
DIRECTML = ("device_id", "device_filter", "disable_metacommands", "enable_graph_capture", "performance_preference")
ROCM = (
    "device_id", "gpu_mem_limit", "arena_extend_strategy", "do_copy_in_default_stream", "enable_hip_graph",
    "tunable_op_enable", "tunable_op_tuning_enable",
)  # fmt: skip
MIGRAPHX = (
    "device_id", "migraphx_arena_extend_strategy", "migraphx_bf16_enable", "migraphx_exhaustive_tune",
    "migraphx_fp16_enable", "migraphx_fp8_enable", "migraphx_int8_calibration_table_name", "migraphx_int8_enable",
    "migraphx_int8_use_native_calibration_table", "migraphx_mem_limit", "migraphx_model_cache_dir",
)  # fmt: skip
WEBGPU = (
    "deviceId", "dawnBackendType", "enableGraphCapture", "enableInt64", "forceCpuNodeNames",
    "maxStorageBufferBindingSize", "powerPreference", "preferredLayout", "preserveDevice", "storageBufferCacheMode",
    "validationMode",
)  # fmt: skip
VITISAI = (
    "config_file", "cache_dir", "cache_key", "enable_cache_file_io_in_mem", "encryption_key", "log_level", "opt_level",
    "target", "xclbin", *EP_CONTEXT,
)  # fmt: skip
RYZEN_AI = "AMD's Ryzen AI installer, or on Windows by: pip install windowsml"

PROVIDERS = {
    provider.key: provider
    for provider in (
        Provider("cpu", "CPUExecutionProvider", pip("cpu"), device_option=""),
        Provider("cuda", "CUDAExecutionProvider", pip("cuda"), CUDA, memory="cuda", in_place=("gqa",)),
        Provider("directml", "DmlExecutionProvider", pip("directml"), DIRECTML, memory="dml"),
        Provider("rocm", "ROCMExecutionProvider", pip("rocm"), ROCM, memory="cuda"),
        Provider("migraphx", "MIGraphXExecutionProvider", pip("migraphx"), MIGRAPHX, memory="cuda"),
        Provider("webgpu", "WebGpuExecutionProvider", pip("webgpu"), WEBGPU, device_option="deviceId",
                 memory="webgpu", in_place=("gqa",), plugin="onnxruntime_ep_webgpu"),
        Provider("npu", "VitisAIExecutionProvider", RYZEN_AI, VITISAI, device_option=""),
    )
}  # fmt: skip
# What is made for one maker's devices before what runs on everyone's, and the CPU last.
AUTO_ORDER = ("cuda", "migraphx", "rocm", "npu", "directml", "webgpu", "cpu")
CPU = PROVIDERS["cpu"]


def named(key: str) -> Provider:
    """The provider that users call `key`, or `key:1` on its second device; BadProvider names the nearest known one."""
    known = ", ".join(PROVIDERS)
    if not isinstance(key, str):
        raise BadProvider(f"a provider is one of {known}, not {key!r}")
    name, colon, device = key.partition(":")
    if name not in PROVIDERS:
        near = get_close_matches(name.lower(), PROVIDERS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {known}"
        raise BadProvider(f"unknown provider {name!r}; {hint}")
    provider = PROVIDERS[name]
    if not colon:
        return provider
    if not provider.device_option:
        raise BadProvider(f"provider {key!r}: {name} has no devices to choose from; leave out :{device}")
    if not device.isdecimal():
        raise BadProvider(f"provider {key!r}: a device is a number, as in {name}:0")
    return replace(provider, options=((provider.device_option, device),))


def configured(provider: Provider, options: Mapping[str, object] | None) -> Provider:
    """The provider with these options; BadProvider for names that it does not take, with the nearest that it does."""
    chosen = dict(provider.options)
    for name, value in (options or {}).items():
        if name not in provider.names:
            near = get_close_matches(str(name), provider.names, n=1, cutoff=0.0)
            hint = f"did you mean {near[0]!r}?" if near else "it takes none"
            raise BadProvider(f"provider {provider.key!r} has no option {name!r}; {hint}")
        if isinstance(value, bool):
            value = int(value)
        if not isinstance(value, str | int | float) or value == "":
            raise BadProvider(f"option {name!r} of provider {provider.key!r} takes text or a number, not {value!r}")
        if name == provider.device_option and not str(value).isdecimal():
            raise BadProvider(f"option {name!r} of provider {provider.key!r} is a device's number, not {value!r}")
        chosen[name] = str(value)
    return replace(provider, options=tuple(chosen.items()))


def read_options(pairs: Sequence[str]) -> dict[str, str]:
    """Of a command line's K=V; BadProvider for what is none."""
    out: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise BadProvider(f"a provider option is written NAME=VALUE, not {pair!r}")
        out[name] = value
    return out


def onnxruntime(install: str = CPU.install) -> Any:
    """The onnxruntime module, imported on first use; BadProvider says how to get it where there is none."""
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise BadProvider(f"onnxruntime cannot be imported ({error}); {install}") from error

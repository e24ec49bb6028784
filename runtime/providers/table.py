"""The table of execution providers: their names, how they are installed, their options, and what they can run."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from pard_onnx.models.checks import nearest_name
from pard_onnx.models.devices import DEVICES
from pard_onnx.models.errors import BadProvider, shown
from pard_onnx.models.extras import install_command
from pard_onnx.models.system_errors import is_out_of_memory, out_of_memory

HOST = "cpu"  # I/O binding's name for the host's memory
SESSION_OPTION = "ep."  # options with this prefix are given to the session, such as ep.context_enable
EP_CONTEXT = ("ep.context_enable", "ep.context_file_path", "ep.context_embed_mode")


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider of ONNX Runtime, with the options that the user chose."""

    key: str  # the name in `--provider`
    ort: str  # the name in ONNX Runtime
    names: tuple[str, ...] = ()  # the names of the options that it takes
    device_option: str = "device_id"  # the option that says which device it runs on; "" if there is none
    memory: str = HOST  # where its KV caches are, as I/O binding names this memory
    plugin_memory: str | None = None  # where they are if a plugin library brings the provider; None for `memory`
    # The attention variants whose past and present may be one buffer there; the others use two buffers that take turns.
    in_place: tuple[str, ...] = ()
    plugin: str | None = None  # the Python module that has it as a plugin library; None if there is none
    options: tuple[tuple[str, str], ...] = ()  # the user's options, by `names`

    @property
    def attention(self) -> tuple[str, ...]:
        """The attention variants of graphs that it can run."""
        return DEVICES[self.key].provider_attention

    @property
    def install(self) -> str:
        """How to install it on this system."""
        return install_advice(self.key)

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
        """The key, and the number of the device where it is not 0."""
        return f"{self.key}:{self.device}" if self.device else self.key


def install_advice(key: str, platform: str = sys.platform) -> str:
    """How to install a provider on this platform: a command, or words, a colon and a command."""
    on_windows, elsewhere = INSTALL.get(key, (f"[{key}]", f"[{key}]"))
    text = on_windows if platform == "win32" else elsewhere
    return re.sub(r"\[(\w+)\]", lambda extra: install_command(extra[1]), text, count=1)


# How to add the providers that are plugins to the onnxruntime that is installed.
PLUGIN_ADVICE = {
    "amdgpu": 'once PyPI has AMD\'s plugin: pip install "onnxruntime-ep-amdgpu>=1"',
    "webgpu": "pip install onnxruntime-ep-webgpu",
}
# How to install the providers that have no extra of their own on every system: on Windows, and elsewhere. [NAME] stands
# for the command that installs an extra, which depends on how this package was installed.
INSTALL = {
    "directml": ("[windowsml]", "on Windows: [windowsml]"),
    "rocm": ("on Linux: [rocm]", "[rocm]"),
    "migraphx": ("[windowsml]", "[migraphx]"),
    "amdgpu": (PLUGIN_ADVICE["amdgpu"], PLUGIN_ADVICE["amdgpu"]),
    "npu": ("AMD's Ryzen AI installer, or: [windowsml]", "AMD's Ryzen AI installer, or Windows: [windowsml]"),
}

# Options that hold addresses of the process, such as user_compute_stream, are left out of all of these.
CUDA = (
    "device_id", "gpu_mem_limit", "arena_extend_strategy", "cudnn_conv1d_pad_to_nc1d", "cudnn_conv_algo_search",
    "cudnn_conv_use_max_workspace", "do_copy_in_default_stream", "enable_cuda_graph",
    "enable_skip_layer_norm_strict_mode", "fuse_conv_bias", "prefer_nhwc", "sdpa_kernel", "tunable_op_enable",
    "tunable_op_max_tuning_duration_ms", "tunable_op_tuning_enable", "use_ep_level_unified_stream", "use_tf32",
)  # fmt: skip
DIRECTML = (
    "device_id", "device_filter", "disable_metacommands", "performance_preference", "ep.dml.disable_graph_fusion",
    "ep.dml.disable_memory_arena", "ep.dml.enable_cpu_sync_spinning", "ep.dml.enable_graph_capture",
)  # fmt: skip
ROCM = (
    "device_id", "gpu_mem_limit", "arena_extend_strategy", "do_copy_in_default_stream", "enable_hip_graph",
    "tunable_op_enable", "tunable_op_tuning_enable",
)  # fmt: skip
# AMD's plugin has names of its own, and takes some of those of the provider that is built in.
MIGRAPHX = (
    "device_id", "migraphx_arena_extend_strategy", "migraphx_bf16_enable", "migraphx_exhaustive_tune",
    "migraphx_fp16_enable", "migraphx_fp8_enable", "migraphx_int8_calibration_table_name", "migraphx_int8_enable",
    "migraphx_int8_use_native_calibration_table", "migraphx_max_compiled_models", "migraphx_max_dynamic_batch",
    "migraphx_mem_limit", "migraphx_model_cache_dir",
    "bf16_enable", "cache_dir", "coalesce_io", "compute_mode", "coresident_programs", "cpu_control_flow",
    "disable_caching", "exhaustive_tune", "force_recompile", "fp16_enable", "fp8_enable", "hip_graph_enable",
    "int8_calibration_table_name", "int8_enable", "int8_use_native_calibration_table", "max_resident_programs",
    "mlss_use_specific_ops", "precompile_at_load",
)  # fmt: skip
AMDGPU = (
    "device_id", "cache_dir", "disable_caching", "exhaustive_tune", "force_recompile", "mlss_use_specific_ops",
    "profile", "telemetry_dir", "telemetry_enable", "telemetry_file",
)  # fmt: skip
WEBGPU = (
    "deviceId", "dawnBackendType", "defaultBufferCacheMode", "enableGraphCapture", "enableInt64", "enableRobustness",
    "forceCpuNodeNames", "maxNumPendingDispatches", "maxStorageBufferBindingSize", "powerPreference",
    "preferredLayout", "preserveDevice", "queryResolveBufferCacheMode", "sessionBufferPoolGenerations",
    "storageBufferCacheMode", "uniformBufferCacheMode", "validationMode",
)  # fmt: skip
VITISAI = (
    "config_file", "cache_dir", "cache_key", "enable_cache_file_io_in_mem", "encryption_key", "log_level", "opt_level",
    "target", "xclbin", *EP_CONTEXT,
)  # fmt: skip

PROVIDERS = {
    provider.key: provider
    for provider in (
        Provider("cpu", "CPUExecutionProvider", device_option=""),
        Provider("cuda", "CUDAExecutionProvider", CUDA, memory="cuda", in_place=("gqa",)),
        Provider("directml", "DmlExecutionProvider", DIRECTML, memory="dml"),
        Provider("rocm", "ROCMExecutionProvider", ROCM, memory="cuda"),
        # I/O binding has no name for the memory of AMD's plugins: their caches are in the host's.
        Provider("migraphx", "MIGraphXExecutionProvider", MIGRAPHX, memory="cuda", plugin_memory=HOST,
                 plugin="onnxruntime_ep_migraphx"),
        Provider("amdgpu", "AMDGPUExecutionProvider", AMDGPU, plugin="onnxruntime_ep_amdgpu"),
        Provider("webgpu", "WebGpuExecutionProvider", WEBGPU, device_option="deviceId",
                 memory="webgpu", in_place=("gqa",), plugin="onnxruntime_ep_webgpu"),
        Provider("npu", "VitisAIExecutionProvider", VITISAI, device_option=""),
    )
}  # fmt: skip
# The order in which "auto" tries them: providers for one maker's devices, then those for any device, then the CPU.
AUTO_ORDER = ("cuda", "migraphx", "amdgpu", "rocm", "npu", "directml", "webgpu", "cpu")
CPU = PROVIDERS["cpu"]
CATALOGS = ("windowsml", "windows-ml", "winml")  # what users may call Windows ML


def provider_named(key: str | None) -> Provider:
    """The provider that users call `key`, or `key:1` on its second device; BadProvider names the most similar one."""
    known = ", ".join(PROVIDERS)
    if not isinstance(key, str):
        raise BadProvider(f"a provider is one of {known}, not {shown(key)}")
    name, colon, device = key.partition(":")
    if name.casefold() in CATALOGS:
        raise BadProvider(
            f"provider {shown(name)}: Windows ML is a catalog of providers; name npu, migraphx, directml or webgpu, or "
            "take auto"
        )
    if name not in PROVIDERS:
        nearest = nearest_name(name, PROVIDERS, 0.5)
        hint = f"did you mean {nearest!r}?" if nearest else f"known are {known}"
        raise BadProvider(f"unknown provider {shown(name)}; {hint}")
    provider = PROVIDERS[name]
    if not colon:
        return provider
    if not provider.device_option:
        raise BadProvider(f"provider {shown(key)}: {name} has no devices to choose from; leave out the device")
    if not device.isdecimal():
        raise BadProvider(f"provider {shown(key)}: a device is a number, as in {name}:0")
    return replace(provider, options=((provider.device_option, device),))


def with_options(provider: Provider, options: Mapping[str, object] | None) -> Provider:
    """The provider with these options added; BadProvider for an unknown name, with the most similar known one."""
    chosen = dict(provider.options)
    for name, value in (options or {}).items():
        if name not in provider.names:
            nearest = nearest_name(name, provider.names, 0.0)
            hint = f"did you mean {nearest!r}?" if nearest else "it takes none"
            raise BadProvider(f"provider {provider.key!r} has no option {shown(name)}; {hint}")
        if isinstance(value, bool):
            value = int(value)
        if not isinstance(value, str | int | float) or value == "":
            raise BadProvider(
                f"option {name!r} of provider {provider.key!r} takes text or a number, not {shown(value)}"
            )
        if name == provider.device_option and not str(value).isdecimal():
            raise BadProvider(f"option {name!r} of provider {provider.key!r} is a device's number, not {shown(value)}")
        chosen[name] = str(value)
    return replace(provider, options=tuple(chosen.items()))


def parse_options(pairs: Sequence[str]) -> dict[str, str]:
    """The options in a command line's NAME=VALUE texts; BadProvider for a text of another form."""
    out: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise BadProvider(f"a provider option is written NAME=VALUE, not {pair!r}")
        out[name] = value
    return out


def onnxruntime(provider: Provider = CPU) -> Any:
    """The onnxruntime module, imported at the first use; BadProvider says how to install it if it is missing."""
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        raise BadProvider(f"onnxruntime cannot be imported ({error}); {provider.install}") from error


def first_line(error: BaseException) -> str:
    """The first line of the error's message; the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

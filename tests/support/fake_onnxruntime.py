"""A stand-in for onnxruntime on hardware that is not here: its device is host memory set apart, its kernels the CPU's.

It records what sessions are opened with and every byte that crosses between host and device, and it copies what is
bound from the host when it is bound, as providers off the CPU do. It cannot tell whether a real provider computes
right, nor whether a real one accepts the options.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import onnxruntime as real

HOST = "CPUExecutionProvider"


@dataclass
class DeviceValue:
    """A tensor on the device; to read it is to copy it."""

    fake: FakeOnnxruntime
    value: Any

    def numpy(self) -> Any:
        self.fake.crossed.append(("read", self.value.numpy().nbytes))
        return self.value.numpy().copy()


@dataclass
class FakeBinding:
    fake: FakeOnnxruntime
    session: Any
    off_host: bool
    outputs: dict[str, int] = field(default_factory=dict)  # bytes, of those on the host
    left: list[str] = field(default_factory=list)  # names of outputs that stay on the device
    inputs: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.real = self.session.io_binding()

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.inputs[name] = value
        if isinstance(value, DeviceValue):
            self.real.bind_ortvalue_input(name, value.value)
        elif self.off_host:
            self.bind_cpu_input(name, value.numpy())
        else:
            self.real.bind_ortvalue_input(name, value)

    def bind_cpu_input(self, name: str, array: Any) -> None:
        self.fake.crossed.append((name, array.nbytes))
        self.kept[name] = real.OrtValue.ortvalue_from_numpy(array.copy())
        self.real.bind_ortvalue_input(name, self.kept[name])

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        if isinstance(value, DeviceValue):
            past = self.inputs.get(name.replace("present", "past_key_values"))
            if value is past:
                self.fake.in_place.add(name)
            self.real.bind_ortvalue_output(name, value.value)
            return
        self.outputs[name] = value.numpy().nbytes
        self.real.bind_ortvalue_output(name, value)

    def bind_output(self, name: str, memory: str, device: int) -> None:
        self.fake.memories.add((memory, device))
        self.left.append(name)
        self.real.bind_output(name, "cpu")

    def get_outputs(self) -> list[DeviceValue]:
        return [DeviceValue(self.fake, real.OrtValue.ortvalue_from_numpy(v.numpy().copy())) for v in self._made()]

    def _made(self) -> list[Any]:
        made = self.real.get_outputs()
        self.fake.taken += sum(value.numpy().nbytes for value in made)
        return list(made)

    def clear_binding_outputs(self) -> None:
        self.outputs.clear()
        self.real.clear_binding_outputs()


class FakeSession:
    def __init__(self, fake: FakeOnnxruntime, graph: Any, options: Any, providers: Any, **_: Any) -> None:
        chosen = options.devices[0].ep_name if options.devices else (providers or [HOST])[0]
        name, given = chosen if isinstance(chosen, tuple) else (chosen, options.device_options)
        if name in fake.broken:
            raise RuntimeError(fake.broken[name])
        self._fake, self._name = fake, name
        self._real = real.InferenceSession(graph, options.real, providers=[HOST])
        if name != HOST:
            fake.opened.append((name, dict(given), options))

    def get_providers(self) -> list[str]:
        return [HOST] if self._name in (HOST, self._fake.silent) else [self._name, HOST]

    def get_inputs(self) -> list[Any]:
        return list(self._real.get_inputs())

    def get_overridable_initializers(self) -> list[Any]:
        return list(self._real.get_overridable_initializers())

    def get_outputs(self) -> list[Any]:
        return list(self._real.get_outputs())

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self._fake, self._real, self._name != HOST)

    def run_with_iobinding(self, binding: FakeBinding) -> None:
        fake = self._fake
        if binding.left and fake.room is not None and fake.taken >= fake.room:
            raise RuntimeError("CUDA failure 2: out of memory")
        fake.crossed += binding.outputs.items() if binding.off_host else []
        self._real.run_with_iobinding(binding.real)


class FakeOptions:
    """SessionOptions that remember what they were told."""

    def __init__(self) -> None:
        object.__setattr__(self, "real", real.SessionOptions())
        self.__dict__.update(entries={}, devices=[], device_options={})

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.real, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)

    def add_session_config_entry(self, name: str, value: str) -> None:
        self.entries[name] = value
        if not name.startswith("ep."):
            self.real.add_session_config_entry(name, value)

    def add_provider_for_devices(self, devices: Any, options: Any) -> None:
        self.devices.extend(devices)
        self.device_options.update(options)


class FakeOnnxruntime:
    """providers: built in; broken: by name, what opening a session on it says; silent: one that is dropped without a
    word; room: bytes of its memory; plugins: ONNX Runtime's name to the number of devices that its library finds."""

    ExecutionMode, OrtValue = real.ExecutionMode, real.OrtValue
    SessionOptions = FakeOptions
    __version__ = "0.0.fake"
    plugin_version = "0.4.0"

    def __init__(
        self, *providers: str, broken: dict[str, str] | None = None, silent: str = "", room: int | None = None,
        plugins: dict[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.providers, self.broken, self.silent, self.room = providers, broken or {}, silent, room
        self.plugins = plugins or {}
        self.registered: dict[str, str] = {}
        self.taken = 0
        self.memories: set[tuple[str, int]] = set()
        self.in_place: set[str] = set()  # outputs that were bound to their input's buffer
        self.crossed: list[tuple[str, int]] = []  # what crossed between host and device: name, bytes
        self.opened: list[tuple[str, dict[str, Any], FakeOptions]] = []

    def InferenceSession(self, graph: Any, options: Any, providers: Any = None, **more: Any) -> FakeSession:
        return FakeSession(self, graph, options, providers, **more)

    def get_available_providers(self) -> list[str]:
        return [*self.providers, HOST]

    def register_execution_provider_library(self, name: str, library: str) -> None:
        if name not in self.plugins:
            raise RuntimeError(f"{library} cannot be loaded")
        self.registered[name] = library

    def get_ep_devices(self) -> list[Any]:
        hardware = SimpleNamespace(
            type="OrtHardwareDeviceType.GPU", vendor="a maker", metadata={"Description": "a card"}
        )
        return [
            SimpleNamespace(ep_name=name, device=hardware, number=number, ep_metadata={"version": self.plugin_version})
            for name in self.registered
            for number in range(self.plugins[name])
        ]

    def set_global_thread_pool_sizes(self, *_: int) -> None:
        raise RuntimeError("made already")

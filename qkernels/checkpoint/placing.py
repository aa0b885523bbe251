"""Which part of a model goes to which device, and what moves activations between them.

Weights are packed where they will stay, for the kernels of that device, and never travel: a hook before each part brings what the
part is called with to its device. (accelerate's own dispatch would take weights on the CPU for offloaded ones, and carry them to
the GPU for every forward pass.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..models.architectures import decoder_layers
from .source import Checkpoint

DeviceMap = Mapping[str, str | int | torch.device] | Literal["auto"] | int
ROOM: Final = 2**30  # of a GPU's memory, that "auto" leaves for the cache, activations and the libraries


@dataclass(frozen=True)
class Placement:
    """Devices by the beginning of names of modules and parameters, as in accelerate's maps; "" is everything else."""

    devices: Mapping[str, torch.device]

    def __call__(self, name: str) -> torch.device:
        """Where what is called `name` goes: what the longest beginning says."""
        parts = name.split(".")
        for length in range(len(parts), -1, -1):
            if (prefix := ".".join(parts[:length])) in self.devices:
                return self.devices[prefix]
        raise ArgumentError(f'device_map has no device for {name}; "" stands for everything that no other entry names')

    @property
    def spread(self) -> bool:
        """Whether there is more than one device."""
        return len(set(self.devices.values())) > 1


def placement_of(
    device: torch.device | str, device_map: DeviceMap | None, model: nn.Module, checkpoint: Checkpoint
) -> Placement:
    """Where the parts of a model go.

    Args:
        device: of everything, where there is no map.
        device_map: see `load`.
        checkpoint: what fills it; "auto" takes the bytes of its files for those in memory, which they are but for blocks that are
            dequantized.

    Raises:
        ArgumentError: a device that is not there, or none that keeps weights (disk); a name that the model does not have.
    """
    if device_map is None:
        return Placement({"": torch.device(device)})
    if torch.device(device).type != "cpu":
        raise ArgumentError(f"device_map says where everything goes: leave out device={device}")
    if device_map == "auto":
        return _automatic(model, checkpoint)
    if type(device_map) is int:
        if device_map == 0:
            return Placement({"": torch.device("cpu")})
        if not torch.cuda.is_available():
            raise ArgumentError(
                f"{device_map} layers are to be on a GPU (device_map, --gpu-layers), and this torch sees none (qkernels doctor)"
            )
        return layers_on_gpu(model, device_map, _device("", 0))
    if not isinstance(device_map, Mapping):
        raise ArgumentError(
            f'device_map must be "auto", a number of layers or a mapping from names to devices, got {device_map!r:.60}'
        )
    devices = {name: _device(name, value) for name, value in device_map.items()}
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for name in devices:
        if name not in names:
            raise ArgumentError(f"device_map names {name!r}, which {type(model).__name__} does not have")
    return Placement(devices)


def layers_on_gpu(model: nn.Module, count: int, gpu: torch.device) -> Placement:
    """The first `count` decoder layers (one at least), and all that is outside of the layers, on a GPU; the others on the CPU.

    Raises:
        ArgumentError: there are fewer layers, or no list of them.
    """
    name, layers = decoder_layers(model)
    if not 1 <= count <= len(layers):
        raise ArgumentError(f"this model has {len(layers)} layers, got {count} for the GPU")
    cpu = torch.device("cpu")
    return Placement({"": gpu} | {f"{name}.{index}": cpu for index in range(count, len(layers))})


def _device(name: str, value: Any) -> torch.device:
    if value == "disk":
        raise ArgumentError(
            f'device_map puts {name or "everything"} on "disk", and packed weights stay in memory: use "cpu"'
        )
    try:
        found = torch.device("cuda", value) if type(value) is int else torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(
            f"device_map needs devices such as cpu, cuda:0 or 0, got {value!r:.40} for {name!r}"
        ) from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ArgumentError(
            f"device_map puts {name or 'everything'} on {found}, and this torch sees {count or 'no'} GPUs"
        )
    return found


def _automatic(model: nn.Module, checkpoint: Checkpoint) -> Placement:
    """One GPU after the other is filled with layers, in their order; what is left stays on the CPU. Without a GPU: all of it."""
    rooms = [(torch.device("cuda", i), torch.cuda.mem_get_info(i)[0] - ROOM) for i in range(torch.cuda.device_count())]
    if not rooms:
        return Placement({"": torch.device("cpu")})
    nbytes = {name: checkpoint.nbytes(name) for name in checkpoint.names()}
    nbytes |= {name: checkpoint.module_nbytes(name) for name in (*checkpoint.modules, *checkpoint.stacks)}
    name, layers = decoder_layers(model)
    sizes = [sum(size for key, size in nbytes.items() if key.startswith(f"{name}.{i}.")) for i in range(len(layers))]
    return filled(name, sizes, sum(nbytes.values()) - sum(sizes), rooms)


def filled(name: str, layers: list[int], others: int, rooms: list[tuple[torch.device, int]]) -> Placement:
    """A map that fills devices with layers in their order, as long as there is room; the first also holds what is outside of
    layers, if it can, and the CPU holds the rest.

    >>> import torch
    >>> from qkernels.checkpoint.placing import filled
    >>> found = filled("model.layers", [10, 10, 10], 5, [(torch.device("cuda:0"), 20), (torch.device("cuda:1"), 12)])
    >>> [str(found(f"model.layers.{i}.mlp")) for i in range(3)], str(found("lm_head"))
    (['cuda:0', 'cuda:1', 'cpu'], 'cuda:0')
    """
    cpu = torch.device("cpu")
    places = [(device, room - (others if index == 0 else 0)) for index, (device, room) in enumerate(rooms)]
    first = places[0][0] if places[0][1] >= 0 else cpu
    devices = {"": first}
    if first == cpu:
        places = []
    for index, size in enumerate(layers):
        while places and places[0][1] < size:
            places.pop(0)
        devices[f"{name}.{index}"] = places[0][0] if places else cpu
        if places:
            places[0] = (places[0][0], places[0][1] - size)
    return Placement(devices)


def connect(model: Any, placement: Placement) -> None:
    """Bring to each part of a spread model what it is called with: to every module that the map names, and to those beside them
    that hold weights themselves (where they really are: a head that is tied lies with the embeddings)."""
    model.hf_device_map = {name: str(place) for name, place in placement.devices.items()}
    named = {name for name in placement.devices if name}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in named)
        held = next((t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))), None)
        if name in named:
            _bring_to(module, placement(name))
        elif held is not None and not inside:
            _bring_to(module, held.device)
    _bring_to(model, next(model.parameters()).device)


def _bring_to(module: nn.Module, device: torch.device) -> None:
    module.register_forward_pre_hook(_Bring(device), with_kwargs=True)


@dataclass(frozen=True)
class _Bring:
    """A hook before a module: tensors that it is called with come to its device."""

    device: torch.device

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return _moved(args, self.device), _moved(kwargs, self.device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    return {key: _moved(item, device) for key, item in value.items()} if type(value) is dict else value

"""Build the `transformers` model that a config.json describes, without weights, and put tensors into it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..errors import CheckpointError
from ..optional import need_transformers
from ..storage import CONFIG
from ..storage.files import without_quantization

# Keys by which a config.json could make transformers fetch code from the Hub: modelling files, attention kernels.
_FETCHES_CODE = {
    "auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation",
}  # fmt: skip


def empty_model(config: Mapping[str, Any], dtype: torch.dtype, path: Path) -> Any:
    """The `transformers` model that a config.json describes, in evaluation mode: parameters of `dtype` on meta, computed buffers
    (rotary frequencies) real. No code of the checkpoint is run, and none is fetched.

    Args:
        path: of the checkpoint that the config belongs to, for messages and for its generation_config.json.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    need_transformers("building the model of a checkpoint")
    import transformers

    where = path if path.is_file() else path / CONFIG  # a GGUF file is its own
    values = _decoded(_harmless(without_quantization(config)))
    kind, names = values.get("model_type"), values.get("architectures")
    if kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"{where}: transformers {transformers.__version__} knows no model_type {kind!r:.40}")
    named: Any = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    known = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    build = named._from_config if known else transformers.AutoModelForCausalLM.from_config
    try:
        with _parameters_on_meta():
            model = build(transformers.CONFIG_MAPPING[kind].from_dict(values), dtype=dtype)
        _compute(model)
        if model.can_generate() and (path / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    except Exception as error:  # a config that makes no sense fails in as many ways as there are models
        raise CheckpointError(f"{where} does not describe a {kind} model that can be built: {error}") from error
    return model.eval()


def _harmless(value: Any) -> Any:
    """A config, or a part of one, without the keys that fetch code."""
    if isinstance(value, dict):
        return {key: _harmless(inner) for key, inner in value.items() if key not in _FETCHES_CODE}
    return value


def _decoded(value: Any) -> Any:
    """A config, or a part of one, with the numbers that JSON has no word for: transformers writes infinity, in the configs of
    Mamba-2 and its hybrids, as `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _decoded(inner) for key, inner in value.items()}
    return [_decoded(inner) for inner in value] if isinstance(value, list) else value


def shapes_of_linears(config: Mapping[str, Any], path: Path) -> dict[str, tuple[int, int]]:
    """(N, K) of the linear layers of the model that a config.json describes, by name; arguments as of `empty_model`."""
    model = empty_model(config, torch.float32, path)
    return {name: (m.out_features, m.in_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that this thread registers give up their memory at once, before anything is written to it. Buffers
    stay real: those that are computed are in no checkpoint."""
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        on_meta: Any = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        on_meta._is_hf_initialized = True  # what transformers would write to it takes 1.6 ms each on meta
        return on_meta  # type: ignore[no-any-return]

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # what it returns replaces
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _compute(model: Any) -> None:
    """Fill in the parameters that transformers does not save, because the model computes them (Marian's positions)."""
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        path, _, leaf = str(name).rpartition(".")
        try:
            owner, empty = model.get_submodule(path), model.get_parameter(name)
        except AttributeError:  # a variant without it
            continue
        owner._parameters[leaf] = nn.Parameter(torch.empty_like(empty, device="cpu"), empty.requires_grad)
        owner._parameters[leaf].is_computed = True
        model._init_weights(owner)


def computed(model: nn.Module) -> set[str]:
    """The parameters that a checkpoint need not have, by name: `empty_model` has computed them."""
    return {name for name, parameter in model.named_parameters() if hasattr(parameter, "is_computed")}


def empty_to_meta(module: nn.Module) -> None:
    """Free a module's parameters, but for those that are computed; buffers stay."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if hasattr(parameter, "is_computed"):
                continue
            setattr(owner, name, nn.Parameter(parameter.data.to("meta"), requires_grad=False))


def assign(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make these tensors the parameters and buffers of a module; a tensor that is no parameter yet becomes a frozen one."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._parameters:
            owner._parameters[leaf] = (
                tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            )
        else:
            owner._buffers[leaf] = tensor.detach()

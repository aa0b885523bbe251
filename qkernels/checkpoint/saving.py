"""`save` and `convert`: checkpoints that appear complete or not at all."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ArgumentError, CheckpointError, ConversionError
from ..formats import Format, Oddity, summary
from ..kernels.catalogue import Problem, arch_of, select
from ..models.experts import PARTS, ExpertsForm, experts_of
from ..models.linears import check_unscaled
from ..nn import QuantExperts, QuantLinear
from ..nn.embedding import plain_embeddings
from ..nn.experts import rows_in_halves
from ..reports import carry_report
from ..storage import CONFIG, atomic_directory, copy_side_files, read_from
from ..storage.gguf import gguf_at
from ..tensor import QuantTensor
from .activations import as_written
from .loading import model_of
from .registry import get_format
from .source import Checkpoint, open_checkpoint
from .writer import CheckpointWriter

log = logging.getLogger(__name__)


def save(model: nn.Module, directory: str | os.PathLike[str], format: str = "native", overwrite: bool = False) -> None:
    """Write a `transformers` model that holds `QuantLinear` modules, all or nothing.

    The tokenizer and what else lies beside weights come from the directory that the model was loaded from, if there
    is one.

    Args:
        model: every `QuantLinear` in it is written quantized, every other tensor as it is.
        directory: must not exist or be empty, unless `overwrite`.
        format: "native" (takes every weight), "gptq", "gptq_v2", "awq" or "compressed-tensors".
        overwrite: replace a checkpoint that qkernels wrote and nobody changed since.

    Raises:
        ConversionError: the model has no `QuantLinear` or no config; or the format cannot express a weight, naming it.
        CheckpointError: the target exists, or the disk refuses.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> from qkernels import replace_linear, save
    >>> model = LlamaForCausalLM(config)
    >>> report = replace_linear(model, "w4a16_g32")
    >>> save(model, "tiny-4bit", format="gptq")
    >>> from pathlib import Path
    >>> sorted(path.name for path in Path("tiny-4bit").glob("[!.]*"))
    ['config.json', 'generation_config.json', 'model.safetensors', 'quantize_config.json']
    """
    with atomic_directory(directory, overwrite) as temporary:
        write_model(model, temporary, format)


def write_model(model: nn.Module, directory: Path, format: str) -> None:
    """`save` into an existing directory (see `atomic_directory`)."""
    with plain_embeddings(model):
        _write_model(model, directory, format)


def _write_model(model: nn.Module, directory: Path, format: str) -> None:
    chosen = get_format(format)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    experts = {name: module for name, module in model.named_modules() if isinstance(module, QuantExperts)}
    model_config: Any = getattr(model, "config", None)
    if not (layers or experts) or model_config is None:
        raise ConversionError(
            f"save needs a transformers model with QuantLinear modules, got {type(model).__name__} with {len(layers)} of "
            f"them and {'no' if model_config is None else 'a'} config; make them with replace_linear or quantize"
        )
    check_unscaled(model)
    config = json.loads(model_config.to_json_string()) | {"architectures": [type(model).__name__]}
    origin = str(getattr(model_config, "_name_or_path", "") or "")
    writer = CheckpointWriter(directory, config, chosen, named_for=model)
    for name, layer in layers.items():
        writer.add_quantized(name, layer.quant_tensor())
        if layer.bias is not None:
            writer.add_tensor(f"{name}.bias", layer.bias)
    for name, module in experts.items():
        for projection, stack in module.stacks.items():
            writer.add_experts(f"{name}.{projection}", stack.quant_tensor())
    for name, tensor in expert_biases(experts):
        writer.add_tensor(name, tensor)
    for name, tensor in plain_tensors(model, {**layers, **inside_of(experts)}):
        writer.add_tensor(name, tensor)
    writer.close()
    if origin and (Path(origin) / CONFIG).is_file():
        copy_side_files(origin, directory)
    elif origin and Path(origin).is_file() and gguf_at(origin) is not None:
        open_checkpoint(origin).copy_side_files(directory)
    _write_generation_config(model, directory)


def _write_generation_config(model: nn.Module, directory: Path) -> None:
    """That of the model, which may have been changed since it was loaded. transformers refuses to write some that it reads
    (a temperature without sampling): then the origin's file stays."""
    generation: Any = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.save_pretrained(directory)
    except ValueError as error:
        if not (directory / "generation_config.json").exists():
            raise ConversionError(
                f"the model's generation_config cannot be saved: {error}; set it right, or to None"
            ) from error
        log.warning(
            "generation_config.json is that of the model's origin: transformers will not write the model's (%s)", error
        )


def convert(
    source_dir: str | os.PathLike[str],
    target_dir: str | os.PathLike[str],
    format: str = "native",
    overwrite: bool = False,
) -> None:
    """Rewrite a quantized checkpoint in another format, module by module, all or nothing.

    Every weight stays equal, bit for bit when dequantized; what the format cannot express is refused. A quality report comes
    along, and says that the checkpoint was rewritten. Experts of a mixture are stacked where the format has stacks and taken
    apart where it has none, which asks transformers for the model; a stack is unpacked in memory while it is written.

    Raises:
        ConversionError: the format cannot express a weight (names the module and the reason), or nothing is quantized.
        CheckpointError: the source is not sound, the target exists, or the disk refuses.
    """
    chosen = get_format(format)
    source = open_checkpoint(source_dir)
    if source.format is None:
        raise ConversionError(f"{source_dir} holds no quantized weights; quantize it first (qkernels quantize)")
    model, source = _with_experts_in_place(source, chosen)
    oddities: list[tuple[str, Oddity]] = [*source.oddities]
    with atomic_directory(target_dir, overwrite, read_from(source.path)) as temporary:
        writer = CheckpointWriter(temporary, source.config, chosen, named_for=model)
        parts = list(source.in_file_order())
        for name, module in tqdm(parts, desc="packing", unit="tensor", leave=False, delay=2):
            if module is None and name in source.embeddings:
                if writer.add_embedding(name, QuantTensor.concat([*source.embedding(name)])):
                    continue
                oddities.append((name, Oddity("embeddings are written as floats", source.stored_as(name))))
            if module is None:
                writer.add_tensor(name, source.read(name))
                continue
            weight, found = as_written(source.weight(module), source.format, chosen)
            if source.format is not None and source.format.rows_as_stored:  # and no stack that the model has
                raise ConversionError(
                    f"{module}: a file of {source.format.name} holds stacked experts in the order of the model's parameters, "
                    f"which is known of a model alone: load {source_dir} and save it"
                )
            oddities += [(module, oddity) for oddity in found]
            writer.add_quantized(module, weight)
        forms = {} if model is None else experts_of(model)
        for stack in tqdm(source.stacks, desc="packing", unit="stack", leave=False, delay=2):
            oddities += _convert_stack(source, stack, forms, writer)
        writer.close()
        source.copy_side_files(temporary)
        carry_report(source.path, temporary, format)
    for line in summary(oddities):
        log.warning("%s: %s", source.path, line)


def _with_experts_in_place(source: Checkpoint, chosen: Format) -> tuple[nn.Module | None, Checkpoint]:
    """The checkpoint under the names of its model, and the model, where experts have to be stacked or taken apart; else None, and
    the checkpoint as it is."""
    found = {_in_stack(module) for module in source.modules} - {None}
    assert source.format is not None
    if found <= {chosen.stacks} and not source.format.rows_as_stored:
        return None, source
    try:
        model, named = model_of(source, torch.float32)
    except CheckpointError:
        if found == {False}:  # one by one they are in every format, under the names that they have
            return None, source
        raise
    return model, named


def _in_stack(module: str) -> bool | None:
    """Whether a quantized module is stacked experts (True), a part of one expert (False), or none of them (None); by its name,
    which decides no more than whether a model is asked."""
    *_, above, parent, leaf = ("", "", *module.split("."))
    if parent == "experts" and leaf in PARTS:
        return True
    return False if above == "experts" and parent.isdecimal() else None


def _convert_stack(
    source: Checkpoint, stack: str, forms: Mapping[str, ExpertsForm], writer: CheckpointWriter
) -> list[tuple[str, Oddity]]:
    """Write the experts of a stack, together or one by one as the format has them."""
    experts, _, projection = stack.rpartition(".")
    oddities: dict[tuple[str, Oddity], None] = {}
    kept: list[QuantTensor] = []
    for expert, parsed in enumerate(source.expert_weights(stack)):
        weight, found = as_written(parsed, source.format, writer.format)
        oddities.update(dict.fromkeys((stack, oddity) for oddity in found))
        if source.format is not None and source.format.rows_as_stored and projection == forms[experts].up:
            weight = rows_in_halves(forms[experts], weight)
        if writer.format.stacks:
            kept.append(weight)
        else:
            writer.add_expert(stack, expert, weight)
    if kept:
        try:
            writer.add_experts(stack, QuantTensor.stack(kept))
        except ArgumentError as error:
            raise ConversionError(f"{stack}: {error}") from error
    return list(oddities)


def layout_of(directory: str | os.PathLike[str], device: torch.device | str = "cpu") -> str:
    """The layout that the catalogue chooses for the first weight of a quantized checkpoint on `device`.

    Raises:
        CheckpointError: the directory is not sound, or nothing in it is quantized.
        UnsupportedProblem: no kernel takes the weight; lists the reasons.
    """
    checkpoint = open_checkpoint(directory)
    if not checkpoint.modules:
        raise CheckpointError(f"{directory} holds no quantized weights; quantize it first (qkernels quantize)")
    weight = checkpoint.weight(next(iter(checkpoint.modules))).weight
    return select(Problem(weight.N, weight.K, weight.scheme, torch.bfloat16, arch_of(device))).layout


def stacks_of(experts: Mapping[str, QuantExperts]) -> dict[str, nn.Module]:
    """The stacks of experts modules by the full names of the parameters that they stand for."""
    return {f"{name}.{p}": stack for name, module in experts.items() for p, stack in module.stacks.items()}


def inside_of(experts: Mapping[str, QuantExperts]) -> dict[str, nn.Module]:
    """The same by the names of the modules that they are."""
    return {f"{n}.{module.form.child(p)}": stack for n, module in experts.items() for p, stack in module.stacks.items()}


def expert_biases(experts: Mapping[str, QuantExperts]) -> Iterator[tuple[str, Tensor]]:
    """Biases of experts under the names and in the order of the modules that they replaced."""
    for name, module in experts.items():
        for projection, stack in module.stacks.items():
            if stack.bias is not None:
                bias = stack.bias.detach()
                yield (
                    f"{name}.{projection}_bias",
                    module.form.taking_turns(bias) if projection == module.form.up else bias,
                )


def plain_tensors(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """What is not part of a `QuantLinear`. Of tied names the first is written, as `transformers` expects."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[0] not in layers and isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor

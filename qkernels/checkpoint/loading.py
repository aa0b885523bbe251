"""`load`: a checkpoint directory or GGUF file -> a `transformers` model of `QuantLinear`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ArgumentError, CheckpointError, UnsupportedProblem
from ..formats import Oddity, summary
from ..hub import local_copy
from ..memory import GivingBack, give_back
from ..models.building import assign, computed, empty_model
from ..models.experts import ExpertsForm, experts_of, routers
from ..models.naming import float_state
from ..nn import QuantEmbedding, QuantExperts, QuantLinear, QuantStack, set_module
from ..nn import between as between_products
from ..nn.embedding import scale_of
from ..nn.experts import OrdersDiffer, bias_of, rows_in_halves
from ..nn.packed import PackedModule
from ..storage import CONFIG
from ..tensor import QuantTensor
from ..text import describe, dtype_name
from .activations import Activations, as_it_runs, with_int8
from .arguments import named_dtype, refuse_others, stored_dtype
from .gguf import GGUF, dequantized_experts
from .layers import dequantize_router, dequantized, float_layer, floated, kept_in_fp32, linear_at, packed_layer
from .placing import DeviceMap, Placement, connect, placement_of
from .source import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from ..kernels.catalogue import OnUnsupported

log = logging.getLogger(__name__)

# Bytes of modules in the files after which what their packing left free goes back: a GGUF file of 676 MB left 175 MB free in the
# heap until its end.
_GIVE_BACK_EVERY: Final = 32 * 2**20


def load(
    directory: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    on_unsupported: OnUnsupported = "raise",
    activations: Activations | None = None,
    device_map: DeviceMap | None = None,
    revision: str | None = None,
    fused: bool = True,
    **others: Any,
) -> Any:
    """Any known checkpoint, quantized or not, as a `transformers` model in which quantized modules are `QuantLinear`.

    The model is built with its parameters on meta and filled one module at a time, so memory stays near the size of the
    result. No code of the checkpoint is run, and transformers' own quantizers are not asked.

    Args:
        directory: a local checkpoint with config.json and safetensors; or a GGUF file, any part of a split one, or a folder that
            holds one and no safetensors; or the id of either on the Hub ("owner/name", "owner/name:FILE.gguf"; see `hub`). GGUF
            blocks that a scheme holds without loss (all but IQ1 to IQ3, TQ1_0 and Q1_0) run packed where a kernel takes them, all
            others are dequantized, which a warning says.
        device: where the model goes.
        dtype: of activations and unquantized weights, also by name ("bfloat16"); that of the checkpoint if None or "auto".
            Scales keep their own.
        on_unsupported: "raise", or "reference" to allow the plain-PyTorch kernel where no other fits.
        activations: None: as the file says where kernels have that as its origin computes it (compressed-tensors' int8 a token,
            LLM.int8), else in 16 bits, and a warning says what the file asks for. "file": the same, but an error where integers
            are asked that no kernel has; floats stay in 16 bits. "16bit": never quantized. "int8": rounded to int8 a token, also
            where the file has them in 16 bits (GGUF, GPTQ, AWQ): prompts are faster, logits less exact. A warning names weights
            for which no kernel does that.
        device_map: instead of `device`: "auto" fills the GPUs with layers and leaves the rest on the CPU; a number of layers goes
            to the first GPU, with all that is outside of layers (0: everything on the CPU); or a mapping from names of modules
            to devices ({"": 0, "model.layers.20": "cpu", …}). Each part is packed for the kernels of its device and stays
            there; activations travel.
        revision: of a model on the Hub: a branch, tag or commit.
        fused: norms, gated MLPs and attention of single tokens do on the CPU in one op what they do in many, up to the last bit
            of a rounding; False leaves them as transformers has them. See `nn.between`.
        others: none; those of transformers' `from_pretrained` get an error that says what to pass instead.

    Returns:
        The class that config.json names, else that of `AutoModelForCausalLM`, in eval mode. Where the files were saved from
        the model without its head, and there is none to tie to the embeddings (Qwen3-Embedding), the model without it.

    Raises:
        CheckpointError: the directory is incomplete, malformed or of an unknown kind; or its tensors and the model that
            config.json describes do not fit each other. Nothing missing or left over is passed over in silence.
        UnsupportedProblem: no kernel takes a module.
        ArgumentError: an argument or a value of `activations` that `load` does not have, or a dtype that no model is loaded in.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> from qkernels import load, replace_linear, save
    >>> model = LlamaForCausalLM(config)
    >>> report = replace_linear(model, "w4a16_g32")
    >>> save(model, "tiny-4bit", format="gptq")
    >>> again = load("tiny-4bit")
    >>> again.model.layers[0].mlp.up_proj.scheme == model.model.layers[0].mlp.up_proj.scheme
    True
    """
    refuse_others(others)
    if activations not in (None, *get_args(Activations)):
        raise ArgumentError(f'activations must be "file", "16bit", "int8" or None, got {activations!r:.40}')
    named = named_dtype(dtype)
    checkpoint = open_checkpoint(local_copy(directory, revision))
    dtype = named or stored_dtype(checkpoint)
    model, checkpoint = model_of(checkpoint, dtype)
    place = placement_of(device, device_map, model, checkpoint)
    if activations == "file":
        checkpoint = checkpoint.with_activations_of_the_file()
    slots = tied_slots(model)
    oddities: list[tuple[str, Oddity]] = [*checkpoint.oddities]
    used = {f"{module}.bias" for module in checkpoint.modules}
    forms = experts_of(model)
    choosing = routers(model, forms)
    memory = GivingBack(_GIVE_BACK_EVERY)
    for name, form in forms.items():
        if f"{name}.{form.up}" in checkpoint.stacks:
            taken = [n for p in (form.up, form.down) for n in (f"{name}.{p}", f"{name}.{p}_bias")]
            used.update(taken)
            slots = [kept for slot in slots if (kept := [n for n in slot if n not in taken])]
            device = place(name)
            try:
                loaded, strange = experts_at(
                    model, name, form, checkpoint, device, dtype, on_unsupported, activations=activations
                )
            except UnsupportedProblem:
                if checkpoint.format is not GGUF:
                    raise
                for projection in (form.up, form.down):
                    stack = f"{name}.{projection}"
                    floats, weight = dequantized_experts(checkpoint.expert_weights(stack), dtype)
                    assign(
                        model, {stack: nn.Parameter(form.stored(projection, floats).to(device), requires_grad=False)}
                    )
                    oddities.append((stack, dequantized(weight, device, dtype)))
                continue
            set_module(model, name, loaded)
            oddities += strange
            memory.freed(sum(checkpoint.module_nbytes(f"{name}.{p}") for p in (form.up, form.down)))
    for module in tqdm(checkpoint.modules, desc="loading", unit="layer", leave=False, delay=2):
        if module in choosing:
            oddities += dequantize_router(model, module, checkpoint, place(module), dtype)
            continue
        device = place(module)
        linear = linear_at(model, module, checkpoint.spelling(module))
        layer: nn.Module
        try:
            layer, found = packed_layer(linear, module, checkpoint, device, dtype, on_unsupported, activations)
        except UnsupportedProblem:
            if checkpoint.format is not GGUF:
                raise
            layer, oddity = float_layer(linear, module, checkpoint, device, dtype)
            found = [oddity]
        oddities += [(module, oddity) for oddity in found]
        set_module(model, module, layer)
        memory.freed(checkpoint.module_nbytes(module))
    for name in checkpoint.embeddings:
        slots, hindrance = _pack_embedding(model, name, slots, checkpoint, place, dtype, on_unsupported, activations)
        if hindrance is None:
            used.add(name)
        else:
            oddities.append((name, floated(name, checkpoint, dtype, hindrance)))
    missing = _fill(model, slots, checkpoint, used, place, dtype)
    check_names(model, missing, [name for name in checkpoint.names() if name not in used], checkpoint)
    _move_buffers(model, place)
    if fused:
        between_products.fuse(model)
    if place.spread:
        connect(model, place)
    give_back()
    for line in summary(oddities):
        log.warning("%s: %s", checkpoint.path, line)
    model.config._name_or_path = str(checkpoint.path)
    return model.eval()


def _pack_embedding(
    model: Any,
    name: str,
    slots: list[list[str]],
    checkpoint: Checkpoint,
    place: Placement,
    dtype: torch.dtype,
    on_unsupported: OnUnsupported,
    activations: Activations | None,
) -> tuple[list[list[str]], str | None]:
    """Put an embedding into its place packed, and heads that are tied to it, which share its memory. Returns the slots that are
    still to be filled, and why it has to be floats after all."""
    slot = next((slot for slot in slots if name in slot), [])
    others = [other.removesuffix(".weight") for other in slot if other != name]
    others = [other for other in others if other not in checkpoint.modules]
    module = name.removesuffix(".weight")
    source = model.get_submodule(module)
    heads = [model.get_submodule(other) for other in others]
    if not isinstance(source, nn.Embedding) or any(type(h) is not nn.Linear or h.bias is not None for h in heads):
        return slots, "the model has no embedding there, or one that is tied to something else than a head"
    if any(place(other) != place(module) for other in others):
        return slots, "its head is on another device"
    wanted, got = [source.num_embeddings, source.embedding_dim], list(checkpoint.shape(name))
    if wanted != got:
        raise CheckpointError(f"{name}: the model needs a weight {wanted}, got {got}")
    try:
        scale = scale_of(source)
        int8 = bool(others) and activations == "int8"
        lying = None if int8 else checkpoint.embedding_ready(name)
        table = None
        if lying is not None:
            table = QuantLinear.from_buffers(*lying, None, place(module), dtype, on_unsupported)
        if table is None:
            parts = checkpoint.embedding(name)
            if int8:
                parts, _ = with_int8(parts, (got[0], got[1]), place(module), dtype, on_unsupported)
            table = QuantLinear.from_parts(parts, got[0], place(module), dtype, on_unsupported)
    except (ArgumentError, UnsupportedProblem) as error:
        return slots, str(error)
    set_module(model, module, QuantEmbedding(table, scale))
    for other in others:
        set_module(model, other, table)
    if len(others) + 1 < len(slot):
        _untie(model, f"{slot[0]} and {slot[-1]} are tied by {CONFIG}, but one of them is quantized")
    return [kept for kept in slots if kept is not slot], None


def model_of(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[Any, Checkpoint]:
    """The model of a checkpoint, without weights (see `empty_model`), and the checkpoint under its names.

    Raises:
        CheckpointError: transformers cannot build the model, or cannot give all tensors a place of their own.
    """
    model = empty_model(checkpoint.config, dtype, checkpoint.path)
    named, base = checkpoint.named_as_in(model), model.base_model
    inside = f"{model.base_model_prefix}."
    in_files = [*checkpoint.names(), *checkpoint.modules]
    if base is model or any(name.startswith(inside) for name in in_files):
        return model, named
    missing = [slot for slot in tied_slots(model) if not any(name in named or _quantized(name, named) for name in slot)]
    if not missing or any(name.startswith(inside) for slot in missing for name in slot):
        return model, named
    log.warning(
        "%s: the files hold a %s, without %s of a %s",
        checkpoint.path, type(base).__name__, ", ".join(slot[0] for slot in missing), type(model).__name__,
    )  # fmt: skip
    return base, checkpoint.named_as_in(base)


def _quantized(name: str, checkpoint: Checkpoint) -> bool:
    module, _, leaf = name.rpartition(".")
    return (leaf == "weight" and module in checkpoint.modules) or name in checkpoint.stacks


def check_fits(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise unless a float checkpoint holds what its model needs, in the same shapes, and nothing else; reads headers only.

    Raises:
        CheckpointError: names the tensors.
    """
    needed = model.state_dict()
    for name, tensor in needed.items():
        if name in checkpoint and checkpoint.shape(name) != tuple(tensor.shape):
            raise CheckpointError(
                f"{name}: the model that {CONFIG} describes needs {list(tensor.shape)}, got {list(checkpoint.shape(name))}"
            )
    may_lack = computed(model)
    missing = [n[0] for n in tied_slots(model) if n[0] not in may_lack and not any(name in checkpoint for name in n)]
    check_names(model, missing, [name for name in checkpoint.names() if name not in needed], checkpoint)


def check_strays(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise for tensors that look like parts of quantized weights and have no place, where others may be left over (a class of
    model with another head).

    Raises:
        CheckpointError: names them.
    """
    assert checkpoint.format is not None
    places, suffixes = float_state(model).keys(), set(checkpoint.format.suffixes)
    strays = []
    for name in checkpoint.names():
        module, _, leaf = name.rpartition(".")
        belongs = module in checkpoint.modules and leaf != "bias"
        if name not in places and (belongs or leaf in suffixes - {"weight"}):
            strays.append(name)
    check_names(model, [], strays, checkpoint)


def tied_slots(model: nn.Module) -> list[list[str]]:
    """The places that the checkpoint must fill: names of parameters and stored buffers, tied ones together."""
    slots: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        slots.setdefault(id(tensor), []).append(name)
    return list(slots.values())


def experts_at(
    model: nn.Module,
    name: str,
    form: ExpertsForm,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    on_unsupported: OnUnsupported,
    source: nn.Module | None = None,
    activations: Activations | None = None,
) -> tuple[QuantExperts, list[tuple[str, Oddity]]]:
    """The experts of a checkpoint for a place in the model, read and packed one by one; `source`: the module that was there;
    `activations`: as of `load`.

    Raises:
        CheckpointError: shapes or numbers do not fit the place; experts differ in scheme; a bias is missing.
        UnsupportedProblem: no kernel takes them.
    """
    source = model.get_submodule(name) if source is None else source
    oddities: dict[tuple[str, Oddity], None] = {}
    stacks = {}
    for projection in (form.up, form.down):
        stack, shape = f"{name}.{projection}", list(form.shape(projection))

        def weights(
            stack: str = stack, shape: list[int] = shape, projection: str = projection
        ) -> Iterator[QuantTensor]:
            for expert, parsed in enumerate(checkpoint.expert_weights(stack)):
                of_file = checkpoint.format
                weight, found = as_it_runs(parsed, of_file, device, dtype, on_unsupported, form.experts, activations)
                if list(weight.codes.shape) != shape:
                    got = list(weight.codes.shape)
                    raise CheckpointError(f"{stack}: the model needs {shape} an expert, got {got} for expert {expert}")
                if checkpoint.format is not None and checkpoint.format.rows_as_stored and projection == form.up:
                    weight = rows_in_halves(form, weight)
                oddities.update(dict.fromkeys((stack, oddity) for oddity in found))
                yield weight

        bias: Tensor | None = source._parameters.get(f"{projection}_bias")
        if bias is not None:
            full = f"{stack}_bias"
            if full not in checkpoint or checkpoint.shape(full) != tuple(bias.shape):
                got = list(checkpoint.shape(full)) if full in checkpoint else "none"
                raise CheckpointError(f"{full}: the model needs {list(bias.shape)}, got {got}")
            bias = bias_of(form, projection, checkpoint.read(full))
        try:
            try:
                made = QuantStack.of(weights(), form.experts, bias, device, dtype, on_unsupported)
            except OrdersDiffer:
                made = QuantStack.of(weights(), form.experts, bias, device, dtype, on_unsupported, own_orders=True)
        except UnsupportedProblem as error:
            raise UnsupportedProblem(f"{stack}: {error}") from None
        except ArgumentError as error:
            raise CheckpointError(f"{stack}: {error}") from error
        stacks[str(projection)] = made
    return QuantExperts(source, form, stacks), list(oddities)


def _fill(
    model: Any,
    slots: list[list[str]],
    checkpoint: Checkpoint,
    used: set[str],
    place: Placement,
    dtype: torch.dtype,
) -> list[str]:
    """Load what is not quantized; returns the names that the checkpoint lacks."""
    missing, made = [], {name: model.get_parameter(name) for name in computed(model)}
    for slot in slots:
        names = [name for name in slot if name.rpartition(".")[0] not in checkpoint.modules]
        present = [name for name in names if name in checkpoint]
        used.update(present)
        if len(names) < len(slot) and names:
            _untie(model, f"{slot[0]} and {slot[-1]} are tied by {CONFIG}, but one of them is quantized")
        if not present and names and names[0] in made:
            there = made[names[0]].to(place(names[0]))
            assign(model, {names[0]: nn.Parameter(there, requires_grad=False)})
            continue
        if not present:
            missing += names[:1]
            continue
        first = _parameter(model, checkpoint, present[0], place(present[0]), dtype)
        values = dict.fromkeys(names, first)
        for name in present[1:]:
            if not torch.equal(checkpoint.read(present[0]), checkpoint.read(name)):
                _untie(model, f"{present[0]} and {name} are tied by {CONFIG}, but differ in the checkpoint")
                values[name] = _parameter(model, checkpoint, name, place(name), dtype)
        assign(model, values)
    return missing


def _parameter(model: Any, checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    place: Tensor = getattr(model.get_submodule(parent), leaf)
    tensor = checkpoint.read(name)
    if tensor.shape != place.shape or tensor.is_floating_point() != place.is_floating_point():
        kind = "a float tensor" if place.is_floating_point() else dtype_name(place.dtype)
        raise CheckpointError(f"{name}: the model needs {kind} {list(place.shape)}, got {describe(tensor)}")
    wanted = place.dtype
    if place.is_floating_point():
        wanted = torch.float32 if kept_in_fp32(model, name, dtype) else dtype
    return nn.Parameter(tensor.to(device, wanted), requires_grad=place.requires_grad)


def _untie(model: Any, why: str) -> None:
    log.warning("%s; they are not tied", why)
    model.config.tie_word_embeddings = False


def check_names(model: Any, missing: list[str], left_over: Iterable[str], checkpoint: Checkpoint) -> None:
    """Raise unless a checkpoint lacks nothing and has nothing left over, but for what models compute.

    Raises:
        CheckpointError: names the tensors.
    """
    ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    ignored |= {r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"}  # computed; older files still store them
    unexpected = [name for name in left_over if not any(re.search(pattern, name) for pattern in ignored)]
    if not missing and not unexpected:
        return
    parts = [
        f"{len(names)} {what}, for example {', '.join(names[:3])}"
        for names, what in (
            (missing, "tensors it needs are missing"),
            ([checkpoint.spelling(name) for name in unexpected], "tensors are unknown to it"),
        )
        if names
    ]
    raise CheckpointError(f"the checkpoint does not fit {type(model).__name__}: {'; '.join(parts)}")


def _move_buffers(model: nn.Module, place: Placement) -> None:
    for path, module in model.named_modules():
        if not isinstance(module, PackedModule):
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(place(path))

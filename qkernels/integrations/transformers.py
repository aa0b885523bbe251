"""transformers: quantize while loading, and read every checkpoint that `qkernels.load` reads, through `from_pretrained`.

from qkernels.integrations.transformers import QKernelsConfig, enable

model = AutoModelForCausalLM.from_pretrained("my-llama/", quantization_config=QKernelsConfig("w4a16_g128"))
model.save_pretrained("out/")                               # our native format
model = AutoModelForCausalLM.from_pretrained("out/")        # importing this module is enough for it
enable()                                                    # from here on also GPTQ, AWQ, FP8, bitsandbytes, … (METHODS)
model = AutoModelForCausalLM.from_pretrained("some-gptq-model/")
model = AutoModelForCausalLM.from_pretrained("dir/", gguf_file="model-Q4_K_M.gguf")    # packed, too (gguf.py)

All of them yield `QuantLinear` modules. `model.hf_quantizer.report` lists what was quantized and, with reasons, every matrix that
was not. Written for the hooks of transformers 5.8.1 to 5.24 (`transformers/quantizers/base.py`); tested with both ends.

While loading, a quantized module of a checkpoint is a placeholder without parameters: transformers has nothing to allocate or to
initialize for it. Its weight is read, validated and packed afterwards, one module at a time.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.layers import dequantize_embedding, dequantize_router, linear_at, packed_layer
from ..checkpoint.loading import check_strays, experts_at
from ..checkpoint.saving import expert_biases, inside_of, plain_tensors, stacks_of
from ..errors import ArgumentError, CheckpointError, ConversionError
from ..formats import Oddity, Written, native, summary
from ..memory import give_back
from ..models.experts import ExpertsForm, experts_of, routers
from ..models.linears import check_unscaled, is_conv1d
from ..models.naming import FileNames
from ..nn import (
    QuantExperts,
    QuantLinear,
    QuantStack,
    ReplaceReport,
    model_bytes,
    other_names,
    select_linears,
    set_module,
)
from ..nn.embedding import plain_embeddings
from ..nn.experts import bias_of
from ..nn.pretrained import prepare_with
from ..nn.selection import as_patterns
from ..quantizers import RTN
from ..quantizers.grid import checked_weight
from ..scheme import QuantScheme
from .configs import METHODS, CheckpointConfig, QKernelsConfig, as_it_is
from .modules import asked_in_place_of, belongs_to_a_head, device_near, experts_in, layers_of, put, untie
from .placeholders import Packed, Pending, PendingExperts

log = logging.getLogger(__name__)

GGUF: Final = "gguf"


class QKernelsQuantizer(HfQuantizer):
    """Puts `QuantLinear` modules into a model that `from_pretrained` loads; see the head of this file."""

    requires_calibration = False
    of_qkernels = True

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if getattr(quantization_config, "dequantize", False):
            raise ArgumentError(
                f"{type(quantization_config).__name__}(dequantize=True) asks for floats, and enable() for packed weights: leave "
                f"one of them out, or call model.dequantize() afterwards"
            )
        self.report = ReplaceReport()
        self._schemes: dict[str, QuantScheme] = {}
        self._checkpoint: Checkpoint | None = None
        self._model: Any = None  # while it is loaded
        self._placed: list[str] = []  # quantized modules of the checkpoint that the model has
        self._conversions: list[Any] | None = None
        self._conv1d: set[str] = set()
        self._cut_first: set[str] = set()
        self._forms: dict[str, ExpertsForm] = {}  # of experts modules that are quantized, by name
        self._stacks: dict[str, QuantStack] = {}  # those that were read, by the names of their parameters
        self._routers: list[str] = []  # that the files quantized
        self._also: dict[str, list[str]] = {}  # names of modules that have several

    # --- before weights are loaded: the model is on meta ----------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        self._begin(model)
        if not self.pre_quantized:
            self._select(model)
            return model
        if not checkpoint_files:
            raise CheckpointError("a quantized model is loaded from safetensors files, but there are none")
        self._checkpoint = open_checkpoint(Path(checkpoint_files[0]).parent)
        if not self._checkpoint.modules:
            raise CheckpointError(f"{self._checkpoint.path} holds no quantized weights")
        self._model = model
        return model

    def _begin(self, model: Any) -> None:
        self.report.bytes_before = model_bytes(model)
        self._also = other_names(model)
        self._conv1d = {name for name, module in model.named_modules() if is_conv1d(module)}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Put placeholders where quantized modules will be, by the names that transformers gives to tensors of files: here
        it says what they are, a `key_mapping` included."""
        checkpoint, model, self._model = self._checkpoint, self._model, None
        self._cut_first = set(asked_in_place_of(self._schemes, weight_conversions))
        if checkpoint is None or model is None:
            return weight_conversions
        checkpoint = self._checkpoint = checkpoint.named_as_in(model, weight_conversions)
        self._conversions = getattr(model, "_weight_conversions", None)
        forms = experts_of(model)
        choosing = routers(model, forms)
        self._forms = {n: form for n, form in forms.items() if f"{n}.{form.up}" in checkpoint.stacks}
        self._routers = [module for module in checkpoint.modules if module in choosing]
        absent = [module for module in checkpoint.modules if belongs_to_a_head(module, model, checkpoint)]
        self._placed = [module for module in checkpoint.modules if module not in (*absent, *self._routers)]
        if absent or not (self._placed or self._forms):
            log.warning("%s has no place for %s of the checkpoint", type(model).__name__, ", ".join(absent))
        check_strays(model, checkpoint)
        for module in self._placed:
            untie(model, module)
            put(model, module, Pending(linear_at(model, module, checkpoint.spelling(module))), self._also)
        for name in self._forms:
            put(model, name, PendingExperts(model.get_submodule(name)), self._also)
        lacking = [re.escape(f"{module}.{leaf}") for module in self._routers for leaf in ("weight", "bias")]
        lacking += [re.escape(name) for name in self._embeddings(checkpoint)]
        if lacking:  # they get their values afterwards
            model._keys_to_ignore_on_load_missing = [*(model._keys_to_ignore_on_load_missing or ()), *lacking]
        ignored = model._keys_to_ignore_on_load_unexpected  # a list until transformers 5.8, then a set
        model._keys_to_ignore_on_load_unexpected = (set if isinstance(ignored, set) else list)(
            [Packed.KEY, *(ignored or ())]
        )
        return [Packed(checkpoint), *weight_conversions]

    def _select(self, model: Any) -> None:
        """Choose the layers to quantize while they load; everything else goes into the report."""
        config: Any = self.quantization_config
        selection = select_linears(model, config.scheme, config.include, config.exclude, config.overrides, "raise")
        self._schemes = dict(selection.chosen)
        self._schemes |= {f"{n}.{p}": s for n, schemes in selection.experts.items() for p, s in schemes.items()}
        self._forms = {n: form for n, form in experts_of(model).items() if n in selection.experts}
        self.report = ReplaceReport.of(selection, model)
        if not self._schemes:
            raise ArgumentError(f"there is no layer to quantize:\n{self.report}")

    # --- on the fly: one tensor at a time -------------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, _, leaf = param_name.rpartition(".")
        return (
            (leaf == "weight" and module in self._schemes)
            or param_name in self._schemes
            or param_name in self._cut_first
        )

    def is_chosen(self, module: str) -> bool:
        """Whether it is to be quantized while it loads."""
        return module in self._schemes

    def is_stack(self, parameter: str) -> bool:
        """Whether a parameter is a stack of experts that is to be quantized while it loads."""
        return parameter in self._schemes and parameter.rpartition(".")[0] in self._forms

    def quantize_stack(self, model: Any, parameter: str, stored: Tensor) -> None:
        """Pack a stack of experts that has just been read; its module is put together when all is loaded."""
        name, _, projection = parameter.rpartition(".")
        form, scheme, source = self._forms[name], self._schemes[parameter], model.get_submodule(name)
        checked_weight(stored, parameter)
        weights = form.of_projection(projection, stored)
        made = (
            RTN().with_scheme(scheme).quantize(w.contiguous(), name=f"{parameter}[{e}]") for e, w in enumerate(weights)
        )
        self._stacks[parameter] = QuantStack.of(made, form.experts, None, stored.device, stored.dtype)
        source._parameters.pop(projection, None)  # nothing is to be initialized there
        source._is_hf_initialized = True
        self.report.add(parameter, self._stacks[parameter], stored.nbytes)

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeWeight(self)

    def quantize_weight(self, model: Any, module: str, weight: Tensor) -> None:
        """Replace a linear layer, whose weight has just been read, by a quantized one; a bias that comes later finds its
        place."""
        linear, scheme = linear_at(model, module), self._schemes[module]
        loaded = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        if is_conv1d(model.get_submodule(module)):
            weight = weight.T
        loaded.weight = nn.Parameter(weight, requires_grad=False)
        layer = QuantLinear.from_linear(loaded, scheme, name=f"{module}.weight")
        layer.bias = linear.bias
        put(model, module, layer, self._also)
        self.report.add(module, layer, weight.nbytes)

    # --- after weights are loaded ---------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._checkpoint is not None:
            self._unpack(model, self._checkpoint)
            model._weight_conversions = self._conversions
        else:
            self._put_experts(model)
        missing = [name for name in self._schemes if name not in self.report.replaced]
        if missing:
            raise CheckpointError(
                f"{len(missing)} layers that are to be quantized have no weight in the checkpoint, first {missing[0]}; "
                f"exclude what is new, and quantize it when it is trained"
            )
        self.report.bytes_after = model_bytes(model)
        self._describe(model)
        for name, why in self.report.skipped.items():
            if why.startswith("stacked experts"):
                log.warning("not quantized: %s: %s", name, why)
        log.info("%s", self.report)
        give_back()
        return model

    def _put_experts(self, model: Any) -> None:
        """Those whose stacks were quantized while they loaded; biases are there, too, by now."""
        for name, form in self._forms.items():
            found = {str(p): self._stacks[f"{name}.{p}"] for p in (form.up, form.down) if f"{name}.{p}" in self._stacks}
            if len(found) < 2:
                continue  # named as missing
            source = model.get_submodule(name)
            for projection, stack in found.items():
                bias = bias_of(form, projection, source._parameters.get(f"{projection}_bias"))
                if bias is not None:
                    stack.bias = nn.Parameter(bias.detach().to(stack.dtype), requires_grad=False)
            put(model, name, QuantExperts(source, form, found), self._also)

    def _unpack(self, model: Any, checkpoint: Checkpoint) -> None:
        """Every placeholder becomes a `QuantLinear`, one module in memory at a time."""
        dtype = model.dtype
        oddities: list[tuple[str, Oddity]] = [*checkpoint.oddities]
        for module in self._placed:
            layer, found = self._layer(
                model.get_submodule(module).linear, module, checkpoint, device_near(model, module), dtype
            )
            oddities += [(module, oddity) for oddity in found]
            set_module(model, module, layer, self._also.get(module, ()))
            if isinstance(layer, QuantLinear):
                self.report.add(module, layer, layer.out_features * layer.in_features * dtype.itemsize)
        for name, form in self._forms.items():
            source, device = model.get_submodule(name).source, device_near(model, name)
            experts, strange = experts_at(model, name, form, checkpoint, device, dtype, "raise", source)
            oddities += strange
            set_module(model, name, experts, self._also.get(name, ()))
            for projection, stack in experts.stacks.items():
                count = form.experts * stack.out_features * stack.in_features
                self.report.add(f"{name}.{projection}", stack, count * dtype.itemsize)
        for name in self._embeddings(checkpoint):
            oddities += dequantize_embedding(
                model, name, checkpoint, device_near(model, name.rpartition(".")[0]), dtype
            )
        for module in self._routers:
            oddities += dequantize_router(model, module, checkpoint, device_near(model, module), dtype)
        selection = select_linears(model, "w4a16_g128")  # whatever the scheme
        left = dict(selection.skipped)
        left |= {
            f"{n}.{p}": "stacked experts that the checkpoint does not quantize"
            for n, ps in selection.experts.items()
            for p in ps
        }
        self.report.skipped |= {n: why for n, why in left.items() if n not in self.report.replaced}
        for line in summary(oddities):
            log.warning("%s: %s", checkpoint.path, line)

    def _embeddings(self, checkpoint: Checkpoint) -> Collection[str]:
        """Those that are read here, after all else."""
        return checkpoint.embeddings

    def _layer(
        self, linear: nn.Linear, module: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
    ) -> tuple[nn.Module, list[Oddity]]:
        """What takes the place of a quantized module of a checkpoint."""
        return packed_layer(linear, module, checkpoint, device, dtype)

    def _describe(self, model: Any) -> FileNames:
        """Make the model's config say what `save_pretrained` would write; returns the names that it would use."""
        names = FileNames(model)
        schemes = {names.module(name): layer.scheme for name, layer in layers_of(model).items()}
        stacks: dict[str, Any] = stacks_of(experts_in(model))
        schemes |= {names.stack(name): stack.scheme for name, stack in stacks.items()}
        if schemes:
            self.quantization_config = QKernelsConfig(**native.config_of(Written.of(schemes)))
            model.config.quantization_config = self.quantization_config
        return names

    # --- saving and what else transformers asks -------------------------------------------------------------------------

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top of the frozen weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The model in the native format, whatever it was loaded from, under the names that files have: `_saving` puts
        back what the model knows of them."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return model.state_dict(), {}  # of which adapters are written
        layers, names = layers_of(model), self._describe(model)
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            written = names.module(name)
            tensors |= {f"{written}.{suffix}": t for suffix, t in native.write(layer.quant_tensor()).items()}
            if layer.bias is not None:
                tensors[f"{written}.bias"] = layer.bias.detach()
        experts = experts_in(model)
        stacks: dict[str, Any] = stacks_of(experts)
        for name, stack in stacks.items():
            written, weight = names.stack(name), stack.quant_tensor()
            tensors |= {native.tensor_name(written, suffix, weight): t for suffix, t in native.write(weight).items()}
        for name, bias in expert_biases(experts):
            tensors |= dict(names.tensors(name, bias))
        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        for name, tensor in plain_tensors(model, {**layers, **inside_of(experts)}):
            if name not in ignored:
                tensors |= {written: t.detach() for written, t in names.tensors(name, tensor)}
        tensors |= {name: t.detach() for name, t in names.rest()}
        model._weight_conversions = []  # nothing is left to translate
        return tensors, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # `save_pretrained` leaves it in the model's config as a string
        as_dtype = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        for name, layer in layers_of(model).items():
            weight = layer.dequantize(as_dtype)
            plain: nn.Module = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            if name in self._conv1d:
                plain, weight = Conv1D(layer.out_features, layer.in_features), weight.T.contiguous()
            plain.weight = nn.Parameter(weight)
            plain._parameters["bias"] = layer.bias
            set_module(model, name, plain)
        for name, experts in experts_in(model).items():
            weights = {n: nn.Parameter(t) for n, t in experts.dequantize(as_dtype).items()}
            floats = copy.copy(experts.shell)
            floats._parameters = dict(weights)
            set_module(model, name, floats)
        return model


@contextmanager
def _saving(model: Any) -> Iterator[None]:
    """What goes on around `save_pretrained` of a model with quantized layers, wherever they came from.

    Raises:
        ConversionError: another quantizer of transformers is at work in the model, too; or its first pass has scaled weights.
    """
    check_unscaled(model)
    adopted = getattr(model, "hf_quantizer", None) is None
    if adopted:
        model.hf_quantizer = QKernelsQuantizer(QKernelsConfig())
    elif not getattr(model.hf_quantizer, "of_qkernels", False):  # not isinstance: this module may be imported twice
        raise ConversionError(
            f"{type(model).__name__} holds QuantLinear modules and modules of {type(model.hf_quantizer).__name__}: there is "
            f"no format for both in one checkpoint"
        )
    known = getattr(model, "_weight_conversions", None)
    try:
        with plain_embeddings(model):
            yield
    finally:
        if known is not None:
            model._weight_conversions = known
        else:
            model.__dict__.pop("_weight_conversions", None)
        if adopted:
            del model.hf_quantizer
            model.config.__dict__.pop("quantization_config", None)


class _QuantizeWeight(ConversionOps):
    """Quantizes one weight as it is loaded; leaves nothing for transformers to put into the model."""

    def __init__(self, quantizer: QKernelsQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        model, missing = kwargs["model"], kwargs.get("missing_keys")
        left: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module = name.rpartition(".")[0]
            if self.quantizer.is_stack(name):
                self.quantizer.quantize_stack(model, name, weight)
                if missing is not None:
                    missing.discard(name)
                continue
            if not self.quantizer.is_chosen(module):
                left[name] = weight  # cut from the same tensor as one that is
                continue
            self.quantizer.quantize_weight(model, module, weight)
            if missing is not None:
                missing.discard(name)
        return left


def enable(methods: Iterable[str] | str | None = None) -> None:
    """From here on, `from_pretrained` gives checkpoints of these methods to qkernels instead of the quantizers that come
    with transformers (which need a package of each origin, or a GPU), and GGUF files (`gguf_file=`) instead of readers that
    dequantize them. A `quantization_config` that asks to quantize floats while they load (GPTQConfig, BitsAndBytesConfig) stays
    transformers' own; `QKernelsConfig` is ours. Calling it again changes nothing.

    Args:
        methods: of METHODS, such as "gptq" or "fp8", and "gguf"; None for all of them ("gguf" where this transformers asks about
            it: since 5.23).

    Raises:
        ArgumentError: another method, or "gguf" with a transformers that asks nobody about it.
    """
    asks = GGUF in AUTO_QUANTIZER_MAPPING
    chosen = as_patterns(methods) or (*METHODS, *[GGUF] * asks)
    for method in chosen:
        if method not in (*METHODS, GGUF):
            raise ArgumentError(f"methods must be of {', '.join((*METHODS, GGUF))}, got {method!r}")
    if GGUF in chosen:
        if not asks:
            raise ArgumentError(
                "this transformers asks nobody about GGUF files (5.23 does); load them with qkernels.load"
            )
        from . import gguf

        gguf.answer()
    for key in (key for method in chosen if method != GGUF for key in METHODS[method]):
        theirs = AUTO_QUANTIZATION_CONFIG_MAPPING.get(key, CheckpointConfig)
        if not issubclass(theirs, CheckpointConfig):
            theirs = as_it_is(theirs)
        AUTO_QUANTIZATION_CONFIG_MAPPING[key] = theirs
        AUTO_QUANTIZER_MAPPING[key] = _Chosen(AUTO_QUANTIZER_MAPPING.get(key))


class _Chosen:
    """What transformers calls for the quantizer of a method: ours for a checkpoint, its own to quantize floats."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = getattr(theirs, "theirs", theirs)  # of an earlier call of `enable`

    def __call__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> HfQuantizer:
        floats = kwargs.get("pre_quantized") is False and self.theirs is not None
        chosen: HfQuantizer = (self.theirs if floats else QKernelsQuantizer)(quantization_config, **kwargs)
        return chosen


def register() -> None:
    """Make `quant_method: qkernels` known to transformers; importing this module does it.

    Raises:
        ArgumentError: another package has taken the name.
    """
    for mapping, own in (
        (AUTO_QUANTIZATION_CONFIG_MAPPING, QKernelsConfig),
        (AUTO_QUANTIZER_MAPPING, QKernelsQuantizer),
    ):
        taken = mapping.get(native.METHOD)
        if taken is not None and taken.__module__ != own.__module__:
            raise ArgumentError(f'quant_method "{native.METHOD}" is taken by {taken.__module__}.{taken.__name__}')
        mapping[native.METHOD] = own  # a second import of this module replaces its own classes


register()
prepare_with(_saving)

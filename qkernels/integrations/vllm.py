"""vLLM: every safetensors checkpoint that `qkernels.load` reads, on our kernels, also cut over several ranks.

vllm serve out/                                 # a native checkpoint says itself that it is ours
vllm serve some-gptq/ --quantization qkernels   # files that vLLM also has kernels of its own for

vLLM finds `register` through the entry point `vllm.general_plugins` in each of its processes. Nothing of a format is known here:
a quantized layer has empty parameters under the names of its format's tensors, whose loaders collect what streams by. As soon as
a layer has all that the headers promised, its format parses it, `QuantTensor.shard` cuts it for this rank, and it is packed: in
memory are the result and one layer. Routed experts: vllm_experts.py. Written for vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from ..checkpoint import open_checkpoint
from ..checkpoint.activations import as_it_runs
from ..checkpoint.registry import detect
from ..errors import ArgumentError, CheckpointError
from ..formats import Format
from ..memory import give_back
from ..nn import QuantLinear
from ..storage.files import DTYPES
from ..tensor import QuantTensor
from .vllm_experts import Asked, VllmExpertsMethod
from .vllm_weights import grouped, joined, parameter_name, rows_of

NAME: Final = "qkernels"
NO_GGUF: Final = (
    "vLLM streams safetensors, so a GGUF file is not served as it is: `qkernels pack model.gguf dir/` writes the same weights "
    "for it, then serve dir/"
)
_ANY: Final = "weight"  # stands for a tensor of a module, where names of tensors are mapped
_SHARDS: Final = {None: 0, "q": 0, "k": 1, "v": 2}


class VllmConfig(QuantizationConfig):
    """What a checkpoint says of its quantization, and which tensors its headers list for which module.

    It is pickled into other processes: it holds plain dictionaries, and asks for the format whenever it needs one.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.tensors: dict[str, tuple[str, ...]] = {}
        # Names in the files, by which a config gives schemes, of what vLLM calls otherwise.
        self.spelled: dict[str, str] = {}
        self.dtypes: dict[str, str] = {}  # of tensors by their names in the files, as safetensors call them

    @property
    def format(self) -> Format:
        """How the weights are stored.

        Raises:
            CheckpointError: it is none that is read here.
        """
        return detect(self.config)

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmConfig:
        detect(config)  # an unknown kind is refused before anything is built
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """`--quantization qkernels` takes every file that is read here; without it what vLLM reads by itself stays vLLM's.

        Raises:
            CheckpointError: we are asked for files that are not read here.
        """
        if hf_quant_cfg.get("quant_method") == NAME:
            return NAME
        return NAME if user_quant == NAME and detect(hf_quant_cfg) else None

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """vLLM's own mapper drops `.g_idx`, and with it act-order, in silence; ours keeps every tensor. Parameters cannot have
        dots in their names: `weight.absmax` gets another one on its way."""
        dotted = sorted((s for s in self.format.suffixes if "." in s), key=len, reverse=True)
        return WeightsMapper(orig_to_new_suffix={f".{suffix}": f".{parameter_name(suffix)}" for suffix in dotted})

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read which modules are quantized from the headers; of a local directory all that `qkernels.load` checks is checked.

        Raises:
            CheckpointError: nothing is quantized there, or something is asked that is not done here.
            ArgumentError: a GGUF file.
        """
        if str(model_name).lower().endswith(".gguf"):
            raise ArgumentError(f"{model_name}: {NO_GGUF}")
        if Path(model_name).is_dir():
            checkpoint = open_checkpoint(model_name)
            if checkpoint.format is None or checkpoint.path.is_file():
                raise CheckpointError(
                    f"{model_name}: {NO_GGUF if checkpoint.path.is_file() else 'nothing is quantized'}"
                )
            self.config = dict(checkpoint.quantization)
            names = [part for module in checkpoint.modules for part in checkpoint.parts(module)]
        headers = get_safetensors_params_metadata(model_name, revision=revision)
        names = names if Path(model_name).is_dir() else list(headers)
        self.dtypes = {name: str(headers[name]["dtype"]) for name in names if name in headers}
        self.tensors = grouped(names, self.format)
        if not self.tensors:
            raise CheckpointError(
                f"{model_name} declares {self.format.name}, but the headers of its safetensors list no *."
                f"{self.format.required[0]}; {NO_GGUF}"
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Modules get the names that the model of vLLM has for them: those that their tensors get."""
        named: dict[str, str] = {}
        for name in self.tensors:
            found = hf_to_vllm_mapper.apply_list([f"{name}.{_ANY}"])
            if found:
                named[name] = found[0].removesuffix(f".{_ANY}")
        self.tensors = {new: self.tensors[name] for name, new in named.items()}
        self.spelled = {new: name for name, new in named.items() if new != name}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | VllmExpertsMethod | None:
        """The method of a linear layer, head or routed experts; None for what is not quantized.

        Raises:
            CheckpointError: a part of a merged layer is quantized and another not; or what is quantized is no such layer.
        """
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            inside = [name for name in self.tensors if name == prefix or name.startswith(f"{prefix}.")]
            if inside and isinstance(layer, RoutedExperts):
                tensors = {name: self.tensors[name] for name in inside}
                in_files = {name: self.spelled.get(name, name) for name in inside}
                return VllmExpertsMethod(layer.moe_config, Asked(self.format, self.config, prefix, tensors, in_files))
            if inside:
                raise CheckpointError(
                    f"{prefix} ({type(layer).__name__}) is neither a linear layer nor vLLM's routed experts, got "
                    f"{len(inside)} quantized modules, first {inside[0]}; run this checkpoint with `qkernels serve`"
                )
            return None
        above, _, leaf = prefix.rpartition(".")
        names = [leaf] if prefix in self.tensors else self.packed_modules_mapping.get(leaf, [leaf])
        parts = [f"{above}.{name}" if above else name for name in names]
        found = [part for part in parts if part in self.tensors]
        if not found:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if len(found) != len(parts):
            raise CheckpointError(
                f"{prefix}: vLLM computes {', '.join(parts)} as one layer, but only {', '.join(found)} are quantized; quantize "
                "all of them or none"
            )
        return VllmLinearMethod(self, prefix, parts)


@dataclass
class Loading:
    """A layer whose tensors are still coming: by part, by suffix."""

    sizes: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    files: dict[int, dict[str, Tensor]] = field(default_factory=dict)


class VllmLinearMethod(LinearMethodBase):
    """Loads and computes one linear layer of vLLM, which may be several modules of the checkpoint."""

    def __init__(self, config: VllmConfig, prefix: str, parts: Sequence[str]) -> None:
        self.config, self.prefix, self.parts = config, prefix, tuple(parts)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Empty parameters that collect the file's tensors. They have the dtypes of these: vLLM warns of each that differs."""
        holes = {
            suffix: nn.Parameter(torch.empty(0, dtype=self._dtype_of(suffix)), requires_grad=False)
            for suffix in self.config.format.suffixes
        }
        device = next(iter(holes.values())).device  # vLLM builds models inside of `torch.device(...)`
        layer.qkernels_loading = Loading(output_partition_sizes, params_dtype, device)  # type: ignore[assignment]
        for suffix, hole in holes.items():

            def collect(_: nn.Parameter, tensor: Tensor, shard: Any = None, suffix: str = suffix) -> None:
                self._collect(layer, suffix, tensor, getattr(tensor, "shard_id", shard))

            hole.weight_loader = collect  # type: ignore[attr-defined]
            layer.register_parameter(parameter_name(suffix), hole)

    def _dtype_of(self, suffix: str) -> torch.dtype | None:
        """What the files have a tensor of the first part in; None, torch's default, where they have none."""
        name = self.config.spelled.get(self.parts[0], self.parts[0])
        return DTYPES.get(self.config.dtypes.get(f"{name}.{suffix}", ""))

    def _collect(self, layer: Any, suffix: str, tensor: Tensor, shard: Any) -> None:
        part = _SHARDS.get(shard, shard) if isinstance(shard, str | None) else shard
        if not isinstance(part, int) or not 0 <= part < len(self.parts):
            raise CheckpointError(f"{self.prefix}: got a tensor for part {shard!r} of {', '.join(self.parts)}")
        loading: Loading = layer.qkernels_loading
        loading.files.setdefault(part, {})[suffix] = tensor.detach().cpu().clone()  # a loader may use its memory again
        if not self._missing(loading):
            self._pack(layer)

    def _missing(self, loading: Loading) -> list[str]:
        return [
            f"{part}.{suffix}"
            for index, part in enumerate(self.parts)
            for suffix in self.config.tensors[part]
            if suffix not in loading.files.get(index, {})
        ]

    def _pack(self, layer: Any) -> None:
        loading: Loading = layer.qkernels_loading
        world, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        world, rank = (1, 0) if getattr(layer, "disable_tp", False) else (world, rank)
        with torch.device("cpu"), torch.inference_mode(False):
            weights = [self._weight(layer, index, loading, rank, world) for index in range(len(self.parts))]
            linears = [
                QuantLinear.from_quant_tensor(weight, None, loading.device, loading.dtype) for weight in joined(weights)
            ]
        for suffix in self.config.format.suffixes:
            delattr(layer, parameter_name(suffix))
        del layer.qkernels_loading
        layer.qkernels = nn.ModuleList(linears)
        layer.qweight = linears[0].qweight  # where LoRA looks for the device of a layer
        give_back()

    def _weight(self, layer: Any, index: int, loading: Loading, rank: int, world: int) -> QuantTensor:
        """The rank's share of a part."""
        name, config = self.parts[index], self.config
        in_files = config.spelled.get(name, name)
        parsed = config.format.parse(in_files, loading.files.pop(index), config.config)
        weight = as_it_runs(parsed, config.format, torch.device(loading.device), loading.dtype).weight
        here = loading.sizes if len(self.parts) == 1 else [loading.sizes[index]]
        try:
            if isinstance(layer, RowParallelLinear):
                weight = weight.shard("K", rank, world) if world > 1 else weight  # act-order cannot even be cut in one
            elif len(here) > 1:  # merged in the file: each of its parts is cut for itself
                copies = [replicas(layer, i) for i in range(len(here))]
                whole = [size * world // count for size, count in zip(here, copies, strict=True)]
                pieces = rows_of(weight, whole)
                cut = [p.shard("N", rank // c, world // c) for p, c in zip(pieces, copies, strict=True)]
                weight = QuantTensor.concat(cut)
            elif isinstance(layer, ParallelLMHead) and world == 1:
                return weight  # vLLM pads the vocabulary, and takes as many logits as there are tokens
            else:
                copies_of_it = replicas(layer, index)
                weight = weight.shard("N", rank // copies_of_it, world // copies_of_it)
        except ArgumentError as error:
            raise ArgumentError(f"{name} over {world} ranks: {error}") from None
        if sum(here) != weight.N:
            raise CheckpointError(f"{name}: rank {rank} of {world} needs {sum(here)} rows, got {weight.N}")
        return weight

    def process_weights_after_loading(self, layer: Any) -> None:
        """Everything was packed while it came.

        Raises:
            CheckpointError: tensors have not come (`--load-format dummy`, a tied head): names them.
        """
        loading: Loading | None = getattr(layer, "qkernels_loading", None)
        if loading is not None:
            missing = self._missing(loading)
            raise CheckpointError(
                f"{self.prefix}: not all of its tensors were loaded, {len(missing)} are missing, first {missing[0]}"
            )

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """A quantized head is not tied, whatever the config says."""
        return layer

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x `[..., K]` -> `[..., N]`."""
        linears = layer.qkernels
        if len(linears) == 1:
            y: Tensor = linears[0](x) if bias is None else linears[0].product(x, bias)
            return y
        biases = [None] * len(linears) if bias is None else bias.split([linear.out_features for linear in linears])
        parts = zip(linears, biases, strict=True)
        return torch.cat([linear(x) if b is None else linear.product(x, b) for linear, b in parts], -1)


def replicas(layer: Any, index: int) -> int:
    """How many ranks hold the same rows of a part: keys and values where there are fewer heads than ranks."""
    return int(getattr(layer, "num_kv_head_replicas", 1)) if index else 1


@lru_cache(maxsize=1)
def register() -> None:
    """The entry point: called in every process of vLLM, perhaps more than once."""
    register_quantization_config(NAME)(VllmConfig)
    refuse_gguf_files()


def refuse_gguf_files() -> None:
    """vLLM asks a plug-in only after it has read config.json, for which it takes the file itself ("not a valid JSON file"). So a
    GGUF file is refused where an engine is about to be made, unless another plug-in reads such files and we are not asked."""
    made = EngineArgs.create_engine_config

    @wraps(made)
    def create(self: Any, *args: Any, **settings: Any) -> Any:
        named = str(self.model).lower().endswith(".gguf")
        if named and (self.quantization == NAME or "gguf" not in QUANTIZATION_METHODS):
            raise ArgumentError(f"{self.model}: {NO_GGUF}")
        return made(self, *args, **settings)

    EngineArgs.create_engine_config = create

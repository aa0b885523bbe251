"""vLLM: the routed experts of a layer on our grouped kernels, cut over ranks by rows and columns or by experts.

vLLM hands a layer's experts all tensors that stream by under its name. They are collected under the names of the file, whatever
the format, one by one or stacked; with the last of them the layer is packed. Routing, shared experts and the sum over ranks stay
vLLM's. Written for vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from ..checkpoint.activations import as_it_runs
from ..errors import ArgumentError, CheckpointError, UnsupportedProblem
from ..formats import Format, Parsed
from ..formats.stacks import parsed_experts
from ..memory import give_back
from ..models.experts import PARTS, ExpertsForm, part_of
from ..nn import QuantStack
from ..nn.experts import OrdersDiffer
from ..ops import grouped
from ..tensor import QuantTensor
from .vllm_weights import owner_of, parameter_name, rows_of

# What vLLM calls what lies between the two products, and what `ops.grouped` calls it.
ACTIVATIONS: Final = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "relu2_no_mul": "relu2_ungated",
    "silu_no_mul": "silu_ungated",
    "gelu_no_mul": "gelu_ungated",
}
_ALL: Final = -1  # gate and up of an expert in one matrix
Places = dict[tuple[int, int], str] | str  # names of matrices by (expert, part), or the name of a stack


@dataclass(frozen=True)
class Asked:
    """What a checkpoint has under the name of a layer's experts.

    Args:
        prefix: the name.
        tensors: module -> suffixes of its tensors.
        in_files: module -> its name in the files.
    """

    format: Format
    config: Mapping[str, Any]
    prefix: str
    tensors: Mapping[str, tuple[str, ...]]
    in_files: Mapping[str, str]


def _names(places: Places, here: Sequence[int]) -> list[str]:
    """The modules that make up a projection of these experts."""
    return [places] if isinstance(places, str) else [name for (expert, _), name in places.items() if expert in here]


@dataclass
class Loading:
    """Experts whose tensors are still coming: by module, by suffix.

    Args:
        form: of all experts, uncut.
        here: the experts of this rank, in their order.
        wanted: module -> suffixes, of what this rank needs: vLLM does not even read others' experts where files have them apart.
    """

    form: ExpertsForm
    here: list[int]
    wanted: Mapping[str, tuple[str, ...]]
    dtype: torch.dtype
    device: torch.device
    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class VllmExpertsMethod(FusedMoEMethodBase):
    """Loads and computes the routed experts of one layer of vLLM.

    Raises:
        CheckpointError: the layer computes what our ops do not, or its experts have biases, or are not all quantized.
    """

    def __init__(self, moe: Any, asked: Asked) -> None:
        super().__init__(moe)
        self.asked = asked

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size_per_partition: int, *_: Any) -> tuple[int, int]:
        """Nothing is padded."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """For kernels of vLLM, which are not asked."""

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """What collects the tensors: `layer.load_weights`, or where vLLM's class of the model loads by itself (DeepSeek) empty
        parameters under the names that it then asks for."""
        self._check(layer)
        gated = layer.activation.value in ("silu", "gelu", "gelu_tanh")
        width = intermediate_size_per_partition * layer.moe_config.moe_parallel_config.tp_size
        form = ExpertsForm("gate_up_proj" if gated else "up_proj", layer.global_num_experts, hidden_size, width)
        device = torch.empty(0).device  # vLLM builds models inside of `torch.device(...)`
        members = self._members(form)
        places = [e if layer.expert_map is None else int(layer.expert_map[e]) for e in range(form.experts)]
        here = sorted((e for e in range(form.experts) if places[e] >= 0), key=places.__getitem__)
        wanted = {name: self.asked.tensors[name] for places in members.values() for name in _names(places, here)}
        layer.qkernels_loading = Loading(form, here, wanted, params_dtype, device)
        layer.load_weights = partial(self._load, layer)
        for name in self._holes():
            hole = nn.Parameter(torch.empty(0), requires_grad=False)
            hole.weight_loader = partial(self._collect_part, layer, members, name.partition("_")[2])  # type: ignore[attr-defined]
            layer.register_parameter(name, hole)

    def _holes(self) -> list[str]:
        return [f"{both}_{parameter_name(suffix)}" for both in ("w13", "w2") for suffix in self.asked.format.suffixes]

    def _check(self, layer: Any) -> None:
        asked = {
            f"activation {layer.activation.value!r}": layer.activation.value not in ACTIVATIONS,
            "a limit of the activation": layer.swiglu_limit is not None,
            "biases of experts": layer.moe_config.has_bias,
            "routing weights on the input": layer.apply_router_weight_on_input,
            "a file whose rows of gate and up take turns": self.asked.format.rows_as_stored,
        }
        if wanted := [what for what, is_asked in asked.items() if is_asked]:
            raise CheckpointError(
                f"{self.asked.prefix}: not served through vLLM yet: {', '.join(wanted)}; run this checkpoint with "
                "`qkernels serve`"
            )

    def _members(self, form: ExpertsForm) -> dict[str, Places]:
        """Of each projection: its stack's name, or the names of its matrices by (expert, part). What a module is tells its name
        in the files: vLLM may have renamed it (Mixtral's down_proj is w2 there).

        Raises:
            CheckpointError: a name that is none of these; some are quantized and others are not.
        """
        prefix = self.asked.prefix
        found: dict[str, Places] = {}
        for name, spelled in self.asked.in_files.items():
            above, _, projection = spelled.rpartition(".")
            if projection in (form.up, form.down) and not above.rpartition(".")[2].isdecimal():
                found[projection] = name
                continue
            place = part_of(spelled, {above.rpartition(".")[0]: form})
            members = found.setdefault("" if place is None else place[0].rpartition(".")[2], {})
            if place is None or isinstance(members, str) or place[1] >= form.experts:
                raise CheckpointError(f"{spelled}: quantized, and no part of experts that are known here")
            members[place[1:]] = name
        for projection in (form.up, form.down):
            members = found.get(projection, {})
            parts = range(len(PARTS[projection]))
            if isinstance(members, dict) and (0, _ALL) in members:
                parts = range(_ALL, 0)
            wanted = {(expert, part) for expert in range(form.experts) for part in parts}
            if isinstance(members, dict) and members.keys() != wanted:
                raise CheckpointError(
                    f"{prefix}: vLLM computes all experts of a layer as one, but {len(members)} of {len(wanted)} matrices of "
                    f"{projection} are quantized; quantize all of them or none"
                )
        return found

    def _load(self, layer: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """The place of `RoutedExperts.load_weights`: takes (name below the layer, tensor)."""
        for name, tensor in weights:
            owner = owner_of(f"{self.asked.prefix}.{name}", self.asked.format)
            if owner is None and not tensor.numel():
                yield name  # what stands for the parameter where this library is not there
                continue
            if owner is None or owner[1] not in self.asked.tensors.get(owner[0], ()):
                raise CheckpointError(f"{self.asked.prefix}.{name}: a tensor of experts that no header lists")
            self._collect(layer, *owner, tensor)
            yield name

    def _collect(self, layer: Any, module: str, suffix: str, tensor: Tensor) -> None:
        loading: Loading | None = getattr(layer, "qkernels_loading", None)
        if loading is None or module not in loading.wanted:
            return  # of an expert of another rank
        loading.files.setdefault(module, {})[suffix] = tensor.detach().cpu().clone()  # its memory may be used again
        if not self._missing(loading):
            self._pack(layer)

    def _collect_part(
        self, layer: Any, members: dict[str, Places], spelled: str, param: Any, loaded_weight: Tensor, weight_name: str = "",
        shard_id: str = "", expert_id: int = 0, return_success: bool = False,
    ) -> bool | None:  # fmt: skip
        """What a parameter's loader is called with: a tensor of gate (w1), up (w3) or down (w2) of one expert."""
        suffix = next(s for s in self.asked.format.suffixes if parameter_name(s) == spelled)
        (up,) = members.keys() - {"down_proj"}
        places = members["down_proj" if shard_id == "w2" else up]
        module = None if isinstance(places, str) else places.get((expert_id, 1 if shard_id == "w3" else 0))
        if module is None or suffix not in self.asked.tensors[module]:
            raise CheckpointError(
                f"{self.asked.prefix}: {weight_name}, {shard_id} of expert {expert_id}, is in no header"
            )
        self._collect(layer, module, suffix, loaded_weight)
        return True if return_success else None

    def _missing(self, loading: Loading) -> list[str]:
        wanted = loading.wanted.items()
        return [f"{m}.{s}" for m, suffixes in wanted for s in suffixes if s not in loading.files.get(m, {})]

    def _pack(self, layer: Any) -> None:
        loading: Loading = layer.qkernels_loading
        members = self._members(loading.form)
        with torch.device("cpu"), torch.inference_mode(False):
            stacks = [
                self._stack(layer, loading, projection, members[projection], loading.here)
                for projection in (loading.form.up, loading.form.down)
            ]
        for name in self._holes():
            delattr(layer, name)
        del layer.qkernels_loading, layer.load_weights
        layer.qkernels_up, layer.qkernels_down = stacks
        give_back()

    def _stack(self, layer: Any, loading: Loading, projection: str, members: Places, here: list[int]) -> QuantStack:
        """One projection of the experts of this rank."""
        parallel, prefix = layer.moe_config.moe_parallel_config, self.asked.prefix
        rank, world = parallel.tp_rank, parallel.tp_size
        N, K = loading.form.shape(projection)
        shape = [N // world, K] if projection == loading.form.up else [N, K // world]

        def weights() -> Iterator[QuantTensor]:
            for whole in self._whole(loading, members, here):
                if projection == loading.form.down:
                    weight = (
                        whole[0].shard("K", rank, world) if world > 1 else whole[0]
                    )  # act-order cannot even be cut in one
                else:
                    parts = (
                        whole if world == 1 or len(whole) == len(PARTS[projection]) else rows_of(whole[0], [N // 2] * 2)
                    )
                    weight = QuantTensor.concat([part.shard("N", rank, world) for part in parts])
                if shape != [weight.N, weight.K]:
                    raise CheckpointError(f"an expert needs {shape}, got {[weight.N, weight.K]}")
                found = as_it_runs(Parsed(weight), self.asked.format, loading.device, loading.dtype, "raise", len(here))
                yield found.weight

        try:
            try:
                return QuantStack.of(weights(), len(here), None, loading.device, loading.dtype)
            except OrdersDiffer:
                return QuantStack.of(weights(), len(here), None, loading.device, loading.dtype, own_orders=True)
        except UnsupportedProblem as error:
            raise UnsupportedProblem(f"{prefix}.{projection}: {error}") from None
        except (ArgumentError, CheckpointError) as error:
            over = f" over {world} ranks" if world > 1 else ""
            raise CheckpointError(f"{prefix}.{projection}{over}: {error}") from error

    def _whole(self, loading: Loading, members: Places, here: list[int]) -> Iterator[list[QuantTensor]]:
        """The uncut matrices of this rank's experts, one expert after the other: gate and up, or one."""
        found, config, spelled = self.asked.format, self.asked.config, self.asked.in_files
        if isinstance(members, str):
            tensors, chosen = loading.files[members], set(here)
            if found.sliced:
                each = parsed_experts(found, spelled[members], tensors, config)
                yield from ([parsed.weight] for expert, parsed in enumerate(each) if expert in chosen)
                return
            whole = found.parse(spelled[members], tensors, config).weight
            if whole.codes.dim() != 3 or whole.codes.shape[0] != loading.form.experts:
                raise CheckpointError(
                    f"{loading.form.experts} stacked experts are needed, got {list(whole.codes.shape)}"
                )
            yield from ([whole[expert]] for expert in here)
            return
        for expert in here:
            names = [name for (of, _), name in sorted(members.items()) if of == expert]
            yield [found.parse(spelled[name], loading.files[name], config).weight for name in names]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Everything was packed while it came.

        Raises:
            CheckpointError: tensors have not come, or vLLM's class of this model loads experts in a way of its own: names them.
        """
        loading: Loading | None = getattr(layer, "qkernels_loading", None)
        if loading is not None:
            missing = self._missing(loading)
            raise CheckpointError(
                f"{self.asked.prefix}: not all of its tensors were loaded, {len(missing)} are missing, first {missing[0]}"
            )

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x `[T, H]`, weights and ids `[T, k]` -> `[T, H]`: what this rank's experts, or its part of each, add."""
        if layer.expert_map is not None:  # experts of other ranks have -1, and add nothing
            known = topk_ids >= 0
            topk_ids = torch.where(known, layer.expert_map[topk_ids.clamp(min=0).long()], -1)
        up, down = layer.qkernels_up, layer.qkernels_down
        name = ACTIVATIONS[layer.activation.value]
        stacks = (up.as_argument(), down.as_argument())
        if up.layout == down.layout:
            return grouped.experts(up.layout, x, topk_ids, topk_weights, *stacks, name)
        return grouped.block(
            (up.layout, down.layout), x, topk_ids, topk_weights, *stacks, partial(grouped.activate, name)
        )

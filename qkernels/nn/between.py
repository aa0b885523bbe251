"""Modules of a `transformers` model that do on the CPU in one op what they do in many: norms, gated MLPs, attention of one token.

A decode step of a quantized model spends a third of its time between its products (docs/cpu-decode.md). `fuse` gives modules a
subclass of their own class, of the same name, with the same parameters and children; wherever the op would not compute the same
(gradients, another device, compiled, autocast, more than one token in attention) the subclass calls its parent. Which modules
compute what the ops do is found by running small copies of them, not by their names.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from ..extension import status
from ..ops import transforms_are_active
from ..ops.between import LANES, MOST_HEAD, attended, gated, rms_norm, rotated
from ..tensor import FLOAT_DTYPES

_EPSILONS: Final = ("variance_epsilon", "eps", "epsilon")
_WIDTH: Final = 2 * LANES  # of the small copies


def fuse(model: nn.Module) -> dict[str, int]:
    """Let modules compute through `ops.between` where that gives the same up to the last bit of a rounding.

    Returns:
        How many modules of which class do so now; none where the extension is not there.
    """
    found: Counter[str] = Counter()
    if not status().loaded:
        return found
    known: dict[Any, dict[str, Any] | None] = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(0)
        for module in [*model.modules()]:
            if isinstance(module, _Fused):
                continue
            for kind in _KINDS:
                key = (kind, type(module), kind.key(module))
                if key not in known:
                    known[key] = _tried(kind, module)
                told = known[key]
                if told is not None:
                    module.__dict__.update(told)
                    module.__class__ = fused_class(kind, type(module))
                    found[type(module).__name__] += 1
                    break
    return dict(found)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small copies are no work for two: where the system has both threads of a first parallel region on one core, each of their
    products takes 16 ms until it moves one (0.35 s of loading a model)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`."""
    for module in model.modules():
        if isinstance(module, _Fused):
            object.__setattr__(module, "__class__", type(module)._source)


class _Fused(nn.Module):
    """What the subclasses have in common."""

    _kind: type[_Fused]
    _source: type[nn.Module]

    @staticmethod
    def key(module: nn.Module) -> Any:
        """What tells modules of one class apart; None: such a module is not asked."""
        raise NotImplementedError

    @staticmethod
    def probe(module: Any, run: Callable[..., Any]) -> dict[str, Any] | None:
        """What a module has to be told to compute the same, found by running small copies of it."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (self._kind, self._source), self.__dict__


def fused_class(kind: type[_Fused], source: type[nn.Module]) -> Any:
    """The subclass of a module's class; made once, so that copies of a module have the same."""
    key = (kind, source)
    if key not in _CLASSES:
        names = {"_kind": kind, "_source": source, "__module__": source.__module__, "__qualname__": source.__qualname__}
        _CLASSES[key] = type(source.__name__, key, names)
    return _CLASSES[key]


_CLASSES: Final[dict[tuple[type, type], type]] = {}


def _restored(kind: type[_Fused], source: type[nn.Module]) -> Any:
    made = fused_class(kind, source)
    return made.__new__(made)


def _tried(kind: type[_Fused], module: nn.Module) -> dict[str, Any] | None:
    """`kind.probe`, None for modules that are something else."""
    if kind.key(module) is None:
        return None
    try:
        return kind.probe(module, type(module).forward)
    except Exception:  # other people's modules on inputs that they were not made for
        return None


def _takes(x: Tensor) -> bool:
    """Whether an op may stand for PyTorch's operators on this input."""
    return (
        type(x) is Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in FLOAT_DTYPES
        and not torch.is_autocast_enabled("cpu")
        and not transforms_are_active()
    )


def _takes_rows(x: Tensor) -> bool:
    """The same of norms and gates. Prompts in float32, which is for exact comparisons, keep the bits of PyTorch's operators; 16
    bits swallow the order of a sum but for a value in a thousand."""
    return _takes(x) and (x.dtype != torch.float32 or x.numel() == x.shape[-1])


def _copy_of(module: Any, **children: Any) -> Any:
    """A module that shares nothing which is set on it, with other children or parameters."""
    probe = copy.copy(module)
    for name in ("_modules", "_parameters"):
        probe.__dict__[name] = dict(module.__dict__[name])
    for name, child in children.items():
        probe._modules.pop(name, None)
        probe._parameters.pop(name, None)
        probe.__dict__["_parameters" if isinstance(child, nn.Parameter) else "_modules"][name] = child
    return probe


def _near(found: Tensor, expected: Tensor) -> bool:
    """Equal but for the order of sums in fp32."""
    same = found.shape == expected.shape and found.dtype == expected.dtype
    return same and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def _holds_all(past: Any) -> bool:
    """Whether a cache answers with keys and values of the sequences before it: that of continuous batching has pages of many."""
    from transformers.cache_utils import Cache

    return isinstance(past, Cache)


def _small(N: int, K: int) -> nn.Linear:
    return nn.Linear(K, N, bias=False, dtype=torch.float32)


class _Norm(_Fused):
    """RMSNorm as Llama has it, or Gemma."""

    weight: Tensor
    _epsilon: float
    _one_added: bool

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        weight = self._parameters.get("weight")
        if others or named or weight is None or not _takes_rows(x) or weight.dtype != x.dtype:
            return cast(Tensor, super().forward(x, *others, **named))
        return rms_norm(x, weight, self._epsilon, self._one_added)

    @staticmethod
    def key(module: nn.Module) -> Any:
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 1 or module._modules or len(module._parameters) > 1 or len(weight) % LANES:
            return None
        return next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)

    @staticmethod
    def probe(module: Any, run: Callable[..., Any]) -> dict[str, Any] | None:
        epsilon = float(_Norm.key(module))
        weight, x = torch.randn(_WIDTH), torch.randn(3, _WIDTH)
        small = _copy_of(module, weight=nn.Parameter(weight, requires_grad=False))
        low = _copy_of(module, weight=nn.Parameter(weight.bfloat16(), requires_grad=False))
        for one_added in (False, True):
            # Of small numbers, where epsilon counts; and in bf16, where roundings do.
            near = all(_near(rms_norm(v, weight, epsilon, one_added), run(small, v)) for v in (x, x * epsilon**0.5))
            again = rms_norm(x.bfloat16(), weight.bfloat16(), epsilon, one_added)
            if near and torch.equal(again, run(low, x.bfloat16())):
                return {"_epsilon": epsilon, "_one_added": one_added}
        return None


class _Gated(_Fused):
    """`down(act(gate(x)) * up(x))` with silu or gelu by tanh."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    _gelu: bool

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Any:
        if others or named or not _takes_rows(x):
            return super().forward(x, *others, **named)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if type(gate) is type(up) is Tensor and gate.dtype == up.dtype and gate.shape[-1] % LANES == 0:
            return self.down_proj(gated(gate, up, self._gelu))
        return super().forward(x)

    @staticmethod
    def key(module: nn.Module) -> Any:
        there = module._modules.keys()
        return repr(module._modules.get("act_fn")) if there >= {"gate_proj", "up_proj", "down_proj"} else None

    @staticmethod
    def probe(module: Any, run: Callable[..., Any]) -> dict[str, Any] | None:
        linears = {"gate_proj": _small(48, _WIDTH), "up_proj": _small(48, _WIDTH), "down_proj": _small(_WIDTH, 48)}
        small, x = _copy_of(module, **linears), 4 * torch.randn(2, 3, _WIDTH)
        expected = run(small, x)
        for gelu in (False, True):
            gate, up = linears["gate_proj"](x), linears["up_proj"](x)
            if _near(linears["down_proj"](gated(gate, up, gelu)), expected):
                return {"_gelu": gelu}
        return None


class _Attention(_Fused):
    """Attention of one token over a cache, with rotary positions, through PyTorch's `sdpa`."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    config: Any
    head_dim: int
    layer_idx: int
    scaling: float
    _norms: bool

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Tensor | None = None, **named: Any
    ) -> Any:
        past = named.get("cache")
        if past is None:
            past = named.get("past_key_values")
        x, turn, mask = hidden_states, position_embeddings, attention_mask
        if x.dim() != 3 or x.shape[1] != 1 or not _takes(x) or not _holds_all(past) or self._differs(x, turn, mask):
            return super().forward(hidden_states, position_embeddings, attention_mask, **named)
        return self._one_token(x, turn, mask, past), None

    def _differs(self, x: Tensor, turn: Any, mask: Tensor | None) -> bool:
        """Whether something was asked for that `_one_token` does not do."""
        cos, sin = turn
        shapes = cos.shape == sin.shape == (cos.shape[0], 1, self.head_dim) and cos.shape[0] in (1, x.shape[0])
        seen = mask is None or (
            mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1 and mask.dtype in (torch.bool, *FLOAT_DTYPES)
        )
        plain = cos.dtype == sin.dtype == x.dtype and cos.is_contiguous() and sin.is_contiguous()
        return not (shapes and seen and plain and self.config._attn_implementation == "sdpa") or self.training

    def _one_token(self, x: Tensor, turn: Any, mask: Tensor | None, past: Any) -> Any:
        B, D = x.shape[0], self.head_dim
        q, k, v = (linear(x).view(B, 1, -1, D) for linear in (self.q_proj, self.k_proj, self.v_proj))
        if self._norms:
            q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[operator]
        cos, sin = turn
        q, k = (rotated(t.transpose(1, 2), cos, sin) for t in (q, k))
        keys, values = past.update(k, v.transpose(1, 2), self.layer_idx)
        seen = None if mask is None else mask.view(mask.shape[0], -1)[:, : keys.shape[2]].contiguous()
        y = attended(q, keys, values, seen, self.scaling)
        return self.o_proj(y.view(B, 1, -1))

    @staticmethod
    def key(module: nn.Module) -> Any:
        D, names = getattr(module, "head_dim", None), {"q_proj", "k_proj", "v_proj", "o_proj"}
        others = module._modules.keys() - names
        told = all(hasattr(module, n) for n in ("config", "layer_idx", "scaling", "num_key_value_groups"))
        if (
            not isinstance(D, int)
            or D % (2 * LANES)
            or D > MOST_HEAD
            or not told
            or not module._modules.keys() >= names
        ):
            return None
        if any(module._modules[name] is not None for name in others - {"q_norm", "k_norm"}):
            return None
        return (D, module.scaling, "q_norm" in others, getattr(module, "sliding_window", None))

    @staticmethod
    def probe(module: Any, run: Callable[..., Any]) -> dict[str, Any] | None:
        from transformers import DynamicCache

        D, heads = module.head_dim, 2 * module.num_key_value_groups
        small: dict[str, nn.Module] = {
            "q_proj": _small(heads * D, _WIDTH), "k_proj": _small(2 * D, _WIDTH), "v_proj": _small(2 * D, _WIDTH),
            "o_proj": _small(_WIDTH, heads * D),
        }  # fmt: skip
        norms = "q_norm" in module._modules
        if norms:
            for name in ("q_norm", "k_norm"):
                norm = module._modules[name]
                small[name] = _copy_of(norm, weight=nn.Parameter(torch.randn(D), requires_grad=False))
        probe = _copy_of(module, **small)
        probe.__dict__["training"] = False
        x, before = torch.randn(2, 1, _WIDTH), torch.randn(2, 2, 2, 5, D)
        angles = torch.randn(1, 1, D // 2).repeat(1, 1, 2)
        turn, found = (angles.cos(), angles.sin()), []
        fused = copy.copy(probe)
        fused.__dict__["_norms"] = norms
        fused.__class__ = fused_class(_Attention, type(module))
        for mask in (None, torch.rand(2, 1, 1, 6) > 0.5):
            caches = DynamicCache(), DynamicCache()
            for past in caches:
                for layer in range(module.layer_idx + 1):
                    past.update(*before.clone(), layer)
            named = {"cache" if "cache" in inspect.signature(run).parameters else "past_key_values": caches[0]}
            expected, *_ = run(probe, x, position_embeddings=turn, attention_mask=mask, **named)
            found.append(_near(fused._one_token(x, turn, mask, caches[1]), expected))
        return {"_norms": norms} if all(found) else None


_KINDS: Final[tuple[type[_Fused], ...]] = (_Norm, _Gated, _Attention)

"""Which linear layers are quantized, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..errors import ArgumentError, UnsupportedProblem
from ..kernels.catalogue import OnUnsupported
from ..models.linears import linear_of
from ..nn import QuantLinear, ReplaceReport
from ..nn.replace import as_patterns, check_patterns, choose_layers, matches
from ..quantizers import Options
from ..scheme import QuantScheme

Patterns = Iterable[str] | str | None
Overrides = Mapping[str, QuantScheme | str] | None


def select_layers(
    model: nn.Module, method: Options, include: Patterns, exclude: Patterns, overrides: Overrides
) -> tuple[dict[str, Options], dict[str, str]]:
    """The method for each linear layer by name, and the reason for each that is left as it is.

    Raises:
        SchemeError: an override is not a scheme.
        ArgumentError: a pattern matches no layer, or no layer is chosen.
    """
    rules = {pattern: method.with_scheme(scheme) for pattern, scheme in (overrides or {}).items()}
    wanted = as_patterns(include)
    report = ReplaceReport()
    chosen = choose_layers(model, wanted, as_patterns(exclude) or (), report)
    check_patterns([*(wanted or ()), *rules], [*chosen, *report.skipped])
    if not chosen:
        raise ArgumentError(f"there is no linear layer to quantize:\n{report}")
    methods = {name: next((m for p, m in rules.items() if matches(name, p)), method) for name in chosen}
    return methods, report.skipped


def check_kernels(
    model: nn.Module, methods: dict[str, Options], skipped: dict[str, str], on_unsupported: OnUnsupported
) -> None:
    """Ask the catalogue about every layer before the work begins; with "skip", layers without a kernel move to `skipped`.

    Raises:
        UnsupportedProblem: no kernel takes a layer; names it.
    """
    for name, method in list(methods.items()):
        try:
            QuantLinear.check_supported(
                linear_of(model, name), method.scheme, "raise" if on_unsupported == "skip" else on_unsupported
            )
        except UnsupportedProblem as error:
            if on_unsupported != "skip":
                raise UnsupportedProblem(f"{name}: {error}") from None
            skipped[name] = str(error)
            del methods[name]

"""The table of CPU targets: what counts as reached, short or unmeasured."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.kernels.cpu_targets import TARGETS, TOKENS, Target, targets_of, verdict
from benchmarks.method.results import Row
from qkernels.scheme import QuantScheme

TARGET = Target("w4a16_g128", ("a", "b"), (2.0, 1.0, 1.0, 1.0))
ROW = Row("m", "o", 64, 64, 1, "w4a16_g128", "bfloat16", "qkernels cpu.x", True, us=10.0)


def test_the_fastest_peer_counts() -> None:
    ours = replace(ROW, ratios={"a": [3.0, 2.9, 3.1], "b": [2.1, 2.05, 2.2], "c": [0.5, 0.4, 0.6]})
    assert verdict(TARGET, 2.0, [ours], {}) == ("2.10 [2.05, 2.20] b", "reached")
    assert verdict(TARGET, 2.5, [ours], {})[1] == "**short**"
    assert verdict(TARGET, 2.08, [ours], {})[1] == "reached, within noise"


def test_a_target_that_is_missed_says_what_it_would_read() -> None:
    ours = replace(ROW, ratios={"a": [2.0, 1.9, 2.1], "b": [2.4, 2.3, 2.5]}, read_percent=[80.0, 70.0, 90.0])
    assert verdict(TARGET, 3.0, [ours], {})[1] == "**short**, would read at 120 % of memory"
    assert verdict(TARGET, 2.0, [ours], {})[1] == "reached, within noise"


def test_what_has_no_number_is_unmeasured_with_its_reason() -> None:
    ours = replace(ROW, ratios={"a": [3.0, 2.9, 3.1]})
    assert verdict(TARGET, 2.0, [ours], {"b": "not installed"})[1] == "reached; unmeasured: b (not installed)"
    assert verdict(TARGET, 2.0, [replace(ours, ratios={})], {"a": "x", "b": "y"})[1] == "unmeasured: a (x); b (y)"
    assert verdict(TARGET, 2.0, [replace(ROW, us=None, reason="no kernel")], {})[1] == "unmeasured: no kernel"
    assert verdict(TARGET, 2.0, [], {"qkernels cpu.x": "no kernel"})[1] == "unmeasured: no kernel"


def test_every_target_is_a_scheme_and_has_a_factor_for_each_m() -> None:
    for target in (*TARGETS, *targets_of("avx2")):
        assert str(QuantScheme.parse(target.scheme)) == target.scheme
        assert len(target.factors) == len(TOKENS)

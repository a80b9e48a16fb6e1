"""Which module gets which format: patterns, first match, guards, fused groups, and SGLang's names for them."""

from dataclasses import replace
from pathlib import Path

import pytest

from convert_ckpt.plan.preset import FusedPattern, Preset, find_preset, load_preset, preset_names
from convert_ckpt.plan.recipe import (
    KEEP,
    Decision,
    FusedGroup,
    Rule,
    close_over_groups,
    decide,
    find_fused_groups,
    ignore_rules,
    keep_rules,
    read_recipe,
    unmatched_rules,
)
from convert_ckpt.plan.runtime_names import overmatched, runtime_names
from convert_ckpt.plan.shape_rules import linear_module, reason_not_linear
from run_ckpt.contract.decided_by import IGNORE, PRESET, RECIPE, DecidedBy
from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.formats import AITER_MXFP4, BLOCK_FP8, CHANNEL_FP8, PLAIN_MXFP4, TENSOR_FP8, Scheme
from run_ckpt.contract.module_names import split_name
from run_ckpt.contract.reading import NAME, PART
from run_ckpt.contract.shape_limits import reason_to_keep
from run_ckpt.contract.tensors import TensorSpec

QKV = FusedPattern(("*.to_q", "*.to_k", "*.to_v"))
KV = FusedPattern(("*.to_k", "*.to_v"))
MIXED = FusedPattern(("blocks.*.q", "blocks.*.k"), scale_name="blocks.*.qk")


def make_preset(*fused: FusedPattern) -> Preset:
    return replace(load_preset("generic"), fused=fused)


def linears(**widths: int) -> dict[str, TensorSpec]:
    """Linear modules by name (``__`` for a dot) with the given K."""
    names = {name.replace("__", "."): K for name, K in widths.items()}
    return {name: TensorSpec(f"{name}.weight", "BF16", (256, K)) for name, K in names.items()}


def weight(N: int, K: int, dtype: str = "BF16") -> TensorSpec:
    return TensorSpec("layer.weight", dtype, (N, K))


def formats(decisions: dict[str, Decision]) -> dict[str, str]:
    return {module: decision.format for module, decision in decisions.items()}


@pytest.mark.parametrize(
    ("pattern", "module", "matches"),
    [
        ("proj_out", "proj_out", True),
        ("proj_out", "blocks.0.proj_out", False),
        ("proj_out", "proj_out.0", False),
        ("*.proj_out", "blocks.0.proj_out", True),
        ("*.proj_out", "proj_out", False),
        ("blocks.*", "blocks.0.attn.to_q", True),
        ("blocks.*.to_q", "blocks.0.attn.to_q", True),
        ("*norm*", "blocks.0.norm1.linear", True),
        ("*", "anything.at.all", True),
        ("a.b", "axb", False),
        ("a[0]", "a0", False),
        ("a?", "ab", False),
        ("Proj", "proj", False),
    ],
)
def test_pattern_matches_the_whole_name_with_star_for_any_characters(pattern: str, module: str, matches: bool) -> None:
    assert Rule(pattern, KEEP, "why").matching([module]) == [module] * matches


@pytest.mark.parametrize(
    ("module", "matches"),
    [
        ("context_embedder.token_refiner.refiner_blocks.0.attn.to_q", False),
        ("context_embedder.layers.0.embed_in", True),
        ("image_embedder.ff.net.0.proj", True),
        ("context_embedder", True),
    ],
)
def test_what_a_stack_of_blocks_is_called_does_not_judge_its_layers(module: str, matches: bool) -> None:
    (rule,) = keep_rules({"*embed*": "why"}, in_block=True)
    assert rule.matching([module]) == [module] * matches


def test_first_rule_that_matches_decides() -> None:
    rules = [Rule("*.to_q", "fp8", "first"), Rule("blocks.0.*", KEEP, "second")]
    decisions = decide(["blocks.0.to_q", "blocks.0.to_k", "blocks.1.to_k"], rules, "mxfp4")
    assert formats(decisions) == {"blocks.0.to_q": "fp8", "blocks.0.to_k": KEEP, "blocks.1.to_k": "mxfp4"}


def test_decision_carries_the_reason_of_its_rule() -> None:
    assert decide(["a"], [Rule("a", KEEP, "it is fragile")], "fp8") == {
        "a": Decision(KEEP, "it is fragile", DecidedBy(PRESET, "a"))
    }


def test_ignore_rule_keeps_and_says_the_option() -> None:
    assert ignore_rules(["*.a"]) == [Rule("*.a", KEEP, "--ignore *.a", IGNORE)]


def test_pattern_of_the_user_that_matches_nothing_is_found() -> None:
    rules = ignore_rules(["*.a", "nothing.*", "a"])
    assert unmatched_rules(["x.a", "x.b"], rules) == ["nothing.*", "a"]


def test_pattern_hidden_by_an_earlier_one_counts_as_matched() -> None:
    assert unmatched_rules(["x.a"], ignore_rules(["*", "x.a"])) == []


def test_pattern_of_a_preset_may_match_nothing() -> None:
    assert unmatched_rules(["x"], keep_rules(load_preset("flux1").keep)) == []


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_keeps_by_a_reason(name: str) -> None:
    assert all(rule.format == KEEP and rule.reason for rule in keep_rules(load_preset(name).keep))


@pytest.mark.parametrize(
    ("class_name", "preset"),
    [
        ("ZImageTransformer2DModel", "z-image"),
        ("FluxTransformer2DModel", "flux1"),
        ("Flux2Transformer2DModel", "flux2"),
        ("QwenImageTransformer2DModel", "qwen-image"),
        ("WanTransformer3DModel", "wan"),
        ("HunyuanVideoTransformer3DModel", "hunyuan-video"),
        ("LTX2VideoTransformer3DModel", "ltx2"),
        ("LlamaForCausalLM", "dense-llm"),
        ("SomethingElse", "generic"),
        (None, "generic"),
    ],
)
def test_class_name_picks_its_preset(class_name: str | None, preset: str) -> None:
    assert find_preset(class_name).name == preset


@pytest.mark.parametrize(
    ("module", "embedding"),
    [("model.embed_tokens", True), ("wte", True), ("wte.proj", False), ("model.layers.0.mlp.up_proj", False)],
)
def test_embedding_table_is_matched_by_its_whole_name(module: str, embedding: bool) -> None:
    assert load_preset("dense-llm").is_embedding(module) == embedding


def test_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"nonesuch: unknown.*flux1.*z-image"):
        load_preset("nonesuch")


def write_recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_recipe_file_gives_base_preset_and_rules_in_order(tmp_path: Path) -> None:
    text = """
        preset = "flux1"
        [[rules]]
        match = "*.to_q"
        format = "fp8"
        reason = "queries are fragile"
        [[rules]]
        match = "*.to_k"
        format = "keep"
    """
    base, rules = read_recipe(write_recipe(tmp_path, text))
    assert base == "flux1"
    assert rules == [
        Rule("*.to_q", "fp8", "queries are fragile", RECIPE),
        Rule("*.to_k", KEEP, "recipe recipe.toml: *.to_k", RECIPE),
    ]


def test_recipe_file_may_be_empty(tmp_path: Path) -> None:
    assert read_recipe(write_recipe(tmp_path, "")) == (None, [])


RECIPE_FAULTS = {
    "not-toml": ("rules = [", "not a readable TOML file"),
    "unknown-key": ('presets = "flux1"', r"unknown keys \['presets'\]. Known keys: \['preset', 'rules'\]"),
    "unknown-rule-key": (
        '[[rules]]\nmatch = "a"\nformat = "fp8"\n[[rules]]\npattern = "b"\nformat = "fp8"',
        r"rule 2: unknown keys \['pattern'\]",
    ),
    "no-match": ('[[rules]]\nformat = "fp8"', 'rule 1: needs match = "PATTERN"'),
    "match-not-text": ('[[rules]]\nmatch = 1\nformat = "fp8"', 'rule 1: needs match = "PATTERN"'),
    "no-format": ('[[rules]]\nmatch = "a"', "rule 1: needs match"),
    "unknown-format": ('[[rules]]\nmatch = "a"\nformat = "int8"', "rule 1: needs match"),
    "rules-not-a-list": ("rules = 3", "rules"),
    "rules-one-table": ('[rules]\nmatch = "a"\nformat = "fp8"', r"\[\[rules\]\]"),
    "rules-of-text": ('rules = ["a"]', r"\[\[rules\]\]"),
    "reason-not-text": ('[[rules]]\nmatch = "a"\nformat = "fp8"\nreason = 3', "rule 1: .*reason"),
    "preset-not-text": ('preset = ["flux1"]', "preset"),
}


# `[rules]` for `[[rules]]` is TOML's most common slip, so the message must say the right spelling.
@pytest.mark.parametrize(("text", "says"), RECIPE_FAULTS.values(), ids=RECIPE_FAULTS)
def test_wrong_recipe_file_is_refused_with_its_name_and_the_fault(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"recipe\.toml: .*{says}"):
        read_recipe(write_recipe(tmp_path, text))


def test_recipe_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"recipe\.toml: not a readable TOML file"):
        read_recipe(tmp_path / "recipe.toml")


@pytest.mark.parametrize(
    ("scheme", "spec", "naming", "reason"),
    [
        (AITER_MXFP4, weight(255, 256), "diffusers", "N = 255 is under 256"),
        (AITER_MXFP4, weight(16, 16), "diffusers", "N = 16 is under 256"),
        (AITER_MXFP4, weight(272, 256), "diffusers", "N = 272 is not a multiple of 32"),
        (AITER_MXFP4, weight(256, 320), "diffusers", "K = 320 is not a multiple of 256 (see --allow-unaligned-k)"),
        (AITER_MXFP4, weight(256, 288), "diffusers", "K = 288 is not a multiple of 256"),
        (PLAIN_MXFP4, weight(256, 48), "diffusers", "K = 48 is not a multiple of 32"),
        (PLAIN_MXFP4, weight(128, 256), "transformers", "N = 128 is under 256"),
        (AITER_MXFP4, weight(256, 256, "F64"), "diffusers", "dtype F64 is not quantized"),
        (AITER_MXFP4, weight(256, 256, "I8"), "diffusers", "dtype I8 is not quantized"),
        (TENSOR_FP8, weight(8, 256), "diffusers", "N = 8 is not a multiple of 16"),
        (CHANNEL_FP8, weight(256, 100), "diffusers", "K = 100 is not a multiple of 16"),
        (BLOCK_FP8, weight(256, 200), "diffusers", "K = 200 is not a multiple of 16"),
        (BLOCK_FP8, weight(320, 256), "transformers", "N = 320 is not a multiple of 128"),
        (BLOCK_FP8, weight(256, 320), "transformers", "K = 320 is not a multiple of 128"),
        (TENSOR_FP8, weight(256, 256, "F64"), "diffusers", "dtype F64 is not quantized"),
    ],
    ids=lambda value: str(value) if isinstance(value, Scheme | str) else f"{value.shape[0]}x{value.shape[1]}",
)
def test_guard_keeps_a_shape_and_says_why(scheme: Scheme, spec: TensorSpec, naming: str, reason: str) -> None:
    assert reason_to_keep(spec, scheme, naming, allow_unaligned_k=False) == reason


@pytest.mark.parametrize(
    ("scheme", "spec", "naming"),
    [
        (AITER_MXFP4, weight(256, 256), "diffusers"),
        (AITER_MXFP4, weight(288, 512, "F16"), "diffusers"),
        (AITER_MXFP4, weight(288, 512, "F32"), "diffusers"),
        (PLAIN_MXFP4, weight(256, 32), "transformers"),
        (TENSOR_FP8, weight(16, 16), "transformers"),
        (BLOCK_FP8, weight(144, 272), "diffusers"),
        (BLOCK_FP8, weight(128, 384), "transformers"),
    ],
    ids=lambda value: str(value) if isinstance(value, Scheme | str) else f"{value.dtype}-{value.shape}",
)
def test_guard_lets_a_shape_pass(scheme: Scheme, spec: TensorSpec, naming: str) -> None:
    assert reason_to_keep(spec, scheme, naming, allow_unaligned_k=False) is None


@pytest.mark.parametrize(("K", "reason"), [(320, None), (288, "K = 288 is not a multiple of 64")])
def test_unaligned_k_is_allowed_in_steps_of_64(K: int, reason: str | None) -> None:
    assert reason_to_keep(weight(256, K), AITER_MXFP4, "diffusers", allow_unaligned_k=True) == reason


@pytest.mark.parametrize(
    ("name", "shape", "module"),
    [
        ("blocks.0.to_q.weight", (4, 8), "blocks.0.to_q"),
        ("blocks.0.to_q.bias", (4,), None),
        ("blocks.0.to_q.bias", (4, 8), None),
        ("conv.weight", (4, 8, 3, 3), None),
        ("norm.weight", (4,), None),
        ("empty.weight", (0, 8), None),
        ("pos_weight", (4, 8), None),
    ],
)
def test_linear_is_a_two_dimensional_weight(name: str, shape: tuple[int, ...], module: str | None) -> None:
    assert linear_module(TensorSpec(name, "BF16", shape)) == module


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [("a.bias", (4,), "not a weight"), ("conv.weight", (4, 8, 3), "not a linear weight (3-D)")],
)
def test_tensor_that_is_no_linear_says_why(name: str, shape: tuple[int, ...], reason: str) -> None:
    assert reason_not_linear(TensorSpec(name, "BF16", shape)) == reason


@pytest.mark.parametrize(
    ("module", "numbered"),
    [("layers.3.mlp.up", True), ("0.up", True), ("layers.3", False), ("x_embedder", False), ("w13.a", False)],
)
def test_numbered_block_is_a_dotted_part_of_digits(module: str, numbered: bool) -> None:
    assert (split_name(module)[1] is not None) == numbered


def test_fused_group_takes_the_same_block_in_every_member() -> None:
    found = find_fused_groups(linears(b__0__to_q=64, b__0__to_k=64, b__1__to_q=64, b__1__to_k=64), make_preset(QKV))
    assert [group.members for group in found] == [("b.0.to_q", "b.0.to_k"), ("b.1.to_q", "b.1.to_k")]


def test_fused_group_is_named_after_the_fused_module() -> None:
    found = find_fused_groups(linears(blocks__7__q=64, blocks__7__k=64), make_preset(MIXED))
    assert [group.name for group in found] == ["blocks.7.qk"]


def test_one_member_alone_is_no_group() -> None:
    assert find_fused_groups(linears(b__0__to_q=64), make_preset(QKV)) == []


def test_members_that_differ_in_k_are_no_group() -> None:
    assert find_fused_groups(linears(b__0__to_q=64, b__0__to_k=32, b__0__to_v=32), make_preset(QKV)) == []


def test_later_pattern_takes_what_an_earlier_one_could_not() -> None:
    found = find_fused_groups(linears(b__0__to_q=64, b__0__to_k=32, b__0__to_v=32), make_preset(QKV, KV))
    assert [group.members for group in found] == [("b.0.to_k", "b.0.to_v")]


def test_module_is_in_one_group_at_most() -> None:
    found = find_fused_groups(linears(b__0__to_q=64, b__0__to_k=64, b__0__to_v=64), make_preset(QKV, KV))
    assert [group.members for group in found] == [("b.0.to_q", "b.0.to_k", "b.0.to_v")]


GROUP = FusedGroup("qkv", ("to_q", "to_k", "to_v"), QKV)


def decisions_of(*member_formats: str) -> dict[str, Decision]:
    members = zip(GROUP.members, member_formats, strict=True)
    return {"other": Decision("fp8", "linear layer")} | {
        name: Decision(format_, "its own") for name, format_ in members
    }


def test_one_kept_member_keeps_the_whole_group() -> None:
    closed = close_over_groups(decisions_of("fp8", KEEP, "fp8"), [GROUP])
    assert formats(closed) == {"other": "fp8", "to_q": KEEP, "to_k": KEEP, "to_v": KEEP}


def test_member_kept_for_the_group_says_which_one_asked() -> None:
    closed = close_over_groups(decisions_of("fp8", KEEP, "fp8"), [GROUP])
    assert (closed["to_q"].reason, closed["to_k"].reason) == ("fused with to_k, which is kept", "its own")


def test_group_without_a_kept_member_stays_as_it_is() -> None:
    decisions = decisions_of("fp8", "fp8", "fp8")
    assert close_over_groups(decisions, [GROUP]) == decisions


def test_group_kept_as_a_whole_keeps_its_reasons() -> None:
    decisions = decisions_of(KEEP, KEEP, KEEP)
    assert close_over_groups(decisions, [GROUP]) == decisions


def test_group_of_two_formats_is_refused_with_members_and_formats() -> None:
    with pytest.raises(UsageError, match=r"to_q, to_k, to_v are fused at load .* fp8, mxfp4"):
        close_over_groups(decisions_of("fp8", "mxfp4", "fp8"), [GROUP])


# SGLang 0.5.23's names, probed on its classes.
HUNYUAN_MODULES = [
    *(f"transformer_blocks.{i}.attn.to_q" for i in range(3)),
    *(f"transformer_blocks.{i}.ff.net.2" for i in range(3)),
    *(f"single_transformer_blocks.{i}.proj_mlp" for i in range(4)),
    "proj_out",
]


@pytest.mark.parametrize(
    ("preset", "module", "prefix"),
    [
        ("hunyuan-video", "transformer_blocks.2.attn.to_q", "Hunyuan.double_blocks.2.img_attn_qkv"),
        ("hunyuan-video", "transformer_blocks.0.ff.net.2", "Hunyuan.double_blocks.0.img_mlp.fc_out"),
        ("hunyuan-video", "proj_out", None),
        ("wan", "blocks.7.ffn.net.0.proj", "blocks.7.ffn.fc_in"),
        ("wan", "blocks.11.attn1.to_out.0", "blocks.11.to_out"),
        ("wan", "blocks.7.attn2.to_q", "blocks.7.attn2.to_q"),
        ("wan", "condition_embedder.time_proj", None),
        ("z-image", "layers.3.attention.to_k", "layers.3.attention.to_qkv"),
        ("z-image", "noise_refiner.0.feed_forward.w3", "noise_refiner.0.feed_forward.w13"),
        ("z-image", "context_refiner.1.attention.to_out.0", "context_refiner.1.attention.to_out.0"),
        ("z-image", "t_embedder.mlp.0", None),
        ("generic", "some.layers.0.linear", "some.layers.0.linear"),
    ],
)
def test_sglang_prefix_is_the_name_its_class_gives(preset: str, module: str, prefix: str | None) -> None:
    assert runtime_names([module], load_preset(preset).runtime("sglang"), [module]) == {module: prefix}


@pytest.mark.parametrize(("block", "runtime_block"), [(0, 3), (3, 6)])
def test_hunyuan_single_blocks_are_numbered_on_from_the_double_blocks(block: int, runtime_block: int) -> None:
    module = f"single_transformer_blocks.{block}.proj_mlp"
    prefixes = runtime_names([module], load_preset("hunyuan-video").runtime("sglang"), HUNYUAN_MODULES)
    assert prefixes == {module: f"Hunyuan.single_blocks.{runtime_block}.linear1"}


def test_wan_image_to_video_has_bare_names_in_its_cross_attention() -> None:
    linears = ["blocks.3.attn2.to_out.0", "blocks.3.attn2.add_k_proj", "blocks.3.attn1.to_out.0"]
    assert runtime_names(linears, load_preset("wan").runtime("sglang"), linears) == {
        "blocks.3.attn2.to_out.0": "to_out",
        "blocks.3.attn2.add_k_proj": "blocks.3.attn2.add_k_proj",
        "blocks.3.attn1.to_out.0": "blocks.3.to_out",
    }


@pytest.mark.parametrize(
    ("entry", "prefix", "reaches"),
    [
        ("blocks.1", "blocks.1.to_q", True),  # a run of dotted parts at the start
        ("to_q", "blocks.1.to_q", True),  # at the end
        ("1", "blocks.1.to_q", True),  # in the middle
        ("blocks.1.to_q", "blocks.1.to_q", True),  # all of it
        ("blocks.1", "blocks.10.to_q", False),  # a part is never cut
        ("o_q", "blocks.1.to_q", False),
        ("blocks.to_q", "blocks.1.to_q", False),
    ],
)
def test_ignore_entry_reaches_any_run_of_dotted_parts(entry: str, prefix: str, reaches: bool) -> None:
    assert bool(overmatched({entry: entry}, {"quantized": prefix}, PART)) == reaches


def test_overmatch_names_layer_and_entry() -> None:
    found = overmatched({"proj_out": "proj_out"}, {"blocks.0.proj_out": "blocks.0.proj_out"}, PART)
    assert len(found) == 1
    assert "blocks.0.proj_out" in found[0]
    assert found[0].endswith("its ignore list says proj_out")


def test_overmatch_counts_further_layers() -> None:
    quantized = {f"blocks.{i}.proj_out": f"blocks.{i}.proj_out" for i in range(3)}
    assert "blocks.0.proj_out and 2 more" in overmatched({"proj_out": "proj_out"}, quantized, PART)[0]


def test_layer_that_sglang_never_quantizes_is_in_no_ignore_list() -> None:
    assert overmatched({"proj_out": None}, {"blocks.0.proj_out": "blocks.0.proj_out"}, PART) == []


def test_overmatch_looks_at_the_checkpoint_s_name_too() -> None:
    assert overmatched({"to_q": "other"}, {"blocks.0.to_q": "blocks.0.qkv"}, PART)


@pytest.mark.parametrize(("entry", "reaches"), [("to_q", False), ("blocks.1.to_q", True)])
def test_modelopt_matches_whole_names_alone(entry: str, reaches: bool) -> None:
    assert bool(overmatched({entry: entry}, {"quantized": "blocks.1.to_q"}, NAME)) == reaches

"""Which module gets which format, and why: first matching rule wins, fused groups stay whole."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from convert_ckpt.plan.preset import FusedPattern, Preset
from convert_ckpt.source.toml_files import read_toml
from run_ckpt.contract.decided_by import BOTH, BY_FORMAT, EDGE, FUSED, IGNORE, PRESET, RECIPE, TARGET, DecidedBy
from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.formats import FORMATS
from run_ckpt.contract.module_names import fill_pattern, matching_names, pattern_regex, split_name
from run_ckpt.contract.tensors import TensorSpec

KEEP = "keep"
_RECIPE_KEYS = {"preset", "rules"}
_RULE_KEYS = {"match", "format", "reason"}
# Not each numbered container is one of blocks: in ff.net.0.proj and ff.net.2 it is an nn.Sequential.
_STACKS = ("blocks", "layers")


@dataclass(frozen=True)
class Rule:
    """Modules matched by ``pattern`` get ``format``: a weight format or "keep". ``by``: whose rule, see DECIDERS.

    ``in_block``: what a stack of blocks is called says nothing of a layer in it: the pattern is matched with the rest.
    """

    pattern: str
    format: str
    reason: str
    by: str = PRESET
    in_block: bool = False

    @property
    def by_user(self) -> bool:
        return self.by not in (PRESET, TARGET, BOTH)

    def matching(self, modules: Collection[str]) -> list[str]:
        return matching_names(self.pattern, modules, _in_block if self.in_block else None)


def _in_block(module: str) -> str:
    """Return what follows the number of a layer's block, with its dot; all of the name outside of blocks."""
    stack, _, projection = split_name(module)
    return f".{projection}" if stack.endswith(_STACKS) else module


@dataclass(frozen=True)
class Decision:
    """What becomes of a module and why."""

    format: str
    reason: str
    decided_by: DecidedBy = BY_FORMAT


NOTHING_CHOSEN: Mapping[str, Decision] = MappingProxyType({})


@dataclass(frozen=True)
class FusedGroup:
    """Modules of one checkpoint that some consumer fuses; named after the consumer's module."""

    name: str
    members: tuple[str, ...]
    pattern: FusedPattern


def read_recipe(path: Path) -> tuple[str | None, list[Rule]]:
    """Return the base preset's name (or None) and the rules of a recipe file.

    A recipe is TOML: ``preset = "flux1"`` and ``[[rules]]`` with ``match`` (pattern), ``format``
    (a weight format or keep) and optionally ``reason``. Raises UsageError with the fault.
    """
    table = read_toml(path)
    _refuse_unknown(path, "", table, _RECIPE_KEYS)
    preset, entries = table.get("preset"), table.get("rules", [])
    if not isinstance(preset, str | None):
        raise UsageError(f'{path}: preset is not a name. Write preset = "flux1", or leave it out.')
    if not isinstance(entries, list):
        raise UsageError(f"{path}: rules is not a list of tables. Begin each rule with a line [[rules]].")
    return preset, [_read_rule(path, number, entry) for number, entry in enumerate(entries, start=1)]


def _read_rule(path: Path, number: int, entry: object) -> Rule:
    where = f"rule {number}: "
    if not isinstance(entry, dict):
        raise UsageError(f"{path}: {where}not a table. Begin each rule with a line [[rules]].")
    _refuse_unknown(path, where, entry, _RULE_KEYS)
    match, weight_format = entry.get("match"), entry.get("format")
    if not isinstance(match, str) or weight_format not in (*FORMATS, KEEP):
        known = ", ".join(f'"{name}"' for name in FORMATS)
        raise UsageError(f'{path}: {where}needs match = "PATTERN" and format = {known} or "{KEEP}".')
    reason = entry.get("reason", f"recipe {path.name}: {match}")
    if not isinstance(reason, str):
        raise UsageError(f"{path}: {where}reason is not a text.")
    return Rule(match, str(weight_format), reason, RECIPE)


def ignore_rules(patterns: Iterable[str]) -> list[Rule]:
    """Return one keep rule for each --ignore pattern."""
    return [Rule(pattern, KEEP, f"--ignore {pattern}", IGNORE) for pattern in patterns]


def keep_rules(reasons: Mapping[str, str], by: str = PRESET, *, in_block: bool = False) -> list[Rule]:
    """Return one keep rule for each pattern, which maps to its reason. by, in_block: see Rule."""
    return [Rule(pattern, KEEP, reason, by, in_block=in_block) for pattern, reason in reasons.items()]


def edge_rules(modules: Iterable[str], n_first: int, n_last: int) -> list[Rule]:
    """Return a keep rule for each of the first and last blocks of every stack (--keep-first, --keep-last).

    Raises UsageError where no module lies in a numbered block.
    """
    if not (n_first or n_last):
        return []
    stacks: dict[str, set[int]] = {}
    for stack, block, _ in map(split_name, modules):
        if block is not None:
            stacks.setdefault(stack, set()).add(block)
    if not stacks:
        raise UsageError("--keep-first, --keep-last: no linear layer lies in a numbered block. Use --ignore.")
    rules = []
    for stack, blocks in stacks.items():
        ordered = sorted(blocks)
        edges = {f"--keep-first {n_first}": ordered[:n_first], f"--keep-last {n_last}": ordered[::-1][:n_last]}
        for option, numbers in edges.items():
            rules += [Rule(".".join(filter(None, (stack, f"{number}.*"))), KEEP, option, EDGE) for number in numbers]
    return rules


def decide(
    modules: Iterable[str], rules: list[Rule], default_format: str, chosen: Mapping[str, Decision] = NOTHING_CHOSEN
) -> dict[str, Decision]:
    """Return module -> decision: by the first rule that matches, else what a budget chose, else the default format."""
    default = Decision(default_format, "linear layer")
    decisions = {module: chosen.get(module, default) for module in modules}
    left = dict.fromkeys(decisions)
    for rule in rules:
        decision = Decision(rule.format, rule.reason, DecidedBy(rule.by, rule.pattern))
        for module in rule.matching(left):
            decisions[module] = decision
            del left[module]
    return decisions


def unmatched_rules(modules: Iterable[str], rules: list[Rule]) -> list[str]:
    """Return the patterns given by the user that match no module."""
    names = dict.fromkeys(modules)
    return [rule.pattern for rule in rules if rule.by_user and not rule.matching(names)]


def find_fused_groups(linears: Mapping[str, TensorSpec], preset: Preset) -> list[FusedGroup]:
    """Return the fused groups with at least two members present and one common K.

    linears: module -> its weight [N, K]. A module is in one group at most: the first pattern that claims it.
    """
    groups = []
    claimed: set[str] = set()
    for pattern in preset.fused:
        regex = pattern_regex(pattern.members[0])
        for match in filter(None, map(regex.fullmatch, sorted(linears))):
            names = [fill_pattern(member, match.groups()) for member in pattern.members]
            members = tuple(name for name in names if name in linears and name not in claimed)
            if len(members) > 1 and len({linears[name].shape[1] for name in members}) == 1:
                name = fill_pattern(pattern.scale_name, match.groups()) if pattern.scale_name else "+".join(members)
                groups.append(FusedGroup(name, members, pattern))
                claimed.update(members)
    return groups


def close_over_groups(decisions: dict[str, Decision], groups: Iterable[FusedGroup]) -> dict[str, Decision]:
    """Return the decisions with every fused group made whole: one kept member keeps them all.

    Members that would get different formats are an error of the recipe (UsageError).
    """
    closed = dict(decisions)
    for group in groups:
        kept = [name for name in group.members if closed[name].format == KEEP]
        formats = {closed[name].format for name in group.members} - {KEEP}
        if kept:
            for name in set(group.members) - set(kept):
                closed[name] = Decision(KEEP, f"fused with {kept[0]}, which is kept", DecidedBy(FUSED, kept[0]))
        elif len(formats) > 1:
            raise UsageError(
                f"{', '.join(group.members)} are fused at load and need one format, but the recipe gives"
                f" {', '.join(sorted(formats))}. Name them all in one rule."
            )
    return closed


def _refuse_unknown(path: Path, where: str, table: dict[str, object], known: set[str]) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise UsageError(f"{path}: {where}unknown keys {unknown}. Known keys: {sorted(known)}.")

"""Runs, kills and tampering in random order: OUTPUT is absent or right, and what is not ours stays."""

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.attack.injector import CRASHED, DONE, MODES, REFUSED, run_in_child
from tests.checkpoints import convert, folder_bytes, random_weight, save_checkpoint

DAMAGES = ("flip", "truncate", "remove", "link", "hard link", "foreign", "folder")
N_STEPS = 70


def work(source: Path, output: Path, weight_format: str, restart: bool) -> None:
    convert(source, output, 1, restart=restart, format=weight_format)


class Conversions(RuleBasedStateMachine):
    """One OUTPUT, converted to by one command or another, with whatever happens in between."""

    def __init__(self) -> None:
        super().__init__()
        self.top = Path(tempfile.mkdtemp(prefix="attack-"))
        shards = [{f"model.layers.0.self_attn.{name}_proj.weight": random_weight(256, 256)} for name in "qk"]
        self.source = save_checkpoint(self.top / "in", shards, {"architectures": ["LlamaForCausalLM"]})
        self.whole = {}
        for weight_format in ("mxfp4", "fp8"):
            work(self.source, self.top / weight_format, weight_format, False)
            self.whole[weight_format] = folder_bytes(self.top / weight_format)
        self.output, self.partial = self.top / "out", self.top / "out.partial"
        self.victim = self.top / "victim"
        self.victim.mkdir()
        (self.victim / "precious").write_text("precious")
        self.is_tampered = False

    @rule(weight_format=st.sampled_from(["mxfp4", "fp8"]), mode=st.sampled_from(MODES), at=st.integers(1, N_STEPS))
    def run_with_a_fault(self, weight_format: str, mode: str, at: int) -> None:
        ended, _ = run_in_child(partial(work, self.source, self.output, weight_format, False), mode, at)
        assert ended != CRASHED

    @rule(weight_format=st.sampled_from(["mxfp4", "fp8"]), restart=st.booleans())
    def run(self, weight_format: str, restart: bool) -> None:
        was_there, left = self.output.exists(), self.partial.exists()
        ended, _ = run_in_child(partial(work, self.source, self.output, weight_format, restart))
        assert ended in (DONE, REFUSED)
        if ended == DONE:
            assert folder_bytes(self.output) == self.whole[weight_format]
        if restart and not was_there and not self.is_tampered:
            assert ended == DONE
        if not left and not was_there:
            assert ended == DONE

    @precondition(lambda self: self.partial.is_dir())
    @rule(damage=st.sampled_from(DAMAGES), which=st.integers(0, 50), byte=st.integers(0, 10_000))
    def tamper(self, damage: str, which: int, byte: int) -> None:
        files = sorted(path for path in self.partial.rglob("*") if path.is_file() and not path.is_symlink())
        if not files:
            return
        self.is_tampered = True
        path = files[which % len(files)]
        data = bytearray(path.read_bytes())
        if damage == "flip" and data:
            data[byte % len(data)] ^= 1 << byte % 8
            path.write_bytes(data)
        elif damage == "truncate":
            os.truncate(path, len(data) // 2)
        elif damage == "remove":
            path.unlink()
        elif damage in ("link", "hard link"):
            path.unlink()
            path.symlink_to(self.victim / "precious") if damage == "link" else path.hardlink_to(
                self.victim / "precious"
            )
        elif damage == "foreign":
            path.with_name("mine").write_text("precious")
        elif damage == "folder":
            path.unlink()
            path.mkdir()

    @precondition(lambda self: self.is_tampered and not self.output.exists())
    @rule()
    def clear_up(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.is_tampered = False

    @precondition(lambda self: self.output.exists())
    @rule()
    def take_away(self) -> None:
        shutil.rmtree(self.output)

    @invariant()
    def output_is_absent_or_right(self) -> None:
        assert not self.output.exists() or folder_bytes(self.output) in self.whole.values()

    @invariant()
    def what_is_not_ours_stays(self) -> None:
        assert (self.victim / "precious").read_text() == "precious"
        mine = self.partial.rglob("mine") if self.partial.is_dir() else ()
        assert all(path.read_text() == "precious" for path in mine)

    def teardown(self) -> None:
        shutil.rmtree(self.top)


TestRandomOrder = Conversions.TestCase
TestRandomOrder.settings = settings(
    max_examples=int(os.environ.get("ATTACK_EXAMPLES", "6")),
    stateful_step_count=10,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

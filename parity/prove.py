"""The whole line for every covered checkpoint: synthesize, convert, check against the official code. ``make zoo`` runs it.

    python -m parity.prove [ENTRY…]                     checks against the committed traces; needs no PyTorch; prints a table
    python -m parity.prove --record [ENTRY…]            records those traces anew with the official code first (docs/recording.md)

Each entry has three cases: one photograph, one whose sides are both odd, and two of different sizes in one batch with official
padding. The first two are also checked together with masked padding, on a canvas that fits neither.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checkpoints import registry, synthesize
from parity.check import CaseCheck, Check, Settings, check

TRACES = Path(__file__).parent / "traces"
"""One trace for each entry, sampled so that they can be committed."""

PHOTOS = Path(registry.__file__).parent / "photos"

CASES = (
    "photo=coffee.png@320x448:6",
    "odd=chelsea.png@237x331:5",
    "batch=astronaut.png@288x224:4,coffee.png@256x320:7",
)
"""As ``parity-check record --case`` takes them, below :data:`PHOTOS`."""

SAMPLES = 32
"""Elements stored of each large tensor."""

ENTRIES = {
    "maskformer_panoptic_R50_bs64_554k": 3,
    "maskformer_panoptic_R101_bs64_554k": 14,
    "maskformer_R50_bs16_160k": 194,
    "maskformer_R101_bs16_90k": 92,
}
"""Covered entries (both pixel decoders, both depths, divisor 0 and 32, panoptic and semantic inference), and the seed of the made-up
targets, the clearest of the first few dozen. In every case and decoder layer the best other assignment costs at least
10 times more than the costs' float32 noise, so that float32 can be held to the same assignment."""


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was found for one entry: checks with official and with masked padding."""

    entry: registry.Entry
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """All of it."""
        return all(check.passed for check in self.checks)

    def cases(self, dtype: str) -> list[CaseCheck]:
        """Every case in one dtype, with either padding."""
        return [case for check in self.checks for case in check.cases if case.dtype == dtype]


def prove(entry: registry.Entry, paddings: Sequence[str] = ("official", "masked"), traces: Path = TRACES) -> Proof:
    """Writes the synthetic checkpoint of ``entry``, converts it and checks it against its trace."""
    from converters.convert import convert

    with tempfile.TemporaryDirectory(prefix="parity-prove-") as scratch:
        source, converted = Path(scratch) / "model_final.pkl", Path(scratch) / "tf_ckpt"
        synthesize.write_pickle(synthesize.synthesize(entry), source)
        convert(source, converted, config=entry.name)
        checks = []
        for padding in paddings:
            settings = Settings(str(converted), str(traces / entry.name), padding=padding)
            checks.append(check(settings, lambda step: print(f"{entry.name}: {step} …", file=sys.stderr, flush=True)))
    return Proof(entry, tuple(checks))


def record(entry: registry.Entry, directory: Path) -> None:
    """Records the trace of ``entry`` with the official code; raises what :mod:`parity.record` raises."""
    from parity import official, record
    from parity.inputs import parse_case

    with tempfile.TemporaryDirectory(prefix="parity-prove-") as scratch:
        source = Path(scratch) / "model_final.pkl"
        synthesize.write_pickle(synthesize.synthesize(entry), source)
        cases = [parse_case(f"{name}=" + ",".join(f"{PHOTOS}/{image}" for image in images.split(","))) for name, images in _cases()]
        command = ["python", "-m", "parity.prove", "--record", entry.name]
        config = entry.official_config.removeprefix("configs/")
        seed = ENTRIES.get(entry.name, 0)
        record.record(official.load(), config, source, cases, directory, samples=SAMPLES, seed=seed, command=command)


def _cases() -> list[tuple[str, str]]:
    return [(name, images) for name, _, images in (case.partition("=") for case in CASES)]


def table(proofs: Sequence[Proof]) -> str:
    """The results as a Markdown table: worst relative L2 errors in float64, errors over their floor in float32."""
    lines = [
        "| entry | parameters | float64: tap | loss | gradient | float32: median, worst tap | assignments | |",
        "|---|---:|---:|---:|---:|---|---|---|",
    ]
    for proof in proofs:
        float64, float32 = proof.cases("float64"), proof.cases("float32")
        worst = {group: _worst(float64, group) for group in ("taps", "losses", "gradients")}
        ratios = [item.ratio for case in float32 for item in case.items if item.group == "taps" and item.ratio == item.ratio]
        medians = [case.median_ratio for case in float32]
        matched = [item for case in (*float64, *float32) for item in case.items if item.name.endswith("/assignment")]
        lines.append(
            f"| {proof.entry.name} | {proof.entry.num_parameters / 1e6:.1f} M | {worst['taps']:.1e} | {worst['losses']:.1e} "
            f"| {worst['gradients']:.1e} | {max(medians):.2f}, {max(ratios):.2f} "
            f"| {sum(item.passed for item in matched)} of {len(matched)} | {'match' if proof.passed else 'MISMATCH'} |"
        )
    return "\n".join(lines)


def _worst(cases: Sequence[CaseCheck], group: str) -> float:
    """Largest relative error that was judged by the tolerance of all; noise around zero has its own."""
    smallest = min(item.tolerance for case in cases for item in case.items if item.group == group)
    return max(item.error for case in cases for item in case.items if item.group == group and item.tolerance == smallest)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; 0 if everything matches, 1 if not, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m parity.prove", description="Prove every covered checkpoint.")
    parser.add_argument("entries", nargs="*", metavar="ENTRY", help=f"default: {' '.join(ENTRIES)}")
    parser.add_argument("--record", action="store_true", help="record the traces anew first; needs PyTorch and the official code")
    parser.add_argument("--traces", type=Path, default=TRACES, metavar="DIR", help="where the traces are")
    arguments = parser.parse_args(argv)
    from parity import report

    try:
        entries = [registry.entry(name) for name in arguments.entries or ENTRIES]
    except registry.ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    proofs = []
    for entry in entries:
        if arguments.record:
            record(entry, arguments.traces / entry.name)
        proofs.append(prove(entry, traces=arguments.traces))
        if not proofs[-1].passed:
            for failed in proofs[-1].checks:
                print(report.text(failed), file=sys.stderr)
    print(table(proofs))
    return 0 if all(proof.passed for proof in proofs) else 1


if __name__ == "__main__":
    sys.exit(main())

"""An export (``tfmaskformer export``), reloaded and judged as any recording: ``parity-check --actual`` compares its outputs.

    python -m parity.exported --export DIR --reference TRACE --out RECORDING
    parity-check --actual RECORDING --reference TRACE

An export has no modules to tap. The recording holds its outputs, and the semantic and panoptic results that they give; what else the
trace has is exempted by name (:data:`parity.recorded.OUTPUTS_ALONE`). Cases of several images are left out: there the official code lets
an image see the padding that another one needs, and an export does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import tfmaskformer
from parity import judge, probes, record
from parity.inputs import InputError
from parity.tensorflow_run import _flat_outputs, _in_float64, _inferences, _panoptic, _resized, _semantic
from parity.trace import Trace, TraceError, TraceFileWriter
from tfmaskformer.export import LOGITS, Exported, ExportError


def record_exported(export: str | Path, reference: str | Path, directory: str | Path, command: Sequence[str] = ()) -> Trace:
    """Records what an export computes on the images of a trace: in float32, whatever dtype the weights of a LiteRT model are stored in.

    Args:
        export: directory that ``tfmaskformer export`` wrote.
        reference: trace of the same weights.
        directory: made if it is not there.
        command: how this was asked for, for the manifest.

    Raises:
        ExportError, TraceError, InputError: bad input, nothing of it recorded.
    """
    exported, inputs = Exported(export), Trace(reference)
    if exported.dtype not in ("float32", "int8", "float16"):
        raise InputError(f"'{export}' computes in {exported.dtype}: its outputs are judged in float32\n  export it in float32")
    source, recorded = exported.manifest.get("source"), inputs.provenance.get("checkpoint", {})
    if not source:
        raise InputError(
            f"'{export}' does not tell of which file its weights are: its checkpoint was trained\n"
            "  make a .pth file of that with 'convert', record it, and export what 'convert' makes of the file"
        )
    if source.get("sha256") != recorded.get("sha256"):
        raise InputError(f"other weights: '{export}' is of {source.get('sha256')}, '{reference}' was recorded of {recorded.get('sha256')}")
    described = {name: case for name, case in inputs.manifest["cases"].items() if len(case["images"]) == 1}
    for case in described.values():
        exported.check_size(case["images"][0]["size_px"])
    provenance = {
        "framework": "tensorflow",
        "tool": f"tfmaskformer {tfmaskformer.__version__}",
        "export": exported.manifest["export"],
        "checkpoint": source,
        "sources": {},
        "config": exported.config.to_dict(),
        "variables": {},
        "dtype": "float32",
        "products": "float32",
        "mode": "graph",
        "device": {"kind": "cpu", "name": "CPU"},
        "gradients": False,
        "outputs_alone": True,
        "environment": dataclasses.asdict(probes.examine()),
    }
    keys = record.begin(Path(directory), provenance, described, command)
    test = exported.config.test
    for name in described:
        with inputs.case(name) as case:
            fed = judge.case_inputs(case, "float32")
            found = exported(np.stack(fed.images))
            outputs = {key: found[key] for key in (*LOGITS, "valid_sizes") if key in found}
            rows, columns = (-(-int(side) // 4) for side in outputs["valid_sizes"][0])
            for key in {"pred_masks", "sem_seg"} & outputs.keys():
                outputs[key] = outputs[key][:, :, :rows, :columns]
            groups = {
                "outputs": {key: value.numpy() for key, value in _flat_outputs(outputs, [key for key in LOGITS if key in outputs])},
                "inference": dict(_semantic(outputs, exported.config, fed, _inferences(fed))),
                "inference_float64": dict(_semantic(_in_float64(outputs), exported.config, fed, _resized(fed))),
            }
            if test.panoptic_on:
                groups["inference"] |= _panoptic(outputs, exported.config, fed, 0.0, 0.0)
            facts = {"key": keys[name], "reference": case.reference.facts["key"]}
            with TraceFileWriter(Path(directory), name, "float32", runs=("tensorflow",), samples=None, facts=facts) as writer:
                for group, tensors in groups.items():
                    for key, tensor in tensors.items():
                        writer.add(group, key, tensor)
        record.say(f"{name}: {exported.manifest['export']['format']}, {exported.dtype}")
    return Trace(directory)


def main(argv: Sequence[str] | None = None) -> int:
    """Records an export for ``parity-check --actual``: 0 recorded, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m parity.exported", description="Records what an export computes on a trace's images.")
    parser.add_argument("--export", required=True, metavar="DIR", help="written by 'tfmaskformer export'")
    parser.add_argument("--reference", required=True, metavar="DIR", help="a trace of the same weights")
    parser.add_argument("--out", required=True, metavar="DIR", help="the recording")
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        record_exported(arguments.export, arguments.reference, arguments.out, ["python", "-m", "parity.exported", *given])
    except (ExportError, InputError, TraceError) as error:
        record.say(f"error: {error}")
        return 2
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

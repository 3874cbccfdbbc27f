"""Records the files beside this one: what the official Trainer's optimizers and schedules do.

    MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python tests/golden/training/record.py [recipes schedules steps]

with facebookresearch/MaskFormer at da3e60d85fdeedcb31476b5edd7d328826ce56cc, facebookresearch/detectron2 at
02b5c4e295e990042a714712c21dc79b731e8833, PyTorch 2.13.0 on a CPU.

recipes.json    of each official config and each test model: SOLVER, the optimizer's class and defaults, the learning rate and
                decay of every parameter, the learning rate at some iterations
schedules.json  the learning rate at every iteration of short trainings
steps.npz       weights and moments of some parameters after each of 20 steps

The gradients are not recorded: :func:`gradient` computes them again from a parameter's name and the step. All arrays are in
PyTorch's layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

from checkpoints import registry, synthesize

HERE = Path(__file__).parent
STEPS = 20
TINY = ("tiny_panoptic", "tiny_semantic", "tiny_deeplab", "tiny_swin", "tiny_per_pixel", "tiny_per_pixel_plus")


@dataclasses.dataclass(frozen=True)
class Run:
    """Steps of a test model under its official recipe and some changes."""

    entry: str
    options: tuple = ()
    dtypes: tuple[str, ...] = ("float64",)
    every: int = 9


SHORT = ("SOLVER.MAX_ITER", STEPS, "SOLVER.BASE_LR", 0.02, "SOLVER.WEIGHT_DECAY", 0.3)
DECAYS = ("SOLVER.WEIGHT_DECAY_NORM", 0.2, "SOLVER.WEIGHT_DECAY_EMBED", 0.5, "SOLVER.BACKBONE_MULTIPLIER", 0.25)
WARMUP = ("SOLVER.WARMUP_ITERS", 5, "SOLVER.WARMUP_FACTOR", 0.1)
RUNS = {
    "few": Run("tiny_per_pixel", (*SHORT, *DECAYS, *WARMUP), ("float64", "float32"), every=40),
    "official": Run("tiny_panoptic", (), ("float64", "float32")),
    "short": Run("tiny_swin", (*SHORT, *DECAYS, *WARMUP, "SOLVER.STEPS", (8, 14)), ("float64", "float32")),
    "poly": Run("tiny_deeplab", (*SHORT, *WARMUP, "SOLVER.POLY_LR_CONSTANT_ENDING", 0.3)),
    "unclipped": Run("tiny_per_pixel_plus", (*SHORT, *DECAYS, "SOLVER.CLIP_GRADIENTS.ENABLED", False)),
    "sgd": Run("tiny_semantic", (*SHORT, *DECAYS, "SOLVER.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", 0.8), ("float64", "float32")),
}

POLY, MULTI_STEP = "coco-stuff-10k-171/maskformer_R50_bs32_60k", "coco-panoptic/maskformer_panoptic_R50_bs64_554k"
SCHEDULES = {
    "steps": (MULTI_STEP, {"MAX_ITER": 40, "STEPS": (20, 30), "WARMUP_ITERS": 0}),
    "steps_warmup": (MULTI_STEP, {"MAX_ITER": 40, "STEPS": (20, 30), "WARMUP_ITERS": 7, "WARMUP_FACTOR": 1e-3}),
    "steps_constant": (MULTI_STEP, {"MAX_ITER": 30, "STEPS": (9,), "WARMUP_ITERS": 4, "WARMUP_FACTOR": 0.3, "WARMUP_METHOD": "constant"}),
    "steps_inside_warmup": (MULTI_STEP, {"MAX_ITER": 37, "STEPS": (3, 5), "WARMUP_ITERS": 11, "WARMUP_FACTOR": 0.1, "GAMMA": 0.3}),
    "steps_beyond": (MULTI_STEP, {"MAX_ITER": 23, "STEPS": (7, 24, 99), "WARMUP_ITERS": 1, "WARMUP_FACTOR": 0.5}),
    "steps_none": (MULTI_STEP, {"MAX_ITER": 11, "STEPS": (), "WARMUP_ITERS": 3, "WARMUP_FACTOR": 0.0}),
    "only_warmup": (MULTI_STEP, {"MAX_ITER": 12, "STEPS": (5,), "WARMUP_ITERS": 50, "WARMUP_FACTOR": 0.1}),
    "poly": (POLY, {"MAX_ITER": 40}),
    "poly_warmup": (POLY, {"MAX_ITER": 40, "WARMUP_ITERS": 7, "WARMUP_FACTOR": 1e-6, "BASE_LR": 6e-5}),
    "poly_constant": (POLY, {"MAX_ITER": 33, "WARMUP_ITERS": 5, "WARMUP_FACTOR": 0.1, "WARMUP_METHOD": "constant", "POLY_LR_POWER": 2.0}),
    "poly_ending": (POLY, {"MAX_ITER": 30, "WARMUP_ITERS": 25, "WARMUP_FACTOR": 0.5, "POLY_LR_CONSTANT_ENDING": 0.3}),
    "poly_ending_factor_1": (POLY, {"MAX_ITER": 30, "WARMUP_ITERS": 25, "WARMUP_FACTOR": 1.0, "POLY_LR_CONSTANT_ENDING": 0.3}),
}
LONG = {
    "two_million": (MULTI_STEP, {"MAX_ITER": 2_000_000, "STEPS": (700_000, 1_500_000), "WARMUP_ITERS": 10, "WARMUP_FACTOR": 0.1}),
}
"""More than a million iterations: fvcore's epsilon moves the milestones."""


def iterations(max_iter: int, steps: tuple[int, ...], warmup_iters: int) -> list[int]:
    """Some iterations of a long training: around every change, and spread over all."""
    marks = [0, 1500, *steps, warmup_iters, max_iter - 1]
    near = {mark + offset for mark in marks for offset in range(-3, 4)}
    spread = {int(index) for index in np.linspace(0, max_iter - 1, 12)}
    return sorted(index for index in near | spread | {5, 17, 100, 750} if 0 <= index < max_iter)


def chosen(names: list[str], every: int) -> list[str]:
    """The parameters whose steps are recorded: one of each rare kind, and every ninth or so."""
    parts = (
        "relative_position_bias_table",
        "query_embed",
        "in_proj_weight",
        "stem",
        "decoder.norm",
        "patch_embed",
        "adapter_1",
        "class_embed",
    )
    kinds = {next(name for name in names if part in name) for part in parts if any(part in name for name in names)}
    return [name for index, name in enumerate(names) if name in kinds or index % every == 4]


def gradient(name: str, shape: tuple[int, ...], step: int) -> np.ndarray:
    """float64, of float32 numbers: the gradient of step 1, 2, …, the same on every platform.

    Parameters have seven magnitudes; the whole is far above the clip norm, above it, near it, and below it in turn; some are 0.
    """
    kind = zlib.crc32(name.encode())
    values = synthesize.bits(f"{name}@{step}", 0, int(np.prod(shape))).reshape(shape) * 2.0**-23
    if kind % 13 == 0 or (kind + step) % 7 == 0:
        return np.zeros(shape)
    return np.float32(values * 10.0 ** -(kind % 7) * (30.0, 1.0, 2e-4, 1e-7)[step % 4]).astype(np.float64)


def sample(name: str, step: int, size: int) -> int:
    """Which element is recorded."""
    return zlib.crc32(f"{name}#{step}".encode()) % size


def official_config(code, path, options=()):
    config = code.config(path.removeprefix("configs/"))
    config.merge_from_list(list(options))
    return config


def optimizer_of(code, config, model):
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the names of position tables
        return code.trainer().build_optimizer(config, model)


def recipe(code, entry) -> dict:
    """All that the official Trainer makes of the config of an entry."""
    config = official_config(code, entry.official_config, entry.official_options)
    model = code.model(config)
    optimizer = optimizer_of(code, config, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(len(group["params"]) == 1 for group in optimizer.param_groups)
    solver = config.SOLVER
    scheduler = code.trainer().build_lr_scheduler(config, optimizer)
    at = iterations(solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS)
    kinds = sorted({(base, group["weight_decay"]) for base, group in zip(scheduler.base_lrs, optimizer.param_groups, strict=True)})
    return {
        "solver": json.loads(json.dumps(solver)),
        "optimizer": type(optimizer).__mro__[1].__name__ if "Clipping" in type(optimizer).__name__ else type(optimizer).__name__,
        "clips": "Clipping" in type(optimizer).__name__,
        "defaults": {
            key: value for key, value in optimizer.defaults.items() if key in ("betas", "eps", "momentum", "dampening", "nesterov")
        },
        "kinds": kinds,
        "parameters": {
            names[id(group["params"][0])]: kinds.index((base, group["weight_decay"]))
            for base, group in zip(scheduler.base_lrs, optimizer.param_groups, strict=True)
        },
        "learning_rates": rates(scheduler, config, at),
    }


def rates(scheduler, config, at):
    """[iteration, learning rate]: of what has the base learning rate."""
    index = max(range(len(scheduler.base_lrs)), key=lambda index: scheduler.base_lrs[index])
    assert scheduler.base_lrs[index] == config.SOLVER.BASE_LR
    found = []
    for iteration in at:
        scheduler.last_epoch = iteration
        found.append([iteration, scheduler.get_lr()[index]])
    return found


def record_recipes(code) -> None:
    # One line for each config; parameters in the order of the layout, the kind of each as a digit.
    found = {}
    for entry in [*registry.entries(), *map(registry.entry, TINY)]:
        values = recipe(code, entry)
        order = [name for name, spec in registry.layout(entry).items() if spec.kind == "parameter"]
        trained = values["parameters"]
        assert trained.keys() <= set(order)
        found[entry.name] = values | {"parameters": "".join(str(trained.get(name, "-")) for name in order)}
        print(entry.name, file=sys.stderr)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in found.items())
    (HERE / "recipes.json").write_text("{\n" + lines + "\n}\n")


def record_schedules(code) -> None:
    import torch

    found = {}
    for name, (path, changes) in {**SCHEDULES, **LONG}.items():
        options = [item for key, value in changes.items() for item in (f"SOLVER.{key}", value)]
        config = official_config(code, path, options)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], config.SOLVER.BASE_LR)
        scheduler = code.trainer().build_lr_scheduler(config, optimizer)
        if name in LONG:
            values = rates(scheduler, config, iterations(config.SOLVER.MAX_ITER, config.SOLVER.STEPS, config.SOLVER.WARMUP_ITERS))
        else:  # as the training does it
            values = []
            for iteration in range(config.SOLVER.MAX_ITER):
                values.append([iteration, optimizer.param_groups[0]["lr"]])
                optimizer.step()
                scheduler.step()
        found[name] = {"config": f"configs/{path}.yaml", "changes": changes, "learning_rates": values}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in found.items())
    (HERE / "schedules.json").write_text("{\n" + lines + "\n}\n")


def record_steps(code, run, dtype):
    import torch

    entry = registry.entry(run.entry)
    config = official_config(code, entry.official_config, (*entry.official_options, *run.options))
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "model_final.pkl"
        synthesize.write_pickle(synthesize.synthesize(entry), source)
        model = code.model(config, source, dtype=dtype)
    optimizer = optimizer_of(code, config, model)
    scheduler = code.trainer().build_lr_scheduler(config, optimizer)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return taken({name: trained[name] for name in chosen(list(trained), run.every)}, optimizer, scheduler, getattr(torch, dtype))


def taken(parameters, optimizer, scheduler, dtype):
    """What :func:`measured` says after each step: arrays "values" and "norms" [steps, parameters, weight and slots]."""
    import torch

    start = {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}
    values, norms = [], []
    for step in range(1, STEPS + 1):
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradient(name, tuple(parameter.shape), step), dtype=dtype)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        found = []
        for name, parameter in parameters.items():
            slots = [value for key, value in optimizer.state[parameter].items() if key != "step" and value is not None]
            found.append(measured(name, step, start[name], *(tensor.detach().numpy() for tensor in (parameter, *slots))))
        values.append([item[0] for item in found])
        norms.append([item[1] for item in found])
    return {"values": np.array(values), "norms": np.array(norms)}


def measured(name, step, start, weight, *slots):
    """One element of the weight and of each slot; the norms of the weight's change and of the slots, in float64."""
    values = [array.reshape(-1)[sample(name, step, array.size)] for array in (weight, *slots)]
    return values, [np.linalg.norm(np.float64(array).ravel()) for array in (np.float64(weight) - start, *slots)]


def torch_sgd():
    """One parameter under torch.optim.SGD alone, without momentum."""
    import torch

    name, shape = "plain.weight", (3, 4)
    parameter = torch.nn.Parameter(torch.tensor(gradient(name, shape, 100)))
    optimizer = torch.optim.SGD([parameter], 0.02, weight_decay=0.3)
    return taken({name: parameter}, optimizer, None, torch.float64)


def record_all_steps(code) -> dict[str, np.ndarray]:
    found = {}
    for name, run in RUNS.items():
        for dtype in run.dtypes:
            found |= {f"{name}.{dtype}.{key}": array for key, array in record_steps(code, run, dtype).items()}
            print(name, dtype, file=sys.stderr)
    return found | {f"plain.float64.{key}": array for key, array in torch_sgd().items()}


def main(*parts: str) -> None:
    from parity import official

    code = official.load()
    if "schedules" in parts or not parts:
        record_schedules(code)
    if "steps" in parts or not parts:
        np.savez_compressed(HERE / "steps.npz", **record_all_steps(code))
    if "recipes" in parts or not parts:
        record_recipes(code)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Records ``processes.npz``: losses and gradients of the official code in two processes, over ``torch.distributed`` with gloo.

    MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python tests/golden/training/record_processes.py tests/golden/training/processes.npz

The model is ``tiny_panoptic`` with its synthetic weights, in float64, without dropout; each process has one image, of another size and with
another number of objects than the other's. Recorded are the losses times their weights, of each process and averaged over both as upstream
logs them, and of the gradients, averaged as ``DistributedDataParallel`` does it, the 2-norm and the sum for each parameter.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np

from checkpoints import registry, synthesize

SIZES = ((64, 96), (75, 61))
"""Height and width in px of each process's image."""
OBJECTS = (4, 1)
NAME = "tiny_panoptic"


def images_and_targets():
    """Of each process: uint8 [height, width, 3], labels int64 [objects] and masks bool [objects, height, width]."""
    rng = np.random.default_rng(8)
    found = []
    for (height, width), objects in zip(SIZES, OBJECTS, strict=True):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        found.append((image, rng.integers(0, 133, objects), rng.random((objects, height, width)) < 0.3))
    return found


def run(rank: int, port: int, checkpoint: str, results) -> None:
    import torch
    from torch import distributed

    from parity import official

    code = official.load()
    from detectron2.structures import Instances

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=len(SIZES))
    config = code.config(code.maskformer / registry.entry(NAME).official_config)
    options = [list(value) if isinstance(value, tuple) else value for value in registry.entry(NAME).official_options]
    config.merge_from_list([*options, "MODEL.MASK_FORMER.DROPOUT", 0.0])
    model = code.model(config, checkpoint, dtype="float64", training=True)
    image, labels, masks = images_and_targets()[rank]
    instances = Instances(image.shape[:2], gt_classes=torch.from_numpy(labels), gt_masks=torch.from_numpy(masks))
    losses = model([{"image": torch.from_numpy(image.transpose(2, 0, 1).copy()), "instances": instances}])
    sum(losses.values()).backward()

    def mean(tensor):
        tensor = tensor.detach().clone()
        distributed.all_reduce(tensor)
        return (tensor / len(SIZES)).numpy()

    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {f"loss/{key}": mean(loss) for key, loss in losses.items()}
    own = {f"own/{rank}/{key}": loss.detach().numpy() for key, loss in losses.items()}
    gradients = {name: mean(parameter.grad) for name, parameter in parameters.items()}
    found["names"] = np.array(list(gradients))
    found["norms"] = np.array([np.linalg.norm(gradient.ravel()) for gradient in gradients.values()])
    found["sums"] = np.array([gradient.sum() for gradient in gradients.values()])
    results.put((rank, found, own, code.commits, torch.__version__))
    distributed.barrier()


def main(destination: str) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = str(Path(scratch) / "model_final.pkl")
        synthesize.write_pickle(synthesize.synthesize(registry.entry(NAME)), Path(checkpoint))
        processes = [context.Process(target=run, args=(rank, port, checkpoint, results)) for rank in range(len(SIZES))]
        for process in processes:
            process.start()
        found = sorted((results.get(timeout=600) for _ in processes), key=lambda result: result[0])
        for process in processes:
            process.join()
    (_, record, own, commits, version), (_, _, other, *_) = found
    how_made = {"how_made": "tests/golden/training/record_processes.py", "commits": commits, "torch": version}
    np.savez_compressed(destination, how_made=np.array(json.dumps(how_made)), **record, **own, **other)
    print({key: float(value) for key, value in {**record, **own, **other}.items() if np.ndim(value) == 0})


if __name__ == "__main__":
    main(sys.argv[1])

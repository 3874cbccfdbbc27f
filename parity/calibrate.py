"""Makes the recipes of synthetic checkpoints with the official model on real photographs, and checks what came out.

    MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python -m parity.calibrate ENTRY…           writes checkpoints/recipes/<ENTRY>.json
    MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python -m parity.calibrate --check ENTRY…   prints the properties as JSON

One float64 pass goes through the model in the order of its calls. Where a module is called for the first time its gains are set so that
its output meets a target, and the pass goes on with the corrected output; so every layer is calibrated on activations that are already
as they will be. The two heads are tuned last, on what the queries and the pixels then look like. Only scalars come out, a few for each
tensor. The targets, and why, are in ``docs/decisions/0005-synthetic-checkpoints.md``.
"""

from __future__ import annotations

import argparse
import functools
import importlib.resources
import itertools
import json
import math
import pathlib
import re
import sys
import types
from typing import Any

import numpy as np

from checkpoints import registry, synthesize
from parity.meta_architectures import META_ARCHITECTURES

SEED = 0
"""The seed that the recipes are made for."""

CONV_STD = 0.245
"""Standard deviation of what goes into FrozenBatchNorm and GroupNorm: a variance of 0.06, in which an eps of 1e-5 shows."""

LOGIT_STD = {"multihead_attn": 3.5, "self_attn": 3.0, "attn": 1.5}
"""Standard deviation of attention logits over the keys: some ten keys matter to a query, far from uniform and far from one-hot. Swin's
windows (``attn``) have 49 or 144 keys, the others hundreds."""

STREAM_STD = 0.32
"""Deviation of Swin's residual stream where a stage starts: its LayerNorms see a variance near 0.1."""

CLASS_LOGIT_STD = 2.0
"""Root mean square of the per-pixel baselines' logits."""

SEGMENTS = 4
"""Segments to look for on each of two photographs when the heads are tuned; in panoptic entries not only things, not only stuff."""

ATTENTION_RMS = {"multihead_attn": 0.35, "decoder": 0.09, "encoder": 0.07}
"""Root mean square of what an attention adds to the residual stream, which has 0.2 (after a decoder's norm1) to 0.34. Cross-attention
is what tells queries apart; self-attention averages, and more of it would make them alike."""

# What reads the output of a ReLU does not pass its mean on. The others read the image, a LayerNorm or an attention.
_UNCENTRED = re.compile(
    r"stem\.conv1|patch_embed|qkv|attn\.proj|relative_position|mlp\.fc1|reduction|in_proj_weight|out_proj|linear1|class_embed"
    r"|mask_embed\.layers\.0|query_embed|norm|bias|empty_weight"
)

# First pattern that fits: gain and offset before calibration. Norms of FPN laterals weigh 0.4 against 0.8 from above, so that masks
# are coherent; LayerNorms weigh 0.32, so that the next LayerNorm sees a variance near 0.1.
_INITIAL = [
    (r"^backbone\.patch_embed\.norm\.weight$", 0.12, STREAM_STD),
    (r"^backbone\.patch_embed\.norm\.bias$", 0.05, 0.0),
    (r"^backbone.*\.norm\d\.weight$", 0.3, 1.0),
    (r"^backbone.*\.norm\d\.bias$", 0.15, 0.0),
    (r"relative_position_bias_table$", 1.5, 0.0),
    (r"relative_position_index$", 0.0, 0.0),
    (r"qkv\.bias$", 0.1, 0.0),
    (r"attn\.proj\.bias$", 0.03, 0.0),
    (r"mlp\.fc1\.bias$", 0.4, 0.0),
    (r"mlp\.fc2\.bias$", 0.1, 0.0),
    (r"^backbone.*running_mean$", 0.06, 0.0),
    (r"^backbone.*running_var$", 0.03, 0.06),
    (r"^backbone.*norm\.weight$", 0.3, 1.0),
    (r"^backbone.*norm\.bias$", 0.15, 0.0),
    (r"decoder\.norm\.weight$", 0.3, 1.0),
    (r"decoder\.norm\.bias$", 0.2, 0.0),
    (r"adapter_\d\.norm\.weight$", 0.2, 0.4),
    (r"adapter_\d\.norm\.bias$", 0.2, 0.0),
    (r"layer_\d\.norm\.weight$", 0.3, 0.8),
    (r"layer_\d\.norm\.bias$", 0.3, 0.0),
    (r"decoder.*\.norm1\.weight$", 0.08, 0.2),
    (r"\.norm\d\.weight$", 0.12, 0.32),
    (r"\.norm\d\.bias$", 0.05, 0.0),
    (r"in_proj_bias$", 0.1, 0.0),
    (r"out_proj\.bias$", 0.03, 0.0),
    (r"linear1\.bias$", 0.4, 0.0),
    (r"linear2\.bias$", 0.1, 0.0),
    (r"mask_features\.bias$", 0.3, 0.5),
    (r"input_proj\.bias$", 0.1, 0.0),
    (r"\.bias$", 0.3, 0.0),
    (r"query_embed\.weight$", 1.0, 0.0),
]


def photographs() -> dict[str, np.ndarray]:
    """Name → uint8 [height, width, 3] RGB of the committed photographs, coffee first."""
    from PIL import Image

    folder = importlib.resources.files("checkpoints") / "photos"
    images = {}
    for name in ("coffee", "chelsea", "astronaut"):
        with (folder / f"{name}.png").open("rb") as file:
            images[name] = np.asarray(Image.open(file).convert("RGB"))
    return images


def initial_recipe(entry: registry.Entry) -> dict[str, synthesize.Draw]:
    """Where calibration starts: weights that keep variance, norms and biases from the table above."""
    draws = {}
    for key, spec in registry.layout(entry).items():
        if key == "criterion.empty_weight":
            draws[key] = synthesize.Draw(0.0, 1.0, replace={-1: entry.config["criterion"]["no_object_weight"]})
            continue
        fitting = next(((gain, offset) for pattern, gain, offset in _INITIAL if re.search(pattern, key)), None)
        gain, offset = fitting or (math.sqrt(3 / math.prod(spec.shape[1:])), 0.0)
        draws[key] = synthesize.Draw(gain, offset, centred=not _UNCENTRED.search(key))
    return draws


def official_model(entry: registry.Entry, tensors: dict[str, np.ndarray], dtype: str = "float64") -> Any:
    """The official model of an entry in evaluation mode, with ``tensors`` (v2 keys)."""
    import torch

    from parity import official

    code = official.load()
    config = code.config(code.maskformer / entry.official_config)
    config.merge_from_list(list(entry.official_options))
    model = code.model(config, dtype=dtype)
    # A dict without version metadata counts as v1, so v1 names it has.
    with official._quiet():
        model.load_state_dict({registry.v1_key(key): torch.from_numpy(value) for key, value in tensors.items()})
    return model


def network(model: Any, images: list[np.ndarray]) -> dict[str, Any]:
    """The official network's outputs for uint8 images, normalised and padded as the official meta-architecture does."""
    import torch
    from detectron2.structures import ImageList

    tensors = [torch.from_numpy(image.transpose(2, 0, 1).copy()).to(model.pixel_mean.dtype) for image in images]
    task = META_ARCHITECTURES[type(model).__name__](model)
    divisor = getattr(model, "size_divisibility", model.backbone.size_divisibility)
    batch = ImageList.from_tensors([(tensor - model.pixel_mean) / model.pixel_std for tensor in tensors], divisor)
    return task.outputs(getattr(model.sem_seg_head, task.method)(model.backbone(batch.tensor)))


class Calibration:
    """One calibration: the official model, the recipe as it stands, and the hooks that change both together."""

    def __init__(self, entry: registry.Entry):
        self.entry = entry
        self.recipe = initial_recipe(entry)
        self.model = official_model(entry, synthesize.synthesize(entry, SEED, self.recipe))
        self._tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self._handles: list[Any] = []
        self._seen: set[Any] = set()

    def run(self) -> dict[str, synthesize.Draw]:
        """The calibrated recipe."""
        import torch

        photos = photographs()
        self._attach()
        with torch.no_grad():
            network(self.model, [photos["coffee"][:288, :416], photos["chelsea"][:288, :416]])
            for handle in self._handles:
                handle.remove()
            if self.entry.config["head"] == "MaskFormerHead":
                self._tune_heads(photos)
            elif self.entry.config["head"] == "PerPixelBaselinePlusHead":
                factor = CLASS_LOGIT_STD / network(self.model, [photos["coffee"]])["sem_seg"].pow(2).mean().sqrt()
                for leaf in ("weight", "bias"):
                    self._scale(f"sem_seg_head.predictor.mask_embed.layers.2.{leaf}", factor)
        return {key: _rounded(draw) for key, draw in self.recipe.items()}

    def _scale(self, key: str, factor: Any) -> None:
        """Multiplies the tensor, in the recipe and in the model."""
        draw = self.recipe[key]
        self.recipe[key] = synthesize.Draw(draw.gain * float(factor), draw.offset * float(factor), draw.centred, draw.replace)
        self._tensors[key].data.mul_(float(factor))

    def _attach(self) -> None:
        from detectron2 import layers
        from detectron2.modeling.backbone.resnet import BottleneckBlock
        from mask_former.modeling.backbone.swin import SwinTransformerBlock
        from torch import nn

        targets = {"mask_features": 1.0, "sem_seg_head.predictor": CLASS_LOGIT_STD}
        for name, module in self.model.named_modules():
            if isinstance(module, BottleneckBlock):
                self._hook(module.register_forward_pre_hook, functools.partial(self._block, name), module)
            elif isinstance(module, SwinTransformerBlock):
                self._swin_block(name, module)
            elif name.startswith("backbone.layers.") and isinstance(module, nn.Linear):
                if name.endswith((".fc1", ".reduction")):
                    std = 1.0 if name.endswith(".fc1") else STREAM_STD
                    self._hook(module.register_forward_hook, functools.partial(self._affine, name, std), module)
            elif isinstance(module, layers.FrozenBatchNorm2d | nn.GroupNorm):
                self._hook(module.register_forward_pre_hook, functools.partial(self._normalised, name), module)
            elif isinstance(module, nn.Conv2d) and getattr(module, "norm", None) is None:
                std = next((target for end, target in targets.items() if name.endswith(end)), 0.35)
                self._hook(module.register_forward_hook, functools.partial(self._affine, name, std), module)
            elif isinstance(module, nn.MultiheadAttention):
                self._handles.append(module.register_forward_pre_hook(functools.partial(self._logits, name), with_kwargs=True))
                self._hook(module.register_forward_hook, functools.partial(self._attended, name), module)
            elif isinstance(module, nn.Linear) and not name.endswith("out_proj"):
                std = 0.175 if name.endswith("linear2") else 1.0
                self._hook(module.register_forward_hook, functools.partial(self._affine, name, std), module)

    def _hook(self, register: Any, function: Any, module: Any) -> None:
        def first_call_only(*arguments):
            if (function, module) in self._seen:
                return None
            self._seen.add((function, module))
            return function(*arguments)

        self._handles.append(register(first_call_only))

    def _block(self, name, module, inputs):
        """A residual branch adds √(1 / blocks) of its shortcut's deviation: a stage multiplies it by about √e, however deep."""
        stage = self.model.get_submodule(name.rpartition(".")[0])
        shortcut = 1.0 if module.shortcut is not None else float(_deviation(inputs[0]))
        for leaf in ("weight", "bias"):
            self._scale(f"{name}.conv3.norm.{leaf}", math.sqrt(1 / len(stage)) * shortcut)

    def _swin_block(self, name: str, block: Any) -> None:
        """Attention logits as told above; both branches together add √(1 / blocks) of the stream's deviation, as in a ResNet."""
        import torch

        stage = self.model.get_submodule(name.rpartition(".")[0])
        stream: list[float] = []

        def seen(_module, inputs):
            stream.append(float(inputs[0].var(dim=(0, 1)).mean().sqrt()))

        def logits(_module, _inputs, output):
            windows, keys, _ = output.shape
            query, key, _ = output.view(windows, keys, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            spread = (query * block.attn.scale @ key.transpose(-2, -1)).var(-1).mean().sqrt()
            factor = torch.sqrt(LOGIT_STD["attn"] / spread)  # once for queries, once for keys
            self._scale(f"{name}.attn.qkv.weight", factor)
            self._scale(f"{name}.attn.qkv.bias", factor)
            return output * factor

        def branch(path, module, _inputs, output):
            linear = output - module.bias
            factor = stream[0] * math.sqrt(1 / (2 * len(stage))) / linear.var(dim=(0, 1)).mean().sqrt()
            self._scale(f"{name}.{path}.weight", factor)
            return linear * factor + module.bias

        self._hook(block.register_forward_pre_hook, seen, block)
        self._hook(block.attn.qkv.register_forward_hook, logits, block.attn.qkv)
        for path in ("attn.proj", "mlp.fc2"):
            module = block.get_submodule(path)
            self._hook(module.register_forward_hook, functools.partial(branch, path), module)

    def _normalised(self, name, module, inputs):
        factor = CONV_STD / _deviation(inputs[0])
        self._scale(name.removesuffix(".norm") + ".weight", factor)
        return (inputs[0] * factor,)

    def _affine(self, name, target, module, inputs, output):
        """Convolutions and linear layers: the part without the bias gets a root mean square of ``target``."""
        bias = 0.0 if module.bias is None else module.bias[:, None, None] if module.weight.ndim == 4 else module.bias
        linear = output - bias
        factor = target / linear.pow(2).mean().sqrt()
        self._scale(f"{name}.weight", factor)
        return linear * factor + bias

    def _logits(self, name, module, inputs, kwargs):
        import torch

        if name in self._seen:
            return
        self._seen.add(name)
        names = dict(zip(("query", "key"), inputs, strict=False)) | kwargs
        size, heads = module.embed_dim, module.num_heads

        def projected(tensor, part):
            rows = slice(part * size, (part + 1) * size)
            return (tensor @ module.in_proj_weight[rows].T + module.in_proj_bias[rows]).unflatten(-1, (heads, size // heads))

        logits = torch.einsum("qbhd,kbhd->bhqk", projected(names["query"], 0), projected(names["key"], 1)) / math.sqrt(size // heads)
        factor = math.sqrt(LOGIT_STD[name.rpartition(".")[2]] / logits.var(-1).mean().sqrt())  # once for queries, once for keys
        self._scale(f"{name}.in_proj_weight", factor)
        self._scale(f"{name}.in_proj_bias", factor)

    def _attended(self, name, module, inputs, output):
        target = next(rms for part, rms in ATTENTION_RMS.items() if part in name)
        linear = output[0] - module.out_proj.bias
        factor = target / linear.pow(2).mean().sqrt()
        self._scale(f"{name}.out_proj.weight", factor)
        return linear * factor + module.out_proj.bias, output[1]

    def _tune_heads(self, photos: dict[str, np.ndarray]) -> None:
        """Chooses scale and no-object bias of the classes, scale and mean of the masks, by what panoptic inference makes of them."""
        import torch

        predictor = self.model.sem_seg_head.predictor
        config = self.entry.config
        seen: dict[str, Any] = {}
        for name, module in (("features", self.model.sem_seg_head.pixel_decoder.mask_features), ("embed", predictor.mask_embed)):
            self._handles.append(module.register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output})))
        heads = []
        for image in (photos["coffee"], photos["chelsea"]):
            logits = network(self.model, [image])["pred_logits"][0] - predictor.class_embed.bias
            heads.append((logits, seen["embed"][-1, 0] - predictor.mask_embed.layers[2].bias, seen["features"][0]))
        for handle in self._handles:
            handle.remove()

        # What all queries have in common would give nearly all of them one class: the biases take it away.
        common = torch.cat([linear for linear, *_ in heads]).mean(0)
        class_bias, mask_bias = predictor.class_embed.bias, predictor.mask_embed.layers[2].bias
        thresholds = config["test"] if config["test"]["panoptic_on"] else {"object_mask_threshold": 0.7, "overlap_threshold": 0.8}
        self.model.object_mask_threshold, self.model.overlap_threshold = (
            thresholds["object_mask_threshold"],
            thresholds["overlap_threshold"],
        )
        spread = torch.stack([torch.einsum("qc,chw->qhw", embed, features).std() for _, embed, features in heads]).mean()
        settings = []
        for mask_std, mask_mean in itertools.product((2.0, 3.0), (-3, -4, -6)):
            gain = mask_std / spread
            masks = [torch.einsum("qc,chw->qhw", (embed + mask_bias) * gain, features) for _, embed, features in heads]
            offset = (mask_mean - masks[0].mean()) / heads[0][2].sum(0).mean()
            masks = [mask + offset * features.sum(0) for mask, (*_, features) in zip(masks, heads, strict=True)]
            settings.append((float(gain), float(offset), masks))
        enough = (bool(config["thing_classes"]), SEGMENTS)
        best: tuple[Any, ...] = ((False, -1),)
        for class_gain, empty_share in itertools.product((4, 6, 8, 10), (0.7, 0.5, 0.3)):  # the smallest gain that will do
            logits = [(linear - common) * class_gain + class_bias for linear, *_ in heads]
            rise = torch.quantile(torch.cat([linear[:, :-1].max(-1).values - linear[:, -1] for linear in logits]), empty_share)
            for linear in logits:
                linear[:, -1] += rise
            for gain, offset, masks in settings:
                found = [self._segments(linear, mask) for linear, mask in zip(logits, masks, strict=True)]
                score = (all(mixed for _, mixed in found), min(SEGMENTS, *(segments for segments, _ in found)))
                if score > best[0]:
                    best = (score, class_gain, float(rise), gain, offset)
                if score == enough:
                    break
            if best[0] == enough:
                break
        _, class_gain, rise, embed_gain, embed_offset = best
        print(f"{self.entry.name}: heads {best}", file=sys.stderr)
        prefix = "sem_seg_head.predictor."
        self._scale(f"{prefix}class_embed.weight", class_gain)
        values = class_bias - common * class_gain
        values[-1] += rise
        bias = f"{prefix}class_embed.bias"
        self.recipe[bias] = synthesize.Draw(self.recipe[bias].gain, replace={index: float(value) for index, value in enumerate(values)})
        for leaf in ("weight", "bias"):
            self._scale(f"{prefix}mask_embed.layers.2.{leaf}", embed_gain)
        draw = self.recipe[f"{prefix}mask_embed.layers.2.bias"]
        self.recipe[f"{prefix}mask_embed.layers.2.bias"] = synthesize.Draw(draw.gain, embed_offset)

    def _segments(self, logits: Any, masks: Any) -> tuple[int, bool]:
        """How many segments the official panoptic inference finds, and whether both things and stuff are among them."""
        import torch

        things = self.entry.config["thing_classes"]
        self.model.metadata = types.SimpleNamespace(thing_dataset_id_to_contiguous_id={index: index for index in things})
        scores, labels = logits.softmax(-1).max(-1)
        kept = (labels != logits.shape[-1] - 1) & (scores > self.model.object_mask_threshold)
        if not kept.any():
            return 0, False
        large = torch.nn.functional.interpolate(masks[kept][None], scale_factor=4, mode="bilinear")[0]
        segments = self.model.panoptic_inference(logits[kept], large)[1]
        return len(segments), len({segment["isthing"] for segment in segments}) == 2


def _deviation(tensor: Any) -> Any:
    """Deviation within a channel over images and positions; root mean square over channels. The channels' means do not count."""
    return tensor.var(dim=(0, 2, 3)).mean().sqrt()


def _rounded(draw: synthesize.Draw) -> synthesize.Draw:
    def four(value: float) -> float:
        return float(f"{value:.4g}")

    return synthesize.Draw(four(draw.gain), four(draw.offset), draw.centred, {index: four(value) for index, value in draw.replace.items()})


def write_recipe(entry: registry.Entry, recipe: dict[str, synthesize.Draw], folder: pathlib.Path) -> None:
    """``<folder>/<entry>.json``, a line for each tensor."""
    rows = []
    for key, draw in recipe.items():
        options: dict[str, Any] = {"centred": True} if draw.centred else {}
        if draw.replace:
            options["replace"] = {str(index): value for index, value in draw.replace.items()}
        rows.append(json.dumps([key, draw.gain, draw.offset, options]))
    how_made = f"python -m parity.calibrate {entry.name}"
    text = f'{{\n  "how_made": "{how_made}",\n  "tensors": [\n    ' + ",\n    ".join(rows) + "\n  ]\n}\n"
    (folder / f"{entry.name}.json").write_text(text, encoding="utf-8")


def check(entry: registry.Entry) -> dict[str, Any]:
    """Properties of an entry's synthetic checkpoint (seed 0) in the official model; what each figure should be is in the decision page.

    Taps, the effect of eps and gradients are measured on a corner of one photograph, 192 × 256 px, outputs and assignments on all of it.
    """
    import torch

    photos = photographs()
    tensors = synthesize.synthesize(entry, SEED)
    double, single = official_model(entry, tensors), official_model(entry, tensors, "float32")
    corner = photos["coffee"][64:256, 128:384]
    figures: dict[str, Any] = {"entry": entry.name}
    with torch.no_grad():
        outputs = {name: network(double, [photos[name]]) for name in ("coffee", "chelsea")}
        coffee, rounded = outputs["coffee"], network(single, [photos["coffee"]])
        figures["float32 error of outputs"] = {
            key: max(_relative(a, b) for a, b in zip(_layers(rounded, key), _layers(coffee, key), strict=True)) for key in _keys(coffee)
        }
        figures |= _tap_figures(double, single, corner)
        figures["effect of eps 1e-6"] = _eps_figures(double, corner)
        if "sem_seg" in coffee:
            labels = {name: output["sem_seg"][0].argmax(0) for name, output in outputs.items()}
            shares = {name: label.flatten().bincount() / label.numel() for name, label in labels.items()}
            figures["found"] = {name: {"semantic classes above 1 %": int((share > 0.01).sum())} for name, share in shares.items()}
            return figures
        figures["distance between queries, least and median"] = {key: _query_distances(coffee[key][0].flatten(1)) for key in _keys(coffee)}
        figures["distance between two photos"] = {
            "pred_logits": _relative(outputs["chelsea"]["pred_logits"], coffee["pred_logits"]),
            "pred_masks": _relative(*(_thumbnail(outputs[name]["pred_masks"]) for name in ("chelsea", "coffee"))),
        }
        figures["mask logits, quantiles 1 50 99 %"] = _quantiles(coffee["pred_masks"], (0.01, 0.5, 0.99))
        figures["found"] = {name: _found(double, entry, output, photos[name].shape[:2]) for name, output in outputs.items()}
        figures |= _assignment_figures(double, entry, coffee, rounded, photos["coffee"].shape[:2])
    figures |= _gradient_figures(double, entry, corner)
    return figures


def _keys(output: dict[str, Any]) -> list[str]:
    return [key for key in output if key != "aux_outputs"]


def _relative(actual: Any, expected: Any) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def _layers(output: dict[str, Any], key: str) -> list[Any]:
    return [*(layer[key] for layer in output.get("aux_outputs", ())), output[key]]


def _thumbnail(masks: Any) -> Any:
    import torch

    return torch.nn.functional.adaptive_avg_pool2d(masks, 32)


def _quantiles(tensor: Any, shares: tuple[float, ...]) -> list[float]:
    return [round(float(value), 3) for value in np.quantile(tensor.numpy(), shares)]


def _query_distances(rows: Any) -> list[float]:
    """Least and median distance of two queries, over all pairs, relative to the queries' norm (root mean square)."""
    import torch

    distances = torch.pdist(rows) / rows.norm(dim=1).pow(2).mean().sqrt()
    return [round(float(distances.min()), 4), round(float(distances.median()), 4)]


def _found(model: Any, entry: registry.Entry, output: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """What official inference finds at the photograph's own size (all sizes here are at most a divisor away from the padded one)."""
    import torch

    logits, masks = output["pred_logits"][0], output["pred_masks"]
    padded = [4 * side for side in masks.shape[-2:]]
    masks = torch.nn.functional.interpolate(masks, padded, mode="bilinear", align_corners=False)[0][:, : size[0], : size[1]]
    labels = model.semantic_inference(logits, masks).argmax(0)
    found: dict[str, Any] = {"semantic classes above 1 %": int((labels.flatten().bincount() > 0.01 * labels.numel()).sum())}
    if entry.config["test"]["panoptic_on"]:
        segments = model.panoptic_inference(logits, masks)[1]
        things = sum(segment["isthing"] for segment in segments)
        found |= {"things": things, "stuff": len(segments) - things}
    return found


def _tap_figures(double: Any, single: Any, image: np.ndarray) -> dict[str, Any]:
    """Error, size and liveliness of every module's output."""
    import torch

    taps: dict[str, Any] = {}
    errors: dict[Any, float] = {}
    live, attention = {}, {}

    def keep(name, module, _, output):
        tensor = output[0] if isinstance(output, tuple) else output
        if not isinstance(tensor, torch.Tensor):
            return
        taps.setdefault(name, []).append(tensor.clone())
        if isinstance(module, torch.nn.MultiheadAttention):
            attention[name] = output[1]
        if isinstance(module, torch.nn.ReLU | torch.nn.Dropout) or name.endswith(("linear1", ".conv1", ".conv2")):
            live[name] = float((tensor > 0).double().mean())

    def compare(name, module, _, output):
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, torch.Tensor):
            index = sum(key[0] == name for key in errors)
            expected = taps[name][index]
            if float(expected.norm()):
                errors[name, index] = _relative(tensor, expected)

    for model, function in ((double, keep), (single, compare)):
        handles = [module.register_forward_hook(functools.partial(function, name)) for name, module in model.named_modules() if name]
        network(model, [image])
        for handle in handles:
            handle.remove()
    worst = max(errors, key=lambda key: errors[key])
    sizes = {name: float(tensors[0].pow(2).mean().sqrt()) for name, tensors in taps.items()}
    keys = {name: float(weights.clamp_min(1e-30).log().mul(-weights).sum(-1).exp().median()) for name, weights in attention.items()}
    return {
        "float32 error of taps": {
            "median": float(np.median(list(errors.values()))),
            "worst": errors[worst],
            "at": "#".join(map(str, worst)),
            "taps": len(errors),
        },
        "root mean square of taps": [round(min(sizes.values()), 4), round(max(sizes.values()), 4)],
        "share of positive elements before or after a ReLU": [round(min(live.values()), 3), round(max(live.values()), 3)],
        "keys that an attention's average over heads spreads over": [round(min(keys.values()), 1), round(max(keys.values()), 1)],
        "keys there are": sorted({weights.shape[-1] for weights in attention.values()}),
    }


def _eps_figures(model: Any, image: np.ndarray) -> dict[str, float]:
    """Relative change of both outputs, the larger, when eps goes from 1e-5 to 1e-6 in all norms of one kind."""
    from detectron2 import layers
    from torch import nn

    expected = network(model, [image])
    figures = {}
    for kind in (layers.FrozenBatchNorm2d, nn.GroupNorm, nn.LayerNorm):
        modules = [module for module in model.modules() if isinstance(module, kind)]
        for module in modules:
            module.eps = 1e-6
        actual = network(model, [image])
        for module in modules:
            module.eps = 1e-5
        figures[kind.__name__] = max(_relative(actual[key], expected[key]) for key in _keys(expected))
    return figures


def _targets(entry: registry.Entry, size: tuple[int, int], canvas: tuple[int, int], objects: int = 6) -> list[dict[str, Any]]:
    import torch

    from parity.inputs import make_targets

    labels, masks = make_targets(*size, objects, entry.config["num_classes"], "seed 0 image 0")
    padded = np.zeros((objects, *canvas), bool)
    padded[:, : size[0], : size[1]] = masks
    return [{"labels": torch.from_numpy(labels), "masks": torch.from_numpy(padded)}]


def _assignment_figures(model: Any, entry: registry.Entry, double: Any, single: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Assignments of generated objects at every layer, the gap to the second best, and the noise of float32 costs."""
    from scipy.optimize import linear_sum_assignment

    canvas = tuple(4 * side for side in double["pred_masks"].shape[-2:])
    targets = _targets(entry, size, canvas)
    assignments, gaps, noises = [], [], []
    for layer in range(len(double["aux_outputs"]) + 1):
        costs = [
            _cost({key: _layers(output, key)[layer] for key in ("pred_logits", "pred_masks")}, targets, model.criterion.matcher)
            for output in (double, single)
        ]
        rows, columns = linear_sum_assignment(costs[0])
        best = costs[0][rows, columns].sum()
        others = []
        for row, column in zip(rows, columns, strict=True):  # the second best lacks one pair of the best
            without = costs[0].copy()
            without[row, column] = 1e6
            others.append(without[linear_sum_assignment(without)].sum())
        assignments.append([int(row) for row in rows[np.argsort(columns)]])
        gaps.append(float(min(others) - best))
        noises.append(float(abs(costs[1] - costs[0]).max()))
    return {
        "assignments": assignments,
        "gap to the second best assignment": [round(gap, 5) for gap in gaps],
        "noise of costs": max(noises),
        "least gap over noise": min(gap / noise for gap, noise in zip(gaps, noises, strict=True)),
    }


def _cost(output: Any, targets: list[dict[str, Any]], matcher: Any) -> np.ndarray:
    """float64 [queries, objects], as the official matcher computes it (in the output's dtype)."""
    import torch
    from mask_former.modeling.matcher import batch_dice_loss, batch_sigmoid_focal_loss

    masks = output["pred_masks"][0]
    wanted = torch.nn.functional.interpolate(targets[0]["masks"][:, None].to(masks), masks.shape[-2:], mode="nearest").flatten(1)
    cost_class = -output["pred_logits"][0].softmax(-1)[:, targets[0]["labels"]]
    cost_mask, cost_dice = batch_sigmoid_focal_loss(masks.flatten(1), wanted), batch_dice_loss(masks.flatten(1), wanted)
    return (matcher.cost_mask * cost_mask + matcher.cost_class * cost_class + matcher.cost_dice * cost_dice).double().numpy()


def _gradient_figures(model: Any, entry: registry.Entry, image: np.ndarray) -> dict[str, Any]:
    """Losses and the gradients of their weighted sum, with the images' normalisation and padding as at inference."""
    output = network(model, [image])
    canvas = tuple(4 * side for side in output["pred_masks"].shape[-2:])
    losses = model.criterion(output, _targets(entry, image.shape[:2], canvas))
    weights = model.criterion.weight_dict
    sum(loss * weights[name] for name, loss in losses.items()).backward()
    norms = {name: float(parameter.grad.norm()) for name, parameter in model.named_parameters()}
    sizes = {
        name: norm / float(parameter.detach().norm()) for (name, norm), parameter in zip(norms.items(), model.parameters(), strict=True)
    }
    still = [name for name, norm in norms.items() if norm < 1e-9]
    moving = {name: size for name, size in sizes.items() if name not in still}
    least, most = min(moving, key=lambda name: moving[name]), max(moving, key=lambda name: moving[name])
    return {
        "losses": {name: round(float(losses[name].detach()), 4) for name in ("loss_ce", "loss_mask", "loss_dice")},
        "gradient norm": math.sqrt(sum(norm**2 for norm in norms.values())),
        "gradient over parameter, least and most": {least: moving[least], most: moving[most]},
        "without a gradient": still,
    }


def main(argv: list[str] | None = None) -> int:
    """Calibrates or checks the entries named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="+", metavar="ENTRY")
    parser.add_argument("--check", action="store_true", help="print the properties of the committed recipes instead")
    parser.add_argument("--recipes", type=pathlib.Path, default=pathlib.Path("checkpoints/recipes"), help="folder of the recipes")
    arguments = parser.parse_args(argv)
    for entry in map(registry.entry, arguments.entries):
        if arguments.check:
            print(json.dumps(check(entry), indent=2))
        else:
            write_recipe(entry, Calibration(entry).run(), arguments.recipes)
    return 0


if __name__ == "__main__":
    sys.exit(main())

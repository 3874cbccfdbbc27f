"""Records ``huggingface_layouts.json`` beside this file: names, shapes and dtypes of the MaskFormers of Hugging Face's transformers.

python tests/golden/record_huggingface.py

Needs PyTorch and transformers, but neither the network nor weights: what is not initialised has a name, too.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from checkpoints import registry
from tfmaskformer.config import RESNET_BLOCKS

ENTRIES = (
    "maskformer_panoptic_swin_tiny_bs64_554k",
    "maskformer_swin_small_bs16_160k",
    "maskformer_swin_base_IN21k_384_bs16_160k_res640",
    "maskformer_panoptic_swin_large_IN21k_384_bs64_554k",
    "maskformer_R50_bs32_60k",
    "maskformer_R101_bs16_90k",
)
"""One of each architecture that transformers has."""


def transformers_config(entry: registry.Entry):
    """The configuration of transformers for an entry, written from its documentation; what is not set has the official value."""
    import transformers

    ours, predictor = entry.config["backbone"], entry.config["predictor"]
    if ours["name"] == "ResNet":
        widths = [ours["res2_out_channels"] * 2**stage for stage in range(4)]
        backbone = transformers.ResNetConfig(
            embedding_size=ours["stem_out_channels"],
            hidden_sizes=widths,
            depths=list(RESNET_BLOCKS[ours["depth"]]),
            layer_type="bottleneck",
            out_indices=[1, 2, 3, 4],
        )
    else:
        backbone = transformers.SwinConfig(
            embed_dim=ours["embed_dim"],
            depths=ours["depths"],
            num_heads=ours["num_heads"],
            window_size=ours["window_size"],
            out_indices=[1, 2, 3, 4],
        )
    decoder = transformers.DetrConfig(
        d_model=predictor["hidden_dim"],
        num_queries=predictor["num_queries"],
        decoder_layers=predictor["dec_layers"],
        decoder_ffn_dim=predictor["dim_feedforward"],
        decoder_attention_heads=predictor["nheads"],
    )
    return transformers.MaskFormerConfig(
        backbone_config=backbone,
        decoder_config=decoder,
        fpn_feature_size=entry.config["pixel_decoder"]["conv_dim"],
        mask_feature_size=entry.config["pixel_decoder"]["mask_dim"],
        no_object_weight=entry.config["criterion"]["no_object_weight"],
        num_labels=entry.config["num_classes"],
    )


def layouts(entry: registry.Entry) -> dict[str, list[tuple]]:
    """Name, shape and dtype of every tensor in the file that ``save_pretrained`` writes; and of those that the module calls otherwise."""
    import safetensors
    import torch
    from transformers import MaskFormerForInstanceSegmentation

    with torch.device("meta"):
        model = MaskFormerForInstanceSegmentation(transformers_config(entry))
    model.to_empty(device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safetensors.safe_open(Path(folder) / "model.safetensors", "pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 a file is no dict
    own = model.state_dict()
    order = {name: index for index, name in enumerate(own)}
    saved = dict(sorted(saved.items(), key=lambda item: order.get(item[0], len(order))))
    own = {name: tensor for name, tensor in own.items() if name not in saved}
    return {
        kind: [(name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in tensors.items()]
        for kind, tensors in (("saved", saved), ("own", own))
    }


def main(folder: Path) -> None:
    import transformers

    how_made = f"python tests/golden/record_huggingface.py, with transformers {transformers.__version__}"
    text = json.dumps({"how_made": how_made, "entries": {name: layouts(registry.entry(name)) for name in ENTRIES}})
    text = text.replace(' ["', '\n["').replace('[["', '[\n["').replace(' "maskformer', '\n"maskformer')
    (folder / "huggingface_layouts.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parent)

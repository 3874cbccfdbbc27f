"""Official names → those in files of Hugging Face's transformers, written without the table that it tests."""

from __future__ import annotations

import re

ENCODER = "model.pixel_level_module.encoder."


def renamed(tensors):
    """Official tensors under transformers' names, and cut as there: what its conversion scripts do, without the table."""
    result = {}
    for name, tensor in tensors.items():
        new, kind = name.rsplit(".", 1)
        if new.startswith("backbone."):
            new = new.replace("backbone.", ENCODER, 1)
            for theirs, ours in (
                ("stem.conv1.norm", "embedder.embedder.normalization"),
                ("stem.conv1", "embedder.embedder.convolution"),
                ("patch_embed.proj", "model.embeddings.patch_embeddings.projection"),
                ("patch_embed.norm", "model.embeddings.norm"),
                ("encoder.layers", "encoder.model.encoder.layers"),
                ("attn.proj", "attention.output.dense"),
                (".attn", ".attention.self"),
                ("mlp.fc1", "intermediate.dense"),
                ("mlp.fc2", "output.dense"),
            ):
                new = new.replace(theirs, ours)
            new = re.sub(r"\.norm1$", ".layernorm_before", re.sub(r"(?<=\d)\.norm2$", ".layernorm_after", new)) if "blocks" in new else new
            new = re.sub(r"encoder\.norm(\d)$", r"encoder.hidden_states_norms.\1", new)
            if stage := re.search(r"\.res(\d)\.", new):
                new = new.replace(stage[0], f".encoder.stages.{int(stage[1]) - 2}.layers.")
                new = re.sub(r"\.norm$", ".normalization", new if new.endswith(".norm") else new + ".convolution")
                new = re.sub(r"\.conv([123])\.", lambda match: f".layer.{int(match[1]) - 1}.", new)
        elif level := re.search(r"(adapter|layer)_(\d)(\.norm)?$", new):
            place = {"adapter": "proj", "layer": "block"}[level[1]]
            where = "stem" if level[2] == "4" else f"layers.{3 - int(level[2])}.{place}"
            new = f"model.pixel_level_module.decoder.fpn.{where}.{1 if level[3] else 0}"
        elif layer := re.search(r"transformer\.decoder\.layers\.(\d+)\.(.*)$", new):
            module = {
                "linear1": "fc1",
                "linear2": "fc2",
                "norm1": "self_attn_layer_norm",
                "norm2": "encoder_attn_layer_norm",
                "norm3": "final_layer_norm",
            }.get(layer[2], layer[2].replace("multihead_attn", "encoder_attn"))
            new = f"model.transformer_module.decoder.layers.{layer[1]}.{module}"
        else:
            new = {
                "sem_seg_head.pixel_decoder.mask_features": "model.pixel_level_module.decoder.mask_projection",
                "sem_seg_head.predictor.transformer.decoder.norm": "model.transformer_module.decoder.layernorm",
                "sem_seg_head.predictor.query_embed": "model.transformer_module.queries_embedder",
                "sem_seg_head.predictor.input_proj": "model.transformer_module.input_projection",
                "sem_seg_head.predictor.class_embed": "class_predictor",
                "sem_seg_head.predictor.mask_embed.layers.0": "mask_embedder.0.0",
                "sem_seg_head.predictor.mask_embed.layers.1": "mask_embedder.1.0",
                "sem_seg_head.predictor.mask_embed.layers.2": "mask_embedder.2.0",
                "criterion": "criterion",
            }[new]
        if "in_proj" in kind or new.endswith(".qkv"):
            third = tensor.shape[0] // 3
            for part, letter in enumerate("qkv"):
                cut = new.removesuffix("qkv") + ("query", "key", "value")[part] if new.endswith("qkv") else f"{new}.{letter}_proj"
                result[f"{cut}.{kind.removeprefix('in_proj_')}"] = tensor[part * third : (part + 1) * third]
        else:
            result[f"{new}.{kind}"] = tensor
    return result

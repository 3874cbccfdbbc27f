"""Rules for the MaskFormer of Hugging Face's transformers: its names and cuts → the official v2 names, in PyTorch's layout.

A section is what the names of a module begin with, here and there, and one line for each kind of tensor in it: name, official name, and
which part of the official tensor it is. The names are those of the files that ``save_pretrained`` writes; from 5.0 on the module itself
calls a few of its tensors otherwise (``o_proj``, ``mlp.fc1``), which are taken too.
"""

from __future__ import annotations

TABLE = "huggingface/1"
"""Name and version; the version grows with every change of what a rule does."""

Part = tuple[int, int]
"""Which of how many equal parts, along the first axis."""

WHOLE: Part = (0, 1)
QUERY: Part = (0, 3)
KEY: Part = (1, 3)
VALUE: Part = (2, 3)

Sections = tuple[tuple[str, str, tuple[tuple[str, str, Part], ...]], ...]
Reasons = tuple[tuple[str, str], ...]

# fmt: off
RESNET: Sections = (
    ("model.pixel_level_module.encoder.embedder.embedder.", "backbone.stem.", (
        ("convolution.weight", "conv1.weight", WHOLE),
        ("normalization.{stat:weight|bias|running_mean|running_var}", "conv1.norm.{stat}", WHOLE),
    )),
    ("model.pixel_level_module.encoder.encoder.stages.{stage:0→2|1→3|2→4|3→5}.layers.{block}.", "backbone.res{stage}.{block}.", (
        ("layer.{i:0→1|1→2|2→3}.convolution.weight", "conv{i}.weight", WHOLE),
        ("layer.{i:0→1|1→2|2→3}.normalization.{stat:weight|bias|running_mean|running_var}", "conv{i}.norm.{stat}", WHOLE),
        ("shortcut.convolution.weight", "shortcut.weight", WHOLE),
        ("shortcut.normalization.{stat:weight|bias|running_mean|running_var}", "shortcut.norm.{stat}", WHOLE),
    )),
)
SWIN: Sections = (
    ("model.pixel_level_module.encoder.model.embeddings.", "backbone.patch_embed.", (
        ("patch_embeddings.projection.{param:weight|bias}", "proj.{param}", WHOLE),
        ("norm.{param:weight|bias}", "norm.{param}", WHOLE),
    )),
    ("model.pixel_level_module.encoder.model.encoder.layers.{stage}.blocks.{block}.", "backbone.layers.{stage}.blocks.{block}.", (
        ("layernorm_before.{param:weight|bias}", "norm1.{param}", WHOLE),
        ("attention.self.query.{param:weight|bias}", "attn.qkv.{param}", QUERY),
        ("attention.self.key.{param:weight|bias}", "attn.qkv.{param}", KEY),
        ("attention.self.value.{param:weight|bias}", "attn.qkv.{param}", VALUE),
        ("attention.self.{table:relative_position_bias_table|relative_position_index}", "attn.{table}", WHOLE),
        ("attention.output.dense.{param:weight|bias}", "attn.proj.{param}", WHOLE),
        ("layernorm_after.{param:weight|bias}", "norm2.{param}", WHOLE),
        ("intermediate.dense.{param:weight|bias}", "mlp.fc1.{param}", WHOLE),
        ("output.dense.{param:weight|bias}", "mlp.fc2.{param}", WHOLE),
    )),
    ("model.pixel_level_module.encoder.model.encoder.layers.{stage}.downsample.", "backbone.layers.{stage}.downsample.", (
        ("reduction.weight", "reduction.weight", WHOLE),
        ("norm.{param:weight|bias}", "norm.{param}", WHOLE),
    )),
    ("model.pixel_level_module.encoder.", "backbone.", (
        ("hidden_states_norms.{stage}.{param:weight|bias}", "norm{stage}.{param}", WHOLE),
    )),
)
PIXEL_DECODER: Sections = (
    ("model.pixel_level_module.decoder.", "sem_seg_head.pixel_decoder.", (
        ("fpn.stem.0.weight", "layer_4.weight", WHOLE),
        ("fpn.stem.1.{param:weight|bias}", "layer_4.norm.{param}", WHOLE),
        ("fpn.layers.{level:0→3|1→2|2→1}.proj.0.weight", "adapter_{level}.weight", WHOLE),
        ("fpn.layers.{level:0→3|1→2|2→1}.proj.1.{param:weight|bias}", "adapter_{level}.norm.{param}", WHOLE),
        ("fpn.layers.{level:0→3|1→2|2→1}.block.0.weight", "layer_{level}.weight", WHOLE),
        ("fpn.layers.{level:0→3|1→2|2→1}.block.1.{param:weight|bias}", "layer_{level}.norm.{param}", WHOLE),
        ("mask_projection.{param:weight|bias}", "mask_features.{param}", WHOLE),
    )),
)
PREDICTOR: Sections = (
    ("model.transformer_module.", "sem_seg_head.predictor.", (
        ("queries_embedder.weight", "query_embed.weight", WHOLE),
        ("input_projection.{param:weight|bias}", "input_proj.{param}", WHOLE),
        ("decoder.layernorm.{param:weight|bias}", "transformer.decoder.norm.{param}", WHOLE),
    )),
    ("model.transformer_module.decoder.layers.{n}.", "sem_seg_head.predictor.transformer.decoder.layers.{n}.", (
        ("{attention:self_attn|encoder_attn→multihead_attn}.q_proj.{param:weight|bias}", "{attention}.in_proj_{param}", QUERY),
        ("{attention:self_attn|encoder_attn→multihead_attn}.k_proj.{param:weight|bias}", "{attention}.in_proj_{param}", KEY),
        ("{attention:self_attn|encoder_attn→multihead_attn}.v_proj.{param:weight|bias}", "{attention}.in_proj_{param}", VALUE),
        ("{attention:self_attn|encoder_attn→multihead_attn}.{out:out_proj|o_proj→out_proj}.{param:weight|bias}",
         "{attention}.{out}.{param}", WHOLE),
        ("self_attn_layer_norm.{param:weight|bias}", "norm1.{param}", WHOLE),
        ("encoder_attn_layer_norm.{param:weight|bias}", "norm2.{param}", WHOLE),
        ("{linear:fc1→linear1|mlp.fc1→linear1}.{param:weight|bias}", "{linear}.{param}", WHOLE),
        ("{linear:fc2→linear2|mlp.fc2→linear2}.{param:weight|bias}", "{linear}.{param}", WHOLE),
        ("final_layer_norm.{param:weight|bias}", "norm3.{param}", WHOLE),
    )),
    ("", "", (
        ("class_predictor.{param:weight|bias}", "sem_seg_head.predictor.class_embed.{param}", WHOLE),
        ("mask_embedder.{n}.0.{param:weight|bias}", "sem_seg_head.predictor.mask_embed.layers.{n}.{param}", WHOLE),
        ("criterion.empty_weight", "criterion.empty_weight", WHOLE),
    )),
)
DROPS: Reasons = (
    ("model.pixel_level_module.encoder.model.layernorm.{param:weight|bias}",
     "a norm behind Swin's last stage, whose output MaskFormer does not use: its levels have the norms hidden_states_norms.0 … 3"),
    ("model.pixel_level_module.encoder.embedder.embedder.normalization.num_batches_tracked", "of no use to frozen batch norm"),
    ("model.pixel_level_module.encoder.encoder.stages.{stage}.layers.{block}.{conv:layer.0|layer.1|layer.2|shortcut}"
     ".normalization.num_batches_tracked", "of no use to frozen batch norm"),
)
# fmt: on

SECTIONS = RESNET + SWIN + PIXEL_DECODER + PREDICTOR

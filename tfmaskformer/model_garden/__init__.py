"""TensorFlow Model Garden: the official recipes as experiments of ``exp_factory``, trained by its Orbit trainer.

    import tfmaskformer.model_garden.task  # registers them

    params = exp_factory.get_exp_config("maskformer_panoptic_R50_bs64_554k")

Or ``python -m tfmaskformer.model_garden``. docs/model_garden.md tells what to install.
"""

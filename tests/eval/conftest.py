"""A tiny open_clip model with random weights, as a folder."""

import json

import pytest

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    config = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = open_clip.CLIP(**CONFIG).state_dict()
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in weights.items()},
        folder / "open_clip_model.safetensors",
    )
    return str(folder)

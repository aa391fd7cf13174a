import json

import open_clip
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from assembly_specs import TOWERS, assembly, pictures
from shared.errors import UserError
from shared.models.vocabulary import SharedVocabulary
from shared.training.distiller import Distiller
from vlm_distill.clip_conversion import clip_image_processor
from vlm_distill.modeling import OpenClipVisionConfig, OpenClipVisionModel
from vlm_distill.processing import OpenClipImageProcessor
from vlm_distill.projectors import reduce_grid
from vlm_distill.towers import TowerSpec, open_tower, patch_tokens

VISION = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": VISION,
    "text_cfg": {"vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
SHAPES = {  # block and grid, chosen by hand for each kind of tower
    "clip": (1, (4, 4), 32),
    "resnet": (2, (4, 4), 64),
    "timm-transformer": (None, (4, 4), 64),
    "timm-computed-buffers": (None, (4, 4), 96),
    "timm-convolutional": (2, (4, 4), 48),
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A whole CLIP model as open_clip stores it, with preprocessing of its own."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(5)
    model = open_clip.model.CLIP(**CLIP)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    stored = {"model_cfg": CLIP, "preprocess_cfg": preprocess | {"resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(stored))
    return folder


@pytest.mark.parametrize("name", TOWERS)
def test_every_kind_of_tower_gives_a_grid_of_tokens(name):
    tower = open_tower(TowerSpec.model_validate(TOWERS[name]), seed=1)
    layer, grid, width = SHAPES[name]
    assert (tuple(tower.config["grid"]), tower.config["hidden_size"]) == (grid, width)
    assert layer is None or tower.config["layer"] == layer
    size = tower.preprocess["size"]
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    tokens = patch_tokens(tower.module.eval(), pixels, tower.config["layer"])
    assert tokens.shape == (2, grid[0] * grid[1], width)
    built = OpenClipVisionModel(OpenClipVisionConfig(**tower.config)).eval()
    built.tower.load_state_dict(tower.module.state_dict())
    assert torch.equal(built(pixels).last_hidden_state, tokens)


@pytest.mark.parametrize("name", ["clip", "timm-transformer", "timm-convolutional"])
def test_tokens_stand_where_their_patch_is(name):
    tower = open_tower(TowerSpec.model_validate(TOWERS[name] | {"layer": 0}), seed=1)
    rows, columns = tower.config["grid"]
    size = tower.preprocess["size"]
    blank = torch.zeros(1, 3, size, size)
    spot = blank.clone()
    row, column = rows - 2, 1
    spot[:, :, row * size // rows + 1, column * size // columns + 1] = 5.0
    with torch.no_grad():
        difference = patch_tokens(tower.module, spot, 0) - patch_tokens(tower.module, blank, 0)
    assert int(difference.norm(dim=-1).argmax()) == row * columns + column


@pytest.mark.parametrize("name", TOWERS)
def test_a_cut_tower_has_no_weight_that_its_tokens_do_not_need(name):
    tower = open_tower(TowerSpec.model_validate(TOWERS[name]), seed=1)
    size = tower.preprocess["size"]
    tokens = patch_tokens(tower.module, torch.randn(1, 3, size, size), tower.config["layer"])
    parameters = dict(tower.module.named_parameters())
    gradients = torch.autograd.grad(tokens.square().sum(), list(parameters.values()), allow_unused=True)
    assert not [key for key, given in zip(parameters, gradients, strict=True) if given is None]


def test_a_folder_brings_weights_and_preprocessing(clip_folder):
    tower = open_tower(TowerSpec(model=f"local-dir:{clip_folder}", layer=-1))
    whole, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip_folder}")
    pixels = torch.randn(1, 3, 32, 32)
    expected = whole.visual.forward_intermediates(pixels, indices=1, output_fmt="NLC")
    tokens = patch_tokens(tower.module, pixels, tower.config["layer"])
    torch.testing.assert_close(tokens, expected["image_intermediates"][-1])
    processed = OpenClipImageProcessor(**tower.preprocess)(pictures(2), return_tensors="pt")
    assert torch.equal(processed["pixel_values"], torch.stack([preprocess(image) for image in pictures(2)]))


def test_weights_of_a_tower_or_of_a_whole_model_fit_another_image_size(clip_folder, tmp_path):
    whole = open_clip.create_model(f"local-dir:{clip_folder}")
    save_file(whole.visual.state_dict(), tmp_path / "tower.safetensors")
    of_model, of_tower = (
        open_tower(TowerSpec(model=CLIP, weights=str(path), image_size=48))
        for path in (clip_folder / "open_clip_model.safetensors", tmp_path / "tower.safetensors")
    )
    expected = open_clip.create_model(f"local-dir:{clip_folder}", force_image_size=48).visual
    for tower in (of_model, of_tower):
        assert tower.config["grid"] == [6, 6]
        assert torch.equal(tower.module.positional_embedding, expected.positional_embedding)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, 32),
        ({"resize_mode": "squash", "interpolation": "bilinear"}, 32),
        ({"resize_mode": "longest"}, 24),
    ],
)
def test_preprocessing_is_open_clips(settings, size):
    spec = TowerSpec(model=CLIP, image_size=size, preprocess=settings)
    cfg = open_tower(spec).preprocess
    assert cfg["size"] == size and settings.items() <= cfg.items()
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**cfg), is_train=False
    )
    for shape in ((50, 40), (20, 31)):
        images = pictures(2, shape)
        expected = torch.stack([transform(image) for image in images])
        processor = OpenClipImageProcessor(**cfg)
        assert torch.equal(processor(images, return_tensors="pt")["pixel_values"], expected)
        palette = [image.convert("P") for image in images]
        again = torch.stack([transform(image.convert("RGB")) for image in palette])
        assert torch.equal(processor(palette, return_tensors="pt")["pixel_values"], again)
        if settings.get("resize_mode") != "longest":
            native = clip_image_processor(cfg)(images, return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(native, expected, atol=1e-5, rtol=1e-5)


def test_batch_normalisation_keeps_its_statistics_in_training():
    config = OpenClipVisionConfig(**open_tower(TowerSpec.model_validate(TOWERS["resnet"])).config)
    model = OpenClipVisionModel(config)
    Distiller(model, SharedVocabulary(1, ()), normalization="response").train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    pixels = torch.randn(3, 3, 32, 32)
    together = model(pixels).last_hidden_state
    alone = torch.cat([model(image[None]).last_hidden_state for image in pixels])
    torch.testing.assert_close(together, alone)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_reductions_keep_the_places_of_their_cells():
    tokens = torch.arange(2 * 24 * 3).reshape(2, 4 * 6, 3).float()
    grid = tokens.reshape(2, 4, 6, 3)
    pooled = reduce_grid(tokens, (4, 6), "average_pool", 2)
    shuffled = reduce_grid(tokens, (4, 6), "pixel_shuffle", 2)
    for row in range(2):
        for column in range(3):
            cell = grid[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(pooled[:, row * 3 + column], cell.mean(dim=(1, 2)))
            assert torch.equal(shuffled[:, row * 3 + column], cell.flatten(1))
    assert reduce_grid(tokens, (4, 6), "none", 1) is tokens


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model": "ViT-B-23"}, "unknown open_clip model 'ViT-B-23'.*Did you mean 'ViT-B-32'"),
        ({"model": CLIP, "layer": 3}, "layer 3: this tower gives the features of 3 blocks, so use -3 to 2"),
        ({"model": {"width": 3}}, "keys 'width'; a configuration of open_clip has embed_dim, vision_cfg"),
        ({"model": {"vision_cfg": {"depth": 3}}}, "cannot be built by open_clip: .*depth"),
        ({"model": {"vision_cfg": {"timm_model_name": "resnet999"}}}, "cannot be built .*resnet999"),
        ({"model": "ViT-B-32", "weights": "laion"}, "unknown pretrained tag of open_clip 'laion'"),
        ({"model": CLIP, "weights": "tower.pt"}, "not safetensors, and pickles are not read"),
        ({"model": CLIP, "weights": "absent.safetensors"}, "do not exist"),
        ({"model": "local-dir:absent"}, "no open_clip_config.json in absent"),
    ],
)  # fmt: skip
def test_user_mistakes(spec, message):
    with pytest.raises(UserError, match=message):
        open_tower(TowerSpec.model_validate(spec))


def test_weights_of_another_tower_are_refused(clip_folder):
    other = CLIP | {"vision_cfg": VISION | {"width": 16}}
    with pytest.raises(UserError, match=r"not those of this tower .*differences: .*here"):
        open_tower(TowerSpec(model=other, weights=str(clip_folder / "open_clip_model.safetensors")))
    deeper = CLIP | {"vision_cfg": VISION | {"layers": 4}}
    with pytest.raises(UserError, match=r"resblocks\.3.* is missing"):
        open_tower(TowerSpec(model=deeper, layer=3, weights=str(clip_folder / "open_clip_model.safetensors")))
    flatter = CLIP | {"vision_cfg": VISION | {"layers": 2}}
    with pytest.raises(UserError, match=r"resblocks\.2.* is unknown"):
        open_tower(TowerSpec(model=flatter, weights=str(clip_folder / "open_clip_model.safetensors")))


def test_a_folder_without_safetensors_is_refused(clip_folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((clip_folder / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"no \.safetensors weights"):
        open_tower(TowerSpec(model=f"local-dir:{tmp_path}"))
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(UserError, match="is not a configuration"):
        open_tower(TowerSpec(model=f"local-dir:{tmp_path}"))


def test_a_size_of_zero_is_refused():
    with pytest.raises(ValidationError, match="image_size"):
        assembly({"model": CLIP, "image_size": 0})

import pytest
import torch
from transformers import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from assembly_specs import assembly, model_inputs
from shared.errors import StoreError, UserError
from vlm_distill import tower_cache
from vlm_distill.assembly import build
from vlm_distill.tower_cache import cache_tower


def frozen(name="clip"):
    """A model with a frozen tower, in training, and its inputs."""
    made = build(assembly(name), seed=0)
    made.model.model.vision_tower.requires_grad_(False)
    made.model.train()
    made.model.model.vision_tower.eval()  # as a run does with what normalises by its batch
    return made.model, model_inputs(made.processor)


@pytest.mark.parametrize("name", ["clip", "resnet", "timm-transformer"])
def test_what_is_kept_is_what_the_tower_gives_bit_for_bit(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tower_cache, "PART_IMAGES", 2)
    model, inputs = frozen(name)
    pixels = inputs["pixel_values"]
    alone = [model.get_image_features(image[None]).pooler_output[0] for image in pixels]
    expected = model(**inputs).logits
    cache = cache_tower(model.model.vision_tower, tmp_path)
    first, second = model(**inputs).logits, model(**inputs).logits
    assert cache.looks == 3
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(first, second)
    assert all(map(torch.equal, model.get_image_features(pixels).pooler_output, alone))
    cache.release()

    again = cache_tower(model.model.vision_tower, tmp_path)
    assert torch.equal(model(**inputs).logits, first)
    turned = model.get_image_features(pixels.flip(0)).pooler_output
    assert all(map(torch.equal, turned, reversed(alone)))
    assert again.looks == 1
    again.release()
    assert torch.equal(model(**inputs).logits, expected)


def test_gradients_of_what_is_trained_are_the_same(tmp_path):
    model, inputs = frozen("resnet")
    names = list(model.state_dict())

    def gradients():
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    cache_tower(model.model.vision_tower, tmp_path)
    assert len(expected) > 5
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
    assert list(model.state_dict()) == names


def test_features_of_several_depths_and_packed_patches_are_kept(tmp_path):
    config = Qwen3VLVisionConfig(
        depth=3, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=8, num_position_embeddings=16, deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    torch.manual_seed(0)
    tower = Qwen3VLVisionModel(config).eval().requires_grad_(False)
    grid = torch.tensor([[1, 4, 4], [1, 2, 6]])
    pixels = torch.randn(28, 3 * 2 * 4 * 4)
    expected = tower(pixels, grid_thw=grid)
    alone = tower(pixels[16:], grid_thw=grid[1:])
    cache = cache_tower(tower, tmp_path)
    for _ in range(2):
        kept = tower(pixels, grid_thw=grid)
        assert type(kept) is type(expected) and len(kept.deepstack_features) == 2
        torch.testing.assert_close(kept.pooler_output, expected.pooler_output)
        for ours, theirs in zip(kept.deepstack_features, expected.deepstack_features, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert cache.looks == 2
    assert torch.equal(kept.pooler_output[4:], alone.pooler_output)
    assert torch.equal(kept.deepstack_features[1][4:], alone.deepstack_features[1])


def test_other_pixels_or_arguments_are_other_pictures(tmp_path):
    model, inputs = frozen()
    tower, pixels = model.model.vision_tower, inputs["pixel_values"][:1]
    cache = cache_tower(tower, tmp_path)
    tower(pixels, output_hidden_states=-1)
    looks = cache.looks
    tower(pixels, output_hidden_states=-1)
    assert cache.looks == looks
    tower(pixels + 1e-6, output_hidden_states=-1)
    tower(pixels, output_hidden_states=-2)
    assert cache.looks == looks + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_little_memory_changes_nothing(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(tower_cache, "PART_IMAGES", 1)
    monkeypatch.setattr(tower_cache, "MEMORY_BYTES", 1)
    model, inputs = frozen("resnet")
    tower = model.to(dtype).model.vision_tower
    pixels = inputs["pixel_values"]
    expected = [tower(image[None]).last_hidden_state for image in pixels]
    cache = cache_tower(tower, tmp_path)
    for _ in range(3):
        assert torch.equal(tower(pixels).last_hidden_state, torch.cat(expected))
    assert cache.looks == 3 and len(cache._memory) <= 2 and expected[0].dtype == dtype


def test_a_part_that_was_not_committed_is_looked_at_again(tmp_path):
    model, inputs = frozen()
    cache_tower(model.model.vision_tower, tmp_path)
    model(**inputs)  # killed here
    del model.model.vision_tower.forward
    cache = cache_tower(model.model.vision_tower, tmp_path)
    model(**inputs)
    assert cache.looks == 3


def test_another_tower_or_a_trained_one_is_refused(tmp_path):
    model, _ = frozen()
    cache_tower(model.model.vision_tower, tmp_path).release()
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).add_(1e-3)
    with pytest.raises(StoreError, match="tower: stored"):
        cache_tower(model.model.vision_tower, tmp_path)
    model.model.vision_tower.requires_grad_(True)
    with pytest.raises(UserError, match=r"weights are trained.* Freeze the tower"):
        cache_tower(model.model.vision_tower, tmp_path / "other")

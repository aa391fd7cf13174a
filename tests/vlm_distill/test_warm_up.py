import importlib.util
import json

import open_clip
import pytest
import torch
from PIL import Image

from assembly_specs import assembly
from shared.data.image_references import as_data_url
from shared.errors import StoreError, UserError
from vlm_distill.assembly import build_registered
from vlm_distill.easy_vqa import caption, captioned_images
from vlm_distill.towers import TowerSpec
from vlm_distill.warm_up import ImageCaption, WarmUpConfig, _batches, warm_up_tower
from vlm_distill.warm_up_folder import CHECKPOINT

TOWER = TowerSpec(
    model={
        "embed_dim": 16,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32},
    },
    layer=2,
)
CONFIG = WarmUpConfig(steps=12, batch_size=4, learning_rate=5e-3, text_width=16, checkpoint_steps=5)
COLOURS = ("red", "green", "blue", "white", "black")


class Interrupted(Exception):
    """Stands for a killed process."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> list[ImageCaption]:
    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for shade in range(3):
        for colour in COLOURS:
            path = folder / f"{colour}-{shade}.png"
            Image.new("RGB", (32, 32), colour).point(lambda value, s=shade: value * (1 - 0.1 * s)).save(path)
            made.append(ImageCaption(str(path), f"a {colour} area"))
    return made


@pytest.fixture(scope="module")
def finished(pairs, tmp_path_factory):
    return warm_up_tower(TOWER, pairs, tmp_path_factory.mktemp("warm") / "tower", CONFIG, seed=1)


def weights(folder):
    return open_clip.create_model(f"local-dir:{folder}").state_dict()


def test_pictures_find_their_captions(pairs, tmp_path):
    losses = []
    longer = WarmUpConfig(steps=80, batch_size=5, learning_rate=2e-3, text_width=16)

    def see(_, loss):
        losses.append(loss)

    result = warm_up_tower(TOWER, pairs, tmp_path, longer, seed=1, progress=see)
    assert len(losses) == 80 and result.loss < 0.1 * losses[0]
    assert result.accuracy == 1.0
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    captions = [f"a {colour} area" for colour in COLOURS]
    images = torch.stack([preprocess(Image.new("RGB", (50, 40), colour)) for colour in COLOURS])
    with torch.no_grad():
        texts = model.encode_text(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(captions), normalize=True)
        nearest = (model.eval().encode_image(images, normalize=True) @ texts.T).argmax(1)
    assert nearest.tolist() == [*range(5)]


def test_an_interrupted_warm_up_ends_with_the_same_weights(pairs, finished, tmp_path):
    def stop_at(number):
        def progress(step, _):
            seen.append(step)
            if step == number:
                raise Interrupted

        return progress

    seen: list[int] = []
    with pytest.raises(Interrupted):
        warm_up_tower(TOWER, pairs, tmp_path, CONFIG, seed=1, progress=stop_at(8))
    result = warm_up_tower(TOWER, pairs, tmp_path, CONFIG, seed=1, progress=stop_at(99))
    assert seen == [*range(1, 9), *range(6, 13)]
    assert (result.loss, result.accuracy) == (finished.loss, finished.accuracy)
    expected, found = weights(finished.folder), weights(tmp_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (tmp_path / CHECKPOINT).exists()


def test_what_is_finished_is_not_done_again(pairs, finished):
    def progress(step, loss):
        raise AssertionError("trained again")

    assert warm_up_tower(TOWER, pairs, finished.folder, CONFIG, seed=1, progress=progress) == finished
    relaxed = CONFIG.model_copy(update={"checkpoint_steps": 7})
    assert warm_up_tower(TOWER, pairs, finished.folder, relaxed, seed=1, progress=progress) == finished


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 2}, "another seed"),
        ({"config": CONFIG.model_copy(update={"steps": 13})}, "another settings"),
        ({"spec": TOWER.model_copy(update={"image_size": 64})}, "another tower"),
        ({"pairs": [ImageCaption("a.png", "one"), ImageCaption("b.png", "two")]}, "another pairs"),
    ],
)
def test_a_folder_of_another_warm_up_is_refused(pairs, finished, changes, named):
    arguments = {"spec": TOWER, "pairs": pairs, "folder": finished.folder, "config": CONFIG, "seed": 1}
    with pytest.raises(StoreError, match=f"holds a warm-up with {named}"):
        warm_up_tower(**arguments | changes)


def test_captions_have_to_differ(pairs, tmp_path):
    with pytest.raises(UserError, match="the 3 pictures have 1 between them"):
        warm_up_tower(TOWER, [p for p in pairs if "red" in p.caption], tmp_path, CONFIG, seed=1)


def test_assembly_takes_the_warmed_tower_by_weights_or_by_folder(finished):
    expected = weights(finished.folder)
    by_weights = TOWER.model_copy(update={"weights": str(finished.weights)})
    by_folder = TowerSpec(model=f"local-dir:{finished.folder}", layer=2)
    for spec in (by_weights, by_folder):
        model, *_ = build_registered(assembly(spec.model_dump()), seed=0)
        tower = model.model.vision_tower.tower.state_dict()
        assert tower and all(torch.equal(tower[name], expected[f"visual.{name}"]) for name in tower)


def test_no_caption_occurs_twice_in_a_batch_and_steps_stand_alone():
    by_caption = {"often": [*range(30)], "sometimes": [30, 31, 32], "once": [33], "rarely": [34, 35]}
    captions = {number: text for text, numbers in by_caption.items() for number in numbers}
    batches = [*_batches(by_caption, 2, 0, start=0, stop=300)]
    assert all(len({captions[number] for number in batch}) == len(batch) == 2 for batch in batches)
    assert batches[100:110] == [*_batches(by_caption, 2, 0, start=100, stop=110)]
    drawn = [captions[number] for batch in batches for number in batch]
    assert drawn.count("often") > drawn.count("sometimes") > drawn.count("once") > 0
    assert len({number for batch in batches for number in batch}) > 30
    assert batches != [*_batches(by_caption, 2, 1, start=0, stop=300)]


def test_settings_are_part_of_what_is_stored(finished):
    stored = json.loads((finished.folder / "warm_up.json").read_text())
    assert stored["identity"]["seed"] == 1 and "layer" not in stored["identity"]["tower"]


def test_pictures_may_be_data_urls(pairs, tmp_path):
    with open(pairs[0].image, "rb") as file:
        first = ImageCaption(as_data_url(file.read()), "here")
    short = CONFIG.model_copy(update={"steps": 1})
    warm_up_tower(TOWER, [first, ImageCaption(pairs[1].image, "there")], tmp_path, short, seed=0)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([("what is the blue shape?", "rectangle")], "a blue rectangle"),
        ([("what color is the triangle?", "teal")], "a teal triangle"),
        ([("is there a red shape?", "no"), ("what shape is present?", "circle")], None),
        ([("is there not a red shape?", "no"), ("is there a circle?", "yes")], "a red circle"),
        ([("is no red shape present?", "yes"), ("what is the gray shape?", "circle")], "a gray circle"),
        ([("is there a circle in the image?", "no"), ("is a black shape present?", "yes")], None),
    ],
)
def test_answers_tell_what_easy_vqa_shows(asked, told):
    assert caption(asked) == told


@pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="needs pip install easy-vqa")
def test_easy_vqa_has_captions_for_nine_pictures_of_ten():
    train, test = captioned_images("train"), captioned_images("test")
    assert (len(train), len(test)) == (3542, 880)
    assert len({pair.caption for pair in train}) == 24
    assert Image.open(test[0].image).size == (64, 64)

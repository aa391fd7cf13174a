import json

import open_clip
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

from eval.metrics.clip_score import compute, scores
from shared.data.images import open_image
from shared.data.pairs import Dropped, make_groups
from shared.errors import DataError, UserError
from shared.types import ImagePart, Message, Response, Sample, TextPart
from vlm_builders import FAMILIES, save_tiny_vlm
from vlm_distill import clip_filter
from vlm_distill.clip_filter import without_misfits
from vlm_distill.config_vision import ClipFilterConfig
from vlm_runs import vlm_config, vlm_run

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A CLIP model with random weights: it judges, if not well."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(2)  # one that tells these apart
    save_file(open_clip.CLIP(**CONFIG).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    for colour in COLOURS:
        Image.new("RGB", (20, 20), colour).save(folder / f"{colour}.png")
    return [str(folder / f"{colour}.png") for colour in COLOURS]


def sample(name, *images):
    parts = (*map(ImagePart, images), TextPart("What is it?"))
    return Sample(name, (Message("user", parts),), task="caption")


def grouping(samples, texts):
    """The teacher says `texts`; the student always says the same."""
    said = {"teacher": texts, "student": ["nothing"] * len(samples)}
    responses = {
        role: [
            Response(s.id, role, 1, 0, (1, 2), text, "stop", "made up")
            for s, text in zip(samples, said[role], strict=True)
        ]
        for role in said
    }
    return make_groups(samples, responses, ("teacher", "student"), truncated="keep")


def ids(result):
    return [group.sample.id for group in result.groups]


def test_responses_below_the_minimum_take_their_pair_along(clip, pictures, monkeypatch):
    monkeypatch.setattr(clip_filter, "CHUNK", 2)
    samples = [sample(colour, picture) for colour, picture in zip(COLOURS, pictures, strict=True)]
    before = grouping(samples, ["a red thing", "leaves", "the sea"])
    fits = scores(["a red thing", "leaves", "the sea"], pictures, clip)
    assert len({round(fit, 3) for fit in fits}) == 3
    lowest, middle, _ = sorted(fits)
    after = without_misfits(before, ClipFilterConfig(model=clip, minimum=(lowest + middle) / 2))
    misfit = COLOURS[fits.index(lowest)]
    assert ids(after) == [colour for colour in COLOURS if colour != misfit]
    assert all(group in before.groups for group in after.groups)  # nothing is replaced
    assert after.summary() == f"left out 1 of 3 groups (1 × teacher response unlike the image): {misfit}"


def test_only_the_chosen_roles_are_judged(clip, pictures):
    samples = [sample(colour, picture) for colour, picture in zip(COLOURS, pictures, strict=True)]
    before = grouping(samples, ["a red thing", "leaves", "the sea"])
    fits = scores(["nothing"] * 3, pictures, clip)
    by_student = ClipFilterConfig(model=clip, minimum=max(fits) - 1e-4, roles=("student",))
    assert ids(without_misfits(before, by_student)) == [COLOURS[fits.index(max(fits))]]


def test_several_pictures_are_judged_by_the_best_and_none_by_nothing(clip, pictures):
    samples = [sample("both", *pictures[:2]), sample("none"), sample("one", pictures[2])]
    before = grouping(samples, ["leaves", "leaves", "leaves"])
    fits = scores(["leaves"] * 3, pictures, clip)
    above = ClipFilterConfig(model=clip, minimum=max(fits[:2]) + 1e-4)
    below = ClipFilterConfig(model=clip, minimum=max(fits[:2]) - 1e-4)
    assert "both" not in ids(without_misfits(before, above))
    assert "none" in ids(without_misfits(before, above))
    assert "both" in ids(without_misfits(before, below))


def test_what_was_left_out_before_stays_counted(clip, pictures):
    before = grouping([sample("a", pictures[0]), sample("b", pictures[1])], ["leaves", "leaves"])
    thinned = before._replace(groups=before.groups[:1], dropped=[Dropped("b", 0, "teacher", "refusal")])
    after = without_misfits(thinned, ClipFilterConfig(model=clip, minimum=1e-6))
    assert after.dropped == thinned.dropped


def test_scores_are_what_the_metric_averages(clip, pictures):
    texts = ["a red thing", "leaves", "the sea"]
    fits = scores(texts, pictures, clip)
    assert compute(texts, pictures, model=clip)["clip_score"] == pytest.approx(sum(fits) / 3)


def test_user_mistakes(clip, pictures, tmp_path):
    before = grouping([sample("a", pictures[0])], ["leaves"])
    with pytest.raises(
        DataError, match=r"no group is left .* unlike the image.* lower vision.clip_filter.minimum"
    ):
        without_misfits(before, ClipFilterConfig(model=clip, minimum=2.5))
    with pytest.raises(UserError, match=r"no \.safetensors weights"):
        without_misfits(before, ClipFilterConfig(model=str(tmp_path), minimum=0.5))
    with pytest.raises(ValidationError, match="minimum"):
        ClipFilterConfig(model=clip, minimum=0)


def test_a_run_leaves_out_what_its_filter_refuses_and_says_so(clip, tmp_path):
    model = save_tiny_vlm(tmp_path / "model", FAMILIES["llava"](), seed=1)

    def sampled(name, *overrides):
        run = vlm_run(vlm_config(tmp_path / name, model, model, *overrides))
        said = []
        run.speaker.say = said.append
        run.execute("generate")
        return run._sample(1), said

    every, _ = sampled("plain")
    seen = [group for group in every if group.sample.images]
    best = [
        max(scores([g.responses[0].text] * len(g.sample.images), [*map(open_image, g.sample.images)], clip))
        for g in seen
    ]
    low, high = sorted(best)[1:3]
    minimum = (low + high) / 2
    kept, said = sampled("filtered", f"vision.clip_filter={{model: {clip}, minimum: {minimum}}}")
    misfits = [group.sample.id for group, fit in zip(seen, best, strict=True) if fit < minimum]
    assert len(misfits) == 2
    assert [g.sample.id for g in kept] == [g.sample.id for g in every if g.sample.id not in misfits]
    assert any("left out 2 of 6 groups (2 × teacher response unlike the image)" in line for line in said)
    with pytest.raises(UserError, match=r"no \.safetensors weights"):  # before anything is sampled
        sampled("absent", f"vision.clip_filter={{model: {tmp_path}, minimum: 0.5}}")
    assert not (tmp_path / "absent" / "run" / "heldout").exists()

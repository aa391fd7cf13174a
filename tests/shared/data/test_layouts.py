from __future__ import annotations

import pytest
import torch

from shared.data.layouts import footprint, groups_of_sequences, lay_out

PAD = 0
PROMPTS = [[11, 12, 13], [21]]
RESPONSES = [[[14, 15], [16, 17, 18]], [[22, 23, 24], [25]]]


def laid_out(layout="joint", prompts=PROMPTS, responses=RESPONSES, **options):
    return lay_out(prompts, responses, layout=layout, pad_id=PAD, **options)


def test_separate_sequences_are_padded_to_the_right_and_counted_from_0():
    encoded = laid_out("separate")
    assert encoded.inputs["input_ids"].tolist() == [
        [11, 12, 13, 14, 15, 0],
        [11, 12, 13, 16, 17, 18],
        [21, 22, 23, 24, 0, 0],
        [21, 25, 0, 0, 0, 0],
    ]
    assert encoded.inputs["attention_mask"].sum(-1).tolist() == [5, 6, 4, 2]
    assert encoded.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]] * 4
    assert encoded.rows_N.tolist() == [2, 3, 8, 9, 10, 12, 13, 14, 18]
    assert encoded.target_ids_N.tolist() == [14, 15, 16, 17, 18, 22, 23, 24, 25]
    assert encoded.response_N.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_a_joint_sequence_holds_the_prompt_once_and_restarts_positions_behind_it():
    encoded = laid_out()
    assert encoded.inputs["input_ids"].tolist() == [
        [11, 12, 13, 14, 15, 16, 17, 18],
        [21, 22, 23, 24, 25, 0, 0, 0],
    ]
    positions = encoded.inputs["position_ids"].tolist()
    assert positions[0] == [0, 1, 2, 3, 4, 3, 4, 5] and positions[1][:5] == [0, 1, 2, 3, 1]
    # both responses' first tokens are predicted by the prompt's last
    assert encoded.rows_N.tolist() == [2, 3, 2, 5, 6, 8, 9, 10, 8]
    assert encoded.target_ids_N.tolist() == [14, 15, 16, 17, 18, 22, 23, 24, 25]
    assert encoded.response_N.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_a_joint_sequence_says_whose_each_token_is():
    encoded = laid_out()
    assert encoded.inputs["segment_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 2, -1, -1, -1]]
    assert "attention_mask" not in encoded.inputs


def test_several_responses_share_one_prompt():
    encoded = laid_out(prompts=[[1, 2]], responses=[[[3], [4, 5], [6]]])
    assert encoded.inputs["position_ids"].tolist() == [[0, 1, 2, 2, 3, 2]]
    assert encoded.inputs["segment_ids"].tolist() == [[0, 0, 1, 2, 2, 3]]


@pytest.mark.parametrize("layout", ["joint", "separate"])
def test_single_responses_keep_the_plain_causal_mask(layout):
    encoded = laid_out(layout, responses=[[[14, 15]], [[22]]])
    assert encoded.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert torch.equal(encoded.inputs["position_ids"], torch.arange(5).expand(2, -1))
    assert encoded.rows_N.tolist() == [2, 3, 5]


@pytest.mark.parametrize("layout", ["joint", "separate"])
def test_responses_continue_every_position_axis_from_the_prompts_highest(layout):
    # one text token, an image of 2 x 3 patches at the same time, one text token
    grid = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]])
    encoded = laid_out(
        layout, prompts=[list(range(1, 9))], responses=[[[9, 9], [8, 8, 8]]], prompt_positions=[grid]
    )
    positions = encoded.inputs["position_ids"]
    assert positions.shape == (3, *encoded.inputs["input_ids"].shape)
    for sequence in range(positions.shape[1]):
        assert torch.equal(positions[:, sequence, :8], grid)
    # wherever a response token is an input, it is as far from the prompt in both layouts, on every axis
    later = encoded.rows_N[torch.tensor([1, 3, 4])]
    for axis in positions:
        assert axis.flatten()[later].tolist() == [5, 5, 6]


@pytest.mark.parametrize("layout", ["joint", "separate"])
def test_footprints_are_the_sequences_that_are_laid_out(layout):
    encoded = laid_out(layout)
    prints = [
        footprint(len(prompt), [len(ids) for ids in group], layout)
        for prompt, group in zip(PROMPTS, RESPONSES, strict=True)
    ]
    batch, width = encoded.inputs["input_ids"].shape
    assert sum(p.sequences for p in prints) == batch
    assert max(p.longest for p in prints) == width
    assert sum(p.tokens for p in prints) == int((encoded.inputs["input_ids"] != PAD).sum())


def test_what_a_prompt_brings_along_follows_its_sequences():
    responses = [[[1], [2]], [[3]], [[4], [5], [6]]]
    assert groups_of_sequences(responses, "separate") == [0, 0, 1, 2, 2, 2]
    assert groups_of_sequences(responses, "joint") == [0, 1, 2]

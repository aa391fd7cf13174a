"""Which token of a model's input shows which piece of which image? The map of one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from shared.errors import AlignmentError
from shared.types import Sample
from vlm_distill.families import Cell, Picture, square

if TYPE_CHECKING:
    from vlm_distill.prompt_reader import Prompt, PromptReader

SHOWN_TEXT = 60  # characters of a piece of text


class Piece(NamedTuple):
    """A run of tokens of one kind."""

    start: int
    stop: int
    image: int | None  # None: text
    cells: tuple[
        Cell, ...
    ] = ()  # one a token; empty for text and for tokens that separate pieces of an image


class InputMap(NamedTuple):
    """A model's input, from its first token to where the response begins."""

    model_type: str
    ids: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def describe(self, tokenizer: Any) -> str:
        """A line a piece: where it stands, what it is, what it says or shows."""
        lines = [f"{self.model_type}: {len(self.ids)} prompt tokens"]
        for piece in self.pieces:
            where = f"{piece.start:>6}-{piece.stop - 1}"
            if piece.image is None:
                lines.append(
                    f"{where:<14}text        {_shown(tokenizer, self.ids[piece.start : piece.stop])}"
                )
            elif not piece.cells:
                text = _shown(tokenizer, self.ids[piece.start : piece.stop])
                lines.append(f"{where:<14}image {piece.image + 1}     between its pieces: {text}")
            else:
                lines += [f"{where:<14}image {piece.image + 1}     {text}" for text in _tiles(piece.cells)]
        lines.append(f"{len(self.ids):>6}-       response")
        return "\n".join(lines)


def input_map(reader: PromptReader, sample: Sample, image_token_id: int) -> InputMap:
    """The map of a sample's prompt.

    Raises:
        AlignmentError: image tokens that do not add up.
    """
    prompt = reader.read(sample)
    family, model_type = reader.family, reader.config.model_type
    places = [at for at, token in enumerate(prompt.ids) if token == image_token_id]
    spans = _split(places, _tokens_per_image(reader, sample, len(places), image_token_id))
    pieces: list[Piece] = []
    last = 0
    for image, span in enumerate(spans):
        runs = _runs(span)
        picture = Picture(
            len(span),
            tuple(len(run) for run in runs),
            _row_of(prompt, "image_grid_thw", image),
            _row_of(prompt, "image_sizes", image),
            reader.config,
        )
        cells = list(family.grid(picture)) if family is not None else square(len(span))
        if len(cells) != len(span):
            raise AlignmentError(
                f"sample {sample.id!r}: image {image + 1} has {len(span)} tokens and a grid of {len(cells)} "
                f"cells in {model_type!r}; its processor and its configuration do not belong together."
            )
        if span and span[0] > last:
            pieces.append(Piece(last, span[0], None))
        used = 0
        for number, run in enumerate(runs):
            if number:
                pieces.append(Piece(runs[number - 1][-1] + 1, run[0], image))
            pieces.append(Piece(run[0], run[-1] + 1, image, tuple(cells[used : used + len(run)])))
            used += len(run)
        last = span[-1] + 1 if span else last
    if last < len(prompt.ids):
        pieces.append(Piece(last, len(prompt.ids), None))
    return InputMap(model_type, prompt.ids, tuple(pieces))


def _tokens_per_image(reader: PromptReader, sample: Sample, total: int, image_token_id: int) -> list[int]:
    """Image tokens of each image: what the processor put in the place of each placeholder."""
    images = len(sample.images)
    if images < 2:
        return [total] * images
    offsets = reader.call(sample, return_text_replacement_offsets=True).get("text_replacement_offsets")
    if offsets is None:  # a processor of its own kind: the same number for each, or not known
        counts = [total // images] * images
    else:
        tokenizer = reader.processor.tokenizer
        counts = [
            tokenizer(place["replacement"], add_special_tokens=False)["input_ids"].count(image_token_id)
            for place in offsets[0]
        ]
    if sum(counts) != total or len(counts) != images:
        raise AlignmentError(
            f"sample {sample.id!r}: {total} image tokens for {images} images, of which its processor "
            f"accounts for {counts}."
        )
    return counts


def _split(places: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return [list(places[start : start + count]) for start, count in zip(starts, counts, strict=True)]


def _runs(span: Sequence[int]) -> list[list[int]]:
    """Positions that follow each other without a gap."""
    groups = groupby(enumerate(span), key=lambda pair: pair[1] - pair[0])
    return [[position for _, position in group] for _, group in groups]


def _row_of(prompt: Prompt, key: str, image: int) -> Any:
    values = prompt.vision.get(key)
    return None if values is None or image >= len(values) else tuple(values[image].tolist())


def _tiles(cells: Sequence[Cell]) -> list[str]:
    lines = []
    for tile, group in groupby(cells, key=lambda cell: cell.tile):
        members = list(group)
        shown = [cell for cell in members if not cell.is_separator]
        rows = {cell.row for cell in shown}
        columns = {cell.column for cell in shown}
        ends = len(members) - len(shown)
        name = "the whole picture" if tile == 0 else f"tile {tile}"
        grid = f"{len(rows)} x {len(columns)} cells"
        lines.append(f"{name}, {grid}{f', {ends} ends of rows' if ends else ''}")
    return lines


def _shown(tokenizer: Any, ids: Sequence[int]) -> str:
    text = repr(tokenizer.decode(list(ids)))
    return text if len(text) <= SHOWN_TEXT else f"{text[: SHOWN_TEXT - 4]}...{text[-1]}"

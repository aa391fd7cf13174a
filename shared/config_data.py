"""What can be set of prompts and of the responses to them?"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from shared.config_section import Fraction, Section, refuse_idle
from shared.types import TaskName

Column = Literal[
    "messages",
    "conversations",
    "prompt",
    "question",
    "instruction",
    "input",
    "system",
    "image",
    "images",
    "id",
    "task",
    "reference",
    "output",
    "answer",
    "chosen",
    "rejected",
]


class HubData(Section):
    """A data set of the hub, or a local folder of data files, read through `datasets`."""

    id: str = Field(min_length=1, description="as in HuggingFaceH4/ultrachat_200k, or a folder")
    config: str | None = None
    split: str = "train"
    revision: str | None = Field(None, description="branch, tag or commit")

    @property
    def label(self) -> str:
        """How messages call it."""
        return "/".join(filter(None, (self.id, self.config, self.split)))


class WrittenConfig(Section):
    """Prompts that the teacher writes: it goes on from the user's turn of its own template."""

    count: int = Field(ge=1, description="how many; draws go on until so many are good, at most 8 for each")
    max_new_tokens: int = Field(256, ge=1, description="a prompt that is cut by it is left out")
    temperature: float = Field(1.0, gt=0.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0, description="0 switches it off")
    min_words: int = Field(3, ge=1)
    max_words: int = Field(400, ge=1)
    near_duplicate: float = Field(
        0.7,
        gt=0.0,
        le=1.0,
        description="share of word triples from which on it counts as an earlier one",
    )

    @model_validator(mode="after")
    def _possible(self) -> WrittenConfig:
        if self.max_words < self.min_words:
            raise ValueError(f"needs min_words <= max_words; got {self.min_words} and {self.max_words}")
        return self


class PromptSource(Section):
    """A file or a data set of prompts, or the teacher. docs/DATA.md shows the rows."""

    path: str | None = Field(None, description="a file, or pkg://PACKAGE/FILE")
    hub: HubData | None = None
    written: WrittenConfig | None = None
    task: TaskName | None = Field(None, description="for rows that name none; default instruction")
    limit: int | None = Field(None, ge=1, description="how many prompts to take, after the shuffle")
    skip: int = Field(0, ge=0, description="how many to pass over first, after the shuffle")
    shuffle: bool = False
    weight: float | None = Field(None, gt=0, description="this source's share of the mixture, in proportion")
    columns: dict[Column, str | int] = Field(
        default_factory=dict, description="our name: the source's; a number where rows are lists"
    )
    ids: Literal["own", "place"] = Field("own", description="place: FILE:ROW, for ids that are not unique")
    turns: Literal["last", "all"] = Field("last", description="all: each user turn of a chat is a prompt")
    system: str | None = Field(None, description="put before chats that have no system turn")
    template: str | None = Field(None, description="around a plain prompt, which takes the place of {}")
    image_root: str | None = Field(None, description="folder that holds all images; default the file's")
    image_name: str | None = Field(None, description="path of an image, its column in the place of {}")

    @model_validator(mode="after")
    def _one_place(self) -> PromptSource:
        places = [name for name in ("path", "hub", "written") if getattr(self, name) is not None]
        if len(places) != 1:
            raise ValueError(f"give path, hub or written; got {' and '.join(places) or 'none'}")
        if self.written is not None:
            refuse_idle(
                self,
                *("limit", "skip", "shuffle", "columns", "ids", "turns", "image_root", "image_name"),
                because="with written, whose rows are plain prompts, as many as count says",
                instead="read a file",
            )
        for name in ("template", "image_name"):
            text = getattr(self, name)
            if text is not None and text.count("{}") != 1:
                raise ValueError(f"{name}: {text!r} needs {{}} once, where the row's own text goes")
        return self

    @property
    def label(self) -> str:
        """How messages call it."""
        return self.hub.label if self.hub else self.path or "prompts that the teacher writes"

    def limited(self, limit: int) -> PromptSource:
        """The same source with at most so many prompts."""
        if self.written is not None:
            count = min(self.written.count, limit)
            return self.model_copy(update={"written": self.written.model_copy(update={"count": count})})
        return self.model_copy(update={"limit": min(self.limit or limit, limit)})


class ImagesConfig(Section):
    """What is refused of the images in prompts, before it is read or decoded."""

    allow_remote: bool = Field(False, description="fetch the images that rows name by http(s) URL")
    allow_private: bool = Field(
        False,
        description="also from addresses of this machine and its network (loopback, private, link-local)",
    )
    timeout_s: float = Field(20.0, gt=0, description="for one image of the web")
    max_bytes: int = Field(64 * 2**20, ge=1, description="of the encoded file")
    max_pixels: int = Field(64_000_000, ge=1, le=178_956_970, description="at most where Pillow stops")

    @model_validator(mode="after")
    def _all_has_effect(self) -> ImagesConfig:
        if not self.allow_remote:
            refuse_idle(
                self,
                "allow_private",
                "timeout_s",
                because="without allow_remote: true",
                instead="set allow_remote: true",
            )
        return self


class DecontaminationConfig(Section):
    """Training prompts that are in the evaluation are left out, and named."""

    against: tuple[str, ...] = Field((), description="evaluation files, of the types that prompt files have")
    heldout: bool = Field(False, description="compare with the held-out prompts as well")
    ngram: int = Field(13, ge=4, description="words in a row that must not be shared")

    @model_validator(mode="after")
    def _all_has_effect(self) -> DecontaminationConfig:
        if not self.against and not self.heldout:
            raise ValueError("give evaluation files as `against`, or set heldout: true")
        return self


class PromptsConfig(Section):
    """What is asked: for training, and held out to measure."""

    train: tuple[PromptSource, ...] = Field(min_length=1)
    heldout: tuple[PromptSource, ...] = Field(min_length=1)
    over_length: Literal["fail", "drop"] = Field("fail", description="prompts that do not fit the context")
    on_bad_row: Literal["fail", "skip"] = Field("fail", description="rows that cannot be used")
    images: ImagesConfig = ImagesConfig()
    decontamination: DecontaminationConfig | None = None

    @property
    def written(self) -> dict[str, PromptSource]:
        """The sources that the teacher writes, by their place, such as train.0; those to train on first."""
        return {
            f"{name}.{index}": source
            for name, sources in (("train", self.train), ("heldout", self.heldout))
            for index, source in enumerate(sources)
            if source.written is not None
        }


class FilterConfig(Section):
    """Responses that are not trained on; their pairs are left out, counted and listed."""

    roles: tuple[Literal["teacher", "student"], ...] = Field(
        ("teacher",), min_length=1, description="whose responses; a student learns from its own bad ones"
    )
    min_tokens: int = Field(1, ge=1, description="the turn's end counted")
    max_tokens: int | None = Field(None, ge=1)
    max_repetition: Fraction | None = Field(
        None, description="share of 4-grams that repeat, over all tokens or the last 64; 0.5 finds loops"
    )
    refusals: bool | tuple[str, ...] = Field(
        False, description="true for usual phrases, or phrases that an answer must not open with"
    )

    @model_validator(mode="after")
    def _possible(self) -> FilterConfig:
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"needs min_tokens <= max_tokens; got {self.min_tokens} and {self.max_tokens}")
        return self


class OfflineConfig(Section):
    """Responses out of files instead of a model: `columns` of the prompts, a file, or another run's store."""

    teacher: str | None = Field(None, description="columns: `chosen` or the reference answer")
    student: str | None = Field(None, description="columns: `rejected`")


class GenerationConfig(Section):
    """How responses are sampled (the paper's temperature 0.8 and top-p 0.95)."""

    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(0.8, ge=0.0, description="0 is greedy")
    top_p: float = Field(0.95, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0, description="0 switches it off")
    batch_tokens: int = Field(
        8192, ge=1, description="prompt and response tokens of one batch, padding included"
    )
    truncated: Literal["keep", "drop"] = Field("keep", description="responses cut by max_new_tokens")
    filters: FilterConfig | None = None
    draws: int = Field(1, ge=1, description="responses of each model to a prompt, each a pair of its own")
    refresh: int | None = Field(
        None, ge=1, description="optimiser steps between new student responses; default: a round"
    )
    reuse_teacher: bool = Field(False, description="every round trains on the first one's teacher responses")
    offline: OfflineConfig = OfflineConfig()

    @model_validator(mode="after")
    def _all_has_effect(self) -> GenerationConfig:
        if self.offline.teacher is not None:
            refuse_idle(
                self, "reuse_teacher", because="with offline.teacher", instead="have the teacher sample"
            )
        if self.offline.student is not None:
            refuse_idle(self, "refresh", because="with offline.student", instead="have the student sample")
        if self.draws > 1 and "columns" in (self.offline.teacher, self.offline.student):
            raise ValueError(f"draws: {self.draws}, and columns hold one answer a prompt; set draws: 1")
        if self.temperature == 0:
            refuse_idle(
                self,
                "top_p",
                "top_k",
                because="with temperature: 0, which takes the most likely token",
                instead="set a temperature",
            )
        return self

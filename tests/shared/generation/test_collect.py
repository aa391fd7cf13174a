"""A killed or interrupted collection goes on to the very same responses; a changed one is refused."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from builders import tiny_llama, tiny_tokenizer
from shared.errors import StoreError
from shared.generation.collect import collect_responses
from shared.generation.transformers_engine import TransformersEngine
from shared.types import Message, Request, Sample, Sampling, TextPart
from text_distill.adapter import TextAdapter

SAMPLING = Sampling(max_new_tokens=24, temperature=1.0, top_p=0.95, seed=1)
BATCH_TOKENS = 140
TESTS = Path(__file__).resolve().parents[2]


def requests(count=24):
    return [
        Request(
            Sample(f"s{i}", (Message("user", (TextPart("ab " * (1 + i % 5)),)),), source=f"p:{i}"),
            "teacher",
            1,
        )
        for i in range(count)
    ]


def engine(**options):
    adapter = TextAdapter(tiny_tokenizer(), stop_ids=(5, 6, 7))
    return TransformersEngine(tiny_llama().bfloat16(), adapter, **{"fingerprint": "tiny", **options})


def collect(folder, *, made_by=None, asked=None, sampling=SAMPLING, **options):
    made_by = made_by or engine()
    adapter = TextAdapter(tiny_tokenizer())
    return collect_responses(
        made_by,
        asked or requests(),
        sampling,
        folder=folder,
        prompt_tokens=adapter.prompt_tokens,
        **{"batch_tokens": BATCH_TOKENS, **options},
    )


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, collect(folder)


def test_responses_come_in_the_order_of_the_requests_and_are_made_once(uninterrupted):
    folder, responses = uninterrupted
    assert [r.sample_id for r in responses] == [r.sample.id for r in requests()]
    assert {r.finish_reason for r in responses} == {"stop", "length"}

    class Idle:
        fingerprint, returns_token_ids, accepts_images = engine().fingerprint, True, False

        def generate(self, *_):
            raise AssertionError("everything is there already")

    assert collect(folder, made_by=Idle()) == responses


def test_killed_during_generation_in_bfloat16_then_resumed_gives_the_same_store(tmp_path, uninterrupted):
    folder, responses = uninterrupted
    total = len(list(folder.glob("part-*")))
    places = [str(TESTS.parent), str(TESTS / "support"), str(Path(__file__).parent)]
    script = f"import sys; sys.path[:0] = {places!r}\n"
    script += f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
    script += f"import test_collect, pathlib; test_collect.collect(pathlib.Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", script])
    while process.poll() is None and len(list(tmp_path.glob("part-*.parquet"))) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    survived = {name: data for name, data in content(tmp_path).items() if name.endswith(".parquet")}
    assert 3 <= len(survived) < total
    assert collect(tmp_path) == responses
    assert content(tmp_path) == content(folder)
    assert survived.items() <= content(tmp_path).items()


def test_interrupt_loses_at_most_the_batch_at_hand(tmp_path, uninterrupted):
    def interrupt(progress):
        if progress.batches_done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path, progress=interrupt)
    assert len(list(tmp_path.glob("part-*.parquet"))) == 4
    assert collect(tmp_path) == uninterrupted[1]


def test_truncated_part_is_redone_alone(tmp_path, uninterrupted, caplog):
    collect(tmp_path)
    part = tmp_path / "part-00002.parquet"
    os.truncate(part, part.stat().st_size // 2)
    seen = []
    assert collect(tmp_path, progress=seen.append) == uninterrupted[1]
    assert [p.batches_total - p.batches_done for p in seen] == [1, 0]
    assert "part-00002.parquet is damaged" in caplog.text


def test_progress_counts_tokens_and_batches(tmp_path, uninterrupted):
    seen = []
    responses = collect(tmp_path, progress=seen.append)
    total = len(list(tmp_path.glob("part-*")))
    assert [(p.batches_done, p.batches_total) for p in seen] == [(i, total) for i in range(total + 1)]
    assert seen[-1].tokens == sum(len(r.token_ids) for r in responses)
    assert seen[0].tokens == 0 and seen[0].tokens_per_second == 0 and seen[0].speed == ""
    assert seen[-1].tokens_per_second == seen[-1].tokens / seen[-1].seconds > 0
    assert seen[-1].speed.endswith(" tokens/s")


def reworded():
    first, *rest = requests()
    changed = dataclasses.replace(first.sample, messages=(Message("user", (TextPart("ab!"),)),))
    return [first._replace(sample=changed), *rest]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (
            lambda: {"sampling": dataclasses.replace(SAMPLING, temperature=0.5)},
            "sampling.temperature: stored 1.0, now 0.5",
        ),
        (lambda: {"sampling": dataclasses.replace(SAMPLING, seed=2)}, "sampling.seed: stored 1, now 2"),
        (lambda: {"batch_tokens": 200}, "batch_tokens: stored 140, now 200"),
        (lambda: {"asked": reworded()}, "prompts: stored"),
        (lambda: {"asked": requests(23)}, "requests: stored 24, now 23"),
        (lambda: {"asked": [r._replace(round=2) for r in requests()]}, r"rounds: stored \[1\], now \[2\]"),
        (lambda: {"made_by": engine(fingerprint="another")}, "engine: stored"),
        (lambda: {"identity": {"dtype": "float32"}}, r"dtype: stored '\(absent\)', now 'float32'"),
    ],
)
def test_changed_model_prompts_or_settings_are_refused(uninterrupted, changed, named):
    before = content(uninterrupted[0])
    with pytest.raises(StoreError, match=named):
        collect(uninterrupted[0], **changed())
    assert content(uninterrupted[0]) == before


def test_processes_share_the_batches_and_return_the_same(tmp_path, uninterrupted):
    meet = threading.Barrier(2)
    engines = [engine(), engine()]  # built one after the other: building seeds torch's only generator
    results, made = {}, {}

    def work(process):
        def count(progress):
            made[process] = progress.tokens

        results[process] = collect(
            tmp_path,
            made_by=engines[process],
            process=process,
            processes=2,
            barrier=lambda: meet.wait(60),
            progress=count,
        )

    threads = [threading.Thread(target=work, args=(process,)) for process in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == uninterrupted[1]
    assert content(tmp_path) == content(uninterrupted[0])
    assert min(made.values()) > 0


def test_same_request_twice_is_our_mistake(tmp_path):
    with pytest.raises(AssertionError, match="twice"):
        collect(tmp_path, asked=[*requests(2), *requests(1)])


def test_a_store_beside_is_taken_over_only_where_all_that_makes_its_responses_is_the_same(
    tmp_path, uninterrupted
):
    folder, responses = uninterrupted
    partial, damaged = tmp_path / "partial", tmp_path / "damaged"
    shutil.copytree(folder, partial)
    (partial / "part-00001.parquet").unlink()
    shutil.copytree(folder, damaged)
    (damaged / "store.json").write_text("{")
    beside, taken = [damaged, partial, folder, tmp_path / "absent"], []
    made_by = engine()
    made_by.generate = None  # nothing is to be made
    found = collect(tmp_path / "own", made_by=made_by, beside=beside, adopted=taken.append)
    assert taken == [folder] and found == responses
    assert content(tmp_path / "own") == content(folder)

    other = dataclasses.replace(SAMPLING, seed=2)
    assert collect(tmp_path / "other", sampling=other, beside=beside, adopted=taken.append) != responses
    assert collect(tmp_path / "rest", beside=[partial], adopted=taken.append) == responses
    assert taken == [folder, partial]

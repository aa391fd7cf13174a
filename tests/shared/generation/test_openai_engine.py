"""A server that fails in the usual ways costs attempts, never answers; its key goes into the header alone."""

import base64
import dataclasses
import json
import logging
import threading
import time
import traceback
from email.utils import formatdate

import pytest
from pydantic import ValidationError

from faulty_server import Fault, FaultyServer, as_json, completion, serving
from shared.errors import StoreError, UserError
from shared.generation.collect import collect_responses
from shared.generation.openai_engine import OpenAIEngine
from shared.generation.transport import ServerError
from shared.models.references import ServerRef, parse_server
from shared.types import ImagePart, Message, Request, Sample, Sampling, TextPart, Usage

KEY = "sk-very-secret-123"
SAMPLING = Sampling(max_new_tokens=16, temperature=0.7, top_p=0.9, seed=3)
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def server():
    with serving(FaultyServer()) as running:
        yield running


def sample(text="hello", name="s0", *, image=None):
    parts = (TextPart(text),) if image is None else (ImagePart(image), TextPart(text))
    return Sample(name, (Message("user", parts),), source="prompts.jsonl:1")


def requests(count=1):
    return [Request(sample(f"question {i}", f"s{i}"), "teacher", 1) for i in range(count)]


def engine(server, **options):
    given = {"backoff_s": 0.01, "timeout_s": 5.0, "attempts": 4} | options
    encoder = given.pop("encoder", None)
    return OpenAIEngine(ServerRef(url=server.url, model="tiny", **given), encoder=encoder)


def ask(server, count=1, sampling=SAMPLING, **options):
    return list(engine(server, **options).generate(requests(count), sampling))


def failure(server, **options):
    with pytest.raises(ServerError) as caught:
        ask(server, **options)
    return str(caught.value)


# what is sent and what comes back


def test_request_and_response_hold_what_they_should(server):
    [response] = ask(server, system_prompt="Be brief.", extra_body={"repetition_penalty": 1.1})
    [sent] = server.requests
    seed = sent.pop("seed")
    assert 0 <= seed < 2**31
    assert sent == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "question 0"},
        ],
        "max_tokens": 16,
        "temperature": 0.7,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
    }
    assert server.paths == ["/v1/chat/completions"]
    assert (response.sample_id, response.role, response.round, response.draw) == ("s0", "teacher", 1, 0)
    assert (response.text, response.finish_reason, response.token_ids) == ("re: question 0", "stop", ())
    assert (response.usage.prompt_tokens, response.usage.response_tokens) == (7, 3)
    assert response.usage.attempts == 1
    assert response.usage.seconds > 0


def test_greedy_sends_no_noise_and_top_k_only_where_set(server):
    ask(server, sampling=Sampling(max_new_tokens=4, temperature=0.0, top_k=5))
    ask(
        server,
        sampling=dataclasses.replace(SAMPLING, top_k=5),
        send_seed=False,
        max_tokens_name="max_completion_tokens",
    )
    greedy, sampled = server.requests
    assert greedy.keys() == {"model", "messages", "max_tokens", "temperature"}
    assert greedy["temperature"] == 0
    assert sampled["top_k"] == 5
    assert "seed" not in sampled
    assert sampled["max_completion_tokens"] == 16
    assert "max_tokens" not in sampled


def test_seed_is_the_responses_own(server):
    base = requests()[0]
    drawn = [base, base._replace(draw=1), base._replace(round=2), base._replace(role="student")]
    one = engine(server, concurrency=1)
    list(one.generate(drawn, SAMPLING))
    list(one.generate([base], SAMPLING))
    list(one.generate([base], dataclasses.replace(SAMPLING, seed=4)))
    seeds = [sent["seed"] for sent in server.requests]
    assert seeds[4] == seeds[0]
    assert len({*seeds[:4], seeds[5]}) == 5


def test_images_go_as_data_urls(server, tmp_path):
    path = tmp_path / "dot.dat"  # the bytes say what it is, not the name
    path.write_bytes(PNG)
    ready_made = "data:image/*;base64," + base64.b64encode(PNG).decode()  # servers want the type
    asked = [
        Request(sample("what?", name, image=image), "teacher", 1)
        for name, image in [("file", str(path)), ("url", ready_made)]
    ]
    list(engine(server, accepts_images=True, concurrency=1).generate(asked, SAMPLING))
    first, second = (sent["messages"][0]["content"] for sent in server.requests)
    assert [part["type"] for part in first] == ["image_url", "text"]
    url = first[0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    assert base64.b64decode(url.partition(",")[2]) == PNG
    assert second == first


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"II*\x00 a TIFF", "Convert it to PNG, JPEG")],
)
def test_images_that_cannot_be_sent_name_the_sample(server, tmp_path, content, message):
    path = tmp_path / "image"
    if content is not None:
        path.write_bytes(content)
    asked = [Request(sample(image=str(path)), "teacher", 1)]
    with pytest.raises(UserError, match=rf"prompts.jsonl:1.*{message}"):
        list(engine(server, accepts_images=True).generate(asked, SAMPLING))
    with pytest.raises(UserError, match="accepts_images: true"):
        list(engine(server).generate(asked, SAMPLING))
    assert server.requests == []


@pytest.mark.parametrize(
    ("reply", "text", "finish_reason"),
    [
        (completion("cut", finish_reason="length"), "cut", "length"),
        (completion("", finish_reason="content_filter"), "", "filtered"),
        (completion(None, finish_reason="length"), "", "length"),  # reasoning used up the limit
        (completion([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), "ab", "stop"),
        ({"choices": [{"message": {"content": "no usage"}, "finish_reason": "stop"}]}, "no usage", "stop"),
    ],
)
def test_every_kind_of_answer_is_kept(server, reply, text, finish_reason):
    server.answer = lambda _: reply
    [response] = ask(server)
    assert (response.text, response.finish_reason) == (text, finish_reason)
    assert response.usage.prompt_tokens == (7 if "usage" in reply else None)


def test_text_is_tokenised_once_and_ends_with_a_turn_only_where_the_model_stopped(server):
    class Bytes:
        fingerprint = "bytes"

        def encode_text(self, text, *, stop):
            return (*text.encode(), 256) if stop else tuple(text.encode())

    server.answer = lambda _: completion("ab")
    assert ask(server, encoder=Bytes())[0].token_ids == (97, 98, 256)
    server.answer = lambda _: completion("ab", finish_reason="length")
    assert ask(server, encoder=Bytes())[0].token_ids == (97, 98)
    assert engine(server, encoder=Bytes()).fingerprint != engine(server).fingerprint


# concurrency


def test_many_at_once_and_still_in_order(server):
    together = threading.Barrier(4, timeout=10)  # breaks unless four requests are on their way at once

    def answer(body):
        number = int(body["messages"][0]["content"].split()[1])
        if number < 4:
            together.wait()
            time.sleep(0.02 * (4 - number))  # the first finishes last
        return completion(str(number))

    server.answer = answer
    assert [r.text for r in ask(server, 12, concurrency=4)] == [str(i) for i in range(12)]
    assert server.most_at_once == 4


def test_one_refusal_ends_the_others(server):
    def answer(body):
        time.sleep(0.02)
        return completion()

    server.answer = answer
    server.faults = [Fault(400, b'{"error": {"message": "no such model"}}')]
    with pytest.raises(ServerError, match="no such model"):
        ask(server, 200, concurrency=2)
    time.sleep(0.1)
    assert len(server.requests) < 20


def test_closing_waits_for_nobody(server):
    released = threading.Event()

    def answer(body):
        if body["messages"][0]["content"] != "question 0":
            released.wait(30)
        return completion()

    server.answer = answer
    responses = engine(server, concurrency=3).generate(requests(9), SAMPLING)
    next(responses)
    responses.close()  # as Ctrl-C does; the others' answers are still to come
    assert not released.is_set()
    released.set()
    time.sleep(0.1)
    assert len(server.requests) <= 4


# faults that pass

PASSING = {
    "429": Fault(429, b'{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}'),
    "500": Fault(500, b"oops"),
    "502 as a page": Fault(502, b"<html><title>Bad Gateway</title></html>", content_type="text/html"),
    "503": Fault(503, b'{"detail": "loading"}'),
    "529": Fault(529),
    "408": Fault(408),
    "cut body": Fault(body=json.dumps(completion()).encode()[:40], declared_length=4000),
    "cut body, undeclared": Fault(body=json.dumps(completion()).encode()[:40]),
    "cut error body": Fault(500, b"{", declared_length=500),
    "no JSON": Fault(body=b"queue full"),
    "no object": as_json([1, 2]),
    "empty body": Fault(),
    "empty choices": as_json({"choices": []}),
    "no choices": as_json({"id": 1}),
    "error with status 200": as_json({"error": {"message": "upstream overloaded"}}),
    "null message": as_json({"choices": [{"message": None, "finish_reason": "stop"}]}),
    "not finished": as_json(completion(finish_reason=None)),
    "unknown finish": as_json(completion(finish_reason={"why": 1})),
    "content of a strange type": as_json(completion(17)),
    "hang-up": Fault(hang_up=True),
    "late": Fault(body=b"{}", delay_s=1.0),
    "drip by drip": Fault(body=b" " * 100, pause_between_bytes_s=0.1),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_passing_faults_cost_an_attempt(server, fault):
    server.faults = [fault, fault]
    [response] = ask(server, timeout_s=0.3)
    assert response.text == "re: question 0"
    assert response.usage.attempts == 3
    assert len(server.requests) == 3
    assert server.requests[0] == server.requests[2]


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_faults_that_do_not_pass_end_with_their_cause(server, fault):
    server.faults = [fault] * 2
    message = failure(server, attempts=2, timeout_s=0.3)
    assert "gave up after 2 attempt(s)" in message
    assert "run the same command again" in message
    if fault.status != 200:
        assert f"HTTP {fault.status}" in message
    if b"Gateway" in fault.body:
        assert "HTTP 502: Bad Gateway." in message


def test_json_of_another_content_type_is_json(server):
    server.faults = [as_json(completion("plain"), content_type="text/plain; charset=utf-8")]
    assert ask(server)[0].text == "plain"


def test_retry_after_is_waited_for(server):
    server.faults = [Fault(429, headers={"Retry-After": "1"})]
    ask(server)
    first, second = server.times
    assert second - first >= 1.0


def test_retry_after_as_a_date(server):
    # whole seconds: a date 2 s ahead is more than 1 s away
    server.faults = [Fault(503, headers={"Retry-After": formatdate(time.time() + 2, usegmt=True)})]
    ask(server)
    first, second = server.times
    assert second - first >= 0.9


@pytest.mark.parametrize("header", ["soon", "-5", "Thu, 01 Jan 1970 00:00:00 GMT"])
def test_senseless_retry_after_is_no_wait(server, header):
    server.faults = [Fault(429, headers={"Retry-After": header})]
    assert ask(server)[0].usage.attempts == 2


def test_waits_double_with_jitter(server):
    class Recorder(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return False

    waits: list[float] = []
    server.faults = [Fault(500)] * 8
    target = engine(server, backoff_s=1.0, attempts=9)
    answer = target._endpoint.ask({"messages": [{"content": "x"}]}, dict, Recorder())
    assert answer.attempts == 9
    shares = [wait / limit for wait, limit in zip(waits, [1, 2, 4, 8, 16, 32, 60, 60], strict=True)]
    assert all(0.5 <= share <= 1 for share in shares), shares
    assert len(set(shares)) == 8


def test_nobody_listens():
    class Nowhere:
        url = "http://127.0.0.1:9/v1"  # the discard port

    assert "the connection failed" in failure(Nowhere, attempts=2)


# faults that stay

LASTING = {
    "400": (Fault(400, b'{"error": {"message": "too long"}}'), "HTTP 400: too long"),
    "401": (Fault(401, b'{"error": "bad key"}'), "HTTP 401: bad key. Set api_key_env"),
    "403": (Fault(403), "check api_key_env"),
    "404": (Fault(404, b'{"detail": "Not Found"}'), "most end in /v1"),
    "422": (Fault(422, b'{"detail": [{"msg": "no top_k"}]}'), "no top_k"),
    "spent quota": (Fault(429, b'{"error": {"message": "pay", "code": "insufficient_quota"}}'), "quota"),
    "long wait": (Fault(429, headers={"Retry-After": "86400"}), "wait 86400 s"),
    "redirect": (
        Fault(307, headers={"Location": "http://127.0.0.1:9/v1"}),
        "redirects to http://127.0.0.1:9",
    ),
    "a web page": (Fault(body=b"<html>log in</html>", content_type="text/html"), "a web page, not an API"),
}


@pytest.mark.parametrize(("fault", "message"), LASTING.values(), ids=LASTING.keys())
def test_lasting_faults_end_at_once_and_say_what_to_do(server, fault, message):
    server.faults = [fault]
    assert message in failure(server)
    assert len(server.requests) == 1


def test_endless_reply_is_refused(server, monkeypatch):
    target = engine(server)
    monkeypatch.setattr(target._endpoint, "_max_reply_bytes", 100_000)
    server.faults = [Fault(body=b'{"choices": "' + b"x" * 1_000_000)]
    with pytest.raises(ServerError, match="longer than 100000 bytes"):
        list(target.generate(requests(), SAMPLING))
    assert len(server.requests) == 1


# the key


def test_key_is_sent_and_appears_nowhere_else(server, monkeypatch, caplog):
    monkeypatch.setenv("TEST_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echo = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode()
    server.faults = [
        as_json({"error": {"message": f"upstream refuses {KEY}"}}),
        Fault(500, f"<title>{KEY}</title>".encode()),
        Fault(401, echo),
    ]
    asked = engine(server, api_key_env="TEST_API_KEY")
    with pytest.raises(ServerError) as caught:
        list(asked.generate(requests(), SAMPLING))
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert "Incorrect API key provided: ***" in str(caught.value)
    told = [
        "".join(traceback.format_exception(caught.value)),
        caplog.text,
        repr(vars(asked)),
        repr(vars(asked._endpoint)),
    ]
    assert len(caplog.records) >= 2
    assert not [text for text in told if KEY in text]


def test_fingerprint_does_not_depend_on_key_or_patience(server, monkeypatch):
    monkeypatch.setenv("TEST_API_KEY", KEY)
    plain = engine(server).fingerprint
    patient = engine(server, api_key_env="TEST_API_KEY", attempts=2, concurrency=3, timeout_s=9.0)
    assert patient.fingerprint == plain
    others = [{"system_prompt": "x"}, {"extra_body": {"x": 1}}, {"send_seed": False}]
    assert len({plain, *(engine(server, **other).fingerprint for other in others)}) == 4


@pytest.mark.parametrize("value", [None, "", "two words", "line\nbreak", "naïve"])
def test_unusable_key_is_refused_without_printing_it(server, monkeypatch, value):
    monkeypatch.delenv("TEST_API_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEST_API_KEY", value)
    with pytest.raises(UserError, match="TEST_API_KEY") as caught:
        engine(server, api_key_env="TEST_API_KEY")
    assert not value or value not in str(caught.value)


# references


def test_short_form():
    ref = parse_server("server:http://localhost:8000/v1/#org/model:7b")
    assert (ref.url, ref.model) == ("http://localhost:8000/v1", "org/model:7b")
    assert ServerRef(url="https://a.example/v1/chat/completions", model="m").url == "https://a.example/v1"


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost/v1#m",
        "server:http://localhost/v1",
        "server:localhost:8000#m",
        "server:ftp://host/v1#m",
        "server:http://a b/v1#m",
        "server:http://host/v1#",
    ],
)
def test_bad_references_show_the_right_form(text):
    with pytest.raises(UserError, match="server:http://localhost:8000/v1#MODEL"):
        parse_server(text)


@pytest.mark.parametrize(
    "values",
    [
        {"url": f"http://user:{KEY}@host/v1"},
        {"url": f"http://host/v1?key={KEY}"},
        {"api_key_env": KEY},
        {"api_key": KEY},
    ],
)
def test_secrets_in_a_reference_are_refused_and_not_repeated(values):
    with pytest.raises(ValidationError) as caught:
        ServerRef(**({"url": "http://host/v1", "model": "m"} | values))
    assert KEY not in str(caught.value)


def test_extra_body_cannot_override_what_is_set_elsewhere():
    with pytest.raises(ValidationError, match="temperature"):
        ServerRef(url="http://host/v1", model="m", extra_body={"temperature": 0})


# collecting


def test_collection_resumes_and_keeps_what_each_answer_cost(server, tmp_path):
    def collect(made_by):
        return collect_responses(
            made_by,
            requests(9),
            SAMPLING,
            folder=tmp_path,
            prompt_tokens=made_by.prompt_tokens,
            batch_tokens=3 * (16 + 3 + 4),
        )

    served = server.answer

    def answer(body):
        if len(server.requests) > 4:
            server.faults = [Fault(400, b"stop")]
        return served(body)

    server.answer = answer
    with pytest.raises(ServerError):
        collect(engine(server, concurrency=1))
    before = len(server.requests)
    server.answer, server.faults = served, [Fault(500)]
    responses = collect(engine(server, concurrency=2))
    assert [r.text for r in responses] == [f"re: question {i}" for i in range(9)]
    assert len(server.requests) - before == 6 + 1  # one batch of three was kept; one request failed once
    assert all((r.usage.prompt_tokens, r.usage.response_tokens) == (7, 3) for r in responses)
    assert sorted(r.usage.attempts for r in responses) == [1] * 8 + [2]
    assert json.loads((tmp_path / "store.json").read_text())["identity"]["token_ids"] == "re-tokenised text"
    with pytest.raises(StoreError, match="engine: stored"):
        collect(engine(server, system_prompt="another"))


def test_responses_are_equal_whatever_they_cost(server):
    [response] = ask(server)
    assert dataclasses.replace(response, usage=Usage(1, 1, 9.0)) == response

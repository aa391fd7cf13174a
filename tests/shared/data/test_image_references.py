"""Rows name images in several ways; none reaches a file outside the root, nor the web unasked."""

import base64
import http.server
import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from shared.config_data import ImagesConfig
from shared.data.image_references import Handling, ImageFinder, as_data_url, in_folder
from shared.data.images import NAMED, ImageError, content_hash, open_image
from shared.data.web_images import _is_public, fetch


def png(colour=(255, 0, 0)):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    return folder


def finder(root, **options):
    return ImageFinder(root, Handling(**{"keep": as_data_url, **options}))


def test_every_way_to_name_an_image_leads_to_the_same_pixels(root, tmp_path):
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    values = [
        "a.png", "./a.png", str(root / "a.png"), url, png(), {"bytes": png(), "path": None},
        {"bytes": None, "path": "a.png"}, {"path": "a.png"}, Image.open(io.BytesIO(png())),
    ]  # fmt: skip
    for keep in (as_data_url, in_folder(tmp_path / "kept")):
        for value in values:
            image = open_image(finder(root, keep=keep).reference(value))
            assert np.array_equal(image, Image.new("RGB", (4, 4), (255, 0, 0)))
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert content_hash(png()) in kept
    assert finder(root, keep=Handling().keep).reference(png()) == NAMED + content_hash(png())


def test_no_path_leaves_the_root(root, tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    for value in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "up/secret.png", "/etc/passwd"):
        with pytest.raises(ImageError, match=r"lies outside the image root .*Set image_root"):
            finder(root).reference(value)
    (root / "inner.png").symlink_to(root / "a.png")
    assert finder(root).reference("inner.png") == str(root / "a.png")


def test_missing_empty_broken_and_foreign_values(root):
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("hello")
    for value, said in {
        "absent.png": "there is no such file below the image root",
        "empty.png": "0 bytes",
        "text.png": "not an image that is read here",
        "https://example.org/a.png": "allow_remote: true",
        "": "must be a path, a URL, bytes",
        7: "got int",
        None: "got NoneType",
        b"": "0 bytes",
        b"no image": "not an image",
    }.items():
        with pytest.raises(ImageError, match=said):
            finder(root).reference(value)
    with pytest.raises(ImageError, match="got NoneType"):
        finder(root).reference({"bytes": None, "path": None})


def test_a_cut_file_passes_its_header_and_fails_its_decoding(root):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
    (root / "cut.jpg").write_bytes(file.getvalue()[:-200])
    assert finder(root).reference("cut.jpg")
    for value in ("cut.jpg", file.getvalue()[:-200]):
        with pytest.raises(ImageError, match="truncated"):
            finder(root, look="decode").reference(value)


def test_limits_of_the_configuration(root):
    for limit in ({"max_pixels": 15}, {"max_bytes": 20}):
        with pytest.raises(ImageError, match=f"more than images.{next(iter(limit))}"):
            finder(root, config=ImagesConfig(**limit)).reference("a.png")


@pytest.fixture
def web():
    """A server that counts what it is asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/redirect":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()
                return
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/a.png")
                self.end_headers()
                return
            self.send_response(404 if self.path == "/absent" else 200)
            self.end_headers()
            if self.path == "/drip":
                try:
                    for _ in range(50):
                        self.wfile.write(b"x")
                        self.wfile.flush()
                        time.sleep(0.05)
                except OSError:
                    pass
            else:
                self.wfile.write({"/text": b"hello", "/long": b"x" * 10_000}.get(self.path, png()))

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_web_is_asked_only_where_allowed_and_once(root, web, tmp_path):
    address, asked = web
    allowed = {
        "config": ImagesConfig(allow_remote=True, allow_private=True),
        "downloads": tmp_path / "downloads",
    }
    with pytest.raises(ImageError, match="on the web"):
        finder(root).reference(f"{address}/a.png")
    assert finder(root, config=ImagesConfig(allow_remote=True, allow_private=True)).reference(
        f"{address}/a.png"
    ) == (f"{address}/a.png")
    assert not asked
    for name in ("a.png", "moved"):
        found = finder(root, **allowed).reference(f"{address}/{name}")
        assert open_image(found).getpixel((0, 0)) == (255, 0, 0)
    asked.clear()
    assert finder(root, **allowed).reference(f"{address}/moved") == found and not asked  # resumed


def test_what_the_web_may_do_wrong(root, web, tmp_path):
    address, _ = web
    quick = ImagesConfig(allow_remote=True, allow_private=True, timeout_s=0.4, max_bytes=5000)
    remote = finder(root, config=quick, downloads=tmp_path / "downloads")
    for name, said in {
        "absent": "404",
        "text": "not an image",
        "long": "more than images.max_bytes: 5000",
        "redirect": "cannot be fetched",
        "drip": r"took longer than images\.timeout_s: 0\.4",
    }.items():
        with pytest.raises(ImageError, match=said):
            remote.reference(f"{address}/{name}")
    assert not (tmp_path / "downloads").exists()
    with pytest.raises(ImageError, match="cannot be fetched"):
        fetch("http://127.0.0.1:1/a.png", quick)


def test_no_row_reaches_this_machine_or_its_network_unasked(root, web, tmp_path, monkeypatch):
    address, asked = web
    public = {"config": ImagesConfig(allow_remote=True), "downloads": tmp_path / "downloads"}
    for url in (f"{address}/a.png", f"{address}/a.png".replace("127.0.0.1", "localhost")):
        with pytest.raises(ImageError, match=r"an address of this machine .*allow_private: true"):
            finder(root, **public).reference(url)
    # a name is looked up once, and what was looked at is what is connected to
    answers = iter([[(2, 1, 6, "", ("8.8.8.8", 80))], [(2, 1, 6, "", ("127.0.0.1", 80))]])
    connected = []

    def connect(place, *arguments):
        connected.append(place)
        raise OSError("not in a test")

    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments, **options: next(answers))
    monkeypatch.setattr("socket.create_connection", connect)
    with pytest.raises(ImageError, match="not in a test"):
        finder(root, **public).reference("http://example.org/a.png")
    assert connected == [("8.8.8.8", 80)] and not asked


@pytest.mark.parametrize(
    "address", ["10.1.2.3", "192.168.0.1", "169.254.169.254", "::1", "fe80::1", "fc00::1", "::ffff:127.0.0.1"]
)
def test_addresses_that_are_not_public(address):
    assert not _is_public(address) and _is_public("8.8.8.8") and _is_public("2606:4700::1111")


def test_each_file_is_looked_at_once(root, monkeypatch):
    import shared.data.image_references as references

    looked = []
    monkeypatch.setattr(references, "check_header", lambda path, limits: looked.append(path))
    many = finder(root)
    assert len({many.reference("a.png") for _ in range(5)}) == 1 and len(looked) == 1

from __future__ import annotations

import pytest
from pydantic import ValidationError

from shared.errors import UserError
from shared.models.references import ModelRef, resolve_path


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "shipped_model"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('a package is located, never imported')")
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    (tmp_path / "outside.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_a_string_is_short_for_a_name():
    assert ModelRef.model_validate("org/model") == ModelRef(name="org/model")
    with pytest.raises(ValidationError, match="extra"):
        ModelRef.model_validate({"name": "org/model", "adapter": "x"})


def test_hub_ids_local_paths_and_package_files(package, tmp_path):
    assert resolve_path("org/model") is None
    assert resolve_path(str(package)) == package
    assert resolve_path("pkg://shipped_model/tiny.gguf") == package / "tiny.gguf"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pkg://nonesuch/tiny.gguf", "package 'nonesuch' is not installed"),
        ("pkg://a.b/tiny.gguf", "package 'a.b' is not installed"),
        ("pkg://shipped_model/absent.gguf", "has no file 'absent.gguf': looked in .*shipped_model"),
        ("pkg://shipped_model", "has no file ''"),
        ("pkg://shipped_model/../outside.gguf", "has no file '../outside.gguf'"),
        ("./absent", "does not exist"),
        ("absent.gguf", "does not exist. Give a local path, a hub id"),
        ("absent.csv", "does not exist. Give a local file .* named by `hub` instead of `path`"),
    ],
)
def test_what_cannot_be_found(package, name, message):
    with pytest.raises(UserError, match=message):
        resolve_path(name)

"""How a model or a data file is named: hub id, local path, `pkg://PACKAGE/FILE`, or a server's URL."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from shared.errors import UserError

PACKAGE_SCHEME = "pkg://"
SERVER_SCHEME = "server:"
SERVER_EXAMPLE = "server:http://localhost:8000/v1#MODEL"


class ModelRef(BaseModel):
    """A model by name, with what a run may add to it. A plain string is short for `{name: ...}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        description="hub id, local folder (of a model, or of a LoRA), .gguf file, or pkg://PACKAGE/FILE"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    lora: str | None = Field(None, description="folder or hub id of a LoRA to merge into the model")
    quantization: Literal["nf4"] | None = Field(
        None, description="nf4: linear layers rounded to 4 bits as they are loaded (bitsandbytes)"
    )
    chat_template: str | None = Field(None, description="Jinja text, or a path to a .jinja file")
    template_arguments: dict[str, Any] = Field(
        default_factory=dict, description="passed to the chat template"
    )
    system_prompt: str | None = Field(None, description="put before chats that have no system turn")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _possible(self) -> ModelRef:
        if self.quantization is not None and self.lora is not None:
            raise ValueError(
                "quantization rounds the weights as they are stored, and lora is merged into them after "
                "that; merge the LoRA first and save the model, or remove one"
            )
        return self


class ServerRef(BaseModel):
    """A model behind an OpenAI-compatible server. `server:URL#MODEL` is short for `{url: URL, model: MODEL}`.

    It holds no secret: an API key stays in an environment variable, of which only the name is written here.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    url: str = Field(description="base URL, as in http://localhost:8000/v1")
    model: str = Field(min_length=1, description="as the server names it")
    api_key_env: str | None = Field(None, description="environment variable that holds the API key")
    system_prompt: str | None = Field(None, description="put before chats that have no system turn")
    accepts_images: bool = Field(False, description="some servers drop images silently, so this is explicit")
    concurrency: int = Field(8, ge=1, description="requests in flight")
    timeout_s: float = Field(600.0, gt=0, description="for one attempt")
    attempts: int = Field(8, ge=1, description="for one request: the first one and its repetitions")
    backoff_s: float = Field(1.0, gt=0, description="wait after the first failure; doubles with each")
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="max_completion_tokens for OpenAI's reasoning models"
    )
    send_seed: bool = Field(True, description="false for servers that refuse the field `seed`")
    extra_body: dict[str, JsonValue] = Field(
        default_factory=dict, description="further fields of each request, e.g. chat_template_kwargs"
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        url, hash_sign, model = value.removeprefix(SERVER_SCHEME).partition("#")
        if not value.startswith(SERVER_SCHEME) or not hash_sign:
            raise ValueError(f"a server is written {SERVER_EXAMPLE}")
        return {"url": url, "model": model}

    @field_validator("url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None or parts.query:
            raise ValueError(
                "a user, a password or a query in a URL would end up in files and logs; give the key by "
                "api_key_env"
            )
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.fragment
            or re.search(r"\s", url)
        ):
            raise ValueError(f"{url!r} is no base URL such as http://localhost:8000/v1")
        return url.rstrip("/").removesuffix("/chat/completions")

    @field_validator("api_key_env")
    @classmethod
    def _name_of_a_variable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError(  # without the value: it could be the key itself
                "expected the name of an environment variable, in capitals, such as OPENAI_API_KEY, never "
                "the key"
            )
        return name

    @field_validator("extra_body")
    @classmethod
    def _sets_nothing_twice(cls, extra: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if taken := sorted(extra.keys() & OWN_FIELDS):
            raise ValueError(f"{', '.join(taken)}: set by the sampling settings and the reference itself")
        return extra


OWN_FIELDS = {
    *("model", "messages", "n", "stream"),
    *("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed"),
}


def parse_server(text: str) -> ServerRef:
    """The server that a command line names.

    Raises:
        UserError: not of the form `server:URL#MODEL`.
    """
    try:
        return ServerRef.model_validate(text)
    except ValidationError as error:
        causes = "; ".join(
            str(problem.get("ctx", {}).get("error", problem["msg"])) for problem in error.errors()
        )
        raise UserError(f"the server reference cannot be used: {causes}. Write {SERVER_EXAMPLE}.") from None


def resolve_path(name: str) -> Path | None:
    """The local path of a reference, or None for a hub id.

    Raises:
        UserError: a `pkg://` reference to a package or file that is not installed, a path that is not there.
    """
    if name.startswith(PACKAGE_SCHEME):
        package, _, file = name.removeprefix(PACKAGE_SCHEME).partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None:
            raise UserError(
                f"{name!r}: the Python package {package!r} is not installed. Install it with pip."
            )
        roots = [Path(root) for root in spec.submodule_search_locations or []]
        for root in roots:
            path = (root / file).resolve()
            if file and path.is_relative_to(root.resolve()) and path.exists():
                return path
        raise UserError(
            f"{name!r}: the package {package!r} has no file {file!r}: looked in {', '.join(map(str, roots))}."
        )
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.suffix in {".json", ".jsonl", ".csv", ".parquet"}:
        raise UserError(
            f"{name!r} does not exist. Give a local file or pkg://PACKAGE/FILE; a data set of the hub is "
            "named by `hub` instead of `path`."
        )
    if name.startswith(("/", "./", "../", "~")) or path.suffix == ".gguf":
        raise UserError(f"{name!r} does not exist. Give a local path, a hub id or pkg://PACKAGE/FILE.")
    return None

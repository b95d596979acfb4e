"""Which origin a uri names."""

from __future__ import annotations

import pytest

from services.store.origins.uris import remote_uri
from stoker.errors import InvalidRequest


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("s3://bucket/models/llama/", "s3://bucket/models/llama"),
        ("HTTPS://host:8443/m", "https://host:8443/m"),
        ("hf://owner/name", "hf://owner/name"),
        ("hf://owner/name@refs/pr/1", "hf://owner/name@refs/pr/1"),
        ("gs://b/p", "gs://b/p"),
        ("az://c/p", "az://c/p"),
    ],
)
def test_a_remote_uri_is_normalised(uri, text):
    found = remote_uri(uri)

    assert found is not None
    assert found.text == text


@pytest.mark.parametrize("uri", ["/models/a", "file:///models/a", "models/a", "ftp://host/a", ""])
def test_other_uris_are_not_remote(uri):
    assert remote_uri(uri) is None


@pytest.mark.parametrize(
    "uri",
    [
        "https://user:secret@host/a",
        "https://host/a?X-Amz-Signature=secret",
        "hf://owner",
        "hf://owner/../name",
        "s3:///a",
        "s3://b/../c",
        "http://h/a b",
        "http://h/" + "a" * 3000,
    ],
)
def test_credentials_and_malformed_uris_are_refused_without_being_repeated(uri):
    with pytest.raises(InvalidRequest) as caught:
        remote_uri(uri)

    assert "secret" not in caught.value.message

"""What an HTTP answer means."""

from __future__ import annotations

import pytest

from services.store.origins.http_replies import (
    Wanted,
    conditions,
    fault,
    range_fault,
    retry_after_seconds,
    version_of,
)
from services.store.origins.origin import Broken, OriginChanged, OriginRefused, RemoteFile
from stoker.errors import NotFound

FILE = RemoteFile(name="f", size_bytes=100, version='"a"')
WANTED = Wanted(url="http://h/f", file=FILE, begin=10, end=20)
GOOD = {"content-range": "bytes 10-19/100", "etag": '"a"'}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, OriginRefused),
        (403, OriginRefused),
        (404, NotFound),
        (410, NotFound),
        (412, OriginChanged),
        (416, OriginChanged),
        (429, Broken),
        (500, Broken),
        (503, Broken),
        (418, OriginRefused),
        (304, OriginRefused),
    ],
)
def test_a_status_says_whether_to_try_again(status, kind):
    assert type(fault(status, {}, url="u", now_unix_seconds=0.0)) is kind


@pytest.mark.parametrize("status", [200, 206])
def test_a_good_status_is_no_fault(status):
    assert fault(status, {}, url="u", now_unix_seconds=0.0) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("soon", None),
        ("", None),
        ("-1", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(text, seconds):
    assert retry_after_seconds({"retry-after": text}, now_unix_seconds=10.0) == seconds


@pytest.mark.parametrize(
    ("status", "headers", "kind"),
    [
        (206, GOOD, None),
        (206, {"content-range": "bytes 10-19/*"}, None),
        (206, GOOD | {"etag": '"b"'}, OriginChanged),
        (206, {"content-range": "bytes 10-19/101"}, OriginChanged),
        (206, {"content-range": "bytes 0-9/100"}, OriginRefused),
        (206, {}, OriginRefused),
        (200, {"content-length": "100"}, OriginRefused),
    ],
)
def test_a_range_is_the_one_that_was_asked_for_of_the_same_file(status, headers, kind):
    found = range_fault(WANTED, status, headers)

    assert (None if found is None else type(found)) is kind


def test_a_strong_tag_is_required_and_a_weak_one_compared():
    assert conditions('"a"') == {"If-Match": '"a"'}
    assert conditions('W/"a"') == {}
    assert conditions("Thu, 01 Jan 1970 00:00:00 GMT") == {
        "If-Unmodified-Since": "Thu, 01 Jan 1970 00:00:00 GMT"
    }
    assert conditions("") == {}
    assert version_of({"last-modified": "x", "etag": '"a"'}) == '"a"'

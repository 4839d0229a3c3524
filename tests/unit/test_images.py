"""Images: read from under the root and nowhere else, in the question by their digest, in the body when it is sent."""

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.errors import InputError, JobError
from batchrun.job.job import Job
from batchrun.job.settings import Input
from batchrun.records import Request, Row
from batchrun.request.builder import RequestBuilder
from batchrun.request.image_digests import ImageDigests, write
from batchrun.request.images import Images, read_below
from batchrun.source import open_source
from batchrun.startup.input_check import survey
from tests.jobs import job_over, write_lines
from tests.pictures import OF_TYPE, PNG, data_url

Columns = dict[str, Any]


def images_under(root: Path | None, max_bytes: int = 1000) -> Images:
    return Images(Input(image_root=None if root is None else str(root), max_image_bytes=max_bytes))


def refusal(images: Images, source: str | bytes) -> str:
    with pytest.raises(InputError) as caught:
        images.read(source)
    return str(caught.value)


# -- files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "deep").mkdir(parents=True)
    (tmp_path / "root" / "deep" / "a.png").write_bytes(PNG + b"inside")
    (tmp_path / "outside.png").write_bytes(PNG + b"outside")
    return tmp_path / "root"


def test_files_under_the_root_are_read(root: Path) -> None:
    """By their path or by a link that stays inside."""
    (root / "link.png").symlink_to("deep/a.png")
    (root / "folder").symlink_to(root / "deep")
    for path in ("deep/a.png", "./deep//a.png", str(root / "deep" / "a.png"), "link.png", "folder/a.png"):
        assert images_under(root).read(path).content == PNG + b"inside"


NAMES = [
    b"a b.png",
    b"a\nb.png",
    b"a#b?c=%41&d.png",
    b"100%.png",
    b"100%25.png",
    b"\"quo\\te'.png",
    b"~.png",
    b"-.png",
    b"*[a].png",
    b"$HOME.png",
    "ä\U0001f600.png".encode(),
    b"caf\xe9.png",
    b"\xff\xfe.png",
    b"a:/b.png",
    b"a://b.png",
]


def named(root: Path, name: bytes) -> bytes:
    """The content of a new image with that name, which differs from all others'."""
    place = os.path.join(os.fsencode(root), name)  # noqa: PTH118  bytes
    os.makedirs(os.path.dirname(place), exist_ok=True)  # noqa: PTH103, PTH120
    content = PNG + name.hex().encode()
    with open(place, "wb") as file:
        file.write(content)
    return content


@pytest.mark.parametrize("name", NAMES)
def test_image_names_may_have_any_bytes(root: Path, tmp_path: Path, name: bytes) -> None:
    content = named(root, name)
    said = [f"file:{quote(name)}", f"file://{quote(os.fsencode(root) + b'/' + name)}"]
    if name not in (b"caf\xe9.png", b"\xff\xfe.png"):  # what is no text can only be said by a URL
        said += [f"./{name.decode()}"] + ([name.decode()] if b"://" not in name else [])
    rows = [{"photo": each} for each in said]
    write_lines(tmp_path / "in.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    job = a_job(root)
    for file in (tmp_path / "in.jsonl", tmp_path / "in.parquet"):
        records = list(open_source((file,)).records())
        assert len(records) == len(said)
        for record in records:
            assert sent(job, record.columns)[1:] == [image_part(data_url(content))]


def _outside_absolute(root: Path) -> str:
    return str(root.parent / "outside.png")


def _link_out(root: Path) -> str:
    (root / "link.png").symlink_to(root.parent / "outside.png")
    return "link.png"


def _folder_out(root: Path) -> str:
    (root / "folder").symlink_to(root.parent)
    return "folder/outside.png"


def _sibling_with_the_roots_name(root: Path) -> str:
    (root.parent / "rooted").mkdir()
    (root.parent / "rooted" / "a.png").write_bytes(PNG)
    return str(root.parent / "rooted" / "a.png")


@pytest.mark.parametrize(
    ("path_in", "words"),
    [
        (_outside_absolute, "is outside input.image_root"),
        (_link_out, "is outside input.image_root"),
        (_folder_out, "is outside input.image_root"),
        (_sibling_with_the_roots_name, "is outside input.image_root"),
        (lambda root: "../outside.png", "holds `..`"),
        (lambda root: "deep/../deep/a.png", "holds `..`"),
        (lambda root: f"file://{root.parent}/outside.png", "is outside input.image_root"),
        (lambda root: "file:///etc/passwd", "is outside input.image_root"),
        (lambda root: "file://server/share/a.png", "is outside input.image_root"),
        (lambda root: "file:%2e%2e/outside.png", "holds `..`"),
        (lambda root: "file:a%00.png", "is not a path"),
        (lambda root: "two\nlines.png", "two\\nlines.png: can't be read: No such file"),
        (lambda root: "deep", "is not a regular file"),
        (lambda root: ".", "is not a regular file"),
        (lambda root: "gone.png", "can't be read: No such file"),
        (lambda root: "deep/a.png/b.png", "can't be read: Not a directory"),
        (lambda root: "a\0.png", "is not a path"),
        (lambda root: "\ud83d.png", "is not a path"),
        (lambda root: "x" * 5000, "can't be read: File name too long"),
    ],
)
def test_paths_that_leave_the_root_are_refused(root: Path, path_in: Callable[[Path], str], words: str) -> None:
    assert words in refusal(images_under(root), path_in(root))


def test_special_files_are_refused_without_opening(root: Path) -> None:
    os.mkfifo(root / "pipe")
    opened = threading.Event()

    def writer() -> None:
        os.close(os.open(root / "pipe", os.O_WRONLY))  # returns once somebody opens the pipe to read
        opened.set()

    threading.Thread(target=writer, daemon=True).start()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(root / "socket"))
        for name in ("pipe", "socket"):
            assert "is not a regular file" in refusal(images_under(root), name)
    assert "is not a regular file" in refusal(images_under(Path("/dev")), "zero")
    assert not opened.wait(0.05)
    os.close(os.open(root / "pipe", os.O_RDONLY | os.O_NONBLOCK))  # the writer was there all along
    assert opened.wait(5)


def test_a_path_replaced_by_a_link_is_refused(root: Path) -> None:
    (root / "link.png").symlink_to(root.parent / "outside.png")
    (root / "folder").symlink_to(root.parent)
    with pytest.raises(InputError, match="is not a regular file"):
        read_below(root, "link.png", 1000)
    with pytest.raises(NotADirectoryError):  # O_NOFOLLOW with O_DIRECTORY raises this for a link
        read_below(root, "folder/outside.png", 1000)


def test_a_folder_swapped_for_links_leaks_nothing(root: Path) -> None:
    (root.parent / "secret").mkdir()
    (root.parent / "secret" / "a.png").write_bytes(PNG + b"outside")
    (root / "link").symlink_to(root.parent / "secret")
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            (root / "deep").rename(root / "aside")
            (root / "link").rename(root / "deep")
            (root / "deep").rename(root / "link")
            (root / "aside").rename(root / "deep")

    swapping = threading.Thread(target=swap)
    swapping.start()
    seen = set()
    for _ in range(600):
        try:
            seen.add(images_under(root).read("deep/a.png").content)
        except InputError:
            seen.add(b"refused")
    over.set()
    swapping.join()
    assert seen == {PNG + b"inside", b"refused"}


def test_without_a_root_no_path_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert "is a path; set input.image_root" in refusal(images_under(None), "deep/a.png")


def test_an_invalid_root_is_a_job_error(root: Path) -> None:
    with pytest.raises(JobError, match=r"input\.image_root: .*gone is not a folder"):
        images_under(root / "gone")


# -- what is an image


@pytest.mark.parametrize("media_type", OF_TYPE)
def test_an_images_type_comes_from_its_bytes(tmp_path: Path, media_type: str) -> None:
    content = OF_TYPE[media_type]
    (tmp_path / "image.bmp").write_bytes(content)
    for source in ("image.bmp", content, data_url(content, "image/bmp")):
        image = images_under(tmp_path).read(source)
        assert (image.media_type, image.content) == (media_type, content)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"", "an image in bytes: is empty"),
        (b"BM bitmap", "an image in bytes: not a png, jpeg, gif or webp image (begins with b'BM bitma')"),
        (b"<svg/>", "not a png, jpeg, gif or webp image"),
        (b"GIF88a", "not a png, jpeg, gif or webp image"),
        (PNG * 200, "an image in bytes: has 1,600 bytes, more than input.max_image_bytes (1,000)"),
        (data_url(PNG * 200), "a data URL: has 1,600 bytes, more than input.max_image_bytes (1,000)"),
        (data_url(b"text"), "a data URL: not a png, jpeg, gif or webp image"),
        ("data:image/png,%89PNG", "a data URL: the data URL is not in base64"),
        ("data:image/png;base64,iVBO*Rw0K", "a data URL: the data URL is not base64"),
        ("data:image/png;base64,iVBORw0KGgo", "a data URL: the data URL is not base64"),
        ("data:image/png;base64,é", "a data URL: the data URL is not base64"),
    ],
)
def test_invalid_and_large_images_are_refused(source: str | bytes, words: str) -> None:
    assert words in refusal(images_under(None), source)


def test_a_large_file_is_refused_by_size(root: Path) -> None:
    """Even if it grows later."""
    (root / "big.png").write_bytes(PNG * 200)
    assert refusal(images_under(root), "big.png") == (
        "big.png: has 1,600 bytes, more than input.max_image_bytes (1,000)"
    )


# -- in a request


def a_job(root: Path | None = None, **request: object) -> Job:
    given = {"prompt": "What?", "images": ["photo"], **request}
    return job_over(None, request=given, input={} if root is None else {"image_root": str(root)})


def sent(job: Job, columns: Columns, dialect: str = "columns") -> list[Any]:
    """The content of the last message, as it is sent."""
    request, _ = RequestBuilder(job, dialect).whole(Row(0, columns), Images(job.input).read)
    content: list[Any] = json.loads(request.body)["messages"][-1]["content"]
    return content


def test_a_streamed_image_request_differs_at_end() -> None:
    row = Row(0, {"photo": PNG})
    bodies = [
        RequestBuilder(job, "columns").whole(row, Images(job.input).read)[0].body
        for job in (a_job(), a_job(stream=True))
    ]
    plain, streamed = map(json.loads, bodies)
    assert streamed.pop("stream") is True
    assert streamed.pop("stream_options") == {"include_usage": True}
    assert streamed == plain


def image_part(url: str, **more: str) -> Columns:
    return {"type": "image_url", "image_url": {"url": url, **more}}


URL = "https://h/a.png"


@pytest.mark.parametrize(
    ("value", "urls"),
    [
        (URL, [URL]),
        ("HTTP://h/a.png".lower(), ["http://h/a.png"]),
        (PNG, [data_url(PNG)]),
        (data_url(PNG), [data_url(PNG)]),
        ([URL, None, PNG], [URL, data_url(PNG)]),
        ([[URL], [PNG]], [URL, data_url(PNG)]),
        ({"bytes": PNG, "path": "a.png"}, [data_url(PNG)]),
        ({"bytes": None, "path": "deep/a.png"}, [data_url(PNG + b"inside")]),
        ({"url": URL}, [URL]),
        ("deep/a.png", [data_url(PNG + b"inside")]),
    ],
)
def test_image_columns_follow_the_last_user_text(root: Path, value: object, urls: list[str]) -> None:
    job = a_job(root, image_detail="low", system="You see.")
    expected = [image_part(url, detail="low") for url in urls]
    assert sent(job, {"photo": value}) == [{"type": "text", "text": "What?"}, *expected]


def test_image_columns_keep_the_jobs_order(root: Path) -> None:
    job = a_job(root, images=["front", "back"])
    assert sent(job, {"back": "https://h/b", "front": ["https://h/f"]})[1:] == [
        image_part("https://h/f"),
        image_part("https://h/b"),
    ]
    assert sent(job, {"back": "https://h/b", "front": None})[1:] == [image_part("https://h/b")]


def test_images_join_a_conversation_of_the_rows_own(root: Path) -> None:
    turns = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": "Where?"}]
    job = a_job(root, prompt=None, messages="chat")
    request, _ = RequestBuilder(job, "messages").whole(Row(0, {"chat": turns, "photo": URL}), Images(job.input).read)
    messages = json.loads(request.body)["messages"]
    assert messages[0]["content"] == [{"type": "text", "text": "Look."}, image_part(URL)]
    assert messages[1] == turns[1]
    assert turns[0]["content"] == "Look."


def test_templates_of_parts_may_name_image_columns(root: Path) -> None:
    parts = [
        {"type": "text", "text": "{{ ask }}"},
        image_part("{{ photo }}", detail="high"),
        image_part("{{ dir }}/a.png"),
    ]
    job = a_job(root, prompt=None, images=[], messages=[{"role": "user", "content": parts}])
    urls = [data_url(PNG), data_url(PNG + b"inside")]
    assert sent(job, {"ask": "Hm?", "photo": PNG, "dir": "deep"}) == [
        {"type": "text", "text": "Hm?"},
        image_part(urls[0], detail="high"),
        image_part(urls[1]),
    ]


def test_images_in_messages_obey_the_same_rules(root: Path) -> None:
    messages = [{"role": "user", "content": [image_part("deep/a.png")]}]
    own = a_job(root, prompt=None, images=[])
    batch = {"custom_id": "1", "body": {"messages": messages}}
    for dialect, columns in (("messages", {"messages": messages}), ("openai-batch", batch)):
        assert sent(own, columns, dialect) == [image_part(data_url(PNG + b"inside"))]
        with pytest.raises(InputError, match=r"set input\.image_root"):
            sent(a_job(None, prompt=None, images=[]), columns, dialect)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({}, "column 'photo', which request.images names, is missing"),
        ({"photo": None}, "no image in photo"),
        ({"photo": []}, "no image in photo"),
        ({"photo": 5}, "photo: expected a path, a URL or bytes of an image (is 5)"),
        ({"photo": {"x": 1}}, "photo: expected a path, a URL or bytes of an image"),
        ({"photo": "gs://bucket/a.png"}, "expected an http(s) URL, a data URL or a path (is 'gs://bucket/a.png')"),
        ({"photo": "http://"}, "expected an http(s) URL, a data URL or a path"),
        ({"photo": ""}, "expected an http(s) URL, a data URL or a path (is '')"),
    ],
)
def test_a_column_that_holds_no_image_is_named(columns: Columns, words: str) -> None:
    with pytest.raises(InputError) as caught:
        RequestBuilder(a_job(), "columns").build(Row(0, columns))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url"}, "messages[0].content[0].image_url: expected an object with a url"),
        ({"type": "image_url", "image_url": URL}, "image_url: expected an object with a url"),
        (image_part(URL, detail="huge"), "image_url.detail: expected one of auto, low, high (is 'huge')"),
    ],
)
def test_an_invalid_image_part_is_named(part: Columns, words: str) -> None:
    job = a_job(prompt=None, images=[])
    with pytest.raises(InputError) as caught:
        RequestBuilder(job, "messages").build(Row(0, {"messages": [{"role": "user", "content": [part]}]}))
    assert words in str(caught.value)


def test_misplaced_images_are_reported_early(root: Path) -> None:
    in_url = a_job(prompt=None, images=[], messages=[{"role": "user", "content": [image_part("{{ photo }}")]}])
    with pytest.raises(InputError, match=r"column 'photo' holds a list; name it in request\.images"):
        sent(in_url, {"photo": [URL]})
    no_user = a_job(prompt=None, messages=[{"role": "system", "content": "x"}])
    with pytest.raises(InputError, match="there is no message by the user"):
        sent(no_user, {"photo": URL})
    with pytest.raises(JobError, match=r"request\.images: the lines of a provider's batch file bring their own"):
        RequestBuilder(a_job(prompt=None), "openai-batch")
    with pytest.raises(JobError, match=r"request\.image_detail"):
        a_job(images=[], image_detail="low")


def test_one_picture_has_one_key_in_any_form(root: Path) -> None:
    """Another picture has another key."""
    (root / "copy.jpg").write_bytes(PNG + b"inside")
    (root / "other.png").write_bytes(PNG + b"other")
    job = a_job(root)
    builder, read = RequestBuilder(job, "columns"), Images(job.input).read
    same = [
        "deep/a.png",
        "copy.jpg",
        PNG + b"inside",
        data_url(PNG + b"inside"),
        data_url(PNG + b"inside", "image/jpg"),
    ]
    keys = [builder.identify(Row(0, {"photo": source}), read)[0].key for source in same]
    assert len(set(keys)) == 1
    others = ["other.png", URL, ["deep/a.png", "other.png"], ["other.png", "deep/a.png"]]
    assert len({builder.identify(Row(0, {"photo": source}), read)[0].key for source in [*others, same[0]]}) == 5
    detailed = RequestBuilder(a_job(root, image_detail="low"), "columns")
    assert detailed.identify(Row(0, {"photo": same[0]}), read)[0].key != keys[0]


def test_a_waiting_request_holds_no_image(root: Path) -> None:
    """Its bound counts images and not base64 bytes."""
    (root / "big.png").write_bytes(PNG + os.urandom(500_000))
    job = job_over(None, request={"prompt": "What?", "images": ["photo"]}, input={"image_root": str(root)})
    builder, columns = RequestBuilder(job, "columns"), {"photo": ["big.png", data_url(PNG), URL]}
    waiting = builder.build(Row(0, columns))
    assert (waiting.pictures, waiting.key, waiting.image_tokens) == (2, b"", 3 * 765)
    assert len(waiting.body) < 1000
    assert waiting.max_prompt_tokens == len(waiting.body) + 3 * 6_000
    whole, digest = builder.whole(Row(0, columns), Images(job.input).read)
    assert len(whole.body) > 666_000
    assert whole.max_prompt_tokens == waiting.max_prompt_tokens
    assert (whole.key, digest) == _identity(builder.identify(Row(0, columns), Images(job.input).read))


def _identity(identified: tuple[Any, bytes]) -> tuple[bytes, bytes]:
    return identified[0].key, identified[1]


# -- in the check pass


def test_unusable_images_are_named_and_counted(root: Path) -> None:
    rows = [{"photo": name} for name in ("deep/a.png", "gone.png", "../outside.png", "notes.txt", "big.png")]
    (root / "notes.txt").write_text("no image")
    (root / "big.png").write_bytes(PNG * 200)
    path = write_lines(root.parent / "in.jsonl", rows)
    given: Columns = {"image_root": str(root), "max_image_bytes": 1000}
    job = job_over(path, request={"prompt": "What?", "images": ["photo"]}, input=given)
    pictured: list[int] = []

    def accepted(ordinal: int, request: Request, digest: bytes) -> None:
        pictured.extend([ordinal] * bool(digest))

    found = survey(open_source((path,)), job, root.parent, accepted=accepted)
    assert (found.rows, list(found.rejected), pictured) == (1, [1, 2, 3, 4], [0])
    reported = [str(problem) for problem in found.first_problems]
    for line, (place, words) in enumerate(
        zip(
            reported, ("can't be read: No such file", "holds `..`", "not a png, jpeg, gif", "1,600 bytes"), strict=True
        ),
        2,
    ):
        assert place.startswith(f"{path}:{line}: {rows[line - 1]['photo']}: "), place
        assert words in place


def test_images_in_binary_columns_are_checked(tmp_path: Path) -> None:
    table = pa.table({"photo": pa.array([[PNG], [PNG, PNG], [b"no"]], pa.list_(pa.large_binary()))})
    pq.write_table(table, tmp_path / "in.parquet")
    job = job_over(tmp_path / "in.parquet", request={"prompt": "What?", "images": ["photo"]})
    found = survey(open_source((tmp_path / "in.parquet",)), job, tmp_path)
    assert (found.rows, list(found.rejected), found.image_tokens) == (2, [2], 3 * 765)


# -- images.bin


def test_image_digests_are_known_by_row(tmp_path: Path) -> None:
    """A damaged entry says nothing."""
    path = tmp_path / "images.bin"
    digests = {1: b"a" * 16, 4: b"b" * 16}
    write(path, ((digest, row) for row, digest in digests.items()))
    assert path.stat().st_mode & 0o777 == 0o600
    with ImageDigests(path) as known:
        assert [known.of(row) for row in range(6)] == [None, b"a" * 16, None, None, b"b" * 16, None]
    whole = path.read_bytes()
    for bit in range(0, len(whole) * 8, 11):
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        with ImageDigests(path) as known:
            assert {known.of(row) for row in range(6)} <= {None, *digests.values()}
            assert all(known.of(row) in (None, digests.get(row)) for row in range(6))
    with ImageDigests(tmp_path / "gone.bin") as known:
        assert known.of(0) is None


def test_an_image_body_is_the_same_json(root: Path) -> None:
    (root / "big.png").write_bytes(PNG + os.urandom(2_000_000))
    job = job_over(None, request={"prompt": "{{ text }}", "images": ["photo"]}, input={"image_root": str(root)})
    content = (root / "big.png").read_bytes()
    columns = {"text": 'NUL \0, "quotes", \\0 and ü', "photo": ["big.png", URL, "deep/a.png"]}
    assert sent(job, columns) == [
        {"type": "text", "text": columns["text"]},
        image_part(data_url(content)),
        image_part(URL),
        image_part(data_url(PNG + b"inside")),
    ]

"""Import streams and tar files, cut anywhere, and tar files as another program reads and writes them."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.lsn import Lsn
from excimer.pgformat.tar_stream import (
    END_OF_TAR,
    MemberData,
    MemberEnd,
    MemberStart,
    TarError,
    TarParser,
    pack_file_header,
    padding,
)
from excimer.wire.import_stream import (
    FilesEnd,
    ImportBegin,
    ImportEnd,
    ImportStreamError,
    ImportStreamParser,
    TarBytes,
    WalBytes,
    encode_begin,
    encode_end,
    encode_files_end,
    encode_tar,
    encode_wal,
)

FILES = st.dictionaries(
    st.text("abcdefgh/0123456789._", min_size=1, max_size=60).filter(lambda name: not name.startswith("/")),
    st.binary(max_size=1500),
    max_size=6,
)
CUTS = st.lists(st.integers(1, 700), max_size=30)
BEGIN = ImportBegin(
    pg_version=18,
    system_id=(1 << 63) + 5,
    wal_segment_size_bytes=16 << 20,
    start_lsn=Lsn(0x1000028),
    prev_record_lsn=Lsn(0),
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    found = []
    for cut in cuts:
        found.append(data[:cut])
        data = data[cut:]
    return [*found, data]


def read_tar(data: bytes, cuts: list[int]) -> list[tuple[str, bytes]]:
    parser = TarParser()
    members: list[tuple[str, bytes]] = []
    for part in pieces(data, cuts):
        for event in parser.feed(part):
            match event:
                case MemberStart(path, _, _):
                    members.append((path, b""))
                case MemberData(content):
                    members[-1] = members[-1][0], members[-1][1] + content
                case MemberEnd():
                    assert members
    assert parser.is_ended
    assert parser.is_between_members
    return members


@given(FILES, CUTS)
def test_tar_files_of_others_are_read_as_they_were_written(files: dict[str, bytes], cuts: list[int]) -> None:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    expected = [(name.removeprefix("./"), content) for name, content in files.items()]
    assert read_tar(written.getvalue(), cuts) == expected


@given(FILES, CUTS)
def test_our_tar_files_are_read_by_others_and_by_ourselves(files: dict[str, bytes], cuts: list[int]) -> None:
    written = b"".join(
        pack_file_header(name, len(content)) + content + padding(len(content))
        for name, content in files.items()
    )
    written += END_OF_TAR
    with tarfile.open(fileobj=io.BytesIO(written)) as archive:
        members = {member.name: archive.extractfile(member) for member in archive.getmembers()}
        found = {name: content.read() for name, content in members.items() if content is not None}
    assert list(found.values()) == list(files.values())
    assert [content for _, content in read_tar(written, cuts)] == list(files.values())


def test_a_tar_header_with_a_flipped_byte_is_refused() -> None:
    header = bytearray(pack_file_header("base/5/16384", 8192))
    header[10] ^= 1
    with pytest.raises(TarError, match="checksum"):
        list(TarParser().feed(bytes(header)))


@given(st.lists(st.binary(max_size=300), max_size=5), CUTS)
def test_a_stream_is_the_same_however_it_is_cut(parts: list[bytes], cuts: list[int]) -> None:
    stream = encode_begin(BEGIN) + b"".join(map(encode_tar, parts))
    stream += encode_files_end(FilesEnd(readable_lsn=Lsn(0x2000000)))
    stream += b"".join(encode_wal(0x1000028 + number, part) for number, part in enumerate(parts))
    stream += encode_end()
    parser = ImportStreamParser()
    frames = [frame for piece in pieces(stream, cuts) for frame in parser.feed(piece)]
    assert parser.is_ended
    assert frames == [
        BEGIN,
        *map(TarBytes, parts),
        FilesEnd(readable_lsn=Lsn(0x2000000)),
        *(WalBytes(Lsn(0x1000028 + number), part) for number, part in enumerate(parts)),
        ImportEnd(),
    ]


@given(st.binary(min_size=5, max_size=60))
def test_bytes_that_are_no_stream_are_refused_or_waited_for(data: bytes) -> None:
    parser = ImportStreamParser()
    try:
        for frame in parser.feed(data):
            assert frame is not None
    except ImportStreamError:
        return
    assert len(data) < 5 + (4 << 20)


def test_nothing_comes_after_the_end() -> None:
    with pytest.raises(ImportStreamError):
        list(ImportStreamParser().feed(encode_end() + encode_tar(b"more")))

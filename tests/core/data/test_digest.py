"""The digest of a data set: contents and names count, its place does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from nayer_edge.data.digest import digest_of_data
from nayer_edge.errors import UsageError
from nayer_edge.storage.files import sha256_of


def test_a_folder_is_what_is_in_it(tmp_path: Path) -> None:
    def folder(name: str, **files: bytes) -> Path:
        for file, data in files.items():
            (tmp_path / name / file).mkdir(parents=True)
            (tmp_path / name / file / "x").write_bytes(data)
        return tmp_path / name

    one = folder("one", a=b"1", b=b"2")
    assert digest_of_data(one) == digest_of_data(folder("two", b=b"2", a=b"1"))
    changed = [folder("3", a=b"1", b=b"3"), folder("4", a=b"2", b=b"1"), folder("5", a=b"1"), folder("6", a=b"12")]
    assert digest_of_data(one) not in {digest_of_data(path) for path in changed}
    by_size = {digest_of_data(path, contents=False) for path in [one, *changed[:2]]}
    assert by_size == {digest_of_data(one, contents=False)}
    assert digest_of_data(changed[2], contents=False) not in by_size
    assert digest_of_data(one / "a" / "x") == sha256_of(one / "a" / "x")
    before = digest_of_data(one)
    (one / "a" / "round").symlink_to(one)
    assert digest_of_data(one) == before, "a link in a circle is followed once"
    (one / "a" / "x").write_bytes(b"9")
    assert digest_of_data(one) != before, "and a change is seen within one process"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        digest_of_data(tmp_path / "absent")

"""Where files are written: on a disk and in a bucket."""

import os
from pathlib import Path
from unittest import mock

import pytest
from bucket import READ_ONLY, bucket

from effjax.core.storage import create, is_remote, remove_tree, storage, write_bytes, written_locally


@pytest.fixture
def objects():
    with bucket() as found:
        yield found


def test_a_path_stays_a_path_and_a_url_keeps_its_slashes(objects):
    assert type(storage("runs/one")) is type(Path("runs/one"))
    found = storage("gs://my-bucket/run") / ".work" / "cost.json"
    assert os.fspath(found) == str(found) == "gs://my-bucket/run/.work/cost.json"
    assert is_remote(found)
    assert storage(found) == found


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (Path("gs://my-bucket/run"), r"'gs:/my-bucket/run' has lost a slash.*as a string, 'gs://"),
        ("ftp://host/run", r"'ftp://host/run': folders are paths, or begin with gs://, s3://, az://"),
        ("gs://", "names no bucket"),
    ],
)
def test_what_is_no_folder_is_refused(path, words):
    with pytest.raises(ValueError, match=words):
        storage(path)


def test_a_missing_driver_says_what_to_install():
    from etils.epath import backend

    with (
        mock.patch.object(backend.fsspec_backend, "fs", side_effect=ImportError("Install s3fs to access S3")),
        pytest.raises(ValueError, match=r's3fs: pip install "effjax\[s3\]"'),
    ):
        storage("s3://my-bucket/run")


@pytest.mark.parametrize("remote", [False, True])
def test_files_are_made_once_replaced_whole_and_removed_with_their_folder(objects, tmp_path, remote):
    folder = storage("gs://my-bucket/run") if remote else tmp_path / "run"
    write_bytes(folder / "a" / "one", b"1")
    write_bytes(folder / "a" / "one", b"22")
    assert create(folder / "a" / "two", b"x")
    assert not create(folder / "a" / "two", b"y")
    assert ((folder / "a" / "one").read_bytes(), (folder / "a" / "two").read_bytes()) == (b"22", b"x")
    remove_tree(folder / "b")
    remove_tree(folder / "a")
    assert not (folder / "a").exists()
    assert objects == {}


@pytest.mark.parametrize("remote", [False, True])
def test_the_mark_of_a_removal_outlives_all_else(objects, tmp_path, remote):
    folder = storage("gs://my-bucket/run") if remote else tmp_path / "run"
    for name in ("mark", "x", "y/z"):
        write_bytes(folder / name, b"")
    with (
        mock.patch(f"effjax.core.storage.{'file_system' if remote else 'shutil.rmtree'}", side_effect=InterruptedError),
        pytest.raises(InterruptedError),
    ):
        remove_tree(folder, last="mark")
    assert (folder / "mark").exists()
    assert not (folder / "x").exists()
    remove_tree(folder, last="mark")
    assert not folder.exists()


def test_what_a_writer_of_disks_writes_is_copied_up(objects, tmp_path):
    with written_locally(storage("gs://my-bucket/adapter")) as folder:
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "x").write_text("x")
    with written_locally(storage("gs://my-bucket/one.safetensors")) as file:
        file.write_text("y")
    assert objects == {"my-bucket/adapter/inner/x": b"x", "my-bucket/one.safetensors": b"y"}
    with written_locally(tmp_path / "z") as same:
        assert same == tmp_path / "z"


def test_a_write_that_is_refused_raises(objects):
    READ_ONLY.set()
    with pytest.raises(PermissionError, match="Forbidden"):
        write_bytes("gs://my-bucket/x", b"1")

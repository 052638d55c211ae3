"""The safetensors format, byte by byte; the safetensors library is the referee."""

import json
import struct
from pathlib import Path

import fsspec
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from derta_jax.interop import tensor_files
from derta_jax.interop.tensor_files import (
    BrokenFile,
    TensorWriter,
    copy_matrix,
    open_tensor_file,
    read_box,
    read_header,
    row_blocks,
)

MATRIX = np.arange(300 * 2100, dtype=np.float32).reshape(300, 2100)
VECTOR = np.arange(3000, dtype=np.float16)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(tensor_files, "REQUEST_BYTES", 5000)


@pytest.fixture(params=["disk", "URL"])
def stored(request, tmp_path):
    """A file with a matrix and a vector, on disk and behind a URL."""
    path = tmp_path / "model.safetensors"
    save_file({"matrix": MATRIX, "vector": VECTOR}, path)
    if request.param == "disk":
        place = path
    else:
        place = f"memory://tensor_files{tmp_path}/model.safetensors"
        with fsspec.open(place, "wb") as stream:
            stream.write(path.read_bytes())
    file = open_tensor_file(place)
    yield file
    file.close()


def write(path, tensors, dtype):
    with TensorWriter(path, {name: tensor.shape for name, tensor in tensors.items()}, dtype) as writer:
        for tensor in tensors.values():
            writer.write(tensor)


def box_of(file, name, rows, columns):
    tensor = read_header(file)[name]
    dtype = {"matrix": np.float32, "vector": np.float16}[name]
    whole = np.zeros((rows.stop - rows.start, columns.stop - columns.start), dtype)
    for block in row_blocks(file, tensor, rows, columns):
        read_box(file, tensor, block, columns, whole[block.start - rows.start : block.stop - rows.start])
    return whole


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("names", [("a", "b", "c"), ("ä", "bb", "c" * 50)], ids=["plain", "padded"])
def test_a_file_is_the_one_that_the_library_writes(tmp_path, names, dtype):
    shapes = ((3, 5), (7,), (2, 0))
    tensors = {name: np.full(shape, 1.5, dtype) for name, shape in zip(names, shapes, strict=True)}
    write(tmp_path / "ours", tensors, np.dtype(dtype))
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name in names:
        np.testing.assert_array_equal(ours[name], theirs[name], strict=True)
    if sorted(names) == sorted(names, key=lambda name: name.encode()) == list(names):
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_tensors_of_any_strides_are_written_in_order_and_cast(tmp_path, dtype):
    numbers = np.random.default_rng(0).standard_normal((500, 300)).astype(np.float32)
    tensors = {
        "transposed": numbers.T,
        "every other": numbers[::2, ::3],
        "backwards": numbers[::-1, ::-1],
        "part of a transposed": numbers[3:400, 5:200].T,
        "one column": numbers[:, :1],
        "vector": numbers[:, 7],
    }
    write(tmp_path / "file", tensors, np.dtype(dtype))
    written = load_file(tmp_path / "file")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor.astype(dtype), strict=True)


def test_a_transposed_tensor_of_the_files_dtype_is_written_bit_by_bit(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**16, (700, 90), dtype=np.uint16)
    write(tmp_path / "file", {"any bits": bits.view(ml_dtypes.bfloat16).T}, np.dtype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(load_file(tmp_path / "file")["any bits"].view(np.uint16), bits.T)


def test_a_wrong_shape_or_a_tensor_too_few_is_our_mistake(tmp_path):
    with (
        pytest.raises(ValueError, match=r"a must have shape \(2,\), not \(3,\)"),
        TensorWriter(tmp_path / "file", {"a": (2,)}, np.dtype(np.float32)) as writer,
    ):
        writer.write(np.zeros(3))
    with (
        pytest.raises(ValueError, match="file lacks b"),
        TensorWriter(tmp_path / "file", {"a": (2,), "b": (1,)}, np.dtype(np.float32)) as writer,
    ):
        writer.write(np.zeros(2))
    with pytest.raises(ValueError, match="weights are not written as int8"):
        TensorWriter(tmp_path / "file", {}, np.dtype(np.int8))


@pytest.mark.parametrize("into_transposed", [False, True])
@pytest.mark.parametrize("from_transposed", [False, True])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float64", "float32"), ("bfloat16", "float16")])
def test_matrices_are_copied_whatever_their_strides(from_transposed, into_transposed, dtypes):
    numbers = np.random.default_rng(0).standard_normal((200, 330)).astype(dtypes[0])
    source = np.ascontiguousarray(numbers.T).T if from_transposed else numbers
    into = np.empty((330, 200), dtypes[1]).T if into_transposed else np.empty((200, 330), dtypes[1])
    copy_matrix(source, into)
    np.testing.assert_array_equal(into, numbers.astype(dtypes[1]))


def test_a_header_says_what_the_library_says(stored):
    tensors = read_header(stored)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == {
        "matrix": ("F32", (300, 2100)),
        "vector": ("F16", (3000,)),
    }
    assert {tensor.file for tensor in tensors.values()} == {stored.path}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("columns", [slice(0, 2100), slice(1050, 2100), slice(10, 20)], ids=["all", "half", "few"])
@pytest.mark.parametrize("rows", [slice(0, 300), slice(299, 300), slice(17, 120)])
def test_any_box_of_a_matrix_is_read(stored, rows, columns):
    np.testing.assert_array_equal(box_of(stored, "matrix", rows, columns), MATRIX[rows, columns])


@pytest.mark.parametrize("columns", [slice(0, 3000), slice(1500, 3000), slice(7, 9)])
def test_a_vector_is_read_as_a_matrix_of_one_row(stored, columns):
    np.testing.assert_array_equal(box_of(stored, "vector", slice(0, 1), columns)[0], VECTOR[columns])


def test_a_box_goes_into_the_middle_of_something_larger(stored):
    large = np.zeros((300, 3000), np.float32)
    read_box(stored, read_header(stored)["matrix"], slice(0, 300), slice(0, 2100), large[:, 700:2800])
    np.testing.assert_array_equal(large[:, 700:2800], MATRIX)
    assert not large[:, :700].any()
    assert not large[:, 2800:].any()


def test_half_of_the_columns_on_disk_are_half_of_the_bytes(tmp_path):
    save_file({"matrix": MATRIX}, tmp_path / "file")
    file = open_tensor_file(tmp_path / "file")
    tensor = read_header(file)["matrix"]

    def bytes_read():
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    read_box(file, tensor, slice(0, 300), slice(0, 1050), np.empty((300, 1050), np.float32))
    assert bytes_read() - before == pytest.approx(MATRIX.nbytes / 2, rel=0.02)
    file.close()


def test_a_file_that_shrinks_while_it_is_read_is_an_error_of_the_disk(tmp_path):
    save_file({"matrix": MATRIX}, tmp_path / "file")
    file = open_tensor_file(tmp_path / "file")
    tensor = read_header(file)["matrix"]
    with (tmp_path / "file").open("rb+") as stream:
        stream.truncate(5000)
    with pytest.raises(OSError, match="file ends after 5000 bytes"):
        read_box(file, tensor, slice(0, 300), slice(0, 2100), np.empty_like(MATRIX))
    file.close()


@pytest.mark.parametrize("place", ["nowhere", "memory://nowhere/file"])
def test_a_file_that_is_not_there_is_not_found(place):
    with pytest.raises(FileNotFoundError):
        open_tensor_file(place)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def whole(header, data=b"12345678"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is 0 bytes long"),
        (b"1234567", "it is 7 bytes long"),
        (b"PK\3\4 something else", r"it says that its header has [\d,]+ bytes, and is 19 bytes long"),
        (whole({"a": entry()})[:40], "it says that its header has 61 bytes, and is 40 bytes long"),
        (whole({"a": entry()})[:-1], "it is 76 bytes long, its header asks for 77"),
        (whole({"a": entry()}) + b"more", "it is 81 bytes long, its header asks for 77"),
        (whole(b"{nothing"), "its header is not valid JSON: "),
        (whole(b"\xff\xfe"), "its header is not valid JSON: "),
        (whole(b"[" * 100_000), "its header is not valid JSON: "),
        (whole(b'{"a": 1, "a": 2}'), "its header is not valid JSON: a name is there twice"),
        (whole([]), "its header is not a JSON object"),
        (whole({"a": 5}), "the entry of a is not dtype, shape and data_offsets"),
        (whole({"a": entry() | {"more": 1}}), "the entry of a is not dtype, shape and data_offsets"),
        (whole({"a": entry(dtype="F33")}), "a has the unknown dtype 'F33'"),
        (whole({"a": entry(dtype=["F32"])}), r"a has the unknown dtype \['F32'\]"),
        (whole({"a": entry(shape=(-2,))}), "the shape or the data_offsets of a are not lists of sizes"),
        (whole({"a": entry(shape=(True, 2))}), "the shape or the data_offsets of a are not lists of sizes"),
        (whole({"a": entry(offsets=(0, 4, 8))}), "the shape or the data_offsets of a are not lists of sizes"),
        (whole({"a": entry(offsets=(0.0, 8.0))}), "the shape or the data_offsets of a are not lists of sizes"),
        (whole({"a": entry(shape=(3,))}), r"a \[3\] of F32 does not fill the bytes 0 to 8"),
        (whole({"a": entry(shape=(2**62, 2**62))}), "does not fill the bytes 0 to 8"),
        (whole({"a": entry(dtype="F4", shape=(15,))}), r"a \[15\] of F4 does not fill the bytes 0 to 8"),
        (whole({"a": entry(offsets=(4, 12))}), "a starts at byte 4 of the data, the tensor before it ends at 0"),
        (
            whole({"a": entry(), "b": entry(offsets=(4, 12))}),
            "b starts at byte 4 of the data, the tensor before it ends at 8",
        ),
        (
            whole({"a": entry(), "b": entry(offsets=(16, 24))}),
            "b starts at byte 16 of the data, the tensor before it ends at 8",
        ),
    ],
)
def test_what_is_not_a_whole_file_is_said_so(tmp_path, content, problem):
    (tmp_path / "file").write_bytes(content)
    file = open_tensor_file(tmp_path / "file")
    with pytest.raises(BrokenFile, match=problem):
        read_header(file)
    file.close()


def test_a_header_of_an_absurd_length_is_not_read(tmp_path):
    with (tmp_path / "file").open("wb") as stream:
        stream.write(struct.pack("<Q", 2**40))
        stream.truncate(2**41)  # a hole in the file: it takes no room
    file = open_tensor_file(tmp_path / "file")
    with pytest.raises(BrokenFile, match="it says that its header has 1,099,511,627,776 bytes"):
        read_header(file)
    file.close()

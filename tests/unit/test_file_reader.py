"""Slices of stored tensors against safetensors' own reading, the bytes read for them, and files that change."""

import errno
import json
import mmap
import os
import re
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from parallel_backend.loading import file_reader
from parallel_backend.loading.file_reader import FileReader, Slice
from parallel_backend.loading.safetensors_reader import DTYPES, read_header

TENSORS = {
    "odd": torch.randn(37, 53),
    "half": torch.randn(64, 48).bfloat16(),
    "wide": torch.randn(3, 5000).half(),
    "e4m3": torch.randn(33, 31).to(torch.float8_e4m3fn),
    "e5m2": torch.randn(20, 16).to(torch.float8_e5m2),
    "conv": torch.randn(6, 5, 3, 3),
    "vector": torch.randn(41),
    "scalar": torch.tensor(2.5),
    "none": torch.empty(0, 7),
    "bytes": torch.arange(200, dtype=torch.uint8),
}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def read(reader, part):
    """The bytes of a slice."""
    buffer = torch.full((part.nbytes,), 0xAA, dtype=torch.uint8)
    reader.read(part, buffer.numpy())
    return buffer


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def columns_of(stored, start, stop, ranges):
    """The slice of some columns (dim 1) of rows ``start`` to ``stop``."""
    row = stored.nbytes // stored.shape[0]
    column = row // stored.shape[1]
    return Slice(stored, start * row, stop * row, row, tuple((a * column, b * column) for a, b in ranges))


@pytest.mark.parametrize("key", TENSORS)
def test_whole_tensors_are_safetensors_own(file, key):
    stored = read_header(file)[key]
    with FileReader() as reader, safe_open(file, "pt") as own:
        found = read(reader, Slice(stored, 0, stored.nbytes)).view(DTYPES[stored.dtype]).reshape(stored.shape)
        expected = own.get_tensor(key)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("key", [key for key, tensor in TENSORS.items() if tensor.ndim > 1 and tensor.numel()])
def test_rows_and_columns_are_safetensors_own(file, key):
    stored = read_header(file)[key]
    rows, columns = stored.shape[:2]
    row = stored.nbytes // rows
    with FileReader() as reader, safe_open(file, "pt") as own:
        full = own.get_slice(key)
        for start, stop in ((0, rows), (1, rows - 1), (rows // 2, rows // 2 + 1)):
            found = read(reader, Slice(stored, start * row, stop * row))
            assert torch.equal(found, bits(full[start:stop]))
            for ranges in (((0, columns),), ((1, 2), (columns // 2, columns)), ((columns - 1, columns),)):
                found = read(reader, columns_of(stored, start, stop, ranges))
                expected = bits(torch.cat([full[start:stop, a:b] for a, b in ranges], 1))
                assert torch.equal(found, expected), (start, stop, ranges)


def test_a_run_costs_its_own_bytes(file, monkeypatch):
    counted, preadv = [], os.preadv

    def counting(descriptor, buffers, offset):
        counted.append((offset, preadv(descriptor, buffers, offset)))
        return counted[-1][1]

    monkeypatch.setattr(os, "preadv", counting)
    stored = read_header(file)["half"]
    with FileReader() as reader:
        read(reader, Slice(stored, 96, 960))
    assert counted == [(stored.offset + 96, 864)]


def test_reads_that_return_less_are_gone_on_with(file, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda descriptor, buffers, offset: preadv(descriptor, [buffers[0][:100]], offset)
    )
    stored = read_header(file)["odd"]
    with FileReader() as reader:
        assert torch.equal(read(reader, Slice(stored, 0, stored.nbytes)).view(torch.float32), TENSORS["odd"].view(-1))


def maps_nothing(*arguments, **named):
    """What mmap is on some network disks."""
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))


class TestDisksThatMapNothing:
    @pytest.mark.parametrize("rows", [1, 5, 1000])
    @pytest.mark.parametrize("key", ["odd", "half", "wide", "e4m3", "conv"])
    def test_columns_are_read_all_the_same(self, file, monkeypatch, key, rows):
        stored = read_header(file)[key]
        count, columns = stored.shape[:2]
        monkeypatch.setattr(mmap, "mmap", maps_nothing)
        monkeypatch.setattr(file_reader, "UNMAPPED_BYTES", rows * stored.nbytes // count)
        ranges = ((0, 1), (columns // 2, columns))
        for start, stop in ((0, count), (1, count - 1)):
            with FileReader() as reader:
                found = read(reader, columns_of(stored, start, stop, ranges))
            expected = bits(torch.cat([TENSORS[key][start:stop, a:b] for a, b in ranges], 1))
            assert torch.equal(found, expected)

    def test_pages_that_cannot_be_brought_in(self, file, monkeypatch):
        def fail(pages):
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))

        monkeypatch.setattr(file_reader, "_populate", fail)
        stored = read_header(file)["half"]
        with FileReader() as reader:
            found = read(reader, columns_of(stored, 0, 64, ((3, 9),))).view(torch.bfloat16).view(64, 6)
        assert torch.equal(found, TENSORS["half"][:, 3:9])


@pytest.mark.parametrize("key", ["scalar", "e4m3", "none"])
def test_a_scalar_is_one_number(file, key):
    stored = read_header(file)[key]
    with FileReader() as reader:
        if key == "scalar":
            assert reader.scalar(stored) == 2.5
        else:
            with pytest.raises((RuntimeError, ValueError)):
                reader.scalar(stored)


class TestFilesThatChange:
    """An error that names file and key, not a signal that ends the process."""

    @pytest.fixture(params=["run", "columns"])
    def part(self, file, request):
        stored = read_header(file)["odd"]
        run = Slice(stored, 0, stored.nbytes)
        return run if request.param == "run" else columns_of(stored, 0, 37, ((0, 20), (30, 53)))

    def refused(self, reader, part, message):
        with pytest.raises(ValueError, match=message) as caught:
            read(reader, part)
        assert f"{part.tensor.key} in {part.tensor.file} cannot be read: " in str(caught.value)

    def test_cut_off_before_it_is_opened(self, part):
        os.truncate(part.tensor.file, part.tensor.offset + 1000)
        with FileReader() as reader:
            for _ in range(2):  # the second time from memory
                self.refused(reader, part, "it was cut off or damaged; download it again")

    def test_cut_off_after_it_was_opened(self, part):
        with FileReader() as reader:
            read(reader, part)
            os.truncate(part.tensor.file, part.tensor.offset + 1000)
            self.refused(reader, part, "cut off while the model was loaded|greater than file size")

    def test_replaced_by_another_model(self, part):
        save_file({"odd": torch.zeros(37, 54)}, part.tensor.file)
        with FileReader() as reader:
            self.refused(reader, part, "replaced while the model was being loaded; load it again")

    def test_gone(self, part):
        part.tensor.file.unlink()
        with FileReader() as reader:
            self.refused(reader, part, "No such file")

    def test_not_allowed(self, part, monkeypatch):
        def refuse(*arguments):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(os, "open", refuse)
        with FileReader() as reader:
            self.refused(reader, part, "Permission denied")

    def test_a_failing_disk(self, part, monkeypatch):
        def fail(*arguments):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        monkeypatch.setattr(file_reader, "_populate", fail)
        with FileReader() as reader:
            self.refused(reader, part, "Input/output error")

    def test_a_disk_that_maps_nothing_and_fails(self, file, monkeypatch):
        part = columns_of(read_header(file)["odd"], 0, 37, ((0, 20),))
        monkeypatch.setattr(mmap, "mmap", maps_nothing)
        os_preadv = os.preadv
        with FileReader() as reader:
            read(reader, part)
            monkeypatch.setattr(os, "preadv", lambda *arguments: os_preadv(*arguments) and 0)
            self.refused(reader, part, "cut off while the model was loaded")

    def test_pages_that_are_no_more_are_an_error_before_they_are_touched(self, part):
        with part.tensor.file.open("rb") as stream:
            mapping = mmap.mmap(stream.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
            os.truncate(part.tensor.file, 0)
            pages = np.frombuffer(mapping, np.uint8)
            with pytest.raises(OSError, match="cut off while the model was loaded, or the disk fails"):
                file_reader._populate(pages)

    def test_a_kernel_that_cannot_be_asked_for_pages(self, file, monkeypatch):
        monkeypatch.setattr(file_reader, "POPULATE_READ", 12345)
        stored = read_header(file)["half"]
        with FileReader() as reader:
            found = read(reader, columns_of(stored, 0, 64, ((3, 9),))).view(torch.bfloat16).view(64, 6)
        assert torch.equal(found, TENSORS["half"][:, 3:9])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["b"].update(data_offsets=[12, 28]), "after 16"),
        (lambda h: h["b"].update(data_offsets=[8, 24]), "after 16"),
        (lambda h: h["b"].update(shape=[5]), "b has 16 bytes for [5] of F32"),
        (lambda h: h["b"].update(shape=[-4]), "[-4]"),
        (lambda h: h["b"].update(shape=[4.0]), "[4.0]"),
        (lambda h: h["b"].update(data_offsets=[16, 12]), "b has the shape"),
    ],
    ids=["gap", "overlap", "size", "negative", "fraction", "backwards"],
)  # fmt: skip
def test_headers_that_contradict_themselves(tmp_path, change, message):
    """safetensors refuses them as well."""
    header = {name: {"dtype": "F32", "shape": [4], "data_offsets": [at, at + 16]} for name, at in (("a", 0), ("b", 16))}
    file = tmp_path / "model.safetensors"

    def write():
        text = json.dumps(header).encode()
        end = max(entry["data_offsets"][1] for entry in header.values())
        file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))

    write()
    assert set(read_header(file)) == {"a", "b"}
    change(header)
    write()
    with pytest.raises(ValueError, match=f"unreadable safetensors header.*{re.escape(message)}"):
        read_header(file)
    with pytest.raises(Exception, match=r"(?i)header|offset|invalid|overlap"), safe_open(file, "pt"):
        pass

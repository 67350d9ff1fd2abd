"""Reading pickled weights without PyTorch and without running anything, and writing them."""

import collections
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ssm_jax.errors import LayoutError
from ssm_jax.interop.safetensors_file import read_safetensors
from ssm_jax.interop.tensor import Tensor
from ssm_jax.interop.torch_file import read_torch, write_torch
from tests.conformance.golden import GOLDENS

RNG = np.random.default_rng(0)


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}


def archive(path: Path, pickled: bytes, **storages: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", pickled)
        for key, data in storages.items():
            file.writestr(f"m/data/{key.removeprefix('s')}", data)
    return path


def test_a_published_style_bin_holds_what_its_safetensors_twin_holds() -> None:
    bin_file = read_torch(GOLDENS / "mamba_original/tied_padded_vocab/pytorch_model.bin")
    twin = read_safetensors(GOLDENS / "mamba/tied_defaults/model.safetensors")
    assert set(bin_file) - {"lm_head.weight"} == {name.replace("embeddings", "embedding") for name in twin}
    for name, tensor in twin.items():
        np.testing.assert_array_equal(bin_file[name.replace("embeddings", "embedding")].load(), tensor.load())
    np.testing.assert_array_equal(bin_file["lm_head.weight"].load(), twin["backbone.embeddings.weight"].load())


def test_what_we_write_we_read(tmp_path: Path) -> None:
    arrays = {
        "matrix": RNG.normal(size=(3, 5)).astype(np.float32),
        "transposed": RNG.normal(size=(3, 5)).astype(np.float32).T,
        "brain": RNG.normal(size=(4, 2)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(1.5, np.float16),
        "names beyond ASCII: ü": np.zeros((0, 2), np.float32),
    }
    write_torch(tmp_path / "w.bin", as_tensors(arrays))
    read = read_torch(tmp_path / "w.bin")
    assert set(read) == set(arrays)
    for name, expected in arrays.items():
        np.testing.assert_array_equal(read[name].load(), expected, strict=True)


@pytest.mark.torch
def test_torch_reads_what_we_write_and_sees_shared_storage(tmp_path: Path) -> None:
    import torch

    arrays = {"a": RNG.normal(size=(3, 5)).astype(np.float32), "b": RNG.normal(size=(7,)).astype(ml_dtypes.bfloat16)}
    tensors = as_tensors(arrays)
    write_torch(tmp_path / "w.bin", {**tensors, "tied": tensors["a"]})
    for options in ({}, {"mmap": True}):
        loaded = torch.load(tmp_path / "w.bin", weights_only=True, **options)
        assert set(loaded) == {"a", "b", "tied"}
        np.testing.assert_array_equal(loaded["a"].numpy(), arrays["a"])
        np.testing.assert_array_equal(loaded["b"].float().numpy(), arrays["b"].astype(np.float32))
        assert loaded["tied"].data_ptr() == loaded["a"].data_ptr()


@pytest.mark.torch
@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"])
def test_reads_what_torch_writes_in_every_type_and_stride(tmp_path: Path, name: str) -> None:
    import torch

    base = torch.from_numpy(RNG.integers(0, 2, (4, 6))).to(getattr(torch, name))
    state = collections.OrderedDict(
        whole=base,
        transposed=base.T,
        window=base[1:3, ::2],
        broadcast=base[:1].expand(3, 6),
        alone=torch.nn.Parameter(base.clone(), requires_grad=False),
        scalar=base[2, 3],
        empty=base[:0],
    )
    state._metadata = {"": {"version": 1}}  # as Module.state_dict leaves it; pickled with the dict
    torch.save(state, tmp_path / "w.pt")
    read = read_torch(tmp_path / "w.pt")
    assert set(read) == set(state)
    for key, tensor in state.items():
        assert read[key].shape == tuple(tensor.shape)
        assert read[key].dtype.name == name
        np.testing.assert_array_equal(read[key].load().astype(np.float64), tensor.double().numpy())


@pytest.mark.torch
def test_a_file_from_before_zip_archives_is_refused_with_the_way_out(tmp_path: Path) -> None:
    import torch

    torch.save({"w": torch.ones(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(LayoutError, match=r"old\.bin is not a zip archive.*before PyTorch 1\.6.*safetensors"):
        read_torch(tmp_path / "old.bin")


@pytest.mark.torch
def test_more_than_a_state_dict_is_refused(tmp_path: Path) -> None:
    import torch

    torch.save({"model": {"w": torch.ones(3)}, "step": 3}, tmp_path / "w.pt")
    with pytest.raises(LayoutError, match=r"more than a state dict"):
        read_torch(tmp_path / "w.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(LayoutError, match=r"asks to run torch\.nn\.modules\.linear\.Linear"):
        read_torch(tmp_path / "module.pt")


class Runs:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    ("function", "named"),
    [
        (os.mkdir, r"(posix|nt)\.mkdir"),
        (eval, r"builtins\.eval|__builtin__\.eval"),
        (getattr, r"(builtins|__builtin__)\.getattr"),
    ],
    ids=["mkdir", "eval", "getattr"],
)
def test_code_in_a_pickle_is_refused_and_never_runs(
    tmp_path: Path, function: Callable[..., Any], named: str, protocol: int
) -> None:
    marker = tmp_path / "marker"
    arguments = {os.mkdir: (str(marker),), eval: (f"__import__('os').mkdir({str(marker)!r})",), getattr: ("", "join")}
    pickled = pickle.dumps({"w": Runs(function, *arguments[function])}, protocol)
    path = archive(tmp_path / "evil.bin", pickled)
    with pytest.raises(LayoutError, match=rf"evil\.bin asks to run ({named}).*safetensors"):
        read_torch(path)
    assert not marker.exists()


def view(numel: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], suffix: bytes = b"") -> bytes:
    """A state dict with one float32 tensor ``w``; ``suffix`` are opcodes applied to the tensor."""

    def tuple_of(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"I%d\n" % value for value in values) + b"t"

    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuI%d\ntQ" % numel
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"I%d\n" % offset + tuple_of(shape) + tuple_of(strides)
    return b"\x80\x02}X\x01\x00\x00\x00w" + call + b"I00\nccollections\nOrderedDict\n)RtR" + suffix + b"s."


def test_the_hand_made_pickle_is_valid(tmp_path: Path) -> None:
    path = archive(tmp_path / "w.bin", view(6, 1, (2, 2), (3, 1)), s0=np.arange(6, dtype=np.float32).tobytes())
    np.testing.assert_array_equal(read_torch(path)["w"].load(), [[1, 2], [4, 5]])


@pytest.mark.parametrize(
    "pickled",
    [
        view(6, 0, (2, 2), (5, 2)),  # last element 7
        view(6, 6, (1,), (1,)),
        view(6, 0, (2,), (-1,)),
        view(6, -1, (2,), (1,)),
        view(6, 0, (2, 2), (1,)),
        view(7, 0, (2,), (1,)),  # more than the file holds
        view(6, 0, (2,), (1,), b"(NI0\nI9\ntb"),  # BUILD: sets attributes behind the checks
        view(6, 0, (2,), (1,), b"(N}X\x06\x00\x00\x00offsetI9\ns\x86b"),
    ],
)
def test_a_view_beyond_its_storage_is_refused(tmp_path: Path, pickled: bytes) -> None:
    path = archive(tmp_path / "w.bin", pickled, s0=bytes(24))
    with pytest.raises(LayoutError, match=r"w\.bin is not a readable PyTorch file"):
        read_torch(path)


@pytest.mark.parametrize(
    "pickled", [b"", b"\x80\x02", b"garbage", b"\x80\x02}X\x01\x00\x00\x00wI3\ns.", b"\x80\x02K\x01."]
)
def test_pickles_of_anything_else_are_refused(tmp_path: Path, pickled: bytes) -> None:
    with pytest.raises(LayoutError, match=r"w\.bin"):
        read_torch(archive(tmp_path / "w.bin", pickled))


def test_a_flipped_bit_is_found_when_the_tensor_is_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "w.bin", view(6, 0, (6,), (1,)), s0=b"\x11" * 24)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x11" * 24, b"\x11" * 23 + b"\x10"))
    with pytest.raises(LayoutError, match=r"w\.bin is damaged"):
        read_torch(path)["w"].load()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_compressed_archive_is_refused(tmp_path: Path, method: int) -> None:
    """``torch.save`` only stores; a few kilobytes could otherwise unpack to any size."""
    with zipfile.ZipFile(tmp_path / "w.bin", "w", method) as file:
        file.writestr("m/data.pkl", view(6, 0, (6,), (1,)))
        file.writestr("m/data/0", bytes(24))
    with pytest.raises(LayoutError, match=r"w\.bin is not a readable PyTorch file \(its entries are compressed"):
        read_torch(tmp_path / "w.bin")


def test_an_encrypted_entry_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "w.bin", view(6, 0, (6,), (1,)), s0=bytes(24))
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = data.find(signature)
        while start >= 0:
            data[start + flags] |= 1
            start = data.find(signature, start + 1)
    path.write_bytes(data)
    with pytest.raises(LayoutError, match=r"w\.bin is not a readable PyTorch file .*encrypted"):
        read_torch(path)


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "w.bin", view(6, 0, (6,), (1,)), s0=bytes(24))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(LayoutError, match=r"w\.bin is not a zip archive: it is damaged"):
        read_torch(path)

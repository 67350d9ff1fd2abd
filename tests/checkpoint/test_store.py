"""What was saved comes back, on any mesh; what was damaged never does."""

import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ssm_jax import checkpoint, sharding
from ssm_jax.checkpoint import manifest, store
from ssm_jax.checkpoint.model import with_shardings
from ssm_jax.errors import CheckpointError

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def items(seed: int = 0) -> dict:
    params = {"w": jax.random.normal(jax.random.key(seed), (16, 8)), "b": {"c": jnp.arange(8.0)}}
    moments = optax.adam(1e-3).init(params)
    return {
        "params": params,
        "train": {"moments": moments, "step": jnp.int32(3), "key": jax.random.key(7), "carry": None},
    }


def abstract(tree: object, placed: object = HERE) -> dict:
    return with_shardings(tree, placed)


def bits(leaf: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def assert_same(a: object, b: object) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), a, b)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.save(tmp_path_factory.mktemp("saved"), 3, items(), {"note": "x"})


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    target = tmp_path / saved.name
    for name in files(saved):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes((saved / name).read_bytes())
    return target


def test_round_trip_is_exact(saved: Path) -> None:
    back, info = checkpoint.restore(saved, abstract(items()))
    assert_same(back, items())
    assert info == {"note": "x"}
    only = checkpoint.restore(saved, {"params": abstract(items()["params"])})[0]
    assert only.keys() == {"params"}


def test_arrays_without_elements_come_back(tmp_path: Path) -> None:
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4))
    spec = NamedSharding(mesh, PartitionSpec("data"))
    nothing = {"memory": jnp.zeros((2, 0, 3), jnp.bfloat16), "position": jnp.arange(4)}
    tree = {"carry": {name: jax.device_put(leaf, spec) for name, leaf in nothing.items()}}
    folder = checkpoint.save(tmp_path, 1, tree, {})
    back = checkpoint.restore(folder, with_shardings(tree, spec))[0]
    assert_same(back, tree)
    assert back["carry"]["memory"].dtype == jnp.bfloat16
    assert back["carry"]["memory"].sharding == spec
    wanted = {"carry": {**nothing, "memory": jnp.zeros((2, 0, 4), jnp.bfloat16)}}
    with pytest.raises(CheckpointError, match=r"does not fit: carry/memory is bfloat16\[2, 0, 3\] there"):
        checkpoint.restore(folder, abstract(wanted))


def test_restores_onto_another_mesh(tmp_path: Path) -> None:
    first = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4))
    second = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=2, tensor=4))
    tree = {"params": items()["params"]}

    def placed(mesh: jax.sharding.Mesh, spec: PartitionSpec) -> dict:
        return {"params": {"w": NamedSharding(mesh, spec), "b": {"c": NamedSharding(mesh, PartitionSpec())}}}

    folder = checkpoint.save(tmp_path, 1, jax.device_put(tree, placed(first, PartitionSpec("fsdp"))), {})
    wanted = placed(second, PartitionSpec("fsdp", "tensor"))
    back, _ = checkpoint.restore(folder, with_shardings(tree, wanted))
    assert back["params"]["w"].sharding == wanted["params"]["w"]
    assert_same(back, tree)


def test_every_damaged_file_is_named(copy: Path) -> None:
    for name in files(copy):
        content = (copy / name).read_bytes()
        if name != manifest.MANIFEST and content:
            middle = len(content) // 2
            (copy / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            with pytest.raises(CheckpointError, match=rf"file .*{name} is damaged \(its checksum"):
                checkpoint.restore(copy, abstract(items()))
            (copy / name).write_bytes(content[:-1])
            with pytest.raises(
                CheckpointError, match=rf"{name} has {len(content) - 1} bytes instead of {len(content)}"
            ):
                checkpoint.restore(copy, abstract(items()))
        (copy / name).unlink()
        expected = "is incomplete: MANIFEST.json is missing" if name == manifest.MANIFEST else f"{name} is missing"
        with pytest.raises(CheckpointError, match=expected):
            checkpoint.restore(copy, abstract(items()))
        (copy / name).write_bytes(content)
    assert_same(checkpoint.restore(copy, abstract(items()))[0], items())


def test_a_damaged_manifest_is_named(copy: Path) -> None:
    (copy / manifest.MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is damaged"):
        checkpoint.restore(copy, abstract(items()))


def test_arrays_that_do_not_fit_are_named(saved: Path) -> None:
    other = abstract(items())
    other["params"]["w"] = jax.ShapeDtypeStruct((16, 9), jnp.float32, sharding=HERE)
    with pytest.raises(CheckpointError, match=r"params/w is float32\[16, 8\] there and float32\[16, 9\] here"):
        checkpoint.restore(saved, other)
    fewer = abstract(items())
    del fewer["params"]["b"]
    with pytest.raises(CheckpointError, match="params/b/c is .* there and absent here"):
        checkpoint.restore(saved, fewer)


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.restore(tmp_path / "00000007", {})


def test_keeps_the_last_ones(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, {"params": {"w": jnp.float32(step)}}, {}, keep=2)
    assert checkpoint.steps(tmp_path) == [2, 10]
    checkpoint.save(tmp_path, 11, {"params": {"w": jnp.float32(0)}}, {})
    assert checkpoint.steps(tmp_path) == [2, 10, 11]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        folder = checkpoint.save(tmp_path, 1, {"params": {"w": jnp.float32(value)}}, {})
    back, _ = checkpoint.restore(folder, {"params": {"w": jax.ShapeDtypeStruct((), jnp.float32, sharding=HERE)}})
    assert float(back["params"]["w"]) == 2.0


def test_an_interrupted_save_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    checkpoint.save(tmp_path, 1, items(), {})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 2, items(), {})
    monkeypatch.undo()
    assert (tmp_path / "00000002.partial").is_dir()
    assert checkpoint.latest_good(tmp_path, set_aside=False) == tmp_path / "00000001"
    checkpoint.save(tmp_path, 2, items(1), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002"]


def test_falls_back_to_the_last_good_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"params": {"w": jnp.arange(4.0) + step}}, {})
    for step in (2, 3):
        (store.folder_of(tmp_path, step) / "info.yaml").unlink()
    assert checkpoint.latest_good(tmp_path, set_aside=False) == tmp_path / "00000001"
    assert checkpoint.steps(tmp_path) == [1, 2, 3]
    capsys.readouterr()
    assert checkpoint.latest_good(tmp_path, set_aside=True) == tmp_path / "00000001"
    warning = capsys.readouterr().err
    assert "00000003/info.yaml is missing" in warning
    assert "set it aside as" in warning
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002.damaged", "00000003.damaged"]
    (tmp_path / "00000001" / manifest.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"All 1 checkpoint\(s\) in .* are damaged"):
        checkpoint.latest_good(tmp_path, set_aside=True)
    with pytest.raises(CheckpointError, match=r"All 3 checkpoint\(s\) in .* are damaged"):
        checkpoint.latest_good(tmp_path, set_aside=True)


def test_a_failed_save_leaves_the_former_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, items(), {})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(CheckpointError, match=r"00000002 could not be written \(.*No space left"):
        checkpoint.save(tmp_path, 2, items(), {}, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001"]
    assert_same(checkpoint.restore(tmp_path / "00000001", abstract(items()))[0], items())


def test_a_disk_without_room_is_found_out_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    with pytest.raises(
        CheckpointError, match=r"00000001 could not be written \([\d,]+ bytes are needed and 100 are free\); earlier"
    ):
        checkpoint.save(tmp_path, 1, {"params": {"w": jnp.zeros(1000)}}, {})
    assert list(tmp_path.iterdir()) == []

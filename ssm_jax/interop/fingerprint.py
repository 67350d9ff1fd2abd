"""What tells the weights in two folders apart, wherever the folders lie."""

import hashlib
import json
from pathlib import Path

from ssm_jax.interop import native
from ssm_jax.interop.pretrained import model_of, open_folder
from ssm_jax.interop.tensor import raw_bytes


def fingerprint(path: str | Path) -> str:
    """A short checksum of the model and the weights in a folder that ``from_pretrained`` reads. Reads all of them once.

    Of a run of ours it is that of the checkpoint which would be read: another step is another fingerprint.

    Raises:
        LayoutError, CheckpointError: as ``from_pretrained``.
    """
    path = Path(path)
    found = hashlib.sha256(json.dumps(model_of(path), sort_keys=True).encode())
    if native.is_native(path):
        found.update(native.digest(path).encode())
        return found.hexdigest()[:16]
    for name, tensor in sorted(open_folder(path).tensors.items()):
        found.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
        found.update(raw_bytes(tensor.load()).data)
    return found.hexdigest()[:16]

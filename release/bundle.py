"""Make one archive with wheels, zoo and documents that installs without a network (`make bundle`).

python -m release.bundle dist      -> dist/dints-deploy-VERSION-cp311-linux_x86_64.tar
tar xf dist/dints-deploy-*.tar && dints-deploy-*/install.sh /opt/dints-deploy

It is made for the Python and the machine that make it: wheels hold compiled code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from release.sbom import Component, bill_of_materials, read_wheel

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CHANGELOG.md", "LICENSE", "docs", "zoo")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def main() -> None:
    """Make the archive and print where it is."""
    parser = argparse.ArgumentParser(description="Make one archive that installs without a network.")
    parser.add_argument("out", type=Path, help="the folder of the archive")
    parser.add_argument("--extra", default="cpu", help="which engines: cpu or gpu")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        print(make_bundle(Path(folder), arguments.out, arguments.extra))


def make_bundle(work: Path, out: Path, extra: str) -> Path:
    """Collect everything below `work`, pack it into `out`, and return the archive."""
    wheels = work / "wheels"
    collect_wheels(wheels, extra)
    components = [read_wheel(path) for path in sorted(wheels.glob("*.whl"))]
    own = next(one for one in components if one.name == "dints-deploy")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}-{sys.platform}_{platform.machine()}"
    bundle = work / f"dints-deploy-{own.version}-{tag}"
    bundle.mkdir()
    wheels.rename(bundle / "wheels")
    for name in DOCUMENTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, bundle / name)
    shutil.copy2(ROOT / "release" / "install.sh", bundle)
    (bundle / "requirements.txt").write_text(locked(components))
    (bundle / "sbom.cdx.json").write_text(json.dumps(bill_of_materials(own, components), indent=1) + "\n")
    (bundle / "SHA256SUMS").write_text(checksums(bundle))
    archive = out / f"{bundle.name}.tar"
    partial = out / f".partial-{archive.name}"
    with tarfile.open(partial, "w") as packed:  # not compressed: wheels are
        packed.add(bundle, bundle.name, filter=anonymous)
    return partial.replace(archive)


def collect_wheels(wheels: Path, extra: str) -> None:
    """Build our wheel and fetch the locked ones of everything it needs, and pip's own."""
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)], check=True)
    own = next(wheels.glob("dints_deploy-*.whl"))
    fetch = [*PIP, "download", "--only-binary=:all:", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*fetch, "--dest", str(wheels), f"dints-deploy[{extra}] @ {own.as_uri()}", "pip"], check=True)


def locked(components: list[Component]) -> str:
    """Return requirements that name the exact bytes of each wheel but pip's."""
    lines = [f"{one.name}=={one.version} --hash=sha256:{one.sha256}\n" for one in components if one.name != "pip"]
    return "".join(lines)


def checksums(folder: Path) -> str:
    """Return SHA256SUMS of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return "".join(f"{digest}  {path}\n" for path, digest in digests.items())


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave the builder's names and numbers out of the archive."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


if __name__ == "__main__":
    main()

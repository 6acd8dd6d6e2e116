"""The data sets that the book knows: addresses, folders, sizes, hashes, licences and whom to cite."""

from dataclasses import dataclass
from pathlib import Path


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
        archive: the name of a .tar.gz that is downloaded in place of the single files and has them in a folder of the
            same name as here; its hash is among `hashes`, and `size` is then its own.
        some_are_enough: whether its loader makes do with some of the files.
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
    archive: str = ""
    some_are_enough: bool = False

    def address(self, file: str) -> str:
        """Where `file`, or the archive that has it, is downloaded from."""
        file = self.archive or file
        return self.url.format(file=file, part=Path(file).stem.rpartition(".")[2])

    def known_hash(self, file: str) -> str | None:
        """The hash that what `address` gives must have, as pooch writes it, or None where upstream changes it."""
        return dict(self.hashes).get(self.archive or file)


GHCN_DAILY = (
    "Menne, Durre, Vose, Gleason and Houston (2012). An overview of the Global Historical Climatology Network-Daily "
    "Database. Journal of Atmospheric and Oceanic Technology 29, 897-910. doi:10.1175/JTECH-D-11-00103.1"
)

# whose loaders take something else where not one file can be had
HAVE_STAND_INS = ("precipitation", "malaria", "mnist", "kmnist", "fashionmnist", "cifar10")


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
        DataSet(
            name="cifar10",
            title="colour photographs in ten classes, 32 x 32 (CIFAR-10)",
            url="https://www.cs.toronto.edu/~kriz/{file}",
            folder="cifar-10-batches-bin",
            files=(*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"),
            size=170_052_171,
            licence="no licence is stated; its authors ask to be cited",
            citation="Krizhevsky (2009). Learning Multiple Layers of Features from Tiny Images. Technical report, "
            "University of Toronto",
            hashes=(("cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d873af"),),
            page="https://www.cs.toronto.edu/~kriz/cifar.html",
            archive="cifar-10-binary.tar.gz",
            some_are_enough=True,
        ),
    )
}

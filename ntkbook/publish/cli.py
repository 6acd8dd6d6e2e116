"""`ntkbook` on the command line: run chapters, store them, build the book, show the claims, see to the data."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import papermill  # noqa: F401
    import typer
    import yaml

    from ntkbook.publish import compare as comparison
    from ntkbook.publish import listing, runner, scorecard, site
    from ntkbook.publish.book import find_root
except ImportError as missing:
    raise SystemExit(
        f"ntkbook's command line needs the book extra ({missing.name} is not installed): pip install 'ntkbook[book]'"
    ) from missing

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data = typer.Typer(help="Where the chapters' data comes from.", no_args_is_help=True)
app.add_typer(data, name="data")

Chapters = Annotated[list[str] | None, typer.Argument(help="Chapters, such as 03 or 03_precipitation; all if none.")]
Force = Annotated[bool, typer.Option("--force", help="Run even what has not changed.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


@app.command()
def run(
    chapters: Chapters = None,
    profile: Annotated[str, typer.Option(help="cpu, or a file of profiles/ such as quick or gpu.")] = "cpu",
    params: Annotated[str, typer.Option(help="Further parameters as YAML, such as 'seed: 3'.")] = "",
    sweep: Annotated[
        str, typer.Option(help="Run one chapter many times: a YAML file, or one in profiles/sweeps/.")
    ] = "",
    scheduler: Annotated[
        str, typer.Option(help="Of a sweep: the address of a running Dask scheduler, such as tcp://host:8786.")
    ] = "",
    workers: Annotated[
        int,
        typer.Option(help="Of a sweep on this machine: jobs at a time; one a GPU or one per two cores if 0.", min=0),
    ] = 0,
    force: Force = False,
    quiet: Quiet = False,
    list_chapters: Annotated[bool, typer.Option("--list", help="List the chapters and their profiles.")] = False,
    help_chapter: Annotated[
        str, typer.Option(help="Show a chapter's parameters: types, defaults, what they are, and what profiles change.")
    ] = "",
) -> None:
    """Run chapters into runs/<chapter>/<profile or hash of parameters>/.

    There, beside the executed notebook, are claims.json, card.json, and the chapter's figures/ (SVG and PNG) and
    tables/ (CSV and Parquet). What has not changed is not run again. After Ctrl-C the same command goes on with the
    chapter that was interrupted, from its start.

    A sweep's file has a grid ({seed: [0, 1], n_sources: [5, 10]}: every combination), jobs (a list such as
    [{seed: 7}]), or both, and what they share as base ({epochs: 100}). Each job runs into
    runs/<chapter>/sweep-<file>/<hash of parameters>/, with -<profile> after the file's name if it is not cpu; the
    results come together in results.parquet beside them.
    The same command again runs only what has failed, changed or is missing. It needs Dask: pip install 'ntkbook[dask]'.

    With --scheduler, every worker must see this folder under the same path (a shared file system), have the same
    ntkbook, Python and lock, and one thread; on a machine with several GPUs start one worker a GPU, each with its own
    CUDA_VISIBLE_DEVICES. Without it, workers share this machine's cores, and each gets one GPU if the device is cuda.
    """
    if list_chapters or help_chapter:
        root = find_root()
        print(listing.parameters_text(root, help_chapter) if help_chapter else listing.chapters_text(root))
        return
    values = _parameters(params)
    root = find_root()
    if sweep:
        results = _run_sweep(root, chapters or [], sweep, profile, values, force, scheduler, workers, not quiet)
    elif scheduler or workers:
        raise ValueError("--scheduler and --workers are of a sweep; give --sweep FILE too")
    else:
        results = runner.run(root, chapters or (), profile=profile, parameters=values, force=force, progress=not quiet)
        for result in results:
            print(f"{result.chapter}: {result.status}, {result.folder.relative_to(root)}")
    _exit_if_failed(results)


@app.command()
def store(
    chapters: Chapters = None,
    text: Annotated[bool, typer.Option("--text", help="Only bring stored prose up to date; execute nothing.")] = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Execute chapters with their default parameters and write them with outputs into book/; and launch/ anew."""
    from ntkbook.publish import launch as launched
    from ntkbook.publish import storing

    root = find_root()
    if text:
        storing.store_text(root, chapters or ())
        launched.write(root)
        return
    results = storing.store(root, chapters or (), force=force, progress=not quiet)
    launched.write(root)
    _exit_if_failed(results)


@app.command()
def html() -> None:
    """Build _build/html from the stored notebooks, executing nothing."""
    print(site.build(find_root()))


@app.command()
def book(force: Force = False, quiet: Quiet = False) -> None:
    """Run every chapter in the quick profile, build the book from these runs, print the scorecard."""
    from ntkbook.publish import storing

    root = find_root()
    results = runner.run(root, profile="quick", force=force, progress=not quiet)
    results = [storing.unless_edited(root, result) for result in results]
    print(scorecard.as_text(scorecard.entries(root), scorecard.gather_runs(root / "runs", "quick")))
    try:
        print(f"The book: {site.build(root, site.stage(root, results))}")
    except site.BuildError as error:  # perhaps as chapters failed, which are told below in any case
        print(f"ntkbook: {error}", file=sys.stderr)
        _exit_if_failed(results)
        raise typer.Exit(1) from error
    _exit_if_failed(results)


@app.command()
def claims(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As the README's table.")] = False,
    readme: Annotated[bool, typer.Option("--readme", help="Write table and picture into the README.")] = False,
    profile: Annotated[str, typer.Option(help="Of the runs in runs/ with this profile, not the stored ones.")] = "",
) -> None:
    """Show the claims with their stored values and verdicts."""
    root = find_root()
    if profile and readme:
        raise ValueError("the README shows the stored claims; give --readme or --profile, not both")
    found = scorecard.entries(root, profile)
    if readme:
        scorecard.write_readme(root / "README.md", found)
    elif as_json:
        _print_json({"summary": scorecard.summary(entry["verdict"] for entry in found), "claims": found})
    elif markdown:
        print(scorecard.as_markdown(found))
    else:
        print(scorecard.as_text(found))


@app.command()
def compare(
    one: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or such as 03/quick, 03/cpu, 03/stored.")],
    two: Annotated[str, typer.Argument(metavar="RUN", help="Another; its name alone if of the same chapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what changed between two runs of a chapter: parameters, versions, data, claims, times.

    A run is a folder with a card.json, or CHAPTER/NAME with a folder's name in runs/<chapter>/, or CHAPTER/stored for
    the run that the book shows.
    """
    root = find_root()
    first = comparison.find(root, one)
    second = comparison.find(root, two, first.card["chapter"])
    if as_json:
        _print_json(comparison.compare(first, second))
    else:
        print(comparison.as_text(first, second))


@app.command()
def cite(
    write: Annotated[bool, typer.Option("--write", help="Bring book/cite.md up to date.")] = False,
) -> None:
    """Show how to cite the paper, the book and each data set."""
    from ntkbook.publish import citing

    root = find_root()
    if write:
        print(citing.write(root))
    else:
        print("\n\n".join(citing.sections(root).values()))


@app.command()
def launch() -> None:
    """Write launch/: chapters for Colab and Binder, which first install what they need."""
    from ntkbook.publish import launch as launched

    print(*launched.write(find_root()), sep="\n")


@data.command()
def status() -> None:
    """Where each data set would come from now; never touches the network."""
    from ntkbook.experiments.data import sources

    for told in sources.status():
        files = f"{told.files} of {told.files_wanted} files" if told.files_wanted else "no files needed"
        download = f", {told.bytes_to_download / 1e6:.0f} MB to download" if told.bytes_to_download else ""
        print(f"{told.name:15} {told.where:12} {files}{download}  {told.folder}")


@data.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A data set of `ntkbook data status`.")] = "precipitation",
    stations: Annotated[str, typer.Option(help="For precipitation: midwest or all.")] = "midwest",
    quiet: Quiet = False,
) -> None:
    """Say how much is to come and what room it needs; download what is missing, with a progress bar."""
    from ntkbook.experiments.data import sources

    wanted = stations if name == "precipitation" else None
    need = sources.need(name, stations=wanted)
    if need.missing:
        size = f"about {_mb(need.bytes_to_download)} to download" if need.bytes_to_download else "of unknown size"
        room = f", about {_mb(need.bytes_on_disk)} of disk needed" if need.bytes_on_disk else ""
        print(f"{name}: {need.missing} of {need.wanted} files are missing, {size}{room}")
        print(f"{_mb(need.bytes_free)} are free at {need.folder}", flush=True)
    paths = sources.fetch(name, stations=wanted, progress=not quiet)
    print(f"{name}: {len(paths)} files are here")


def _run_sweep(
    root: Path, chapters: list[str], path: str, profile: str, values: dict[str, Any], force: bool,
    scheduler: str, workers: int, progress: bool,
) -> list[runner.Result]:  # fmt: skip
    from ntkbook.publish.sweep import run_sweep

    if len(chapters) != 1:
        raise ValueError(f"a sweep runs one chapter; got {' '.join(chapters) or 'none'}")
    try:
        results = run_sweep(
            root, chapters[0], path, profile=profile, parameters=values, force=force,
            scheduler=scheduler, workers=workers, progress=progress,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("\ninterrupted: what is done is kept, and the same command runs the rest", file=sys.stderr)
        raise typer.Exit(130) from None
    done = sum(result.status != "failed" for result in results)
    table = results[0].folder.parent / "results.parquet"
    print(f"{results[0].chapter}: {done} of {len(results)} jobs done, {table.relative_to(root)}")
    return results


def _parameters(text: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--params: expected YAML such as 'seed: 3', got {text!r}: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"--params: expected YAML such as 'seed: 3', got {text!r}")
    return values


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e7 else f"{size / 1e6:,.0f} MB"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _exit_if_failed(results: list[runner.Result]) -> None:
    failed = [result for result in results if result.status == "failed"]
    if failed:
        print("\n".join(["", "FAILED", *(result.error for result in failed)]), file=sys.stderr)
        raise typer.Exit(1)


def main() -> None:
    """Entry point: errors that a user can mend are shown as one message, without a traceback."""
    try:
        app()
    except runner.Interrupted as stopped:
        print(f"\nntkbook: {stopped}", file=sys.stderr)
        sys.exit(130)  # as shells do
    except ModuleNotFoundError as missing:
        sys.exit(f"ntkbook: {missing.name} is not installed; it comes with the book extra: pip install 'ntkbook[book]'")
    except (ValueError, OSError, site.BuildError) as error:
        sys.exit(f"ntkbook: {error}")


if __name__ == "__main__":
    main()

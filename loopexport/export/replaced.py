"""What is lost when a new export takes the place of an older one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from loopexport.base.checkpoint import MANIFEST
from loopexport.errors import ExportError, OutputError
from loopexport.files.digests import file_sha256

from .directory import BASE_FOLDER, open_export
from .integrity import listed
from .manifest import FileRecord, Manifest, read_manifest
from .results_file import RESULTS


def check_replaceable(out: Path, weights: Mapping[str, FileRecord] | None = None) -> None:
    """Check that no trained weights are lost.

    Args:
        out: where the new export goes; it need not exist.
        weights: those of the new export, if it is a copy of another one.

    Raises:
        OutputError: the older export there holds trained weights; the message says what to do.
    """
    manifest = _manifest(out)
    if manifest is not None and manifest.trained and manifest.weights != weights:
        raise OutputError(
            f"the output {out} holds weights that were trained, perhaps the only copy; choose another directory, or "
            "remove it yourself"
        )


def replacement_warnings(out: Path, *, mlx: bool) -> list[str]:
    """What an export loses that somebody did to it since it was converted, one line each.

    Args:
        out: where the new export goes; it need not exist.
        mlx: whether mlx-lm loads the new one.
    """
    manifest = _manifest(out)
    if manifest is None:
        return []
    lost = tuple(dict.fromkeys([*_added(out, manifest), *_edited(out, manifest)]))
    about_files = [f"{out} loses what was added to it or edited since it was converted: {listed(lost)}"] if lost else []
    return [*about_files, *(_about_mlx(out) if not mlx else [])]


def _manifest(out: Path) -> Manifest | None:
    """The manifest of an export; None if there is none, or it is damaged."""
    try:
        return read_manifest(out) if out.is_dir() else None
    except ExportError:
        return None


def _added(root: Path, manifest: Manifest) -> Iterator[str]:
    written = {*manifest.files, *manifest.weights, MANIFEST} - {RESULTS}
    folders = {name.partition("/")[0] for name in written if "/" in name}
    yield from sorted({path.name for path in root.iterdir()} - written - folders)
    originals = root / BASE_FOLDER
    inside = [f"{BASE_FOLDER}/{path.name}" for path in originals.iterdir()] if originals.is_dir() else []
    yield from sorted(set(inside) - written)


def _edited(root: Path, manifest: Manifest) -> Iterator[str]:
    for name, record in sorted(manifest.files.items()):
        if (root / name).is_file() and file_sha256(root / name) != record.sha256:
            yield name


def _about_mlx(out: Path) -> list[str]:
    try:
        export = open_export(out)
    except ExportError:
        return []
    return [f"mlx-lm loads {out} now, and would not load the new export; add --mlx to keep that"] * export.runs_on_mlx
